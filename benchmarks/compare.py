"""What got slower, larger or less accurate from one run to another, beyond the noise.

Times are compared as ratios to the peers, x = log(softjax / peer), which were measured in pairs, so
that both times share the state of the machine. The change d = x_B - x_A has the variance

    sigma^2 = s^2 + e_A^2 + e_B^2,

where e is the standard error of a ratio within its run, computed from its interval, and s is the
noise between two processes (layout of memory, placement of threads, other processes), which is
common to a suite. Two samples estimate s, and both overestimate it. The first are the peers' own
times, which have not changed. They were not measured in pairs, and so contain the state of the
machine. The move of a peer is therefore the change of the logarithm of its time, minus the median
change of the other peers of the case, or of all peers in the suite if the case has no other. The
second are the changes d themselves; they contain the changes that we look for, but most cases do
not change. s^2 is the smaller of the two estimates, each computed from the median deviation from
the median, minus the median of e_A^2 + e_B^2, which the deviations also contain.

A slowdown is reported if d exceeds all of

    q sigma     where q is the quantile at 0.05 / (2 m), for m comparisons, of Student's
                distribution with FREEDOM degrees, whose tails are as heavy as those of times;
    4 tail      where tail is the largest move of a peer, or, if smaller, the deviation that one d
                in ten exceeds, in case the tails are even heavier;
    5 %         below which a slowdown is not worth an action.

Bytes and errors are deterministic: any growth is reported.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.results import Row, Run, is_softjax

FREEDOM = 5
LEVEL = 0.05
# The smallest noise between two processes that is assumed, and the noise that is assumed if fewer
# than `FEWEST` changes are available to estimate it.
NOISE_FLOOR, NOISE_UNKNOWN, FEWEST = 0.02, 0.1, 8
# Errors are computed from the same inputs, but another order of sums may change the last digits.
ERROR_GROWTH = 1.01
# A reported change exceeds this multiple of the tail, and this factor.
SAFETY, LEAST = 4, 1.05

COMPARED = ("platform", "device", "processor", "cores", "flags")


@dataclass(frozen=True)
class Change:
    """One figure in both runs; `worse` and `better` are true if the change is beyond the noise.

    `seen` is the smallest factor of a time that would have been beyond the noise.
    """

    kind: str
    name: str
    before: float
    after: float
    interval: str = ""
    worse: bool = False
    better: bool = False
    suite: str = ""
    seen: float | None = None


def compare(before: Run, after: Run) -> list[Change]:
    """Every figure that both runs have, compared."""
    first, second = _by_key(before), _by_key(after)
    pairs = [(first[key], second[key]) for key in first if key in second]
    ours = [(a, b) for a, b in pairs if is_softjax(a)]
    return _times(pairs) + _fixed(ours)


def differences(before: Run, after: Run) -> list[str]:
    """The differences between the two environments, one line each."""
    first, second = (
        {key: run.environment.get(key) for key in COMPARED} | run.environment["versions"]
        for run in (before, after)
    )
    return [
        f"{key}: {first.get(key)} -> {second.get(key)}"
        for key in first | second
        if first.get(key) != second.get(key)
    ]


def sensitivity(changes: Sequence[Change]) -> dict[str, float]:
    """The factor from which half of the slowdowns in a suite would be detected."""
    seen: dict[str, list[float]] = {}
    for change in changes:
        if change.seen is not None:
            seen.setdefault(change.suite, []).append(change.seen)
    return {suite: statistics.median(factors) for suite, factors in seen.items()}


def missing(before: Run, after: Run) -> list[str]:
    """The figures that the first run has and the second does not have."""
    return [" ".join(key) for key in _by_key(before) if key not in _by_key(after)]


def _by_key(run: Run) -> dict[tuple[str, str, str], Row]:
    return {(row["suite"], row["case"], row["side"]): row for row in run.rows()}


def _where(row: Row) -> str:
    return f"{row['suite']} {row['case']}"


def _times(pairs: Sequence[tuple[Row, Row]]) -> list[Change]:
    timed = [(a, b) for a, b in pairs if a.get("ratio") and b.get("ratio")]
    quantile = float(stats.t.ppf(1 - LEVEL / (2 * max(len(timed), 1)), FREEDOM))
    changes: list[Change] = []
    for suite in dict.fromkeys(a["suite"] for a, _ in timed):
        own = [(a, b) for a, b in timed if a["suite"] == suite]
        # The noise of a suite with few cases is estimated from all suites.
        told = own if len(own) >= FEWEST else timed
        cases = {(a["suite"], a["case"]) for a, _ in told}
        peers = [(a, b) for a, b in pairs if (a["suite"], a["case"]) in cases]
        moves = [math.log(b["ratio"] / a["ratio"]) for a, b in told]
        within = [math.hypot(_error(a), _error(b)) for a, b in told]
        noise, tail = _noise(moves, _moves_of_peers(peers), within)
        least = max(math.log(LEAST), SAFETY * tail)
        for a, b in own:
            move = math.log(b["ratio"] / a["ratio"])
            margin = max(quantile * math.hypot(noise, _error(a), _error(b)), least)
            low, high = math.exp(move - margin), math.exp(move + margin)
            changes.append(
                Change(
                    f"time over that of {a['side']}",
                    _where(a),
                    a["ratio"],
                    b["ratio"],
                    f"x {math.exp(move):.2f} ({low:.2f}, {high:.2f})",
                    worse=low > 1,
                    better=high < 1,
                    suite=suite,
                    seen=math.exp(margin),
                )
            )
    return changes


def _noise(
    moves: Sequence[float], moves_of_peers: Sequence[float], within: Sequence[float]
) -> tuple[float, float]:
    """The noise between two processes, as the deviation of a normal distribution, and the tail."""
    if len(moves) < FEWEST:
        return NOISE_UNKNOWN, 0.0
    # Both times of a ratio contribute to its noise.
    bulk = min(_deviations(moves, 0.5), math.sqrt(2) * _deviations(moves_of_peers, 0.5))
    tail = min(_deviations(moves, 0.9), max(map(abs, moves_of_peers)))
    between = (1.4826 * bulk) ** 2 - statistics.median(within) ** 2
    return math.sqrt(max(between, NOISE_FLOOR**2)), tail


def _deviations(moves: Sequence[float], share: float) -> float:
    """The deviation from the median that a given share of the moves does not exceed."""
    middle = statistics.median(moves)
    return float(np.quantile([abs(move - middle) for move in moves], share))


def _moves_of_peers(pairs: Sequence[tuple[Row, Row]]) -> list[float]:
    """The changes of the peers' times, each minus the median change of comparable peers."""
    cases: dict[str, list[float]] = {}
    for a, b in pairs:
        if not is_softjax(a) and a.get("seconds") and b.get("seconds"):
            move = math.log(b["seconds"] / a["seconds"])
            cases.setdefault(_where(a), []).append(move)
    everywhere = statistics.median([move for own in cases.values() for move in own] or [0.0])
    return [
        move - (statistics.median(own[:k] + own[k + 1 :]) if len(own) > 1 else everywhere)
        for own in cases.values()
        for k, move in enumerate(own)
    ]


def _error(row: Row) -> float:
    """The standard error of the logarithm of a ratio, computed from its 95 % interval."""
    low, high = (row.get(key) or row["ratio"] for key in ("ratio_low", "ratio_high"))
    return math.log(high / low) / (2 * 1.96)


# The deterministic figures, in words, and the factor above which one is worse.
FIXED = {
    "temporary_bytes": ("temporary bytes", 1.0),
    "wire_bytes": ("bytes on the wire", 1.0),
    "moved_bytes": ("bytes read and written", 1.0),
    "error": ("error", ERROR_GROWTH),
    "wrong": ("wrong results", 1.0),
}


def _fixed(pairs: Sequence[tuple[Row, Row]]) -> list[Change]:
    """Bytes and errors of softjax, and results that became wrong or right."""
    found = [
        Change(kind, _where(a), x, y, worse=y > growth * x, better=x > growth * y)
        for a, b in pairs
        for key, (kind, growth) in FIXED.items()
        if (x := a.get(key)) is not None and (y := b.get(key)) is not None
    ]
    return [c for c in found if c.kind != "wrong results" or c.before != c.after]

"""What got slower, larger or less accurate from one run to another, beyond the noise.

Times are compared as ratios to the peers, x = log(softjax / peer), which were measured in pairs:
the peer is the control that shares the machine and its mood. The change d = x_B - x_A has the
variance

    sigma^2 = s^2 + e_A^2 + e_B^2,

with e the standard error of a ratio within its run, from its interval, and s the noise between two
processes (layout of memory, placement of threads, what else runs), common to a suite. Two samples
tell it, and both tell too much. In the peers' own times nothing has changed; but alone, not in
pairs, they hold the mood of the machine. The move of a peer is the change of its logarithm less the
median of those of the other peers of the case, or of all in the suite where it has no other. The
changes d have no mood, but hold what is looked for, which the bulk of them leaves alone. s^2 is the
smaller estimate, from the median of the deviations from the median, less the median of the
e_A^2 + e_B^2, which are in it too.

A slow-down is said where d is above each of

    q sigma     q the quantile of Student's distribution with FREEDOM degrees, whose tails are as
                heavy as those of times are, at 0.05 / (2 m) for m comparisons,
    4 tail      the largest move of a peer, or the deviation that one d in ten exceeds where it is
                smaller: where tails are heavier still, these grow with them,
    5 %         below which nobody acts.

Bytes and errors are deterministic: any growth counts.
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
# The least noise between two processes that is believed, and what stands for it where fewer than
# `FEWEST` changes are there to tell it.
NOISE_FLOOR, NOISE_UNKNOWN, FEWEST = 0.02, 0.1, 8
# Errors are recomputed from the same numbers, but another order of sums may move the last digits.
ERROR_GROWTH = 1.01
# A change is above so many of the largest moves for no reason, and above this factor.
SAFETY, LEAST = 4, 1.05

COMPARED = ("platform", "device", "processor", "cores", "flags")


@dataclass(frozen=True)
class Change:
    """One figure in both runs; `worse` and `better` are beyond the noise.

    `seen` is the factor from which on a change of a time would have been beyond it.
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
    """Every figure that both runs have."""
    first, second = _by_key(before), _by_key(after)
    pairs = [(first[key], second[key]) for key in first if key in second]
    ours = [(a, b) for a, b in pairs if is_softjax(a)]
    return _times(pairs) + _fixed(ours)


def differences(before: Run, after: Run) -> list[str]:
    """What differs between the two environments, one line each."""
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
    """The factor from which on half of the times of a suite would have been called different."""
    seen: dict[str, list[float]] = {}
    for change in changes:
        if change.seen is not None:
            seen.setdefault(change.suite, []).append(change.seen)
    return {suite: statistics.median(factors) for suite, factors in seen.items()}


def missing(before: Run, after: Run) -> list[str]:
    """What the first run has and the second does not."""
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
        # A suite of few cases learns from all of them what the machine does.
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
    """The noise between two processes, as of a normal distribution with that bulk, and the tail."""
    if len(moves) < FEWEST:
        return NOISE_UNKNOWN, 0.0
    # A ratio moves with both of its times.
    bulk = min(_deviations(moves, 0.5), math.sqrt(2) * _deviations(moves_of_peers, 0.5))
    tail = min(_deviations(moves, 0.9), max(map(abs, moves_of_peers)))
    between = (1.4826 * bulk) ** 2 - statistics.median(within) ** 2
    return math.sqrt(max(between, NOISE_FLOOR**2)), tail


def _deviations(moves: Sequence[float], share: float) -> float:
    """The deviation from the median that a share of some moves stays within."""
    middle = statistics.median(moves)
    return float(np.quantile([abs(move - middle) for move in moves], share))


def _moves_of_peers(pairs: Sequence[tuple[Row, Row]]) -> list[float]:
    """The changes of the peers' times, each less the median of those that it stands beside."""
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
    """The standard error of the logarithm of a ratio, from its interval of 95 %."""
    low, high = (row.get(key) or row["ratio"] for key in ("ratio_low", "ratio_high"))
    return math.log(high / low) / (2 * 1.96)


# What is the same in every run, in words, and the factor above which it is worse.
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

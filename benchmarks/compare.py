"""What got slower, larger or less accurate from one run to another, beyond the noise.

Times are compared as ratios to the peers, x = log(softjax / peer), which were measured in pairs:
the peer is the control that shares the machine and its mood. The change d = x_B - x_A has the
variance

    sigma^2 = s^2 + e_A^2 + e_B^2,

with e the standard error of a ratio within its run, from its interval, and s the noise between
processes (layout of memory, placement of threads), common to a suite and estimated from all its
changes by their median absolute deviation, which a few real changes leave alone. A slow-down is
said where the lower end of the interval d +- q sigma is above zero, q the quantile of Student's
distribution with FREEDOM degrees, whose tails are as heavy as those of times are, at
0.05 / (2 m): with m comparisons, two runs of the same code are called different in one of twenty
comparisons of whole runs, at most.

Bytes and errors are deterministic: any growth counts.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from benchmarks.results import Record, Run, case_of, peer_of, ratio, sides, suite_of

FREEDOM = 5
LEVEL = 0.05
# The least noise between two processes that is believed, and what stands for it where fewer than
# `FEWEST` changes are there to tell it.
NOISE_FLOOR, NOISE_UNKNOWN, FEWEST = 0.02, 0.1, 8
# Errors are recomputed from the same numbers, but another order of sums may move the last digits.
ERROR_GROWTH = 1.01

COMPARED = ("platform", "device", "processor", "cores", "flags")


@dataclass(frozen=True)
class Change:
    """One figure in both runs; `worse` and `better` are beyond the noise."""

    kind: str
    name: str
    before: float
    after: float
    interval: str = ""
    worse: bool = False
    better: bool = False


def compare(before: Run, after: Run) -> list[Change]:
    """Every figure that both runs have."""
    first, second = _by_key(before), _by_key(after)
    shared = [key for key in first if key in second]
    pairs = [(first[key], second[key]) for key in shared]
    return _times(pairs) + _sizes(pairs) + _errors(pairs) + _correctness(pairs)


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


def missing(before: Run, after: Run) -> list[str]:
    """What the first run has and the second does not."""
    return [" ".join(filter(None, key)) for key in _by_key(before) if key not in _by_key(after)]


def _by_key(run: Run) -> dict[tuple, Record]:
    return {(suite_of(r), case_of(r), _first_peer(r)): r for r in run.results()}


def _first_peer(record: Record) -> str | None:
    """The peer of a pair; solvers are one record, whichever is the fastest."""
    return None if "solvers" in record else peer_of(record)


def _times(pairs: Sequence[tuple[Record, Record]]) -> list[Change]:
    both = [(a, b, ratio(a), ratio(b)) for a, b in pairs]
    timed = [(a, b, x, y) for a, b, x, y in both if x and y]
    if not timed:
        return []
    moves: dict[str, list[float]] = {}
    for a, _, x, y in timed:
        moves.setdefault(suite_of(a), []).append(math.log(y[0] / x[0]))
    noise = {suite: _noise(own) for suite, own in moves.items()}
    quantile = float(stats.t.ppf(1 - LEVEL / (2 * len(timed)), FREEDOM))
    changes = []
    for a, _, x, y in timed:
        move = math.log(y[0] / x[0])
        margin = quantile * math.hypot(noise[suite_of(a)], _error(x), _error(y))
        low, high = math.exp(move - margin), math.exp(move + margin)
        changes.append(
            Change(
                "time over that of " + (peer_of(a) or ""),
                f"{suite_of(a)} {case_of(a)}",
                x[0],
                y[0],
                f"x {math.exp(move):.2f} ({low:.2f}, {high:.2f})",
                worse=low > 1,
                better=high < 1,
            )
        )
    return changes


def _noise(moves: Sequence[float]) -> float:
    """The standard deviation of the bulk, as for a normal distribution."""
    if len(moves) < FEWEST:
        return NOISE_UNKNOWN
    middle = statistics.median(moves)
    return max(1.4826 * statistics.median(abs(move - middle) for move in moves), NOISE_FLOOR)


def _error(estimate: tuple[float, float, float]) -> float:
    """The standard error of the logarithm, from an interval of 95 %."""
    return math.log(estimate[2] / estimate[1]) / (2 * 1.96)


def _sizes(pairs: Sequence[tuple[Record, Record]]) -> list[Change]:
    changes = {}
    for a, b in pairs:
        old, new = sides(a)[0], sides(b)[0]
        name = f"{old.suite} {old.case}"
        for kind, x, y in (
            ("temporary bytes", old.temporary_bytes, new.temporary_bytes),
            ("bytes on the wire", old.wire_bytes, new.wire_bytes),
        ):
            if x is not None and y is not None:
                changes[kind, name] = Change(kind, name, x, y, worse=y > x, better=y < x)
    return list(changes.values())


def _errors(pairs: Sequence[tuple[Record, Record]]) -> list[Change]:
    changes = {}
    for a, b in pairs:
        old, new = sides(a)[0], sides(b)[0]
        if old.error is not None and new.error is not None:
            x, y = old.error, new.error
            name = f"{old.suite} {old.case}"
            worse, better = y > ERROR_GROWTH * x, x > ERROR_GROWTH * y
            changes[name] = Change("error", name, x, y, worse=worse, better=better)
    return list(changes.values())


def _correctness(pairs: Sequence[tuple[Record, Record]]) -> list[Change]:
    """Results of softjax that became wrong, or right."""
    changes = {}
    for a, b in pairs:
        old, new = sides(a)[0], sides(b)[0]
        if old.wrong != new.wrong:
            name = f"{old.suite} {old.case}"
            changes[name] = Change(
                "wrong results", name, old.wrong, new.wrong, worse=new.wrong, better=old.wrong
            )
    return list(changes.values())

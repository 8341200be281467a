"""What fills the missing cells of rows that are read in runs: medians and frequent categories.

A median needs no sorted copy of a column. The bits of floating numbers, with the sign turned into
an offset, are integers in the order of the numbers. A pass over the rows counts, among the numbers
that begin with the known bits of the median, those with each value of the next DIGIT bits, and so
finds these bits of the median. The passes end when all such numbers are equal, mostly after three
or four of them, and always after seven. Their memory does not grow with the number of rows.

Source: J. I. Munro and M. S. Paterson, "Selection and sorting with limited storage" (1980).
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import numpy as np

from softjax import processes, tables
from softjax.streaming._survey import runs

DIGIT = 11
# How many of the 64 bits of the median are not yet known after each pass.
UNKNOWN = (53, 42, 31, 20, 9, 0, 0)


class _Counted(NamedTuple):
    """The sums of a pass over the rows.

    The median of an even number of cells is the mean of two, so that two ranks are looked for.
    """

    present: np.ndarray  # how many cells of each feature are not missing, [D]
    sums: np.ndarray  # their sum, [D]
    # How many numbers that begin with the known bits have each value of the next bits, and the
    # smallest and the largest of these numbers; zeros, inf and -inf for indicators of categories.
    digits: np.ndarray  # [2, D, 2^DIGIT]
    low: np.ndarray  # [2, D]
    high: np.ndarray  # [2, D]


def fills(
    rows: tables.FileRows, left_out: np.ndarray, preempted: Callable[[], bool]
) -> list[tables.Column] | None:
    """The columns with the median or the most frequent category of the rows as their fills.

    The rows of `left_out` do not count. The result is that of `tables.with_fills` for all other
    rows in memory, the same on all processes; None if a process is preempted.
    """
    ranks: np.ndarray | None = None
    known, bits = 64, np.zeros((2, rows.num_features), np.uint64)
    for unknown in UNKNOWN:
        found = _counted(rows, left_out, preempted, bits, known, unknown)
        if found is None:
            return None
        if np.all(found.low >= found.high):
            break
        if ranks is None:
            ranks = np.stack([(found.present - 1) // 2, found.present // 2])
        up_to = np.cumsum(found.digits, axis=-1)
        digit = np.argmax(up_to > ranks[..., None], axis=-1)[..., None]
        ranks = ranks - np.take_along_axis(up_to - found.digits, digit, -1)[..., 0]
        bits, known = bits | digit[..., 0].astype(np.uint64) << np.uint64(unknown), unknown
    medians = found.low.mean(axis=0)
    counted = (rows.path, rows.columns, found.present, found.sums)
    return tables.with_fills(*counted, lambda place: medians[place])


def _counted(
    rows: tables.FileRows,
    left_out: np.ndarray,
    preempted: Callable[[], bool],
    bits: np.ndarray,
    known: int,
    unknown: int,
) -> _Counted | None:
    """The sums of all processes; None if one is preempted.

    All but the last `known` of the `bits` [2, D] are known, and this pass leaves `unknown` of them.
    """
    width = rows.num_features
    present, sums = np.zeros(width, np.int64), np.zeros(width)
    digits = np.zeros((2, width, 1 << DIGIT), np.int64)
    low, high = np.full((2, width), np.inf), np.full((2, width), -np.inf)
    next_bits = np.uint64((1 << known - unknown) - 1)
    for start, x, _ in runs(rows, preempted):
        x = x[~np.isin(np.arange(start, start + len(x)), left_out)]
        present += np.sum(~np.isnan(x), axis=0)
        sums += np.nansum(x, axis=0)
        for place in np.flatnonzero(~rows.coded):
            values = x[:, place]
            values = values[~np.isnan(values)] + 0  # -0.0 is 0
            keys = _in_order(values)
            for rank, begins in enumerate(bits[:, place]):
                near = (keys ^ begins) >> np.uint64(known) == 0
                digit = (keys[near] >> np.uint64(unknown) & next_bits).astype(np.int64)
                digits[rank, place] += np.bincount(digit, minlength=1 << DIGIT)
                low[rank, place] = np.min(values[near], initial=low[rank, place])
                high[rank, place] = np.max(values[near], initial=high[rank, place])
    parts = processes.gather((_Counted(present, sums, digits, low, high), preempted()))
    if any(stopped for _, stopped in parts):
        return None
    return reduce(_joined, (part for part, _ in parts))


def _joined(a: _Counted, b: _Counted) -> _Counted:
    low, high = np.minimum(a.low, b.low), np.maximum(a.high, b.high)
    return _Counted(a.present + b.present, a.sums + b.sums, a.digits + b.digits, low, high)


def _in_order(x: np.ndarray) -> np.ndarray:
    """Integers of 64 bits in the order of the numbers x in float64, equal for equal numbers."""
    bits, sign = x.view(np.uint64), np.uint64(1 << 63)
    return np.where(bits & sign, ~bits, bits | sign)

"""The first pass over a file, which finds scales, classes and bad rows before a fit."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from softjax import processes, tables
from softjax.streaming._passes import own_rows

RUN_BYTES = 1 << 23


class Survey(NamedTuple):
    """The results of a pass over all rows."""

    # The mean of each feature over the good rows, float64 [D], rounded to 2^-30 of the scale; 0 for
    # a category, whose features are 0 or 1.
    mean: np.ndarray
    # The standard deviation of each feature, rounded to 2^-30 of itself; 1 for a constant feature
    # and for a category.
    scale: np.ndarray
    classes: list[str]  # the names of the classes, in order
    counts: np.ndarray  # the number of good rows of each class
    # The numbers of the rows that have no label, or a feature that is not finite in float32.
    bad: np.ndarray


class _Moments(NamedTuple):
    """The number of rows, and for each feature its mean, sum of squared deviations and bounds."""

    count: int
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray


def survey(
    rows: tables.FileRows,
    skip_bad: bool = True,
    preempted: Callable[[], bool] = lambda: False,
    see: Callable[[np.ndarray, list[str], np.ndarray], None] = lambda rows, names, codes: None,
) -> Survey | None:
    """Makes one pass over the rows; each process reads its own part of them.

    The moments of runs of rows are joined by a formula that subtracts no large numbers: T. F. Chan,
    G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance" (1983), equation
    2.1.

    Args:
        rows: the rows of a file.
        skip_bad: whether bad rows are reported in the result; otherwise they are an error.
        preempted: called before each run of rows; True, on any process, ends the pass.
        see: called after each run of rows with the numbers of its good rows, the names of their
            classes, and for each row the place of its class among these names.

    Returns:
        `Survey`, the same on all processes; None if any process was preempted.

    Raises:
        DataError: `tables.dataset` would refuse the rows; with `skip_bad`, bad rows are accepted.
    """
    zeros = np.zeros(rows.num_features)
    moments, counts, bad = _Moments(0, zeros, zeros, zeros, zeros), Counter(), []
    missing = np.zeros(rows.num_features, np.int64)
    path, label = rows.path, str(rows.label)
    own = own_rows(rows.num_rows)
    size = max(RUN_BYTES // max(8 * rows.num_features, 1), 1)
    for start in range(own.start, own.stop, size):
        if preempted():
            break
        features, labels = rows.read(start, min(start + size, own.stop))
        x = features.astype(np.float64)
        names, codes = tables.as_classes(path, label, labels, start)
        good = tables.good_rows(x, codes)
        bad.append(start + np.flatnonzero(~good))
        if not good.all():
            missing += tables.missing_cells(x)
        moments = _joined(moments, _moments(x if good.all() else x[good]))
        see(start + np.flatnonzero(good), names, codes[good])
        found = np.bincount(codes[good], minlength=len(names)).tolist()
        counts.update({name: count for name, count in zip(names, found, strict=True) if count})
        if len(counts) > tables.MOST_CLASSES:
            break
    wrong = np.concatenate([*bad, np.empty(0, np.int64)])
    parts = processes.gather((moments, counts, wrong, missing, preempted()))
    if any(part[4] for part in parts):
        return None
    bad = np.concatenate([part[2] for part in parts])
    if len(bad) and not skip_bad:
        raise tables.error_of_rows(rows, bad, np.sum([part[3] for part in parts], axis=0))
    moments, counts = parts[0][:2]
    for part in parts[1:]:
        moments, counts = _joined(moments, part[0]), counts + part[1]
    classes = tables.check_classes(path, label, counts, moments.count, rows.any_classes)
    # The squared deviations of a constant feature are rounding errors, not a scale.
    varies = (moments.high > moments.low) & (moments.squares > 0) & ~rows.coded
    scale = np.where(varies, np.sqrt(moments.squares / moments.count), 1)
    # The order of the sums depends on the number of processes; rounding removes the difference.
    unit = np.ldexp(1.0, np.maximum(np.frexp(scale)[1] - 30, -1000))
    mean, scale = (np.round(part / unit) * unit for part in (moments.mean, scale))
    mean = np.where(varies, mean, np.where(rows.coded, 0, moments.low))
    return Survey(mean, scale, classes, np.array([counts[c] for c in classes]), bad)


def _moments(x: np.ndarray) -> _Moments:
    zeros = np.zeros(x.shape[1])
    if not len(x):
        return _Moments(0, zeros, zeros, zeros, zeros)
    mean = x.mean(0)
    return _Moments(len(x), mean, np.square(x - mean).sum(0), x.min(0), x.max(0))


def _joined(a: _Moments, b: _Moments) -> _Moments:
    if not (a.count and b.count):
        return a if a.count else b
    count = a.count + b.count
    difference = b.mean - a.mean
    mean = a.mean + difference * (b.count / count)
    squares = a.squares + b.squares + difference**2 * (a.count * b.count / count)
    low, high = np.minimum(a.low, b.low), np.maximum(a.high, b.high)
    return _Moments(count, mean, squares, low, high)

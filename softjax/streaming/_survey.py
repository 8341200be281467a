"""What has to be known of a file before a fit, from one pass: scales, classes and bad rows."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from softjax import processes, tables
from softjax.streaming._fit import own_rows

RUN_BYTES = 1 << 23


class Survey(NamedTuple):
    """What a pass over all rows shows.

    Attributes:
        mean: of each feature, over the rows that are good, float64 [D], to 2^-30 of the scale; 0
            for a category, which is 0 or 1.
        scale: the standard deviation, to 2^-30 of it; 1 for a constant feature and a category.
        classes: the names of the classes, in order.
        counts: the number of good rows of each class.
        bad: the rows with a feature that is no finite number of float32, or without a label.
    """

    mean: np.ndarray
    scale: np.ndarray
    classes: list[str]
    counts: np.ndarray
    bad: np.ndarray


class _Moments(NamedTuple):
    """Count, mean, sum of squared differences to it, and bounds, of each feature."""

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
    """One pass over the rows, each process over its own; None where one of them was preempted.

    `see` is given, run by run, the numbers of the good rows, the names of classes, and the places
    of the rows' labels among these.

    Moments of runs of rows are joined as T. F. Chan, G. H. Golub and R. J. LeVeque do, "Algorithms
    for Computing the Sample Variance" (1983), equation 2.1: no difference that cancels.

    Raises:
        DataError: as `tables.dataset`; with `skip_bad`, not for rows that are bad.
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
    # The sums of a constant are off by roundings, which are no scale.
    varies = (moments.high > moments.low) & (moments.squares > 0) & ~rows.coded
    scale = np.where(varies, np.sqrt(moments.squares / moments.count), 1)
    # The number of processes changes the order of the sums, and, after rounding, nothing else.
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

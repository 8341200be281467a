"""The passes over a file before a fit, which find classes, bad rows, means and scales.

Which rows are held out depends on the classes of all rows, and so is known after a pass only. A
second pass then finds the means and scales of the other rows: a difference of the moments of all
rows and of those held out would lose its digits to a held-out number that is far from the others.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from softjax import processes, tables
from softjax.streaming._passes import own_rows

RUN_BYTES = 1 << 23


class Survey(NamedTuple):
    """The results of a pass over rows."""

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
    incomplete: int  # the number of good rows with missing cells, which `keep_missing` allows


class _Moments(NamedTuple):
    """The number of rows, and for each feature its mean, sum of squared deviations and bounds."""

    count: int
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray


class _Found(NamedTuple):
    """The sums of a pass over the rows of one process, or of all processes."""

    moments: _Moments
    counts: Counter[str]  # the number of good rows of each class
    bad: np.ndarray
    missing: np.ndarray  # the number of cells of each feature in bad rows that are not finite
    incomplete: int  # the number of good rows with missing cells


See = Callable[[np.ndarray, list[str], np.ndarray], None]
NONE = np.empty(0, np.int64)


def unseen(rows: np.ndarray, names: list[str], codes: np.ndarray) -> None:
    """Does nothing: the default of `see`."""


def survey(
    rows: tables.FileRows,
    skip_bad: bool = True,
    preempted: Callable[[], bool] = lambda: False,
    see: See = unseen,
    keep_missing: bool = False,
) -> Survey | None:
    """Makes one pass over the rows, of which each process reads its own part.

    The result is the same on all processes. `preempted` is called before each run of rows; if it is
    true on any process, the pass ends, and the result is None. `see` is called after each run with
    the numbers of its good rows, the names of their classes, and for each row the place of its
    class among these names. Bad rows are part of the result, or without `skip_bad` a DataError.
    With `keep_missing` a feature may be missing; it then counts as 0 in its mean and scale, so that
    `survey_without` has to be called for those of the rows without missing cells.
    """
    found = _pass(rows, NONE, preempted, see, keep_missing)
    if found is None:
        return None
    moments, counts, bad, missing, incomplete = found
    tables.refuse_empty(rows, missing)
    if len(bad) and not skip_bad:
        raise tables.error_of_rows(rows, bad, missing)
    label = str(rows.label)
    classes = tables.check_classes(rows.path, label, counts, moments.count, rows.any_classes)
    number = np.array([counts[name] for name in classes])
    return Survey(*_mean_and_scale(moments, rows.coded), classes, number, bad, incomplete)


def survey_without(
    rows: tables.FileRows,
    seen: Survey,
    held_out: np.ndarray,
    preempted: Callable[[], bool] = lambda: False,
) -> Survey | None:
    """The survey with means, scales and counts of the rows that are not held out.

    The classes and the bad rows stay those of all rows. Without rows to hold out, and without fills
    of missing cells, it is the survey itself; otherwise it takes one more pass. `preempted` is that
    of `survey`.
    """
    if not len(held_out) and all(column.fill is None for column in rows.columns):
        return seen
    found = _pass(rows, held_out, preempted, unseen)
    if found is None:
        return None
    mean, scale = _mean_and_scale(found.moments, rows.coded)
    counts = np.array([found.counts[name] for name in seen.classes])
    return seen._replace(mean=mean, scale=scale, counts=counts)


def runs(
    rows: tables.FileRows, preempted: Callable[[], bool]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The rows of this process in runs, until it is preempted.

    Each run has the number of its first row, its features in float64, in which the fills of the
    columns replace missing cells, and its labels.
    """
    own = own_rows(rows.num_rows)
    size = max(RUN_BYTES // max(8 * rows.num_features, 1), 1)
    for start in range(own.start, own.stop, size):
        if preempted():
            return
        features, labels = rows.read(start, min(start + size, own.stop))
        yield start, tables.filled(rows.columns, features.astype(np.float64)), labels


def _pass(
    rows: tables.FileRows,
    left_out: np.ndarray,
    preempted: Callable[[], bool],
    see: See,
    keep_missing: bool = False,
) -> _Found | None:
    """What the rows hold, all but those left out, joined over the processes; None if preempted.

    The moments of runs of rows are joined by a formula that subtracts no large numbers: T. F. Chan,
    G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance" (1983), equation
    2.1.
    """
    zeros = np.zeros(rows.num_features)
    moments, counts, bad = _Moments(0, zeros, zeros, zeros, zeros), Counter(), [NONE]
    missing, incomplete = np.zeros(rows.num_features, np.int64), 0
    for start, x, labels in runs(rows, preempted):
        numbers = np.arange(start, start + len(x))
        names, codes = tables.as_classes(rows.path, str(rows.label), labels, start)
        good = tables.good_rows(x, codes, keep_missing)
        bad.append(numbers[~good])
        if keep_missing or not good.all():
            missing += tables.missing_cells(x)
        if keep_missing:
            absent = np.isnan(x)
            incomplete += int(np.sum(absent.any(axis=1) & good))
            x = np.where(absent, 0, x)
        good &= ~np.isin(numbers, left_out)
        moments = _joined(moments, _moments(x if good.all() else x[good]))
        see(numbers[good], names, codes[good])
        of_names = np.bincount(codes[good], minlength=len(names)).tolist()
        counts.update({name: count for name, count in zip(names, of_names, strict=True) if count})
        if len(counts) > tables.MOST_CLASSES:
            break
    found = _Found(moments, counts, np.concatenate(bad), missing, incomplete)
    parts = processes.gather((found, preempted()))
    if any(stopped for _, stopped in parts):
        return None
    whole = parts[0][0]
    for part, _ in parts[1:]:
        whole = _Found(
            _joined(whole.moments, part.moments),
            whole.counts + part.counts,
            np.concatenate([whole.bad, part.bad]),
            whole.missing + part.missing,
            whole.incomplete + part.incomplete,
        )
    return whole


def _mean_and_scale(moments: _Moments, coded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # The squared deviations of a constant feature are rounding errors, not a scale.
    varies = (moments.high > moments.low) & (moments.squares > 0) & ~coded
    scale = np.where(varies, np.sqrt(moments.squares / moments.count), 1)
    # The order of the sums depends on the number of processes; rounding removes the difference.
    unit = np.ldexp(1.0, np.maximum(np.frexp(scale)[1] - 30, -1000))
    mean, scale = (np.round(part / unit) * unit for part in (moments.mean, scale))
    return np.where(varies, mean, np.where(coded, 0, moments.low)), scale


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

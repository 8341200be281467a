"""What has to be known of rows before a fit, from one pass: scales, classes, rows that are bad."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from softjax import processes
from softjax.streaming._fit import own_rows
from softjax.streaming._rows import Rows
from softjax.tables import LARGEST, DataError

RUN_BYTES = 1 << 23
MOST_CLASSES = 10_000


class Survey(NamedTuple):
    """What a pass over all rows shows.

    Attributes:
        mean: of each feature, over the rows that are good, float64 [D].
        scale: the standard deviation; 1 for a constant feature.
        classes: the labels that there are, in order.
        bad: the rows with a feature that is no finite number of float32, or without a label.
    """

    mean: np.ndarray
    scale: np.ndarray
    classes: np.ndarray
    bad: np.ndarray


def survey(rows: Rows, preempted: Callable[[], bool] = lambda: False) -> Survey | None:
    """One pass over the rows, each process over its own; None where one of them was preempted.

    Moments of runs of rows are joined as T. F. Chan, G. H. Golub and R. J. LeVeque do, "Algorithms
    for Computing the Sample Variance" (1983), equation 2.1: no difference that cancels.
    """
    zeros = np.zeros(rows.num_features)
    moments, classes, bad = (0, zeros, zeros), None, [np.empty(0, np.int64)]
    own = own_rows(rows.num_rows)
    size = max(RUN_BYTES // max(8 * rows.num_features, 1), 1)
    for start in range(own.start, own.stop, size):
        if preempted():
            break
        features, labels = rows.read(start, min(start + size, own.stop))
        x = features.astype(np.float64)
        good = (np.abs(x) <= LARGEST).all(1) & ~_missing(labels)
        wrong = np.flatnonzero(~good)
        bad.append(start + wrong)
        moments = _joined(moments, _moments(x if not len(wrong) else x[good]))
        classes = _all_classes([classes, np.unique(labels[good])])
    parts = processes.gather((moments, classes, np.concatenate(bad), preempted()))
    if any(part[3] for part in parts):
        return None
    total = (0, zeros, zeros)
    for part in parts:
        total = _joined(total, part[0])
    classes = _all_classes([part[1] for part in parts])
    if classes is None or len(classes) < 2:
        shown = "no label" if classes is None or not len(classes) else f"{classes[0]!s}, one class"
        raise DataError(f"the data: all labels are {shown} only.")
    count, mean, squares = total
    scale = np.sqrt(squares / count)
    # The mean of a constant is off by roundings, which are no scale.
    scale = np.where(scale > 64 * np.finfo(float).eps * np.abs(mean), scale, 1)
    return Survey(mean, scale, classes, np.concatenate([part[2] for part in parts]))


def _moments(x: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean and sum of squared differences to it."""
    if not len(x):
        return 0, np.zeros(x.shape[1]), np.zeros(x.shape[1])
    mean = x.mean(0)
    return len(x), mean, np.square(x - mean).sum(0)


def _joined(a: Any, b: Any) -> tuple[int, np.ndarray, np.ndarray]:
    count = a[0] + b[0]
    if not count:
        return a
    difference = b[1] - a[1]
    mean = a[1] + difference * (b[0] / count)
    return count, mean, a[2] + b[2] + difference**2 * (a[0] * b[0] / count)


def _all_classes(parts: list[np.ndarray | None]) -> np.ndarray | None:
    known = [part for part in parts if part is not None]
    classes = np.unique(np.concatenate(known)) if known else None
    if classes is not None and len(classes) > MOST_CLASSES:
        raise DataError(f"the data: the labels have more than {MOST_CLASSES} different values.")
    return classes


def _missing(labels: np.ndarray) -> np.ndarray:
    if labels.dtype == object:
        return np.array([label is None or label != label or label == "" for label in labels])
    return labels != labels if labels.dtype.kind == "f" else np.zeros(len(labels), bool)

"""A cross-validation in NumPy, for data that `_host_newton` fits: its fits run one after another.

The programs of a cross-validation take some ten seconds to compile, and most tables are validated
once. About a hundred fits of a small table take less time. All fits use the same features, since
the held-out examples only have weight 0. They go from the largest penalty to the smallest: each fit
to all examples starts at the one before, and the fits of the folds start at this fit. If the end of
a fit is not clear, its penalty and all smaller ones are left to the compiled programs.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from softjax.regression import _host_newton
from softjax.regression._groups import Outcome
from softjax.regression._host_arrays import placed
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data
from softjax.regression._result import FitResult
from softjax.regression._table import losses, shares_of, targets_of

# The limit of the work of all fits to a small table, N K (D + 16) per product with the features:
# they take up to a few seconds, while the compilation takes more than ten.
MOST_WORK = 1.5e8


def takes(data: Data, num_folds: int) -> bool:
    """Whether `data`, with penalties [P], are sparse or need only a few fits to a small table."""
    (examples, width), fits = data.features.shape, (1 + num_folds) * data.l2.size
    little = fits * examples * data.num_classes * (width + 16) <= MOST_WORK
    return (little or not _host_newton.is_small(data)) and _host_newton.takes("newton-cg", data)


def outcomes(
    data: Data, folds: np.ndarray, num_folds: int, tol: float, max_steps: int | None
) -> tuple[list[Outcome | None], SoftmaxRegression | None]:
    """The outcome of each penalty as in `_groups`, and the parameters of the last fit.

    From the first penalty on for which the end of a fit is not clear, the outcomes are None.
    """
    penalties, dtype = np.asarray(data.l2), data.features.dtype
    ones = np.ones(len(folds), dtype)
    weights = ones if data.weights is None else np.asarray(data.weights)
    whole_targets = targets_of(data)
    known = _host_newton.prepared(data, whole_targets[0])
    inside = [np.where(folds == fold, 0, weights) for fold in range(num_folds)]
    targets = [targets_of(replace(data, weights=w / w.mean())) for w in inside]
    found: list[Outcome | None] = [None] * len(penalties)
    start = None

    def fitted(own: tuple[np.ndarray, float]) -> tuple[FitResult, np.ndarray] | None:
        end = _host_newton.solved(known, own, float(penalties[place]), tol, start)
        return end if end and (max_steps is None or end[0].steps <= max_steps) else None

    for place in np.argsort(-penalties, kind="stable"):
        whole = fitted(whole_targets)
        if whole is None:
            break
        start = whole[0].params
        ends = [end for end in map(fitted, targets) if end is not None]
        if len(ends) < num_folds:
            break
        reports = [_held_out(data, folds == f, weights, z) for f, (_, z) in enumerate(ends)]
        report = tuple(np.array(part, dtype) for part in zip(*reports, strict=True))
        alone = jax.tree.map(lambda leaf: leaf[0], _stacked([whole[0]], dtype))
        found[place] = placed((alone, _stacked([fit for fit, _ in ends], dtype), report))
    return found, start


def _stacked(fits: list[FitResult], dtype: Any) -> FitResult:
    """The fits, stacked as NumPy arrays with the dtypes of the compiled programs."""
    kinds = (dtype, np.int32, np.int32, np.int32, dtype, bool)
    columns = zip(*(fit[1:-1] for fit in fits), strict=True)
    numbers = (np.array(column, kind) for column, kind in zip(columns, kinds, strict=True))
    params: Any = [np.stack(parts) for parts in zip(*(fit.params for fit in fits), strict=True)]
    return FitResult._make([SoftmaxRegression(*params), *numbers, []])


def _held_out(
    data: Data, fold: np.ndarray, weights: np.ndarray, logits: np.ndarray
) -> tuple[float, float]:
    """The weighted mean loss and accuracy on the examples of a fold, from logits [K, N]."""
    z, y = logits[:, fold], shares_of(np.asarray(data.labels)[fold], data.num_classes)
    share = weights[fold].astype(np.float64)
    share = share / share.sum()
    hits = z.argmax(0) == y.argmax(0)
    return float((y * losses(z)).sum(0) @ share), float(share @ hits)

"""A cross-validation of a small table: its fits one after another in NumPy.

Its two programs take seconds to compile, and most tables are validated once. A few fits of a small
table take less time than that, each by `_small.optimum`. All of them must have a clear end there,
or all are left to the compiled programs.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softjax.regression import _small
from softjax.regression._features import in_numpy
from softjax.regression._objective import Data
from softjax.regression._result import FitResult

# More fits, or more work by the measure N K (D + 16) of one product with the features, and a second
# call of the compiled programs would be the faster one by too much.
MOST_FITS, MOST_WORK = 128, 2e7


def takes(data: Data, num_folds: int) -> bool:
    """Whether `data`, with penalties [P], are few fits of a small table."""
    if not (_small.is_small(data) and _small.takes("newton-cg", data)):
        return False
    (examples, width), fits = data.features.shape, (1 + num_folds) * len(data.l2)
    return fits <= MOST_FITS and fits * examples * data.num_classes * (width + 16) <= MOST_WORK


def outcomes(data: Data, folds: np.ndarray, num_folds: int, tol: float) -> list[Any] | None:
    """The outcome of each penalty as in `_groups`; None where the end of some fit is not clear."""
    penalties, dtype = np.asarray(data.l2), data.features.dtype
    ones = np.ones(len(folds), dtype)
    weights = ones if data.weights is None else np.asarray(data.weights)
    inside = [np.where(folds == fold, 0, weights) for fold in range(num_folds)]
    inside = [(kept / kept.mean(dtype=np.float64)).astype(dtype) for kept in inside]
    found: list[Any] = [None] * len(penalties)
    for place in np.argsort(penalties):  # from the smallest on, where an end is least clear
        given = replace(data, l2=penalties[place])
        whole = _small.optimum(given, tol)
        if whole is None:
            return None
        fits = []
        for kept in inside:
            fit = _small.optimum(replace(given, weights=jnp.asarray(kept)), tol)
            if fit is None:
                return None
            fits.append(fit)
        reports = [_held_out(data, folds == f, weights, fit) for f, fit in enumerate(fits)]
        loss, accuracy = (np.array(part, dtype) for part in zip(*reports, strict=True))
        alone = jax.tree.map(lambda leaf: leaf[0], _stacked([whole], dtype))
        outcome = alone, _stacked(fits, dtype), (loss, accuracy)
        found[place] = jax.tree.map(jnp.asarray, outcome)
    return found


def _stacked(fits: list[FitResult], dtype: Any) -> FitResult:
    """The fits along the first axis of NumPy arrays, in the dtypes of the compiled programs."""
    kinds = (dtype, np.int32, np.int32, np.int32, dtype, bool)
    columns = zip(*(fit[1:-1] for fit in fits), strict=True)
    numbers = (np.array(column, kind) for column, kind in zip(columns, kinds, strict=True))
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *(fit.params for fit in fits))
    return FitResult._make([params, *numbers, []])


def _held_out(
    data: Data, fold: np.ndarray, weights: np.ndarray, fit: FitResult
) -> tuple[float, float]:
    """Mean loss and accuracy on the examples of a fold, of mean weight 1."""
    kernel, bias = (np.asarray(part, np.float64) for part in fit.params)
    z = in_numpy(data.features)[fold] @ kernel + bias
    if data.offset is not None:
        z = z + np.asarray(data.offset).T[fold]
    labels = np.asarray(data.labels)[fold]
    y = np.eye(data.num_classes)[labels] if labels.ndim == 1 else labels.astype(np.float64)
    share = weights[fold].astype(np.float64)
    share = share / share.sum()
    log_normaliser = z.max(1) + np.log(np.exp(z - z.max(1)[:, None]).sum(1))
    losses = y.sum(1) * log_normaliser - (y * z).sum(1)
    hits = z.argmax(1) == y.argmax(1)
    return float(share @ losses), float(share @ hits)

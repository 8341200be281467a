"""Checks of the arguments of `softjax.calibration`, and their reshaping to one axis of examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from softjax import _checks
from softjax._foreign import unwrapped
from softjax._labels import ClassIndices, Labels, targets_of
from softjax._numerics import compute_dtype


def rows(
    function: str, argument: str, x: ArrayLike, sample_weights: ArrayLike | None
) -> tuple[Array, Array | None]:
    """x as [N, K] and the weights as [N], at least float32; None for equal weights."""
    x = _checks.real_array(function, argument, x)
    if x.ndim == 0 or not x.shape[-1]:
        expected = "of rank >= 1, with classes on the last axis"
        raise ValueError(_checks.message(function, argument, expected, f"shape {x.shape}"))
    dtype = compute_dtype(x.dtype)
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    w = _checks.weights(function, "sample_weights", sample_weights, x.shape[:-1], dtype)
    refuse_rows(function, argument, "without NaN and +inf", _is_defined, x, w)
    return flat, None if w is None else w.reshape(-1)


def refuse_no_examples(function: str, argument: str, x: Array) -> None:
    """Refuses known logits or probabilities without rows, which tell nothing of a calibration."""
    if _checks.is_concrete(x) and not x.size:  # a traced size may be a symbol
        expected, got = "of at least one example", f"shape {x.shape}"
        raise ValueError(_checks.message(function, argument, expected, got))


def refuse_rows(
    function: str,
    argument: str,
    expected: str,
    good: Callable[[Any], Any],
    x: Array,
    weights: ArrayLike | None,
    shown: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> None:
    """Refuses known entries of `x` for which `good` is false in a row whose weight is not 0.

    `good` returns a truth value for each entry or for each row, and `shown` what the error shows.
    """
    known = weights is None or _checks.is_concrete(weights)
    if not known or _checks.holds(good, x):
        return
    values = np.asarray(x)
    bad = ~np.asarray(good(values))
    if weights is not None:
        counts = np.asarray(unwrapped(weights)) != 0
        bad &= counts.reshape(counts.shape + (1,) * (bad.ndim - counts.ndim))
    _checks.refuse_first(function, argument, expected, shown(values), bad)


def _is_defined(x: Any) -> Any:
    return x < np.inf


def targets(
    function: str, labels: Labels, shape: tuple[int, ...], dtype: DTypeLike
) -> ClassIndices | Array:
    found, rank = targets_of(function, labels, shape, dtype), len(shape) - 1
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[rank:]), found)


def probabilities_of(targets: ClassIndices | Array, like: Array) -> Array:
    """The labels as probabilities of the classes, [N, K]; NaN in the row of a bad label."""
    if not isinstance(targets, ClassIndices):
        return targets
    classes = jnp.arange(like.shape[1], dtype=targets.index.dtype)
    y = (targets.index[:, None] == classes[None]).astype(like.dtype)
    return _checks.nan_where(None if targets.bad is None else targets.bad[:, None], y)

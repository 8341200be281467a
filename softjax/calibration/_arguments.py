"""Checks of the arguments of `softjax.calibration`, and their reshaping to one axis of examples."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from softjax import _checks
from softjax._labels import (
    ClassIndices,
    Labels,
    class_indices,
    distribution,
    indices_of_shape,
    is_class_indices,
)
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
    if sample_weights is None:
        _refuse_undefined(function, argument, x, None)
        return flat, None
    w = _checks.real_array(function, "sample_weights", sample_weights)
    _checks.same_shape(function, "sample_weights", w, x.shape[:-1])
    _checks.not_negative(function, "sample_weights", sample_weights)
    _refuse_undefined(function, argument, x, w)
    return flat, w.reshape(-1).astype(dtype)


def _refuse_undefined(function: str, argument: str, x: Array, weights: Array | None) -> None:
    """Refuses a known NaN or +inf in a row whose weight is not 0."""
    if _checks.holds(_is_below_inf, x) or not (weights is None or _checks.is_concrete(weights)):
        return
    values = np.asarray(x)
    bad = ~_is_below_inf(values)
    if weights is not None:
        bad &= (np.asarray(weights) != 0)[..., None]
    _checks.refuse_first(function, argument, "without NaN and +inf", values, bad)


def _is_below_inf(x: Any) -> Any:
    return x < np.inf


def targets(
    function: str, labels: Labels, shape: tuple[int, ...], dtype: DTypeLike
) -> ClassIndices | Array:
    """Class indices [N] or distributions [N, K]."""
    if not is_class_indices(labels, function):
        return distribution(function, labels, shape, dtype).reshape(-1, shape[-1])
    indices_of_shape(function, labels, shape[:-1])
    index, bad, _ = class_indices(function, labels, shape[-1])
    return ClassIndices(index.reshape(-1), None if bad is None else bad.reshape(-1), None)


def probabilities_of(targets: ClassIndices | Array, like: Array) -> Array:
    """The labels as probabilities of the classes, [N, K]; NaN in the row of a bad label."""
    if not isinstance(targets, ClassIndices):
        return targets
    classes = jnp.arange(like.shape[1], dtype=targets.index.dtype)
    y = (targets.index[:, None] == classes).astype(like.dtype)
    return _checks.nan_where(None if targets.bad is None else targets.bad[:, None], y)

"""The rows that an objective and its derivatives sum over: checked arguments, losses' parts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import ClassIndices, Labels, class_indices, distribution, is_class_indices
from softjax._losses import expected_loss_gradient, index_loss_gradient
from softjax._numerics import compute_dtype
from softjax.regression._model import SoftmaxRegression

EXACT = jax.lax.Precision.HIGHEST  # accelerators round float32 factors otherwise


class Rows(NamedTuple):
    """The arguments of a derivative, checked: features, targets, sample and class weights."""

    x: Array
    targets: ClassIndices | Array
    w: Array | None
    c: Array | None


def checked_rows(
    function: str,
    params: SoftmaxRegression,
    features: ArrayLike,
    labels: Labels,
    sample_weights: ArrayLike | None,
    class_weights: ArrayLike | None = None,
) -> Rows:
    x = features_array(function, params, features)
    shape = (len(x), jnp.shape(params.kernel)[1])
    targets = targets_array(function, labels, shape, x.dtype)
    w = weights_array(function, "sample_weights", sample_weights, shape[:1], x.dtype)
    c = weights_array(function, "class_weights", class_weights, shape[1:], x.dtype)
    return Rows(x, targets, w, c)


def features_array(function: str, params: SoftmaxRegression, features: ArrayLike) -> Array:
    x = _checks.real_array(function, "features", features)
    _checks.same_shape(function, "features", x, (len(x) if x.ndim else 0, len(params.kernel)))
    return x.astype(compute_dtype(jnp.result_type(params.kernel)))


def targets_array(
    function: str, labels: Labels, shape: tuple[int, int], dtype
) -> ClassIndices | Array:
    if not is_class_indices(labels, function):
        return distribution(function, labels, shape, dtype)
    _checks.same_shape(function, "labels", labels, shape[:1])
    return class_indices(function, labels, shape[1])


def weights_array(
    function: str, argument: str, weights: ArrayLike | None, shape: tuple[int, ...], dtype
) -> Array | None:
    if weights is None:
        return None
    w = _checks.real_array(function, argument, weights)
    _checks.same_shape(function, argument, w, shape)
    _checks.not_negative(function, argument, weights)
    return w.astype(dtype)


def counted(x: Array, w: Array | None) -> tuple[Array, Array]:
    """The features, 0 in a row of weight 0, and the share w_i / sum(w) of each row."""
    if w is None:
        return x, jnp.full(len(x), 1 / max(len(x), 1), x.dtype)
    total = jnp.sum(w)
    return jnp.where(w[:, None] == 0, 0, x), w / jnp.where(total == 0, 1, total)


def residuals(z: Array, targets: ClassIndices | Array, c: Array | None) -> Array:
    """dl_i / dz_i, NaN at a bad label."""
    if isinstance(targets, ClassIndices):
        return masses(targets, c, z.dtype)[:, None] * index_loss_gradient(z, targets.index, None)
    return expected_loss_gradient(z, targets if c is None else c * targets)


def masses(targets: ClassIndices | Array, c: Array | None, dtype) -> Array:
    """sum_k c_k y_ik of each row, NaN at a bad label."""
    if not isinstance(targets, ClassIndices):
        return jnp.sum(targets if c is None else c * targets, -1)
    masses = jnp.ones(targets.index.shape, dtype) if c is None else c[targets.index]
    return masses if targets.bad is None else jnp.where(targets.bad, jnp.nan, masses)


def times(share: Array, x: Array) -> Array:
    """share x, and 0 where the share is 0 even if x is NaN."""
    return jnp.where(share == 0, 0, share * x)


def product(x: Array, params: SoftmaxRegression) -> Array:
    """The logits, in the dtype of x."""
    kernel, bias = (leaf.astype(x.dtype) for leaf in params)
    return jnp.matmul(x, kernel, precision=EXACT) + bias


def augmented(x: Array) -> Array:
    """x~ = (x, 1)."""
    return jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], 1)

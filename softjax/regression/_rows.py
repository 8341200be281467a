"""The checked arguments of a derivative or a statistic, and what all of these compute from them."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import ClassIndices, Labels, class_indices, distribution, is_class_indices
from softjax._losses import expected_loss_gradient, index_loss_gradient
from softjax._numerics import compute_dtype
from softjax._weights import is_zero, shares
from softjax.regression._features import (
    is_sparse,
    is_sparse_matrix,
    linear,
    sparse_array,
    with_data,
)
from softjax.regression._model import SoftmaxRegression

if TYPE_CHECKING:
    from softjax.regression._features import Features

EXACT = lax.Precision.HIGHEST  # accelerators round float32 factors otherwise


class Rows(NamedTuple):
    """The arguments of a derivative, checked: features, targets, weights and what is known.

    Attributes:
        x: features [N, D], dense or BCOO.
        targets: ClassIndices or a distribution; None where they do not matter.
        w: sample weights [N]; None for ones.
        c: class weights [K]; None for ones.
        offset: [N, K]; None for zeros.
        constant: 1, or 0 where the model has no intercept.
    """

    x: Any
    targets: Any
    w: Array | None
    c: Array | None
    offset: Array | None = None
    constant: Any = 1


def checked_rows(
    function: str,
    params: SoftmaxRegression,
    features: "Features",
    labels: Labels,
    sample_weights: ArrayLike | None,
    class_weights: ArrayLike | None = None,
    *,
    offset: ArrayLike | None = None,
    fit_intercept: bool = True,
    takes_sparse: bool = False,
) -> Rows:
    x = features_array(function, params, features, takes_sparse)
    shape = (x.shape[0], jnp.shape(params.kernel)[1])
    targets = _targets_array(function, labels, shape, x.dtype)
    w = weights_array(function, "sample_weights", sample_weights, shape[:1], x.dtype)
    c = weights_array(function, "class_weights", class_weights, shape[1:], x.dtype)
    constant = np.asarray(_checks.flag(function, "fit_intercept", fit_intercept), x.dtype)
    return Rows(x, targets, w, c, offset_array(function, params, x, offset), constant)


def features_array(
    function: str, params: SoftmaxRegression, features: "Features", takes_sparse: bool = False
) -> Any:
    """Features [N, D] in the dtype of the parameters, at least float32.

    Sparse ones are made dense, but where a function `takes_sparse`: matrices over all parameters
    take more memory than the rows.
    """
    x = _dense_or_sparse(function, features)
    _checks.same_shape(function, "features", x, (x.shape[0] if x.ndim else 0, len(params.kernel)))
    x = x.astype(compute_dtype(jnp.result_type(params.kernel)))
    return x.todense() if is_sparse(x) and not takes_sparse else x


def _dense_or_sparse(function: str, features: Any) -> Any:
    read = sparse_array if is_sparse_matrix(features) else _checks.real_array
    return read(function, "features", features)


def _targets_array(
    function: str, labels: Labels, shape: tuple[int, int], dtype
) -> ClassIndices | Array:
    if not is_class_indices(labels, function):
        return distribution(function, labels, shape, dtype)
    _checks.same_shape(function, "labels", labels, shape[:1])
    return class_indices(function, labels, shape[1])


def offset_array(
    function: str, params: SoftmaxRegression, x: Any, offset: ArrayLike | None
) -> Array | None:
    """An offset [N, K] in the dtype of the features."""
    if offset is None:
        return None
    array = _checks.real_array(function, "offset", offset)
    _checks.same_shape(function, "offset", array, (x.shape[0], len(params.bias)))
    return array.astype(x.dtype)


def weights_array(
    function: str, argument: str, weights: ArrayLike | None, shape: tuple[int, ...], dtype
) -> Array | None:
    if weights is None:
        return None
    w = _checks.real_array(function, argument, weights)
    _checks.same_shape(function, argument, w, shape)
    _checks.not_negative(function, argument, weights)
    return w.astype(dtype)


def counted(x: Any, w: Array | None) -> tuple[Any, Array]:
    """The features, 0 in a row of weight 0, and the share w_i / sum(w) of each row."""
    if w is None:
        examples = jnp.asarray(x.shape[0], x.dtype)  # which may be symbolic
        return x, jnp.broadcast_to(1 / jnp.maximum(examples, 1), x.shape[:1])
    absent = is_zero(w)
    if is_sparse(x):
        absent = absent.at[x.indices[:, 0]].get(mode="fill", fill_value=True)
        x = with_data(x, jnp.where(absent, 0, x.data))
    else:
        x = jnp.where(absent[:, None], 0, x)
    return x, shares(w)


def residuals(z: Array, targets: ClassIndices | Array, c: Array | None) -> Array:
    """dl_i / dz_i, NaN at a bad label."""
    if isinstance(targets, ClassIndices):
        return masses(targets, c, z.dtype)[:, None] * index_loss_gradient(z, targets.index, None)
    return expected_loss_gradient(z, targets if c is None else c[None] * targets)


def masses(targets: ClassIndices | Array, c: Array | None, dtype) -> Array:
    """sum_k c_k y_ik of each row, NaN at a bad label."""
    if not isinstance(targets, ClassIndices):
        return jnp.sum(targets if c is None else c[None] * targets, -1)
    masses = jnp.ones(targets.index.shape, dtype) if c is None else c[targets.index]
    return _checks.nan_where(targets.bad, masses)


def times(share: Array, x: Array) -> Array:
    """share x, and 0 where the share is 0 even if x is NaN."""
    return jnp.where(share == 0, 0, share * x)


def scores(x: Any, params: SoftmaxRegression) -> Array:
    """The logits without an offset, in the dtype of x."""
    return linear(x, *(leaf.astype(x.dtype) for leaf in params))


def logits_of(rows: Rows, x: Any, params: SoftmaxRegression) -> Array:
    """The logits with the offset of the rows, of their features `x` as they are counted."""
    return with_offset(rows, scores(x, params))


def with_offset(rows: Rows, z: Array) -> Array:
    """z + offset, which is not read in a row of weight 0."""
    if rows.offset is None:
        return z
    if rows.w is None:
        return z + rows.offset
    return z + jnp.where(is_zero(rows.w)[:, None], 0, rows.offset)


def feature_column(l2: ArrayLike, dtype) -> Array:
    """A penalty that is a scalar, or of each feature [D], as what multiplies a kernel [D, K]."""
    return jnp.asarray(l2, dtype).reshape(-1, 1)

"""Derivatives of the cross-entropy: those of logsumexp, with labels."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._labels import ClassIndices, Labels, targets_of
from softjax._losses import expected_loss_gradient, index_loss_gradient
from softjax._numerics import compute_dtype, masked
from softjax._sharding import together
from softjax.derivatives._normalizers import (
    checked_logits,
    checked_vector,
    covariance,
    covariance_product,
)


def cross_entropy_gradient(logits: ArrayLike, labels: Labels) -> Array:
    """Gradient of the cross-entropy with respect to the logits: predicted minus true probabilities.

        g = p - y,  with g_y = -(1 - p_y) for the label y of a class index

    Derivative: H v for integer labels, and Q H v for a distribution with sum Q; -v with respect to
        the distribution.
    Edge cases: a row of -inf gives 0; under a trace, a label out of range gives NaN.

    Args:
        logits: real [..., K], nats.
        labels: class indices [...], a distribution [..., K], or TopKLabels.

    Returns:
        Shape of `logits`, at least float32.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, a label outside [0, K).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.derivatives.cross_entropy_gradient(jnp.array([0.0, 0.0]), jnp.array(1))
        Array([ 0.5, -0.5], dtype=float32)

    Source: Zhang et al., "Dive into Deep Learning", section 4.1.2.3, eq. (4.1.10).
    """
    function = "derivatives.cross_entropy_gradient"
    x = checked_logits(function, logits)
    return _gradient(x, _targets(function, labels, x))


@jax.jit
def _gradient(x: Array, targets: ClassIndices | Array) -> Array:
    x, targets = together((x, targets))
    if not isinstance(targets, ClassIndices):
        return expected_loss_gradient(masked(x, None), targets)
    g = index_loss_gradient(masked(x, None), targets.index, None, x.dtype)
    return g if targets.bad is None else jnp.where(targets.bad[..., None], jnp.nan, g)


def cross_entropy_hessian(logits: ArrayLike, labels: Labels) -> Array:
    """Hessian of the cross-entropy with respect to the logits: covariance of the one-hot label.

        d^2 l / dx dx^T = Q H,    H = diag(p) - p p^T,    Q = sum_k y_k = 1

    Derivative: by automatic differentiation.
    Edge cases: as in softmax_jacobian; under a trace, a label out of range gives NaN.

    Args:
        logits: real [..., K], nats.
        labels: class indices [...], a distribution [..., K], or TopKLabels.

    Returns:
        [..., K, K], exactly symmetric, at least float32.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, a label outside [0, K).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.derivatives.cross_entropy_hessian(jnp.array([0.0, 0.0]), jnp.array(1))
        Array([[ 0.25, -0.25],
               [-0.25,  0.25]], dtype=float32)

    Source: Zhang et al., "Dive into Deep Learning", section 4.1, exercise 1.
    """
    x = checked_logits("derivatives.cross_entropy_hessian", logits)
    mass = _mass("derivatives.cross_entropy_hessian", labels, x)
    return mass[..., None, None] * covariance(x)


def cross_entropy_hvp(logits: ArrayLike, labels: Labels, v: ArrayLike) -> Array:
    """Hessian of the cross-entropy times a vector, in O(K).

        Q H v = Q p (v - <p, v>)

    Derivative: by automatic differentiation.
    Edge cases: as in cross_entropy_hessian.

    Args:
        logits: real [..., K], nats.
        labels: class indices [...], a distribution [..., K], or TopKLabels.
        v: real, shape of `logits`.

    Returns:
        Shape of `logits`, at least float32.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, a label outside [0, K).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> x, v = jnp.array([0.0, 0.0]), jnp.array([1.0, 0.0])
        >>> softjax.derivatives.cross_entropy_hvp(x, jnp.array(1), v)
        Array([ 0.25, -0.25], dtype=float32)

    Source: see cross_entropy_hessian.
    """
    x = checked_logits("derivatives.cross_entropy_hvp", logits)
    v = checked_vector("derivatives.cross_entropy_hvp", "v", v, x)
    mass = _mass("derivatives.cross_entropy_hvp", labels, x)
    product, mass = together((covariance_product(x, v), mass))
    return mass[..., None] * product


def _targets(function: str, labels: Labels, x: Array) -> ClassIndices | Array:
    return targets_of(function, labels, x.shape, compute_dtype(x.dtype))


def _mass(function: str, labels: Labels, x: Array) -> Array:
    """The sum Q of the target probabilities: 1 for a class index, NaN for a bad index."""
    targets = _targets(function, labels, x)
    if not isinstance(targets, ClassIndices):
        return jnp.sum(targets, -1)
    ones = jnp.ones(targets.index.shape, compute_dtype(x.dtype))
    return ones if targets.bad is None else jnp.where(targets.bad, jnp.nan, ones)

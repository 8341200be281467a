"""Derivatives of softmax and logsumexp, and the covariance of the one-hot label that they share."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._log_softmax_core import softmax_and_complement
from softjax._numerics import compute_dtype, inner, masked
from softjax._sharding import together, with_whole_axis
from softjax._softmax_core import relative_to_dominant, softmax_core, tangent_at


def softmax_jacobian(logits: ArrayLike) -> Array:
    """Jacobian of softmax.

        J_ij = dp_i / dx_j = p_i (delta_ij - p_j)

    Derivative: by automatic differentiation.
    Edge cases: a class of probability 0 has a zero row and column; +inf or NaN in a row gives NaN.

    Args:
        logits: real [..., K], nats.

    Returns:
        [..., K, K], exactly symmetric, in the dtype of `logits`.

    Raises:
        TypeError, ValueError: not a real array of rank >= 1.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.derivatives.softmax_jacobian(jnp.array([0.0, 0.0]))
        Array([[ 0.25, -0.25],
               [-0.25,  0.25]], dtype=float32)

    Source: Zhang et al., "Dive into Deep Learning", section 4.1.2.3.
    """
    x = checked_logits("derivatives.softmax_jacobian", logits)
    return covariance(x).astype(x.dtype)


def softmax_jvp(logits: ArrayLike, tangent: ArrayLike) -> Array:
    """Jacobian of softmax times a vector, in O(K).

        J v = p (v - <p, v>)

    Derivative: by automatic differentiation.
    Edge cases: a class of probability 0 gives 0.

    Args:
        logits: real [..., K], nats.
        tangent: real, shape of `logits`.

    Returns:
        Shape and dtype of `logits`.

    Raises:
        TypeError, ValueError: not real arrays of one shape.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.derivatives.softmax_jvp(jnp.array([0.0, 0.0]), jnp.array([1.0, 0.0]))
        Array([ 0.25, -0.25], dtype=float32)

    Source: see softmax_jacobian.
    """
    x = checked_logits("derivatives.softmax_jvp", logits)
    return covariance_product(
        x, checked_vector("derivatives.softmax_jvp", "tangent", tangent, x)
    ).astype(x.dtype)


def softmax_vjp(logits: ArrayLike, cotangent: ArrayLike) -> Array:
    """A vector times the Jacobian of softmax, in O(K); equal to softmax_jvp, since J is symmetric.

        u^T J = p (u - <p, u>)

    Derivative: by automatic differentiation.
    Edge cases: as in softmax_jvp.

    Args:
        logits: real [..., K], nats.
        cotangent: real, shape of `logits`.

    Returns:
        Shape and dtype of `logits`.

    Raises:
        TypeError, ValueError: not real arrays of one shape.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.derivatives.softmax_vjp(jnp.array([0.0, 0.0]), jnp.array([1.0, 0.0]))
        Array([ 0.25, -0.25], dtype=float32)

    Source: see softmax_jacobian.
    """
    x = checked_logits("derivatives.softmax_vjp", logits)
    cotangent = checked_vector("derivatives.softmax_vjp", "cotangent", cotangent, x)
    return covariance_product(x, cotangent).astype(x.dtype)


def logsumexp_gradient(logits: ArrayLike) -> Array:
    """Gradient of logsumexp: the softmax, the mean of the one-hot label.

        d logsumexp / dx_i = p_i

    Derivative: logsumexp_hessian, both modes.
    Edge cases: a row of -inf: 0.

    Args:
        logits: real [..., K], nats.

    Returns:
        Shape and dtype of `logits`.

    Raises:
        TypeError, ValueError: not a real array of rank >= 1.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.derivatives.logsumexp_gradient(jnp.array([0.0, 0.0]))
        Array([0.5, 0.5], dtype=float32)

    Source: Boyd and Vandenberghe, "Convex Optimization" (2004), section 3.1.5.
    """
    return _gradient(checked_logits("derivatives.logsumexp_gradient", logits))


@jax.jit
def _gradient(x: Array) -> Array:
    return softmax_core(masked(x, None), (x.ndim - 1,)).astype(x.dtype)


def logsumexp_hessian(logits: ArrayLike) -> Array:
    """Hessian of logsumexp: the covariance of the one-hot label.

        H = diag(p) - p p^T,    H_ii = p_i (1 - p_i)

    Derivative: by automatic differentiation.
    Edge cases: as in softmax_jacobian. H is positive semidefinite and H 1 = 0.

    Args:
        logits: real [..., K], nats.

    Returns:
        [..., K, K], exactly symmetric, in the dtype of `logits`.

    Raises:
        TypeError, ValueError: not a real array of rank >= 1.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.derivatives.logsumexp_hessian(jnp.array([0.0, -20.0]))
        Array([[ 2.0611537e-09, -2.0611537e-09],
               [-2.0611537e-09,  2.0611537e-09]], dtype=float32)

    Source: Boyd and Vandenberghe (2004), section 3.1.5.
    """
    x = checked_logits("derivatives.logsumexp_hessian", logits)
    return covariance(x).astype(x.dtype)


def logsumexp_hvp(logits: ArrayLike, v: ArrayLike) -> Array:
    """Hessian of logsumexp times a vector, in O(K).

        H v = p (v - <p, v>)

    Derivative: by automatic differentiation.
    Edge cases: as in softmax_jvp.

    Args:
        logits: real [..., K], nats.
        v: real, shape of `logits`.

    Returns:
        Shape and dtype of `logits`.

    Raises:
        TypeError, ValueError: not real arrays of one shape.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.derivatives.logsumexp_hvp(jnp.array([0.0, 0.0]), jnp.array([1.0, 0.0]))
        Array([ 0.25, -0.25], dtype=float32)

    Source: see logsumexp_hessian.
    """
    x = checked_logits("derivatives.logsumexp_hvp", logits)
    v = checked_vector("derivatives.logsumexp_hvp", "v", v, x)
    return covariance_product(x, v).astype(x.dtype)


def logsumexp_hessian_sqrt(logits: ArrayLike) -> Array:
    """A square root S of the Hessian of logsumexp: S z has covariance H for white noise z.

        S = diag(sqrt p) - p sqrt(p)^T,    S S^T = H

    Derivative: by automatic differentiation; infinite where a probability is 0.
    Edge cases: as in softmax_jacobian.

    Args:
        logits: real [..., K], nats.

    Returns:
        [..., K, K] in the dtype of `logits`; not symmetric.

    Raises:
        TypeError, ValueError: not a real array of rank >= 1.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> S = softjax.derivatives.logsumexp_hessian_sqrt(jnp.array([0.0, -1.0, 2.0]))
        >>> H = softjax.derivatives.logsumexp_hessian(jnp.array([0.0, -1.0, 2.0]))
        >>> bool(jnp.allclose(S @ S.T, H))
        True

    Source: (S S^T)_ij = sum_k sqrt(p_k) sqrt(p_k) (delta_ik - p_i) (delta_jk - p_j), which is the
        covariance written as an expectation.
    """
    return _square_root(checked_logits("derivatives.logsumexp_hessian_sqrt", logits))


@jax.jit
def _square_root(x: Array) -> Array:
    p, complement = _probabilities_of_matrix(x)
    root = jnp.sqrt(p)
    return _with_diagonal(-p[..., :, None] * root[..., None, :], root * complement).astype(x.dtype)


def logsumexp_hessian_pinv(logits: ArrayLike) -> Array:
    """Moore-Penrose inverse of the Hessian of logsumexp.

        H^+ = C diag(1 / p) C,    C = I - 1 1^T / K

    Derivative: by automatic differentiation; infinite where a probability is 0.
    Edge cases: classes of probability 0 have zero rows and columns, and K counts only the other
        classes.

    Args:
        logits: real [..., K], nats.

    Returns:
        [..., K, K], exactly symmetric, in the dtype of `logits`.

    Raises:
        TypeError, ValueError: not a real array of rank >= 1.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.derivatives.logsumexp_hessian_pinv(jnp.array([0.0, 0.0]))
        Array([[ 1., -1.],
               [-1.,  1.]], dtype=float32)

    Source: H diag(1/p) H = H and H 1 = 0, so that H^+ is diag(1/p) between two projections on the
        orthogonal complement of 1; the four Penrose conditions follow.
    """
    return _pseudo_inverse(checked_logits("derivatives.logsumexp_hessian_pinv", logits))


@jax.jit
def _pseudo_inverse(x: Array) -> Array:
    p, _ = _probabilities_of_matrix(x)
    support = p > 0
    k = jnp.maximum(jnp.sum(support.astype(p.dtype), -1, keepdims=True), 1)
    # (C diag(1/p) C)_ij = delta_ij / p_i - (1/p_i + 1/p_j - mean(1/p)) / K
    inverse = jnp.where(support, 1 / jnp.where(support, p, 1), 0)
    mean = jnp.sum(inverse, -1, keepdims=True) / k
    shared = -(inverse[..., :, None] + inverse[..., None, :] - mean[..., None]) / k[..., None]
    diagonal = inverse * (1 - 1 / k) + (mean - inverse) / k
    both = support[..., :, None] & support[..., None, :]
    return jnp.where(both, _with_diagonal(shared, diagonal), 0).astype(x.dtype)


def log_partition_cumulants(logits: ArrayLike, direction: ArrayLike, order: int = 4) -> Array:
    """The first cumulants of `direction` under softmax(logits): derivatives of the log-partition.

        kappa_n = d^n/dt^n logsumexp(x + t v) at t = 0
        kappa_1 = <p, v>, kappa_2 = mu_2, kappa_3 = mu_3, kappa_4 = mu_4 - 3 mu_2^2

    where mu_n are the central moments. The cumulants are the mean, the variance, and the skewness
    and excess kurtosis before normalization.

    Derivative: by automatic differentiation.
    Edge cases: a class of probability 0 adds nothing; its v must be finite.

    Args:
        logits: real [..., K], nats.
        direction: v, real, shape of `logits`.
        order: the number of cumulants, 1 to 4.

    Returns:
        [..., order] in the dtype of `logits`.

    Raises:
        TypeError, ValueError: not real arrays of one shape, or an order outside 1 to 4.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> x, v = jnp.array([0.0, 0.0]), jnp.array([1.0, -1.0])
        >>> softjax.derivatives.log_partition_cumulants(x, v, 4)  # derivatives of log cosh t
        Array([ 0.,  1.,  0., -2.], dtype=float32)

    Source: M. J. Wainwright, M. I. Jordan, "Graphical models, exponential families, and
        variational inference" (2008), proposition 3.1.
    """
    function = "derivatives.log_partition_cumulants"
    x = checked_logits(function, logits)
    v = checked_vector(function, "direction", direction, x)
    order = _checks.integer(function, "order", order)
    if order not in (1, 2, 3, 4):
        raise ValueError(_checks.message(function, "order", "1, 2, 3 or 4", order))
    return _cumulants(x, v, order)


@partial(jax.jit, static_argnums=2)
def _cumulants(x: Array, v: Array, order: int) -> Array:
    x, v = together((x, v))
    p, _ = softmax_and_complement(masked(x, None))
    v = v.astype(p.dtype)
    # Moments about the dominant class, if there is one, do not cancel.
    dominant = p > 0.5
    w = relative_to_dominant(dominant, v, (x.ndim - 1,))
    offset = jnp.sum(jnp.where(dominant, v, 0), -1)
    mean = inner(p, w, (x.ndim - 1,))
    mu_2, mu_3, mu_4 = (jnp.sum(p * (w - mean) ** n, -1) for n in (2, 3, 4))
    cumulants = [offset + mean[..., 0], mu_2, mu_3, mu_4 - 3 * mu_2**2]
    return jnp.stack(cumulants[:order], -1).astype(x.dtype)


def checked_logits(function: str, logits: ArrayLike) -> Array:
    """The argument `logits` of `function` as an array of rank >= 1."""
    x = _checks.real_array(function, "logits", logits)
    if x.ndim == 0:
        raise ValueError(_checks.message(function, "logits", "of rank >= 1", "rank 0"))
    return x


def checked_vector(function: str, argument: str, v: ArrayLike, x: Array) -> Array:
    """A vector for each row of the logits `x`."""
    v = _checks.real_array(function, argument, v)
    _checks.same_shape(function, argument, v, x.shape)
    return v


def _probabilities_of_matrix(x: Array) -> tuple[Array, Array]:
    """p and 1 - p for a matrix [K, K]; a mesh cannot shard both of its axes."""
    return softmax_and_complement(with_whole_axis(masked(x, None), x.ndim - 1))


@jax.jit
def covariance(x: Array) -> Array:
    """H = diag(p) - p p^T, [..., K, K], at least float32."""
    p, one_minus_p = _probabilities_of_matrix(x)
    return _with_diagonal(-p[..., :, None] * p[..., None, :], p * one_minus_p)


@jax.jit
def covariance_product(x: Array, v: Array) -> Array:
    """H v = p (v - <p, v>), at least float32."""
    x, v = together((x, v))
    wide = v.astype(compute_dtype(x.dtype))
    return tangent_at(masked(x, None), wide, (x.ndim - 1,), v.dtype)


def _with_diagonal(matrix: Array, diagonal: Array) -> Array:
    return jnp.where(jnp.eye(diagonal.shape[-1], dtype=bool), diagonal[..., :, None], matrix)

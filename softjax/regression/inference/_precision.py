"""Functions of the covariance of the parameters, in a precision that keeps their variances.

The variance of a logit, x~^T V x~, is of the size of the variation of a feature, and the entries of
V are as large as the square of its mean. With a mean of r standard deviations the difference loses
the digits of r^2: all of them in float32 for a latitude or a year. So V is kept in float64, its
functions are computed in float64, and a variance of which rounding leaves too little is refused.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from softjax import _checks
from softjax._numerics import compute_dtype
from softjax.regression._model import SoftmaxRegression, refuse_other_params
from softjax.regression.inference._optimum import NoCovarianceError

# A variance is refused if the rounding of the covariance matrix may change it by this part.
LOST = 2e-3


class Variances(NamedTuple):
    """A result, and which of its variances the rounding of the covariance matrix has hidden."""

    result: Any
    lost: Array


def of_covariance(core: Callable[..., Variances]) -> Callable[..., Any]:
    """core(params, v, eps, *others, **static) as a compiled function of the covariance v.

    `eps` is the rounding of v. The variance of a logit far from the origin of the features is a
    small difference of large entries of v. So the computation is in float64, or under a trace in
    the dtype of the parameters, which the result always has. A variance that v has lost to rounding
    is an error, or NaN under a trace.
    """

    @partial(jax.jit, static_argnames=("dtype", "eps", "static"))
    def compiled(params, v, others, dtype, eps, static):
        params, others = in_dtype(v.dtype, (params, others))
        return in_dtype(dtype, core(params, v, eps, *others, **dict(static)))

    @wraps(core)
    def run(function: str, params: SoftmaxRegression, v: Array, *others: Any, **static: Any) -> Any:
        dtype = compute_dtype(jnp.result_type(params.kernel))
        own_eps = float(jnp.finfo(v.dtype).eps)
        options = tuple(static.items())
        if not all(map(_checks.is_concrete, jax.tree.leaves((params, v, others)))):
            v, eps = v.astype(dtype), max(own_eps, float(jnp.finfo(dtype).eps))
            return compiled(params, v, others, dtype, eps, options).result
        with jax.enable_x64(True):
            found = compiled(params, v.astype(np.float64), others, dtype, own_eps, options)
            if _checks.checks_values(found.lost) and np.any(found.lost):
                expected = "precise enough for a variance that features far from 0 make a small "
                expected += "difference of its entries: float64, or of centred features"
                got = f"{v.dtype}, whose rounding hides {np.sum(found.lost)} variances"
                raise NoCovarianceError(_checks.message(function, "covariance", expected, got))
        return found.result

    return run


def in_dtype(dtype: DTypeLike, tree: Any) -> Any:
    """The tree with its floating numbers in this dtype."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def deviations(v: Array) -> Array:
    """The standard deviation of each parameter, [P]; |v_ij| is at most the product of two."""
    return jnp.sqrt(jnp.maximum(jnp.diag(v), 0))


def sound(variance: Array, terms: Array, eps: float) -> tuple[Array, Array]:
    """The variance, NaN where it is lost, and where that is.

    For a variance g^T V g, `terms` is sum_i |g_i| V_ii^(1/2): its square bounds the entries that
    are added, so that eps times this bounds the rounding.
    """
    lost = eps * jnp.square(terms) > LOST * variance
    return jnp.where(lost, jnp.nan, jnp.maximum(variance, 0)), lost


def covariance_array(function: str, params: SoftmaxRegression, covariance: ArrayLike) -> Array:
    refuse_other_params(function, params)
    with jax.enable_x64(True) if _checks.is_concrete(covariance) else nullcontext():
        v = _checks.real_array(function, "covariance", covariance)
        v = v.astype(jax.dtypes.canonicalize_dtype(compute_dtype(v.dtype)))
    d, k = jnp.shape(params.kernel)
    _checks.same_shape(function, "covariance", v, ((d + 1) * k, (d + 1) * k))
    return v


def by_class(params: SoftmaxRegression, v: Array) -> tuple[Array, Array]:
    """theta [D + 1, K] and its covariance [D + 1, K, D + 1, K], in the dtype of v."""
    theta = jnp.concatenate([params.kernel.astype(v.dtype), params.bias[None].astype(v.dtype)])
    return theta, v.reshape(theta.shape * 2)

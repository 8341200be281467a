"""Fewer examples than features: the same problem in N dimensions.

Every gradient is in the span of the rows of X less their mean m, since its residuals sum to 0, and
so is the optimum: with (X - 1 m^T)^T = Q R, kernel = Q V and X kernel + 1 bias^T = R^T V + 1 c^T,
c = bias + kernel^T m. |kernel| = |V|, so that an l2 penalty stays what it is. By QR, not from
X X^T, which would square the condition number; less the mean, which float32 could not take away
from the kernel again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax.regression._metric import LARGEST_FACTOR
from softjax.regression._model import SoftmaxRegression
from softjax.regression._wide import is_wide


class Rotation(NamedTuple):
    """Q as LAPACK keeps it, Householder's vectors [D, N] and their factors [N], and m [D]."""

    reflectors: Array
    factors: Array
    mean: Array


def pays(features: Array) -> bool:
    """Whether N dimensions are worth the factorization, of 2 N^2 D operations."""
    return is_wide(features) and len(features) < LARGEST_FACTOR


@jax.jit
def rotate(features: Array) -> tuple[Array, Rotation]:
    """R^T [N, N], the features in N dimensions, and the way back."""
    mean = jnp.mean(features, 0)
    transposed, factors = jnp.linalg.qr((features - mean).T, mode="raw")  # pyright: ignore
    reflectors = transposed.T
    r = jnp.triu(reflectors[: len(factors)])
    # Where examples are collinear, rows of R are rounding: no feature to be standardised.
    size = jnp.linalg.norm(r, axis=1, keepdims=True)
    r = jnp.where(size > len(r) * jnp.finfo(r.dtype).eps * jnp.max(size), r, 0)
    return r.T, Rotation(reflectors, factors, mean)


@jax.jit
def back(rotation: Rotation, params: SoftmaxRegression) -> SoftmaxRegression:
    """kernel = Q V."""
    q, mean = rotation[:2], rotation.mean
    missing = len(mean) - len(params.kernel)
    kernel = lax.linalg.ormqr(*q, jnp.pad(params.kernel, ((0, missing), (0, 0))))
    return SoftmaxRegression(kernel, params.bias - mean @ kernel)


@jax.jit
def forth(rotation: Rotation, params: SoftmaxRegression) -> SoftmaxRegression:
    """V = Q^T kernel: of a kernel outside of the span, the part inside."""
    q, mean = rotation[:2], rotation.mean
    kernel = lax.linalg.ormqr(*q, params.kernel, transpose=True)[: len(rotation.factors)]
    return SoftmaxRegression(kernel, params.bias + mean @ params.kernel)

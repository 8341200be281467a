"""Fewer examples than features: the same problem in N dimensions, by a QR factorization.

Every gradient lies in the span of the rows of X less their mean m, since its residuals sum to 0
over the examples. With (X - 1 m^T)^T = Q R,

    kernel = Q V,  X kernel + 1 bias^T = R^T V + 1 c^T,  c = bias + kernel^T m,

and |kernel| = |V|, so that an l2 penalty stays what it is. The factorization is that of X and not
of X X^T, which would square the condition number; and of X less its mean, which float32 could not
subtract from the kernel afterwards.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import Data
from softjax.regression._preconditioner import LARGEST_FACTOR

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO


class Rotation(NamedTuple):
    """Q as LAPACK keeps it, Householder's vectors [D, N] and their factors [N], and m [D]."""

    reflectors: Array
    factors: Array
    mean: Array


def is_wide(features: "Array | BCOO") -> bool:
    return 2 * features.shape[0] <= features.shape[1]


def rotation_pays(data: Data) -> bool:
    """Whether N dimensions are worth the factorization, of 2 N^2 D operations.

    Penalty factors do not turn with the features.
    """
    x = data.features
    return data.factors is None and is_wide(x) and len(x) < LARGEST_FACTOR


@jax.jit
def rotate(features: Array, constant: Array | None) -> tuple[Array, Rotation]:
    """R^T [N, N], the features in N dimensions, and the way back; m = 0 without an intercept."""
    mean = jnp.mean(features, 0)
    mean = mean if constant is None else constant * mean
    transposed, factors = jnp.linalg.qr((features - mean[None]).T, mode="raw")  # pyright: ignore
    reflectors = transposed.T
    r = jnp.triu(reflectors[: len(factors)])
    # Where examples are collinear, rows of R are rounding: no feature to be standardised.
    size = jnp.linalg.norm(r, axis=1, keepdims=True)
    r = jnp.where(size > len(r) * jnp.finfo(r.dtype).eps * jnp.max(size), r, 0)
    return r.T, Rotation(reflectors, factors, mean)


@jax.jit
def project(rotation: Rotation, params: SoftmaxRegression) -> SoftmaxRegression:
    """V = Q^T kernel: of a kernel outside of the span, the part inside."""
    q, mean = rotation[:2], rotation.mean
    kernel = lax.linalg.ormqr(*q, params.kernel, transpose=True)[: len(rotation.factors)]
    return SoftmaxRegression(kernel, params.bias + mean @ params.kernel)


@jax.jit
def expand(rotation: Rotation, params: SoftmaxRegression) -> SoftmaxRegression:
    """kernel = Q V, of every kernel of a stack in one product."""
    q, mean = rotation[:2], rotation.mean
    rank, *stack = jnp.moveaxis(params.kernel, -2, 0).shape
    columns = jnp.moveaxis(params.kernel, -2, 0).reshape(rank, -1)
    kernel = lax.linalg.ormqr(*q, jnp.pad(columns, ((0, len(mean) - rank), (0, 0))))
    bias = params.bias - (mean @ kernel).reshape(params.bias.shape)
    kernel = jnp.moveaxis(kernel.reshape(-1, *stack), 0, -2)
    return SoftmaxRegression(kernel, bias)

"""Products with the features: dense or sparse, in full precision, and without a copy of them."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax.regression._sparse import is_sparse

P = ParamSpec("P")
R = TypeVar("R")
# A function of features with more than SMALL numbers is computed for BLOCK numbers at a time, some
# columns of them.
SMALL, BLOCK, FEWEST_COLUMNS = 2**20, 2**19, 16


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose products of float32 are of float32.

    Accelerators round the factors to ten bits or fewer by default. Inner products decide how far a
    solver goes and when it stops, and cost nothing beside those with the features.
    """

    @wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return precise


def product(a: Any, b: Any) -> Array:
    """a @ b, one of which may be BCOO.

    Accelerators round float32 factors to ten bits or fewer by default, which would show in the
    third digit of a loss. The products are bound by memory, so that exact factors cost little.
    """
    if is_sparse(a) or is_sparse(b):
        return a @ b
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def linear(x: Any, kernel: Array, bias: Array) -> Array:
    """x kernel + bias, [..., K], of dense features [..., D] or BCOO [N, D]."""
    z = product(x, kernel)
    return z + jnp.expand_dims(bias, range(z.ndim - 1))


def linear_by_class(x: Any, kernel: Array, bias: Array) -> Array:
    """As `linear` with the classes first, [K, N]: of a kernel [K, D] and a bias [K, 1]."""
    return product(x, kernel.T).T + bias


def by_columns(function: Callable[..., Array], x: Array, *of_column: Array) -> Array:
    """function(x, *of_column), [D, ...], without a copy of x [N, D].

    It makes its rows of the columns of x, and of what is known of each, [D]. Columns and not rows
    of x, which may be sharded. The last block reaches back.
    """
    examples, width = x.shape
    if examples * width <= SMALL:
        return function(x, *of_column)
    size = min(max(BLOCK // examples, FEWEST_COLUMNS), width)
    firsts = np.minimum(np.arange(0, width, size), width - size).astype(np.int32)

    def of_block(first):
        own = (lax.dynamic_slice_in_dim(known, first, size) for known in of_column)
        return function(lax.dynamic_slice_in_dim(x, first, size, 1), *own)

    blocks = lax.map(of_block, jnp.asarray(firsts))
    last = width - size * (len(firsts) - 1)
    first = blocks[:-1].reshape(-1, *blocks.shape[2:])
    return jnp.concatenate([first, blocks[-1, size - last :]])

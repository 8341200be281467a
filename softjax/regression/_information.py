"""The information matrix as a sum of Kronecker products, in chunks of rows.

    I = sum_i a_i (diag(p_i) - p_i p_i^T) kron x~_i x~_i^T,  x~ = (x, 1)

    diag(p) - p p^T = sum_{k < l} p_k p_l (e_k - e_l)(e_k - e_l)^T

so that with B_kl = X~^T diag(a p_k p_l) X~ the block of the classes k and l is -B_kl, and that of
class k is sum_{l != k} B_kl. Nothing is subtracted, 1 - p included: every block is accurate
relative to itself, and I is positive semidefinite.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._sharding import fori_loop
from softjax._softmax import softmax_core
from softjax.regression._rows import EXACT

# A chunk of rows holds this many numbers, 2 MiB of float64, which stay in the cache; but it has
# rows enough to pay for passing over the blocks once a chunk.
CHUNK_SIZE, CHUNK_ROWS = 2**18, 512


def augmented(x: Array) -> Array:
    """x~ = (x, 1)."""
    return jnp.concatenate([x, jnp.ones((x.shape[0], 1), x.dtype)], 1)


def information(x: Array, z: Array, a: Array) -> Array:
    """I [P, P], exactly symmetric; rows and columns have the features first, then the classes.

    Args:
        x: features [N, D].
        z: logits [N, K].
        a: the weights of the rows, [N], >= 0.
    """
    size = (x.shape[1] + 1) * z.shape[1]
    if z.shape[1] < 2:  # one class comes as no surprise
        return jnp.zeros((size, size), x.dtype)
    blocks = _pair_blocks(x, softmax_core(z, (1,)), a)
    matrix = _assembled(blocks).reshape(size, size)
    return (matrix + matrix.T) / 2


def _pair_blocks(x: Array, p: Array, a: Array) -> Array:
    """B[s, :, k, :] = B_kl for l = k + s + 1 mod K: [K // 2, D + 1, K, D + 1].

    Going round the circle of the classes by 1 to K / 2 meets every pair once (twice where the
    step is K / 2), so that each step is one product X~^T (W kron X~) of the same shape.
    """
    d, k = x.shape[1] + 1, p.shape[1]

    def add_chunk(blocks, x, p, a):
        x, a_p = augmented(x), a[:, None] * p

        def add_step(s, blocks):
            w = a_p * jnp.roll(p, -1 - s, 1)
            weighted = (w[:, :, None] * x[:, None, :]).reshape(len(x), k * d)
            return blocks.at[s].add(jnp.matmul(x.T, weighted, precision=EXACT).reshape(d, k, d))

        return fori_loop(0, k // 2, add_step, blocks)

    return sum_of_chunks(add_chunk, jnp.zeros((k // 2, d, k, d), x.dtype), d * k, a, x, p)


def sum_of_chunks(add_chunk: Callable, total: Any, row_size: int, a: Array, *arrays: Array) -> Any:
    """add_chunk(total, *rows of the arrays, rows of a) for one chunk of rows after the other.

    The last chunk reaches back, with a = 0 in the rows that were there before: no row is copied
    to fill it.

    Args:
        add_chunk: returns the total with what the rows add, which must be 0 where a is.
        total: to begin with.
        row_size: how many numbers a row takes for a while.
        a: the weights of the rows, [N].
        arrays: [N, ...].
    """
    n = len(a)
    if not n:
        return total
    rows = min(n, max(CHUNK_ROWS, CHUNK_SIZE // row_size))

    def step(chunk, total):
        first = jnp.minimum(chunk * rows, n - rows)
        a_rows, *parts = (lax.dynamic_slice_in_dim(v, first, rows) for v in (a, *arrays))
        is_new = first + jnp.arange(rows, dtype=jnp.int32) >= chunk * rows
        return add_chunk(total, *parts, jnp.where(is_new, a_rows, 0))

    return fori_loop(0, -(-n // rows), step, total)


def _assembled(blocks: Array) -> Array:
    """The blocks in their places, [D + 1, K, D + 1, K]."""
    k = blocks.shape[2]
    row, column = np.indices((k, k))
    ahead = (column - row) % k
    forward = ahead <= k // 2
    step = np.where(forward, ahead, k - ahead) - 1  # -1 on the diagonal, replaced below
    pairs = blocks[step, :, np.where(forward, row, column)]  # [K, K, D + 1, D + 1]
    is_diagonal = jnp.eye(k, dtype=bool)[:, :, None, None]
    pairs = jnp.where(is_diagonal, 0, pairs)
    full = jnp.where(is_diagonal, jnp.sum(pairs, 1)[:, None], -pairs)
    return full.transpose(2, 0, 3, 1)

"""The sum of Kronecker products that every Hessian of softmax regression is.

    I = sum_i a_i (diag(p_i) - p_i p_i^T) kron x~_i x~_i^T,  x~ = (x, 1)

    diag(p) - p p^T = sum_{k < l} p_k p_l (e_k - e_l)(e_k - e_l)^T

so that with B_kl = X~^T diag(a p_k p_l) X~ the block of the classes k and l is -B_kl, and that of
class k is sum_{l != k} B_kl. Nothing is subtracted, 1 - p included: every block is accurate
relative to itself, and I is positive semidefinite.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._softmax import softmax_core

# A chunk of rows holds this many numbers, 2 MiB of float64, which stay in the cache; but it has
# rows enough to pay for passing over the blocks once a chunk.
_CHUNK_SIZE, _CHUNK_ROWS = 2**18, 512


def augmented(x: Array) -> Array:
    """x~ = (x, 1)."""
    return jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], 1)


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
    (n, d), k = x.shape, p.shape[1]
    d += 1
    steps = k // 2
    rows = min(n, max(_CHUNK_ROWS, _CHUNK_SIZE // (d * k)))

    def add_chunk(chunk, blocks):
        first = jnp.minimum(chunk * rows, n - rows)  # the last chunk reaches back
        x_rows, p_rows, a_rows = (lax.dynamic_slice_in_dim(v, first, rows) for v in (x, p, a))
        is_new = first + jnp.arange(rows, dtype=jnp.int32) >= chunk * rows
        a_p = jnp.where(is_new, a_rows, 0)[:, None] * p_rows
        x_rows = augmented(x_rows)

        def add_step(s, blocks):
            w = a_p * jnp.roll(p_rows, -1 - s, 1)
            weighted = (w[:, :, None] * x_rows[:, None, :]).reshape(rows, k * d)
            block = jnp.matmul(x_rows.T, weighted, precision=lax.Precision.HIGHEST)
            return blocks.at[s].add(block.reshape(d, k, d))

        return lax.fori_loop(0, steps, add_step, blocks)

    chunks = -(-n // rows) if n else 0
    return lax.fori_loop(0, chunks, add_chunk, jnp.zeros((steps, d, k, d), x.dtype))


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

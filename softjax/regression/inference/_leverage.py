"""Leverage of each example, and scores that are corrected for it.

Each example pulls the fit towards itself, which makes its residual too small. Let
A_i = w_i q_i (diag p_i - p_i p_i^T), B_i = X~_i^T H^-1 X~_i and X~_i = (x_i, 1) kron I, and let r_i
be the score of an example with respect to its logits. All of them are in the coordinates of the
K - 1 classes other than the reference. The leverage and the corrected scores are

    leverage_i = tr(A_i B_i),  r_i -> (I - A_i B_i)^(-power) r_i

With power 1 the corrected score is, to first order, the score at the fit to the other examples.
With power 1/2 its expected square is A_i, the information of the example. By
M = A^(1/2) B A^(1/2), which is symmetric,

    f(A B) = f(0) I + A^(1/2) g(M) A^(1/2) B,  g(m) = (f(m) - f(0)) / m,

so that A need not be inverted; A is nearly 0 if the model predicts a probability close to 1.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from softjax.regression._rows import CHUNK_SIZE, EXACT, augmented


class Pulled(NamedTuple):
    """Leverages and corrected scores of all examples."""

    leverage: Array  # [N]
    scores: Array  # the corrected r_i, [N, K - 1]
    squares: Array  # r^T X~^T V X~ r with the corrected r and the given V, [N]


def pulled(
    x: Array, mass: Array, p: Array, scores: Array, inverse: Array, v: Array, power: float
) -> Pulled:
    """The leverages and the corrected scores.

    Args:
        x: features [N, D].
        mass: w_i q_i, [N].
        p: probabilities of the classes other than the reference, [N, K - 1].
        scores: r_i, [N, K - 1].
        inverse: H^-1 [R, R], ordered by feature and then by class.
        v: [R, R].
        power: 0, 1/2 or 1.
    """
    d, k = x.shape[1] + 1, p.shape[1]

    def pairs(matrix):
        return matrix.reshape(d, k, d, k).transpose(0, 2, 1, 3).reshape(d * d, k * k)

    of_inverse, of_v = pairs(inverse), pairs(v)

    def of_row(row):
        x, mass, p, r = row
        outer = (x[:, None] * x).ravel()
        b = jnp.matmul(outer, of_inverse, precision=EXACT).reshape(k, k)
        a = mass * (jnp.diag(p) - p[:, None] * p)
        sizes, vectors = jnp.linalg.eigh(a)
        root = (vectors * jnp.sqrt(jnp.maximum(sizes, 0))) @ vectors.T
        m, turn = jnp.linalg.eigh(root @ b @ root)
        left = jnp.maximum(1 - m, jnp.finfo(m.dtype).eps)
        if power == 1:
            g = 1 / left
        elif power:
            g = 1 / (jnp.sqrt(left) * (1 + jnp.sqrt(left)))
        else:
            g = jnp.zeros_like(left)
        adjusted = r + root @ ((turn * g) @ (turn.T @ (root @ (b @ r))))
        square = adjusted @ jnp.matmul(outer, of_v, precision=EXACT).reshape(k, k) @ adjusted
        return Pulled(jnp.sum(m), adjusted, square)

    batch = max(1, CHUNK_SIZE // (d * d + k * k))
    return lax.map(of_row, (augmented(x), mass, p, scores), batch_size=batch)

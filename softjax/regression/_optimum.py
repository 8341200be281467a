"""The Hessian at an optimum, and its inverse: what the statistics of a fit are made of.

The total objective F = sum_i w_i loss_i + W l2 / 2 |kernel|^2, W = sum_i w_i, does not change with
what every class has in common. So the most frequent class is taken as the reference, phi = 0: the
information about the other K - 1 is then entry by entry that of `information`, with its accuracy,
and the parameters between classes that are centred are theta = T phi, T phi = phi less its mean.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softjax import _checks
from softjax.regression._information import information
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import (
    EXACT,
    Rows,
    augmented,
    counted,
    masses,
    product,
    residuals,
    times,
)

# At an optimum a Newton step does nothing; on separable data it moves a margin by 1 nat for ever.
_STILL = 0.1


class Optimum(NamedTuple):
    """F at fitted parameters, in R = (D + 1) (K - 1) coordinates phi.

    Attributes:
        x: features [N, D], 0 in a row of weight 0.
        weights: w [N].
        counts: w_i sum_k c_k y_ik, [N].
        scores: -dloss_i / dphi_i, [N, K - 1].
        fisher: the information, [R, R].
        inverse: of the Hessian, [R, R].
        classes: [K], the order of the classes in phi, the reference last.
        regular: whether the Hessian has an inverse in this dtype.
        move: by how many nats Newton's step moves a logit.
    """

    x: Array
    weights: Array
    counts: Array
    scores: Array
    fisher: Array
    inverse: Array
    classes: Array
    regular: Array
    move: Array


def at_optimum(params: SoftmaxRegression, rows: Rows, l2: Array | None) -> Optimum:
    """What F is like at `params`, which should be its optimum; K >= 2."""
    x, _ = counted(rows.x, rows.w)
    weights = jnp.ones(len(x), x.dtype) if rows.w is None else rows.w
    z = product(x, params)
    k, d = z.shape[1], x.shape[1] + 1
    size = d * (k - 1)
    counts = times(weights, masses(rows.targets, rows.c, x.dtype))
    fisher = information(x, z, counts).reshape(d, k, d, k)
    reference = jnp.argmax(jnp.einsum("dkdk->k", fisher))
    classes = (reference + 1 + jnp.arange(k)) % k
    others = classes[:-1]
    fisher = jnp.take(jnp.take(fisher, others, 1), others, 3).reshape(size, size)
    scores = -jnp.take(residuals(z, rows.targets, rows.c), others, 1)
    scores = jnp.where(weights[:, None] == 0, 0, scores)
    slope = jnp.matmul(augmented(x).T, weights[:, None] * scores, precision=EXACT)

    h = fisher
    if l2 is not None:
        strength = jnp.sum(weights) * jnp.asarray(l2, x.dtype)
        centring = jnp.eye(k - 1, dtype=x.dtype) - 1 / k  # T^T T
        on_kernel = jnp.diag((jnp.arange(d) < d - 1).astype(x.dtype))
        h += strength * jnp.kron(on_kernel, centring)
        kernel = centred(params.kernel.astype(x.dtype))
        slope = slope.at[:-1].add(-strength * jnp.take(kernel, others, 1))
    inverse, regular = _inverse(h)

    step = jnp.matmul(inverse, slope.ravel(), precision=EXACT).reshape(d, k - 1)
    moves = jnp.matmul(augmented(x), step, precision=EXACT)
    move = jnp.max(jnp.max(moves, 1, initial=0) - jnp.min(moves, 1, initial=0), initial=0)
    return Optimum(x, weights, counts, scores, fisher, inverse, classes, regular, move)


def lifted(matrix: Array, classes: Array) -> Array:
    """T M T^T for M [R, R], in the order of the parameters, [D + 1, K, D + 1, K]."""
    k = len(classes)
    lift = centred(jnp.eye(k, k - 1, dtype=matrix.dtype), 0)
    lift = jnp.zeros_like(lift).at[classes].set(lift)
    d = len(matrix) // (k - 1)
    blocks = matrix.reshape(d, k - 1, d, k - 1)
    full = jnp.einsum("km,dmen,ln->dkel", lift, blocks, lift, precision=EXACT)
    return (full + full.transpose(2, 3, 0, 1)) / 2


def centred(x: Array, axis: int = -1) -> Array:
    return x - jnp.mean(x, axis, keepdims=True)


def only_at_optimum(function: str, result: Array, regular: Array, move: Array) -> Array:
    """`result`, if the parameters are at a regular optimum: an error else, NaN under a trace."""
    if not _checks.is_concrete(regular):
        return jnp.where(regular & (move < _STILL), result, jnp.nan)
    if not regular:
        expected = f"such that the information has an inverse in {result.dtype}"
        got = "features that are collinear, with the constant perhaps, or separable classes"
        raise ValueError(_checks.message(function, "features", expected, got))
    if not float(move) < _STILL:
        got = f"a point from which Newton's step moves a logit by {float(move):.2g} nats: fit "
        got += "further; separable classes, or one without examples, have their optimum at infinity"
        raise ValueError(_checks.message(function, "params", "at the optimum", got))
    return result


def _inverse(h: Array) -> tuple[Array, Array]:
    """The inverse of a positive definite matrix, and whether it has one in this dtype.

    Scaled to a unit diagonal, a pivot is the share 1 - R^2 of a parameter's information that the
    parameters before it do not account for.
    """
    size = len(h)
    scale = jax.lax.rsqrt(jnp.diag(h))
    factor = jnp.linalg.cholesky(scale[:, None] * h * scale)
    pivots = jnp.square(jnp.diag(factor))
    regular = jnp.all(pivots > size * jnp.finfo(h.dtype).eps)  # False beside NaN
    inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(size, dtype=h.dtype))
    return scale[:, None] * inverse * scale, regular

"""The terms of the objective, as functions of parameters, logits and probabilities.

Parameters theta [K, D + 1] are the transposed kernel and, in the last column, the bias. Logits and
probabilities are [K, N]: a softmax over the first axis runs along the examples in full vectors, and
both products, X @ theta^T and R @ X, read the rows of X as they lie in memory.

The functions of arrays of any kind hold for those of NumPy too, which `_table` uses.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._reductions import behind_barrier_on_cpu
from softjax.regression._model import SoftmaxRegression


class Point(NamedTuple):
    """Parameters, with the logits, the objective and its gradient there."""

    theta: Array  # [K, D + 1]
    logits: Array  # [K, N]
    gradient: Array  # of the smooth part of the objective, [K, D + 1]
    value: Array  # the objective
    # sum_i u_i of the function `uncertainty`. On a mesh it is a sum over devices like the gradient,
    # and so it is computed together with it: if one branch of a `cond` sums over devices and
    # another sum runs beside this `cond`, the devices may take the two sums in different orders and
    # wait for each other.
    uncertainty: Array

    @property
    def probabilities(self) -> Array:
        """[K, N]."""
        return probabilities(self.logits)


def pack(params: SoftmaxRegression) -> Array:
    return jnp.concatenate([params.kernel, params.bias[None]]).T


def unpack(theta: Any) -> SoftmaxRegression:
    return SoftmaxRegression(theta[:, :-1].T, theta[:, -1])


def centred(theta: Any) -> Any:
    """`theta` minus its mean over the classes.

    The mean changes no probability and only raises the penalty.
    """
    return theta - theta.mean(0, keepdims=True)


def probabilities(logits: Array) -> Array:
    # Without the barrier XLA:CPU fuses everything into one kernel with three temporary arrays.
    e = lax.optimization_barrier(jnp.exp(logits - jnp.max(logits, 0, keepdims=True)))
    return e / jnp.sum(e, 0, keepdims=True)


def below_largest(logits: Array) -> tuple[Array, Array]:
    """The logits minus the largest one of each example, and the probabilities, for sums in blocks.

    Without the barriers XLA:CPU would compute both, and the maxima, again for each of the sums.
    """
    below = behind_barrier_on_cpu(logits - jnp.max(logits, 0, keepdims=True))
    e = lax.optimization_barrier(jnp.exp(below))
    return below, behind_barrier_on_cpu(e / jnp.sum(e, 0, keepdims=True))


def sum_of_small(p: Any) -> Any:
    """The sum of the probabilities that are no larger than 1/2, [1, N]."""
    return p.__array_namespace__().where(p > 0.5, 0, p).sum(0, keepdims=True)


def complements(p: Any) -> Any:
    """1 - p; for a nearly certain class the sum of the other probabilities, which is exact."""
    return p.__array_namespace__().where(p > 0.5, sum_of_small(p), 1 - p)


def uncertainty(weights: Array, p: Array) -> Array:
    """u_i = w_i sum_k p_ik (1 - p_ik), [N]: the weight of an example in the Hessian."""
    return weights * jnp.sum(p * complements(p), 0)


def balanced(p: Any, residual: Any) -> Any:
    """A residual whose sum over the classes is 0, accurate also for a nearly certain class.

    For such a class it is minus the sum of the others, which are small. As a difference it would
    have a rounding error relative to 1, which a very large feature multiplies.
    """
    total = residual.sum(0, keepdims=True)
    return p.__array_namespace__().where(p > 0.5, residual - total, residual)


def softmax_hvp(weights: Array, p: Array, scores: Array) -> Array:
    """w_i (diag p_i - p_i p_i^T) scores_i."""
    mean = jnp.sum(p * scores, 0, keepdims=True)
    return weights[None] * balanced(p, p * (scores - mean))


def row_norms(theta: Array) -> Array:
    """The Euclidean norms over the classes, [1, D + 1], with the derivative 0 at 0."""
    squares = jnp.sum(theta * theta, 0, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def without_bias(theta: Array) -> Array:
    """`theta` with 0 for the bias."""
    return theta * np.append(np.ones(theta.shape[1] - 1), 0)[None].astype(theta.dtype)


def relative_norm(gradient: Array, bound: Array) -> Array:
    """The largest entry of the gradient, relative to `Problem.gradient_bound`."""
    return jnp.max(jnp.abs(gradient) / bound[None])

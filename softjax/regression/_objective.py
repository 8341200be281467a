"""The objective of softmax regression: its value, its gradient, and its Hessian times a vector.

    f(theta) = sum_ik q_ik (-log p_ik) + l2 / 2 sum_j f_j |kernel_j|^2 + l1 sum_j f_j |kernel_j|_1
                                       + l1_rows sum_j f_j |kernel_j|_2,     p_i = softmax(z_i).

kernel_j [K] is the row of feature j in the kernel, and f_j its penalty factor, 1 unless the caller
gives another one. theta [K, D + 1] holds the transposed kernel and, in its last column, the bias:
the parameters of the features x~ = (x, c) with the constant c = 1. A model without an intercept has
c = 0: all formulas hold, the gradient of the bias is 0, and the bias stays at its initial 0. A
known offset o_i is a part of the logits:

    z_i = theta x~_i + o_i

The targets q are what the labels and the weights are combined into (`_problem`).

Logits and probabilities are [K, N]: a softmax over the first axis runs along the examples in full
vectors, and both products, X @ theta^T and R @ X, read the rows of X as they lie in memory.

The functions of arrays of any kind hold for those of NumPy too, which `_table` uses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._reductions import behind_barrier_on_cpu
from softjax._sharding import cond
from softjax._softmax_core import log_softmax_core
from softjax.regression._features import by_columns, by_examples, is_sparse, product, with_data
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data, Problem


class Point(NamedTuple):
    """Parameters, with the logits, the objective and its gradient there.

    Attributes:
        theta: [K, D + 1].
        logits: [K, N].
        gradient: of the smooth part of the objective, [K, D + 1].
        value: the objective.
        uncertainty: sum_i u_i of the function `uncertainty`. On a mesh it is a sum over devices
            like the gradient, and so it is computed together with it: if one branch of a `cond`
            sums over devices and another sum runs beside this `cond`, the devices may take the two
            sums in different orders and wait for each other.
    """

    theta: Array
    logits: Array
    gradient: Array
    value: Array
    uncertainty: Array

    @property
    def probabilities(self) -> Array:
        """[K, N]."""
        return probabilities(self.logits)


def pack(params: SoftmaxRegression) -> Array:
    return jnp.concatenate([params.kernel, params.bias[None]]).T


def unpack(theta: Array) -> SoftmaxRegression:
    return SoftmaxRegression(theta[:, :-1].T, theta[:, -1])


def centred(theta: Any) -> Any:
    """`theta` minus its mean over the classes.

    The mean changes no probability and only raises the penalty.
    """
    return theta - theta.mean(0, keepdims=True)


def class_scores(problem: Problem, theta: Array) -> Array:
    """theta x~_i, [K, N], linear in theta: one product with the features."""
    bias = problem.constant * theta[:, -1:]
    return product(problem.features, theta[:, :-1].T).T + bias


def logits_at(problem: Problem, theta: Array) -> Array:
    """The logits [K, N] of the parameters: one product with the features."""
    return with_offset(problem, class_scores(problem, theta))


def with_offset(problem: Problem, scores: Array) -> Array:
    """The logits of class scores."""
    return scores if problem.offset is None else scores + problem.offset


def without_offset(problem: Problem, logits: Array) -> Array:
    """The class scores of logits: the part that is linear in the parameters."""
    return logits if problem.offset is None else logits - problem.offset


def pull_back(problem: Problem, residual: Array) -> Array:
    """The transpose of `class_scores`: [K, N] to [K, D + 1], one product with the features."""
    features: Any = problem.features
    bias = problem.constant * jnp.sum(residual, 1, keepdims=True)
    if not is_sparse(features) and features.shape[1] == 1:
        # XLA:CPU adds the rows of a product with a vector one by one, but a sum as a tree.
        kernel = jnp.sum(residual * features[:, 0], 1, keepdims=True)
    else:
        kernel = product(residual, features)
    return jnp.concatenate([kernel, bias], 1)


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


def over_examples(a: Array, b: Array) -> Array:
    """The sum of a b over classes and examples, for a and b [K, N].

    `jnp.vdot` flattens both, which would gather examples that are sharded over a mesh.
    """
    return jnp.sum(a * b)


def softmax_hvp(weights: Array, p: Array, scores: Array) -> Array:
    """w_i (diag p_i - p_i p_i^T) scores_i."""
    mean = jnp.sum(p * scores, 0, keepdims=True)
    return weights[None] * balanced(p, p * (scores - mean))


def example_weights(targets: Array) -> Array:
    """The weights of the examples in the objective, [N]."""
    return jnp.sum(targets, 0)


def without_bias(theta: Array) -> Array:
    """`theta` with 0 for the bias."""
    return theta * np.append(np.ones(theta.shape[1] - 1), 0)[None].astype(theta.dtype)


def penalised(problem: Problem, theta: Array) -> Array:
    """`theta` times the penalty factors, with 0 for the bias, which is not penalised."""
    if problem.factors is None:
        return without_bias(theta)
    return theta * jnp.append(problem.factors, 0)[None]


def ridge(problem: Data | Problem) -> Any:
    """The strength of the squared penalty, a scalar or one for each feature, [D]."""
    return problem.l2 if problem.factors is None else problem.l2 * problem.factors


def row_norms(theta: Array) -> Array:
    """The Euclidean norms over the classes, [1, D + 1], with the derivative 0 at 0."""
    squares = jnp.sum(theta * theta, 0, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def point(problem: Problem, theta: Array, logits: Array) -> Point:
    """The `Point` of parameters with known logits, from one pass over the examples."""

    def sums(q: Array, features: Any, logits: Array) -> tuple[Array, Array, Array]:
        own = problem._replace(features=features, targets=q)
        below, p = below_largest(logits)
        gradient = pull_back(own, residual(own, p))
        return gradient, _loss(q, below, p), jnp.sum(uncertainty(example_weights(q), p))

    gradient, loss, uncertain = by_examples(sums, problem.targets, problem.features, logits)
    gradient += problem.l2 * penalised(problem, theta)
    return Point(theta, logits, gradient, loss + penalties(problem, theta), uncertain)


def residual(problem: Problem, p: Array) -> Array:
    """w p - q, [K, N]; its product with the features is the gradient of the loss.

    For a nearly certain class it is (w - q) - w (1 - p), with 1 - p from `complements`.
    """
    q, weights = problem.targets, example_weights(problem.targets)[None]
    return jnp.where(p > 0.5, (weights - q) - weights * sum_of_small(p), weights * p - q)


def gradient_of_loss(problem: Problem, logits: Array) -> Array:
    """X^T (w p - q) [K, D + 1], from all examples at once, so that it can be differentiated."""
    return pull_back(problem, residual(problem, probabilities(logits)))


def _loss(q: Array, below: Array, p: Array) -> Array:
    """sum_ik q_ik (-log p_ik), where log p is log of the largest p plus `below`.

    The log of a largest p near 1 is log1p of minus the sum of the others.
    """
    rest = sum_of_small(p)[0]
    largest = jnp.where(rest < 0.5, jnp.log1p(-jnp.minimum(rest, 0.5)), jnp.log(jnp.max(p, 0)))
    return -over_examples(q, below) - jnp.sum(example_weights(q) * largest)


def hessian_times(problem: Problem, p: Array, v: Array) -> Array:
    """The Hessian of the smooth part of the objective at probabilities p, times v [K, D + 1]."""
    moved = softmax_hvp(example_weights(problem.targets), p, class_scores(problem, v))
    return pull_back(problem, moved) + problem.l2 * penalised(problem, v)


def value(problem: Problem, theta: Array, logits: Array) -> Array:
    """The objective: sum_ik q_ik (-log p_ik) and the penalties."""
    loss = -over_examples(problem.targets, log_softmax_core(logits, (0,)))
    return loss + penalties(problem, theta)


def penalties(problem: Problem, theta: Array) -> Array:
    """The penalties of the objective."""
    kernel = penalised(problem, theta)
    total = problem.l2 / 2 * jnp.vdot(theta, kernel) + problem.l1 * jnp.sum(jnp.abs(kernel))
    if problem.l1_rows is None:
        return total
    return total + problem.l1_rows * jnp.sum(row_norms(kernel))


def objective(problem: Problem, theta: Array) -> Array:
    """The objective at any parameters: one product with the features."""
    return value(problem, theta, logits_at(problem, theta))


def no_worse_than_zeros(objective: Callable[[Array], Array], theta: Array) -> Array:
    """The start `theta`, or zeros if their objective is lower.

    Parameters that predict other labels with certainty, or are too large for the penalty, are a bad
    start: if every example is nearly certain, the curvature is 0 and Newton's model fails.
    """
    zeros = jnp.zeros_like(theta)

    def better():
        return jnp.where(objective(theta) <= objective(zeros), theta, zeros)

    return cond(jnp.any(theta != 0), better, lambda: theta)


def gradient_bound(problem: Problem) -> Array:
    """(sum_i w_i x_ij^2)^(1/2), [D + 1], a bound of |sum_i w_i (p_ik - y_ik) x_ij|.

    A gradient relative to it does not depend on the units of the features. 1 for a feature of
    zeros.
    """
    features: Any = problem.features
    weights = example_weights(problem.targets)
    if is_sparse(features):
        squares = product(weights, with_data(features, jnp.square(features.data)))
    else:
        squares = by_columns(lambda x: jnp.sum(weights[:, None] * x * x, 0), features)
    squares = jnp.append(squares, problem.constant * jnp.sum(weights))
    return jnp.sqrt(jnp.where(squares > 0, squares, 1))


def relative_norm(gradient: Array, bound: Array) -> Array:
    """The largest entry of the gradient, relative to `gradient_bound`."""
    return jnp.max(jnp.abs(gradient) / bound[None])

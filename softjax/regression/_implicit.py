"""The optimum as a function of the data: derivatives by the implicit function theorem.

At the optimum F(theta, problem) = gradient of the objective = 0, so that

    H d theta = -(dF / d problem) d problem.

One linear solve, by conjugate gradients in the metric of the fit, whatever found the optimum. H is
symmetric: the solve is its own transpose, and serves both modes. With l1 the same holds among the
entries of the kernel that are not 0, where F has l1 sign(theta) in it; the others stay where they
are, but where they are just about to leave.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax.regression import _metric
from softjax.regression._directions import conjugate_gradients, spread
from softjax.regression._problem import (
    Problem,
    centred,
    class_scores,
    example_weights,
    gradient_bound,
    penalised,
    point,
    pull_back,
)

CG_STEPS = 1000


@jax.custom_jvp
def stationary(theta: Array, problem: Problem) -> Array:
    """`theta`, known to be the optimum of `problem` without l1, as a function of `problem`."""
    return theta


@stationary.defjvp
def _stationary_jvp(primals, tangents):
    theta, problem = primals
    theta = stationary(theta, problem)
    p, gradient_dot = _moved_gradient(theta, problem, tangents[1])
    return theta, -solve(problem, p, gradient_dot)


@jax.custom_jvp
def stationary_l1(theta: Array, problem: Problem) -> Array:
    """As `stationary`, with l1."""
    return theta


@stationary_l1.defjvp
def _stationary_l1_jvp(primals, tangents):
    theta, problem = primals
    theta = stationary_l1(theta, problem)
    p, gradient_dot = _moved_gradient(theta, problem, tangents[1])
    active = (theta != 0).at[:, -1].set(True)
    # Along what all classes have in common there is no curvature but that of l2.
    held = jnp.all(active, 0) & (penalised(jnp.ones_like(theta[:1])) * problem.l2 > 0)
    loose = jnp.all(active, 0) & ~held

    def inside(v):
        v = jnp.where(active, v, 0)
        return jnp.where(loose, centred(v), v)

    def beside(v):
        mean = jnp.mean(v, 0, keepdims=True)
        return jnp.where(held, mean / jnp.where(held, problem.l2, 1), 0)

    return theta, -inside(solve(problem, p, inside(gradient_dot), inside, beside))


def _moved_gradient(theta: Array, problem: Problem, problem_dot: Problem) -> tuple[Array, Array]:
    """The probabilities, and how the gradient at `theta` changes with the problem."""
    logits = class_scores(problem.features, theta)
    p = point(problem, theta, logits).probabilities

    def gradient(problem):
        here = point(problem, theta, class_scores(problem.features, theta))
        return here.gradient + problem.l1 * penalised(jnp.sign(theta))

    return p, jax.jvp(gradient, (problem,), (problem_dot,))[1]


def solve(
    problem: Problem,
    p: Array,
    b: Array,
    inside: Callable[[Array], Array] = centred,
    beside: Callable[[Array], Array] = jnp.zeros_like,
    tol: Array | float = 0.0,
) -> Array:
    """H^-1 b on the parameters that `inside` projects to, the identity on the others.

    `beside` is what the metric lacks there, which knows no direction that the classes share. The
    residual is `tol` times the first, or rounding.
    """
    weights = example_weights(problem.targets)

    def hvp(v):
        moved = spread(weights, p, class_scores(problem.features, v))
        return pull_back(problem.features, moved) + problem.l2 * penalised(v)

    s = _metric.standardise(problem, gradient_bound(problem))
    empty = _metric.empty(problem.features, len(p))
    metric = _metric.build(empty, s, weights, p)

    def steepest(g, size):
        return _metric.steepest(s, metric, g, size) + beside(g)

    return solve_within(inside, hvp, steepest, b, tol)


def solve_within(
    inside: Callable[[Array], Array],
    hvp: Callable[[Array], Array],
    steepest: Callable[[Array, Array], Array],
    b: Array,
    tol: Array | float = 0.0,
) -> Array:
    """H^-1 b on what `inside` projects to, b beside it, by conjugate gradients.

    `steepest` is of a gradient and the size of b, the metric's inverse times the first.
    """

    def extended(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return lambda v: inside(function(inside(v))) + (v - inside(v))

    def solution(_, b):
        size = jnp.max(jnp.abs(b))
        size = jnp.where(size > 0, size, 1)
        least = jnp.asarray(8 * jnp.finfo(b.dtype).eps, b.dtype)
        bound = jnp.maximum(least, jnp.asarray(tol, b.dtype))
        up = extended(lambda g: steepest(g, size))
        return conjugate_gradients(extended(hvp), up, b, bound, CG_STEPS)[0]

    return lax.custom_linear_solve(extended(hvp), b, solution, symmetric=True)

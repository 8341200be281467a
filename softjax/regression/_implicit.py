"""The derivative of an optimum with respect to the problem, by the implicit function theorem.

At the optimum F(theta, problem) = gradient of the objective = 0, so that

    H d theta = -(dF / d problem) d problem.

This takes one linear solve, by preconditioned conjugate gradients, whatever found the optimum. H is
symmetric: the solve is its own transpose, and serves both modes. With l1 the same holds among the
entries of the kernel that are not 0, where F contains l1 sign(theta); the other entries stay at 0,
unless they are just about to leave it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax.regression import _preconditioner, _standardised
from softjax.regression._conjugate_gradients import conjugate_gradients
from softjax.regression._data import Problem
from softjax.regression._objective import (
    centred,
    class_scores,
    example_weights,
    gradient_bound,
    logits_at,
    penalised,
    point,
    pull_back,
    row_norms,
    softmax_hvp,
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
    l2 = problem.l2 * penalised(problem, jnp.ones_like(theta[:1]))[0]
    held = jnp.all(active, 0) & (l2 > 0)
    loose = jnp.all(active, 0) & ~held

    def inside(v):
        v = jnp.where(active, v, 0)
        return jnp.where(loose, centred(v), v)

    def beside(v):
        mean = jnp.mean(v, 0, keepdims=True)
        return jnp.where(held[None], mean / jnp.where(held, l2, 1)[None], 0)

    _, bend = jax.linearize(lambda theta: _subgradient(problem, theta), theta)
    return theta, -inside(solve(problem, p, inside(gradient_dot), inside, beside, bend=bend))


def _moved_gradient(theta: Array, problem: Problem, problem_dot: Problem) -> tuple[Array, Array]:
    """The probabilities, and how the gradient at `theta` changes with the problem."""
    p = point(problem, theta, logits_at(problem, theta)).probabilities

    def gradient(problem):
        here = point(problem, theta, logits_at(problem, theta))
        return here.gradient + _subgradient(problem, theta)

    return p, jax.jvp(gradient, (problem,), (problem_dot,))[1]


def _subgradient(problem: Problem, theta: Array) -> Array:
    """The gradient of the penalties with corners; 0 at a corner."""
    slope = problem.l1 * penalised(problem, jnp.sign(theta))
    if problem.l1_rows is None:
        return slope
    norms = row_norms(theta)
    unit = jnp.where(norms > 0, theta / jnp.where(norms > 0, norms, 1), 0)
    return slope + problem.l1_rows * penalised(problem, unit)


def solve(
    problem: Problem,
    p: Array,
    b: Array,
    inside: Callable[[Array], Array] = centred,
    beside: Callable[[Array], Array] = jnp.zeros_like,
    tol: Array | float = 0.0,
    bend: Callable[[Array], Array] = jnp.zeros_like,
) -> Array:
    """H^-1 b on the parameters that `inside` projects to, the identity on the others.

    `beside` preconditions directions that the classes share, which the preconditioner does not
    know. The residual is `tol` times the first one, or rounding. `bend` is the Hessian of penalties
    that are not quadratic.
    """
    weights = example_weights(problem.targets)

    def hvp(v):
        moved = softmax_hvp(weights, p, class_scores(problem, v))
        return pull_back(problem, moved) + problem.l2 * penalised(problem, v) + bend(v)

    s = _standardised.standardise(problem, gradient_bound(problem))
    empty = _preconditioner.empty(problem.features, len(p))
    preconditioner = _preconditioner.build(empty, s, weights, p)

    def precondition(g, size):
        return _preconditioner.precondition(s, preconditioner, g, size) + beside(g)

    return solve_within(inside, hvp, precondition, b, tol)


def solve_within(
    inside: Callable[[Array], Array],
    hvp: Callable[[Array], Array],
    precondition: Callable[[Array, Array], Array],
    b: Array,
    tol: Array | float = 0.0,
) -> Array:
    """H^-1 b on what `inside` projects to, b beside it, by conjugate gradients.

    `precondition` is of a gradient and the size of b, the preconditioner's inverse times the first.
    """

    def extended(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return lambda v: inside(function(inside(v))) + (v - inside(v))

    def solution(_, b):
        size = jnp.max(jnp.abs(b))
        size = jnp.where(size > 0, size, 1)
        least = jnp.asarray(8 * jnp.finfo(b.dtype).eps, b.dtype)
        bound = jnp.maximum(least, jnp.asarray(tol, b.dtype))
        up = extended(lambda g: precondition(g, size))
        return conjugate_gradients(extended(hvp), up, b, bound, CG_STEPS)[0]

    return lax.custom_linear_solve(extended(hvp), b, solution, symmetric=True)

"""The derivative of an optimum with respect to the problem, by the implicit function theorem.

At the optimum F(theta, problem) = gradient of the objective = 0, so that

    H d theta = -(dF / d problem) d problem.

Every solver uses the same rule, with its own F and its own solve with H = dF / d theta. H is
symmetric, so that the solve, by preconditioned conjugate gradients, is its own transpose and serves
both modes. With l1 the same holds among the entries of the kernel that are not 0, where F contains
l1 sign(theta); the other entries stay at 0, except at the points where they are about to leave it.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._custom_jvp import custom_jvp
from softjax.regression import _preconditioner, _standardised
from softjax.regression._linear_solves import conjugate_gradients
from softjax.regression._objective import centred, probabilities, row_norms
from softjax.regression._problem import Problem

CG_STEPS = 1000


class Stationarity(NamedTuple):
    """The condition of an optimum, as functions that hold no data."""

    # (theta, problem) -> F [K, D + 1], which is 0 at the optimum.
    gradient: Callable[[Array, Problem], Array]
    # (theta, problem, b) -> H^-1 b, with H = dF / d theta.
    solve: Callable[[Array, Problem, Array], Array]


@partial(custom_jvp, nondiff_argnums=(0,))
def stationary(condition: Stationarity, theta: Array, problem: Problem) -> Array:
    """`theta`, which satisfies the condition, as a differentiable function of the problem."""
    return theta


@stationary.defjvp
def _stationary_jvp(condition, primals, tangents):
    theta, problem = primals
    theta = stationary(condition, theta, problem)
    gradient = partial(condition.gradient, theta)
    _, gradient_dot = jax.jvp(gradient, (problem,), tangents[1:])
    return theta, -condition.solve(theta, problem, gradient_dot)


def gradient(theta: Array, problem: Problem) -> Array:
    """The gradient of the objective, where the gradient of |x| at 0 is 0."""
    p = probabilities(problem.logits(theta))
    return problem.gradient(theta, p) + corner_gradient(theta, problem)


def corner_gradient(theta: Array, problem: Problem) -> Array:
    """The gradient of the penalties with corners; 0 at a corner."""
    unit = jnp.sign(theta)
    if problem.grouped:
        norms = row_norms(theta)
        unit = jnp.where(norms > 0, theta / jnp.where(norms > 0, norms, 1), 0)
    return problem.l1 * problem.penalised(unit)


def _solve_smooth(theta: Array, problem: Problem, b: Array) -> Array:
    return solve(problem, probabilities(problem.logits(theta)), b)


# The optimum of an objective without corners.
SMOOTH = Stationarity(gradient, _solve_smooth)


def solve(
    problem: Problem,
    p: Array,
    b: Array,
    inside: Callable[[Array], Array] = centred,
    common: Callable[[Array], Array] = jnp.zeros_like,
    bend: Callable[[Array], Array] = jnp.zeros_like,
) -> Array:
    """H^-1 b on the parameters that `inside` projects to, the identity on the others.

    `common` preconditions directions that all classes have in common, which the preconditioner
    projects out. `bend` multiplies a vector with the Hessian of the penalties that are not
    quadratic.
    """

    def hvp(v):
        return problem.hessian_times(p, v) + bend(v)

    s = _standardised.standardise(problem, problem.gradient_bound())
    preconditioner = _preconditioner.build(s, problem.weights, p)

    def precondition(g, size):
        return _preconditioner.precondition(preconditioner, g, size) + common(g)

    return solve_within(inside, hvp, precondition, b)


def solve_within(
    inside: Callable[[Array], Array],
    hvp: Callable[[Array], Array],
    precondition: Callable[[Array, Array], Array],
    b: Array,
) -> Array:
    """H^-1 b on the space that `inside` projects to, b outside of it, by conjugate gradients.

    `precondition` takes a gradient and the size of b, and returns the inverse of the preconditioner
    times the gradient.
    """

    def extended(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return lambda v: inside(function(inside(v))) + (v - inside(v))

    def solution(_, b):
        size = jnp.max(jnp.abs(b))
        size = jnp.where(size > 0, size, 1)
        bound = jnp.asarray(8 * jnp.finfo(b.dtype).eps, b.dtype)
        up = extended(lambda g: precondition(g, size))
        return conjugate_gradients(extended(hvp), up, b, bound, CG_STEPS)[0]

    return lax.custom_linear_solve(extended(hvp), b, solution, symmetric=True)

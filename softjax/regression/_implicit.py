"""The optimum as a function of the data: derivatives by the implicit function theorem.

At the optimum F(theta, problem) = gradient of the objective = 0, so that

    H d theta = -(dF / d problem) d problem.

One linear solve, by conjugate gradients in the metric of the fit, whatever found the optimum. H is
symmetric: the solve is its own transpose, and serves both modes.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax.regression import _metric, _newton
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
    """`theta`, known to be the optimum of `problem`, as a function of `problem`."""
    return theta


@stationary.defjvp
def _stationary_jvp(primals, tangents):
    theta, problem = primals
    theta = stationary(theta, problem)
    logits = class_scores(problem.features, theta)
    p = point(problem, theta, logits).probabilities

    def gradient(problem):
        return point(problem, theta, class_scores(problem.features, theta)).gradient

    _, gradient_dot = jax.jvp(gradient, (problem,), (tangents[1],))
    return theta, -_solve(problem, p, gradient_dot)


def _solve(problem: Problem, p: Array, b: Array) -> Array:
    """H^-1 b on the parameters that are centred over the classes, the identity on the others."""
    weights = example_weights(problem.targets)

    def hvp(v):
        inside = centred(v)
        spread = _newton.spread(weights, p, class_scores(problem.features, inside))
        image = pull_back(problem.features, spread) + problem.l2 * penalised(inside)
        return centred(image) + (v - inside)

    s = _metric.standardise(problem, gradient_bound(problem))
    empty = _metric.empty(problem.features, len(p))
    metric = _metric.build(empty, s, weights, p)

    def solve(_, b):
        size = jnp.max(jnp.abs(b))
        size = jnp.where(size > 0, size, 1)

        def steepest(g):
            return _metric.steepest(s, metric, centred(g), size) + (g - centred(g))

        tol = jnp.asarray(8 * jnp.finfo(b.dtype).eps, b.dtype)
        return _newton.conjugate_gradients(hvp, steepest, b, tol, CG_STEPS)[0]

    return lax.custom_linear_solve(hvp, b, solve, symmetric=True)

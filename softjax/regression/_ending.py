"""A check of the end of a fit: how far the objective may still be above the optimum.

The gradient g of parameters near the optimum is small, and Newton's model says by how much the
objective is above it: g^T H^-1 g / 2. Where features are nearly collinear that is not small, and a
solver need not have seen it: a diagonal preconditioner does not show it, nor does float32, nor do
steps of the first order. So the end is checked once more with the whole Hessian, by conjugate
gradients whose residual r is so small that

    g^T H^-1 g / 2 <= -g^T d / 2 + r^T M^-1 r / (2 c)

is small as well, with c M <= H for the curvatures that float64 can tell from 0. Where there is no
optimum, the same direction d moves an example by a nat, whatever steps the solver took.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax.regression import _preconditioner, _separation, _standardised
from softjax.regression._conjugate_gradients import conjugate_gradients
from softjax.regression._convergence import CONFIRMED, STILL, converged
from softjax.regression._line_search import largest_move
from softjax.regression._objective import (
    Data,
    Problem,
    centred,
    class_scores,
    example_weights,
    gradient_bound,
    hessian_times,
    logits_at,
    normalised,
    penalised,
    point,
    problem_of,
    relative_norm,
    uncertainty,
    value,
)
from softjax.regression._proximal import smallest_subgradient

CG_STEPS = 1000


class Ending(NamedTuple):
    """What is known at the end of a fit.

    Attributes:
        converged: by the rule of all solvers, with what Newton's model promises.
        moving: whether its step moves an example by so much that there may be no optimum.
        value: the objective over the mass of the targets.
    """

    converged: Array
    moving: Array
    value: Array


def seen(problem: Problem, theta: Array, logits: Array, tol: Array) -> Array:
    """Whether the gradient leaves nothing, since the features are not nearly collinear.

    A diagonal preconditioner does not know this. It is also true where l1 is more than they might
    gain: along a unit vector of curvature e the gradient is at most e^(1/2).
    """
    bound, weights = gradient_bound(problem), example_weights(problem.targets)
    s = _standardised.standardise(problem, bound)
    here = point(problem, theta, logits)
    u = uncertainty(weights, here.probabilities).astype(s.ridge.dtype)
    least = _preconditioner.least_curvature(s, u)
    empty = _preconditioner.empty(problem.features, len(theta))
    preconditioner = _preconditioner.build(empty, s, weights, here.probabilities)
    gradient = centred(smallest_subgradient(problem, theta, here.gradient))
    left = _preconditioner.unseen(
        s, preconditioner, gradient, _preconditioner.known_curvature(least)
    )
    little = left <= tol * jnp.maximum(value(problem, theta, logits), tol)
    l1 = problem.l1 if problem.l1_rows is None else problem.l1_rows
    threshold = penalised(problem, l1 / jnp.append(s.scale, 1)[None])[0, :-1]
    threshold = jnp.min(threshold, initial=jnp.inf).astype(least.dtype)
    return little | (threshold * threshold > least + _preconditioner.JITTER * jnp.max(s.rounding))


def look(num_classes: int, data: Data, theta: Any, first: Any, tol: Any) -> Ending:
    """The end of a fit without l1, in float64 whatever its dtype.

    `first` is the objective at the start, over the mass.
    """
    with jax.enable_x64(True):
        data, theta = _doubled((data, theta))
        ending = looked(num_classes, data, theta, np.float64(first), np.float64(tol))
        return jax.tree.map(np.asarray, ending)


def is_proven(num_classes: int, data: Data, theta: Any) -> bool:
    """Whether there is a proof of quasi-complete separation, in float64 whatever the dtype."""
    with jax.enable_x64(True):
        data, theta = _doubled((data, theta))
        return bool(quasi_separated(num_classes, data, theta, jnp.asarray(True)))


@partial(jax.jit, static_argnames="num_classes")
def quasi_separated(num_classes: int, data: Data, theta: Array, suspected: Array) -> Array:
    """Whether there is a proof; a program of its own, since most fits do not need it."""
    data, _ = normalised(data, num_classes)
    return _separation.is_quasi_separated(problem_of(data, num_classes), theta, suspected)


def _doubled(tree: Any) -> Any:
    def doubled(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(np.float64) if floating else leaf

    return jax.tree.map(doubled, tree)


@partial(jax.jit, static_argnames="num_classes")
def looked(num_classes: int, data: Data, theta: Array, first: Array, tol: Array) -> Ending:
    data, _ = normalised(data, num_classes)
    problem, theta = problem_of(data, num_classes), centred(theta)
    bound, weights = gradient_bound(problem), example_weights(problem.targets)
    logits = logits_at(problem, theta)
    here = point(problem, theta, logits)
    gradient, p = centred(here.gradient), here.probabilities
    norm, objective = relative_norm(gradient, bound), value(problem, theta, logits)

    dtype = theta.dtype
    s = _standardised.standardise(problem, bound, dtype)
    preconditioner = _preconditioner.build(
        _preconditioner.empty(problem.features, num_classes, dtype), s, weights, p
    )
    size = jnp.where(norm > 0, norm, 1)

    hvp = partial(hessian_times, problem, p)

    def precondition(g):
        return _preconditioner.precondition(s, preconditioner, g, size)

    little = tol * jnp.maximum(objective, tol) * _preconditioner.LEAST_CURVATURE
    whole = jnp.vdot(gradient, precondition(gradient))
    within = jnp.sqrt(little / jnp.where(whole > 0, whole, 1))
    d, _ = conjugate_gradients(hvp, precondition, -gradient, within, CG_STEPS)
    d = centred(d)
    residual = gradient + hvp(d)
    left = jnp.vdot(residual, precondition(residual)) / (2 * _preconditioner.LEAST_CURVATURE)
    decrement = -jnp.vdot(gradient, d) / 2 + left
    # Rounding of theta and of the logits may have moved a gradient of the size of `tol` by as much.
    reached = converged(objective, first, norm, decrement, CONFIRMED * tol)
    moving = largest_move(class_scores(problem, d)) >= STILL
    return Ending(reached, moving, objective)

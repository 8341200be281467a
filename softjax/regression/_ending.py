"""The final check of a fit: whether it is at the optimum, and whether there is an optimum.

Near the optimum the gradient g is small, and by Newton's model the objective is g^T H^-1 g / 2
above its minimum. If features are nearly collinear, this is not small, and a solver may miss it: a
diagonal preconditioner, float32 and first-order steps do not show it. So the end is checked with
the whole Hessian, by conjugate gradients whose residual r is so small that

    g^T H^-1 g / 2 <= -g^T d / 2 + r^T M^-1 r / (2 c)

is small as well, with c M <= H for the curvatures that float64 can distinguish from 0. If there is
no optimum, the same direction d moves an example by a nat, whatever steps the solver took.

Without a penalty there is no optimum if along some direction d no example's own class falls behind
another, z_iy(d) >= z_ij(d), and at least one example's own class gets ahead. If all get ahead, the
separation is complete; else it is quasi-complete: some parameters grow for ever while the loss
stays above 0.

Newton's step reveals d: it keeps moving the diverging logits by a nat, while all others come to
rest. A projection turns the resting logits into exact ties: let p be uniform over the tied classes;
then

    H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T,  d <- d - H^+ H d

removes the component of d that would break the ties. If then no example falls behind, except by
rounding, and one gets ahead by far more, d is a proof: the rounding errors of the ties could be
removed as well, and this would not undo the lead of the others. Each margin is compared with the
size of its own terms, around means and scales that a very large entry of another example does not
change: those of all examples, with weights that decrease with their distance.

Source: A. Albert and J. A. Anderson, "On the existence of maximum likelihood estimates in logistic
regression models" (1984), theorems 1 to 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._platforms import quickly_compiled, run_where_data_are
from softjax._sharding import while_loop
from softjax.regression import _preconditioner, _standardised
from softjax.regression._descent import largest_move
from softjax.regression._linear_solves import JITTER, conjugate_gradients
from softjax.regression._loop import CONFIRMED, STILL, State, converged
from softjax.regression._objective import (
    Point,
    centred,
    probabilities,
    relative_norm,
    softmax_hvp,
    uncertainty,
)
from softjax.regression._problem import Data, Problem
from softjax.regression._proximal import smallest_subgradient
from softjax.regression._result import Status
from softjax.regression._standardised import Standardised

CG_STEPS = 1000
# The assumed least eigenvalue of the preconditioned Hessian if no features are collinear.
NEARLY = 1e-6
# A class that is this many nats behind does not influence a step: it need neither tie nor move.
DECIDED = 12
# The search tries the ties of Newton's step and then the ties of the parameters, each twice: the
# second time, the classes that fell behind the first time are ties too.
ATTEMPTS = 4
# Each turn reduces the influence of very large entries, in a share f of the examples, on the scale
# to about (4 f)^(1/2) of what it was.
ROBUST_TURNS = 12
# The ties are restored by this many projections, each to this relative residual or a larger one.
# Conjugate gradients do not solve a singular system to full precision at once.
PROJECTIONS, RESIDUAL = 5, 1e-4


class Ending(NamedTuple):
    """The result of the final check of a fit."""

    converged: Array  # by the rule of all solvers, with the decrease that Newton's model predicts
    moving: Array  # whether Newton's step moves an example by so much that there may be no optimum


def nothing_hidden(data: Data, theta: Array, tol: Array) -> Array:
    """Whether no decrease remains hidden, since the features are not nearly collinear.

    A diagonal preconditioner does not show this. The result is also true if l1 is larger than any
    possible gain: along a unit vector of curvature e the gradient is at most e^(1/2).
    """
    problem, _ = data.normalised_problem()
    weights = problem.weights
    s = _standardised.standardise(problem, problem.gradient_bound())
    here = problem.point(theta, problem.logits(theta))
    u = uncertainty(weights, here.probabilities).astype(s.ridge.dtype)
    least = _preconditioner.least_curvature(s, u)
    preconditioner = _preconditioner.build(s, weights, here.probabilities)
    gradient = centred(smallest_subgradient(problem, theta, here.gradient))
    left = _preconditioner.unseen(preconditioner, gradient, _preconditioner.known_curvature(least))
    little = left <= tol * jnp.maximum(here.value, tol)
    threshold = problem.penalised(problem.l1 / jnp.append(s.scale, 1)[None])[0, :-1]
    threshold = jnp.min(threshold, initial=jnp.inf).astype(least.dtype)
    return little | (threshold * threshold > least + JITTER * jnp.max(s.rounding))


def in_float64(check: Callable, *arguments: Any) -> Any:
    """The result of one of the checks below, computed in float64 whatever the dtype of the data."""
    with jax.enable_x64(True):
        found = run_where_data_are(quickly_compiled(check), *as_float64(arguments))
        return jax.tree.map(np.asarray, found)


def as_float64(tree: Any) -> Any:
    """The tree with its floating numbers in float64; `jax.enable_x64` must be on."""

    def wide(leaf: Any) -> Any:
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        return leaf.astype(np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(wide, tree)


def check(data: Data, theta: Array, first: Array, tol: Array) -> Ending:
    """The final check of a fit without l1; `first` is the objective at its start over the mass."""
    (problem, _), theta = data.normalised_problem(), centred(theta)
    here = problem.point(theta, problem.logits(theta))
    gradient = centred(here.gradient)
    d, residual, precondition = _newton(problem, here, gradient, tol, centred, jnp.zeros_like)
    left = jnp.vdot(residual, precondition(residual)) / (2 * _preconditioner.LEAST_CURVATURE)
    decrement = -jnp.vdot(gradient, d) / 2 + left
    norm = relative_norm(gradient, problem.gradient_bound())
    # Rounding of theta and the logits may change a gradient of the size of `tol` by as much.
    reached = converged(here.value, first, norm, decrement, CONFIRMED * tol)
    moving = largest_move(problem.scores(d)) >= STILL
    return Ending(reached, moving)


def check_l1(data: Data, theta: Array, tol: Array) -> Array:
    """Whether the objective of a fit with l1 is within 2 `tol` of the optimum, by Newton's model.

    The model is for the parameters that are not 0, or that the gradient moves away from 0. With the
    penalties s, the optimum theta* has s |theta*| <= f, so that d = theta* - theta has
    s |d| <= 2 f and sum_j (s_j d_j)^2 <= 4 f^2. So for any curvature c added to the model,

        -v^T d - d^T H d / 2 <= v^T (H + c diag(s^2))^-1 v / 2 + 2 c f^2,

    where v is the smallest subgradient, since the penalties are not below their tangents. With
    c = tol / (4 f) the second term is tol f / 2, and penalised parameters have a curvature in every
    direction, even if features are collinear.
    """
    problem, _ = data.normalised_problem()
    here = problem.point(theta, problem.logits(theta))
    slope = smallest_subgradient(problem, theta, here.gradient)
    active = ((theta != 0) | (slope != 0)).at[:, -1].set(True)
    shared = jnp.all(active, 0, keepdims=True)

    def inside(v):
        v = jnp.where(active, v, 0)
        return jnp.where(shared, centred(v), v)

    squares = jnp.square(problem.penalised(jnp.full_like(theta, problem.l1)))
    curvature = tol / (4 * jnp.maximum(here.value, tol)) * squares
    slope = inside(slope)
    d, residual, precondition = _newton(problem, here, slope, tol, inside, lambda v: curvature * v)
    # Along penalised parameters the curvature is at least c s^2; along the others, such as the
    # biases, it is assumed to be NEARLY times that of the preconditioner or more.
    held = curvature > 0
    loose = inside(jnp.where(held, 0, residual))
    left = jnp.sum(jnp.where(held, residual * residual / jnp.where(held, curvature, 1), 0))
    left += jnp.vdot(loose, precondition(loose)) / NEARLY
    decrement = (left - jnp.vdot(slope, d)) / 2
    return decrement <= CONFIRMED * tol * jnp.maximum(here.value, tol)


def _newton(
    problem: Problem, here: Point, gradient: Array, tol: Array, inside: Callable, bent: Callable
) -> tuple[Array, Array, Callable]:
    """Newton's step in the space that `inside` projects to, its residual, and the preconditioner.

    `bent` is the product of a vector with the curvature that is added to the Hessian.
    """
    bound = problem.gradient_bound()
    s = _standardised.standardise(problem, bound, gradient.dtype)
    norm = relative_norm(gradient, bound)
    size = jnp.where(norm > 0, norm, 1)
    hvp, precondition = _curvature(problem, s, here.probabilities, size, inside, bent)
    little = tol * jnp.maximum(here.value, tol) * _preconditioner.LEAST_CURVATURE
    whole = jnp.vdot(gradient, precondition(gradient))
    within = jnp.sqrt(little / jnp.where(whole > 0, whole, 1))
    d, _ = conjugate_gradients(hvp, precondition, -gradient, within, CG_STEPS)
    d = inside(d)
    return d, gradient + hvp(d), precondition


def _curvature(
    problem: Problem,
    s: Standardised,
    p: Array,
    size: Array,
    inside: Callable,
    bent: Callable = jnp.zeros_like,
) -> tuple[Callable, Callable]:
    """Products with the Hessian at p, and with its preconditioner, in the space of `inside`.

    `size` is that of the gradients to precondition.
    """
    preconditioner = _preconditioner.build(s, problem.weights, p)

    def hvp(v):
        return inside(problem.hessian_times(p, v) + bent(v))

    def precondition(g):
        return inside(_preconditioner.precondition(preconditioner, g, size))

    return hvp, precondition


def suspected(problem: Problem, state: State, status: Array) -> Array:
    """Whether a fit with parameters that are not penalised has ended while it was still moving."""
    done = (status == Status.CONVERGED) | (status == Status.PRECISION_FLOOR)
    return done & problem.is_loose & (state.farthest >= STILL)


def quasi_separated(data: Data, theta: Array, suspected: Array) -> Array:
    """Whether separation is proven at `theta`; False without a search unless it is `suspected`.

    This is a separate program, since most fits do not need it. The first turn of its loop computes
    Newton's step, and all others project: so the solve, the largest part, is compiled once.
    """
    problem, _ = data.normalised_problem()
    s = _standardised.standardise(problem, problem.gradient_bound())
    robust = _robust(problem, s)
    logits, among_free = problem.logits(theta), problem.free
    p, near = probabilities(logits), _leads(problem, logits) < DECIDED
    gradient, theta = centred(problem.gradient(theta, p)), theta * among_free
    eps = jnp.finfo(theta.dtype).eps
    ahead, behind = eps**0.5, -(eps**0.75)  # relative

    def inside(v):
        return centred(v) * among_free

    def searching(carry):
        attempt, *_, proven = carry
        return (attempt <= ATTEMPTS) & ~proven

    def body(carry):
        attempt, newton, resting, tied, _ = carry
        is_first, of_newton = attempt == 0, attempt <= ATTEMPTS // 2
        along = jnp.where(of_newton, newton, theta)  # in the first turn 0
        tied = jnp.where(of_newton, tied, jnp.where(attempt == ATTEMPTS // 2 + 1, resting, tied))
        shares = tied.astype(theta.dtype)
        at = jnp.where(is_first, p, shares / jnp.sum(shares, 0, keepdims=True))
        # Several rough projections reach full precision; the loop compiles them only once.
        d = lax.fori_loop(
            0,
            jnp.where(is_first, 1, PROJECTIONS),
            lambda _, d: _parallel(problem, s, at, jnp.where(is_first, gradient, 0), inside, d),
            along,
        )
        moves = _leads(problem, problem.scores(d))
        newton = jnp.where(is_first, d, newton)
        resting = jnp.where(is_first, (moves < STILL) & near, resting)
        lead = moves / _size(robust, d)[None]
        proven = (jnp.min(lead) >= behind) & (jnp.max(lead) > 10 * ahead)
        # If the projection removed nearly all, the rest is rounding, whose signs prove nothing.
        proven &= jnp.max(_sizes(robust, d)) > -behind * jnp.max(_sizes(robust, along))
        tied = jnp.where(is_first, resting, tied | (lead < ahead))
        return attempt + 1, newton, resting, tied, proven & ~is_first

    begin = jnp.where(suspected, jnp.int32(0), ATTEMPTS + 1)
    every = jnp.ones_like(near)
    start = (begin, jnp.zeros_like(theta), every, every, jnp.asarray(False))
    return while_loop(searching, body, start)[-1]


def _leads(problem: Problem, logits: Array) -> Array:
    """[K, N]: the lead of an example's own class over each class; the smallest if it has several.

    Between two own classes it is -|difference|; for an example without weight it is 0.
    """
    own = problem.targets > 0
    lowest = jnp.min(jnp.where(own, logits, jnp.inf), 0, keepdims=True)
    highest = jnp.max(jnp.where(own, logits, -jnp.inf), 0, keepdims=True)
    leads = jnp.where(own, lowest - highest, lowest - logits)
    return jnp.where(jnp.any(own, 0, keepdims=True), leads, 0)


def _parallel(
    problem: Problem, s: Standardised, p: Array, gradient: Array, inside: Callable, d: Array
) -> Array:
    """d - H^+ (H d + gradient), in the space of `inside`: d is projected, or is Newton's step.

    With p uniform over ties and the gradient 0, the result is `d` without the component that would
    break the ties. From d = 0 it is Newton's step.
    """
    weights = problem.weights
    # An example without weight breaks no tie, and its rounding must not count.
    logits = jnp.where((weights > 0)[None], problem.scores(d), 0)
    parted = softmax_hvp(jnp.ones_like(weights), p, logits)
    # The rounding of the logits limits the accuracy of their difference, and so the tolerance.
    among = jnp.where(jnp.sum(p > 0, 0, keepdims=True) > 1, jnp.abs(centred(logits)), 0)
    rounding = 64 * jnp.finfo(d.dtype).eps * jnp.max(among)
    size = jnp.max(jnp.abs(parted))
    # A difference that is only rounding has a part that no parameters can remove. Along directions
    # without curvature, such as those that separate the classes, the solution would have any size.
    parted = jnp.where(rounding < 0.1 * size, parted, 0)
    tol = jnp.clip(rounding / jnp.where(size > 0, size, 1), RESIDUAL, 0.1)
    image = inside(problem.pull_back(weights[None] * parted) + gradient)
    largest = jnp.max(jnp.abs(image))
    largest = jnp.where(largest > 0, largest, 1)
    hvp, precondition = _curvature(problem, s, p, largest, inside)
    return inside(d - conjugate_gradients(hvp, precondition, image, tol, CG_STEPS)[0])


def _robust(problem: Problem, s: Standardised) -> Standardised:
    """`s` with robust means and scales of the examples: with weights 1 / |s_i|^2, iterated."""
    weights = problem.weights.astype(jnp.float32)

    def turn(_, s):
        distances = s.squared(jnp.full_like(s.ridge, 1 / len(s.ridge)))
        return s.reweighted(weights / distances)

    return lax.fori_loop(0, ROBUST_TURNS, turn, s)


def _sizes(s: Standardised, d: Array) -> Array:
    """[D + 1]: the largest absolute parameters of the standardised features over the classes."""
    return jnp.max(jnp.abs(_standardised.of_standard(s.mean, s.scale, d)), 0)


def _size(s: Standardised, d: Array) -> Array:
    """[N]: the size of the terms of the logits along d, at least the size of a typical example."""
    largest = _sizes(s, d)
    unit = jnp.max(largest)  # so that float32 holds the ratios
    squares = jnp.square(largest / unit).astype(jnp.float32)
    return unit * (1 + jnp.sqrt(s.squared(squares)).astype(d.dtype))

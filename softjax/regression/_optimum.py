"""The optimum: how it moves with the data, and whether there is one.

At the optimum F(theta, problem) = gradient of the objective = 0, so that, by the implicit function
theorem,

    H d theta = -(dF / d problem) d problem.

One linear solve, by conjugate gradients in the metric of the fit, whatever found the optimum. H is
symmetric: the solve is its own transpose, and serves both modes. With l1 the same holds among the
entries of the kernel that are not 0, where F has l1 sign(theta) in it; the others stay where they
are, but where they are just about to leave.

Without a penalty there is no optimum where along some direction d no example's own class falls
behind another, z_iy(d) >= z_ij(d), and one gets ahead. Where all do, the separation is complete;
where not, quasi-complete: some parameters grow for ever while the loss stays above 0.

Newton's step shows d: it goes on moving what diverges by a nat, and all else comes to rest. What
rests is made to tie, by a projection: let p be uniform between the classes that tie; then

    H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T,  d <- d - H^+ H d

takes away what would part them. If no example falls behind then, but for rounding, and one gets
ahead by far more, d is a proof: what rounding left of the ties could be taken away as well, and
would not bring the others back. Each margin is compared with the size of its own terms, around
means and scales that an enormous entry elsewhere does not change: of all examples with weights that
fall with their distance.

Source: A. Albert and J. A. Anderson, "On the existence of maximum likelihood estimates in logistic
regression models" (1984), theorems 1 to 3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._sharding import while_loop
from softjax.regression import _metric
from softjax.regression._convergence import STILL, State
from softjax.regression._directions import conjugate_gradients, newton_cg
from softjax.regression._problem import (
    Problem,
    centred,
    class_scores,
    example_weights,
    free,
    gradient_bound,
    is_loose,
    logits_at,
    penalised,
    point,
    pull_back,
    relative_norm,
    row_norms,
    spread,
)
from softjax.regression._result import Status

CG_STEPS = 1000
# So far behind, a class has no say in where a step goes: it need not tie, nor move away.
DECIDED = 12
# Ties of Newton's step and ties of the parameters, each once more with what fell behind.
ATTEMPTS = 4
# An enormous entry in a share f of the examples keeps about (4 f)^(1/2) of its scale at each.
ROBUST_TURNS = 12


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


def suspected(problem: Problem, state: State, status: Array) -> Array:
    """Whether a fit with parameters that no penalty holds came to its end, and still moved."""
    done = (status == Status.CONVERGED) | (status == Status.PRECISION_FLOOR)
    return done & is_loose(problem) & (state.farthest >= STILL)


def is_quasi_separated(problem: Problem, theta: Array, suspected: Array) -> Array:
    """Whether there is a proof of it at `theta`; not looked for where it is not suspected."""
    bound = gradient_bound(problem)
    s = _robust(problem, _metric.standardise(problem, bound))
    here = point(problem, theta, logits_at(problem, theta))
    here = here._replace(gradient=jnp.where(suspected, centred(here.gradient), 0))
    norm = relative_norm(here.gradient, bound)
    empty = _metric.empty(problem.features, len(theta))
    first = jnp.zeros((), jnp.int32)
    newton, _, _ = newton_cg(problem, s, here, empty, first, norm)
    among_free = free(problem)
    newton, theta = centred(newton) * among_free, theta * among_free
    moves = _leads(problem, class_scores(problem, newton))
    resting = (moves < STILL) & (_leads(problem, here.logits) < DECIDED)
    eps = jnp.finfo(theta.dtype).eps
    ahead, behind = eps**0.5, -(eps**0.75)  # relative

    def searching(carry):
        attempt, _, proven = carry
        return (attempt < ATTEMPTS) & ~proven

    def body(carry):
        attempt, tied, _ = carry
        along = jnp.where(attempt < ATTEMPTS // 2, newton, theta)
        tied = jnp.where(attempt == ATTEMPTS // 2, resting, tied)
        d = _parallel(problem, tied, _parallel(problem, tied, along))  # to the last digits
        lead = _leads(problem, class_scores(problem, d)) / _size(s, d)[None]
        proven = (jnp.min(lead) >= behind) & (jnp.max(lead) > 10 * ahead)
        # Where all was taken away, what is left is rounding, and its signs are no proof.
        proven &= jnp.max(_sizes(s, d)) > -behind * jnp.max(_sizes(s, along))
        return attempt + 1, tied | (lead < ahead), proven

    begin = jnp.where(suspected, first, ATTEMPTS)
    return while_loop(searching, body, (begin, resting, jnp.asarray(False)))[2]


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

    `beside` is what the metric lacks there, which knows no direction that the classes share. The
    residual is `tol` times the first, or rounding. `bend` is the Hessian of penalties that are not
    quadratic.
    """
    weights = example_weights(problem.targets)

    def hvp(v):
        moved = spread(weights, p, class_scores(problem, v))
        return pull_back(problem, moved) + problem.l2 * penalised(problem, v) + bend(v)

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


def _leads(problem: Problem, logits: Array) -> Array:
    """[K, N]: by how much an example's own class is above each, the worst of many own ones.

    -|difference| between those that are its own; 0 for an example without weight.
    """
    own = problem.targets > 0
    lowest = jnp.min(jnp.where(own, logits, jnp.inf), 0, keepdims=True)
    highest = jnp.max(jnp.where(own, logits, -jnp.inf), 0, keepdims=True)
    leads = jnp.where(own, lowest - highest, lowest - logits)
    return jnp.where(jnp.any(own, 0, keepdims=True), leads, 0)


def _parallel(problem: Problem, tied: Array, d: Array) -> Array:
    """`d` without what would part classes that tie."""
    tied = tied.astype(d.dtype)
    p, counted = tied / jnp.sum(tied, 0, keepdims=True), example_weights(problem.targets) > 0
    # An example without weight parts nothing, and its rounding is none of the others'.
    logits = jnp.where(counted[None], class_scores(problem, d), 0)
    parted = spread(jnp.ones(len(logits[0]), d.dtype), p, logits)
    # What parts them is known but for the rounding of the logits: no more of it can be solved for.
    among = jnp.where(jnp.sum(tied, 0, keepdims=True) > 1, jnp.abs(centred(logits)), 0)
    rounding = 64 * jnp.finfo(d.dtype).eps * jnp.max(among)
    tol = jnp.clip(rounding / jnp.max(jnp.abs(parted)), max=0.1)
    image = pull_back(problem, example_weights(problem.targets)[None] * parted)
    among_free = free(problem)

    def inside(v):
        return centred(v) * among_free

    return inside(d - solve(problem, p, image, inside, tol=tol))


def _robust(problem: Problem, s: _metric.Standardised) -> _metric.Standardised:
    """`s` with means and scales of the midst of the examples: weights 1 / |s_i|^2, in turns."""
    weights = example_weights(problem.targets).astype(jnp.float32)

    def turn(_, s):
        distances = _metric.squared(s, jnp.full_like(s.ridge, 1 / len(s.ridge)))
        return _metric.reweighted(s, weights / distances)

    return lax.fori_loop(0, ROBUST_TURNS, turn, s)


def _sizes(s: _metric.Standardised, d: Array) -> Array:
    """[D + 1]: the largest parameters of the standardised features, over the classes."""
    bias = d[:, -1:] + d[:, :-1] @ s.mean[:, None]
    return jnp.max(jnp.abs(jnp.concatenate([d[:, :-1] * s.scale[None], bias], 1)), 0)


def _size(s: _metric.Standardised, d: Array) -> Array:
    """[N]: the size of the terms of the logits along d, no less than that of usual examples."""
    largest = _sizes(s, d)
    unit = jnp.max(largest)  # within what float32 holds
    squares = jnp.square(largest / unit).astype(jnp.float32)
    return unit * (1 + jnp.sqrt(_metric.squared(s, squares)).astype(d.dtype))

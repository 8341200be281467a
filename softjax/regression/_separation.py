"""Quasi-complete separation: some parameters grow for ever while the loss stays above 0.

Without a penalty there is no optimum where along some direction d no example's own class falls
behind another, z_iy(d) >= z_ij(d), and one gets ahead. Where all do, the separation is complete.

Newton's step shows d: it goes on moving what diverges by a nat, and all else comes to rest. What
rests is made to tie, by a projection: let p be uniform between the classes that tie; then

    H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T,  d <- d - H^+ H d

takes away what would part them. If no example falls behind then, but for rounding, d is a proof.

Source: A. Albert and J. A. Anderson, "On the existence of maximum likelihood estimates in logistic
regression models" (1984), theorems 1 to 3.
"""

import jax.numpy as jnp
from jax import Array, lax

from softjax.regression import _implicit, _metric
from softjax.regression._descent import State
from softjax.regression._directions import newton_cg, spread
from softjax.regression._problem import (
    Problem,
    centred,
    class_scores,
    example_weights,
    gradient_bound,
    point,
    pull_back,
    relative_norm,
)
from softjax.regression._result import Status

# Newton's step moves a margin that diverges by a nat, and others by no more than is left to go.
STILL = 0.1
# So far behind, a class has no say in where a step goes: it need not tie, nor move away.
DECIDED = 12
# Ties of Newton's step and ties of the parameters, each once more with what fell behind.
ATTEMPTS = 4


def suspected(problem: Problem, state: State, status: Array) -> Array:
    """Whether a fit without penalty came to its end, and still moved."""
    done = (status == Status.CONVERGED) | (status == Status.PRECISION_FLOOR)
    return done & (problem.l2 == 0) & (problem.l1 == 0) & (state.move >= STILL)


def is_quasi_separated(problem: Problem, theta: Array, suspected: Array) -> Array:
    """Whether there is a proof of it at `theta`; not looked for where it is not suspected."""
    bound = gradient_bound(problem)
    s = _metric.standardise(problem, bound)
    here = point(problem, theta, class_scores(problem.features, theta))
    here = here._replace(gradient=jnp.where(suspected, centred(here.gradient), 0))
    norm = relative_norm(here.gradient, bound)
    empty = _metric.empty(problem.features, len(theta))
    first = jnp.zeros((), jnp.int32)
    newton, _, _ = newton_cg(problem, s, here, empty, first, norm)
    newton = centred(newton)
    moves = _leads(problem, class_scores(problem.features, newton))
    resting = (moves < STILL) & (_leads(problem, here.logits) < DECIDED)
    rounding = jnp.sqrt(jnp.finfo(theta.dtype).eps)

    def searching(carry):
        attempt, _, proven = carry
        return (attempt < ATTEMPTS) & ~proven

    def body(carry):
        attempt, tied, _ = carry
        along = jnp.where(attempt < ATTEMPTS // 2, newton, theta)
        tied = jnp.where(attempt == ATTEMPTS // 2, resting, tied)
        d = _parallel(problem, tied, along)
        lead = _leads(problem, class_scores(problem.features, d)) / _size(s, d)
        proven = (jnp.min(lead) >= -rounding) & (jnp.max(lead) > 10 * rounding)
        return attempt + 1, tied | (lead < rounding), proven

    begin = jnp.where(suspected, first, ATTEMPTS)
    return lax.while_loop(searching, body, (begin, resting, jnp.asarray(False)))[2]


def _leads(problem: Problem, logits: Array) -> Array:
    """[K, N]: by how much an example's own class is above each, the worst of many own ones.

    -|difference| between those that are its own; 0 for an example without weight.
    """
    own = problem.targets > 0
    lowest = jnp.min(jnp.where(own, logits, jnp.inf), 0)
    highest = jnp.max(jnp.where(own, logits, -jnp.inf), 0)
    return jnp.where(jnp.any(own, 0), jnp.where(own, lowest - highest, lowest - logits), 0)


def _parallel(problem: Problem, tied: Array, d: Array) -> Array:
    """`d` without what would part classes that tie."""
    tied = tied.astype(d.dtype)
    p, logits = tied / jnp.sum(tied, 0), class_scores(problem.features, d)
    parted = spread(jnp.ones(len(logits[0]), d.dtype), p, logits)
    # What parts them is known but for the rounding of the logits: no more of it can be solved for.
    rounding = 64 * jnp.finfo(d.dtype).eps * jnp.max(jnp.abs(centred(logits)))
    tol = jnp.clip(rounding / jnp.max(jnp.abs(parted)), max=0.1)
    image = pull_back(problem.features, example_weights(problem.targets) * parted)
    return centred(d - _implicit.solve(problem, p, image, tol=tol))


def _size(s: _metric.Standardised, d: Array) -> Array:
    """[N]: what rounding of the logits along d is relative to."""
    bias = d[:, -1:] + d[:, :-1] @ s.mean[:, None]
    largest = jnp.max(jnp.abs(jnp.concatenate([d[:, :-1] * s.scale, bias], 1)), 0)
    unit = jnp.max(largest)  # within what float32 holds
    squares = jnp.square(largest / unit).astype(jnp.float32)
    return unit * (1 + jnp.sqrt(_metric.squared(s, squares)).astype(d.dtype))

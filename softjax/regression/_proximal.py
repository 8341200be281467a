"""Accelerated proximal steps in the preconditioner of the features, for a penalty with corners.

    v <- argmin <g, v - y> + c/2 |v - y|_M^2 + sum_jk s_j |v_jk|,    g = the gradient at y

with a momentum y that starts anew where it would lead up. v are the parameters of the standardised
features, from which their means are subtracted: the bias that goes with them is not penalised, so
that this is the same problem, and features far from 0 are as good as others. s_j = l1 / scale_j.

    M = S^T diag(w) S / 2 + l2 / scale^2

is Boehning's bound of the Hessian of each class, 1/2 (I - 11^T/K) kron S^T diag(w) S + l2. Features
may be collinear or of any size; how far apart M is from the Hessian is all that counts. The minimum
is that of a quadratic form of D dimensions, by steps without a product with the features:

    v <- shrink(v - slope / b, s / b),  shrink(v, s) = sign(v) max(|v| - s, 0)

and v max(1 - s / |v|, 0) of the v of a feature over all classes where the penalty is of their norm:
then a feature is in the model for all classes or for none.

where b = L + l2 / scale^2, and L bounds the eigenvalues of S^T diag(w) S / 2. Where the features
are sparse or many, M is diag(b), one such step does, and L is an estimate. Whatever M is, a step is
taken only where the objective is not above its model; where it is, c doubles.

What all classes have in common changes no probability, so that no curvature finds it: it is chosen
after every step to make the penalties smallest.

Source: A. Beck and M. Teboulle, "A fast iterative shrinkage-thresholding algorithm" (2009), with
their backtracking; B. O'Donoghue and E. Candes, "Adaptive restart for accelerated gradient schemes"
(2015); Y. Li and S. Osher, "A new median formula with applications to PDE based denoising" (2009).
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._sharding import fori_loop, while_loop
from softjax.regression import _preconditioner, _standardised
from softjax.regression._convergence import (
    State,
    after_step,
    check_convergence,
    initial,
    rounding_of,
)
from softjax.regression._data import Problem
from softjax.regression._line_search import largest_move
from softjax.regression._objective import (
    centred,
    example_weights,
    gradient_bound,
    logits_at,
    penalised,
    point,
    relative_norm,
    row_norms,
    value,
)
from softjax.regression._products import product
from softjax.regression._result import Status
from softjax.regression._standardised import Standardised

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

POWER_STEPS = 30
# The power method comes from below.
SAFETY = 1.1
SQUARINGS = 4
# The part of a feature that others do not explain, of its variance: with less, inner steps are not
# enough.
COLLINEAR = 1e-5
PATIENCE = 2000
# The minimum in the preconditioner: its slope, relative to the first, and no more steps than these.
INNER, INNER_STEPS = 0.1, 500


class Memory(NamedTuple):
    """Parameters of the standardised features, and where the next gradient is taken.

    Attributes:
        v: of the state, [K, D + 1].
        ahead: y, [K, D + 1].
        t: of Nesterov.
        growth: c.
    """

    v: Any
    ahead: Any
    t: Any
    growth: Any


class Bound(NamedTuple):
    """M <= diag(curvature) on [K, D + 1]; `gram` None for the diagonal itself.

    Attributes:
        gram: [D + 1, D + 1].
        curvature: b [D + 1].
        threshold: s [D + 1], 0 for the bias.
        unseen: the largest number where some features are so nearly collinear that a step does not
            see how they differ, and the penalty does not hold what they may gain by it, or where
            that is not known; else 0.
    """

    gram: Array | None
    curvature: Array
    threshold: Array
    unseen: Array


def start(features: "Array | BCOO", theta: Any) -> State:
    one = np.ones((), theta.dtype)
    return initial(theta, Memory(theta, theta, one, one))


def advance(problem: Problem, tol: Array, state: State, stop: Array) -> tuple[State, Array]:
    x, weights = problem.features, example_weights(problem.targets)
    size = gradient_bound(problem)
    s = _standardised.standardise(problem, size, x.dtype)
    bound = _bound(problem, s)
    shrink, uncommon = _shrink, partial(_without_what_is_common, bound, s.ridge)
    if problem.l1_rows is not None:
        shrink, uncommon = _shrink_rows, centred  # as the norms and squares are smallest
    smooth = problem._replace(l1=jnp.zeros_like(problem.l1), l1_rows=None)

    def of_features(v):
        """The parameters of the features as they are, and their logits."""
        theta = _standardised.from_standard(s.mean, s.scale, v)
        return theta, logits_at(problem, theta)

    def body(carry):
        state, logits, ahead_logits = carry
        v, ahead, t, growth = state.memory
        here = point(problem, _standardised.from_standard(s.mean, s.scale, ahead), ahead_logits)
        gradient = _standardised.to_standard(s.mean, s.scale, here.gradient)
        least = _least(bound, shrink, growth, ahead, gradient)
        step = least - ahead
        image = growth * _times(bound, step)
        new = uncommon(least)
        theta, new_logits = of_features(new)

        # The model's curvature is too large: along the step the Hessian's promises this much.
        moved = new_logits - ahead_logits
        moved -= jnp.sum(here.probabilities * moved, 0, keepdims=True)
        variance = jnp.sum(here.probabilities * moved * moved, 0)
        curvature = jnp.vdot(weights, variance) + jnp.vdot(s.ridge[None] * step, step)
        squared = jnp.vdot(image, step)
        decrement = jnp.where(squared > 0, squared * squared / (2 * curvature), 0)

        norm = relative_norm(smallest_subgradient(problem, here.theta, here.gradient), size)
        objective = value(problem, here.theta, ahead_logits)
        now = check_convergence(
            state._replace(decrement=decrement), objective, norm, tol, bound.unseen
        )
        # Only the parameters themselves converge: where the momentum is ahead of them, it rests.
        resting = jnp.all(ahead == v)
        reached = (now.status != Status.RUNNING) & (now.status != Status.NON_FINITE)
        ended = resting & reached | (now.status == Status.NON_FINITE)

        before = value(smooth, here.theta, ahead_logits)
        model = before + jnp.vdot(gradient, step) + squared / 2
        # The model is that of `least`: what is common changes the loss nowhere, but may raise l2.
        reached_value = value(
            smooth, _standardised.from_standard(s.mean, s.scale, least), new_logits
        )
        too_high = ~(reached_value <= model + 4 * rounding_of(before))
        next_t, speed = _speed(t, reached | (jnp.vdot(image, new - v) < 0))
        taken = Memory(new, new + speed * (new - v), next_t, growth)
        stepped = after_step(
            now._replace(status=state.status),
            theta,
            taken,
            decrement=decrement,
            move=largest_move(moved),
            passes=2,
            patience=PATIENCE,
        )
        again = stepped._replace(theta=state.theta, memory=Memory(v, ahead, t, 2 * growth))
        state = _chosen(ended, now, _chosen(too_high, again, stepped))
        kept = ended | too_high
        ahead_logits = jnp.where(kept, ahead_logits, new_logits + speed * (new_logits - logits))
        return state, jnp.where(kept, logits, new_logits), ahead_logits

    def running(carry):
        return (carry[0].status == Status.RUNNING) & (carry[0].step < stop)

    v = _standardised.of_standard(s.mean, s.scale, state.theta)
    v = uncommon(v)
    v, ahead = (jnp.where(state.step == 0, v, old) for old in state.memory[:2])
    state = state._replace(theta=_standardised.from_standard(s.mean, s.scale, v))
    state = state._replace(memory=state.memory._replace(v=v, ahead=ahead))
    carry = (state, of_features(v)[1], of_features(ahead)[1])
    state, logits, _ = while_loop(running, body, carry)
    return state._replace(value=value(problem, state.theta, logits)), logits


def _chosen(condition: Array, new: State, old: State) -> State:
    return State(*(_where(condition, a, b) for a, b in zip(new, old, strict=True)))


def _where(condition: Array, new: Any, old: Any) -> Any:
    if isinstance(new, Memory):
        return Memory(*(jnp.where(condition, a, b) for a, b in zip(new, old, strict=True)))
    return jnp.where(condition, new, old)


def _least(bound: Bound, shrink: Callable, growth: Array, ahead: Array, gradient: Array) -> Array:
    """The argmin of the model from `ahead`, by the same accelerated steps."""
    curvature = growth * bound.curvature[None]

    def unsolved(carry):
        _, _, _, norm, first, step = carry
        return (norm > INNER * first) & (step < INNER_STEPS)

    def body(carry):
        v, y, t, _, first, step = carry
        slope = gradient + growth * _times(bound, y - ahead)
        following = shrink(bound.threshold[None] / curvature, y - slope / curvature)
        change = curvature * (y - following)
        norm = jnp.max(jnp.abs(change))
        next_t, speed = _speed(t, jnp.vdot(change, following - v) > 0)
        y = following + speed * (following - v)
        return following, y, next_t, norm, jnp.where(step == 0, norm, first), step + 1

    one = jnp.ones((), ahead.dtype)
    carry = (ahead, ahead, one, one * jnp.inf, one, jnp.zeros((), jnp.int32))
    return while_loop(unsolved, body, carry)[0]


def _without_what_is_common(bound: Bound, ridge: Array, v: Array) -> Array:
    """v - u, u [D + 1] what makes sum_k s |v_k - u| + ridge / 2 (v_k - u)^2 smallest.

    u is the median of the v_k and of the mean of v + s (K - 2 i) / (ridge K), i = 0, ..., K: the
    median of the v_k where there is no ridge, and their mean where there is no s.
    """
    count = len(v)
    side = jnp.asarray(count - 2 * np.arange(count + 1)[:, None], v.dtype) / count
    ratio = jnp.where(ridge > 0, bound.threshold / jnp.where(ridge > 0, ridge, 1), jnp.inf)
    ratio = jnp.where(bound.threshold > 0, ratio, 0)[None]
    shifts = jnp.where(side == 0, 0, jnp.where(side == 0, 1, side) * ratio)
    return (
        v - jnp.sort(jnp.concatenate([v, jnp.mean(v, 0, keepdims=True) + shifts]), 0)[count][None]
    )


def _speed(t: Array, uphill: Array) -> tuple[Array, Array]:
    """The next t, and how much of a step the next gradient is taken ahead; anew where uphill."""
    next_t = jnp.where(uphill, 1, (1 + jnp.sqrt(1 + 4 * t * t)) / 2)
    return next_t, jnp.where(uphill, 0, (t - 1) / next_t)


def _times(bound: Bound, v: Array) -> Array:
    """M v."""
    return v * bound.curvature[None] if bound.gram is None else product(v, bound.gram)


def _shrink(threshold: Array, v: Array) -> Array:
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0)


def _shrink_rows(threshold: Array, v: Array) -> Array:
    """v (1 - threshold / |v|) of each feature's v over the classes, 0 where |v| is below."""
    norms = row_norms(v)
    return v * jnp.maximum(1 - threshold / jnp.where(norms > 0, norms, jnp.inf), 0)


def smallest_subgradient(problem: Problem, theta: Array, gradient: Array) -> Array:
    """The gradient as the penalty leaves it: of the subgradients the smallest, 0 at the optimum."""
    if problem.l1_rows is not None:
        threshold = penalised(problem, jnp.full_like(theta[:1], problem.l1_rows))
        norms = row_norms(theta)
        inside = gradient + threshold * theta / jnp.where(norms > 0, norms, 1)
        return jnp.where(norms > 0, inside, _shrink_rows(threshold, gradient))
    threshold = penalised(problem, jnp.full_like(theta, problem.l1))
    inside = gradient + threshold * jnp.sign(theta)
    return jnp.where(theta == 0, _shrink(threshold, gradient), inside)


def _bound(problem: Problem, s: Standardised) -> Bound:
    weights = example_weights(problem.targets) / 2
    width = len(s.ridge)
    l1 = problem.l1 if problem.l1_rows is None else problem.l1_rows
    threshold = penalised(problem, l1 / jnp.append(s.scale, 1)[None])[0]
    if _preconditioner.is_diagonal(problem.features):

        def body(_, v):
            v = (v / jnp.linalg.norm(v))[None]
            return _standardised.pull_back(s, weights[None] * _standardised.scores(s, v))[0]

        # A start that no symmetry of the features makes an eigenvector.
        begin = jnp.asarray(np.random.default_rng(0).normal(size=width), s.ridge.dtype)
        largest = SAFETY * jnp.linalg.norm(fori_loop(0, POWER_STEPS, body, begin))
        not_known = jnp.full_like(largest, jnp.finfo(largest.dtype).max)
        return Bound(None, largest + s.ridge, threshold, not_known)
    gram = _standardised.gram(s, weights)
    gram = (gram + gram.T) / 2 + jnp.diag(100 * s.rounding)  # more than it is off by
    largest, gram = _eigenvalue_bound(gram), gram + jnp.diag(s.ridge)
    # Along a unit vector of curvature e the gradient is at most e^(1/2), and the penalty holds it
    # where it is more.
    unit = lax.rsqrt(jnp.diag(gram))
    pivot = jnp.square(jnp.min(jnp.diag(jnp.linalg.cholesky(unit[:, None] * gram * unit[None]))))
    held = jnp.min(threshold[:-1], initial=jnp.inf) ** 2 > pivot
    largest_number = jnp.finfo(gram.dtype).max
    unseen = jnp.where((pivot < COLLINEAR) & ~held, largest_number, 0).astype(gram.dtype)
    return Bound(gram, largest + s.ridge, threshold, unseen)


def _eigenvalue_bound(a: Array) -> Array:
    """Above the largest eigenvalue of A >= 0: |A^(2^n)|^(1 / 2^n), the norm that of Frobenius.

    With |A| taken out of A before each of the n squarings.
    """
    bound = jnp.ones((), a.dtype)
    for squaring in range(SQUARINGS + 1):
        norm = jnp.linalg.norm(a)
        bound = bound * norm ** (0.5**squaring)
        a = a / norm
        a = product(a, a)
    return bound * (1 + 100 * len(a) * jnp.finfo(a.dtype).eps)

"""Accelerated proximal steps with a preconditioner, for the l1 penalties.

    v <- argmin <g, v - y> + c/2 |v - y|_M^2 + sum_jk s_j |v_jk|,    g = the gradient at y

with a momentum y that is reset if it would lead up. v are the parameters of the standardised
features, from which the means are subtracted: the bias absorbs the means and is not penalised, so
that the problem is the same, and features far from 0 do no harm. s_j = l1 / scale_j.

    M = S^T diag(w) S / 2 + l2 / scale^2

is Boehning's bound of the Hessian of each class, 1/2 (I - 11^T/K) kron S^T diag(w) S + l2. Features
may be collinear or of any size; only the difference between M and the Hessian matters. The minimum
of the model, a quadratic form of D dimensions, is found by steps without a product with the
features,

    v <- shrink(v - slope / b, s / b),  shrink(v, s) = sign(v) max(|v| - s, 0)

where b = L + l2 / scale^2, and L bounds the eigenvalues of S^T diag(w) S / 2. For a penalty on the
norm over the classes, shrink is v max(1 - s / |v|, 0) for the v of a feature over all classes: then
a feature is in the model for all classes or for none. If the features are sparse or many, M is
diag(b), one such step is enough, and L is an estimate. With any M, a step is taken only if the
objective is not above its model; else c is doubled.

The part of v that all classes have in common changes no probability, so that no curvature
determines it: it is chosen after every step to minimise the penalties.

Source: A. Beck and M. Teboulle, "A fast iterative shrinkage-thresholding algorithm" (2009), with
their backtracking; B. O'Donoghue and E. Candes, "Adaptive restart for accelerated gradient schemes"
(2015); Y. Li and S. Osher, "A new median formula with applications to PDE based denoising" (2009).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._sharding import fori_loop, while_loop
from softjax.regression import _preconditioner, _standardised
from softjax.regression._descent import largest_move
from softjax.regression._features import Matrix, product
from softjax.regression._implicit import Stationarity, corner_gradient, gradient, solve
from softjax.regression._loop import Solver, State, after_step, check_convergence, rounding_of
from softjax.regression._objective import centred, probabilities, relative_norm, row_norms
from softjax.regression._problem import Problem
from softjax.regression._result import Status
from softjax.regression._standardised import Standardised

POWER_STEPS = 30
# The power method approaches the largest eigenvalue from below.
SAFETY = 1.1
SQUARINGS = 4
# The inner steps are not enough if the other features leave less than this part of the variance of
# a feature unexplained.
COLLINEAR = 1e-5
# The inner steps end at this slope, relative to the first one, or after this many steps.
INNER, INNER_STEPS = 0.1, 500


class Memory(NamedTuple):
    """Parameters of the standardised features, and the point of the next gradient."""

    v: Any  # the parameters of the state, [K, D + 1]
    ahead: Any  # y, the point of the next gradient, [K, D + 1]
    t: Any  # Nesterov's t
    growth: Any  # c


class Bound(NamedTuple):
    """M <= diag(curvature), for parameters [K, D + 1]."""

    gram: Array | None  # M [D + 1, D + 1]; None if M is diag(curvature)
    curvature: Array  # b [D + 1]
    threshold: Array  # s [D + 1], 0 for the bias
    # The largest number if some features are, or may be, so nearly collinear that a step does not
    # resolve their difference, and the penalty is too small to fix it; else 0.
    unseen: Array


def _solve_among_active(theta: Array, problem: Problem, b: Array) -> Array:
    """H^-1 b among the entries that are not 0: the others stay 0 if the problem changes."""
    active = (theta != 0).at[:, -1].set(True)
    # The loss has no curvature along a change that all classes have in common; only l2 has some.
    l2 = problem.l2 * problem.penalised(jnp.ones_like(theta[:1]))[0]
    held = jnp.all(active, 0) & (l2 > 0)
    loose = jnp.all(active, 0) & ~held

    def inside(v):
        v = jnp.where(active, v, 0)
        return jnp.where(loose, centred(v), v)

    def common(v):
        mean = jnp.mean(v, 0, keepdims=True)
        return jnp.where(held[None], mean / jnp.where(held, l2, 1)[None], 0)

    _, bend = jax.linearize(lambda theta: corner_gradient(theta, problem), theta)
    p = probabilities(problem.logits(theta))
    return inside(solve(problem, p, inside(b), inside, common, bend=bend))


class Trial(NamedTuple):
    """The minimum of the model from the point y, and the quantities there and at y."""

    ahead: Array  # the parameters of the original features at y, [K, D + 1]
    gradient: Array  # at y, for the standardised features, [K, D + 1]
    least: Array  # the minimum, for the standardised features
    step: Array  # from y to the minimum
    image: Array  # c M step
    new: Array  # the minimum, with the common part of all classes replaced by the best one
    theta: Array  # `new` as parameters of the original features
    logits: Array  # at theta, [K, N]
    # The change of the logits by the step, minus its mean over the classes of an example.
    moved: Array
    reached: Array  # whether y has converged, if the momentum is ignored


class Proximal(Solver):
    """Accelerated proximal steps. `known` consists of the logits at the state and those at y."""

    max_steps, chunk, patience, rotates, by_newton = 20000, 200, 2000, False, False
    condition = Stationarity(gradient, _solve_among_active)

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.standardised = s = _standardised.standardise(
            problem, self.bound, problem.features.dtype
        )
        self.model = _bound(problem, s)
        self.smooth = replace(problem, l1=jnp.zeros_like(problem.l1), grouped=False)
        self.shrink = _shrink_rows if problem.grouped else _shrink

    @staticmethod
    def memory(features: Matrix, theta: Any) -> Memory:
        one = np.ones((), theta.dtype)
        return Memory(theta, theta, one, one)

    def init(self, state: State) -> tuple[State, tuple[Array, Array]]:
        s, first = self.standardised, state.step == 0
        v = self._with_best_common_part(_standardised.of_standard(s.mean, s.scale, state.theta))
        v, ahead = (jnp.where(first, v, old) for old in state.memory[:2])
        state = state._replace(
            theta=self._of_features(v), memory=state.memory._replace(v=v, ahead=ahead)
        )
        logits, ahead_logits = (
            self.problem.logits(theta) for theta in (state.theta, self._of_features(ahead))
        )
        return state, (logits, ahead_logits)

    def terminate(
        self, state: State, known: tuple[Array, Array], tol: Array
    ) -> tuple[State, Trial]:
        """Judges the point y, by the decrement of the step from it."""
        problem, s, ahead_logits = self.problem, self.standardised, known[1]
        v, ahead, _, growth = state.memory
        here = problem.point(self._of_features(ahead), ahead_logits)
        gradient = _standardised.to_standard(s.mean, s.scale, here.gradient)
        least = _least(self.model, self.shrink, growth, ahead, gradient)
        step = least - ahead
        image = growth * _times(self.model, step)
        new = self._with_best_common_part(least)
        theta = self._of_features(new)
        logits = problem.logits(theta)

        # The curvature of the model is too large: the decrement uses that of the Hessian.
        moved = logits - ahead_logits
        moved -= jnp.sum(here.probabilities * moved, 0, keepdims=True)
        variance = jnp.sum(here.probabilities * moved * moved, 0)
        curvature = jnp.vdot(problem.weights, variance)
        curvature += jnp.vdot(s.ridge[None] * step, step)
        squared = jnp.vdot(image, step)
        decrement = jnp.where(squared > 0, squared * squared / (2 * curvature), 0)

        slope = smallest_subgradient(problem, here.theta, here.gradient)
        norm = relative_norm(slope, self.bound)
        objective = problem.value(here.theta, ahead_logits)
        now = state._replace(decrement=decrement)
        now = check_convergence(now, objective, norm, tol, self.model.unseen)
        # Only the parameters can converge: if y differs from them, the momentum is reset first.
        resting, broken = jnp.all(ahead == v), now.status == Status.NON_FINITE
        reached = (now.status != Status.RUNNING) & ~broken
        ended = resting & reached | broken
        now = now._replace(status=jnp.where(ended, now.status, state.status))
        ahead = here.theta
        return now, Trial(ahead, gradient, least, step, image, new, theta, logits, moved, reached)

    def step(
        self, state: State, known: tuple[Array, Array], here: Trial
    ) -> tuple[State, tuple[Array, Array]]:
        """Steps to the minimum of the model, unless the objective is above the model there."""
        (logits, ahead_logits), (v, ahead, t, growth) = known, state.memory
        before = self.smooth.value(here.ahead, ahead_logits)
        model = before + jnp.vdot(here.gradient, here.step)
        model += jnp.vdot(here.image, here.step) / 2
        # Compare at `least`: the common part does not change the loss, but may raise l2.
        reached_value = self.smooth.value(self._of_features(here.least), here.logits)
        too_high = ~(reached_value <= model + 4 * rounding_of(before))

        uphill = jnp.vdot(here.image, here.new - v) < 0
        next_t, speed = _speed(t, here.reached | uphill)
        accepted = Memory(here.new, here.new + speed * (here.new - v), next_t, growth)
        refused = Memory(v, ahead, t, 2 * growth)
        after = after_step(
            state,
            jnp.where(too_high, state.theta, here.theta),
            Memory(*(jnp.where(too_high, *pair) for pair in zip(refused, accepted, strict=True))),
            decrement=state.decrement,
            move=largest_move(here.moved),
            passes=2,
            patience=self.patience,
        )
        ahead_of_new = here.logits + speed * (here.logits - logits)
        return after, (
            jnp.where(too_high, logits, here.logits),
            jnp.where(too_high, ahead_logits, ahead_of_new),
        )

    def postprocess(
        self, state: State, known: tuple[Array, Array], tol: Array
    ) -> tuple[State, Array]:
        return state._replace(value=self.problem.value(state.theta, known[0])), known[0]

    def _of_features(self, v: Array) -> Array:
        """The parameters of the original features."""
        return _standardised.from_standard(self.standardised.mean, self.standardised.scale, v)

    def _with_best_common_part(self, v: Array) -> Array:
        if self.problem.grouped:
            return centred(v)  # which minimises the norms and squares
        return _with_best_common_part(self.model, self.standardised.ridge, v)


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


def _with_best_common_part(bound: Bound, ridge: Array, v: Array) -> Array:
    """v - u for the u [D + 1] that minimises sum_k s |v_k - u| + ridge / 2 (v_k - u)^2.

    u is the median of the v_k and of the mean of v + s (K - 2 i) / (ridge K), i = 0, ..., K: the
    median of the v_k without a ridge, and their mean if s is 0.
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
    """The next t and the momentum, as a multiple of the step; both are reset if `uphill`."""
    next_t = jnp.where(uphill, 1, (1 + jnp.sqrt(1 + 4 * t * t)) / 2)
    return next_t, jnp.where(uphill, 0, (t - 1) / next_t)


def _times(bound: Bound, v: Array) -> Array:
    return v * bound.curvature[None] if bound.gram is None else product(v, bound.gram)


def _shrink(threshold: Array, v: Array) -> Array:
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0)


def _shrink_rows(threshold: Array, v: Array) -> Array:
    """v (1 - threshold / |v|) for each feature, |v| over the classes; 0 if |v| is smaller."""
    norms = row_norms(v)
    return v * jnp.maximum(1 - threshold / jnp.where(norms > 0, norms, jnp.inf), 0)


def smallest_subgradient(problem: Problem, theta: Array, gradient: Array) -> Array:
    """The smallest subgradient of the objective with its penalties, which is 0 at the optimum."""
    if problem.grouped:
        threshold = problem.penalised(jnp.full_like(theta[:1], problem.l1))
        norms = row_norms(theta)
        inside = gradient + threshold * theta / jnp.where(norms > 0, norms, 1)
        return jnp.where(norms > 0, inside, _shrink_rows(threshold, gradient))
    threshold = problem.penalised(jnp.full_like(theta, problem.l1))
    inside = gradient + threshold * jnp.sign(theta)
    return jnp.where(theta == 0, _shrink(threshold, gradient), inside)


def _bound(problem: Problem, s: Standardised) -> Bound:
    weights = problem.weights / 2
    width = len(s.ridge)
    threshold = problem.penalised(problem.l1 / jnp.append(s.scale, 1)[None])[0]
    if _preconditioner.is_diagonal(problem.features):

        def body(_, v):
            v = (v / jnp.linalg.norm(v))[None]
            return s.pull_back(weights[None] * s.scores(v))[0]

        # A random start, since symmetric features may make a regular one an eigenvector.
        begin = jnp.asarray(np.random.default_rng(0).normal(size=width), s.ridge.dtype)
        largest = SAFETY * jnp.linalg.norm(fori_loop(0, POWER_STEPS, body, begin))
        not_known = jnp.full_like(largest, jnp.finfo(largest.dtype).max)
        return Bound(None, largest + s.ridge, threshold, not_known)
    gram = s.gram(weights)
    gram = (gram + gram.T) / 2 + jnp.diag(100 * s.rounding)  # more than its error
    largest, gram = _eigenvalue_bound(gram), gram + jnp.diag(s.ridge)
    # Along a unit vector of curvature e the gradient is at most e^(1/2). If the penalty is larger,
    # it fixes the parameters there.
    unit = lax.rsqrt(jnp.diag(gram))
    pivot = jnp.square(jnp.min(jnp.diag(jnp.linalg.cholesky(unit[:, None] * gram * unit[None]))))
    held = jnp.min(threshold[:-1], initial=jnp.inf) ** 2 > pivot
    largest_number = jnp.finfo(gram.dtype).max
    unseen = jnp.where((pivot < COLLINEAR) & ~held, largest_number, 0).astype(gram.dtype)
    return Bound(gram, largest + s.ridge, threshold, unseen)


def _eigenvalue_bound(a: Array) -> Array:
    """An upper bound of the largest eigenvalue of A >= 0: the Frobenius norm |A^(2^n)|^(1 / 2^n).

    A is divided by |A| before each of the n squarings.
    """
    bound = jnp.ones((), a.dtype)
    for squaring in range(SQUARINGS + 1):
        norm = jnp.linalg.norm(a)
        bound = bound * norm ** (0.5**squaring)
        a = a / norm
        a = product(a, a)
    return bound * (1 + 100 * len(a) * jnp.finfo(a.dtype).eps)

"""Descent: a direction from the gradient, and a line search along it that uses only slopes.

The logits are updated from step to step: along theta + t d they are Z + t Q with Q = X d. So a step
takes one product with the features for its logits and one for its gradient, and a trial of the line
search takes none and costs O(N K). The objective is convex, so that the minimum of
phi(t) = f(theta + t d) is where the slope phi'(t) is 0. The search does not use differences of
objectives, which cancel near the optimum.

Newton's direction is d = -H^-1 g, by conjugate gradients or by a dense factor of the Hessian. A
direction in float32 is precise enough: the gradient of the next step, in full precision, corrects
its error.

Source: J. Nocedal and S. J. Wright, "Numerical Optimization" (2006), algorithms 7.1 and 3.2.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax._reductions import behind_barrier_on_cpu
from softjax._sharding import cond, while_loop
from softjax.regression import _preconditioner, _standardised
from softjax.regression._features import Matrix, by_examples
from softjax.regression._linear_solves import JITTER, factored_hessian, factored_solve, truncated
from softjax.regression._loop import (
    NEAR,
    NEWTONIAN,
    OUTLYING,
    STILL,
    Solver,
    State,
    after_step,
    check_convergence,
)
from softjax.regression._objective import Point, below_largest, centred, relative_norm, uncertainty
from softjax.regression._preconditioner import Preconditioner
from softjax.regression._problem import Problem
from softjax.regression._standardised import Standardised, from_standard, to_standard

# If an example has extreme features, the minimum may be at a millionth of the length of a step:
# most trials then halve the length, and the last ones move this example by a nat each.
TRIALS = 60
# The search ends once the slope has at least halved. Beyond the minimum, where the gain might be
# lost again, it ends only if the slope is no more than a tenth of the first one and, by the
# curvature there, the minimum is at half of the length or more.
SLOPE_LEFT, OVERSHOOT, MIN_FRACTION = 0.5, 0.1, 0.5


def take_step(
    problem: Problem,
    state: State,
    logits: Array,
    d: Array,
    d_logits: Array,
    slope: Array,
    passes: Any,
    patience: int,
) -> tuple[State, Array, Array]:
    """A step from `state` along d [K, D + 1]: the state after it, its logits, and the length.

    The logits are those before the step, `d_logits` is their change along d, both [K, N], and
    `slope` is the slope of the objective along d.
    """
    t = step_length(problem, state.theta, logits, slope, d, d_logits)
    state = after_step(
        state,
        add_step(state.theta, t, d),
        state.memory,
        decrement=-slope / 2,
        # If the line search has shortened the step, the model was wrong about the whole step.
        move=jnp.maximum(t, 1) * largest_move(d_logits),
        passes=passes,
        patience=patience,
        stuck=t == 0,
    )
    return state, add_step(logits, t, d_logits), t


def largest_move(d_logits: Array) -> Array:
    """The largest change of a difference of two logits of an example along a direction, nats."""
    return jnp.max(jnp.max(d_logits, 0) - jnp.min(d_logits, 0))


def add_step(a: Array, t: Array, step: Array) -> Array:
    return a + jnp.where(t == 0, 0, t * step)


def step_length(
    problem: Problem, theta: Array, logits: Array, first: Array, d: Array, d_logits: Array
) -> Array:
    """t > 0 near the minimum of phi(t) = f(theta + t d), and 0 if d is not a descent direction.

    Newton's method on phi' = 0, from t = 1, kept between the largest t with a negative slope and
    the smallest t with a positive one. `first` is phi'(0), given since near the optimum it would
    cancel if computed as phi'.
    """
    d_kernel = problem.penalised(d)
    linear = problem.l2 * jnp.vdot(theta, d_kernel)
    square = problem.l2 * jnp.vdot(d, d_kernel)

    def slope_and_curvature(t):
        def sums(q, _, logits, d_logits):
            own, (_, p) = replace(problem, targets=q), below_largest(logits + t * d_logits)
            slope = jnp.sum(own.residual(p) * d_logits)
            mean = behind_barrier_on_cpu(jnp.sum(p * d_logits, 0, keepdims=True))
            away = behind_barrier_on_cpu(d_logits - mean)
            variance = jnp.sum(p * away * away, 0)
            return slope, jnp.sum(own.weights * variance)

        slope, curvature = by_examples(sums, problem.targets, None, logits, d_logits)
        return slope + linear + t * square, curvature + square

    def near(t, slope, curvature):
        return (slope <= -OVERSHOOT * first) & (slope <= MIN_FRACTION * curvature * t)

    def searching(carry):
        t, _, _, slope, curvature, trial = carry
        done = (slope >= SLOPE_LEFT * first) & near(t, slope, curvature)
        return (trial < TRIALS) & ~done

    def body(carry):
        t, low, high, slope, curvature, trial = carry
        newton = jnp.where(trial == 0, 1, t - slope / curvature)
        middle = jnp.where(jnp.isinf(high), 4 * t, (low + high) / 2)
        inside = (newton > low) & (newton < high) & ((trial == 0) | (newton <= 10 * t))
        t = jnp.where(inside, newton, middle)
        slope, curvature = slope_and_curvature(t)
        down = slope < 0
        low, high = jnp.where(down, t, low), jnp.where(down, high, t)
        return t, low, high, slope, curvature, trial + 1

    zero = jnp.zeros_like(first)
    start = (zero, zero, jnp.full_like(first, jnp.inf), first, zero, jnp.zeros((), jnp.int32))
    t, low, _, slope, curvature, _ = while_loop(searching, body, start)
    t = jnp.where(near(t, slope, curvature) & (slope >= first), t, low)
    return jnp.where(first < 0, t, 0)


# A line search cannot recover from a step of this many nats.
FAR = 1e5


class Descent(Solver):
    """Steps along the `direction` of a solver.

    Attributes:
        precise: whether directions are computed in the dtype of the fit instead of float32.
        standardised: the features for directions.
        is_bounded: whether the problem has a bounded optimum.
    """

    precise = False

    def __init__(self, problem: Problem):
        super().__init__(problem)
        dtype = problem.features.dtype if self.precise else jnp.float32
        self.standardised = _standardised.standardise(problem, self.bound, dtype)
        self.is_bounded = problem.has_bounded_optimum

    @abstractmethod
    def direction(self, here: Point, state: State) -> tuple[Array, Any, Array]:
        """The direction, the new memory, and the number of products with the features."""

    @abstractmethod
    def unseen(self, memory: Any, gradient: Array) -> Array:
        """The part of the decrement that rounding may hide; see `_preconditioner.unseen`."""

    def init(self, state: State) -> tuple[State, Array]:
        theta = centred(state.theta)
        strict = state.strict | self.is_bounded
        state = state._replace(theta=theta, strict=strict, passes=state.passes + 2)
        return state, self.problem.logits(theta)

    def terminate(self, state: State, known: Array, tol: Array) -> tuple[State, Point]:
        here = self.problem.point(state.theta, known)
        here = here._replace(gradient=centred(here.gradient))
        norm = relative_norm(here.gradient, self.bound)
        unseen = self.unseen(state.memory, here.gradient)
        # Near the end only rounding may move an extreme example so far.
        calm = (state.farthest <= OUTLYING) | (norm < NEAR)
        still = jnp.where(self.is_bounded & self.by_newton & calm, NEWTONIAN, STILL)
        end = check_convergence(state, here.value, norm, tol, unseen, self.precise, still)
        return end, here

    def step(self, state: State, known: Array, here: Point) -> tuple[State, Array]:
        d, memory, passes = self.direction(here, state)
        d, d_logits = self._downhill(here, centred(d))
        slope = jnp.vdot(here.gradient, d)
        state, logits, _ = take_step(
            self.problem, state, known, d, d_logits, slope, passes + 2, self.patience
        )
        return state._replace(memory=memory), logits

    def _downhill(self, here: Point, d: Array) -> tuple[Array, Array]:
        """A descent direction, which is `d` if possible, and the change of the logits along it."""
        # A direction that is not finite, or goes up, comes from a model without curvature: then
        # take the negative gradient with respect to the standardised features.
        good = (jnp.vdot(here.gradient, d) < 0) & jnp.all(jnp.isfinite(d))
        s, dtype = self.standardised, here.gradient.dtype
        g = to_standard(s.mean, s.scale, here.gradient) / (1 + s.ridge.astype(dtype))[None]
        d = jnp.where(good, d, -centred(from_standard(s.mean, s.scale, g)))
        d_logits = self.problem.scores(d)
        # If the model is certain of every example, and wrong about some, there is no curvature that
        # determines the length of a step: then the direction leads back to 0.
        size = jnp.max(jnp.abs(d_logits))
        back = ~((size > 0) & (size < FAR)) & (jnp.vdot(here.gradient, here.theta) > 0)
        d = jnp.where(back, -here.theta, d)
        return d, jnp.where(back, -self.problem.without_offset(here.logits), d_logits)

    def refresh(self, state: State, known: Array) -> tuple[State, Array]:
        """Computes the logits again: the rounding errors of their sum over steps may matter."""
        return state._replace(passes=state.passes + 2), self.problem.logits(state.theta)


class NewtonCG(Descent):
    """Newton's direction by conjugate gradients; its memory is the preconditioner."""

    rotates = False

    @staticmethod
    def memory(features: Matrix, theta: Any) -> Preconditioner:
        return _preconditioner.empty(features, len(theta))

    def direction(self, here: Point, state: State) -> tuple[Array, Preconditioner, Array]:
        # The probabilities settle: the preconditioner is built at steps 0, 1, 2, 4, 8 and so on. It
        # is also built after a step past an extreme example, which may have lost all its weight.
        stale = (state.step & (state.step - 1) == 0) | (state.move > OUTLYING)
        s, weights = self.standardised, self.problem.weights
        preconditioner = cond(
            stale,
            lambda: _preconditioner.build(s, weights, here.probabilities),
            lambda: state.memory,
        )
        d, passes = newton_cg(self.problem, s, here, preconditioner, state.norm)
        return d, preconditioner, passes

    def unseen(self, memory: Preconditioner, gradient: Array) -> Array:
        return _preconditioner.unseen(memory, gradient)


class PreciseNewtonCG(NewtonCG):
    """Newton-CG with directions in the dtype of the fit, for nearly collinear features."""

    precise = True

    @staticmethod
    def memory(features: Matrix, theta: Any) -> Preconditioner:
        return _preconditioner.empty(features, len(theta), theta.dtype)


class Newton(Descent):
    """Newton's direction by a Cholesky factor; its memory is the smallest relative pivot."""

    takes_sparse = False

    @staticmethod
    def memory(features: Matrix, theta: Any) -> np.ndarray:
        return np.ones((), np.float32)

    def direction(self, here: Point, state: State) -> tuple[Array, Array, Array]:
        weights = self.problem.weights.astype(jnp.float32)
        p, norm = here.probabilities.astype(jnp.float32), state.norm
        s = self.standardised.reweighted(uncertainty(weights, p))
        lower, unit = factored_hessian(s, weights, p)
        num_classes, width = here.gradient.shape
        g = (_standardised.to_standard(s.mean, s.scale, here.gradient) / norm).astype(jnp.float32)
        d = -factored_solve(lower, unit, g.ravel()).reshape(num_classes, width)
        d = _standardised.from_standard(s.mean, s.scale, d.astype(norm.dtype) * norm)
        pivot = jnp.square(jnp.min(jnp.diag(lower)))
        return d, pivot, jnp.full((), num_classes, jnp.int32)

    def unseen(self, memory: Array, gradient: Array) -> Array:
        """The largest number if the Hessian without its jitter may be singular; else 0."""
        eps = jnp.finfo(memory.dtype).eps
        blurred = memory * _preconditioner.BLURRED < JITTER * eps
        return jnp.where(blurred, jnp.finfo(gradient.dtype).max, 0).astype(gradient.dtype)


def newton_cg(
    problem: Problem, s: Standardised, here: Point, preconditioner: Preconditioner, norm: Array
) -> tuple[Array, Array]:
    """-H^-1 g by conjugate gradients, and the number of products with the features."""
    weights = problem.weights.astype(s.ridge.dtype)
    p = here.probabilities.astype(s.ridge.dtype)
    s = s.rescaled(preconditioner.scales)
    return truncated(s, weights, p, here, norm, preconditioner.apply)

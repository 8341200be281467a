"""Descent: a direction from the gradient, and a line search along it.

Logits are carried from step to step: along theta + t d they are Z + t Q with Q = X d, so that a
step takes one product with the features for its logits and one for its gradient.
"""

from abc import abstractmethod
from typing import Any

import jax.numpy as jnp
from jax import Array

from softjax.regression import _preconditioner, _standardised
from softjax.regression._convergence import State, check_convergence
from softjax.regression._existence import has_bounded_optimum
from softjax.regression._line_search import take_step
from softjax.regression._loop import Solver
from softjax.regression._objective import (
    Point,
    Problem,
    centred,
    class_scores,
    logits_at,
    point,
    relative_norm,
    value,
    without_offset,
)

# A line search does not come back from a step of so many nats.
FAR = 1e5


class Descent(Solver):
    """Steps along the `direction` of a solver.

    Attributes:
        precise: whether directions are computed in the dtype of the fit, and not in float32.
        standardised: the features for directions.
    """

    precise = False

    def __init__(self, problem: Problem):
        super().__init__(problem)
        dtype = problem.features.dtype if self.precise else jnp.float32
        self.standardised = _standardised.standardise(problem, self.bound, dtype)

    @abstractmethod
    def direction(self, here: Point, state: State) -> tuple[Array, Any, Array]:
        """The direction, the new memory and the number of products with the features."""

    @abstractmethod
    def unseen(self, memory: Any, gradient: Array) -> Array:
        """How much rounding may hide of the decrement; see `_preconditioner.unseen`."""

    def init(self, state: State) -> tuple[State, Array]:
        theta = centred(state.theta)
        strict = state.strict | has_bounded_optimum(self.problem)
        state = state._replace(theta=theta, strict=strict, passes=state.passes + 2)
        return state, logits_at(self.problem, theta)

    def terminate(self, state: State, known: Array, tol: Array) -> tuple[State, Point]:
        here = point(self.problem, state.theta, known)
        here = here._replace(gradient=centred(here.gradient))
        objective = value(self.problem, here.theta, here.logits)
        norm = relative_norm(here.gradient, self.bound)
        unseen = self.unseen(state.memory, here.gradient)
        return check_convergence(state, objective, norm, tol, unseen, self.precise), here

    def step(self, state: State, known: Array, here: Point) -> tuple[State, Array]:
        d, memory, passes = self.direction(here, state)
        d, d_logits = self._downhill(here, centred(d))
        slope = jnp.vdot(here.gradient, d)
        state, logits, _ = take_step(
            self.problem, state, known, d, d_logits, slope, passes + 2, self.patience
        )
        return state._replace(memory=memory), logits

    def _downhill(self, here: Point, d: Array) -> tuple[Array, Array]:
        """A direction that goes down, `d` if it does, and what it adds to the logits."""
        # A direction that is not finite, or goes up, comes from a model without curvature.
        good = (jnp.vdot(here.gradient, d) < 0) & jnp.all(jnp.isfinite(d))
        d = jnp.where(good, d, _preconditioner.descent(self.standardised, here.gradient))
        d_logits = class_scores(self.problem, d)
        # Where every example is certain, and some are wrong, no curvature says how far to go: then
        # the direction leads back to 0.
        size = jnp.max(jnp.abs(d_logits))
        back = ~((size > 0) & (size < FAR)) & (jnp.vdot(here.gradient, here.theta) > 0)
        d = jnp.where(back, -here.theta, d)
        return d, jnp.where(back, -without_offset(self.problem, here.logits), d_logits)

    def refresh(self, state: State, known: Array) -> tuple[State, Array]:
        """Logits are sums over steps, whose rounding may move a gradient by the size of `tol`."""
        return state._replace(passes=state.passes + 2), logits_at(self.problem, state.theta)

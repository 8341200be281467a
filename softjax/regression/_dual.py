"""Newton's direction in the span of the examples, for fewer examples than features.

Every gradient is in the span of the rows of X, and so is the optimum: kernel = X^T beta, and a
direction consists of the kernel X^T y and the bias b. With W_i = w_i (diag p_i - p_i p_i^T),
G = X X^T and rho = w p - q + l2 beta, Newton's equations are those of N x K unknowns,

    (l2 W^+ + G) y + 1 b^T = -W^+ rho,  1^T y = 0,

where W^+ divides vectors whose sum over the classes is 0 by w p. Without an intercept there is no
b, and y may have any sum. G is neither factored, which would square the condition number, nor
formed: it is applied as two products with X. Its diagonal is known, and dominates if the rows are
far from collinear, as they are in many dimensions. So the preconditioner consists of the blocks
(l2 W_i^+ + G_ii)^-1, one per example, which weight each example by its predicted uncertainty:

    (l2 W_i^+ + G_ii)^-1 r = e r - e <e, r> / sum(e),  e = w_i p_i / (l2 + w_i p_i G_ii)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax._sharding import while_loop
from softjax.regression import _standardised
from softjax.regression._descent import add_step, take_step
from softjax.regression._features import Matrix, product
from softjax.regression._linear_solves import factor, factored_solve
from softjax.regression._loop import NEWTONIAN, STILL, Solver, State, check_convergence
from softjax.regression._objective import (
    centred,
    probabilities,
    relative_norm,
    softmax_hvp,
    without_bias,
)
from softjax.regression._problem import Problem
from softjax.regression._result import Status

CG_STEPS = 1000
# The bounds of the relative residual of a direction.
ROUGH, FINE = 0.1, 1e-3


class DualMemory(NamedTuple):
    """The kernel as X^T beta + rest."""

    beta: Any  # [K, N], whose sum over the examples is 0
    rest: Any  # [K, D + 1], the remainder of the initial kernel; 0 for the bias
    rest_logits: Any  # [K, N], the class scores of `rest`


class Dual(Solver):
    """Newton's steps in the span of the examples, without the gradient [K, D + 1].

    The gradient would cost one more product. With the residual rho of the dual problem its entries
    sum_i rho_ik x_ij, relative to (sum_i w_i x_ij^2)^(1/2), are no larger than
    (sum_i rho_ik^2 / w_i)^(1/2). Convergence is judged by this bound.
    """

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.weights = weights = problem.weights
        self.counted = weights > 0
        # The examples minus their mean, divided by a size, so that float32 holds them.
        self.size = jnp.linalg.norm(self.bound)
        mean = problem.constant * product(weights / jnp.sum(weights), problem.features)
        unit = jnp.full_like(mean, self.size)
        self.standardised = s = _standardised.scaled(problem, mean, unit, mean)
        # The diagonal of G, [N].
        self.squares = s.squared(jnp.ones_like(s.ridge).at[-1].set(0))
        self.is_bounded = problem.has_bounded_optimum
        self.still = jnp.where(self.is_bounded, NEWTONIAN, STILL)

    @staticmethod
    def memory(features: Matrix, theta: Any) -> DualMemory:
        zeros = np.zeros((len(theta), features.shape[0]), theta.dtype)
        return DualMemory(zeros, np.zeros(theta.shape, theta.dtype), zeros)

    def init(self, state: State) -> tuple[State, Array]:
        theta, span = centred(state.theta), state.memory
        scores = self.problem.scores(theta)
        fresh = jnp.all(span.beta == 0)
        span = span._replace(
            rest=jnp.where(fresh, without_bias(theta), span.rest),
            rest_logits=jnp.where(fresh, scores - theta[:, -1:], span.rest_logits),
        )
        strict = state.strict | self.is_bounded
        state = state._replace(theta=theta, memory=span, strict=strict, passes=state.passes + 2)
        return state, self.problem.with_offset(scores)

    def terminate(self, state: State, known: Array, tol: Array) -> tuple[State, Array]:
        """The state, and the residual rho = w p - q + l2 beta of the dual problem, [K, N]."""
        targets, l2, span = self.problem.targets, self.problem.l2, state.memory
        rho = self.weights[None] * probabilities(known) - targets + l2 * span.beta
        rho = jnp.where(self.counted[None], rho, 0)
        size = jnp.sum(rho * rho / jnp.where(self.counted, self.weights, 1)[None], 1)
        norm = jnp.maximum(jnp.sqrt(jnp.max(size)), relative_norm(l2 * span.rest, self.bound))
        objective = self.problem.value(state.theta, known)
        return check_convergence(state, objective, norm, tol, still=self.still), rho

    def step(self, state: State, known: Array, here: Array) -> tuple[State, Array]:
        problem, span, rho, p = self.problem, state.memory, here, probabilities(known)
        y, steps = self._coefficients(p, rho / state.norm, span.rest_logits / state.norm, state)
        y = centred(y.astype(rho.dtype)) * (state.norm / self.size / self.size)
        y = y - problem.constant * jnp.mean(y, 1, keepdims=True)
        d = without_bias(problem.pull_back(y)) - span.rest
        d_logits = problem.scores(d)
        # The bias that is best for this kernel: sum_i W_i (x_i d + b) + rho_i = 0.
        bias_slope = jnp.sum(softmax_hvp(self.weights, p, d_logits) + rho, 1)
        b = -problem.constant * _between_classes(self.weights[None] * p)(bias_slope)[:, None]
        d, d_logits = d.at[:, -1:].set(b), d_logits + b
        slope = jnp.vdot(rho, d_logits) + problem.l2 * jnp.vdot(span.rest, d)
        state, logits, t = take_step(
            problem, state, known, d, d_logits, slope, 2 * steps + 2, self.patience
        )
        span = DualMemory(
            add_step(span.beta, t, y),
            add_step(span.rest, t, -span.rest),
            add_step(span.rest_logits, t, -span.rest_logits),
        )
        return state._replace(memory=span), logits

    def postprocess(self, state: State, known: Array, tol: Array) -> tuple[State, Array]:
        """Judges the end by the parameters, since the logits and beta are sums over steps."""
        logits = self.problem.logits(state.theta)
        gradient = centred(self.problem.point(state.theta, logits).gradient)
        norm = relative_norm(gradient, self.bound)
        missed = (state.status == Status.CONVERGED) & ~(norm <= tol)
        status = jnp.where(missed, Status.PRECISION_FLOOR, state.status).astype(jnp.int32)
        return state._replace(norm=norm, status=status, passes=state.passes + 2), logits

    def _coefficients(
        self, p: Array, rho: Array, rest_logits: Array, state: State
    ) -> tuple[Array, Array]:
        """y of the direction, for the scaled features, in float32, and the number of steps.

        Conjugate gradients on diag(1 / e) + G - diag(G), preconditioned by e, among coefficients
        whose sum is 0. The image of y under diag(1 / e) is the residual from which y was computed,
        so that nothing is divided by p.
        """
        s, squares = self.standardised, self.squares
        tol = jnp.clip(3 * jnp.sqrt(state.norm), FINE, ROUGH).astype(jnp.float32)
        weights, p, rho, rest_logits = (
            a.astype(jnp.float32) for a in (self.weights, p, rho, rest_logits)
        )
        f = 1 / (s.ridge[0] + (squares * weights)[None] * p)
        e = weights[None] * p * f
        common = _common_part(e, s.constant.astype(jnp.float32))

        def beside_diagonal(y):
            pulled = without_bias(s.pull_back(y))
            return s.scores(pulled) - squares[None] * y

        def unsolved(carry):
            *_, product, step = carry
            return (product > bound) & (step < CG_STEPS)

        def body(carry):
            y, r, direction, pulled, product, step = carry
            image = pulled + beside_diagonal(direction)
            length = product / jnp.vdot(direction, image)
            y, r = y + length * direction, r - length * image
            r = r - common(e * r)
            following = jnp.vdot(r, e * r)
            ratio = following / product
            return y, r, e * r + ratio * direction, r + ratio * pulled, following, step + 1

        y = e * rest_logits - f * rho
        y = y - e * common(y)
        r = -beside_diagonal(y)
        r = r - common(e * r)
        alone = squares[None] * y  # the part of each logit from the example itself
        bound = tol * tol * jnp.vdot(alone, e * alone)
        carry = (y, r, e * r, r, jnp.vdot(r, e * r), jnp.ones((), jnp.int32))
        y, *_, steps = while_loop(unsolved, body, carry)
        return y, steps


def _common_part(e: Array, constant: Array) -> Callable[[Array], Array]:
    """The function e r -> c such that e r - e c has zero sums over the classes and the examples."""
    total = jnp.sum(e, 0, keepdims=True)
    best_bias = _between_classes(e)

    def mean(moved):
        return jnp.sum(moved, 0, keepdims=True) / jnp.where(total > 0, total, 1)

    def common(moved):
        b = constant * best_bias(jnp.sum(moved - e * mean(moved), 1))[:, None]
        return b + mean(moved - e * b)

    return common


def _between_classes(e: Array) -> Callable[[Array], Array]:
    """The inverse of sum_i diag(e_i) - e_i e_i^T / sum(e_i), on vectors of sum 0, as a function.

    The matrix is the Laplacian of a graph of the classes, whose diagonal needs no difference. The
    graph is grounded at the class with the largest degree.
    """
    total = jnp.sum(e, 0, keepdims=True)
    edges = product(e / jnp.where(total > 0, total, 1), e.T)
    edges = edges * (1 - jnp.eye(len(e), dtype=e.dtype))
    degrees = jnp.sum(edges, 1)
    ground = jnp.arange(len(e)) == jnp.argmax(degrees)
    lower, unit = factor(jnp.diag(jnp.where(ground, 2, 1) * degrees) - edges)
    return lambda b: factored_solve(lower, unit, b)

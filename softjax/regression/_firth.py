"""Firth's penalised likelihood: estimates that are finite on any data, separated or not.

    f*(theta) = f(theta) - log det I(theta) / (2 n),  I = Hessian of the mean loss, n = sum_i w_i

on the parameters that are centred over the classes: Jeffreys' prior, which removes the bias of
order 1 / n. The weights w are the original sample weights, not scaled to mean 1: an example of
weight 2 counts as two examples, and one of weight 0 as none. Firth's method is for small problems,
since each step factors the (K - 1)(D + 1) information.

If features are collinear, the determinant is taken on their span: I is 0 along each u with
X~ u = 0, and with N = sum_u u u^T over a basis of these u

    det(I + N) = det(I on the span) det(Z^T N Z),  Z orthonormal along all u,

where the second factor is a constant. Float32 cannot distinguish collinear features from nearly
collinear ones: there such a fit ends at the precision floor.

Source: D. Firth, "Bias reduction of maximum likelihood estimates" (1993).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._sharding import axes_of, varying, while_loop
from softjax.regression import _linear_solves, _standardised
from softjax.regression._descent import largest_move
from softjax.regression._features import by_columns, product
from softjax.regression._implicit import Stationarity, solve_within
from softjax.regression._loop import ROUNDINGS, Solver, State, after_step, check_convergence
from softjax.regression._objective import centred, probabilities, relative_norm
from softjax.regression._problem import Problem

HALVINGS = 20


def _gradient(theta: Array, problem: Problem) -> Array:
    return centred(jax.grad(_likelihood(problem).objective)(theta))


def _solve(theta: Array, problem: Problem, b: Array) -> Array:
    """H^-1 b with the Hessian of f*; the information is the preconditioner."""
    _, hvp = jax.linearize(lambda theta: _gradient(theta, problem), theta)
    scoring = _likelihood(problem).scoring(theta)
    return solve_within(centred, hvp, lambda g, size: scoring(g), b)


class Firth(Solver):
    """Newton's steps with the information in place of the Hessian, halved until f* decreases."""

    patience, rotates, takes_sparse, needs_optimum = 10, False, False, False
    condition = Stationarity(_gradient, _solve)

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.likelihood = _likelihood(problem)

    @staticmethod
    def objective(problem: Problem, theta: Array) -> Array:
        """f*, up to a constant."""
        return _likelihood(problem).objective(theta)

    def init(self, state: State) -> tuple[State, tuple[()]]:
        return state._replace(theta=centred(state.theta)), ()

    def terminate(
        self, state: State, known: tuple[()], tol: Array
    ) -> tuple[State, tuple[Array, Array]]:
        """The judged state, and f* and its gradient at its parameters."""
        current, gradient = jax.value_and_grad(self.likelihood.objective)(state.theta)
        gradient = centred(gradient)
        norm = relative_norm(gradient, self.bound)
        state = check_convergence(state, current, norm, tol, self.likelihood.unseen)
        return state, (current, gradient)

    def step(
        self, state: State, known: tuple[()], here: tuple[Array, Array]
    ) -> tuple[State, tuple[()]]:
        (current, gradient), objective = here, self.likelihood.objective
        d = -self.likelihood.scoring(state.theta)(gradient)
        slack = 4 * jnp.finfo(d.dtype).eps * jnp.abs(current)

        def too_high(t):
            return ~(objective(state.theta + t * d) <= current + slack) & (t > 0.5**HALVINGS)

        t = while_loop(too_high, lambda t: t / 2, jnp.ones_like(current))
        state = after_step(
            state,
            state.theta + t * d,
            (),
            decrement=-jnp.vdot(gradient, d) / 2,
            move=t * largest_move(self.problem.scores(d)),
            passes=2,
            patience=self.patience,
        )
        return state, ()

    def postprocess(self, state: State, known: tuple[()], tol: Array) -> tuple[State, Array]:
        logits = self.problem.logits(state.theta)
        return state._replace(value=self.problem.value(state.theta, logits)), logits


class _Likelihood(NamedTuple):
    """The functions of the penalised likelihood."""

    objective: Callable[[Array], Array]  # f*, up to a constant
    # theta -> the function gradient -> I^-1 gradient at theta, as in Fisher scoring.
    scoring: Callable[[Array], Callable[[Array], Array]]
    unseen: Array  # the largest number if features may be collinear or nearly so, else 0


def _likelihood(problem: Problem) -> _Likelihood:
    """The penalised likelihood; the standardised features change log det I only by a constant."""
    bound = problem.gradient_bound()
    # In a `shard_map` a linear solve needs its constants to vary over the same axes as b.
    basis = varying(_contrasts(len(problem.targets), bound.dtype), axes_of(bound))
    weights = problem.weights
    mean, scale = _standardised.moments(problem, bound)
    x = jnp.pad((problem.features - mean[None]) / scale[None], ((0, 0), (0, 1)), constant_values=1)
    x = x * jnp.ones_like(bound).at[-1].set(problem.constant)[None]

    def gram(u):
        return by_columns(lambda columns: product((u[:, None] * columns).T, x), x)

    collinear, unseen = _collinear(lax.stop_gradient(gram(weights)))

    def factor(theta):
        p = probabilities(problem.logits(theta))
        h = _linear_solves.hessian(gram, weights, p, jnp.zeros_like(bound))
        h = jnp.einsum("kr,kdle,ls->rdse", basis, h, basis)
        # Without an intercept the bias has no information: 1 adds nothing to the log determinant.
        h = h.at[:, -1, :, -1].add((1 - problem.constant) * jnp.eye(len(h), dtype=h.dtype))
        rows = np.arange(len(h))
        h = h.at[rows, :, rows].add(collinear[None])
        return _linear_solves.factor(h.reshape(h.shape[0] * h.shape[1], -1))

    def objective(theta):
        loss = problem.value(theta, problem.logits(theta))
        lower, unit = factor(theta)
        return loss - jnp.sum(jnp.log(jnp.diag(lower) / unit)) / problem.count

    def scoring(theta):
        lower, unit = factor(theta)

        def solved(gradient):
            g = basis.T @ _standardised.to_standard(mean, scale, gradient)
            d = _linear_solves.factored_solve(lower, unit, g.ravel()).reshape(g.shape)
            return _standardised.from_standard(mean, scale, basis @ d)

        return solved

    return _Likelihood(objective, scoring, unseen)


def _collinear(gram: Array) -> tuple[Array, Array]:
    """N for features with this Gram matrix [D + 1, D + 1], and `unseen` of `_Likelihood`."""
    dtype, diagonal = gram.dtype, jnp.diag(gram)
    eps = jnp.finfo(dtype).eps
    # Features that vary have a variance of 1.
    varies = diagonal > jnp.square(64 * eps) * jnp.max(diagonal)
    unit = jnp.where(varies, lax.rsqrt(jnp.where(varies, diagonal, 1)), 0)
    eigenvalues, vectors = jnp.linalg.eigh(unit[:, None] * gram * unit[None])
    missing = eigenvalues <= ROUNDINGS * len(gram) * eps
    # A constant feature is missing too, but is recognised by its diagonal entry.
    doubtful = (jnp.sum(missing) > jnp.sum(~varies)) & (dtype != np.float64)
    unseen = jnp.where(doubtful, jnp.finfo(dtype).max, 0).astype(dtype)
    vectors = jnp.where(missing[None], vectors, 0)
    return vectors @ vectors.T / len(gram), unseen


def _contrasts(num_classes: int, dtype) -> Array:
    """Helmert contrasts [K, K - 1]: orthonormal columns that sum to 0."""
    rows = np.arange(1, num_classes)
    columns = np.triu(np.ones((num_classes, num_classes - 1))) - np.diag(rows, -1)[:, :-1]
    return jnp.asarray(columns / np.linalg.norm(columns, axis=0), dtype)

"""Firth's penalised likelihood: estimates that are finite on any data, separated or not.

    f*(theta) = f(theta) - log det I(theta) / (2 n),  I = Hessian of the mean loss, n = sum_i w_i

on the parameters that are centred over the classes: Jeffreys' prior, which takes away the bias of
order 1 / n. The weights w are those that were given and not those of mean 1: an example of weight 2
counts as two examples, and one of weight 0 as none. For small problems, since each step factors the
(K - 1)(D + 1) information.

Where features are collinear the determinant is that among the directions that they have: I is 0
along each u with X~ u = 0, and with N = sum_u u u^T over a basis of these

    det(I + N) = det(I on the span) det(Z^T N Z),  Z orthonormal along all u,

of which the second factor is a constant. Float32 does not tell collinear features from nearly
collinear ones: there such a fit is at the floor of the precision.

Source: D. Firth, "Bias reduction of maximum likelihood estimates" (1993).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._sharding import axes_of, varying, while_loop
from softjax.regression import (
    _linear_solves,
    _standardised,
)
from softjax.regression._convergence import ROUNDINGS, State, after_step, check_convergence
from softjax.regression._descent import largest_move
from softjax.regression._features import by_columns, product
from softjax.regression._implicit import Stationarity, solve_within
from softjax.regression._loop import Solver
from softjax.regression._objective import (
    Problem,
    centred,
    class_scores,
    example_weights,
    gradient_bound,
    logits_at,
    probabilities,
    relative_norm,
    value,
)

HALVINGS = 20


def _gradient(theta: Array, problem: Problem) -> Array:
    return centred(jax.grad(_likelihood(problem).objective)(theta))


def _solve(theta: Array, problem: Problem, b: Array) -> Array:
    """H^-1 b with the Hessian of f*; the information preconditions the solve."""
    _, hvp = jax.linearize(lambda theta: _gradient(theta, problem), theta)
    scoring = _likelihood(problem).scoring(theta)
    return solve_within(centred, hvp, lambda g, size: scoring(g), b)


class Firth(Solver):
    """Newton's steps with the information for the Hessian, halved until they go down."""

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
        """The state, and f* and its gradient at its parameters."""
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
            move=t * largest_move(class_scores(self.problem, d)),
            passes=2,
            patience=self.patience,
        )
        return state, ()

    def postprocess(self, state: State, known: tuple[()], tol: Array) -> tuple[State, Array]:
        """The value is that of the objective, without the determinant."""
        logits = logits_at(self.problem, state.theta)
        return state._replace(value=value(self.problem, state.theta, logits)), logits


class _Likelihood(NamedTuple):
    """The functions of the penalised likelihood.

    Attributes:
        objective: f*, but for a constant.
        scoring: Fisher's, I^-1 gradient at some parameters.
        unseen: the largest number where features may be collinear or nearly so, else 0.
    """

    objective: Callable[[Array], Array]
    scoring: Callable[[Array], Callable[[Array], Array]]
    unseen: Array


def _likelihood(problem: Problem) -> _Likelihood:
    """Uses the information of standardised features, whose determinant differs by a constant."""
    bound = gradient_bound(problem)
    # Cast here: within a `shard_map` no linear solve takes a constant that varies less than b.
    basis = varying(_contrasts(len(problem.targets), bound.dtype), axes_of(bound))
    weights = example_weights(problem.targets)
    mean, scale = _standardised.moments(problem, bound)
    x = jnp.pad((problem.features - mean[None]) / scale[None], ((0, 0), (0, 1)), constant_values=1)
    x = x * jnp.ones_like(bound).at[-1].set(problem.constant)[None]

    def gram(u):
        return by_columns(lambda columns: product((u[:, None] * columns).T, x), x)

    collinear, unseen = _collinear(lax.stop_gradient(gram(weights)))

    def factor(theta):
        p = probabilities(logits_at(problem, theta))
        h = _linear_solves.hessian(gram, weights, p, jnp.zeros_like(bound))
        h = jnp.einsum("kr,kdle,ls->rdse", basis, h, basis)
        # Without an intercept the bias has no information: 1 adds nothing to the log determinant.
        h = h.at[:, -1, :, -1].add((1 - problem.constant) * jnp.eye(len(h), dtype=h.dtype))
        rows = np.arange(len(h))
        h = h.at[rows, :, rows].add(collinear[None])
        return _linear_solves.factor(h.reshape(h.shape[0] * h.shape[1], -1))

    def objective(theta):
        loss = value(problem, theta, logits_at(problem, theta))
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
    """N of the features with this Gram matrix [D + 1, D + 1], and what may be unseen."""
    dtype, diagonal = gram.dtype, jnp.diag(gram)
    eps = jnp.finfo(dtype).eps
    # The others have a variance of 1.
    varies = diagonal > jnp.square(64 * eps) * jnp.max(diagonal)
    unit = jnp.where(varies, lax.rsqrt(jnp.where(varies, diagonal, 1)), 0)
    eigenvalues, vectors = jnp.linalg.eigh(unit[:, None] * gram * unit[None])
    missing = eigenvalues <= ROUNDINGS * len(gram) * eps
    # A feature that is constant is missing too, and that is seen.
    doubtful = (jnp.sum(missing) > jnp.sum(~varies)) & (dtype != np.float64)
    unseen = jnp.where(doubtful, jnp.finfo(dtype).max, 0).astype(dtype)
    vectors = jnp.where(missing[None], vectors, 0)
    return vectors @ vectors.T / len(gram), unseen


def _contrasts(num_classes: int, dtype) -> Array:
    """[K, K - 1], orthonormal columns that sum to 0 (Helmert's)."""
    rows = np.arange(1, num_classes)
    columns = np.triu(np.ones((num_classes, num_classes - 1))) - np.diag(rows, -1)[:, :-1]
    return jnp.asarray(columns / np.linalg.norm(columns, axis=0), dtype)

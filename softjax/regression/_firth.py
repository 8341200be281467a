"""Firth's penalised likelihood: estimates that are finite on any data, separated or not.

    f*(theta) = f(theta) - log det I(theta) / (2 N),  I = Hessian of the mean loss

on the parameters that are centred over the classes: Jeffreys' prior, which takes away the bias of
order 1 / N. For small problems, since each step factors the (K - 1)(D + 1) information.

Source: D. Firth, "Bias reduction of maximum likelihood estimates" (1993).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax.regression import _status
from softjax.regression._descent import State, initial
from softjax.regression._newton import hessian
from softjax.regression._problem import (
    Problem,
    centred,
    class_scores,
    gradient_bound,
    probabilities,
    relative_norm,
    value,
)

HALVINGS = 20
PATIENCE = 10


def start(features: Array, theta: Any) -> State:
    return initial(theta, ())


def advance(problem: Problem, tol: Array, state: State, stop: Array) -> tuple[State, Array]:
    state = state._replace(theta=centred(state.theta))
    bound = gradient_bound(problem)
    basis = _contrasts(len(problem.targets), bound.dtype)
    examples = problem.features.shape[0]

    def objective(theta):
        logits = class_scores(problem.features, theta)
        lower, unit = _factor(problem, basis, probabilities(logits))
        half_log_determinant = jnp.sum(jnp.log(jnp.diag(lower) / unit))
        return value(problem, theta, logits) - half_log_determinant / examples

    def judged(state):
        current, gradient = jax.value_and_grad(objective)(state.theta)
        gradient = centred(gradient)
        norm = relative_norm(gradient, bound)
        stalled = jnp.where(norm < state.best, 0, state.stalled + 1)
        status = jnp.where(stalled >= PATIENCE, _status.PRECISION_FLOOR, _status.RUNNING)
        status = jnp.where(norm <= tol, _status.CONVERGED, status)
        status = jnp.where(jnp.isfinite(norm), status, _status.NON_FINITE).astype(jnp.int32)
        best = jnp.minimum(norm, state.best)
        state = state._replace(norm=norm, best=best, stalled=stalled, status=status)
        return state, current, gradient

    def body(carry):
        state, current, gradient = carry
        p = probabilities(class_scores(problem.features, state.theta))
        lower, unit = _factor(problem, basis, p)
        reduced = (unit * (basis.T @ gradient).ravel())[:, None]
        for transpose in (False, True):
            reduced = lax.linalg.triangular_solve(
                lower, reduced, left_side=True, lower=True, transpose_a=transpose
            )
        d = -basis @ (unit * reduced[:, 0]).reshape(basis.shape[1], -1)
        decrement = -jnp.vdot(gradient, d) / 2
        slack = 4 * jnp.finfo(d.dtype).eps * jnp.abs(current)

        def too_high(t):
            return ~(objective(state.theta + t * d) <= current + slack) & (t > 0.5**HALVINGS)

        t = lax.while_loop(too_high, lambda t: t / 2, jnp.ones_like(current))
        state = state._replace(theta=state.theta + t * d, decrement=decrement, step=state.step + 1)
        return judged(state)

    def running(carry):
        return (carry[0].status == _status.RUNNING) & (carry[0].step < stop)

    state, current, _ = lax.while_loop(running, body, judged(state))
    return state._replace(value=current), class_scores(problem.features, state.theta)


def _factor(problem: Problem, basis: Array, p: Array) -> tuple[Array, Array]:
    """L and u with L L^T = diag(u) I diag(u), of unit diagonal."""
    h = hessian(problem, p)
    h = jnp.einsum("kr,kdle,ls->rdse", basis, h, basis)
    h = h.reshape(h.shape[0] * h.shape[1], -1)
    eps = jnp.finfo(h.dtype).eps
    diagonal = jnp.diag(h)
    unit = lax.rsqrt(jnp.maximum(diagonal, eps * jnp.finfo(h.dtype).tiny ** 0.5))
    jitter = 8 * eps * jnp.eye(len(h), dtype=h.dtype)
    return jnp.linalg.cholesky(unit[:, None] * h * unit + jitter), unit


def _contrasts(num_classes: int, dtype) -> Array:
    """[K, K - 1], orthonormal columns that sum to 0 (Helmert's)."""
    rows = np.arange(1, num_classes)
    columns = np.triu(np.ones((num_classes, num_classes - 1))) - np.diag(rows, -1)[:, :-1]
    return jnp.asarray(columns / np.linalg.norm(columns, axis=0), dtype)

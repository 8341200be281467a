"""The direction of L-BFGS, preconditioned, in the compact form.

S holds the last m steps, Y the changes of the gradient, and U = M^-1 Y, where the preconditioner M
is the initial Hessian. With the upper triangle R of S Y^T and its diagonal E,

    H^-1 g ~ M^-1 g + [S; U]^T [[R^-T (E + Y U^T) R^-1, -R^-T], [-R^-1, 0]] [S; U] g

Two small triangular solves and four products replace the two loops over the memory.

Source: R. H. Byrd, J. Nocedal and R. B. Schnabel, "Representations of quasi-Newton matrices and
their use in limited memory methods" (1994), theorem 2.2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._sharding import cond
from softjax.regression import _preconditioner
from softjax.regression._descent import Descent
from softjax.regression._features import Matrix
from softjax.regression._loop import State
from softjax.regression._objective import Point
from softjax.regression._preconditioner import Preconditioner
from softjax.regression._problem import Problem
from softjax.regression._standardised import Standardised

# The number of steps that L-BFGS remembers.
LENGTH = 10


class Memory(NamedTuple):
    """The last LENGTH steps, oldest first; rows of zeros if there were fewer steps."""

    preconditioner: Preconditioner  # M
    theta: Any  # at the step before, [K, D + 1]
    gradient: Any  # at the step before, [K, D + 1]
    steps: Any  # S [LENGTH, K (D + 1)]
    changes: Any  # Y [LENGTH, K (D + 1)]
    images: Any  # U [LENGTH, K (D + 1)]


class LBFGS(Descent):
    """The direction of L-BFGS."""

    max_steps, chunk, patience, by_newton = 5000, 50, 30, False

    @staticmethod
    def memory(features: Matrix, theta: Any) -> Memory:
        zeros = np.zeros(theta.shape, theta.dtype)
        history = np.zeros((LENGTH, theta.size), theta.dtype)
        preconditioner = _preconditioner.empty(features, len(theta))
        return Memory(preconditioner, zeros, zeros, history, history, history)

    def direction(self, here: Point, state: State) -> tuple[Array, Memory, Array]:
        d, memory = lbfgs(
            self.problem, self.standardised, here, state.memory, state.step, state.norm
        )
        return d, memory, jnp.zeros((), jnp.int32)

    def unseen(self, memory: Memory, gradient: Array) -> Array:
        return _preconditioner.unseen(memory.preconditioner, gradient)


def lbfgs(
    problem: Problem, s: Standardised, here: Point, memory: Memory, step: Array, norm: Array
) -> tuple[Array, Memory]:
    """The direction -H^-1 g with the H^-1 of the compact form, in the dtype of the fit."""
    shape = here.gradient.shape

    def precondition(preconditioner, gradients):
        def image(gradient):
            gradient = gradient.reshape(shape)
            return _preconditioner.precondition(preconditioner, gradient, norm).ravel()

        return jax.vmap(image)(gradients)

    def refreshed():
        weights, p = problem.weights, here.probabilities
        preconditioner = _preconditioner.build(s, weights, p)
        return preconditioner, precondition(preconditioner, memory.changes)

    # At the first steps, which may be long, and a few times more while the probabilities settle.
    preconditioner, images = cond(
        (step == 0) | (step == 1) | (step == 4) | (step == 16) | (step == 64),
        refreshed,
        lambda: (memory.preconditioner, memory.images),
    )
    moved = (here.theta - memory.theta).ravel()
    change = (here.gradient - memory.gradient).ravel()
    new = (step > 0) & (jnp.vdot(moved, change) > 0)

    def pushed(rows, row):
        return jnp.where(new, jnp.concatenate([rows[1:], row[None]]), rows)

    changes = pushed(memory.changes, change)
    steps = pushed(memory.steps, moved)
    gradient = here.gradient.ravel()
    image, first = precondition(preconditioner, jnp.stack([change, gradient]))
    images = pushed(images, image)
    d = -_inverse_hessian(steps, changes, images, gradient, first)
    memory = Memory(preconditioner, here.theta, here.gradient, steps, changes, images)
    return d.reshape(shape), memory


def _inverse_hessian(
    steps: Array, changes: Array, images: Array, gradient: Array, first: Array
) -> Array:
    """H^-1 gradient by the compact form; `first` is M^-1 gradient."""
    products = steps @ changes.T
    e = jnp.diag(products)
    r = jnp.triu(products) + jnp.diag(jnp.where(e > 0, 0, 1).astype(e.dtype))
    # The scale of the preconditioner is estimated along the last step.
    last = jnp.vdot(changes[-1], images[-1])
    size = jnp.where(last > 0, e[-1] / jnp.where(last > 0, last, 1), 1)
    a, b = steps @ gradient, size * (images @ gradient)
    inner = jnp.diag(e) + size * (changes @ images.T)
    low = lax.linalg.triangular_solve(r, a[:, None], left_side=True, lower=False)
    top = lax.linalg.triangular_solve(
        r, inner @ low - b[:, None], left_side=True, lower=False, transpose_a=True
    )
    return size * first + (top[:, 0] @ steps) - size * (low[:, 0] @ images)

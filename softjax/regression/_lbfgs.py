"""L-BFGS in the compact form, with the metric as its first inverse Hessian.

With the last m steps S, changes of the gradient Y and U = M^-1 Y, R the upper triangle of S Y^T
and E its diagonal:

    H g = M^-1 g + [S; U]^T [[R^-T (E + Y U^T) R^-1, -R^-T], [-R^-1, 0]] [S; U] g

Two small triangular solves and four products in place of two loops over the memory.

Source: R. H. Byrd, J. Nocedal and R. B. Schnabel, "Representations of quasi-Newton matrices and
their use in limited memory methods" (1994), theorem 2.2.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax.regression import _metric
from softjax.regression._metric import Metric, Standardised
from softjax.regression._problem import Point, Problem, example_weights

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

LENGTH = 10


class Memory(NamedTuple):
    """The last LENGTH steps, oldest first; rows of zeros before there are as many.

    Attributes:
        metric: M.
        theta, gradient: of the step before, [K, D + 1].
        steepest: M^-1 gradient.
        steps, changes, images: S, Y and U, [LENGTH, K (D + 1)].
    """

    metric: Metric
    theta: Any
    gradient: Any
    steps: Any
    changes: Any
    images: Any


def start(features: "Array | BCOO", theta: Any) -> Memory:
    zeros = np.zeros(theta.shape, theta.dtype)
    history = np.zeros((LENGTH, theta.size), theta.dtype)
    metric = _metric.empty(features, len(theta))
    return Memory(metric, zeros, zeros, history, history, history)


def direction(
    problem: Problem, s: Standardised, point: Point, memory: Memory, step: Array, norm: Array
) -> tuple[Array, Memory, Array]:
    shape = point.gradient.shape

    def steepest(metric, gradient):
        return _metric.steepest(s, metric, gradient.reshape(shape), norm).ravel()

    def refreshed():
        weights = example_weights(problem.targets)
        metric = _metric.build(memory.metric, s, weights, point.probabilities)
        return metric, jax.vmap(lambda y: steepest(metric, y))(memory.changes)

    # Early, and once more when the probabilities have settled.
    metric, images = lax.cond(
        (step == 0) | (step == 4) | (step == 16),
        refreshed,
        lambda: (memory.metric, memory.images),
    )
    moved = (point.theta - memory.theta).ravel()
    change = (point.gradient - memory.gradient).ravel()
    new = (step > 0) & (jnp.vdot(moved, change) > 0)

    def pushed(rows, row):
        return jnp.where(new, jnp.concatenate([rows[1:], row[None]]), rows)

    changes = pushed(memory.changes, change)
    steps = pushed(memory.steps, moved)
    images = pushed(images, steepest(metric, change))
    gradient = point.gradient.ravel()
    d = -_inverse_hessian(steps, changes, images, gradient, steepest(metric, gradient))
    memory = Memory(metric, point.theta, point.gradient, steps, changes, images)
    return d.reshape(shape), memory, jnp.zeros((), jnp.int32)


def _inverse_hessian(
    steps: Array, changes: Array, images: Array, gradient: Array, steepest: Array
) -> Array:
    products = steps @ changes.T
    e = jnp.diag(products)
    r = jnp.triu(products) + jnp.diag(jnp.where(e > 0, 0, 1).astype(e.dtype))
    # The metric is right in its shape, not in its size: as measured along the last step.
    last = jnp.vdot(changes[-1], images[-1])
    size = jnp.where(last > 0, e[-1] / jnp.where(last > 0, last, 1), 1)
    a, b = steps @ gradient, size * (images @ gradient)
    inner = jnp.diag(e) + size * (changes @ images.T)
    low = lax.linalg.triangular_solve(r, a[:, None], left_side=True, lower=False)
    top = lax.linalg.triangular_solve(
        r, inner @ low - b[:, None], left_side=True, lower=False, transpose_a=True
    )
    return size * steepest + (top[:, 0] @ steps) - size * (low[:, 0] @ images)

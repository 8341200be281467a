"""Newton's direction, by conjugate gradients or by a dense factor of the Hessian.

d = -H^-1 g
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax._sharding import cond
from softjax.regression import _preconditioner, _standardised
from softjax.regression._conjugate_gradients import truncated
from softjax.regression._data import Problem
from softjax.regression._dense_hessian import factored_hessian, factored_solve
from softjax.regression._objective import Point, example_weights, uncertainty
from softjax.regression._preconditioner import Preconditioner
from softjax.regression._standardised import Standardised


class Method(NamedTuple):
    """A way to find directions.

    Attributes:
        start: of (features, theta): the memory before the first step.
        direction: of (problem, standardised features, point, memory, step, norm): the direction,
            the new memory and the number of products with the features.
        patience: as many steps without a smaller gradient are rounding.
        unseen: of (standardised features, memory, gradient): as of `_preconditioner`.
        precise: whether directions are computed in the dtype of the fit, and not in float32.
    """

    start: Callable
    direction: Callable
    patience: int
    unseen: Callable = _preconditioner.unseen
    precise: bool = False


def newton_cg(
    problem: Problem,
    s: Standardised,
    point: Point,
    preconditioner: Preconditioner,
    step: Array,
    norm: Array,
) -> tuple[Array, Preconditioner, Array]:
    """The direction -H^-1 g by preconditioned conjugate gradients, in float32.

    A direction needs no more digits than that: what it misses, the gradient of the next step,
    which has all of them, finds again.
    """
    weights = example_weights(problem.targets).astype(s.ridge.dtype)
    p = point.probabilities.astype(s.ridge.dtype)
    # At steps 0, 1, 2, 4, 8 and so on: the probabilities settle.
    preconditioner = cond(
        step & (step - 1) == 0,
        lambda: _preconditioner.build(preconditioner, s, weights, p),
        lambda: preconditioner,
    )

    precondition = partial(_preconditioner.apply, preconditioner)
    s = _preconditioner.within(s, preconditioner)
    d, passes = truncated(s, weights, p, point, norm, precondition)
    return d, preconditioner, passes


def newton(
    problem: Problem, s: Standardised, point: Point, pivot: Array, step: Array, norm: Array
) -> tuple[Array, Array, Array]:
    """The direction -H^-1 g by a Cholesky factor of the Hessian, in float32 too.

    The memory is the smallest pivot of the factor, relative.
    """
    weights = example_weights(problem.targets).astype(jnp.float32)
    p = point.probabilities.astype(jnp.float32)
    s = _standardised.reweighted(s, uncertainty(weights, p))
    lower, unit = factored_hessian(s, weights, p)
    num_classes, width = point.gradient.shape
    g = (_standardised.to_standard(s.mean, s.scale, point.gradient) / norm).astype(jnp.float32)
    d = -factored_solve(lower, unit, g.ravel()).reshape(num_classes, width)
    d = _standardised.from_standard(s.mean, s.scale, d.astype(norm.dtype) * norm)
    pivot = jnp.square(jnp.min(jnp.diag(lower)))
    return d, pivot, jnp.full((), num_classes, jnp.int32)


def _unseen_by_newton(s: Standardised, pivot: Array, gradient: Array) -> Array:
    """The largest number where the Hessian is singular but for what was added to factor it."""
    blurred = pivot * _preconditioner.BLURRED < _preconditioner.JITTER * jnp.finfo(pivot.dtype).eps
    return jnp.where(blurred, jnp.finfo(gradient.dtype).max, 0).astype(gradient.dtype)


NEWTON_CG = Method(lambda x, theta: _preconditioner.empty(x, len(theta)), newton_cg, 5)
NEWTON = Method(lambda x, theta: np.ones((), np.float32), newton, 5, _unseen_by_newton)
# Newton-CG for features that float32 does not tell apart.
PRECISE = Method(
    lambda x, theta: _preconditioner.empty(x, len(theta), theta.dtype), newton_cg, 5, precise=True
)

"""Newton's direction, by conjugate gradients or by a dense factor of the Hessian.

    d = -H^-1 g

A direction in float32 is precise enough: the gradient of the next step, in full precision, corrects
its error.

Source: J. Nocedal and S. J. Wright, "Numerical Optimization" (2006), algorithms 7.1 and 3.2.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax._sharding import cond
from softjax.regression import _preconditioner, _standardised
from softjax.regression._convergence import OUTLYING, State
from softjax.regression._descent import Descent
from softjax.regression._features import Matrix
from softjax.regression._linear_solves import JITTER, factored_hessian, factored_solve, truncated
from softjax.regression._objective import Point, uncertainty
from softjax.regression._preconditioner import Preconditioner
from softjax.regression._problem import Problem
from softjax.regression._standardised import Standardised


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
        return _preconditioner.unseen(self.standardised, memory, gradient)


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
    s = s.rescaled(preconditioner.offset, preconditioner.unit)
    return truncated(s, weights, p, here, norm, preconditioner.apply)

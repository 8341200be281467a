"""The influence of each example on a fit: leverage and Cook's distance.

Each example pulls the fit towards itself, which makes its residual too small. Let
A_i = w_i q_i (diag p_i - p_i p_i^T), B_i = X~_i^T H^-1 X~_i and X~_i = (x_i, 1) kron I, and let r_i
be the score of an example with respect to its logits. All of them are in the coordinates of the
K - 1 classes other than the reference. The leverage and the corrected scores are

    leverage_i = tr(A_i B_i),  r_i -> (I - A_i B_i)^(-power) r_i

With power 1 the corrected score is, to first order, the score at the fit to the other examples.
With power 1/2 its expected square is A_i, the information of the example. By
M = A^(1/2) B A^(1/2), which is symmetric,

    f(A B) = f(0) I + A^(1/2) g(M) A^(1/2) B,  g(m) = (f(m) - f(0)) / m,

so that A need not be inverted; A is nearly 0 if the model predicts a probability close to 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._auto_axes import on_auto_axes
from softjax._labels import Labels
from softjax.regression._features import Features
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import EXACT, Rows, checked_rows, of_each_row
from softjax.regression.inference._optimum import (
    at_optimum,
    centred_problem,
    only_at_optimum,
    penalty_or_none,
)
from softjax.regression.inference._rank import determined, num_parameters


class Influence(NamedTuple):
    """The influence of each example on a fit, as arrays [N].

    Attributes:
        leverage: how strongly an example determines its own fitted logits. Without a penalty all
            leverages sum to the number of parameters.
        cooks_distance: how far the parameters move without the example: the squared distance in the
            metric of the information, divided by the number of parameters.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels).params
        >>> found = softjax.regression.inference.influence(params, x, labels)
        >>> round(float(found.leverage.sum()), 3)
        2.0
    """

    leverage: Array
    cooks_distance: Array


@on_auto_axes
def influence(
    params: SoftmaxRegression,
    features: Features,
    labels: Labels,
    *,
    l2: ArrayLike = 0.0,
    fit_intercept: bool = True,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Influence:
    """Leverage and Cook's distance of every example, computed from one Hessian.

        h_i = tr(A_i B_i),  A_i = w_i (diag p_i - p_i p_i^T) sum_k y_ik,  B_i = X~_i^T H^-1 X~_i
        D_i = d_i^T I d_i / k,  d_i = H^-1 X~_i (I - A_i B_i)^-1 w_i (y_i - p_i sum_k y_ik)

    with X~_i = (x_i, 1) kron I, the Hessian H of the total objective, the information I and the
    number k of parameters, as in `goodness_of_fit`. d_i is the change of the parameters without
    example i, computed by one step of Newton's method.

    Derivative: not supported.
    Edge cases: a row of weight 0 has leverage 0 and distance 0. The distance is large if there is
        no optimum without the example. Under a trace, the last error below becomes NaN.

    Args:
        params: kernel [D, K] and bias [K], at the optimum.
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], or counts or a distribution, floating [N, K].
        l2: >= 0, the penalty of the fit, a scalar or [D], as in `regression.objective`.
        fit_intercept: as in the fit.
        sample_weights: real [N], >= 0; None for equal weights.
        offset: real [N, K], as in the fit.

    Returns:
        `Influence` of arrays [N], at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range;
            `params` that are not at the optimum, or features that are collinear.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [9.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels, l2=0.1).params
        >>> found = softjax.regression.inference.influence(params, x, labels, l2=0.1)
        >>> int(found.cooks_distance.argmax())
        1

    Source: D. Pregibon, "Logistic regression diagnostics" (1981), eq. (9) and section 4;
        E. Lesaffre and A. Albert, "Multiple-group logistic regression diagnostics" (1989).
    """
    function = "regression.inference.influence"
    rows = checked_rows(
        function, params, features, labels, sample_weights, None, offset, fit_intercept
    ).dense()
    if len(params.bias) < 2:
        zeros = jnp.zeros(len(rows.x), rows.x.dtype)
        return Influence(zeros, zeros)
    size = num_parameters(determined(rows), rows.constant, len(params.bias))
    params, rows, _ = centred_problem(params, rows)
    found, regular, move = _influence(params, rows, penalty_or_none(function, l2), size)
    return Influence(*(only_at_optimum(function, leaf, rows, regular, move) for leaf in found))


@jax.jit
def _influence(
    params: SoftmaxRegression, rows: Rows, l2: Array | None, size: Array
) -> tuple[Influence, Array, Array]:
    optimum = at_optimum(params, rows, l2)
    v = jnp.linalg.multi_dot([optimum.inverse, optimum.fisher, optimum.inverse], precision=EXACT)
    found = pulled(
        optimum.x,
        optimum.counts,
        optimum.probabilities,
        optimum.weights[:, None] * optimum.scores,
        optimum.inverse,
        v,
        1,
    )
    return (
        Influence(found.leverage, found.squares / size.astype(v.dtype)),
        optimum.regular,
        optimum.move,
    )


class Pulled(NamedTuple):
    """Leverages and corrected scores of all examples."""

    leverage: Array  # [N]
    scores: Array  # the corrected r_i, [N, K - 1]
    squares: Array  # r^T X~^T V X~ r with the corrected r and the given V, [N]


def pulled(
    x: Array, mass: Array, p: Array, scores: Array, inverse: Array, v: Array, power: float
) -> Pulled:
    """The leverages and the corrected scores r_i.

    The features x are [N, D]; `mass` has w_i q_i; p [N, K - 1] are the probabilities of the classes
    other than the reference; H^-1 (`inverse`) and V are ordered by feature and then by class; and
    `power` is 1/2 or 1.
    """
    shape = (x.shape[1] + 1, p.shape[1]) * 2

    def of_row(b, of_v, mass, p, r):
        a = mass * (jnp.diag(p) - p[:, None] * p)
        sizes, vectors = jnp.linalg.eigh(a)
        root = (vectors * jnp.sqrt(jnp.maximum(sizes, 0))) @ vectors.T
        m, turn = jnp.linalg.eigh(root @ b @ root)
        left = jnp.maximum(1 - m, jnp.finfo(m.dtype).eps)
        g = 1 / left if power == 1 else 1 / (jnp.sqrt(left) * (1 + jnp.sqrt(left)))
        adjusted = r + root @ ((turn * g) @ (turn.T @ (root @ (b @ r))))
        return Pulled(jnp.sum(m), adjusted, adjusted @ of_v @ adjusted)

    matrices = inverse.reshape(shape), v.reshape(shape)
    return of_each_row(of_row, matrices, x, mass, p, scores)

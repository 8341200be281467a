"""Leave-one-out: the logits of every example under a fit to all others."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._auto_axes import on_auto_axes
from softjax._labels import Labels
from softjax._softmax_core import softmax_core
from softjax.regression._features import Features
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import (
    EXACT,
    Rows,
    augmented,
    checked_rows,
    feature_column,
    of_each_row,
)
from softjax.regression.inference._optimum import (
    at_optimum,
    centred,
    centred_problem,
    lifted,
    only_at_optimum,
    penalty_or_none,
)


@on_auto_axes
def leave_one_out(
    params: SoftmaxRegression,
    features: Features,
    labels: Labels,
    *,
    l2: ArrayLike = 0.0,
    fit_intercept: bool = True,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Array:
    """Logits of every example under a fit to all other examples, without fitting again.

        z_i + (I - w_i B_i A_i)^-1 w_i (B_i g_i + c_i)

        B_i = X~_i^T H^-1 X~_i,  A_i = Q_i (diag(p_i) - p_i p_i^T),  g_i = dloss_i / dz_i
        X~_i = (x_i, 1) kron I,  c_i = X~_i^T H^-1 (l2 kernel, 0)

    with the Hessian H of the total objective. This is one Newton step for the objective without the
    example, starting from the optimum with it. Leaving out an example changes H by a matrix of rank
    K, so that one inverse serves all examples. (The penalty changes by l2 w_i too. This change is
    left out: it is of second order in 1 / N, like the error of the step.) The losses of these
    logits estimate the loss on new data without a held-out set.

    Derivative: not supported.
    Edge cases: if there is no optimum without an example, for example without the only one of its
    class, its logits are far off. A row of weight 0 has its plain logits, which may be NaN. Under a
    trace, the last error below becomes NaN.

    Args:
        params: kernel [D, K] and bias [K], at the optimum.
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], a distribution, floating [N, K], or TopKLabels.
        l2: >= 0, the penalty of the fit, a scalar or [D], as in `regression.objective`.
        fit_intercept: as in the fit.
        sample_weights: real [N], >= 0; None for equal weights. A row is left out with its weight.
        class_weights: real [K], >= 0; None for equal weights.
        offset: real [N, K], as in the fit; the returned logits include it.

    Returns:
        [N, K], nats, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range;
            `params` that are not at the optimum, or features that are collinear.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> regression = softjax.regression
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> params = regression.fit(x, labels, l2=0.1).params
        >>> z = regression.leave_one_out(params, x, labels, l2=0.1)
        >>> bool(softjax.cross_entropy(z, labels).mean() > regression.objective(params, x, labels))
        True

    Source: K. Rahnama Rad and A. Maleki, "A scalable estimate of the out-of-sample prediction error
        via approximate leave-one-out cross-validation" (2020), eq. (6).
    """
    function = "regression.leave_one_out"
    rows = checked_rows(
        function, params, features, labels, sample_weights, class_weights, offset, fit_intercept
    ).dense()
    if len(params.bias) < 2:
        return rows.logits(rows.x, params)
    params, rows, _ = centred_problem(params, rows)
    z, regular, move = _leave_one_out(params, rows, penalty_or_none(function, l2))
    return only_at_optimum(function, z, rows, regular, move)


@jax.jit
def _leave_one_out(params: SoftmaxRegression, rows: Rows, l2):
    optimum = at_optimum(params, rows, l2)
    inverse = lifted(optimum.inverse, optimum.classes)
    z = rows.logits(rows.x, params)
    g = rows.residuals(z)
    q = rows.masses(z.dtype)
    from_penalty = jnp.zeros_like(z)
    if l2 is not None:
        kernel = feature_column(l2, z.dtype) * centred(params.kernel.astype(z.dtype))
        change = jnp.einsum("dkel,el->dk", inverse[:, :, :-1], kernel, precision=EXACT)
        from_penalty = jnp.matmul(augmented(optimum.x), change, precision=EXACT)

    def of_row(b, z, p, g, c, w, q):
        b_p = jnp.matmul(b, p, precision=EXACT)
        b_a = q * (b * p - b_p[:, None] * p)
        pull = w * (jnp.matmul(b, g, precision=EXACT) + c)
        moved = z + jnp.linalg.solve(jnp.eye(len(z), dtype=z.dtype) - w * b_a, pull)
        return jnp.where(w == 0, z, moved)

    others = (z, softmax_core(z, (1,)), g, from_penalty, optimum.weights, q)
    z = of_each_row(of_row, (inverse,), optimum.x, *others)
    return z, optimum.regular, optimum.move

"""The derivatives of the objective at any parameters, in closed form."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._labels import Labels, numbers_as_classes, targets_of
from softjax._numerics import compute_dtype
from softjax._softmax_core import softmax_core, softmax_tangent
from softjax.regression._features import Features, dense_or_sparse, is_sparse
from softjax.regression._model import SoftmaxRegression, refuse_other_params
from softjax.regression._rows import (
    EXACT,
    Rows,
    augmented,
    checked_rows,
    feature_column,
    information,
    rows_without_labels,
    scores,
    sum_of_chunks,
    times,
)


@on_auto_axes
def gradient(
    params: SoftmaxRegression,
    features: Features,
    labels: Labels,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> SoftmaxRegression:
    """The gradient of the objective.

        kernel: X^T G + l2 kernel;  bias: sum_i G_i
        G_i = w_i / sum(w) (p_i sum_k c_k y_ik - c y_i), at a label minus the sum of the others

    Derivative: `hvp`; both modes.
    Edge cases: a row of weight 0 is ignored, even if it has NaN; if all weights are 0, the result
    is the gradient of the penalty; under a trace, a label out of range gives NaN.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], a distribution, floating [N, K], or TopKLabels.
        l2: >= 0, the strength of the penalty, a scalar or [D], as in `objective`.
        sample_weights: real [N], >= 0; None for equal weights.
        class_weights: real [K], >= 0; None for equal weights.
        offset: real [N, K], nats; None for zeros.

    Returns:
        Shapes and dtypes of `params`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(1, 2)
        >>> softjax.regression.gradient(params, jnp.ones((4, 1)), jnp.array([0, 0, 0, 1])).bias
        Array([-0.25,  0.25], dtype=float32)

    Source: Zhang et al., "Dive into Deep Learning", eq. (4.1.10).
    """
    function = "regression.gradient"
    rows = checked_rows(function, params, features, labels, sample_weights, class_weights, offset)
    return _gradient(params, rows, _checks.not_bool(function, "l2", l2))


@on_auto_axes
def hessian(
    params: SoftmaxRegression,
    features: Features,
    labels: Labels,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Array:
    """The Hessian of the objective, of P = (D + 1) K rows and columns.

        H = sum_i a_i (diag(p_i) - p_i p_i^T) kron x~_i x~_i^T + l2 diag(1 on the kernel)
        a_i = w_i / sum(w) sum_k c_k y_ik,  x~ = (x, 1)

    Rows and columns are in the order of `jax.flatten_util.ravel_pytree(params)`: the kernel row by
    row, then the bias. The cost is N P^2 / 2 multiplications, in chunks of rows: apart from the
    logits, and a copy of the features if there are weights, the memory does not grow with N.

    Derivative: differentiable, though not meant for it.
    Edge cases: as in `gradient`. H is positive semidefinite; it is singular along a vector that is
    the same for every class: in the bias always, and in the kernel if l2 = 0.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D], dense, BCOO or BCSR.
        labels: as in `gradient`; only their mass matters, which is 1 for a class index.
        l2: >= 0, the strength of the penalty, a scalar or [D], as in `objective`.
        sample_weights: real [N], >= 0; None for equal weights.
        class_weights: real [K], >= 0; None for equal weights.
        offset: real [N, K], nats; None for zeros.

    Returns:
        [P, P], exactly symmetric, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(0, 2)  # a bias alone
        >>> softjax.regression.hessian(params, jnp.ones((4, 0)), jnp.array([0, 0, 0, 1]))
        Array([[ 0.25, -0.25],
               [-0.25,  0.25]], dtype=float32)

    Source: D. Böhning, "Multinomial logistic regression algorithm" (1992), eq. (2.3).
    """
    function = "regression.hessian"
    rows = checked_rows(function, params, features, labels, sample_weights, class_weights, offset)
    return _hessian(params, rows.dense(), _checks.not_bool(function, "l2", l2))


@on_auto_axes
def hvp(
    params: SoftmaxRegression,
    tangent: SoftmaxRegression,
    features: Features,
    labels: Labels,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> SoftmaxRegression:
    """The Hessian of the objective times a vector, in two products with the features.

        Z, U = X~ (params, tangent);  kernel: X^T V + l2 tangent;  bias: sum_i V_i
        V_i = a_i p_i (u_i - <p_i, u_i>),  a_i as in `hessian`

    Derivative: linear in `tangent`, so it can be transposed; differentiable in `params`.
    Edge cases: as in `gradient`.

    Args:
        params: kernel [D, K] and bias [K].
        tangent: the vector, of the shapes of `params`.
        features: real [N, D], dense, BCOO or BCSR.
        labels: as in `gradient`; only their mass matters, which is 1 for a class index.
        l2: >= 0, the strength of the penalty, a scalar or [D], as in `objective`.
        sample_weights: real [N], >= 0; None for equal weights.
        class_weights: real [K], >= 0; None for equal weights.
        offset: real [N, K], nats; None for zeros.

    Returns:
        Shapes and dtypes of `params`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(0, 2)
        >>> v = softjax.regression.SoftmaxRegression(jnp.zeros((0, 2)), jnp.array([1.0, 0.0]))
        >>> softjax.regression.hvp(params, v, jnp.ones((4, 0)), jnp.array([0, 0, 0, 1])).bias
        Array([ 0.25, -0.25], dtype=float32)

    Source: B. A. Pearlmutter, "Fast exact multiplication by the Hessian" (1994).
    """
    function = "regression.hvp"
    rows = checked_rows(function, params, features, labels, sample_weights, class_weights, offset)
    refuse_other_params(function, tangent, "tangent")
    _checks.same_shape(function, "tangent.kernel", tangent.kernel, jnp.shape(params.kernel))
    _checks.same_shape(function, "tangent.bias", tangent.bias, jnp.shape(params.bias))
    return _hvp(params, tangent, rows, _checks.not_bool(function, "l2", l2))


@on_auto_axes
def fisher_information(
    params: SoftmaxRegression,
    features: Features,
    *,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Array:
    """The Fisher information of all examples: the covariance of the score for labels drawn from p.

        I = sum_i w_i (diag(p_i) - p_i p_i^T) kron x~_i x~_i^T,  x~ = (x, 1)

    It is a sum, not a mean: N times the Hessian of the unweighted mean loss, which does not depend
    on the labels. Order, cost and memory are as in `hessian`.

    Derivative: differentiable, though not meant for it.
    Edge cases: a row of weight 0 is ignored, even if it has NaN. I is positive semidefinite; it is
    singular along a vector that is the same for every class.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D], dense, BCOO or BCSR.
        sample_weights: real [N], >= 0, the number of times each row counts; None for once.
        offset: real [N, K], nats; None for zeros.

    Returns:
        [P, P], P = (D + 1) K, exactly symmetric, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(0, 2)
        >>> softjax.regression.fisher_information(params, jnp.ones((4, 0)))
        Array([[ 1., -1.],
               [-1.,  1.]], dtype=float32)

    Source: P. McCullagh and J. A. Nelder, "Generalized Linear Models" (1989), section 5.4.
    """
    function = "regression.fisher_information"
    rows = rows_without_labels(function, params, features, sample_weights, offset).dense()
    return _fisher_information(params, rows)


@on_auto_axes
def lipschitz_constant(
    features: Features,
    labels: Labels,
    num_classes: int,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
) -> Array:
    """A Lipschitz constant of the gradient: a bound of the Hessian's eigenvalues everywhere.

        L = lambda_max(1/2 sum_i a_i x~_i x~_i^T + l2 diag(1 on the features)),  a_i as in `hessian`

    This follows from diag(p) - p p^T <= (I - 1 1^T / K) / 2, whose eigenvalue 1/2 is attained at
    p = (1/2, 1/2, 0, ...). Gradient descent with the step 1 / L never increases the objective. The
    cost is that of the Gram matrix of D + 1 features and its eigenvalues.

    Derivative: not meant for it.
    Edge cases: a row of weight 0 is ignored, even if it has NaN; with one class L is l2, or 0
    without features.

    Args:
        features: real [N, D], dense, BCOO or BCSR.
        labels: as in `gradient`; only their mass matters, which is 1 for a class index.
        num_classes: K.
        l2: >= 0, the strength of the penalty, a scalar or [D], as in `objective`.
        sample_weights: real [N], >= 0; None for equal weights.
        class_weights: real [K], >= 0; None for equal weights.

    Returns:
        A scalar, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.regression.lipschitz_constant(jnp.ones((3, 1)), jnp.array([0, 1, 1]), 2)
        Array(1., dtype=float32)

    Source: D. Böhning and B. G. Lindsay, "Monotonicity of quadratic-approximation algorithms"
        (1988), section 4; Böhning (1992), theorem 1.
    """
    function = "regression.lipschitz_constant"
    x = dense_or_sparse(function, features)
    x = x.todense() if is_sparse(x) else x
    _checks.same_rank(function, "features", x, 2)
    x = x.astype(compute_dtype(x.dtype))
    shape = (x.shape[0], num_classes)
    targets = targets_of(function, numbers_as_classes(labels), shape, x.dtype)
    w = _checks.weights(function, "sample_weights", sample_weights, shape[:1], x.dtype)
    c = _checks.weights(function, "class_weights", class_weights, shape[1:], x.dtype)
    l2 = _checks.not_bool(function, "l2", l2)
    return _lipschitz_constant(Rows(x, targets, w, c), l2, num_classes)


@jax.jit
def _gradient(params: SoftmaxRegression, rows: Rows, l2: ArrayLike) -> SoftmaxRegression:
    x, share = rows.counted()
    g = rows.residuals(rows.logits(x, params))
    return _pulled_back(params, x, times(share[:, None], g), params, l2)


@jax.jit
def _hessian(params: SoftmaxRegression, rows: Rows, l2: ArrayLike) -> Array:
    x, share = rows.counted()
    a = times(share, rows.masses(x.dtype))
    h = information(x, rows.logits(x, params), a)
    strength = jnp.broadcast_to(feature_column(l2, h.dtype), params.kernel.shape).ravel()
    return h + jnp.diag(jnp.pad(strength, (0, len(h) - len(strength))))


@jax.jit
def _hvp(
    params: SoftmaxRegression, tangent: SoftmaxRegression, rows: Rows, l2: ArrayLike
) -> SoftmaxRegression:
    x, share = rows.counted()
    a = times(share, rows.masses(x.dtype))
    both = jax.tree.map(
        lambda p, t: jnp.concatenate([p.astype(x.dtype), t.astype(x.dtype)], -1), params, tangent
    )
    z, u = jnp.split(scores(x, both), 2, -1)
    z = rows.with_offset(z)
    v = a[:, None] * softmax_tangent(softmax_core(z, (1,)), u, (1,))
    return _pulled_back(params, x, v, tangent, l2)


@jax.jit
def _fisher_information(params: SoftmaxRegression, rows: Rows) -> Array:
    x, _ = rows.counted()
    weights = jnp.ones(x.shape[:1], x.dtype) if rows.w is None else rows.w
    return information(x, rows.logits(x, params), weights)


@partial(jax.jit, static_argnames="num_classes")
def _lipschitz_constant(rows: Rows, l2: ArrayLike, num_classes: int) -> Array:
    x, share = rows.counted()
    a = times(share, rows.masses(x.dtype))
    x = augmented(x)

    def add_products(total, x, a):
        return total + jnp.matmul(x.T, a[:, None] * x, precision=EXACT)

    # In chunks: XLA:CPU may add row by row, and rounding in float32 would make the bound too small.
    size = x.shape[1]
    gram = sum_of_chunks(add_products, jnp.zeros((size, size), x.dtype), size, a, x)
    strength = jnp.broadcast_to(feature_column(l2, x.dtype), (size - 1, 1))[:, 0]
    penalty = jnp.diag(jnp.append(strength, 0))
    half = 0.5 if num_classes > 1 else 0.0
    return jnp.linalg.eigvalsh(half * gram + penalty)[-1]


def _pulled_back(
    params: SoftmaxRegression, x: Any, g: Array, penalised: SoftmaxRegression, l2: ArrayLike
) -> SoftmaxRegression:
    """X~^T g plus the gradient of the penalty, in the dtypes of `params`."""
    transposed: Any = x.T
    if is_sparse(x):
        kernel = transposed @ g
    elif x.shape[1] == 1 or x.shape[1] * g.shape[1] <= 9:
        # XLA:CPU adds the rows of such a product one by one, but a sum as a tree.
        kernel = jnp.sum(x[:, :, None] * g[:, None, :], 0)
    else:
        kernel = jnp.matmul(transposed, g, precision=EXACT)
    kernel += feature_column(l2, x.dtype) * penalised.kernel.astype(x.dtype)
    return SoftmaxRegression(
        kernel.astype(params.kernel.dtype), jnp.sum(g, 0).astype(params.bias.dtype)
    )

"""The Hessian at an optimum, and its inverse: covariance of the parameters, and leave-one-out.

The loss in F = sum_i w_i loss_i + W l2 / 2 |kernel|^2, W = sum_i w_i, does not change if the same
vector is added to the parameters of every class. The computation therefore uses coordinates phi in
which the most frequent class is the reference, with phi = 0. The information about the other K - 1
classes is then computed by `information`, with its accuracy. The centred parameters are
theta = T phi, where T phi is phi minus its mean over the classes.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._labels import Labels
from softjax._softmax import softmax_core
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import (
    CHUNK_SIZE,
    EXACT,
    Rows,
    augmented,
    checked_rows,
    counted,
    dense,
    feature_column,
    information,
    logits_of,
    masses,
    residuals,
    sum_of_chunks,
    times,
)
from softjax.regression.inference._leverage import pulled

if TYPE_CHECKING:
    from softjax.regression._features import Features

# At an optimum, Newton's step is 0. On separable data every step moves the logits by about 1 nat.
_STILL = 0.1


@on_auto_axes
def covariance(
    params: SoftmaxRegression,
    features: "Features",
    labels: Labels,
    *,
    robust: bool | str = False,
    clusters: ArrayLike | None = None,
    l2: ArrayLike = 0.0,
    fit_intercept: bool = True,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Array:
    """Covariance matrix of the parameters of a fit, for parameters that are centred over classes.

        V = H^+ J H^+,  H = I + W diag(l2 on the kernel),  W = sum_i w_i
        J = I, the Fisher information                      valid if the model is right
        J = sum_i w_i s_i s_i^T                            robust: "HC0", the sandwich
        J = sum_g (sum_{i in g} w_i s_i)(...)^T c          for independent clusters

    with the scores s_i = (y_i - p_i) kron (x_i, 1). Without a penalty the first form is I^+, the
    covariance of maximum likelihood. With a penalty it is the covariance of the penalised estimate
    and does not include the bias of that estimate; the Bayesian posterior covariance is H^+. The
    correction is c = G / (G - 1) (n - 1) / (n - k) for G > 1 clusters with positive weight, n > k
    examples and k = (D + 1) (K - 1) parameters. Without an intercept k = D (K - 1), and the rows
    and columns of the bias are 0.

    A vector that is added to every class changes no probability. V is the covariance of theta minus
    its mean over the classes, and is singular along such vectors. The variances of differences
    between classes and of probabilities do not depend on which of these `params` was used.

    Derivative: not supported.
    Edge cases: under a trace, the last three errors below become NaN. With one class V is 0.

    Args:
        params: kernel [D, K] and bias [K], at the optimum; in float64 if possible, because nearly
            collinear features cost digits.
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], or counts or a distribution, floating [N, K]. Each count
            is one example; `robust` treats a row of counts as one example.
        robust: True or "HC0" if the labels may vary in another way than the model says. For few
            examples: "HC1", which is HC0 times n / (n - k), or "HC2" or "HC3", which multiply
            y_i - p_i by (I - A_i B_i)^(-1/2) or (I - A_i B_i)^-1 to correct for the pull of an
            example on the fit; `influence` defines A_i and B_i.
        clusters: [N], known values, equal within a cluster, none missing; implies `robust`.
        l2: >= 0, the penalty of the fit, a scalar or [D], as in `regression.objective`.
        fit_intercept: as in the fit.
        sample_weights: real [N], >= 0: how often each row was seen (frequency weights). Scaling the
            weights scales the number of examples.
        offset: real [N, K], as in the fit.

    Returns:
        [P, P], P = (D + 1) K, in the order of `hessian`; at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range;
            too few clusters or examples for c; features that are collinear in this dtype; `params`
            that are not at the optimum. Separable data with l2 = 0 have no optimum.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(0, 2)  # a bias alone: log odds of 1 : 1
        >>> labels = jnp.array([0, 1, 0, 1])
        >>> v = softjax.regression.inference.covariance(params, jnp.ones((4, 0)), labels)
        >>> v[0, 0] + v[1, 1] - 2 * v[0, 1]  # of the log odds: 1 / 2 + 1 / 2
        Array(1., dtype=float32)

    Source: H. White, "Maximum likelihood estimation of misspecified models" (1982), theorem 3.2;
        A. C. Cameron and D. L. Miller, "A practitioner's guide to cluster-robust inference"
        (2015), eq. (12).
    """
    function = "regression.inference.covariance"
    rows = checked_rows(
        function,
        params,
        features,
        labels,
        sample_weights,
        offset=offset,
        fit_intercept=fit_intercept,
    )
    rows = rows._replace(x=dense(rows.x))
    codes = None if clusters is None else _cluster_codes(function, clusters, len(rows.x))
    groups = 0 if codes is None else int(codes.max()) + 1
    size = (rows.x.shape[1] + 1) * len(params.bias)
    if len(params.bias) < 2:
        return jnp.zeros((size, size), rows.x.dtype)
    kind = _kind_of(function, robust, codes is not None)
    matrix, regular, move, correction = _covariance(
        params, rows, penalty_or_none(function, l2), codes, groups, kind
    )
    matrix = only_at_optimum(function, matrix, regular, move)
    if _checks.is_concrete(correction) and jnp.isnan(correction):
        if codes is None:
            expected = "'HC0', 'HC2' or 'HC3' if there are no more examples than parameters"
            raise ValueError(_checks.message(function, "robust", expected, repr(robust)))
        expected = "two or more with positive weight, in more examples than there are parameters"
        raise ValueError(_checks.message(function, "clusters", expected, "fewer"))
    return matrix


@on_auto_axes
def leave_one_out(
    params: SoftmaxRegression,
    features: "Features",
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
        function,
        params,
        features,
        labels,
        sample_weights,
        class_weights,
        offset=offset,
        fit_intercept=fit_intercept,
    )
    rows = rows._replace(x=dense(rows.x))
    if len(params.bias) < 2:
        return logits_of(rows, rows.x, params)
    z, regular, move = _leave_one_out(params, rows, penalty_or_none(function, l2))
    return only_at_optimum(function, z, regular, move)


class _Optimum(NamedTuple):
    """Derivatives of F at fitted parameters, in R = (D + 1) (K - 1) coordinates phi.

    Attributes:
        x: features [N, D], 0 in a row of weight 0.
        weights: w [N].
        counts: w_i sum_k c_k y_ik, [N].
        scores: -dloss_i / dphi_i, [N, K - 1].
        probabilities: probabilities of the classes of phi, [N, K - 1].
        fisher: the information, [R, R].
        inverse: the inverse of the Hessian, [R, R].
        classes: [K], the order of the classes in phi, with the reference last.
        regular: whether the Hessian has an inverse in this dtype.
        move: the largest change of a logit by Newton's step, nats.
    """

    x: Array
    weights: Array
    counts: Array
    scores: Array
    probabilities: Array
    fisher: Array
    inverse: Array
    classes: Array
    regular: Array
    move: Array


def _kind_of(function: str, robust: bool | str, clustered: bool) -> str | None:
    """The name of a robust covariance; None for the model-based covariance."""
    kinds = ("HC0", "HC1", "HC2", "HC3")
    if isinstance(robust, (bool, np.bool_)):
        return "HC0" if robust or clustered else None
    if robust not in kinds:
        expected = f"True, False or one of {', '.join(kinds)}"
        raise ValueError(_checks.message(function, "robust", expected, repr(robust)))
    if clustered and robust != "HC0":
        raise ValueError(_checks.message(function, "robust", "True with `clusters`", repr(robust)))
    return robust


@partial(jax.jit, static_argnames=("groups", "robust"))
def _covariance(params: SoftmaxRegression, rows: Rows, l2, codes, groups: int, robust: str | None):
    optimum = at_optimum(params, rows, l2)
    v, k = optimum.inverse, len(optimum.classes)
    meat = optimum.fisher
    if robust:
        scores = optimum.scores
        if robust in ("HC2", "HC3"):
            power = 1 if robust == "HC3" else 0.5
            # A row of weight 2 is two examples, and each of them is corrected by itself.
            weights = optimum.weights
            mass = jnp.where(weights > 0, optimum.counts / jnp.where(weights > 0, weights, 1), 0)
            arrays = (optimum.x, mass, optimum.probabilities, scores, v, v)
            scores = pulled(*arrays, power).scores
        meat = _meat(optimum.x, scores, optimum.weights, codes, groups)
    if robust or l2 is not None:
        v = jnp.linalg.multi_dot([v, meat, v], precision=EXACT)
    correction = jnp.ones((), v.dtype)
    n = jnp.sum(optimum.counts)
    size = len(v) - (1 - jnp.asarray(rows.constant, v.dtype)) * (k - 1)
    if robust == "HC1" or codes is not None:
        correction = jnp.where(n > size, n / (n - size), jnp.nan)
    if codes is not None:
        g = jnp.sum(jnp.zeros(groups, n.dtype).at[codes].max(optimum.counts) > 0)
        correction = jnp.where((g > 1) & (n > size), g / (g - 1) * (n - 1) / (n - size), jnp.nan)
    v = _lifted(v * correction, optimum.classes)
    matrix = v.reshape(v.shape[0] * v.shape[1], -1)
    return matrix, optimum.regular, optimum.move, correction


def _meat(x: Array, scores: Array, weights: Array, codes, groups: int) -> Array:
    """sum_i w_i s_i s_i^T, or the same sum with the summed scores of each cluster."""
    size = (x.shape[1] + 1) * scores.shape[1]

    def of_rows(x, scores):
        return (augmented(x)[:, :, None] * scores[:, None, :]).reshape(len(x), size)

    if codes is None:

        def add_products(total, x, scores, w):
            s = of_rows(x, scores)
            return total + jnp.matmul(s.T, w[:, None] * s, precision=EXACT)

        zeros = jnp.zeros((size, size), x.dtype)
        return sum_of_chunks(add_products, zeros, 2 * size, weights, x, scores)

    def add_rows(sums, x, scores, codes, w):
        return sums.at[codes].add(w[:, None] * of_rows(x, scores))

    zeros = jnp.zeros((groups, size), x.dtype)
    sums = sum_of_chunks(add_rows, zeros, 2 * size, weights, x, scores, codes)
    return jnp.matmul(sums.T, sums, precision=EXACT)


@jax.jit
def _leave_one_out(params: SoftmaxRegression, rows: Rows, l2):
    optimum = at_optimum(params, rows, l2)
    x = augmented(optimum.x)
    inverse = _lifted(optimum.inverse, optimum.classes)
    d, k = inverse.shape[:2]
    z = logits_of(rows, rows.x, params)
    g = residuals(z, rows.targets, rows.c)
    q = masses(rows.targets, rows.c, z.dtype)
    from_penalty = jnp.zeros_like(z)
    if l2 is not None:
        kernel = feature_column(l2, z.dtype) * _centred(params.kernel.astype(z.dtype))
        change = jnp.einsum("dkel,el->dk", inverse[:, :, :-1], kernel, precision=EXACT)
        from_penalty = jnp.matmul(x, change, precision=EXACT)
    pairs = inverse.transpose(0, 2, 1, 3).reshape(d * d, k * k)

    def of_row(row):
        x, z, p, g, c, w, q = row
        outer = (x[:, None] * x).ravel()
        b = jnp.matmul(outer, pairs, precision=EXACT).reshape(k, k)
        b_p = jnp.matmul(b, p, precision=EXACT)
        b_a = q * (b * p - b_p[:, None] * p)
        pull = w * (jnp.matmul(b, g, precision=EXACT) + c)
        moved = z + jnp.linalg.solve(jnp.eye(k, dtype=z.dtype) - w * b_a, pull)
        return jnp.where(w == 0, z, moved)

    batch = max(1, CHUNK_SIZE // (d * d + k * k))
    p = softmax_core(z, (1,))
    rows_of = (x, z, p, g, from_penalty, optimum.weights, q)
    return lax.map(of_row, rows_of, batch_size=batch), optimum.regular, optimum.move


def at_optimum(params: SoftmaxRegression, rows: Rows, l2: Array | None) -> _Optimum:
    """The derivatives of F at `params`, which should be its optimum; K >= 2."""
    x, _ = counted(rows.x, rows.w)
    weights = jnp.ones(len(x), x.dtype) if rows.w is None else rows.w
    z = logits_of(rows, x, params)
    k, d = z.shape[1], x.shape[1] + 1
    size = d * (k - 1)
    counts = times(weights, masses(rows.targets, rows.c, x.dtype))
    fisher = information(x, z, counts).reshape(d, k, d, k)
    reference = jnp.argmax(jnp.einsum("dkdk->k", fisher))
    classes = (reference + 1 + jnp.arange(k)) % k
    others = classes[:-1]
    fisher = jnp.take(jnp.take(fisher, others, 1), others, 3).reshape(size, size)
    constant = jnp.asarray(rows.constant, x.dtype)
    is_fitted = jnp.repeat(jnp.ones(d, x.dtype).at[-1].set(constant), k - 1)
    fisher = fisher * is_fitted[:, None] * is_fitted
    scores = -jnp.take(residuals(z, rows.targets, rows.c), others, 1)
    scores = jnp.where(weights[:, None] == 0, 0, scores)
    slope = jnp.matmul(augmented(x).T, weights[:, None] * scores, precision=EXACT)
    slope = slope.at[-1].multiply(constant)

    h = fisher
    if l2 is not None:
        strength = jnp.sum(weights) * jnp.broadcast_to(feature_column(l2, x.dtype), (d - 1, 1))
        centring = jnp.eye(k - 1, dtype=x.dtype) - 1 / k  # T^T T
        h += jnp.kron(jnp.diag(jnp.append(strength, 0)), centring)
        kernel = _centred(params.kernel.astype(x.dtype))
        slope = slope.at[:-1].add(-strength * jnp.take(kernel, others, 1))
    # A bias that is not fitted has 1 on the diagonal of the matrix to invert, and 0 in the inverse.
    inverse, regular = _inverse(h + jnp.diag(1 - is_fitted))
    inverse = inverse * is_fitted[:, None] * is_fitted

    step = jnp.matmul(inverse, slope.ravel(), precision=EXACT).reshape(d, k - 1)
    moves = jnp.matmul(augmented(x), step, precision=EXACT)
    move = jnp.max(jnp.max(moves, 1, initial=0) - jnp.min(moves, 1, initial=0), initial=0)
    p = jnp.take(softmax_core(z, (1,)), others, 1)
    return _Optimum(x, weights, counts, scores, p, fisher, inverse, classes, regular, move)


def _lifted(matrix: Array, classes: Array) -> Array:
    """T M T^T for M [R, R], ordered as the parameters are, [D + 1, K, D + 1, K]."""
    k = len(classes)
    lift = _centred(jnp.eye(k, k - 1, dtype=matrix.dtype), 0)
    lift = jnp.zeros_like(lift).at[classes].set(lift)
    d = len(matrix) // (k - 1)
    blocks = matrix.reshape(d, k - 1, d, k - 1)
    full = jnp.einsum("km,dmen,ln->dkel", lift, blocks, lift, precision=EXACT)
    return (full + full.transpose(2, 3, 0, 1)) / 2


def _centred(x: Array, axis: int = -1) -> Array:
    return x - jnp.mean(x, axis, keepdims=True)


def only_at_optimum(function: str, result: Array, regular: Array, move: Array) -> Array:
    """`result` if the parameters are at a regular optimum, else an error (NaN under a trace)."""
    if not _checks.is_concrete(regular):
        return jnp.where(regular & (move < _STILL), result, jnp.nan)
    if not regular:
        expected = f"such that the information has an inverse in {result.dtype}"
        got = "features that are collinear, possibly with the intercept, or separable classes"
        raise ValueError(_checks.message(function, "features", expected, got))
    if not float(move) < _STILL:
        got = "a fit that has not converged (the classes may be separable, or one may have no "
        got += "examples; try l2 > 0): the next Newton step changes a logit by "
        got += f"{float(move):.2g} nats"
        raise ValueError(_checks.message(function, "params", "at the optimum", got))
    return result


def _inverse(h: Array) -> tuple[Array, Array]:
    """The inverse of a positive definite matrix, and whether the inverse exists in this dtype.

    The matrix is scaled to a unit diagonal. A pivot of its Cholesky factor is then the share
    1 - R^2 of a parameter's information that the parameters before it do not explain.
    """
    size = len(h)
    scale = jax.lax.rsqrt(jnp.diag(h))
    factor = jnp.linalg.cholesky(scale[:, None] * h * scale)
    pivots = jnp.square(jnp.diag(factor))
    regular = jnp.all(pivots > size * jnp.finfo(h.dtype).eps)  # NaN pivots give False
    inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(size, dtype=h.dtype))
    return scale[:, None] * inverse * scale, regular


def penalty_or_none(function: str, l2: ArrayLike) -> ArrayLike | None:
    """The penalty, or None if it is known to be 0."""
    _checks.not_negative(function, "l2", l2)
    return None if isinstance(l2, (int, float)) and l2 == 0 else l2


def _cluster_codes(function: str, clusters: ArrayLike, num_examples: int) -> np.ndarray:
    values = _checks.known(clusters)
    if values is None:
        expected = "known, not traced"
        raise TypeError(_checks.message(function, "clusters", expected, "a traced array"))
    _checks.same_shape(function, "clusters", values, (num_examples,))
    # A dictionary finds the distinct values, since text and numbers together cannot be sorted.
    entries, place = list(values), {}
    missing = [_checks.is_missing(e) or (isinstance(e, (str, bytes)) and not e) for e in entries]
    _checks.refuse_first(function, "clusters", "without missing values", values, np.array(missing))
    try:
        codes = np.array([place.setdefault(entry, len(place)) for entry in entries], np.int32)
    except TypeError as error:
        expected = "numbers or text"
        raise TypeError(_checks.message(function, "clusters", expected, values[0])) from error
    if len(place) < 2:
        expected = "at least two different clusters"
        raise ValueError(_checks.message(function, "clusters", expected, len(place)))
    return codes

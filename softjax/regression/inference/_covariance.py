"""The covariance of the parameters of a fit: of a model that is right, robust, or of clusters."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._foreign import filled, is_missing
from softjax._labels import Labels
from softjax.regression._features import Features, same_order
from softjax.regression._linear_solves import JITTER
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import EXACT, Rows, augmented, checked_rows, sum_of_chunks, times
from softjax.regression.inference._influence import pulled
from softjax.regression.inference._optimum import (
    at_optimum,
    centred_problem,
    lifted,
    of_features,
    only_at_optimum,
    penalty_or_none,
)
from softjax.regression.inference._rank import (
    Determined,
    determined,
    may_be_collinear,
    num_parameters,
    pivoted,
)


@on_auto_axes
def covariance(
    params: SoftmaxRegression,
    features: Features,
    labels: Labels,
    *,
    robust: bool | str = False,
    clusters: ArrayLike | None = None,
    l2: ArrayLike = 0.0,
    fit_intercept: bool = True,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Array | np.ndarray:
    """Covariance matrix of the parameters of a fit, for parameters that are centred over classes.

        V = H^+ J H^+,  H = I + W diag(l2 on the kernel),  W = sum_i w_i
        J = I, the Fisher information                      valid if the model is right
        J = sum_i w_i s_i s_i^T                            robust: "HC0", the sandwich
        J = sum_g (sum_{i in g} w_i s_i)(...)^T c          for independent clusters

    with the scores s_i = (y_i - p_i) kron (x_i, 1), times the class weight of the label: a class
    weight counts once in H and squared in J. Without a penalty the first form is I^+, the
    covariance of maximum likelihood. With a penalty it is the covariance of the penalised estimate
    and does not include the bias of that estimate; the Bayesian posterior covariance is H^+. The
    correction is c = G / (G - 1) (n - 1) / (n - k) for G > 1 clusters with positive weight, n > k
    examples and k = rank([X, 1]) (K - 1) parameters, as in `goodness_of_fit`. Without an intercept
    the rows and columns of the bias are 0.

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
            examples: "HC1", which is HC0 times n / (n - k) for n rows, as in R's sandwich, or
            "HC2" or "HC3", which multiply y_i - p_i by (I - A_i B_i)^(-1/2) or (I - A_i B_i)^-1 to
            correct for the pull of an example on the fit; `influence` defines A_i and B_i.
        clusters: [N], known values, equal within a cluster, none missing. They imply `robust`;
            True or "HC0" beside them changes nothing. With few clusters, fewer than about 40, the
            standard errors tend to be too small whatever N is, and with two or three they are
            useless: J has a rank below the number G of clusters.
        l2: >= 0, the penalty of the fit, a scalar or [D], as in `regression.objective`.
        fit_intercept: as in the fit.
        sample_weights: real [N], >= 0: how often each row was seen (frequency weights). Scaling the
            weights scales the number of examples. For weights that are not frequencies, such as
            survey weights, pass clusters=np.arange(N), in which J has w_i^2.
        class_weights: real [K], >= 0, those of the fit; implies `robust`, since the weighted loss
            is not the likelihood of the data.
        offset: real [N, K], as in the fit.

    Returns:
        [P, P], P = (D + 1) K, in the order of `hessian`: an array of NumPy in float64, so that it
        keeps the variances of logits if features are far from 0, such as a year. Under a trace
        it has the dtype of `params`, in which the functions of it give NaN for such features.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range;
            too few clusters or examples for c; features that are collinear in this dtype; `params`
            that are not at the optimum. Separable data with l2 = 0 have no optimum.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(0, 2)  # a bias alone: log odds of 1 : 1
        >>> labels = jnp.array([0, 1, 0, 1])
        >>> v = softjax.regression.inference.covariance(params, jnp.ones((4, 0)), labels)
        >>> round(float(v[0, 0] + v[1, 1] - 2 * v[0, 1]), 4)  # of the log odds: 1 / 2 + 1 / 2
        1.0

    Source: H. White, "Maximum likelihood estimation of misspecified models" (1982), theorem 3.2;
        A. C. Cameron and D. L. Miller, "A practitioner's guide to cluster-robust inference"
        (2015), eq. (12).
    """
    function = "regression.inference.covariance"
    same_order(function, features, clusters=clusters)
    rows = checked_rows(
        function, params, features, labels, sample_weights, class_weights, offset, fit_intercept
    )
    params, rows, mean = centred_problem(params, rows.dense())
    v = covariance_of_rows(function, params, rows, robust, clusters, l2)
    return of_features(v, mean)


def covariance_of_rows(
    function: str,
    params: SoftmaxRegression,
    rows: Rows,
    robust: bool | str,
    clusters: ArrayLike | None,
    l2: ArrayLike,
    found: Determined | None = None,
) -> Array:
    """The covariance for the rows of `centred_problem`, which determine `found`, if it is given."""
    codes = None if clusters is None else _cluster_codes(function, clusters, len(rows.x))
    groups = 0 if codes is None else int(codes.max()) + 1
    size = (rows.x.shape[1] + 1) * len(params.bias)
    if len(params.bias) < 2:
        return jnp.zeros((size, size), rows.x.dtype)
    kind = _kind_of(function, robust, codes is not None, rows.c is not None)
    corrected = kind == "HC1" or codes is not None
    penalty, parameters, collinear = penalty_or_none(function, l2), 0, False
    if corrected or penalty is not None:
        found = determined(rows) if found is None else found
        parameters = num_parameters(found, rows.constant, len(params.bias))
        collinear = penalty is not None and may_be_collinear(found)
    matrix, regular, move, correction = _covariance(
        params, rows, penalty, codes, groups, kind, parameters, collinear
    )
    matrix = only_at_optimum(function, matrix, rows, regular, move)
    if _checks.is_concrete(correction) and np.isnan(correction):
        if codes is None:
            expected = "'HC0', 'HC2' or 'HC3' if there are no more examples than parameters"
            raise ValueError(_checks.message(function, "robust", expected, repr(robust)))
        expected = "two or more with positive weight, in more examples than there are parameters"
        raise ValueError(_checks.message(function, "clusters", expected, "fewer"))
    return matrix


def _kind_of(function: str, robust: bool | str, clustered: bool, weighted: bool) -> str | None:
    """The name of a robust covariance; None for the model-based covariance."""
    kinds = ("HC0", "HC1", "HC2", "HC3")
    if isinstance(robust, (bool, np.bool_)):
        return "HC0" if robust or clustered or weighted else None
    if robust not in kinds:
        expected = f"True, False or one of {', '.join(kinds)}"
        raise ValueError(_checks.message(function, "robust", expected, repr(robust)))
    if clustered and robust != "HC0":
        raise ValueError(_checks.message(function, "robust", "True with `clusters`", repr(robust)))
    return robust


def _cluster_codes(function: str, clusters: ArrayLike, num_examples: int) -> np.ndarray:
    values = _checks.known(filled(clusters))
    if values is None:
        expected = "known, not traced"
        raise TypeError(_checks.message(function, "clusters", expected, "a traced array"))
    _checks.same_shape(function, "clusters", values, (num_examples,))
    # A dictionary finds the distinct values, since text and numbers together cannot be sorted.
    entries, place = list(values), {}
    missing = [is_missing(e) or (isinstance(e, (str, bytes)) and not e) for e in entries]
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


@partial(jax.jit, static_argnames=("groups", "robust", "collinear"))
def _covariance(
    params: SoftmaxRegression,
    rows: Rows,
    l2,
    codes,
    groups: int,
    robust: str | None,
    size: Any,
    collinear: bool,
):
    optimum = at_optimum(params, rows, l2)
    meat = None if l2 is None else optimum.fisher
    if robust:
        scores = optimum.scores
        if robust in ("HC2", "HC3"):
            power = 1 if robust == "HC3" else 0.5
            # A row of weight 2 is two examples, and each of them is corrected by itself.
            weights = optimum.weights
            mass = jnp.where(weights > 0, optimum.counts / jnp.where(weights > 0, weights, 1), 0)
            inverse = optimum.inverse
            arrays = (optimum.x, mass, optimum.probabilities, scores, inverse, inverse)
            scores = pulled(*arrays, power).scores
        meat = meat_of(optimum.x, scores, optimum.weights, codes, groups)
    v = sandwich(optimum.inverse, meat, collinear)
    correction = jnp.ones((), v.dtype)
    mass = rows._replace(c=None).masses(v.dtype)  # without class weights
    counts = times(optimum.weights, mass)
    n = jnp.sum(counts)
    size = jnp.asarray(size, v.dtype)
    if robust == "HC1":
        n = jnp.sum(jnp.where(mass > 0, optimum.weights, 0))  # J has one term for a row of counts
        correction = jnp.where(n > size, n / (n - size), jnp.nan)
    if codes is not None:
        g = jnp.sum(jnp.zeros(groups, n.dtype).at[codes].max(counts) > 0)
        correction = jnp.where((g > 1) & (n > size), g / (g - 1) * (n - 1) / (n - size), jnp.nan)
    v = lifted(v * correction, optimum.classes)
    matrix = v.reshape(v.shape[0] * v.shape[1], -1)
    return matrix, optimum.regular, optimum.move, correction


def sandwich(inverse: Array, meat: Array | None, collinear: bool) -> Array:
    """H^-1 J H^-1 for the meat J, and H^-1 if it is None, which is J = H.

    Only a penalty holds some parameters of `collinear` features. Along them J is 0, and H^-1 is as
    large as the penalty p is small. The product would multiply the rounding of J by 1 / p^2. It is
    therefore computed as (H^-1 L)(H^-1 L)^T, J = L L^T, which has the square of the rounding over
    p.
    """
    if meat is None:
        return inverse
    if not collinear:
        return jnp.linalg.multi_dot([inverse, meat, inverse], precision=EXACT)
    scale = jnp.sqrt(jnp.diag(meat))
    scale = jnp.where(scale > 0, scale, 1)
    factor, _ = pivoted(meat / scale[:, None] / scale, JITTER * jnp.finfo(meat.dtype).eps)
    half = jnp.matmul(inverse, scale[:, None] * factor, precision=EXACT)
    return jnp.matmul(half, half.T, precision=EXACT)


def meat_of(x: Array, scores: Array, weights: Array, codes, groups: int) -> Array:
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

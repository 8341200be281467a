"""The covariance of fitted parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import Labels
from softjax.regression._information import sum_of_chunks
from softjax.regression._model import SoftmaxRegression
from softjax.regression._optimum import at_optimum, lifted, only_at_optimum
from softjax.regression._rows import EXACT, Rows, augmented, checked_rows


def covariance(
    params: SoftmaxRegression,
    features: ArrayLike,
    labels: Labels,
    *,
    robust: bool = False,
    clusters: ArrayLike | None = None,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
) -> Array:
    """Covariance matrix of the parameters of a fit, between classes that are centred.

        V = H^+ J H^+,  H = I + W l2 diag(1 on the kernel),  W = sum_i w_i
        J = I, the Fisher information                      the model is right
        J = sum_i w_i s_i s_i^T                            robust: HC0, the sandwich
        J = sum_g (sum_{i in g} w_i s_i)(...)^T c          clusters that are independent

    with the scores s_i = (y_i - p_i) kron (x_i, 1). Without a penalty the first is I^+, what
    maximum likelihood promises. With one, it is the variance of the penalised estimate, whose bias
    it does not know; the Bayesian answer would be H^+ alone. c = G / (G - 1) (n - 1) / (n - k)
    for G clusters, n examples and k = (D + 1) (K - 1).

    A vector added to every class changes no probability: V is that of theta less its mean over
    the classes, and singular along such a vector. Contrasts between classes and probabilities
    have the same variance whatever the gauge of `params`.

    Derivative: not the purpose.
    Edge cases: under a trace NaN takes the place of the last two errors below; one class: 0.

    Args:
        params: kernel [D, K] and bias [K], at the optimum. In float64, where it can be: collinear
            features cost digits.
        features: real [N, D].
        labels: class indices, integer [N], or counts or a distribution, floating [N, K]. A row of
            counts is as many examples; to `robust` it is one.
        robust: whether the labels may vary otherwise than the model says.
        clusters: [N], known, equal within a cluster; implies `robust`.
        l2: scalar >= 0, the penalty of the fit.
        sample_weights: real [N], >= 0: how often each row was seen (frequency weights); a scale of
            the weights is a scale of the number of examples.

    Returns:
        [P, P], P = (D + 1) K, in the order of `hessian`; at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range;
            features that are collinear in this dtype; `params` that are not at the optimum, as on
            separable data with l2 = 0, where there is none.

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
    rows = checked_rows(function, params, features, labels, sample_weights)
    codes = None if clusters is None else _cluster_codes(function, clusters, len(rows.x))
    groups = 0 if codes is None else int(codes.max()) + 1
    size = (rows.x.shape[1] + 1) * len(params.bias)
    if len(params.bias) < 2:
        return jnp.zeros((size, size), rows.x.dtype)
    penalised = not (isinstance(l2, (int, float)) and l2 == 0)
    matrix, regular, move = _covariance(
        params, rows, l2 if penalised else None, codes, groups, robust or codes is not None
    )
    return only_at_optimum(function, matrix, regular, move)


def _cluster_codes(function: str, clusters: ArrayLike, num_examples: int) -> np.ndarray:
    values = _checks.known(clusters)
    if values is None:
        expected = "known, not traced"
        raise TypeError(_checks.message(function, "clusters", expected, "a traced array"))
    _checks.same_shape(function, "clusters", values, (num_examples,))
    names, codes = np.unique(values, return_inverse=True)
    if len(names) < 2:
        expected = "of two clusters or more"
        raise ValueError(_checks.message(function, "clusters", expected, f"{len(names)}"))
    return codes.astype(np.int32)


@partial(jax.jit, static_argnames=("groups", "robust"))
def _covariance(params: SoftmaxRegression, rows: Rows, l2, codes, groups: int, robust: bool):
    optimum = at_optimum(params, rows, l2)
    v, size = optimum.inverse, len(optimum.inverse)
    meat = optimum.fisher
    if robust:
        meat = _meat(optimum.x, optimum.scores, optimum.weights, codes, groups)
    if robust or l2 is not None:
        v = jnp.linalg.multi_dot([v, meat, v], precision=EXACT)
    if codes is not None:
        n = jnp.sum(optimum.counts)
        v *= groups / (groups - 1) * (n - 1) / (n - size)
    v = lifted(v, optimum.classes)
    return v.reshape(v.shape[0] * v.shape[1], -1), optimum.regular, optimum.move


def _meat(x: Array, scores: Array, weights: Array, codes, groups: int) -> Array:
    """sum_i w_i s_i s_i^T, or that of the sums over the clusters."""
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

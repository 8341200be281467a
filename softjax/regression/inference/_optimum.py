"""The Hessian at an optimum, and its inverse.

The loss in F = sum_i w_i loss_i + W l2 / 2 |kernel|^2, W = sum_i w_i, does not change if the same
vector is added to the parameters of every class. The computation therefore uses coordinates phi in
which the most frequent class is the reference, with phi = 0. The information about the other K - 1
classes is then computed by `information`, with its accuracy. The centred parameters are
theta = T phi, where T phi is phi minus its mean over the classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._softmax_core import softmax_core
from softjax.regression._frame import outside
from softjax.regression._loop import STILL
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import EXACT, Rows, augmented, feature_column, information, times
from softjax.regression.inference._rank import determined


class NoCovarianceError(ValueError):
    """The parameters have no covariance, or none whose precision is enough."""


class NotAtOptimumError(NoCovarianceError):
    """The parameters are not those of a fit to these data."""


class Sums(NamedTuple):
    """Sums over the rows at fitted parameters, which determine the Hessian of F."""

    information: Array  # in all classes, [(D + 1) K, (D + 1) K]
    slope: Array  # -dF / dtheta without the penalty, [D + 1, K]
    weight: Array  # W
    varies: Array  # whether a feature differs between the examples that count, [D]


class Hessian(NamedTuple):
    """The Hessian of F in R = (D + 1) (K - 1) coordinates phi, and its inverse."""

    fisher: Array  # the information, [R, R]
    inverse: Array  # the inverse of the Hessian, [R, R]
    classes: Array  # [K], the order of the classes in phi, with the reference last
    regular: Array  # whether the Hessian has an inverse in this dtype
    step: Array  # Newton's step, [D + 1, K - 1]


class Optimum(NamedTuple):
    """Derivatives of F at fitted parameters, in R = (D + 1) (K - 1) coordinates phi."""

    x: Array  # features [N, D], 0 in a row of weight 0
    weights: Array  # w [N]
    counts: Array  # w_i sum_k c_k y_ik, [N]
    scores: Array  # -dloss_i / dphi_i, [N, K - 1]
    probabilities: Array  # probabilities of the classes of phi, [N, K - 1]
    fisher: Array  # the information, [R, R]
    inverse: Array  # the inverse of the Hessian, [R, R]
    classes: Array  # [K], the order of the classes in phi, with the reference last
    regular: Array  # whether the Hessian has an inverse in this dtype
    move: Array  # the largest change of a logit by Newton's step, nats


def centred_problem(params: SoftmaxRegression, rows: Rows) -> tuple[SoftmaxRegression, Rows, Array]:
    """The same model of the dense features minus their mean m, and m [D].

    X kernel + bias = (X - 1 m^T) kernel + (bias + kernel^T m). The information about a feature far
    from 0 and about the bias is otherwise nearly singular: with a mean of r standard deviations, a
    sum over the rows loses the digits of r^2. Without an intercept no bias absorbs m, which is 0.
    """
    params = SoftmaxRegression(*(jnp.asarray(leaf, rows.x.dtype) for leaf in params))
    x, mean = _less_mean(rows)
    params, _ = outside(-mean, params)
    if _checks.is_concrete(jax.tree.leaves(params)):
        params = jax.tree.map(np.asarray, params)  # which belong to no device, as the rows may
    return params, rows._replace(x=x), mean


@jax.jit
def _less_mean(rows: Rows) -> tuple[Array, Array]:
    if not len(rows.x):
        return rows.x, jnp.zeros(rows.x.shape[1:], rows.x.dtype)
    x, share = rows.counted()
    # The sum of the distances to an example has no rounding of the size of the mean.
    first = x[jnp.argmax(share > 0)]
    mean = first + jnp.sum(share[:, None] * (x - first), 0)
    mean = jnp.asarray(rows.constant, x.dtype) * mean
    return rows.x - mean, mean


def of_features(v: Array, mean: Array) -> Any:
    """The covariance [P, P] of the parameters, from `v`, the one in the centred problem.

    bias_k = centred bias_k - <m, kernel_k>. The result is float64, in NumPy, if its numbers are
    known: a variance of logits, x~^T V x~, is a difference of numbers that are r^2 times as large.
    """
    known = [_checks.known(leaf) for leaf in (v, mean)]
    if any(leaf is None for leaf in known):
        return _sheared(jnp, v, mean)
    return _sheared(np, *(leaf.astype(np.float64) for leaf in known if leaf is not None))


def _sheared(xp: Any, v: Any, mean: Any) -> Any:
    """S v S^T, where S subtracts the products of the mean with the kernel from the bias."""

    def half(v: Any) -> Any:
        of_features = v.reshape(len(mean) + 1, -1)
        kernel, bias = of_features[:-1], of_features[-1:]
        bias = bias - xp.sum(mean[:, None] * kernel, 0, keepdims=True)
        return xp.concatenate([kernel, bias]).reshape(v.shape)

    v = half(half(v).T)
    return (v + v.T) / 2


def at_optimum(params: SoftmaxRegression, rows: Rows, l2: Array | None) -> Optimum:
    """The derivatives of F at `params`, which should be its optimum; K >= 2.

    The rows are those of `centred_problem`.
    """
    x, _ = rows.counted()
    weights = jnp.ones(len(x), x.dtype) if rows.w is None else rows.w
    z = rows.logits(x, params)
    counts = times(weights, rows.masses(x.dtype))
    scores = jnp.where(weights[:, None] == 0, 0, -rows.residuals(z))
    slope = jnp.matmul(augmented(x).T, weights[:, None] * scores, precision=EXACT)
    sums = Sums(information(x, z, counts), slope, jnp.sum(weights), _varies(x, counts))
    fisher, inverse, classes, regular, step = hessian_of(params, sums, l2, rows.constant)
    moves = jnp.matmul(augmented(x), step, precision=EXACT)
    move = jnp.max(jnp.max(moves, 1, initial=0) - jnp.min(moves, 1, initial=0), initial=0)
    scores, p = (jnp.take(part, classes[:-1], 1) for part in (scores, softmax_core(z, (1,))))
    return Optimum(x, weights, counts, scores, p, fisher, inverse, classes, regular, move)


def hessian_of(
    params: SoftmaxRegression, sums: Sums, l2: ArrayLike | None, intercept: ArrayLike
) -> Hessian:
    """The Hessian and its inverse from sums over the rows; `intercept` is 1 with a bias, else 0."""
    dtype, (d, k) = sums.slope.dtype, sums.slope.shape
    size = d * (k - 1)
    fisher = sums.information.reshape(d, k, d, k)
    reference = jnp.argmax(jnp.einsum("dkdk->k", fisher))
    classes = (reference + 1 + jnp.arange(k)) % k
    others = classes[:-1]
    fisher = jnp.take(jnp.take(fisher, others, 1), others, 3).reshape(size, size)
    constant = jnp.asarray(intercept, dtype)
    is_fitted = jnp.ones(d, dtype).at[-1].set(constant)
    strength = None
    if l2 is not None:
        strength = sums.weight * jnp.broadcast_to(feature_column(l2, dtype), (d - 1, 1))
        # Beside a bias, a penalty holds the parameters of a constant feature at 0.
        varies = sums.varies | (strength[:, 0] == 0) | (constant == 0)
        is_fitted = is_fitted.at[:-1].set(varies.astype(dtype))
    is_fitted = jnp.repeat(is_fitted, k - 1)
    fisher = fisher * is_fitted[:, None] * is_fitted
    slope = jnp.take(sums.slope, others, 1).at[-1].multiply(constant)

    h = fisher
    if strength is not None:
        centring = jnp.eye(k - 1, dtype=dtype) - 1 / k  # T^T T
        h += jnp.kron(jnp.diag(jnp.append(strength, 0)), centring)
        kernel = centred(params.kernel.astype(dtype))
        slope = slope.at[:-1].add(-strength * jnp.take(kernel, others, 1))
    # What is not fitted has 1 on the diagonal of the matrix to invert, and 0 in the inverse.
    inverse, regular = _inverse(h * is_fitted[:, None] * is_fitted + jnp.diag(1 - is_fitted))
    inverse = inverse * is_fitted[:, None] * is_fitted
    step = jnp.matmul(inverse, slope.ravel(), precision=EXACT).reshape(d, k - 1)
    return Hessian(fisher, inverse, classes, regular, step)


def _varies(x: Array, counts: Array) -> Array:
    """Whether a feature differs between the examples that count, [D]."""
    absent = (counts == 0)[:, None]
    largest = jnp.max(jnp.where(absent, -jnp.inf, x), 0, initial=-jnp.inf)
    return largest > jnp.min(jnp.where(absent, jnp.inf, x), 0, initial=jnp.inf)


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


def lifted(matrix: Array, classes: Array) -> Array:
    """T M T^T for M [R, R], ordered as the parameters are, [D + 1, K, D + 1, K]."""
    k = len(classes)
    lift = centred(jnp.eye(k, k - 1, dtype=matrix.dtype), 0)
    lift = jnp.zeros_like(lift).at[classes].set(lift)
    d = len(matrix) // (k - 1)
    blocks = matrix.reshape(d, k - 1, d, k - 1)
    full = jnp.einsum("km,dmen,ln->dkel", lift, blocks, lift, precision=EXACT)
    return (full + full.transpose(2, 3, 0, 1)) / 2


def centred(x: Array, axis: int = -1) -> Array:
    return x - jnp.mean(x, axis, keepdims=True)


def only_at_optimum(function: str, result: Array, rows: Rows, regular: Array, move: Array) -> Array:
    """`result` if the parameters are at a regular optimum, else an error (NaN under a trace)."""
    if not _checks.is_concrete(regular):
        return jnp.where(regular & (move < STILL), result, jnp.nan)
    if not regular:
        expected = f"such that the information has an inverse in {result.dtype}"
        dependent = np.flatnonzero(~np.asarray(determined(rows).counts))
        got = "separable classes, or features that are nearly collinear"
        if len(dependent):
            got = "features that are collinear, possibly with the intercept: the others determine "
            got += f"{len(dependent)} of them, such as column {dependent[0]}"
        raise NoCovarianceError(_checks.message(function, "features", expected, got))
    if not float(move) < STILL:
        got = "a fit that has not converged, or whose features, labels, sample weights, class "
        got += "weights, offset or `l2` (with penalty factors, l2 * factors) are other ones (the "
        got += "classes may also be separable, or one may have no examples; try "
        got += f"l2 > 0): the next Newton step changes a logit by {float(move):.2g} nats"
        raise NotAtOptimumError(_checks.message(function, "params", "at the optimum", got))
    return result


def penalty_or_none(function: str, l2: ArrayLike) -> ArrayLike | None:
    """The penalty, or None if it is known to be 0."""
    _checks.not_negative(function, "l2", _checks.not_bool(function, "l2", l2))
    return None if _checks.is_number(l2, 0) else l2

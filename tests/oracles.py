"""Reference values, in NumPy float64 and in 200-bit arithmetic. Nothing here imports JAX.

The same formulas serve both: a function computes in 200 bits if its first argument comes from
`exact`, and otherwise in float64. Inputs are the exact binary values of the given arrays. Every
function reduces the last axis; `where` selects classes. The functions are defined for rows of -inf,
but not for NaN and +inf.

With m = max x and r the sum of exp(x - m) over all entries but one maximal entry, no formula
subtracts nearly equal numbers, except in `cumulants` and in a covariance, which have a small
relative error only in 200 bits.
"""

from collections.abc import Callable
from typing import Any

import gmpy2
import numpy as np

Numbers = np.ndarray  # of float64 or of 200-bit numbers

# MPFR computes an exponential in 200 bits in a tenth of the time that mpmath needs.
gmpy2.get_context().precision = 200


def exact(x: Any) -> Numbers:
    """The values of x as 200-bit numbers."""
    with np.errstate(over="ignore", invalid="ignore"):  # gmpy2 sets flags for large numbers and NaN
        return np.asarray(np.frompyfunc(gmpy2.mpfr, 1, 1)(_float64(x)), object)


def rounded(x: Any) -> np.ndarray:
    """200-bit numbers rounded to float64."""
    return _float64(x)


def ulps(actual: Any, reference: Any, scale: Any = None) -> np.ndarray:
    """|actual - reference| in units in the last place of `scale` (the reference).

    Infinite where one of the two is not finite and the other differs.
    """
    actual, reference = np.asarray(actual), _numbers(reference)
    finite = np.isfinite(_float64(actual)) & np.isfinite(_float64(reference))
    same = finite | (_float64(actual) == _float64(reference))
    scale = np.where(finite, np.abs(_float64(reference if scale is None else scale)), 0)
    unit = np.spacing(scale.astype(actual.dtype)).astype(np.float64)
    values = np.where(finite, _float64(actual), 0)
    values = exact(values) if reference.dtype == object else values
    error = _float64(np.abs(values - np.where(finite, reference, 0)))
    return np.where(same, error / unit, np.inf)


# The normalizers


def excess(x: Any, where: Any = None) -> tuple[Numbers, Numbers]:
    """(m, r), with the reduced axis kept; (-inf, 0) for a row of -inf."""
    x = _masked(x, where)
    top = np.argmax(x, -1, keepdims=True)
    e = _exp(_shifted(x))
    np.put_along_axis(e, top, 0, -1)
    return np.take_along_axis(x, top, -1), e.sum(-1, keepdims=True)


def logsumexp(x: Any, where: Any = None) -> Numbers:
    m, r = excess(x, where)
    return (m + _log1p(r))[..., 0]


def signed_logsumexp(x: Any, b: Any, where: Any = None) -> tuple[Numbers, Numbers]:
    """log|sum b exp(x)| and the sign of the sum; b of the shape of x."""
    x = _numbers(x)
    b = exact(b) if x.dtype == object else _float64(b)
    picked = b != 0 if where is None else where & (b != 0)
    x = _masked(x, picked)
    m = np.where(x.max(-1) == -np.inf, 0, x.max(-1))
    total = (np.where(picked, b, 0) * _exp(x - m[..., None])).sum(-1)
    sign = (total > 0).astype(np.float64) - (total < 0)
    magnitude = np.where(total == 0, 1, np.abs(total))
    return np.where(total == 0, -np.inf, m + _log(magnitude)), sign


def logmeanexp(x: Any, where: Any = None) -> Numbers:
    count = np.sum(np.broadcast_to(True if where is None else where, np.shape(x)), -1)
    count = exact(count) if _numbers(x).dtype == object else _float64(count)
    return logsumexp(x, where) - _log(count)


def softmax(x: Any, where: Any = None, temperature: float = 1.0) -> Numbers:
    x = _divided(_masked(x, where), temperature)
    return _exp(_shifted(x)) / (1 + excess(x)[1])


def complement(x: Any, where: Any = None) -> Numbers:
    """1 - softmax(x), accurate where softmax(x) is near 1."""
    x = _masked(x, where)
    p = softmax(x)
    r = excess(x)[1]
    is_top = np.arange(x.shape[-1]) == np.argmax(x, -1, keepdims=True)
    return np.where(is_top & (p > 0), r / (1 + r), 1 - p)


def log_softmax(x: Any, where: Any = None, temperature: float = 1.0) -> Numbers:
    x = _divided(_masked(x, where), temperature)
    return _shifted(x) - _log1p(excess(x)[1])


def softmin(x: Any, where: Any = None, temperature: float = 1.0) -> Numbers:
    return softmax(-_numbers(x), where, temperature)


def smooth_max(x: Any, where: Any = None, temperature: float = 1.0) -> Numbers:
    return logsumexp(_divided(_numbers(x), temperature), where) * temperature


def smooth_min(x: Any, where: Any = None, temperature: float = 1.0) -> Numbers:
    return -smooth_max(-_numbers(x), where, temperature)


# The loss


def cross_entropy(
    logits: Any,
    labels: Any,
    where: Any = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Any = None,
    ignore_index: int | None = None,
    z_loss: float = 0.0,
) -> Numbers:
    """sum_k w_k q_k (-log p_k) + z logsumexp^2, for the smoothed target distribution q."""
    x = _masked(logits, where)
    target, ignored = _target(x, labels, where, label_smoothing, class_weights, ignore_index)
    surprise = -log_softmax(x)
    loss = np.where(target == 0, 0, target * np.where(target == 0, 0, surprise)).sum(-1)
    lse = logsumexp(x)
    loss = loss + np.where(lse == -np.inf, 0, z_loss * np.where(lse == -np.inf, 0, lse) ** 2)
    return np.where(ignored | (lse == -np.inf), 0, loss)


def cross_entropy_gradient(
    logits: Any,
    labels: Any,
    where: Any = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Any = None,
    ignore_index: int | None = None,
    z_loss: float = 0.0,
) -> Numbers:
    """sum_k t_k (p_j - [j = k]) + 2 z logsumexp p_j, with t_k = w_k q_k, without 1 - p."""
    x = _masked(logits, where)
    target, ignored = _target(x, labels, where, label_smoothing, class_weights, ignore_index)
    p = softmax(x)
    lse = logsumexp(x)[..., None]
    others = target.sum(-1, keepdims=True) - target
    gradient = others * p - target * complement(x)
    gradient = gradient + 2 * z_loss * np.where(lse == -np.inf, 0, lse) * p
    return np.where(ignored[..., None] | (x == -np.inf), 0, gradient)


def _target(
    x: Numbers, labels: Any, where: Any, smoothing: float, weights: Any, ignore_index: int | None
) -> tuple[Numbers, np.ndarray]:
    """t_k = w_k q_k with q = (1 - e) y + e u, u uniform over the unmasked classes."""
    labels = np.asarray(labels)
    ignored = np.zeros(x.shape[:-1], bool)
    if labels.dtype.kind in "iu":
        if ignore_index is not None:
            ignored = labels == ignore_index
        y = (np.where(ignored, 0, labels)[..., None] == np.arange(x.shape[-1])).astype(float)
    else:
        y = _float64(labels)
    if x.dtype == object:
        y = exact(y)
    open_classes = np.broadcast_to(True if where is None else where, x.shape)
    count = np.maximum(open_classes.sum(-1, keepdims=True), 1)
    # The smoothing is a number, not a rounded array: 1 - e is formed in the arithmetic of x.
    e = gmpy2.mpfr(smoothing) if x.dtype == object else smoothing
    q = (1 - e) * y + np.where(open_classes, e / count, 0)
    return (q if weights is None else q * _float64(weights)), ignored


# Divergences


def divergence(log_p: Any, log_q: Any, kind: str, beta: float = 0.5) -> Numbers:
    """The divergence of q from p by its definition, from log-probabilities [..., K] of both."""
    log_p, log_q = _numbers(log_p), _numbers(log_q)
    p, q = _exp(log_p), _exp(log_q)
    if kind == "forward_kl":
        return _times(p, log_p, log_q).sum(-1)
    if kind == "reverse_kl":
        return _times(q, log_q, log_p).sum(-1)
    m = beta * p + (1 - beta) * q
    log_m = _log(np.where(m == 0, 1, m))
    return (beta * _times(p, log_p, log_m) + (1 - beta) * _times(q, log_q, log_m)).sum(-1)


def _times(p: Numbers, log_p: Numbers, log_q: Numbers) -> Numbers:
    nothing = p == 0
    return np.where(nothing, 0, p * (np.where(nothing, 0, log_p) - np.where(nothing, 0, log_q)))


# Derivatives of logsumexp


def hessian(x: Any) -> Numbers:
    """diag(p) - p p^T, its diagonal p (1 - p) from the complement."""
    p = softmax(x)
    diagonal = p * complement(x)
    product = -p[..., :, None] * p[..., None, :]
    k = np.arange(p.shape[-1])
    product[..., k, k] = diagonal
    return product


def cumulants(x: Any, direction: Any, order: int) -> list[Numbers]:
    """The derivatives of t -> logsumexp(x + t v) at 0, orders 1 to `order` (at most 4)."""
    p = softmax(x)
    v = exact(direction) if p.dtype == object else _float64(direction)
    mean = (p * v).sum(-1)
    second, third, fourth = ((p * (v - mean[..., None]) ** n).sum(-1) for n in (2, 3, 4))
    return [mean, second, third, fourth - 3 * second**2][:order]


# Arithmetic


def _float64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _numbers(x: Any) -> Numbers:
    x = np.asarray(x)
    return x if x.dtype == object else x.astype(np.float64)


def _elementwise(name: str) -> Callable[[Numbers], Numbers]:
    in_float64 = getattr(np, name)
    in_200_bits = np.frompyfunc(getattr(gmpy2, name), 1, 1)
    return lambda x: np.asarray(in_200_bits(x), object) if x.dtype == object else in_float64(x)


_exp = _elementwise("exp")
_log = _elementwise("log")
_log1p = _elementwise("log1p")


def _masked(x: Any, where: Any) -> Numbers:
    x = _numbers(x)
    return x if where is None else np.where(where, x, -np.inf)


def _divided(x: Numbers, temperature: float) -> Numbers:
    # A temperature of 1 changes nothing, not even in float64.
    return x / (gmpy2.mpfr(temperature) if x.dtype == object else temperature)


def _shifted(x: Numbers) -> Numbers:
    m = x.max(-1, keepdims=True)
    return x - np.where(m == -np.inf, 0, m)

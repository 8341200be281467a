"""Entropy, cross-entropy, Kullback-Leibler divergence and related quantities of logits, in nats.

They are computed and returned in at least float32, because losses and averages sum them. Here
p = softmax(target_logits) and q = softmax(logits).
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._checks import Axis
from softjax._labels import TopKLabels, class_indices, is_class_indices
from softjax._logsumexp import logsumexp_core
from softjax._losses import index_loss, spoiled
from softjax._numerics import compute_dtype, excess, inner, log_total, masked, maximum
from softjax._reductions import relative_to, shift
from softjax._sharding import beside
from softjax._softmax import is_empty, log_softmax, softmax, softmax_tangent

__all__ = [
    "bits_to_nats",
    "cross_entropy",
    "entropy",
    "joint_entropy",
    "kl_divergence",
    "nats_to_bits",
    "perplexity",
    "surprisal",
    "temper",
]


def entropy(logits: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    """Entropy of a categorical distribution: the mean surprisal.

        H = -sum_i p_i log p_i = log1p(r) + sum_i p_i (m - x_i),  m = max x

    No term is negative, and log p is accurate where p is near 1, so nothing cancels:
    entropy([0, -20]) is 4.328e-8 in float32.

    Derivative: dH/dx_i = -p_i (log p_i + H) = -p_i (x_i - <p, x>). Both modes, any order.
    Edge cases: 0 log 0 = 0; a row of -inf, or one in which `where` masks every class, gives 0 with
    zero gradient; +inf or NaN in a row gives NaN.

    Args:
        logits: real, any shape, nats; integers and booleans become the default float.
        axis: axis or axes of the classes; None for all.
        where: booleans of the rank of `logits`, which broadcast to it; False leaves the class out.

    Returns:
        `logits` without `axis`, in nats, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.information.entropy(jnp.array([0.0, -20.0]))
        Array(4.3284228e-08, dtype=float32)

    Source: T. M. Cover, J. A. Thomas, "Elements of Information Theory" (2006), eq. (2.1).
    """
    return _of_one("entropy", logits, axis, where)


def cross_entropy(
    target_logits: ArrayLike,
    logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of two distributions: the mean surprisal under q of draws from p.

        H(p, q) = -sum_i p_i log q_i = H(p) + KL(p || q)

    Derivative: q - p with respect to `logits`, and -p_i (x_i - <p, x>) with respect to
    `target_logits`, where x are the logits. Both modes, any order.
    Edge cases: 0 log 0 = 0, also if p_i underflows; p_i > 0 with q_i = 0 gives +inf, with zero
    gradient with respect to `target_logits`; if p has no class, the result is 0 with zero gradient.

    Args:
        target_logits: real, any shape, nats: the logits of p.
        logits: real, the shape of `target_logits`, nats: the logits of q.
        axis: axis or axes of the classes; None for all.
        where: booleans of the rank of `logits`, which broadcast to it; False leaves the class out
            of both.

    Returns:
        `logits` without `axis`, in nats, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.information.cross_entropy(jnp.zeros(4), jnp.array([0.0, 0.0, -jnp.inf, 0.0]))
        Array(inf, dtype=float32)

    Source: Cover and Thomas (2006), theorem 5.4.3.
    """
    return _of_two(_cross_entropy, "cross_entropy", target_logits, logits, axis, where)


def kl_divergence(
    target_logits: ArrayLike,
    logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Kullback-Leibler divergence: the extra nats to encode draws from p with a code for q.

        KL(p || q) = sum_i p_i (log p_i - log q_i) = log1p(sum_i p_i phi(u_i)),
        u = c - <p, c>,  c = logits - target_logits,  phi(u) = exp(u) - 1 - u >= 0

    The last form sums non-negative terms. It is exactly 0 for equal logits, never negative, and
    accurate if p and q nearly agree, where the definition cancels.

    Derivative: q - p with respect to `logits`, and -p u with respect to `target_logits`. Both
    modes, any order. Where p and q are close, q - p is computed as p expm1(u - KL).
    Edge cases: as for `cross_entropy`.

    Args:
        target_logits: real, any shape, nats: the logits of p.
        logits: real, the shape of `target_logits`, nats: the logits of q.
        axis: axis or axes of the classes; None for all.
        where: booleans of the rank of `logits`, which broadcast to it; False leaves the class out
            of both.

    Returns:
        `logits` without `axis`, in nats, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.information.kl_divergence(jnp.array([0.0, 0.0]), jnp.array([1e-6, 0.0]))
        Array(1.25e-13, dtype=float32)

    Source: Cover and Thomas (2006), eq. (2.26); the second form is the Bregman divergence of
        logsumexp: A. Banerjee et al., "Clustering with Bregman Divergences" (2005), section 4.
    """
    return _of_two(_kl_divergence, "kl_divergence", target_logits, logits, axis, where)


def surprisal(
    logits: ArrayLike, labels: ArrayLike, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """Surprisal (self-information) of the observed classes.

        I = -log p_y = log1p(r) - (x_y - m),  m = max x

    Derivative: p - [i = y]. Both modes, any order.
    Edge cases: a class that is masked or -inf gives +inf; if `where` masks every class, the result
    is 0 with zero gradient. A label out of range raises ValueError if its value is known, else it
    gives NaN in value and gradient.

    Args:
        logits: real, any shape, nats; integers and booleans become the default float.
        labels: integers, `logits` without `axis`: class indices.
        axis: axis of the classes.
        where: booleans of the rank of `logits`, which broadcast to it; False leaves the class out.

    Returns:
        Shape of `labels`, in nats, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis, or a bad label.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.information.surprisal(jnp.array([0.0, -20.0]), jnp.array(0))
        Array(2.0611537e-09, dtype=float32)

    Source: Cover and Thomas (2006), section 2.1.
    """
    x = _checks.real_array("surprisal", "logits", logits)
    axis = _checks.one_axis("surprisal", axis, x.ndim)
    if not is_class_indices(labels, "surprisal"):
        is_sparse = isinstance(labels, TopKLabels)
        got = "TopKLabels" if is_sparse else f"dtype {jnp.asarray(labels).dtype}"
        raise TypeError(_checks.message("surprisal", "labels", "an array of integers", got))
    _checks.same_shape("surprisal", "labels", labels, x.shape[:axis] + x.shape[axis + 1 :])
    index, bad, _ = class_indices("surprisal", labels, x.shape[axis])
    return _surprisal(x, index, bad, _checks.mask_of_classes("surprisal", where, x.shape), axis)


def perplexity(logits: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    """Perplexity: the number of equally likely classes with the same entropy.

        exp(H),  between 1 and the number of classes

    Derivative: exp(H) dH/dx. Both modes, any order.
    Edge cases: as for `entropy`; if `where` masks every class, the result is 1.

    Args:
        logits: real, any shape, nats; integers and booleans become the default float.
        axis: axis or axes of the classes; None for all.
        where: booleans of the rank of `logits`, which broadcast to it; False leaves the class out.

    Returns:
        `logits` without `axis`, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.information.perplexity(jnp.zeros(8))
        Array(8., dtype=float32)

    Source: D. Jurafsky, J. H. Martin, "Speech and Language Processing", section 3.7.
    """
    return jnp.exp(_of_one("perplexity", logits, axis, where))


def joint_entropy(
    logits: ArrayLike, n: int, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    """Entropy of n independent draws from one distribution.

        H(X_1, ..., X_n) = n H(X)

    No code needs fewer nats for n draws on average, and a code for all of them together needs less
    than one bit more.

    Derivative: n dH/dx. Both modes, any order.
    Edge cases: as for `entropy`.

    Args:
        logits: real, any shape, nats; integers and booleans become the default float.
        n: number of draws, >= 0.
        axis: axis or axes of the classes; None for all.
        where: booleans of the rank of `logits`, which broadcast to it; False leaves the class out.

    Returns:
        `logits` without `axis`, in nats, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis, or n < 0.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.information.joint_entropy(jnp.zeros(2), 8)  # 8 log 2
        Array(5.5451775, dtype=float32)

    Source: Cover and Thomas (2006), theorem 2.6.6.
    """
    n = _checks.at_least("joint_entropy", "n", n, 0)
    return n * _of_one("joint_entropy", logits, axis, where)


def temper(
    logits: ArrayLike, alpha: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    """Log-probabilities of the tempered distribution Q proportional to P^alpha.

        log q_i = alpha x_i - logsumexp(alpha x),  alpha = 1 / T

    alpha = 2 halves the temperature, and alpha = 1/2 doubles it. alpha = 0 is an infinite
    temperature, at which Q is uniform on the support of P. As alpha grows, Q concentrates on the
    most probable classes.

    Derivative: d log q_i / d alpha = x_i - <q, x>; with respect to `logits`, alpha times the
    derivative of log_softmax at alpha x. Both modes, any order.
    Edge cases: a class that is masked or -inf stays -inf for every alpha; if `where` masks every
    class, the result is -inf with zero gradient.

    Args:
        logits: real, any shape, nats; integers and booleans become the default float.
        alpha: finite scalar, may be traced; a negative alpha favours the rare classes of P.
        axis: axis or axes of the classes; None for all.
        where: booleans of the rank of `logits`, which broadcast to it; False leaves the class out.

    Returns:
        Log-probabilities in nats, shape and dtype of `logits`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis, or a known alpha
            that is not finite.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.information.temper(jnp.log(jnp.array([0.8, 0.2])), 0.5)  # 2/3 and 1/3
        Array([-0.4054651, -1.0986123], dtype=float32)

    Source: A. Zhang et al., "Dive into Deep Learning", section 4.1, exercise 7.
    """
    x = _checks.real_array("temper", "logits", logits)
    axes = _checks.axes("temper", axis, x.ndim)
    number = _checks.scalar("temper", "alpha", alpha, compute_dtype(x.dtype))
    if _checks.checks_values(alpha) and not np.isfinite(np.asarray(alpha)):
        raise ValueError(_checks.message("temper", "alpha", "finite", np.asarray(alpha)))
    return _tempered(x, number, _checks.mask_of_classes("temper", where, x.shape), axes)


def nats_to_bits(nats: ArrayLike) -> Array:
    """Converts nats to bits: nats / log 2.

    Derivative: 1 / log 2.
    Edge cases: infinities and NaN are unchanged.

    Args:
        nats: real, any shape; integers and booleans become the default float.

    Returns:
        Bits, shape and dtype of `nats`.

    Raises:
        TypeError: not real numbers.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.information.nats_to_bits(jnp.log(8.0))
        Array(3., dtype=float32)

    Source: Cover and Thomas (2006), section 2.1.
    """
    x = _checks.real_array("nats_to_bits", "nats", nats)
    return (masked(x, None) / math.log(2)).astype(x.dtype)


def bits_to_nats(bits: ArrayLike) -> Array:
    """Converts bits to nats: bits * log 2.

    Derivative: log 2.
    Edge cases: infinities and NaN are unchanged.

    Args:
        bits: real, any shape; integers and booleans become the default float.

    Returns:
        Nats, shape and dtype of `bits`.

    Raises:
        TypeError: not real numbers.

    Example:
        >>> import softjax
        >>> softjax.information.bits_to_nats(1.0)
        Array(0.6931472, dtype=float32)

    Source: Cover and Thomas (2006), section 2.1.
    """
    x = _checks.real_array("bits_to_nats", "bits", bits)
    return (masked(x, None) * math.log(2)).astype(x.dtype)


# --- entropy ---


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _entropy(x: Array, axes: tuple[int, ...]) -> Array:
    m, r = excess(x, axes)
    return log_total(m, r) + inner(softmax(x, axes), -shift(x, m), axes)


@_entropy.defjvp
def _entropy_jvp(axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    p = softmax(x, axes)
    return _entropy(x, axes), -inner(p, _centred(p, x, axes) * x_dot, axes)


# --- cross-entropy ---


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _cross_entropy(t: Array, x: Array, axes: tuple[int, ...]) -> Array:
    return inner(softmax(t, axes), -log_softmax(x, axes), axes)


@_cross_entropy.defjvp
def _cross_entropy_jvp(axes, primals, tangents):
    (t, x), (t_dot, x_dot) = primals, tangents
    value = _cross_entropy(t, x, axes)
    p = softmax(t, axes)
    slope = jnp.where(value == jnp.inf, 0, _centred(p, x, axes))
    by_x = inner(_difference(t, x, axes), x_dot, axes)
    return value, by_x - inner(p, slope * t_dot, axes)


# --- Kullback-Leibler divergence ---

# exp(FAR) is far below overflow, and exp(FAR) times a probability that underflows is far below 1.
FAR = 40


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kl_divergence(t: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """log1p(sum_i p_i phi(u_i)), with p_i phi(u_i) = exp(a_i) - p_i (1 + u_i), a = log p + u.

    Since also a = log q + KL, the differences of a between classes are the differences of x. So a
    is computed at the most probable class, and for the others from x. This also works where p_i is
    0; the term is exp(a_i) there.
    """
    p = softmax(t, axes)
    u = _centred_ratio(p, t, x, axes)
    a = relative_to(x, _at_top(p, x, axes)) + _at_top(p, log_softmax(t, axes) + u, axes)
    far = jnp.exp(jnp.minimum(a, FAR)) - p * (1 + u)
    terms = jnp.where((p > 0) & (u < FAR), p * _exp_less_tangent(jnp.minimum(u, FAR)), far)
    near = jnp.log1p(jnp.sum(terms, axes, keepdims=True))
    largest = maximum(a, axes)
    value = jnp.where(largest < FAR, near, logsumexp_core(a, axes))

    impossible = jnp.any((p > 0) & jnp.isneginf(x), axes, keepdims=True)
    return jnp.where(is_empty(p, axes), 0, jnp.where(impossible, jnp.inf, value))


@_kl_divergence.defjvp
def _kl_divergence_jvp(axes, primals, tangents):
    (t, x), (t_dot, x_dot) = primals, tangents
    value = _kl_divergence(t, x, axes)
    p = softmax(t, axes)
    slope = jnp.where(value == jnp.inf, 0, _centred_ratio(p, t, x, axes))
    by_x = inner(_difference(t, x, axes), x_dot, axes)
    return value, by_x - inner(p, slope * t_dot, axes)


def _centred_ratio(p: Array, t: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """u = c - <p, c> for c = x - t, which equals log q - log p + KL(p || q).

    The rounding error of c is added after c has been centred, so that neither a common offset nor a
    large logit costs digits.
    """
    absent = (p == 0) | jnp.isneginf(x)
    t, x = jnp.where(absent, 0, t), jnp.where(absent, 0, x)
    c = x - t
    t_used = x - c
    error = lax.stop_gradient((x - (c + t_used)) + (t_used - t))
    return _centred(p, c, axes) + _centred(p, error, axes)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _difference(t: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """q - p = p expm1(log q - log p), accurate where q and p are nearly equal."""
    p, q = softmax(t, axes), softmax(x, axes)
    log_ratio = _centred_ratio(p, t, x, axes) - _kl_divergence(t, x, axes)
    near = (jnp.abs(log_ratio) < 1) & (p > 0)
    difference = jnp.where(near, p * jnp.expm1(jnp.where(near, log_ratio, 0)), q - p)
    return jnp.where(is_empty(p, axes), 0, difference)


@_difference.defjvp
def _difference_jvp(axes, primals, tangents):
    (t, x), (t_dot, x_dot) = primals, tangents
    p, q = softmax(t, axes), softmax(x, axes)
    slope = softmax_tangent(q, x_dot, axes) - softmax_tangent(p, t_dot, axes)
    return _difference(t, x, axes), jnp.where(is_empty(p, axes), 0, slope)


def _exp_less_tangent(u: Array) -> Array:
    """exp(u) - 1 - u; near 0, where this cancels, the series u^2/2! + ... + u^16/16!."""
    series = jnp.ones_like(u)
    for k in range(16, 2, -1):
        series = 1 + u / k * series
    return jnp.where(jnp.abs(u) < 0.5, u * u / 2 * series, jnp.expm1(u) - u)


# --- surprisal ---


@partial(jax.jit, static_argnums=4)
def _surprisal(x: Array, index: Array, bad: Array | None, where: Array | None, axis: int) -> Array:
    return spoiled(index_loss(jnp.moveaxis(masked(x, where), axis, -1), index, None), bad)


# --- tempering ---


@partial(jax.jit, static_argnums=3)
def _tempered(x: Array, alpha: Array, where: Array | None, axes: tuple[int, ...]) -> Array:
    """log_softmax(alpha (x - m)), where m is max x for alpha >= 0 and min x for alpha < 0.

    Every alpha (x - m) is then <= 0. It can overflow only to -inf, a class without probability. An
    alpha that overflows this dtype is infinite here; the product at x = m is still 0.
    """
    wide = masked(x, where)
    absent = jnp.isneginf(wide)
    sign = jnp.where(alpha < 0, -1, 1).astype(wide.dtype)
    aligned = jnp.where(absent, -jnp.inf, sign * wide)
    d = aligned - lax.stop_gradient(maximum(aligned, axes))
    strength = jnp.where(jnp.isinf(alpha) & (d == 0), 1, sign * alpha)
    scaled = strength * jnp.where(absent, 0, d)
    return log_softmax(jnp.where(absent, -jnp.inf, scaled), axes).astype(x.dtype)


# --- shared helpers ---


def _of_one(function, logits, axis, where) -> Array:
    x = _checks.real_array(function, "logits", logits)
    axes = _checks.axes(function, axis, x.ndim)
    return _over_classes(_entropy, (x,), _checks.mask_of_classes(function, where, x.shape), axes)


def _of_two(core, function, target_logits, logits, axis, where) -> Array:
    t = _checks.real_array(function, "target_logits", target_logits)
    x = _checks.real_array(function, "logits", logits)
    _checks.same_shape(function, "logits", x, t.shape)
    axes = _checks.axes(function, axis, x.ndim)
    t = beside(t, x)
    return _over_classes(core, (t, x), _checks.mask_of_classes(function, where, x.shape), axes)


@partial(jax.jit, static_argnums=(0, 3))
def _over_classes(core, logits: tuple[Array, ...], where: Array | None, axes) -> Array:
    """core(*logits, axes) with all logits in one dtype, and -inf for masked classes."""
    dtype = compute_dtype(reduce(jnp.promote_types, (x.dtype for x in logits)))
    wide = [masked(x.astype(dtype), where) for x in logits]
    return jnp.squeeze(core(*wide, axes), axes)


def _at_top(p: Array, values: Array, axes: tuple[int, ...]) -> Array:
    """`values` at the most probable class, or their mean if several classes are most probable."""
    top = p == jnp.max(p, axes, keepdims=True, initial=0)
    count = jnp.sum(top.astype(p.dtype), axes, keepdims=True)
    return jnp.sum(jnp.where(top, values, 0), axes, keepdims=True) / count


def _centred(p: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """x - <p, x>, computed relative to x at the most probable class, which avoids cancellation."""
    x = jnp.where(p == 0, 0, x)
    x = jnp.where(p == 0, 0, relative_to(x, _at_top(p, x, axes)))
    return x - inner(p, x, axes)

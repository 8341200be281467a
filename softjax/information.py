"""Entropy, cross-entropy, Kullback-Leibler divergence and related quantities of logits, in nats.

They are computed and returned in at least float32, because losses and averages sum them. Here
p = softmax(target_logits) and q = softmax(logits).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._checks import Axis
from softjax._entropies import cross_entropy_core, entropy_core, kl_divergence_core, over_classes
from softjax._labels import class_indices, refuse_distributions
from softjax._losses import index_loss, spoiled
from softjax._numerics import compute_dtype, masked, maximum
from softjax._sharding import together
from softjax._softmax import log_softmax

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
    return _of_one("information.entropy", logits, axis, where)


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
    return _of_two(
        cross_entropy_core, "information.cross_entropy", target_logits, logits, axis, where
    )


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
    return _of_two(
        kl_divergence_core, "information.kl_divergence", target_logits, logits, axis, where
    )


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
    function = "information.surprisal"
    x = _checks.real_array(function, "logits", logits)
    axis = _checks.one_axis(function, axis, x.ndim)
    refuse_distributions(function, labels)
    _checks.same_shape(function, "labels", labels, x.shape[:axis] + x.shape[axis + 1 :])
    index, bad, _ = class_indices(function, labels, x.shape[axis])
    return _surprisal(x, index, bad, _checks.mask_of_classes(function, where, x.shape), axis)


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
    return jnp.exp(_of_one("information.perplexity", logits, axis, where))


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
    n = _checks.at_least("information.joint_entropy", "n", n, 0)
    return float(n) * _of_one("information.joint_entropy", logits, axis, where)


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
    function = "information.temper"
    x = _checks.real_array(function, "logits", logits)
    axes = _checks.axes(function, axis, x.ndim)
    number = _checks.scalar(function, "alpha", alpha, compute_dtype(x.dtype))
    if not _checks.holds(np.isfinite, alpha):
        raise ValueError(_checks.message(function, "alpha", "finite", _checks.known(alpha)))
    return _tempered(x, number, _checks.mask_of_classes(function, where, x.shape), axes)


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
    x = _checks.real_array("information.nats_to_bits", "nats", nats)
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
    x = _checks.real_array("information.bits_to_nats", "bits", bits)
    return (masked(x, None) * math.log(2)).astype(x.dtype)


@partial(jax.jit, static_argnums=4)
def _surprisal(x: Array, index: Array, bad: Array | None, where: Array | None, axis: int) -> Array:
    x = jnp.moveaxis(masked(*together((x, where))), axis, -1)
    x, index, bad = together((x, index, bad))
    return spoiled(index_loss(x, index, None), bad)


@partial(jax.jit, static_argnums=3)
def _tempered(x: Array, alpha: Array, where: Array | None, axes: tuple[int, ...]) -> Array:
    """log_softmax(alpha (x - m)), where m is max x for alpha >= 0 and min x for alpha < 0.

    Every alpha (x - m) is then <= 0. It can overflow only to -inf, a class without probability. An
    alpha that overflows this dtype is infinite here; the product at x = m is still 0.
    """
    wide = masked(*together((x, where)))
    absent = jnp.isneginf(wide)
    sign = jnp.where(alpha < 0, -1, 1).astype(wide.dtype)
    aligned = jnp.where(absent, -jnp.inf, sign * wide)
    d = aligned - maximum(lax.stop_gradient(aligned), axes)
    strength = jnp.where(jnp.isinf(alpha) & (d == 0), 1, sign * alpha)
    scaled = strength * jnp.where(absent, 0, d)
    return log_softmax(jnp.where(absent, -jnp.inf, scaled), axes).astype(x.dtype)


def _of_one(function: str, logits: ArrayLike, axis: Axis, where: ArrayLike | None) -> Array:
    x = _checks.real_array(function, "logits", logits)
    axes = _checks.axes(function, axis, x.ndim)
    return over_classes(entropy_core, (x,), _checks.mask_of_classes(function, where, x.shape), axes)


def _of_two(
    core: Callable[..., Array],
    function: str,
    target_logits: ArrayLike,
    logits: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
) -> Array:
    t = _checks.real_array(function, "target_logits", target_logits)
    x = _checks.real_array(function, "logits", logits)
    _checks.same_shape(function, "logits", x, t.shape)
    axes = _checks.axes(function, axis, x.ndim)
    return over_classes(core, (t, x), _checks.mask_of_classes(function, where, x.shape), axes)

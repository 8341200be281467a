"""Entropy, cross-entropy and Kullback-Leibler divergence, each with its derivative rule.

The results keep `axes`. Logits are centred relative to the most probable class, so that a row that
one class dominates keeps its digits.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._custom_jvp import custom_jvp
from softjax._logsumexp import logsumexp_core
from softjax._numerics import compute_dtype, excess, inner, keeping_half, log_total, masked, maximum
from softjax._reductions import relative_to, shift
from softjax._sharding import together
from softjax._softmax import log_softmax, softmax
from softjax._softmax_core import is_empty, softmax_tangent

# --- entropy ---


@partial(custom_jvp, nondiff_argnums=(1,))
def entropy_core(x: Array, axes: tuple[int, ...]) -> Array:
    """-sum p log p = log1p(r) + sum p (m - x)."""
    m, r = excess(x, axes)
    return log_total(m, r) + inner(softmax(x, axes), -shift(x, m), axes)


@entropy_core.defjvp
def _entropy_jvp(axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    p = softmax(x, axes)
    return entropy_core(x, axes), -inner(p, _centred(p, x, axes) * x_dot, axes)


# --- cross-entropy ---


@partial(custom_jvp, nondiff_argnums=(2,))
def cross_entropy_core(t: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """-sum p log q for p = softmax(t) and q = softmax(x)."""
    return inner(softmax(t, axes), -log_softmax(x, axes), axes)


@cross_entropy_core.defjvp
def _cross_entropy_jvp(axes, primals, tangents):
    (t, x), (t_dot, x_dot) = primals, tangents
    value = cross_entropy_core(t, x, axes)
    p = softmax(t, axes)
    slope = _centred(p, jnp.where(value == jnp.inf, 0, x), axes)
    by_x = inner(_difference(t, x, axes), x_dot, axes)
    return value, by_x - inner(p, slope * t_dot, axes)


# --- Kullback-Leibler divergence ---

# exp(FAR) is far below overflow, and exp(FAR) times a probability that underflows is far below 1.
FAR = 40


@partial(custom_jvp, nondiff_argnums=(2,))
def kl_divergence_core(t: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """log1p(sum_i p_i phi(u_i)), with p_i phi(u_i) = exp(a_i) - p_i (1 + u_i), a = log p + u.

    Since also a = log q + KL, the differences of a between classes are the differences of x. So a
    is computed at the most probable class, and for the others from x. This also works where p_i is
    0; the term is exp(a_i) there.
    """
    p = softmax(t, axes)
    impossible = jnp.any((p > 0) & jnp.isneginf(x), axes, keepdims=True)
    x = jnp.where(impossible | is_empty(p, axes), 0, x)
    u = _centred_ratio(p, t, x, axes)
    a = relative_to(x, _at_top(p, x, axes)) + _at_top(p, log_softmax(t, axes) + u, axes)
    far = jnp.exp(jnp.minimum(a, FAR)) - p * (1 + u)
    terms = jnp.where((p > 0) & (u < FAR), p * _exp_less_tangent(jnp.minimum(u, FAR)), far)
    near = jnp.log1p(jnp.sum(terms, axes, keepdims=True))
    largest = maximum(a, axes)
    value = jnp.where(largest < FAR, near, logsumexp_core(a, axes))
    return jnp.where(is_empty(p, axes), 0, jnp.where(impossible, jnp.inf, value))


@kl_divergence_core.defjvp
def _kl_divergence_jvp(axes, primals, tangents):
    (t, x), (t_dot, x_dot) = primals, tangents
    value = kl_divergence_core(t, x, axes)
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


@partial(custom_jvp, nondiff_argnums=(2,))
def _difference(t: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """q - p = p expm1(log q - log p), accurate where q and p are nearly equal."""
    p, q = softmax(t, axes), softmax(x, axes)
    log_ratio = _centred_ratio(p, t, x, axes) - kl_divergence_core(t, x, axes)
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


def _at_top(p: Array, values: Array, axes: tuple[int, ...]) -> Array:
    """`values` at the most probable class, or their mean if several classes are most probable."""
    top = p == jnp.max(p, axes, keepdims=True, initial=0)
    count = jnp.sum(top.astype(p.dtype), axes, keepdims=True)
    return jnp.sum(jnp.where(top, values / count, 0), axes, keepdims=True)


def _centred(p: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """x - <p, x>, computed relative to x at the most probable class, which avoids cancellation."""
    x = jnp.where(p == 0, 0, x)
    x = jnp.where(p == 0, 0, relative_to(x, _at_top(p, x, axes)))
    return x - inner(p, x, axes)


# --- the cores of logits of any dtype, with masked classes ---


def _over_classes(*operands: Any, core: Callable[..., Array], axes: tuple[int, ...]) -> Array:
    """core(*logits, axes) with all logits in one dtype, and -inf for masked classes."""
    *logits, where = operands
    dtype = compute_dtype(reduce(jnp.promote_types, (x.dtype for x in logits)))
    return core(*(masked(x.astype(dtype), where) for x in logits), axes)


@partial(jax.jit, static_argnums=(0, 3))
def over_classes(
    core: Callable[..., Array],
    logits: tuple[Array, ...],
    where: Array | None,
    axes: tuple[int, ...],
) -> Array:
    """One of the functions above, without the axes of the classes."""
    operands = together((*logits, where))
    return jnp.squeeze(keeping_half(_over_classes, axes, *operands, core=core), axes)

"""The two losses that cross-entropy is made of, each with the gradient that is its rule.

    index_loss     l = log1p(r) - d_y                     the class y is known
    expected_loss  l = Q log1p(r) - sum_k q_k d_k         a distribution q of mass Q is known

with d = x - max x and r the excess: both terms are >= 0, no large number is subtracted from
another, and an offset of the logits is gone before anything is summed. All over the last axis.
"""

import jax
import jax.numpy as jnp
from jax import Array

from softjax._numerics import SHORT, excess, excess_beside, log1p_excess, maximum, shift
from softjax._softmax import softmax_core, softmax_tangent


@jax.custom_jvp
def index_loss(x: Array, index: Array, ignored: Array | None) -> Array:
    """-log softmax(x)[index], and 0 where `ignored` or where the row is empty."""
    m, r = excess(x, (x.ndim - 1,))
    loss = jnp.where(r < 0, 0, log1p_excess(r) - shift(_at(x, index), m))[..., 0]
    return loss if ignored is None else jnp.where(ignored, 0, loss)


@index_loss.defjvp
def _index_loss_jvp(primals, tangents):
    x, index, ignored = primals
    loss_dot = jnp.sum(index_loss_gradient(x, index, ignored) * tangents[0], -1)
    return index_loss(x, index, ignored), loss_dot


@jax.custom_jvp
def index_loss_gradient(x: Array, index: Array, ignored: Array | None) -> Array:
    """softmax(x) - onehot(index): at the label minus the sum of the others, never p - 1."""
    axes = (x.ndim - 1,)
    is_label = jnp.arange(x.shape[-1], dtype=index.dtype) == index[..., None]
    if x.shape[-1] <= SHORT:
        m = maximum(x, axes)
        e, e_label = jnp.exp(shift(x, m)), jnp.exp(shift(_at(x, index), m))
        others = jnp.sum(jnp.where(is_label, 0, e), axes, keepdims=True)
    else:
        m, r = excess_beside(x, axes)
        e, e_label = jnp.exp(shift(x, m)), jnp.exp(shift(_at(x, index), m))
        others = jnp.where(e_label == 1, r, (1 + r) - e_label)  # r is the sum without a top
    total = others + e_label
    g = jnp.where(is_label, -others, e) / jnp.where(total > 0, total, 1)
    return g if ignored is None else jnp.where(ignored[..., None], 0, g)


@index_loss_gradient.defjvp
def _index_loss_gradient_jvp(primals, tangents):
    x, index, ignored = primals
    g_dot = softmax_tangent(softmax_core(x, (x.ndim - 1,)), tangents[0], (x.ndim - 1,))
    if ignored is not None:
        g_dot = jnp.where(ignored[..., None], 0, g_dot)
    return index_loss_gradient(x, index, ignored), g_dot


@jax.custom_jvp
def expected_loss(x: Array, q: Array) -> Array:
    """sum_k q_k (-log softmax(x)_k), with 0 * inf = 0, and 0 where the row is empty."""
    m, r = excess(x, (x.ndim - 1,))
    cost = jnp.where(q == 0, 0, q * -shift(x, m))
    loss = jnp.sum(q, -1) * log1p_excess(r)[..., 0] + jnp.sum(cost, -1)
    return jnp.where(r[..., 0] < 0, 0, loss)


@expected_loss.defjvp
def _expected_loss_jvp(primals, tangents):
    (x, q), (x_dot, q_dot) = primals, tangents
    # dl/dq_k = -log p_k. A class that has no mass on either side takes no part.
    m, r = excess(x, (x.ndim - 1,))
    cost = jnp.where((q == 0) & jnp.isneginf(x) | (r < 0), 0, log1p_excess(r) - shift(x, m))
    loss_dot = jnp.sum(expected_loss_gradient(x, q) * x_dot, -1) + jnp.sum(cost * q_dot, -1)
    return expected_loss(x, q), loss_dot


@jax.custom_jvp
def expected_loss_gradient(x: Array, q: Array) -> Array:
    """Q softmax(x) - q; where one class dominates both, the others' (Q - q_t) - Q (1 - p_t)."""
    m, r = excess_beside(x, (x.ndim - 1,))
    p = jnp.exp(shift(x, m)) / (1 + jnp.maximum(r, 0))
    mass = jnp.sum(q, -1, keepdims=True)
    dominant = (p > 0.5) & (q > 0.5 * mass)
    others = jnp.sum(jnp.where(dominant, 0, q), -1, keepdims=True)
    g = jnp.where(dominant, others - mass * complement(p, r), mass * p - q)
    return jnp.where(r < 0, 0, g)


@expected_loss_gradient.defjvp
def _expected_loss_gradient_jvp(primals, tangents):
    (x, q), (x_dot, q_dot) = primals, tangents
    axes = (x.ndim - 1,)
    p = softmax_core(x, axes)
    mass_dot = jnp.sum(q_dot, -1, keepdims=True)
    from_x = jnp.sum(q, -1, keepdims=True) * softmax_tangent(p, x_dot, axes)
    empty = jnp.sum(p, -1, keepdims=True) == 0
    return expected_loss_gradient(x, q), from_x + jnp.where(empty, 0, mass_dot * p - q_dot)


def spoiled(loss: Array, bad: Array | None) -> Array:
    """`loss`, with NaN in value and gradient where `bad`: a product does it, a choice would not."""
    return loss if bad is None else loss * jnp.where(bad, jnp.nan, 1).astype(loss.dtype)


def complement(p: Array, r: Array) -> Array:
    """1 - p for probabilities p of a row with excess r: where p > 1/2, all the others' r / (1 + r).

    An entry with p > 1/2 is the only maximal one.
    """
    return jnp.where(p > 0.5, r / (1 + r), 1 - p)


def _at(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None], -1, mode="promise_in_bounds")

"""The two losses from which cross-entropy is built, each with its gradient as derivative rule.

    index_loss     l = log1p(r) - d_y                     for a class y
    expected_loss  l = Q log1p(r) - sum_k q_k d_k         for a distribution q with sum Q

with d = x - max x and the excess r. Both terms are >= 0, no large numbers are subtracted from each
other, and an offset of the logits cancels before anything is summed. Classes are the last axis.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from softjax import _checks
from softjax._numerics import (
    excess,
    excess_and_exponentials,
    inner,
    log_total,
    maximum,
    not_negative,
    total,
)
from softjax._one_pass import excess_in_one_pass
from softjax._platforms import platform_dependent
from softjax._reductions import (
    are_long,
    is_place,
    mass_and_cost,
    shift,
    sum_and_rest,
    sums_beside_label,
)
from softjax._sharding import is_split
from softjax._softmax_core import log_softmax_core, probabilities, tangent_at


@jax.custom_jvp
def index_loss(x: Array, index: Array, ignored: Array | None) -> Array:
    """-log softmax(x)[index]; 0 where `ignored`, and in an empty row."""
    return _loss(_around_label(x, index), ignored)


@index_loss.defjvp
def _index_loss_jvp(primals, tangents):
    loss, g = _index_loss_and_gradient(*primals)
    return loss, inner(g, tangents[0], (g.ndim - 1,))[..., 0]


@jax.custom_jvp
def index_loss_gradient(x: Array, index: Array, ignored: Array | None) -> Array:
    """softmax(x) - onehot(index); the entry at the label is minus the sum of the other entries."""
    return _gradient(index, *_around_label_and_exponentials(x, index), ignored)


@index_loss_gradient.defjvp
def _index_loss_gradient_jvp(primals, tangents):
    return index_loss_gradient(*primals), _gradient_tangent(primals, tangents[0])


@jax.custom_jvp
def _index_loss_and_gradient(x: Array, index: Array, ignored: Array | None) -> tuple[Array, Array]:
    """The loss and its gradient from the same sums; with sharded classes they are sent once."""
    around, e = _around_label_and_exponentials(x, index)
    return _loss(around, ignored), _gradient(index, around, e, ignored)


@_index_loss_and_gradient.defjvp
def _index_loss_and_gradient_jvp(primals, tangents):
    loss, g = _index_loss_and_gradient(*primals)
    loss_dot = inner(g, tangents[0], (g.ndim - 1,))[..., 0]
    return (loss, g), (loss_dot, _gradient_tangent(primals, tangents[0]))


@jax.custom_jvp
def expected_loss(x: Array, q: Array) -> Array:
    """sum_k q_k (-log softmax(x)_k), with 0 * inf = 0; 0 in an empty row."""
    m, r = excess(x, (x.ndim - 1,))
    mass, cost = mass_and_cost(q, x, m)
    return _expected_loss(m, r, mass, cost)


@partial(expected_loss.defjvp, symbolic_zeros=True)
def _expected_loss_jvp(primals, tangents):
    (x, q), (x_dot, q_dot) = primals, tangents
    if isinstance(x_dot, SymbolicZero):
        loss = expected_loss(x, q)
        return loss, _expected_loss_tangent(x, None, x_dot, q, q_dot, jnp.zeros_like(loss))
    loss, g = _expected_loss_and_gradient(x, q)
    return loss, _expected_loss_tangent(x, g, x_dot, q, q_dot, jnp.zeros_like(loss))


@jax.custom_jvp
def expected_loss_gradient(x: Array, q: Array) -> Array:
    """Q softmax(x) - q; if the top class t dominates both, computed from the other classes.

    The entry at t is then (Q - q_t) - Q (1 - p_t), where Q - q_t and 1 - p_t are sums over the
    other classes and not differences.
    """
    m, r, e = excess_and_exponentials(x, (x.ndim - 1,))
    return _expected_gradient(q, m, r, e, *sum_and_rest(q, e == 1, (x.ndim - 1,)))


@partial(expected_loss_gradient.defjvp, symbolic_zeros=True)
def _expected_loss_gradient_jvp(primals, tangents):
    g = expected_loss_gradient(*primals)
    return g, _expected_gradient_tangent(primals, tangents, jnp.zeros_like(g))


@jax.custom_jvp
def _expected_loss_and_gradient(x: Array, q: Array) -> tuple[Array, Array]:
    """The loss and its gradient from the same exponentials."""
    m, r, e = excess_and_exponentials(x, (x.ndim - 1,))
    mass, cost, others = mass_and_cost(q, x, m, e == 1)
    return _expected_loss(m, r, mass, cost), _expected_gradient(q, m, r, e, mass, others)


@partial(_expected_loss_and_gradient.defjvp, symbolic_zeros=True)
def _expected_loss_and_gradient_jvp(primals, tangents):
    (x, q), (x_dot, q_dot) = primals, tangents
    loss, g = _expected_loss_and_gradient(x, q)
    loss_dot = _expected_loss_tangent(x, g, x_dot, q, q_dot, jnp.zeros_like(loss))
    return (loss, g), (loss_dot, _expected_gradient_tangent(primals, tangents, jnp.zeros_like(g)))


def _expected_loss(m: Array, r: Array, mass: Array, cost: Array) -> Array:
    return jnp.where(r < 0, 0, mass * log_total(m, r) + cost)[..., 0]


def _expected_gradient(q: Array, m: Array, r: Array, e: Array, mass: Array, others: Array) -> Array:
    """The gradient; `others` is the sum of q over the entries that are not maximal."""
    whole = total(m, r)
    p, rest = e / whole, not_negative(r) / whole
    dominant = (e == 1) & (rest < 0.5) & (q > 0.5 * mass)
    g = jnp.where(dominant, others - mass * rest, mass * p - q)
    return jnp.where(r < 0, 0, g)


Tangent = Array | SymbolicZero


def _expected_loss_tangent(
    x: Array, g: Array | None, x_dot: Tangent, q: Array, q_dot: Tangent, loss_dot: Array
) -> Array:
    axes = (x.ndim - 1,)
    if g is not None and not isinstance(x_dot, SymbolicZero):
        loss_dot += inner(g, x_dot, axes)[..., 0]
    if not isinstance(q_dot, SymbolicZero):
        # dl/dq_k = -log p_k. A class with neither probability nor target mass is ignored.
        *_, mass_of_p = probabilities(x, axes)
        nothing = (q == 0) & jnp.isneginf(x) | (mass_of_p == 0)
        cost = jnp.where(nothing, 0, -log_softmax_core(x, axes))
        loss_dot += inner(cost, q_dot, axes)[..., 0]
    return loss_dot


def _expected_gradient_tangent(
    primals: tuple[Array, Array], tangents: tuple[Tangent, Tangent], g_dot: Array
) -> Array:
    (x, q), (x_dot, q_dot) = primals, tangents
    axes = (x.ndim - 1,)
    if not isinstance(x_dot, SymbolicZero):
        mass = jnp.sum(q, -1, keepdims=True)
        g_dot += mass * tangent_at(x, x_dot, axes)
    if not isinstance(q_dot, SymbolicZero):
        p, _, mass_of_p = probabilities(x, axes)
        mass_dot = jnp.sum(q_dot, -1, keepdims=True)
        g_dot += jnp.where(mass_of_p == 0, 0, mass_dot * p - q_dot)
    return g_dot


def spoiled(loss: Array, bad: Array | None) -> Array:
    """`loss` with NaN in value and gradient where `bad`; a product with NaN changes both."""
    return loss if bad is None else loss * _checks.nan_where(bad, jnp.ones((), loss.dtype))


Around = tuple[Array, Array, Array, Array]


def _loss(around: Around, ignored: Array | None) -> Array:
    m, r, d_label, _ = around
    loss = jnp.where(r < 0, 0, log_total(m, r) - d_label)[..., 0]
    return loss if ignored is None else jnp.where(ignored, 0, loss)


def _gradient(index: Array, around: Around, e: Array, ignored: Array | None) -> Array:
    m, r, _, others = around
    is_label = is_place(index[..., None], e, e.ndim - 1)
    g = jnp.where(is_label, -others, e) / total(m, r)
    return g if ignored is None else jnp.where(ignored[..., None], 0, g)


def _gradient_tangent(primals: tuple[Array, Array, Array | None], x_dot: Array) -> Array:
    x, _, ignored = primals
    axes = (x.ndim - 1,)
    g_dot = tangent_at(x, x_dot, axes)
    return g_dot if ignored is None else jnp.where(ignored[..., None], 0, g_dot)


def _around_label(x: Array, index: Array) -> Around:
    """m, r, d_y and the sum of exp(d) over the other classes, all of which keep the axis."""
    axes = (x.ndim - 1,)

    def looked_up(x: Array, index: Array) -> Around:
        return _looked_up(x, index, *excess(x, axes))

    on_cpu = _summed if is_split(x, axes) else looked_up
    return platform_dependent(x, index, cpu=on_cpu, default=_in_few_passes)


def _around_label_and_exponentials(x: Array, index: Array) -> tuple[Around, Array]:
    """The results of `_around_label`, and exp(x - m), which XLA:CPU computes once for both."""
    axes = (x.ndim - 1,)

    def looked_up(x: Array, index: Array) -> tuple[Around, Array]:
        m, r, e = excess_and_exponentials(x, axes)
        return _looked_up(x, index, m, r), e

    def summed(x: Array, index: Array) -> tuple[Around, Array]:
        around = _in_few_passes(x, index)
        m = around[0]
        return around, jnp.exp(jnp.minimum(m, x) - m)  # a form that compiles faster than `shift`

    on_cpu = summed if is_split(x, axes) else looked_up
    return platform_dependent(x, index, cpu=on_cpu, default=summed)


def _looked_up(x: Array, index: Array, m: Array, r: Array) -> Around:
    at_label = jnp.take_along_axis(x, index[..., None], -1, mode="promise_in_bounds")
    return _beside_excess(m, r, at_label)


def _beside_excess(m: Array, r: Array, at_label: Array) -> Around:
    """The results of `_around_label` from m, r and the logit of the label."""
    d = shift(at_label, m)
    return m, r, d, jnp.where(d == 0, r, (1 + r) - jnp.exp(d))  # r is the sum without a top


def _in_few_passes(x: Array, index: Array) -> Around:
    """`_summed`, or one pass over long rows on a GPU."""
    axes = (x.ndim - 1,)

    def on_gpu(x: Array, index: Array) -> Around:
        at_label = jnp.where(is_place(index[..., None], x, x.ndim - 1), x, 0)
        return _beside_excess(*excess_in_one_pass(x, axes, at_label))

    on_gpu = on_gpu if are_long(x, axes) else _summed
    # A TPU may need seconds to compile a reduction of three arrays.
    return platform_dependent(x, index, cuda=on_gpu, rocm=on_gpu, default=_summed)


def _summed(x: Array, index: Array) -> Around:
    m = maximum(x, (x.ndim - 1,))
    d, others = sums_beside_label(x, m, index[..., None])
    # If the label is not the top, the top is among the others, and the loss is at least log 2.
    return m, jnp.where(d == 0, others, (others - 1) + jnp.exp(d)), d, others

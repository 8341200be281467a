"""The two losses from which cross-entropy is built, each with its gradient as derivative rule.

    index_loss     l = log1p(r) - d_y                     for a class y
    expected_loss  l = Q log1p(r) - sum_k q_k d_k         for a distribution q with sum Q

with d = x - max x and the excess r. Both terms are >= 0, no large numbers are subtracted from each
other, and an offset of the logits cancels before anything is summed. Classes are the last axis.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from softjax import _checks
from softjax._custom_jvp import custom_jvp
from softjax._log_softmax_core import log_softmax_core, probabilities
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
    shift_row,
    sum_and_rest,
    sums_beside_label,
    taken,
)
from softjax._sharding import is_split, taken_along
from softjax._softmax_core import tangent_at

# The numbers in a row of a TPU's vectors.
LANES = 128


@partial(custom_jvp, nondiff_argnums=(3,))
def index_loss(
    x: Array, index: Array, ignored: Array | None, exact: DTypeLike | None = None
) -> Array:
    """-log softmax(x)[index]; 0 where `ignored`, and in an empty row. `taken` explains `exact`."""
    return _loss(_around_label(x, index, exact), ignored)


@index_loss.defjvp
def _index_loss_jvp(exact, primals, tangents):
    loss, g = _index_loss_and_gradient(*primals, exact)
    return loss, inner(g, tangents[0], (g.ndim - 1,))[..., 0]


@partial(custom_jvp, nondiff_argnums=(3,))
def index_loss_gradient(
    x: Array, index: Array, ignored: Array | None, exact: DTypeLike | None = None
) -> Array:
    """softmax(x) - onehot(index); the entry at the label is minus the sum of the other entries."""
    return _gradient(*_around_label_and_numerators(x, index, exact), ignored)


@index_loss_gradient.defjvp
def _index_loss_gradient_jvp(exact, primals, tangents):
    return index_loss_gradient(*primals, exact), _gradient_tangent(primals, tangents[0])


@partial(custom_jvp, nondiff_argnums=(3,))
def _index_loss_and_gradient(
    x: Array, index: Array, ignored: Array | None, exact: DTypeLike | None
) -> tuple[Array, Array]:
    """The loss and its gradient from the same sums; with sharded classes they are sent once."""
    around, numerators = _around_label_and_numerators(x, index, exact)
    return _loss(around, ignored), _gradient(around, numerators, ignored)


@_index_loss_and_gradient.defjvp
def _index_loss_and_gradient_jvp(exact, primals, tangents):
    loss, g = _index_loss_and_gradient(*primals, exact)
    loss_dot = inner(g, tangents[0], (g.ndim - 1,))[..., 0]
    return (loss, g), (loss_dot, _gradient_tangent(primals, tangents[0]))


@custom_jvp
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


@custom_jvp
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


@custom_jvp
def _expected_loss_and_gradient(x: Array, q: Array) -> tuple[Array, Array]:
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
    p, rest = e / whole, not_negative(r) * (1 / whole)
    least = jnp.where(rest < 0.5, 0.5 * mass, jnp.inf)  # one array of rows for both conditions
    g = jnp.where((e == 1) & (q > least), others - mass * rest, mass * p - q)
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


Around = tuple[Array, Array, Array]


def _loss(around: Around, ignored: Array | None) -> Array:
    m, r, d_label = around
    loss = jnp.where(r < 0, 0, log_total(m, r) - d_label)[..., 0]
    return loss if ignored is None else jnp.where(ignored, 0, loss)


def _gradient(around: Around, numerators: Array, ignored: Array | None) -> Array:
    m, r, _ = around
    g = numerators / total(m, r)
    return g if ignored is None else jnp.where(ignored[..., None], 0, g)


def _gradient_tangent(primals: tuple[Array, Array, Array | None], x_dot: Array) -> Array:
    x, _, ignored = primals
    axes = (x.ndim - 1,)
    g_dot = tangent_at(x, x_dot, axes)
    return g_dot if ignored is None else jnp.where(ignored[..., None], 0, g_dot)


def _around_label(x: Array, index: Array, exact: DTypeLike | None) -> Around:
    """m, r and d_y, which all keep the axis."""
    axes = (x.ndim - 1,)

    def looked_up(x: Array, index: Array) -> Around:
        m, r = excess(x, axes)
        return m, r, _looked_up(x, index, m)

    def summed(x: Array, index: Array) -> Around:
        return _summed(x, index)[0]

    on_cpu = summed if is_split(x, axes) else looked_up
    one = dict.fromkeys(_platforms_of_one_pass(x, exact), partial(_in_one_pass, exact=exact))
    return platform_dependent(x, index, cpu=on_cpu, **one, default=summed)


def _around_label_and_numerators(
    x: Array, index: Array, exact: DTypeLike | None
) -> tuple[Around, Array]:
    """The results of `_around_label`, and the gradient times the sum of exp(d).

    These numerators are exp(d); at the label, minus the sum of exp(d) over the other classes.
    """
    axes = (x.ndim - 1,)

    def looked_up(x: Array, index: Array) -> tuple[Around, Array]:
        m, r, e = excess_and_exponentials(x, axes)
        d = _looked_up(x, index, m)
        others = jnp.where(d == 0, r, (1 + r) - jnp.exp(d))  # r is the sum without a top
        return (m, r, d), _numerators(e, index, others)

    def summed(x: Array, index: Array) -> tuple[Around, Array]:
        around, others = _summed(x, index)
        return around, _numerators(jnp.exp(shift_row(x, around[0], axes)), index, others)

    def in_one_pass(x: Array, index: Array) -> tuple[Around, Array]:
        m, r, d = _in_one_pass(x, index, exact)
        e = jnp.exp(shift_row(x, m, axes))
        return (m, r, d), _numerators(e, index, jnp.where(e == 1, r, (1 + r) - e))

    on_cpu = summed if is_split(x, axes) else looked_up
    one = dict.fromkeys(_platforms_of_one_pass(x, exact), in_one_pass)
    return platform_dependent(x, index, cpu=on_cpu, **one, default=summed)


def _numerators(e: Array, index: Array, others: Array) -> Array:
    return jnp.where(is_place(index[..., None], e, e.ndim - 1), -others, e)


def _looked_up(x: Array, index: Array, m: Array) -> Array:
    return shift(taken_along(x, index[..., None], -1, "promise_in_bounds"), m)


def _platforms_of_one_pass(x: Array, exact: DTypeLike | None) -> tuple[str, ...]:
    """Where `_in_one_pass` takes less time than `_summed`."""
    on_gpu = ("cuda", "rocm") if are_long(x, (x.ndim - 1,)) else ()
    # A TPU compiles a reduction of pairs of numbers slowly if its vectors are not filled by a row.
    fills_vectors = isinstance(x.shape[-1], int) and x.shape[-1] >= LANES
    on_tpu = fills_vectors and exact is not None and not is_split(x, (x.ndim - 1,))
    return (*on_gpu, "tpu") if on_tpu else on_gpu


def _in_one_pass(x: Array, index: Array, exact: DTypeLike | None) -> Around:
    axes = (x.ndim - 1,)

    def with_label(x: Array, index: Array) -> tuple[Array, ...]:
        at_label = jnp.where(is_place(index[..., None], x, x.ndim - 1), x, 0)
        return excess_in_one_pass(x, axes, at_label)

    def on_tpu(x: Array, index: Array) -> tuple[Array, ...]:
        # A TPU may need seconds to compile a reduction of three arrays.
        at_label = taken(x, index[..., None].astype(jnp.uint32), x.ndim - 1, exact)
        return *excess_in_one_pass(x, axes), at_label

    m, r, at_label = platform_dependent(x, index, tpu=on_tpu, default=with_label)
    return m, r, shift(at_label, m)


def _summed(x: Array, index: Array) -> tuple[Around, Array]:
    """The results of `_around_label`, and the sum of exp(d) over the classes but the label."""
    m = maximum(x, (x.ndim - 1,))
    d, others = sums_beside_label(x, m, index[..., None])
    # If the label is not the top, the top is among the others, and the loss is at least log 2.
    return (m, jnp.where(d == 0, others, (others - 1) + jnp.exp(d)), d), others

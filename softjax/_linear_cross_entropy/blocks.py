"""The contribution of a block of classes to the losses of its rows, and to their derivatives.

With x = softcap(h W + b), a target mass t_k on every class, Q = sum_k t_k, m = max x, d = (x - m) /
T and r the excess (softjax._numerics), a row has

    l = Q log1p(r) - sum_k t_k d_k + z lse^2,    lse = m / T + log1p(r)

    dl / d(x_k / T) = g_k = (Q + 2 z lse) p_k - t_k,    p_k = exp(d_k) / (1 + r)
    dl / dt_k       = -log p_k = log1p(r) - d_k

The classes may come in blocks: `merged` joins the statistics of two blocks. `tangent` uses the
statistics of whole rows and is linear in the tangents of a block; its transpose gives the
gradients. In shapes, n is the number of rows, v of classes in a block, V of all classes and k of
targets in a row. Everything but the products is in the dtype of the computation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._linear_cross_entropy.tops import distance, top_and_excess
from softjax._numerics import compute_dtype, not_negative
from softjax._platforms import platform_dependent
from softjax._reductions import is_place
from softjax._sharding import taken_along


class Rows(NamedTuple):
    """The data of the rows. The targets of a row are either a few classes, or `dense`."""

    hidden: Array  # [n, D]
    index: Array | None = None  # [n, k], in [0, V)
    mass: Array | None = None  # [n, k], the target mass at `index`; NaN for a bad label
    dense: Array | None = None  # [n, V]
    active: Array | None = None  # [n], booleans; inactive rows have loss 0 and gradient 0


class Classes(NamedTuple):
    """The data of the classes, which are on the last axis; in the kernel they are on `axis`."""

    kernel: Array  # [D, V]
    bias: Array | None = None  # [V]
    spread: Array | None = None  # [V], the target mass of the class in every row
    class_weights: Array | None = None  # [V], the factors of `dense`

    @property
    def axis(self) -> int:
        return 1

    @property
    def length(self) -> int:
        """V."""
        return self.kernel.shape[self.axis]


class TransposedClasses(Classes):
    """`Classes` with a kernel [V, D]. `_replace` and JAX's tree functions keep this type."""

    __slots__ = ()

    @property
    def axis(self) -> int:
        return 0


class Scalars(NamedTuple):
    """The options that are one number; None for an option that is not used."""

    softcap: Array | None = None
    temperature: Array | None = None
    z_loss: Array | None = None


class Block(NamedTuple):
    """n rows by v classes, with all arrays that may be differentiated."""

    product: Array | None = None  # [n, v], h W; None in tangents
    bias: Array | None = None  # [v]
    spread: Array | None = None  # [v]
    class_weights: Array | None = None  # [v]
    dense: Array | None = None  # [n, v]
    mass: Array | None = None  # [n, k]
    scalars: Scalars = Scalars()


class Statistics(NamedTuple):
    """The numbers per row from which its loss is computed."""

    top: Array  # [n], m
    excess: Array  # [n], r; -1 if all classes so far are -inf
    label_logits: Array | None = None  # [n, k], x at `index`; 0 if no block so far has this class
    mass: Array | None = None  # [n], the sum of t_k for `spread` and `dense`
    cost: Array | None = None  # [n], - sum_k t_k d_k for this mass


def block_of(rows: Rows, classes: Classes, scalars: Scalars, product: Array | None = None) -> Block:
    """The block of these rows and classes; a product that is already computed is used."""
    if product is None:
        # The operands keep the dtype of the inputs; the sums have the dtype of the computation.
        wide = compute_dtype(rows.hidden.dtype)
        product = times_features(rows.hidden, classes.kernel, classes.axis, wide)
    dense = None if rows.dense is None else rows.dense.astype(product.dtype)
    return Block(product, *classes[1:], dense, rows.mass, scalars)


def times_features(hidden: Array, kernel: Array, axis: int, dtype) -> Array:
    """h W, summed in `dtype`; the classes of the kernel are on `axis`."""
    contracted = ((1,), (1 - axis,)), ((), ())
    return lax.dot_general(hidden, kernel, contracted, preferred_element_type=dtype)


def statistics(block: Block, index: Array | None, start: Array | int) -> Statistics:
    """The statistics of a block whose first class is `start`."""
    temperature = block.scalars.temperature
    x = class_logits(block.product, block.bias, block.scalars.softcap)
    top, r = top_and_excess(x, temperature)
    label_logits = mass = cost = None
    if index is not None:
        label_logits = _at_index(x, index - start)
    t = spread_target(block)
    if t is not None:
        t = jnp.broadcast_to(t, x.shape)
        mass = jnp.sum(t, -1)
        cost = jnp.sum(times(t, -distance(x, top[:, None], temperature)), -1)
    return Statistics(top, r, label_logits, mass, cost)


def _at_index(x: Array, index: Array) -> Array:
    """[n, k]: the entries of each row at its indices, and 0 for indices outside of the block."""

    def gathered(x: Array, index: Array) -> Array:
        at = jnp.clip(index, 0, x.shape[-1] - 1)
        found = taken_along(x, at, -1, "promise_in_bounds")
        return jnp.where(at == index, found, 0)

    def summed(x: Array, index: Array) -> Array:
        return jnp.sum(jnp.where(is_place(index, x, 1), x, 0), -1, keepdims=True)

    # A TPU gathers slowly, but can fuse this sum with the other sums over the row.
    on_tpu = summed if index.shape[-1] == 1 else gathered
    return platform_dependent(x, index, cpu=gathered, cuda=gathered, rocm=gathered, default=on_tpu)


def merged(a: Statistics, b: Statistics, temperature: Array | None) -> Statistics:
    """The statistics of two blocks together; no large numbers are subtracted.

    The tops are chosen by `where` instead of a maximum: if both tops are equal, the tangent of the
    top is then still the tangent of one entry, as the excess requires.
    """
    first = a.top >= b.top
    top, low_top = jnp.where(first, a.top, b.top), jnp.where(first, b.top, a.top)
    low_r = jnp.where(first, b.excess, a.excess)
    # The distance of an empty block would overflow in the second derivative by the temperature.
    d = distance(jnp.where((low_top == top) | (low_r < 0), top, low_top), top, temperature)
    r = jnp.where(first, a.excess, b.excess) + (1 + low_r) * jnp.exp(d)
    label_logits = mass = cost = None
    if a.label_logits is not None and b.label_logits is not None:
        label_logits = a.label_logits + b.label_logits
    if a.mass is not None and b.mass is not None and a.cost is not None and b.cost is not None:
        low_mass = jnp.where(first, b.mass, a.mass)
        cost = (a.cost + b.cost) + times(low_mass, -d)
        mass = a.mass + b.mass
    return Statistics(top, r, label_logits, mass, cost)


def losses(s: Statistics, mass: Array | None, active: Array | None, scalars: Scalars) -> Array:
    """The losses of the rows, where `s` are the statistics of all classes."""
    loss = jnp.zeros_like(s.excess)
    if mass is not None:
        loss += jnp.sum(times(mass, surprisals(s, scalars)), -1)
    if s.mass is not None and s.cost is not None:
        loss += s.mass * log_total(s) + s.cost
    if scalars.z_loss is not None:
        loss += scalars.z_loss * log_partition(s, scalars) ** 2
    return jnp.where(alive(s, mass, active), loss, 0)


def times(mass: Array, surprise: Array) -> Array:
    """Their product, with 0 inf = 0; its derivative by the mass is the surprise, also at 0."""
    return mass * jnp.where((mass == 0) & ~jnp.isfinite(surprise), 0, surprise)


def tangent(
    block: Block,
    s: Statistics,
    index: Array | None,
    start: Array | int,
    active: Array | None,
    dots: Block,
) -> Array:
    """The tangent of the losses along `dots` of a block; None in `dots` is a zero tangent."""
    top, with_active_rows = s.top[:, None], alive(s, block.mass, active)
    x = class_logits(block.product, block.bias, block.scalars.softcap)
    d = distance(x, top, block.scalars.temperature)
    l_dot = jnp.zeros_like(s.excess)
    x_dot = scaled_logit_tangent(block, d, dots)
    if x_dot is not None:
        l_dot += jnp.sum(_logit_gradient(block, s, index, start, d) * x_dot, -1)
    t_dot = _spread_tangent(block, dots)
    if t_dot is not None:
        nothing = ~with_active_rows[:, None] | ((spread_target(block) == 0) & jnp.isneginf(d))
        surprise = jnp.where(nothing, 0, log_total(s)[:, None] - d)
        l_dot += jnp.sum(surprise * t_dot, -1)
    return jnp.where(with_active_rows, l_dot, 0)


def row_tangent(
    s: Statistics, mass: Array | None, active: Array | None, scalars: Scalars, dots: Block
) -> Array:
    """The tangent of the losses by the arguments outside of blocks: masses, z-loss, and m / T."""
    lse = log_partition(s, scalars)
    l_dot = jnp.zeros_like(lse)
    if dots.mass is not None:
        surprise = surprisals(s, scalars)
        nothing = (mass == 0) & (surprise == jnp.inf)
        l_dot += jnp.sum(jnp.where(nothing, 0, surprise) * dots.mass, -1)
    if dots.scalars.z_loss is not None:
        l_dot += lse**2 * dots.scalars.z_loss
    temperature, z_loss = scalars.temperature, scalars.z_loss
    if dots.scalars.temperature is not None and temperature is not None and z_loss is not None:
        # sum_k g_k is 2 z lse, so that the offset m / T, which is not part of d, has an effect.
        slope = 2 * z_loss * lse * offset(s, scalars) / temperature
        l_dot -= slope * dots.scalars.temperature
    return jnp.where(alive(s, mass, active), l_dot, 0)


def class_logits(h_w: Array | None, bias: Array | None, softcap: Array | None) -> Array:
    """x = cap tanh((h W + b) / cap); -inf stays -inf, so that a bias of -inf removes a class."""
    assert h_w is not None
    x = h_w if bias is None else h_w + bias[None]
    if softcap is None:
        return x
    # A larger cap changes no logit, but x / cap would be subnormal, which XLA:CPU reads as 0.
    softcap = jnp.minimum(softcap, 2.0 ** (3 * jnp.finfo(x.dtype).maxexp // 4))
    if bias is None:
        return softcap * jnp.tanh(x / softcap)
    out = jnp.isneginf(x)
    return jnp.where(out, -jnp.inf, softcap * jnp.tanh(jnp.where(out, 0, x) / softcap))


def spread_target(block: Block) -> Array | None:
    """The target mass on every class, [n or 1, v]: `spread`, and `dense` times its factors."""
    spread = None if block.spread is None else block.spread[None]
    if block.dense is None:
        return spread
    t = block.dense if block.class_weights is None else block.dense * block.class_weights[None]
    return t if spread is None else t + spread


def alive(s: Statistics, mass: Array | None, active: Array | None) -> Array:
    """Which rows count: active rows with a class that is not -inf, or with a bad label."""
    part = ~(s.excess < 0)
    if mass is not None:
        part |= jnp.any(jnp.isnan(mass), -1)
    return part if active is None else part & active


def log_total(s: Statistics) -> Array:
    return jnp.log1p(not_negative(s.excess))


def log_partition(s: Statistics, scalars: Scalars) -> Array:
    """lse = logsumexp(x / T); 0 in an empty row."""
    return offset(s, scalars) + log_total(s)


def offset(s: Statistics, scalars: Scalars) -> Array:
    """m / T; 0 in an empty row."""
    top = jnp.where(s.excess < 0, 0, s.top)
    return top if scalars.temperature is None else top / scalars.temperature


def surprisals(s: Statistics, scalars: Scalars) -> Array:
    """-log p at the index: log1p(r) - d, in which any offset of the logits has cancelled."""
    assert s.label_logits is not None
    return log_total(s)[:, None] - distance(s.label_logits, s.top[:, None], scalars.temperature)


def _logit_gradient(
    block: Block, s: Statistics, index: Array | None, start: Array | int, d: Array
) -> Array:
    """g_k; if p > 1/2, it is computed as (Q - t) - Q (1 - p), with 1 - p = r / (1 + r).

    Q - t is exactly 0 for an integer label without smoothing. The gradient at the label is then
    minus the sum of the others, and never the difference p - 1.
    """
    total = 1 + not_negative(s.excess)
    p = jnp.exp(d) / total[:, None]
    t = others = mass = jnp.zeros((), d.dtype)
    if index is not None and block.mass is not None:
        t = indexed(index - start, block.mass, d.shape[-1])
        mass = jnp.sum(block.mass, -1, keepdims=True)
        others = mass - t
    spread = spread_target(block)
    if s.mass is not None and spread is not None:
        t, mass, others = t + spread, mass + s.mass[:, None], others + (s.mass[:, None] - spread)
    g = jnp.where(p > 0.5, others - mass * (s.excess / total)[:, None], mass * p - t)
    if block.scalars.z_loss is not None:
        g += (2 * block.scalars.z_loss * log_partition(s, block.scalars))[:, None] * p
    return g


def indexed(index: Array, mass: Array, width: int) -> Array:
    """[n, width]: the numbers of each row at its indices, and 0 elsewhere."""
    if index.shape[-1] == 1:
        return (index == jnp.arange(width, dtype=index.dtype)[None]).astype(mass.dtype) * mass
    inside = jnp.where(index < 0, width, index)  # a negative index would wrap
    rows = jnp.arange(index.shape[0])[:, None]
    return jnp.zeros((index.shape[0], width), mass.dtype).at[rows, inside].add(mass, mode="drop")


def scaled_logit_tangent(block: Block, d: Array, dots: Block) -> Array | None:
    """The tangent of x / T, without the part of its offset m / T (see `row_tangent`)."""
    primals = (block.product, block.bias, block.scalars.softcap)
    tangents = (dots.product, dots.bias, dots.scalars.softcap)
    temperature, temperature_dot = block.scalars.temperature, dots.scalars.temperature
    x_dot = None
    if any(dot is not None for dot in tangents):
        filled = [
            jax.tree.map(jnp.zeros_like, primal) if dot is None else dot
            for primal, dot in zip(primals, tangents, strict=True)
        ]
        x_dot = jax.jvp(class_logits, primals, tuple(filled))[1]
    if temperature is None:
        return x_dot
    x_dot = None if x_dot is None else x_dot / temperature
    if temperature_dot is None:
        return x_dot
    from_temperature = -jnp.where(jnp.isneginf(d), 0, d) / temperature * temperature_dot
    return from_temperature if x_dot is None else x_dot + from_temperature


def _spread_tangent(block: Block, dots: Block) -> Array | None:
    """The tangent of `spread_target`."""
    terms = [] if dots.spread is None else [dots.spread[None]]
    if dots.dense is not None:
        weights = block.class_weights
        terms.append(dots.dense if weights is None else dots.dense * weights[None])
    if dots.class_weights is not None and block.dense is not None:
        terms.append(block.dense * dots.class_weights[None])
    return sum(terms[1:], terms[0]) if terms else None

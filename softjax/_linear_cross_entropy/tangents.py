"""The derivative of the losses, block by block, from the statistics of the whole rows.

    dl / d(x_k / T) = g_k = (Q + 2 z lse) p_k - t_k,    p_k = exp(d_k) / (1 + r)
    dl / dt_k       = -log p_k = log1p(r) - d_k

`tangent` is linear in the tangents of a block; its transpose gives the gradients.
"""

import jax
import jax.numpy as jnp
from jax import Array

from softjax._linear_cross_entropy.blocks import (
    Block,
    Scalars,
    Statistics,
    alive,
    class_logits,
    distance,
    log_partition,
    log_total,
    offset,
    spread_target,
    surprisals,
)


def tangent(
    block: Block,
    s: Statistics,
    index: Array | None,
    start: Array | int,
    active: Array | None,
    dots: Block,
) -> Array:
    """What the tangents `dots` of a block, None where there are none, add to that of the losses."""
    top, taking_part = s.top[:, None], alive(s, block.mass, active)
    x = class_logits(block.product, block.bias, block.scalars.softcap)
    d = distance(x, top, block.scalars.temperature)
    l_dot = jnp.zeros_like(s.excess)
    x_dot = _scaled_logit_tangent(block, d, dots)
    if x_dot is not None:
        l_dot += jnp.sum(_logit_gradient(block, s, index, start, d) * x_dot, -1)
    t_dot = _spread_tangent(block, dots)
    if t_dot is not None:
        nothing = ~taking_part[:, None] | ((spread_target(block) == 0) & jnp.isneginf(d))
        surprise = jnp.where(nothing, 0, log_total(s)[:, None] - d)
        l_dot += jnp.sum(surprise * t_dot, -1)
    return jnp.where(taking_part, l_dot, 0)


def row_tangent(
    s: Statistics, mass: Array | None, active: Array | None, scalars: Scalars, dots: Block
) -> Array:
    """The same for what belongs to no block: the masses at `index`, z-loss, and m / T."""
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
        # sum_k g_k is 2 z lse: the offset that d is without counts.
        slope = 2 * z_loss * lse * offset(s, scalars) / temperature
        l_dot -= slope * dots.scalars.temperature
    return jnp.where(alive(s, mass, active), l_dot, 0)


def _logit_gradient(
    block: Block, s: Statistics, index: Array | None, start: Array | int, d: Array
) -> Array:
    """g_k; where p > 1/2 as (Q - t) - Q (1 - p), with 1 - p = r / (1 + r).

    Q - t is exactly 0 at an integer label without smoothing: the gradient there is minus the sum
    of the others, and never the difference p - 1.
    """
    total = 1 + jnp.maximum(s.excess, 0)
    p = jnp.exp(d) / total[:, None]
    t = others = mass = jnp.zeros((), d.dtype)
    if index is not None and block.mass is not None:
        t = _indexed_target(index - start, block.mass, d.shape[-1])
        mass = jnp.sum(block.mass, -1, keepdims=True)
        others = mass - t
    spread = spread_target(block)
    if s.mass is not None and spread is not None:
        t, mass, others = t + spread, mass + s.mass[:, None], others + (s.mass[:, None] - spread)
    g = jnp.where(p > 0.5, others - mass * (s.excess / total)[:, None], mass * p - t)
    if block.scalars.z_loss is not None:
        g += (2 * block.scalars.z_loss * log_partition(s, block.scalars))[:, None] * p
    return g


def _indexed_target(index: Array, mass: Array, width: int) -> Array:
    """[n, width]: the mass of each row at its index, and nothing where that is outside."""
    if index.shape[-1] == 1:
        return (index == jnp.arange(width, dtype=index.dtype)).astype(mass.dtype) * mass
    inside = jnp.where(index < 0, width, index)  # a negative index would wrap
    rows = jnp.arange(len(index))[:, None]
    return jnp.zeros((len(index), width), mass.dtype).at[rows, inside].add(mass, mode="drop")


def _scaled_logit_tangent(block: Block, d: Array, dots: Block) -> Array | None:
    """The tangent of x / T, less what its offset m / T adds (see `row_tangent`)."""
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
    terms = [dots.spread, dots.dense, dots.class_weights]
    if dots.dense is not None and block.class_weights is not None:
        terms[1] = dots.dense * block.class_weights
    if dots.class_weights is not None and block.dense is not None:
        terms[2] = block.dense * dots.class_weights
    terms = [term for term in terms if term is not None]
    return sum(terms[1:], terms[0]) if terms else None

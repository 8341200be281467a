"""Statistics and readings of the logits of all rows, also together with the gradients of a sum.

A sum with its gradients computes the logits of each row once, in three products.
`total_with_readings` also computes the readings from these logits. The derivative of the readings
computes the logits again, if it is needed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal

from softjax._custom_jvp import custom_jvp
from softjax._linear_cross_entropy.blocks import (
    Scalars,
    Statistics,
    block_of,
    log_partition,
    log_total,
    losses,
    statistics,
    surprisals,
)
from softjax._linear_cross_entropy.gradients import by_rows
from softjax._linear_cross_entropy.pieces import Arguments, dots_of, jvp_along
from softjax._linear_cross_entropy.readings import best, readings
from softjax._linear_cross_entropy.shards import first_class, joined, on_first_device
from softjax._linear_cross_entropy.sums import slope_of_total, total_with_gradients
from softjax._linear_cross_entropy.tops import distance
from softjax._numerics import not_negative
from softjax._sharding import varying

# The real numbers of each row (statistics, surprise, largest d), and its integers (classes).
Read = tuple[tuple[Statistics, Array, Array], Array]


def read(part: Arguments, start: Array | int, k: int) -> Read:
    """Statistics and readings of the rows from the given classes, the first of which is `start`."""
    block = block_of(*part)
    s = statistics(block, part.rows.index, start)
    surprise, top_d, top_classes = readings(block, s.top, start, k)
    return (s, surprise, top_d), top_classes


def read_over(axes: tuple[str, ...], budget: int | None, arguments: Arguments, k: int) -> Read:
    """Statistics and readings of the rows from all classes, computed some rows at a time.

    With d = (m_s - M) / T for the shard s of the classes, the surprise of all classes is sum_s e^d
    (surprise_s - (1 + r_s) d).
    """

    def local(part: Arguments) -> Read:
        return read(part, first_class(axes, part), min(k, part.classes.length))

    if not axes:
        return by_rows(local, budget, arguments)
    temperature = arguments.scalars.temperature
    (own, surprise, top_d), top_classes = by_rows(local, budget, varying(arguments, axes))
    s = joined(own, axes, temperature)
    d = distance(jnp.where(own.excess < 0, s.top, own.top), s.top, temperature)
    surprise = lax.psum(jnp.exp(d) * (surprise - (1 + own.excess) * d), axes)
    top_d, top_classes = best(top_d + d[:, None], top_classes, axes, k)
    return (s, surprise, top_d), top_classes


@partial(custom_jvp, nondiff_argnums=(2, 3, 4))
def total_with_readings(
    arguments: Arguments, scale: Array, budget: int | None, axes: tuple[str, ...], k: int
) -> tuple[Array, Read]:
    """sum_i scale_i l_i, together with the result of `read_over`."""
    rows, _, scalars = arguments
    every = read_over(axes, budget, arguments, k)
    return jnp.sum(scale * losses(every[0][0], rows.mass, rows.active, scalars)), every


@partial(total_with_readings.defjvp, symbolic_zeros=True)
def _total_with_readings_jvp(budget, axes, k, primals, tangents):
    (arguments, scale), (dots, scale_dot) = primals, dots_of(tangents)
    found = total_with_gradients(arguments, scale, budget, axes, dots, k)
    value, value_dot = slope_of_total(found, axes, dots, scale_dot)
    assert found.statistics is not None
    assert found.readings is not None
    s, (surprise, top_d, top_classes) = found.statistics, found.readings
    if axes:
        s, surprise = lax.psum(
            (jax.tree.map(lambda a: on_first_device(a, axes), s), surprise), axes
        )
        top_d, top_classes = best(top_d, top_classes, axes, k)
    every = _with_slope(((s, surprise, top_d), top_classes), arguments, budget, axes, k)
    return (value, every), (value_dot, _slope(every, arguments, budget, axes, k, dots))


@partial(custom_jvp, nondiff_argnums=(2, 3, 4))
def _with_slope(
    every: Read, arguments: Arguments, budget: int | None, axes: tuple[str, ...], k: int
) -> Read:
    """`every`, the result of `read_over`, with the derivative of `read_over`."""
    return every


@partial(_with_slope.defjvp, symbolic_zeros=True)
def _with_slope_jvp(budget, axes, k, primals, tangents):
    every, arguments = primals
    every = _with_slope(every, arguments, budget, axes, k)
    return every, _slope(every, arguments, budget, axes, k, dots_of(tangents[1]))


def _slope(
    every: Read,
    arguments: Arguments,
    budget: int | None,
    axes: tuple[str, ...],
    k: int,
    dots: Arguments,
) -> Any:
    """The tangent of `read_over` along `dots`; the classes have no tangent."""

    def reals(arguments: Arguments) -> tuple[Statistics, Array, Array]:
        return read_over(axes, budget, arguments, k)[0]

    none = partial(zero_from_primal, symbolic_zeros=True)
    return jvp_along(reals, (arguments,), (dots,)), jax.tree.map(none, every[1])


def log_partition_of(s: Statistics, scalars: Scalars) -> Array:
    return jnp.where(s.excess < 0, -jnp.inf, log_partition(s, scalars))


def outputs_of_rows(
    arguments: Arguments, s: Statistics, surprise: Array, top_d: Array, has_loss: bool
) -> tuple[Array | None, ...]:
    """The outputs of each row, computed from the statistics of all classes."""
    rows, _, scalars = arguments
    log_probability = loss = None
    if rows.mass is not None:
        mass, at_labels = rows.mass, s.label_logits
        assert at_labels is not None
        if has_loss:
            # The last label, with its mass, belongs to the loss.
            of_loss = s._replace(label_logits=at_labels[:, -1:])
            loss = losses(of_loss, mass[:, -1:], rows.active, scalars)
            s, mass = s._replace(label_logits=at_labels[:, :-1]), mass[:, :-1]
        log_probability = -mass * jnp.where(mass == 0, 0, surprisals(s, scalars))
    entropy = log_total(s) + surprise / (1 + not_negative(s.excess))
    lse, top_log_probabilities = log_partition_of(s, scalars), top_d - log_total(s)[:, None]
    return log_probability, lse, entropy, top_log_probabilities, loss

"""Which examples are active, the factor of each in a sum, and the packing of the active ones.

Inactive examples have weight 0 or an ignored label. If the active examples are packed, the others
take no product. Their number is known when the program runs, but the size of arrays when it is
compiled. There is room for `most` examples; if more are active, the result is NaN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from softjax import _checks
from softjax._linear_cross_entropy.blocks import Rows
from softjax._linear_cross_entropy.layout import Call, Layout
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.sharded import on_devices, padded, specs_of
from softjax._numerics import compute_dtype
from softjax._sharding import axes_of, varying
from softjax._weights import is_zero, shares


def with_active_rows(rows: Rows, weights: Array | None) -> Rows:
    """The rows, with rows of weight 0 marked inactive."""
    if weights is None:
        return rows
    counted = ~is_zero(weights)
    return rows._replace(active=counted if rows.active is None else rows.active & counted)


def with_zeroed_rows(call: Call, rows: Rows) -> Rows:
    """The rows, with the features of inactive rows set to 0, unless packing removes these rows.

    These features may have any value, and 0 * inf is not 0.
    """
    if rows.active is None or call.max_active is not None:
        return rows
    return rows._replace(hidden=jnp.where(rows.active[:, None], rows.hidden, 0))


def scale_of(rows: Rows, weights: Array | None, costs: Array | None, reduction: str) -> Array:
    """The factor of the loss of each row in a sum or a mean."""
    count, active = rows.hidden.shape[0], rows.active
    scale = jnp.ones(count, compute_dtype(rows.hidden.dtype)) if weights is None else weights
    scale = varying(scale, axes_of(rows.hidden))
    if reduction in ("none", "sum"):
        return scale if active is None else jnp.where(active, scale, 0)
    if weights is active is costs is None:
        # On a mesh, the number of examples is known without communication.
        return scale / jnp.maximum(jnp.asarray(count, scale.dtype), 1)
    return shares(scale, True if active is None else active, costs)


def scaled_total(total: Callable[[Array], Array], scale: Array, *dtypes: jnp.dtype) -> Array:
    """total(scale), a sum of scaled losses whose products have operands of these dtypes.

    In float16 the gradient of a logit times 1 / N would underflow. The largest scale is therefore
    taken out of the sum.
    """
    if jnp.float16 not in dtypes:
        return total(scale)
    largest = lax.stop_gradient(jnp.max(scale, initial=jnp.finfo(scale.dtype).tiny))
    return largest * total(scale / largest)


def reduced(
    call: Call,
    heads: tuple[Arguments, ...],
    weights: Array | None,
    scale: Array,
    losses: Callable[[tuple[Arguments, ...], Array | None], Array],
) -> Array:
    """The losses of all examples in their original shape, or their sum or mean.

    `heads` are the arguments of one or two heads with flat rows, whose weights are `weights`, and
    whose factors in the sum are `scale`. The function losses(heads, scale) returns the scaled sum
    or, for a scale of None, the loss of each row.
    """
    count, places, spoiled = scale.shape[0], None, 1
    dtypes = [head.rows.hidden.dtype for head in heads]
    if call.max_active is not None:
        heads, scale, places, spoiled = packed(call.layout, heads, scale, call.max_active)
    if call.reduction != "none":
        return spoiled * scaled_total(partial(losses, heads), scale, *dtypes)
    values = losses(heads, None) * spoiled
    values = values if places is None else unpacked(call.layout, values, places, count)
    return call.lead.back(values if weights is None else values * weights.astype(values.dtype))


class Packed(NamedTuple):
    """The active rows, gathered; on a mesh each device gathers its own."""

    heads: tuple[Arguments, ...]  # the arguments, with as many rows as there is room for
    scale: Array  # the factors of these rows
    places: Array  # the original places of the rows; the number of all rows for padding
    spoiled: Array  # 1, or NaN if there was not enough room


def checked_room(function: str, max_active: int | None, lead: tuple[int, ...]) -> int | None:
    """`max_active`; None if there is room for all examples."""
    if max_active is None:
        return None
    max_active = _checks.at_least(function, "max_active", max_active, 1)
    if not all(isinstance(n, int) for n in lead):  # in an exported program the sizes are symbols
        return max_active
    return max_active if max_active < np.prod(lead) else None


def refuse_too_many(
    function: str, call: Call, ignored: Array | None, weights: Array | None
) -> None:
    """Refuses more known active examples than there is room for, in all or on one device."""
    lead, layout, most = call.lead, call.layout, call.max_active
    known = all(a is None or _checks.checks_values(a) for a in (ignored, weights))
    if most is None or not known or not all(isinstance(n, int) for n in lead.shape):
        return
    active = np.ones(lead.shape, bool)
    active &= True if ignored is None else ~np.asarray(ignored)
    active &= True if weights is None else np.asarray(weights) != 0
    if active.sum() > most:
        expected = f"at least {active.sum()}, the number of examples that take part"
        raise ValueError(_checks.message(function, "max_active", expected, most))
    # The rows in their order on the devices, the first device first: see Lead.
    devices, sizes = layout.size(layout.rows), [layout.size(names) for names in lead.names]
    for axis, size in enumerate(sizes):
        active = np.stack(np.split(active, size, 2 * axis), axis)
    rows = np.pad(active.ravel(), (0, -active.size % devices)).reshape(devices, -1)
    counts, room = rows.sum(1), -(-most // devices)
    if counts.max() > room:
        least, place = devices * (counts.max() - 1) + 1, counts.argmax()
        expected = f"at least {least} over {devices} devices with equal room: device {place} has "
        expected += f"{counts[place]} of the examples that take part, and room for {room}"
        raise ValueError(_checks.message(function, "max_active", expected, most))


def packed(layout: Layout, heads: tuple[Arguments, ...], scale: Array, most: int) -> Packed:
    """The rows that are active in the first head, from all heads, in their order."""
    room = -(-most // layout.size(layout.rows))

    def local(
        every: tuple[Rows, ...], scale: Array
    ) -> tuple[tuple[Rows, ...], Array, Array, Array]:
        length, active = scale.shape[0], every[0].active
        if active is None:  # an exported program, which does not know how many rows there are
            active = jnp.ones(length, bool)
        count = jnp.sum(active, dtype=jnp.int32)
        (places,) = jnp.nonzero(active, size=room, fill_value=length)
        taken = jax.tree.map(lambda a: a.at[places].get(mode="fill", fill_value=0), (every, scale))
        overflows = count > room
        if layout.rows:
            overflows = lax.psum(overflows.astype(scale.dtype), layout.rows) > 0
        return *taken, places, jnp.where(overflows, jnp.nan, 1).astype(scale.dtype)

    if layout.is_local:
        every, *others = local(tuple(head.rows for head in heads), scale)
    else:
        heads, spec = tuple(padded(layout, head) for head in heads), P(layout.rows)
        specs = tuple(specs_of(layout, head).rows for head in heads), spec
        operands = tuple(head.rows for head in heads), layout.evened(scale, spec)
        every, *others = on_devices(layout, local, operands, specs, (*specs, spec, P()))
    heads = tuple(head._replace(rows=rows) for head, rows in zip(heads, every, strict=True))
    return Packed(heads, *others)


def unpacked(layout: Layout, tree: Any, places: Array, count: int) -> Any:
    """The results of all `count` rows: 0 for inactive rows."""

    def local(tree: Any, places: Array, zeros: Any) -> Any:
        return jax.tree.map(lambda a, zeros: zeros.at[places].set(a, mode="drop"), tree, zeros)

    zeros = jax.tree.map(lambda a: jnp.zeros((count, *a.shape[1:]), a.dtype), tree)
    if layout.is_local:
        return local(tree, places, varying(zeros, axes_of(tree)))
    spec = P(layout.rows)
    zeros = jax.tree.map(lambda a: layout.evened(a, spec), zeros)
    of_tree = jax.tree.map(lambda _: spec, tree)
    every = on_devices(layout, local, (tree, places, zeros), (of_tree, spec, of_tree), of_tree)
    return layout.rows_of(every, count)

"""The losses on a mesh of devices: rows are sharded over some axes, classes over others.

Every device processes its rows and its classes as in gradients.py. Only a few numbers per row are
merged over the classes; dX and dW are summed once, at the end, by the transpose of `varying`. A
kernel whose features are sharded too is gathered once, and its dW is scattered.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.sharding import use_abstract_mesh

from softjax._custom_jvp import custom_jvp
from softjax._linear_cross_entropy.blocks import Rows, Scalars, block_of, losses, row_tangent
from softjax._linear_cross_entropy.gradients import block_tangent, each, statistics_over
from softjax._linear_cross_entropy.layout import Call, Layout
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    block_dots,
    cut,
    dots_of,
    put,
    shapes_of,
    some_rows,
    sweep,
    where_given,
    with_more_rows,
)
from softjax._linear_cross_entropy.plans import rows_of_tangents
from softjax._linear_cross_entropy.row_outputs import Read, total_with_readings
from softjax._linear_cross_entropy.shards import first_class
from softjax._linear_cross_entropy.sums import total
from softjax._linear_cross_entropy.unused_meshes import placed_by_us
from softjax._numerics import compute_dtype
from softjax._sharding import Names, varying


def losses_on(call: Call, arguments: Arguments, scale: Array | None) -> Array:
    """The loss l_i of each row; with a `scale`, sum_i scale_i l_i."""
    layout, budget, axes = call.layout, call.budget, call.layout.classes

    def local(arguments: Arguments, scale: Array | None) -> Array:
        if scale is not None:
            return lax.psum(total(arguments, scale, budget, axes), layout.rows)
        if axes:
            return _each_over(axes, budget, arguments)
        return each(arguments, budget, call.batch_invariant)

    of_rows = P(layout.rows)
    if scale is not None:
        return mapped(layout, local, arguments, (scale,), (of_rows,), P())
    values = mapped(layout, local, arguments, (None,), (None,), of_rows)
    return layout.rows_of(values, arguments.rows.hidden.shape[0])


def total_with_readings_on(
    layout: Layout, arguments: Arguments, scale: Array, budget: int | None, k: int
) -> tuple[Array, Read]:
    """sum_i scale_i l_i, and the statistics and readings of each row from all classes."""

    def local(arguments: Arguments, scale: Array) -> tuple[Array, Read]:
        value, every = total_with_readings(arguments, scale, budget, layout.classes, k)
        return lax.psum(value, layout.rows), every

    spec = P(layout.rows)
    value, every = mapped(layout, local, arguments, (scale,), (spec,), (P(), spec))
    return value, layout.rows_of(every, scale.shape[0])


def mapped(
    layout: Layout, local: Callable, arguments: Arguments, more: tuple, specs: tuple, out_specs: Any
) -> Any:
    """`local` applied on each device to its parts of the cast arguments and of `more`.

    `specs` are the shardings of `more`, which is padded with zeros if its sizes are not divisible.
    """

    def of_cast(arguments: Arguments, *more: Any) -> Any:
        return local(cast(layout, arguments), *more)

    if layout.is_local:
        return local(arguments, *more)
    arguments = padded(layout, arguments)
    operands = (arguments, *jax.tree.map(layout.evened, more, specs))
    in_specs = where_given(operands, (specs_of(layout, arguments), *specs))
    axes = layout.rows + layout.classes
    operands = jax.tree.map(partial(placed_by_us, axes=axes), operands)
    return on_devices(layout, of_cast, operands, in_specs, out_specs)


def on_devices(
    layout: Layout, local: Callable, operands: tuple, in_specs: tuple, out_specs: Any
) -> Any:
    """`local` applied on each device to its parts of the operands."""
    with use_abstract_mesh(layout.mesh):
        operands = jax.tree.map(layout.placed, operands, in_specs)
        over = jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs)
        return over(*operands)


def specs_of(layout: Layout, arguments: Arguments) -> Arguments:
    """The sharding of each argument over the axes of the mesh."""
    rows, features, classes = layout.rows, layout.features, layout.classes
    p: Any = P
    every = Arguments(
        Rows(p(rows, None), p(rows, None), p(rows, None), p(rows, classes), p(rows)),
        arguments.classes._replace(
            kernel=p(features, classes) if arguments.classes.axis else p(classes, features),
            bias=p(classes),
            spread=p(classes),
            class_weights=p(classes),
        ),
        Scalars(p(), p(), p()),
    )
    return where_given(arguments, every)


def cast(layout: Layout, arguments: Arguments) -> Arguments:
    """The arguments with a gathered kernel, cast to vary over the axes of the rows."""
    rows, classes, scalars = arguments
    if layout.features:
        # The cast precedes the gather, so that dW is scattered before it is summed over other axes.
        kernel = varying(classes.kernel, layout.rows)
        kernel = gathered(kernel, layout.features, 1 - classes.axis)
        classes = classes._replace(kernel=kernel)
    return varying(Arguments(rows, classes, scalars), layout.rows)


def gathered(a: Array, names: Names, axis: int) -> Array:
    """`a` with the shards of all devices along an axis; one mesh axis is gathered after the other.

    For the transpose of a gather over several axes at once, a TPU sends the whole sum to each
    device, which is twice the bytes of scattering it.
    """
    for name in reversed(names):
        a = lax.all_gather(a, name, axis=axis, tiled=True)
    return a


def scattered(a: Array, names: Names, axis: int) -> Array:
    """The sum over the devices, sharded along an axis: the transpose of `gathered`."""
    for name in names:
        a = lax.psum_scatter(a, name, scatter_dimension=axis, tiled=True)
    return a


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _each_over(axes: tuple[str, ...], budget: int | None, arguments: Arguments) -> Array:
    """The losses of the rows of a device, from its own and all other shards of the classes."""
    rows, _, scalars = arguments
    return losses(statistics_over(axes, budget, arguments), rows.mass, rows.active, scalars)


@partial(_each_over.defjvp, symbolic_zeros=True)
def _each_over_jvp(axes, budget, primals, tangents):
    (arguments,), (dots,) = primals, dots_of(tangents)
    rows, _, scalars = arguments
    s = statistics_over(axes, budget, arguments)
    values = losses(s, rows.mass, rows.active, scalars)
    # In reverse mode the cotangents are summed in this dtype, over steps and devices.
    wide = compute_dtype(rows.hidden.dtype)
    dots = jax.tree.map(lambda dot: dot.astype(wide), dots)

    def step(l_dot, operands, start, size):
        part, part_dots = (some_rows(a, start, size) for a in operands[:2])
        some = jax.tree.map(partial(cut, start=start, size=size, axis=0), operands[2])
        new = block_tangent(part, part_dots, block_of(*part), some, first_class(axes, part))
        return put(l_dot, new, start, 0)

    operands = varying((arguments, dots, s), axes)
    kernels = int(dots.classes.kernel is not None)
    size = rows_of_tangents(shapes_of(arguments), budget, kernels)
    l_dot = sweep(step, jnp.zeros_like(values), operands, values.shape[0], size)
    of_rows = row_tangent(s, rows.mass, rows.active, scalars, block_dots(None, dots))
    return values, lax.psum(l_dot, axes) + of_rows


def padded(layout: Layout, arguments: Arguments) -> Arguments:
    """The arguments padded with inactive rows and classes at -inf, so that all shards are equal."""
    (rows, classes, scalars), length = arguments, arguments.classes.length
    count = rows.hidden.shape[0]
    more = -count % layout.size(layout.rows)
    if more:
        active = jnp.ones(count, bool) if rows.active is None else rows.active
        rows = with_more_rows(rows._replace(active=active), more)
    more = -length % layout.size(layout.classes)
    if more:
        wide = compute_dtype(classes.kernel.dtype)
        bias = jnp.zeros(length, wide) if classes.bias is None else classes.bias
        kernel = _with_classes(classes.kernel, more, 0, classes.axis)
        wider = classes._replace(kernel=None, bias=None)
        wider = jax.tree.map(lambda a: _with_classes(a, more, 0), wider)
        classes = wider._replace(kernel=kernel, bias=_with_classes(bias, more, -jnp.inf))
        dense = None if rows.dense is None else _with_classes(rows.dense, more, 0)
        rows = rows._replace(dense=dense)
    return Arguments(rows, classes, scalars)


def _with_classes(a: Array, more: int, value: float, axis: int = -1) -> Array:
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, more)
    return jnp.pad(a, widths, constant_values=value)

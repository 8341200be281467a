"""The losses on the devices of a mesh: rows over some axes, classes over others.

Every device goes over its rows and its classes as gradients.py does, without communication. Only
numbers a row are joined over the classes; dX and dW are summed once, at the end, by the transpose
of `varying`. A kernel whose features are split too is gathered once, and dW is scattered.

    M = max_s m_s,   1 + R = sum_s (1 + r_s) exp(m_s - M)     over the shards s of the classes

As in a row of one device, the 1 of the shard that holds M is left out before anything rounds.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, get_abstract_mesh, reshard, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from softjax import _checks
from softjax._linear_cross_entropy.blocks import (
    Classes,
    Rows,
    Scalars,
    Statistics,
    block_of,
    distance,
    losses,
    row_tangent,
    statistics,
)
from softjax._linear_cross_entropy.gradients import block_tangent, by_rows, each, total
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    block_dots,
    cut,
    dots_of,
    put,
    shapes_of,
    some_rows,
    sweep,
)
from softjax._linear_cross_entropy.plans import rows_of_tangents
from softjax._numerics import compute_dtype
from softjax._sharding import (
    Lead,
    Names,
    axes_of,
    axes_of_type,
    entry_names,
    looked_up,
    varying,
    visible_spec,
)


class Layout(NamedTuple):
    """The axes of a mesh that the examples, the features of the kernel and the classes are over.

    Attributes:
        mesh: all of it.
        given: axes of the examples as they came.
        rows: axes that they are computed over: those, and the axes of the features.
        features: axes that the kernel is gathered over.
        classes: axes of the classes.
    """

    mesh: AbstractMesh
    given: Names
    rows: Names
    features: Names
    classes: Names

    @property
    def is_manual(self) -> bool:
        """Whether the caller is within a `shard_map` over the axes of the classes."""
        return bool(manual_axes(self.mesh, self.classes))

    def size(self, names: Names) -> int:
        """How many shards an array has over these axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    def evened(self, a: Array, spec: P) -> Array:
        """`a` with zeros behind, as many as make its shards equal."""
        if not a.ndim:
            return a
        sizes = (
            self.size(entry_names(entry)) for entry in (*spec, *(None,) * (a.ndim - len(spec)))
        )
        return jnp.pad(a, [(0, -n % size) for n, size in zip(a.shape, sizes, strict=True)])

    def placed(self, a: Array, spec: P) -> Array:
        """`a` as `shard_map` takes it: on Explicit axes it must have been brought there."""
        return reshard(a, _explicit(self.mesh, spec)) if _has_explicit(self.mesh) else a

    def as_rows(self, a: Array) -> Array:
        """`a` [N], over the axes of the examples as they came."""
        if not _has_explicit(self.mesh):
            return a
        with use_abstract_mesh(self.mesh):
            return reshard(a, _explicit(self.mesh, P(self.given)))


def manual_axes(mesh: AbstractMesh, axis: str | Names | None) -> Names:
    """The names of axes that are all manual, within a `shard_map`; else none."""
    names, manual = entry_names(axis), axes_of_type(mesh, AxisType.Manual)
    return names if all(name in manual for name in names) else ()


def all_classes(classes: Classes, class_axis: str | Names | None) -> int:
    """How many classes there are: those are the shard of a device where `class_axis` is manual."""
    mesh = get_abstract_mesh()
    return classes.length * math.prod(mesh.shape[name] for name in manual_axes(mesh, class_axis))


def at_class(names: Names, table: Array, index: Array) -> Array:
    """table[index], where each device of the manual axes has its part of the table."""
    if not names:
        return looked_up(table, index)
    index = index - lax.axis_index(names) * len(table)
    inside = (index >= 0) & (index < len(table))
    found = table.at[index].get(mode="clip")
    return lax.psum(jnp.where(inside, found, 0), names)


def alike(layout: Layout | None, tree: Any) -> Any:
    """The tree with arrays that vary alike, over manual axes that are not those of the classes."""
    axes = axes_of(tree)
    return varying(tree, axes - set(layout.classes) if layout is not None else axes)


def layout_of(
    function: str,
    lead: Lead,
    head: Classes,
    class_axis: str | Names | None,
    feature_axis: str | Names | None,
) -> Layout | None:
    """The layout, or None where there is nothing to share.

    Explicit axes are in the types of the examples and of the kernel. The examples are over all
    Auto axes but those of the classes, which the arguments tell, or the kernel where it is known.
    """
    kernel, axis = head.kernel, head.axis
    mesh, told = lead.mesh, class_axis is not None or feature_axis is not None
    if names := manual_axes(mesh, class_axis):
        if feature_axis is not None:
            expected = "None within a shard_map over the classes"
            raise ValueError(_checks.message(function, "feature_axis", expected, feature_axis))
        return Layout(mesh, (), (), (), names)
    of_kernel = jax.typeof(kernel).sharding.spec if told else visible_spec(kernel)
    classes = entry_names(of_kernel[axis]) + _checked_names(
        function, "class_axis", class_axis, mesh
    )
    features = entry_names(of_kernel[1 - axis]) + _checked_names(
        function, "feature_axis", feature_axis, mesh
    )
    if mesh.empty:
        return None
    if shared := set(classes) & set(features):
        expected = f"other axes than the classes have, {classes}"
        raise ValueError(_checks.message(function, "feature_axis", expected, shared))
    # JAX has no gradient of a `shard_map` in one that leaves axes out: nothing is shared unasked.
    is_within = bool(axes_of_type(mesh, AxisType.Manual))
    auto = axes_of_type(mesh, AxisType.Auto) if told or not is_within else ()
    given = lead.every + tuple(name for name in auto if name not in classes)
    rows = given + tuple(name for name in features if name not in given)
    layout = Layout(mesh, given, rows, features, classes)
    count = kernel.shape[1 - axis]
    if count % layout.size(features):
        expected = f"over devices that divide the {count} features"
        raise ValueError(_checks.message(function, "feature_axis", expected, repr(feature_axis)))
    if not told and _has_explicit(mesh) and math.prod(lead.shape) % layout.size(rows):
        # More axes than the examples can be over: the kernel is gathered before.
        layout = Layout(mesh, given, given, (), classes)
    if not told:
        _warn_of_hidden_axes(function, layout, kernel)
    # On Explicit axes a loop would have to say where everything in it is, whole arrays included.
    shared = layout.size(layout.rows + classes) > 1
    return layout if told or shared or _has_explicit(mesh) else None


def each_on(
    layout: Layout | None, arguments: Arguments, budget: int | None, batch_invariant: bool
) -> Array:
    """l_i."""
    if layout is None:
        return each(arguments, budget, batch_invariant)

    def local(arguments: Arguments) -> Array:
        arguments = cast(layout, arguments)
        if layout.classes:
            return _each_over(layout.classes, budget, arguments)
        return each(arguments, budget, batch_invariant)

    return rows_on(layout, local, arguments)


def rows_on(layout: Layout, local: Callable, arguments: Arguments) -> Any:
    """`local` of what each device has: a tree of arrays whose first axis are the rows."""
    if layout.is_manual:
        return local(arguments)
    count = arguments.rows.hidden.shape[0]
    values = mapped(layout, local, padded(layout, arguments), (), (), P(layout.rows))
    return jax.tree.map(lambda a: layout.as_rows(a[:count]), values)


def total_on(
    layout: Layout | None, arguments: Arguments, scale: Array, budget: int | None
) -> Array:
    """sum_i scale_i l_i."""
    if layout is None:
        return total(arguments, scale, budget)

    def local(arguments: Arguments, scale: Array) -> Array:
        arguments = cast(layout, arguments)
        if layout.classes:
            value = jnp.sum(scale * _each_over(layout.classes, budget, arguments))
        else:
            value = total(arguments, scale, budget)
        return lax.psum(value, layout.rows)

    if layout.is_manual:
        return local(arguments, scale)
    return mapped(layout, local, padded(layout, arguments), (scale,), (P(layout.rows),), P())


def mapped(
    layout: Layout,
    local: Callable,
    arguments: Arguments,
    more: tuple,
    specs: tuple,
    out_specs: Any,
) -> Any:
    """`local` of what each device has of the arguments and of `more`, whose specs are given.

    Where the devices cannot share the latter equally, zeros are added.
    """
    operands = (arguments, *jax.tree.map(layout.evened, more, specs))
    in_specs = jax.tree.map(
        lambda a, spec: None if a is None else spec,
        operands,
        (specs_of(layout, arguments), *specs),
        is_leaf=lambda a: a is None,
    )
    with use_abstract_mesh(layout.mesh):
        operands = jax.tree.map(layout.placed, operands, in_specs)
        over = jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs)
        return over(*operands)


def specs_of(layout: Layout, arguments: Arguments) -> Arguments:
    """Where each of the arguments is."""
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
    return jax.tree.map(
        lambda a, spec: None if a is None else spec, arguments, every, is_leaf=lambda a: a is None
    )


def cast(layout: Layout, arguments: Arguments) -> Arguments:
    """The arguments with a whole shard of the kernel, cast to what varies over the rows."""
    rows, classes, scalars = arguments
    if layout.features:
        # Cast before it is gathered: dW is scattered first, and the other axes sum what is left.
        kernel = varying(classes.kernel, layout.rows)
        axis = 1 - classes.axis
        kernel = lax.all_gather(kernel, layout.features, axis=axis, tiled=True)
        classes = classes._replace(kernel=kernel)
    return varying(Arguments(rows, classes, scalars), layout.rows)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _each_over(axes: tuple[str, ...], budget: int | None, arguments: Arguments) -> Array:
    """The losses of the rows of a device, from its classes and those of the others over `axes`."""
    rows, _, scalars = arguments
    return losses(statistics_over(axes, budget, arguments), rows.mass, rows.active, scalars)


@partial(_each_over.defjvp, symbolic_zeros=True)
def _each_over_jvp(axes, budget, primals, tangents):
    (arguments,), (dots,) = primals, dots_of(tangents)
    rows, _, scalars = arguments
    s = statistics_over(axes, budget, arguments)
    values = losses(s, rows.mass, rows.active, scalars)
    # In reverse their cotangents add up in this dtype, over steps and devices.
    wide = compute_dtype(rows.hidden.dtype)
    dots = jax.tree.map(lambda dot: dot.astype(wide), dots)

    def step(l_dot, operands, start, size):
        part, part_dots = (some_rows(a, start, size) for a in operands[:2])
        some = jax.tree.map(partial(cut, start=start, size=size, axis=0), operands[2])
        new = block_tangent(part, part_dots, block_of(*part), some, first_class(axes, part))
        return put(l_dot, new, start, 0)

    operands = varying((arguments, dots, s), axes)
    size = rows_of_tangents(shapes_of(arguments), budget)
    l_dot = sweep(step, jnp.zeros_like(values), operands, values.shape[0], size)
    of_rows = row_tangent(s, rows.mass, rows.active, scalars, block_dots(None, dots))
    return values, lax.psum(l_dot, axes) + of_rows


def statistics_over(axes: tuple[str, ...], budget: int | None, arguments: Arguments) -> Statistics:
    """Those of all classes, of which every device has its own."""

    def local(part: Arguments) -> tuple[Statistics, tuple]:
        return statistics(block_of(*part), part.rows.index, first_class(axes, part)), ()

    s, _ = by_rows(local, budget, varying(arguments, axes))
    return joined(s, axes, arguments.scalars.temperature)


def joined(s: Statistics, axes: tuple[str, ...], temperature: Array | None) -> Statistics:
    """The statistics of all shards as one: one maximum and one sum over the devices.

    A shard that holds the top counts without it, (1 + r) e^d - 1 = r + (1 + r) expm1(d) at d = 0.
    """
    top = _top_over(s.top, axes)
    is_top = s.top == top
    d = distance(s.top, top, temperature)
    beside = s.excess + (1 + s.excess) * jnp.expm1(jnp.where(is_top, d, 0))
    r = jnp.where(is_top, beside, (1 + s.excess) * jnp.exp(d))
    columns = [r, is_top.astype(r.dtype)]
    if s.mass is not None and s.cost is not None:
        cost = s.cost + jnp.where(s.mass == 0, 0, s.mass * -d)
        columns += [s.mass, cost]
    if s.label_logits is not None:
        columns += list(s.label_logits.T)
    rest, tops, *others = lax.psum(jnp.stack(columns), axes)
    mass = cost = label_logits = None
    if s.mass is not None:
        mass, cost, *others = others
    if s.label_logits is not None:
        label_logits = (
            jnp.stack(others, -1) if others else jnp.zeros((rest.shape[0], 0), rest.dtype)
        )
    return Statistics(top, rest + (tops - 1), label_logits, mass, cost)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _top_over(top: Array, axes: tuple[str, ...]) -> Array:
    """The largest of the tops."""
    return lax.pmax(top, axes)


@_top_over.defjvp
def _top_over_jvp(axes, primals, tangents):
    """That of the shard that holds it, the mean where several do: the excess counts on it."""
    top = _top_over(primals[0], axes)
    is_top = (primals[0] == top).astype(top.dtype)
    share = is_top / lax.psum(is_top, axes)
    return top, lax.psum(share * tangents[0], axes)


def first_class(axes: tuple[str, ...], part: Arguments) -> Array:
    return lax.axis_index(axes) * part.classes.length


def padded(layout: Layout, arguments: Arguments) -> Arguments:
    """As many rows and classes as the devices can share; rows more are inactive, classes out."""
    (rows, classes, scalars), length = arguments, arguments.classes.length
    count = rows.hidden.shape[0]
    more = -count % layout.size(layout.rows)
    if more:
        active = jnp.ones(count, bool) if rows.active is None else rows.active
        rows = jax.tree.map(
            lambda a: jnp.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)),
            rows._replace(active=active),
        )
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


def _checked_names(
    function: str, argument: str, axis: str | Names | None, mesh: AbstractMesh
) -> Names:
    """The name of an axis, or names, as a tuple of names of Auto axes."""
    if axis is None:
        return ()
    names = (axis,) if isinstance(axis, str) else axis
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        expected = "the name of an axis of a mesh, a tuple of names or None"
        raise TypeError(_checks.message(function, argument, expected, repr(axis)))
    if mesh.empty:
        expected = "None where no argument is on a mesh and none is set"
        raise ValueError(_checks.message(function, argument, expected, repr(axis)))
    auto = axes_of_type(mesh, AxisType.Auto)
    if not set(names) <= set(auto) or len(set(names)) < len(names):
        expected = f"among the Auto axes of the mesh, {auto}, or all manual"
        raise ValueError(_checks.message(function, argument, expected, repr(axis)))
    return names


def _warn_of_hidden_axes(function: str, layout: Layout, kernel: Array) -> None:
    """Warns where the kernel may be sharded over one of several Auto axes, unseen."""
    auto = axes_of_type(layout.mesh, AxisType.Auto)
    auto = tuple(name for name in auto if layout.size((name,)) > 1)
    if isinstance(kernel, Tracer) and len(auto) > 1 and set(auto) <= set(layout.rows):
        warnings.warn(
            f"softjax.{function}: the mesh has the Auto axes {auto}, whose shardings JAX hides "
            "while tracing. `kernel` is taken to be whole, and the examples are shared over all of "
            "these axes. Where the classes are sharded, pass their axis as `class_axis`; where "
            "they are not, pass `class_axis=()`.",
            stacklevel=4,
        )


def _has_explicit(mesh: AbstractMesh) -> bool:
    return bool(axes_of_type(mesh, AxisType.Explicit))


def _explicit(mesh: AbstractMesh, spec: P) -> P:
    """`spec` without Auto axes, which no type has."""
    names = axes_of_type(mesh, AxisType.Explicit)
    return P(*(tuple(name for name in entry_names(entry) if name in names) for entry in spec))

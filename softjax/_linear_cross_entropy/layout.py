"""The placement of a call of a linear head on a mesh, and the description of the call.

A program is compiled for each `Call`: for the mesh axes over which the examples, the features of a
kernel and the classes are sharded, and for the options of the computation.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, get_abstract_mesh, reshard, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from softjax import _checks
from softjax._linear_cross_entropy.blocks import Classes
from softjax._sharding import (
    Lead,
    Names,
    axes_of,
    axes_of_type,
    entry_names,
    looked_up,
    mesh_of,
    varying,
    visible_spec,
)


class Layout(NamedTuple):
    """The mesh axes over which examples, features of the kernel and classes are sharded."""

    mesh: AbstractMesh  # the whole mesh
    given: Names  # the axes of the examples in the arguments
    # The axes over which the examples are computed: `given`, and the axes of the features.
    rows: Names
    features: Names  # the axes over which the kernel is gathered
    classes: Names  # the axes of the classes

    @property
    def is_local(self) -> bool:
        """Whether there is one device, or the caller is within a `shard_map` over the classes."""
        return self.mesh.empty or bool(manual_axes(self.mesh, self.classes))

    def size(self, names: Names) -> int:
        """The number of shards of an array over these axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    def evened(self, a: Array, spec: P) -> Array:
        """`a`, padded with zeros so that its shards are equal."""
        if not a.ndim:
            return a
        sizes = (
            self.size(entry_names(entry)) for entry in (*spec, *(None,) * (a.ndim - len(spec)))
        )
        return jnp.pad(a, [(0, -n % size) for n, size in zip(a.shape, sizes, strict=True)])

    def placed(self, a: Array, spec: P) -> Array:
        """`a` for `shard_map`: on Explicit axes it must have the sharding of the spec."""
        return reshard(a, _explicit(self.mesh, spec)) if _has_explicit(self.mesh) else a

    def as_rows(self, a: Array) -> Array:
        """`a` [N], sharded over the axes of the examples in the arguments."""
        if not _has_explicit(self.mesh):
            return a
        with use_abstract_mesh(self.mesh):
            return reshard(a, _explicit(self.mesh, P(self.given)))

    def rows_of(self, tree: Any, count: int) -> Any:
        """The first `count` rows of the arrays, sharded as in the arguments."""
        return tree if self.is_local else jax.tree.map(lambda a: self.as_rows(a[:count]), tree)


ON_ONE_DEVICE = Layout(AbstractMesh((), ()), (), (), (), ())


def layout_of(
    function: str,
    lead: Lead,
    head: Classes,
    class_axis: str | Names | None,
    feature_axis: str | Names | None,
) -> Layout:
    """The layout of a call.

    Explicit axes are in the types of the examples and of the kernel. The examples are divided over
    all Auto axes except the axes of the classes, which are given by the arguments, or by the kernel
    if its sharding is known.
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
        return ON_ONE_DEVICE
    if shared := set(classes) & set(features):
        expected = f"other axes than the classes have, {classes}"
        raise ValueError(_checks.message(function, "feature_axis", expected, shared))
    # JAX cannot differentiate a nested `shard_map` that leaves axes out, so it is not used unasked.
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
        # The examples cannot be divided over so many axes: the kernel is gathered beforehand.
        layout = Layout(mesh, given, given, (), classes)
    if not told:
        _warn_of_hidden_axes(function, layout, kernel)
    # On Explicit axes a loop would have to state the sharding of every array in it.
    shared = layout.size(layout.rows + classes) > 1
    return layout if told or shared or _has_explicit(mesh) else ON_ONE_DEVICE


def manual_axes(mesh: AbstractMesh, axis: str | Names | None) -> Names:
    """The names of the axes if all are manual, within a `shard_map`; otherwise ()."""
    names, manual = entry_names(axis), axes_of_type(mesh, AxisType.Manual)
    return names if all(name in manual for name in names) else ()


def all_classes(classes: Classes, class_axis: str | Names | None) -> int:
    """The number of classes; if `class_axis` is manual, of all devices together."""
    mesh = get_abstract_mesh()
    return classes.length * math.prod(mesh.shape[name] for name in manual_axes(mesh, class_axis))


def at_class(names: Names, table: Array, index: Array) -> Array:
    """table[index], where each device of the manual axes has a part of the table."""
    if not names:
        return looked_up(table, index)
    index = index - lax.axis_index(names) * len(table)
    inside = (index >= 0) & (index < len(table))
    found = table.at[index].get(mode="clip")
    return lax.psum(jnp.where(inside, found, 0), names)


def alike(layout: Layout, tree: Any) -> Any:
    """The tree, in which all arrays vary alike over manual axes other than those of the classes."""
    return varying(tree, axes_of(tree) - set(layout.classes))


def _checked_names(
    function: str, argument: str, axis: str | Names | None, mesh: AbstractMesh
) -> Names:
    """The name or names of Auto axes as a tuple."""
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
        if set(names) <= set(axes_of_type(mesh, AxisType.Explicit)):
            expected = "None for an Explicit axis, which is in the sharding of `kernel`"
        raise ValueError(_checks.message(function, argument, expected, repr(axis)))
    return names


def _warn_of_hidden_axes(function: str, layout: Layout, kernel: Array) -> None:
    """Warns if the kernel may be sharded over an Auto axis that the trace does not see."""
    auto = axes_of_type(layout.mesh, AxisType.Auto)
    auto = tuple(name for name in auto if layout.size((name,)) > 1)
    if isinstance(kernel, Tracer) and len(auto) > 1 and set(auto) <= set(layout.rows):
        warnings.warn(
            f"softjax.{function}: the mesh has the Auto axes {auto}, whose shardings JAX hides "
            "while tracing. `kernel` is taken to be whole, and the examples are shared over all of "
            "these axes. Where the classes are sharded, pass their axis as `class_axis`; where "
            "they are not, pass `class_axis=()`.",
            stacklevel=5,  # the call of the public function
        )


def _has_explicit(mesh: AbstractMesh) -> bool:
    return bool(axes_of_type(mesh, AxisType.Explicit))


def _explicit(mesh: AbstractMesh, spec: P) -> P:
    """`spec` without Auto axes, which are not part of a type."""
    names = axes_of_type(mesh, AxisType.Explicit)
    return P(*(tuple(name for name in entry_names(entry) if name in names) for entry in spec))


@dataclass(frozen=True)
class Call:
    """The placement of examples and classes, and the options of the computation."""

    lead: Lead  # the leading axes of the examples
    layout: Layout  # the mesh axes of the arguments
    reduction: str = "none"  # the reduction of the losses
    # The number of bytes for temporaries; None for the default of the platform.
    budget: int | None = None
    # The number of examples for which there is room; None for all of them.
    max_active: int | None = None
    # Whether the bits of an example's results do not depend on the batch.
    batch_invariant: bool = False


def call_of(
    function: str,
    classes: Classes,
    of_examples: Any,
    others: Any,
    class_axis: str | Names | None,
    feature_axis: str | Names | None,
    *,
    batch_invariant: bool = False,
    **options: Any,
) -> Call:
    """The call of `function` with these arrays and options, some of which are checked here.

    `of_examples` is a tree of the arrays of the examples, of which hidden [..., D] is the first,
    and `others` a tree of all other arrays that may be on a mesh; `options` are attributes of the
    call.
    """
    arrays = jax.tree.leaves(of_examples)
    mesh, ndim = mesh_of((classes, arrays, others)), arrays[0].ndim - 1
    lead = Lead.of(mesh, ndim, classes.kernel, classes.axis, *arrays)
    layout = layout_of(function, lead, classes, class_axis, feature_axis)
    if options["budget"] is not None:
        _checks.at_least(function, "max_temp_bytes", options["budget"], 1)
    invariant = _checks.flag(function, "batch_invariant", batch_invariant)
    call, refused = Call(lead, layout, batch_invariant=invariant, **options), None
    if layout.classes:
        refused = f"where the classes are over the axes {layout.classes}"
    elif call.reduction != "none":
        refused = f'for the reduction "{call.reduction}"'
    if invariant and refused:
        raise ValueError(_checks.message(function, "batch_invariant", f"False {refused}", True))
    return call

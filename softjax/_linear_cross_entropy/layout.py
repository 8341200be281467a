"""Where the rows and the classes of a linear head are, on a mesh of devices."""

import math
from typing import NamedTuple

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, get_abstract_mesh, reshard, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from softjax import _checks
from softjax._sharding import Names, axes_of_type, entry_names


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

    def size(self, names: Names) -> int:
        """How many shards an array has over these axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    def placed(self, a: Array, spec: P) -> Array:
        """`a` as `shard_map` takes it: on Explicit axes it must have been brought there."""
        return reshard(a, _explicit(self.mesh, spec)) if _has_explicit(self.mesh) else a

    def as_rows(self, a: Array) -> Array:
        """`a` [N], over the axes of the examples as they came."""
        if not _has_explicit(self.mesh):
            return a
        with use_abstract_mesh(self.mesh):
            return reshard(a, _explicit(self.mesh, P(self.given)))


def layout_of(
    function: str,
    hidden: Array,
    kernel: Array,
    class_axis: str | Names | None,
    feature_axis: str | Names | None,
) -> Layout | None:
    """The layout, or None where nothing is known to be sharded.

    Explicit axes are in the types of hidden [N, D] and kernel [D, V]. Those of an Auto mesh are
    not: the arguments tell, and the examples are over all axes but those of the classes.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in (hidden, kernel)]
    mesh = next((m for m in (*meshes, get_abstract_mesh()) if not m.empty), None)
    told = class_axis is not None or feature_axis is not None
    of_hidden, of_kernel = (jax.typeof(a).sharding.spec for a in (hidden, kernel))
    classes = entry_names(of_kernel[1]) + _checked_names(function, "class_axis", class_axis, mesh)
    features = entry_names(of_kernel[0]) + _checked_names(
        function, "feature_axis", feature_axis, mesh
    )
    if mesh is None:
        return None
    if shared := set(classes) & set(features):
        expected = f"other axes than the classes have, {classes}"
        raise ValueError(_checks.message(function, "feature_axis", expected, shared))
    given = tuple(name for name in entry_names(of_hidden[0]) if name not in classes)
    if told:
        given += tuple(name for name in axes_of_type(mesh, AxisType.Auto) if name not in classes)
    rows = given + tuple(name for name in features if name not in given)
    layout = Layout(mesh, given, rows, features, classes)
    if kernel.shape[0] % layout.size(features):
        expected = f"over devices that divide the {kernel.shape[0]} features"
        raise ValueError(_checks.message(function, "feature_axis", expected, repr(feature_axis)))
    if not told and len(hidden) % layout.size(rows):
        # More axes than the examples can be over: the kernel is gathered before.
        layout = Layout(mesh, given, given, (), classes)
    return layout if layout.rows or classes else None


def _checked_names(
    function: str, argument: str, axis: str | Names | None, mesh: AbstractMesh | None
) -> Names:
    """The name of an axis, or names, as a tuple of names of Auto axes."""
    if axis is None:
        return ()
    names = (axis,) if isinstance(axis, str) else axis
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        expected = "the name of an axis of a mesh, a tuple of names or None"
        raise TypeError(_checks.message(function, argument, expected, repr(axis)))
    if mesh is None:
        expected = "None where no argument is on a mesh and none is set"
        raise ValueError(_checks.message(function, argument, expected, repr(axis)))
    auto = axes_of_type(mesh, AxisType.Auto)
    if not set(names) <= set(auto) or len(set(names)) < len(names):
        expected = f"among the Auto axes of the mesh, {auto}"
        raise ValueError(_checks.message(function, argument, expected, repr(axis)))
    return names


def _has_explicit(mesh: AbstractMesh) -> bool:
    return bool(axes_of_type(mesh, AxisType.Explicit))


def _explicit(mesh: AbstractMesh, spec: P) -> P:
    """`spec` without Auto axes, which no type has."""
    names = axes_of_type(mesh, AxisType.Explicit)
    return P(*(tuple(name for name in entry_names(entry) if name in names) for entry in spec))

"""Where the entries of an array are, on a mesh of devices, as a trace can see it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, reshard, use_abstract_mesh
from jax.sharding import PartitionSpec as P

Names = tuple[str, ...]


def shards(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """In how many equal parts the devices of a mesh may hold each of the axes; 1 without a mesh.

    The sharding on Explicit axes is in the type. Auto axes hide theirs: a count that all of them
    divide has the true one as a divisor, for JAX shards into equal parts.
    """
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    hidden = axes_of_type(mesh, AxisType.Auto)

    def count(axis: int) -> int:
        names = hidden + entry_names(sharding.spec[axis])
        # An axis without entries, which anything divides, is not split.
        return math.gcd(x.shape[axis] or 1, math.prod(mesh.shape[name] for name in names))

    return tuple(map(count, axes))


class Lead(NamedTuple):
    """The leading axes of arrays whose rows, in whatever order, their function takes as one axis.

    A reshape keeps their order. Where an axis behind the first is over devices, it moves rows from
    one to another, and JAX refuses it on Explicit axes. Each device then flattens its own part,
    nothing is sent, and the rows of the first device come first.

    Attributes:
        shape: that of the leading axes.
        mesh: that of the array; empty without one.
        names: the Explicit axes of the mesh that each of the leading axes is over.
    """

    shape: tuple[int, ...]
    mesh: AbstractMesh
    names: tuple[Names, ...]

    @classmethod
    def of(cls, ndim: int, *arrays: Array) -> "Lead":
        """The first `ndim` axes, as the first array has them that is over devices there."""
        a = next((a for a in arrays if any(jax.typeof(a).sharding.spec[:ndim])), arrays[0])
        sharding = jax.typeof(a).sharding
        return cls(a.shape[:ndim], sharding.mesh, tuple(map(entry_names, sharding.spec[:ndim])))

    @property
    def every(self) -> Names:
        """The axes of the mesh that the rows are over."""
        return sum(self.names, ())

    def flat(self, a: Array) -> Array:
        """`a` [*shape, ...] as [N, ...], brought where the rows are."""
        ndim, spec = len(self.shape), jax.typeof(a).sharding.spec

        def flattened(a: Array) -> Array:
            return a.reshape(math.prod(a.shape[:ndim]), *a.shape[ndim:])

        if not any((*self.names[1:], *spec[1:ndim])):
            return flattened(a)
        free = (
            tuple(n for n in entry_names(entry) if n not in self.every) for entry in spec[ndim:]
        )
        here = P(*self.names, *free)
        return self._on_devices(flattened, here, P(*self.names), P(self.every), a)

    def back(self, a: Array) -> Array:
        """`a` [N, ...] as [*shape, ...], where the rows were."""
        if not any(self.names[1:]):
            return a.reshape(*self.shape, *a.shape[1:])
        sizes = (math.prod(self.mesh.shape[name] for name in names) for names in self.names)
        shape = tuple(n // size for n, size in zip(self.shape, sizes, strict=True))

        def unflattened(a: Array) -> Array:
            return a.reshape(*shape, *a.shape[1:])

        here = P(self.every)
        return self._on_devices(unflattened, here, here, P(*self.names), a)

    def _on_devices(
        self, function: Callable, here: P, in_specs: P, out_specs: P, a: Array
    ) -> Array:
        """`function` of what each device has of `a`, which is brought `here`."""
        with use_abstract_mesh(self.mesh):
            names = set(self.every)
            each = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names)
            return each(reshard(a, here))


def looked_up(table: Array, index: Array) -> Array:
    """table[index]; on Explicit axes, where that is no operation, from a table that is whole."""
    specs = [jax.typeof(a).sharding.spec for a in (table, index)]
    if not any(map(any, specs)):
        return table[index]
    meshes = [jax.typeof(a).sharding.mesh for a in (table, index)]
    with use_abstract_mesh(next(mesh for mesh in meshes if not mesh.empty)):
        return reshard(table, P()).at[index].get(out_sharding=specs[1])


def entry_names(entry: Any) -> Names:
    """The axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def axes_of_type(mesh: AbstractMesh, kind: AxisType) -> Names:
    """The axes of a mesh that are of this kind."""
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in pairs if axis_type == kind)

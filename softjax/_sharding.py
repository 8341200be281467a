"""Where the entries of an array are, on a mesh of devices, as a trace can see it."""

import math
from typing import Any

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
        return math.gcd(x.shape[axis], math.prod(mesh.shape[name] for name in names))

    return tuple(map(count, axes))


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

"""Meshes of 8 CPU devices, of both kinds, and arrays on them, for several test modules."""

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

KINDS = ("auto", "explicit")


def mesh_of(kind: str, **sizes: int):
    """A mesh with axes of these sizes, such as `mesh_of("auto", d=2, c=4)`."""
    axis_type = AxisType.Auto if kind == "auto" else AxisType.Explicit
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))


def put(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def structure(mesh, shape, *spec, dtype="float32"):
    """A `ShapeDtypeStruct` with a sharding, to compile for."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

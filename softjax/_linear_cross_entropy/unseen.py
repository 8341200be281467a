"""A warning if a program for several devices was traced without knowledge of their mesh.

JAX knows the mesh while tracing if an argument was placed on it, or if a mesh is set. It does not
know the shardings of `jax.jit(in_shardings=...)`. The loop over pieces then goes over the rows of
all devices, and each device computes all of them. The number of devices is known only when the
program is lowered.
"""

import warnings
from typing import Any

import jax
from jax import Array
from jax.interpreters import mlir
from jax.sharding import get_abstract_mesh

from softjax._platforms import Primitive

MESSAGE = (
    "softjax: a loss of a linear head is compiled for {devices} devices, but JAX did not know "
    "their mesh while tracing it: every device computes the losses of all examples. To share them, "
    "place the arguments on the mesh by jax.device_put, or trace within jax.set_mesh(mesh)."
)


def warn_if_mesh_unknown(first: Array, operands: Any) -> Array:
    """`first`, the start of a loop over pieces; its lowering warns if the mesh was unknown."""
    meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves(operands))
    known = not get_abstract_mesh().empty or not all(mesh.empty for mesh in meshes)
    return first if known else _mesh_unknown_p.bind(first)


def _lowered(context: Any, operand: Any) -> list[Any]:
    devices = getattr(context.module_context.axis_context, "num_devices", 1)
    if devices > 1:
        warnings.warn(MESSAGE.format(devices=devices), stacklevel=2)
    return [operand]


_mesh_unknown_p = Primitive("mesh_unknown")
_mesh_unknown_p.def_impl(lambda a: a)
_mesh_unknown_p.def_abstract_eval(lambda a: a)
mlir.register_lowering(_mesh_unknown_p, _lowered)

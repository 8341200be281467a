"""A warning where a program of many devices has a loss whose mesh was not known to its trace.

An argument that was placed on a mesh, or a mesh that is set, is known while JAX traces. What
`jax.jit(in_shardings=...)` places is not: the loop over pieces is then over the rows of all
devices, and each of them computes all. How many devices a program is for is known when it is
lowered.
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


def watched(first: Array, operands: Any) -> Array:
    """`first`, where a loop over pieces of the operands starts; lowering it warns as said above."""
    meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves(operands))
    known = not get_abstract_mesh().empty or not all(mesh.empty for mesh in meshes)
    return first if known else _watched_p.bind(first)


def _lowered(context: Any, operand: Any) -> list[Any]:
    devices = getattr(context.module_context.axis_context, "num_devices", 1)
    if devices > 1:
        warnings.warn(MESSAGE.format(devices=devices), stacklevel=2)
    return [operand]


_watched_p = Primitive("watched")
_watched_p.def_impl(lambda a: a)
_watched_p.def_abstract_eval(lambda a: a)
mlir.register_lowering(_watched_p, _lowered)

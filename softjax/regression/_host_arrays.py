"""Arrays in the memory of the CPU: which ones NumPy can read, and how NumPy's get to the device.

NumPy compiles nothing, whereas JAX compiles a program for each new shape, which takes longer than
most computations here.
"""

from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import get_abstract_mesh

from softjax import _checks


def is_at_hand(x: Any) -> TypeGuard[Array]:
    """Whether `x` is known and in the memory of the CPU, where NumPy reads it without a copy."""
    if not _checks.is_concrete(x):
        return False
    return isinstance(x, Array) and all(device.platform == "cpu" for device in x.devices())


def is_on_host(tree: Any) -> bool:
    """Whether all arrays are known and on the default device, which is a CPU."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, Array)]
    if not all(is_at_hand(leaf) for leaf in leaves):
        return False
    here = jax.device_put(np.zeros(())).devices()
    return all(leaf.devices() == here for leaf in leaves)


def placed(tree: Any) -> Any:
    """The tree with JAX arrays for those of NumPy, on the mesh if one is set.

    Without a mesh nothing is compiled.
    """
    place = jax.device_put if get_abstract_mesh().empty else jnp.asarray
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, Array) else place(leaf), tree)

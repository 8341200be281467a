"""Arrays on Explicit mesh axes: fits and statistics compute with them on Auto axes.

Fits and statistics sum over the examples. On Explicit axes the code would have to state the
sharding of every such sum; on Auto axes the compiler finds it. Outside of a trace, the arrays are
placed on the same mesh with Auto axes, which moves no data. Within a trace only
`jax.sharding.auto_axes` can do this. It is not used for known arrays, since it would trace them,
and a fit needs their values.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, auto_axes, use_abstract_mesh

from softjax._sharding import mesh_of

P = ParamSpec("P")
T = TypeVar("T")


def on_auto_axes(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, with all array arguments on Auto axes.

    Its result is on the given axes; within a trace it is replicated on every device.
    """
    of_any: Callable[..., T] = function

    @wraps(function)
    def of_auto(*args: P.args, **kwargs: P.kwargs) -> T:
        # JAX would warn that an iterator is not a pytree.
        leaves, structure = jax.tree.flatten(
            (args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Iterator)
        )
        places = [n for n, leaf in enumerate(leaves) if _has_explicit_axes(leaf)]
        if not places:
            return function(*args, **kwargs)

        def of_arrays(arrays: list[Array]) -> T:
            given = dict(zip(places, arrays, strict=True))
            all_leaves = [given.get(n, leaf) for n, leaf in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(structure, all_leaves)
            return of_any(*args, **kwargs)

        arrays = [leaves[n] for n in places]
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            within_trace: Any = auto_axes(of_arrays, out_sharding=PartitionSpec())
            with use_abstract_mesh(mesh_of(arrays)):
                return within_trace(arrays)
        return _on_another_mesh(of_arrays, arrays)

    return of_auto


def _on_another_mesh(function: Callable[[list[Array]], T], arrays: list[Any]) -> T:
    """The result of `function` for known arrays on Auto axes, placed on their original mesh."""
    explicit = arrays[0].sharding.mesh
    names = explicit.axis_names
    auto = Mesh(explicit.devices, names, axis_types=(AxisType.Auto,) * len(names))

    def given_to(mesh: Mesh, leaf: Any) -> Any:
        sharding = leaf.sharding if isinstance(leaf, Array) else None
        if not isinstance(sharding, NamedSharding):
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec))

    with nullcontext() if jax.sharding.get_abstract_mesh().empty else jax.set_mesh(auto):
        result = function([given_to(auto, array) for array in arrays])
    return jax.tree.map(lambda leaf: given_to(explicit, leaf), result)


def _has_explicit_axes(leaf: Any) -> bool:
    is_array = isinstance(leaf, Array)
    return is_array and AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types

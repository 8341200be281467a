"""Arrays on meshes with Explicit axes: functions of examples compute with them on Auto axes."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import jax
from jax import Array
from jax.core import Tracer
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    auto_axes,
    use_abstract_mesh,
)

from softjax._sharding import mesh_of

P = ParamSpec("P")
T = TypeVar("T")


def on_auto_axes(function: Callable[P, T]) -> Callable[P, T]:
    """`function` of the arrays among its arguments with Auto axes; its result has the given ones.

    Fits and statistics sum over the examples, and on Explicit axes the sharding of every such sum
    would have to be said where it stands. Nothing is copied: only the names of the axes are of
    another kind.
    """

    @wraps(function)
    def of_auto(*args: P.args, **kwargs: P.kwargs) -> T:
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_iterator)
        places = [n for n, leaf in enumerate(leaves) if _is_typed(leaf)]
        if places and any(isinstance(leaf, Tracer) for leaf in leaves):
            return _within_trace(function, leaves, structure, places)
        explicit = next(filter(None, map(_explicit_mesh, leaves)), None)
        if explicit is None:
            return function(*args, **kwargs)
        auto = _with_axes(explicit, AxisType.Auto)

        def moved(leaf: Any, mesh: Mesh) -> Any:
            if _mesh_of(leaf) is None:
                return leaf
            return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))

        to_auto = partial(moved, mesh=auto)
        args, kwargs = jax.tree.map(to_auto, (args, kwargs), is_leaf=_is_iterator)
        with nullcontext() if jax.sharding.get_abstract_mesh().empty else jax.set_mesh(auto):
            result = function(*args, **kwargs)
        return jax.tree.map(lambda leaf: moved(leaf, explicit), result)

    return of_auto


def _within_trace(
    function: Callable[..., T], leaves: list[Any], structure: Any, places: list[int]
) -> T:
    """The result of `function`, whole on every device, where a trace knows the shardings."""

    def of_typed(typed: list[Array]) -> T:
        given = dict(zip(places, typed, strict=True))
        all_leaves = [given.get(n, leaf) for n, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, all_leaves)
        return function(*args, **kwargs)

    typed = [leaves[n] for n in places]
    on_auto: Any = auto_axes(of_typed, out_sharding=PartitionSpec())
    with use_abstract_mesh(mesh_of(typed)):
        return on_auto(typed)


def _is_typed(leaf: Any) -> bool:
    """Whether the type of an array names Explicit axes."""
    is_array = isinstance(leaf, Array)
    return is_array and AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types


def _is_iterator(x: Any) -> bool:
    """Whether JAX would warn that `x` is not a pytree."""
    return isinstance(x, Iterator)


def _mesh_of(leaf: Any) -> Mesh | None:
    """The mesh of an array, outside of a trace."""
    known = isinstance(leaf, Array) and not isinstance(leaf, Tracer)
    return getattr(leaf.sharding, "mesh", None) if known else None


def _explicit_mesh(leaf: Any) -> Mesh | None:
    mesh = _mesh_of(leaf)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None


def _with_axes(mesh: Mesh, kind: AxisType) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * len(mesh.axis_names))

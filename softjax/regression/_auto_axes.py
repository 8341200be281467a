"""Arrays on meshes with Explicit axes, which a fit computes with on Auto axes."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import jax
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding

P = ParamSpec("P")
T = TypeVar("T")


def on_auto_axes(function: Callable[P, T]) -> Callable[P, T]:
    """`function` of the arrays among its arguments with Auto axes; its result has the given ones.

    The products of a fit sum over the examples, and on Explicit axes the sharding of every such sum
    would have to be said where it stands. Nothing is copied: only the names of the axes are of
    another kind.
    """

    @wraps(function)
    def of_auto(*args: P.args, **kwargs: P.kwargs) -> T:
        leaves = jax.tree.leaves((args, kwargs), is_leaf=_is_iterator)
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

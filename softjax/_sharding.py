"""How arrays are distributed over a mesh of devices, as far as a trace can see it.

Within `jax.shard_map` the type of an array says over which mesh axes it varies. The carry of a loop
must keep its type, and both branches of a `cond` must return the same type. `while_loop` and `cond`
here first cast all arrays to vary over the axes over which any of them varies, and then call
`jax.lax`.
"""

import math
from collections.abc import Callable, Collection
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    get_abstract_mesh,
    reshard,
    use_abstract_mesh,
)
from jax.sharding import PartitionSpec as P

Names = tuple[str, ...]


def shards(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of equal parts into which a mesh may split each of the axes; 1 without a mesh.

    The type shows the sharding over Explicit axes. Auto axes hide theirs, so the product of the
    sizes of all Auto axes is used: since JAX shards into equal parts, the true number divides it.
    """
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    hidden = axes_of_type(mesh, AxisType.Auto)

    def count(axis: int) -> int:
        names, length = hidden + entry_names(sharding.spec[axis]), x.shape[axis]
        if not isinstance(length, int):  # the size is a symbol in an exported program
            return 1
        # An axis of length 0, which every number divides, is not split.
        return math.gcd(length or 1, math.prod(mesh.shape[name] for name in names))

    return tuple(map(count, axes))


def is_split(x: Array, axes: tuple[int, ...]) -> bool:
    """Whether the type of x names a mesh axis for one of the axes, or Auto axes may split one.

    JAX takes no entry by its index from an axis with such a name, also where the mesh axis has the
    size 1 and so splits nothing.
    """
    spec = jax.typeof(x).sharding.spec
    return any(entry_names(spec[axis]) for axis in axes) or math.prod(shards(x, axes)) > 1


class Lead(NamedTuple):
    """The leading axes of arrays, which a function of rows flattens to one axis in any order.

    A reshape would keep the order of the rows. If an axis after the first is sharded, this would
    move rows between devices, and JAX refuses it on Explicit axes. Instead, each device flattens
    its own part: nothing is sent, and the rows of the first device come first.

    Attributes:
        shape: the shape of the leading axes.
        mesh: the mesh, as `mesh_of` finds it.
        names: for each leading axis, the Explicit mesh axes over which it is sharded.
    """

    shape: tuple[int, ...]
    mesh: AbstractMesh
    names: tuple[Names, ...]

    @classmethod
    def of(cls, mesh: AbstractMesh, ndim: int, kernel: Array, axis: int, *arrays: Array) -> "Lead":
        """The first `ndim` axes, with the sharding of the first array that is sharded there.

        Mesh axes that shard the classes, which are on `axis` of the kernel, hold all rows and are
        left out.
        """
        taken = entry_names(jax.typeof(kernel).sharding.spec[axis])
        specs = [jax.typeof(a).sharding.spec[:ndim] for a in arrays]
        chosen = map(entry_names, next(filter(any, specs), specs[0]))
        names = tuple(tuple(n for n in entry if n not in taken) for entry in chosen)
        return cls(arrays[0].shape[:ndim], mesh, names)

    @property
    def every(self) -> Names:
        """The mesh axes over which the rows are sharded."""
        return sum(self.names, ())

    def flat(self, a: Array) -> Array:
        """`a` [*shape, ...] as [N, ...], with the sharding of the rows."""
        ndim, spec = len(self.shape), jax.typeof(a).sharding.spec

        def flattened(a: Array) -> Array:
            return a.reshape(math.prod(a.shape[:ndim]), *a.shape[ndim:])

        if tuple(map(entry_names, spec[:ndim])) != self.names:
            free = (
                tuple(n for n in entry_names(entry) if n not in self.every) for entry in spec[ndim:]
            )
            with use_abstract_mesh(self.mesh):
                a = reshard(a, P(*self.names, *free))
        if not any(self.names[1:]):
            return flattened(a)
        return self._on_devices(flattened, P(*self.names), P(self.every), a)

    def back(self, a: Array) -> Array:
        """`a` [N, ...] as [*shape, ...], with the original sharding of the rows."""
        if not any(self.names[1:]):
            return a.reshape(*self.shape, *a.shape[1:])
        sizes = (math.prod(self.mesh.shape[name] for name in names) for names in self.names)
        shape = tuple(n // size for n, size in zip(self.shape, sizes, strict=True))

        def unflattened(a: Array) -> Array:
            return a.reshape(*shape, *a.shape[1:])

        here = P(self.every)
        with use_abstract_mesh(self.mesh):
            a = reshard(a, here)
        return self._on_devices(unflattened, here, P(*self.names), a)

    def _on_devices(self, function: Callable, in_specs: P, out_specs: P, a: Array) -> Array:
        """`function` of the part of `a` on each device."""
        with use_abstract_mesh(self.mesh):
            names = set(self.every)
            each = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names)
            return each(a)


def mesh_of(tree: Any) -> AbstractMesh:
    """The mesh of the first array of the tree that has one, else the current mesh or no mesh."""
    meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if not mesh.empty), get_abstract_mesh())


def visible_spec(a: Array) -> tuple[Any, ...]:
    """The mesh axes over which each axis of `a` is sharded; for a tracer only Explicit axes."""
    sharding = jax.typeof(a).sharding
    if not isinstance(a, Tracer) and isinstance(a.sharding, NamedSharding):
        sharding = a.sharding
    return (*sharding.spec, *(None,) * (a.ndim - len(sharding.spec)))


def brought_to(a: Array, other: Array) -> Array:
    """`a` with the sharding of `other`, an array of the same shape, over Explicit axes."""
    here, there = (jax.typeof(x).sharding for x in (a, other))
    if here.spec == there.spec:
        return a
    with use_abstract_mesh(mesh_of((other, a))):
        return reshard(a, there.spec)


def together(tree: Any) -> Any:
    """The arrays of a tree, whose leading axes are the same, in one sharding over Explicit axes.

    An axis has the sharding of the first array that is sharded there. JAX does not combine arrays
    that are sharded differently. It combines a sharded array with one that is not, but a gradient
    must be sharded as its argument is; `reshard` brings it back.
    """
    arrays, structure = jax.tree.flatten(tree)
    specs = [tuple(map(entry_names, jax.typeof(a).sharding.spec)) for a in arrays]
    if not any(map(any, specs)):
        return tree
    names: Names = ()
    chosen: list[Names] = []
    for entries in zip_longest(*specs, fillvalue=()):
        chosen.append(next((n for n in entries if n and not {*n} & {*names}), ()))
        names += chosen[-1]
    with use_abstract_mesh(mesh_of(arrays)):
        for place, (a, spec) in enumerate(zip(arrays, specs, strict=True)):
            if spec != tuple(chosen[: a.ndim]):
                arrays[place] = reshard(a, P(*chosen[: a.ndim]))
    return jax.tree.unflatten(structure, arrays)


def repeated(a: Array, batch: Array) -> Array:
    """`a` with a first axis like that of `batch`, also in its sharding over Explicit axes."""
    spec, shape = jax.typeof(batch).sharding.spec, (batch.shape[0], *a.shape)
    if not entry_names(spec[0]):
        return jnp.broadcast_to(a, shape)
    with use_abstract_mesh(mesh_of((batch, a))):
        return jnp.broadcast_to(a, shape, out_sharding=P(spec[0], *jax.typeof(a).sharding.spec))


def on_mesh_of(tree: Any, other: Any) -> Any:
    """The arrays of a tree; those without a mesh are replicated over the Explicit mesh of `other`.

    Without it, JAX cannot map a loop that starts from these arrays over a split axis.
    """
    mesh = mesh_of(other)
    if not axes_of_type(mesh, AxisType.Explicit):
        return tree

    def placed(a: Array) -> Array:
        return reshard(a, P()) if jax.typeof(a).sharding.mesh.empty else a

    with use_abstract_mesh(mesh):
        return jax.tree.map(placed, tree)


def with_whole_axis(a: Array, axis: int) -> Array:
    """`a` with the whole of an axis on each device: an Explicit sharding of the axis is removed."""
    sharding = jax.typeof(a).sharding
    if not entry_names(sharding.spec[axis]):
        return a
    spec = list(sharding.spec)
    spec[axis] = None
    with use_abstract_mesh(sharding.mesh):
        return reshard(a, P(*spec))


def taken_along(x: Array, index: Array, axis: int, mode: str) -> Array:
    """`jnp.take_along_axis`, whose `mode` says what it does with an index out of bounds.

    If `jax.vmap` maps `index` over a split Explicit axis, JAX requires that it maps x as well.
    """
    if axes_of_type(jax.typeof(index).sharding.mesh, AxisType.Explicit) and index.shape[axis]:
        any_index = lax.slice_in_dim(index, 0, 1, axis=axis)
        x = jnp.where(any_index == any_index, x, x)
    return jnp.take_along_axis(x, index, axis, mode=mode)


def looked_up(table: Array, index: Array) -> Array:
    """table[index]; on Explicit axes the table is first replicated, since JAX requires it."""
    specs = [jax.typeof(a).sharding.spec for a in (table, index)]
    if not any(map(any, specs)):
        return table[index]
    with use_abstract_mesh(mesh_of((table, index))):
        return reshard(table, P()).at[index].get(out_sharding=specs[1])


def axes_of(tree: Any) -> frozenset[str]:
    """The mesh axes, within a `shard_map`, over which any array of the tree varies."""
    every = (jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(tree))
    return frozenset[str]().union(*every)


def varying(tree: Any, axes: Collection[str]) -> Any:
    """The tree, with types that allow every array to vary over `axes`; values do not change.

    The transpose of this cast is the sum over `axes`.
    """

    def cast(a: Array) -> Array:
        more = tuple(sorted(frozenset(axes) - axes_of(a)))
        return lax.pcast(a, more, to="varying") if more else a

    return jax.tree.map(cast, tree) if axes else tree


def while_loop(running: Callable[[Any], Array], step: Callable[[Any], Any], carry: Any) -> Any:
    """`lax.while_loop`, which also works within a `shard_map`."""
    axes = axes_of(carry) | _axes_after(step, carry)
    return lax.while_loop(running, lambda carry: varying(step(carry), axes), varying(carry, axes))


def fori_loop(first: Any, stop: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop`, which also works within a `shard_map`."""
    axes = axes_of(carry) | _axes_after(step, first, carry)
    carry = varying(carry, axes)
    return lax.fori_loop(first, stop, lambda i, carry: varying(step(i, carry), axes), carry)


def cond(predicate: Array, if_true: Callable, if_false: Callable, *operands: Any) -> Any:
    """`lax.cond`, which also works within a `shard_map`."""
    axes = _axes_after(if_true, *operands) | _axes_after(if_false, *operands)
    chosen = (lambda *args, f=f: varying(f(*args), axes) for f in (if_true, if_false))
    return lax.cond(predicate, *chosen, *operands)


def _axes_after(function: Callable, *operands: Any) -> frozenset[str]:
    """The axes over which any result of `function` varies; none outside of a `shard_map`."""
    if not axes_of_type(get_abstract_mesh(), AxisType.Manual):
        return frozenset()
    found = []

    def recorded(*operands):
        found.append(axes_of(function(*operands)))

    jax.eval_shape(recorded, *operands)
    return found[0]


def entry_names(entry: Any) -> Names:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def axes_of_type(mesh: AbstractMesh, kind: AxisType) -> Names:
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in pairs if axis_type == kind)

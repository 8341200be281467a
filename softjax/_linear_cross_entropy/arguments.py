"""The arguments of a linear head and its loss: checked, in one form, and where they are.

`Layout` says over which axes of a mesh the rows, the features and the classes are.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, AxisType, get_abstract_mesh, reshard, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import (
    Labels,
    TopKLabels,
    class_indices,
    is_class_indices,
    sparse_distribution,
)
from softjax._linear_cross_entropy.blocks import Scalars
from softjax._numerics import compute_dtype
from softjax._sharding import Lead, Names, axes_of_type, entry_names, looked_up


class Head(NamedTuple):
    """hidden [..., D], kernel [D, V] and bias [V]."""

    hidden: Array
    kernel: Array
    bias: Array | None

    @property
    def lead(self) -> tuple[int, ...]:
        """The shape of the examples."""
        return self.hidden.shape[:-1]


class Targets(NamedTuple):
    """Targets of the examples: (index, mass) [..., k] or `dense` [..., V], and what options add."""

    index: Array | None
    mass: Array | None
    dense: Array | None
    spread: Array | None
    class_weights: Array | None
    ignored: Array | None  # [...]

    @property
    def of_examples(self) -> tuple[Array | None, ...]:
        """Those with the shape of the examples in front."""
        return self.index, self.mass, self.dense, self.ignored


class Layout(NamedTuple):
    """The axes of a mesh that the examples, the features of the kernel and the classes are over.

    Attributes:
        mesh: all of it.
        given: axes of the examples as they came.
        rows: axes that they are computed over: those, and the axes of the features.
        features: axes that the kernel is gathered over.
        classes: axes of the classes.
    """

    mesh: AbstractMesh
    given: Names
    rows: Names
    features: Names
    classes: Names

    def size(self, names: Names) -> int:
        """How many shards an array has over these axes."""
        return math.prod(self.mesh.shape[name] for name in names)

    def placed(self, a: Array, spec: P) -> Array:
        """`a` as `shard_map` takes it: on Explicit axes it must have been brought there."""
        return reshard(a, _explicit(self.mesh, spec)) if _has_explicit(self.mesh) else a

    def as_rows(self, a: Array) -> Array:
        """`a` [N], over the axes of the examples as they came."""
        if not _has_explicit(self.mesh):
            return a
        with use_abstract_mesh(self.mesh):
            return reshard(a, _explicit(self.mesh, P(self.given)))


def checked_head(
    function: str, hidden: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None
) -> Head:
    """The head, hidden and kernel in their common dtype, the bias in that of the computation."""
    h = _checks.real_array(function, "hidden", hidden)
    w = _checks.real_array(function, "kernel", kernel)
    if h.ndim == 0:
        raise ValueError(_checks.message(function, "hidden", "of rank >= 1", "shape ()"))
    _checks.same_rank(function, "kernel", w, 2)
    if w.shape[0] != h.shape[-1]:
        expected = f"of shape ({h.shape[-1]}, V), as hidden has {h.shape[-1]} features"
        raise ValueError(_checks.message(function, "kernel", expected, f"shape {w.shape}"))
    dtype = jnp.promote_types(h.dtype, w.dtype)
    b = None
    if bias is not None:
        b = _checks.real_array(function, "bias", bias)
        _checks.same_shape(function, "bias", b, w.shape[1:])
        b = b.astype(compute_dtype(dtype))
    return Head(h.astype(dtype), w.astype(dtype), b)


def checked_scalars(
    function: str,
    dtype,
    softcap: ArrayLike | None,
    temperature: ArrayLike,
    z_loss: ArrayLike = 0.0,
) -> Scalars:
    """The options that are one number, and None where they change nothing."""
    cap = t = z = None
    if softcap is not None:
        cap = _checks.positive_scalar(function, "softcap", softcap).astype(dtype)
    if not _is_number(temperature, 1):
        t = _checks.positive_scalar(function, "temperature", temperature).astype(dtype)
    if not _is_number(z_loss, 0):
        z = _checks.real_array(function, "z_loss", z_loss).astype(dtype)
        _checks.same_shape(function, "z_loss", z, ())
    return Scalars(cap, t, z)


def checked_targets(
    function: str,
    head: Head,
    labels: Labels,
    label_smoothing: ArrayLike,
    class_weights: ArrayLike | None,
    ignore_index: int | None,
) -> Targets:
    """Labels of any kind and the options that act on them, as target masses."""
    dtype, classes = compute_dtype(head.hidden.dtype), head.kernel.shape[1]
    _checks.unit_interval(function, "label_smoothing", label_smoothing)
    e = None
    if not _is_number(label_smoothing, 0):
        e = _checks.real_array(function, "label_smoothing", label_smoothing).astype(dtype)
    w = None
    if class_weights is not None:
        _checks.not_negative(function, "class_weights", class_weights)
        w = _checks.real_array(function, "class_weights", class_weights).astype(dtype)
        _checks.same_shape(function, "class_weights", w, (classes,))
    kept = jnp.ones((), dtype) if e is None else 1 - e
    spread = None
    if e is not None:
        spread = jnp.broadcast_to(e / max(classes, 1), classes) * (1 if w is None else w)

    if is_class_indices(labels, function):
        _checks.same_shape(function, "labels", labels, head.lead)
        index, bad, ignored = class_indices(function, labels, classes, ignore_index)
        mass = jnp.broadcast_to(kept, index.shape) if w is None else kept * looked_up(w, index)
        if bad is not None:
            mass = jnp.where(bad, jnp.nan, mass)
        if ignored is not None:
            mass = jnp.where(ignored, 0, mass)
        return Targets(index[..., None], mass[..., None], None, spread, None, ignored)

    if ignore_index is not None:
        expected = "None where labels are a distribution"
        raise TypeError(_checks.message(function, "ignore_index", expected, ignore_index))
    if isinstance(labels, TopKLabels):
        index, probabilities = sparse_distribution(function, labels, (*head.lead, classes))
        mass = kept * probabilities.astype(dtype) * (1 if w is None else looked_up(w, index))
        return Targets(index, mass, None, spread, None, None)

    _checks.not_negative(function, "labels", labels)
    dense = _checks.real_array(function, "labels", labels)
    _checks.same_shape(function, "labels", dense, (*head.lead, classes))
    factors = None
    if e is not None or w is not None:
        factors = jnp.broadcast_to(kept, classes) * (1 if w is None else w)
    return Targets(None, None, dense, spread, factors, None)


def checked_weights(function: str, weights: ArrayLike | None, head: Head) -> Array | None:
    """The weights of the examples, [...]."""
    if weights is None:
        return None
    _checks.not_negative(function, "weights", weights)
    w = _checks.real_array(function, "weights", weights)
    _checks.same_shape(function, "weights", w, head.lead)
    return w.astype(compute_dtype(head.hidden.dtype))


def checked_budget(function: str, max_temp_bytes: int | None) -> None:
    if max_temp_bytes is None:
        return
    if not isinstance(max_temp_bytes, int) or isinstance(max_temp_bytes, bool):
        expected = "an integer or None"
        raise TypeError(_checks.message(function, "max_temp_bytes", expected, repr(max_temp_bytes)))
    if max_temp_bytes <= 0:
        raise ValueError(_checks.message(function, "max_temp_bytes", "> 0", max_temp_bytes))


def layout_of(
    function: str,
    lead: Lead,
    kernel: Array,
    class_axis: str | Names | None,
    feature_axis: str | Names | None,
) -> Layout | None:
    """The layout, or None where nothing is known to be sharded.

    Explicit axes are in the types of the examples and of kernel [D, V]. Those of an Auto mesh are
    not: the arguments tell, and the examples are over all axes but those of the classes.
    """
    meshes = lead.mesh, jax.typeof(kernel).sharding.mesh, get_abstract_mesh()
    mesh = next((m for m in meshes if not m.empty), None)
    told = class_axis is not None or feature_axis is not None
    of_kernel = jax.typeof(kernel).sharding.spec
    classes = entry_names(of_kernel[1]) + _checked_names(function, "class_axis", class_axis, mesh)
    features = entry_names(of_kernel[0]) + _checked_names(
        function, "feature_axis", feature_axis, mesh
    )
    if mesh is None:
        return None
    if shared := set(classes) & set(features):
        expected = f"other axes than the classes have, {classes}"
        raise ValueError(_checks.message(function, "feature_axis", expected, shared))
    given = tuple(name for name in lead.every if name not in classes)
    if told:
        given += tuple(name for name in axes_of_type(mesh, AxisType.Auto) if name not in classes)
    rows = given + tuple(name for name in features if name not in given)
    layout = Layout(mesh, given, rows, features, classes)
    if kernel.shape[0] % layout.size(features):
        expected = f"over devices that divide the {kernel.shape[0]} features"
        raise ValueError(_checks.message(function, "feature_axis", expected, repr(feature_axis)))
    if not told and math.prod(lead.shape) % layout.size(rows):
        # More axes than the examples can be over: the kernel is gathered before.
        layout = Layout(mesh, given, given, (), classes)
    return layout if layout.rows or classes else None


def _is_number(option: ArrayLike, value: float) -> bool:
    return isinstance(option, (int, float)) and option == value


def _checked_names(
    function: str, argument: str, axis: str | Names | None, mesh: AbstractMesh | None
) -> Names:
    """The name of an axis, or names, as a tuple of names of Auto axes."""
    if axis is None:
        return ()
    names = (axis,) if isinstance(axis, str) else axis
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        expected = "the name of an axis of a mesh, a tuple of names or None"
        raise TypeError(_checks.message(function, argument, expected, repr(axis)))
    if mesh is None:
        expected = "None where no argument is on a mesh and none is set"
        raise ValueError(_checks.message(function, argument, expected, repr(axis)))
    auto = axes_of_type(mesh, AxisType.Auto)
    if not set(names) <= set(auto) or len(set(names)) < len(names):
        expected = f"among the Auto axes of the mesh, {auto}"
        raise ValueError(_checks.message(function, argument, expected, repr(axis)))
    return names


def _has_explicit(mesh: AbstractMesh) -> bool:
    return bool(axes_of_type(mesh, AxisType.Explicit))


def _explicit(mesh: AbstractMesh, spec: P) -> P:
    """`spec` without Auto axes, which no type has."""
    names = axes_of_type(mesh, AxisType.Explicit)
    return P(*(tuple(name for name in entry_names(entry) if name in names) for entry in spec))

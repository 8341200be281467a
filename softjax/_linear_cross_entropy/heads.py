"""Checks of the arguments of a linear head: the head, scalars, labels and weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._checks import is_number
from softjax._labels import (
    Labels,
    TopKLabels,
    class_indices,
    indices_of_shape,
    is_class_indices,
    refuse_floating_indices,
    refuse_ignore_index,
    sparse_distribution,
)
from softjax._linear_cross_entropy.blocks import Classes, Rows, Scalars, TransposedClasses
from softjax._linear_cross_entropy.layout import all_classes, at_class, manual_axes
from softjax._numerics import compute_dtype
from softjax._sharding import mesh_of
from softjax._weights import in_unit


class Head(NamedTuple):
    """hidden [..., D], and the kernel and the bias of the classes."""

    hidden: Array
    classes: Classes

    @property
    def lead(self) -> tuple[int, ...]:
        """The shape of the examples."""
        return self.hidden.shape[:-1]


class Targets(NamedTuple):
    """The targets: (index, mass) [..., k] or `dense` [..., V], and the effects of the options."""

    index: Array | None
    mass: Array | None
    dense: Array | None
    spread: Array | None
    class_weights: Array | None
    ignored: Array | None  # [...]
    costs: Array | None  # [...], sum_k q_k c_k with the class weights c; None if all are 1

    @property
    def of_examples(self) -> tuple[Array | None, ...]:
        """The arrays whose leading axes are the axes of the examples."""
        return self.index, self.mass, self.dense, self.ignored, self.costs


def checked_head(
    function: str,
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    transpose_kernel: bool,
    prefix: str = "",
) -> Head:
    """The head, with hidden and kernel in their common dtype and the bias in the wide dtype.

    In errors, the prefix precedes the names of the arguments.
    """
    transpose_kernel = _checks.flag(function, "transpose_kernel", transpose_kernel)
    axis = 0 if transpose_kernel else 1
    of_hidden, of_kernel, of_bias = (prefix + name for name in ("hidden", "kernel", "bias"))
    h = _checks.real_array(function, of_hidden, hidden)
    w = _checks.real_array(function, of_kernel, kernel)
    if h.ndim == 0:
        raise ValueError(_checks.message(function, of_hidden, "of rank >= 1", "shape ()"))
    _checks.same_rank(function, of_kernel, w, 2)
    # The sizes of the pieces depend on D and V.
    for argument, sizes in ((of_kernel, w.shape), (of_hidden, h.shape[-1:])):
        if not all(isinstance(size, int) for size in sizes):
            expected = "of known D and V (jax.export may leave open how many examples there are)"
            raise ValueError(_checks.message(function, argument, expected, f"sizes {sizes}"))
    features = h.shape[-1]
    if w.shape[1 - axis] != features:
        shape = f"({features}, V)" if axis else f"(V, {features})"
        expected = f"of shape {shape}, as hidden has {features} features"
        text = _checks.message(function, of_kernel, expected, f"shape {w.shape}")
        if w.shape[axis] == features:
            other = f"pass transpose_kernel={not transpose_kernel}"
            text += f" Its transpose would be: {of_kernel}.T, or {other} for all kernels."
        raise ValueError(text)
    dtype = jnp.promote_types(h.dtype, w.dtype)
    b = None
    if bias is not None:
        b = _checks.real_array(function, of_bias, bias)
        _checks.same_shape(function, of_bias, b, (w.shape[axis],))
        b = b.astype(compute_dtype(dtype))
    classes = TransposedClasses if transpose_kernel else Classes
    return Head(h.astype(dtype), classes(w.astype(dtype), b))


def checked_scalars(
    function: str,
    head: Head,
    softcap: ArrayLike | None,
    temperature: ArrayLike,
    z_loss: ArrayLike = 0.0,
) -> Scalars:
    """The scalar options; None for an option that has no effect."""
    cap = t = z = None
    dtype = compute_dtype(head.hidden.dtype)
    if softcap is not None:
        cap = _checks.positive_scalar(function, "softcap", softcap, dtype)
    if not is_number(temperature, 1):
        t = _checks.positive_scalar(function, "temperature", temperature, dtype)
    if not is_number(z_loss, 0):
        z = _checks.not_negative_scalar(function, "z_loss", z_loss, dtype)
    return Scalars(cap, t, z)


def checked_targets(
    function: str,
    head: Head,
    labels: Labels,
    label_smoothing: ArrayLike,
    class_weights: ArrayLike | None,
    ignore_index: int | None,
    class_axis: str | tuple[str, ...] | None,
    *,
    with_costs: bool = False,
    z_loss: ArrayLike = 0.0,
) -> Targets:
    """Labels of any kind, with the options that change them, as target masses."""
    dtype, own = compute_dtype(head.hidden.dtype), head.classes.length
    classes, names = all_classes(head.classes, class_axis), manual_axes(mesh_of(()), class_axis)
    e = None
    if not is_number(label_smoothing, 0):
        e = _checks.unit_interval(function, "label_smoothing", label_smoothing, dtype)
    if ignore_index is not None:
        ignore_index = _checks.integer(function, "ignore_index", ignore_index)
    w = _checks.weights(function, "class_weights", class_weights, (own,), dtype)
    if w is not None and with_costs and not names and is_number(z_loss, 0):
        w = jax.jit(in_unit)(w)  # their scale does not matter
    kept = jnp.ones((), dtype) if e is None else 1 - e
    spread = None
    if e is not None:
        spread = jnp.broadcast_to(e / max(classes, 1), own) * (1 if w is None else w)

    if is_class_indices(labels, function):
        indices_of_shape(function, labels, head.lead)
        index, bad, ignored = class_indices(function, labels, classes, ignore_index)
        costs = None if w is None else at_class(names, w, index)
        mass = jnp.broadcast_to(kept, index.shape) if costs is None else kept * costs
        mass = _checks.nan_where(bad, mass)
        if ignored is not None:
            mass = jnp.where(ignored, 0, mass)
        costs = costs if with_costs else None
        return Targets(index[..., None], mass[..., None], None, spread, None, ignored, costs)

    refuse_ignore_index(function, labels, ignore_index, len(head.lead) + 1)
    if isinstance(labels, TopKLabels):
        index, probabilities = sparse_distribution(function, labels, (*head.lead, classes))
        mass = probabilities.astype(dtype) * (1 if w is None else at_class(names, w, index))
        costs = jnp.sum(mass, -1) if with_costs else None
        return Targets(index, kept * mass, None, spread, None, None, costs)

    dense = _checks.real_array(function, "labels", labels)
    refuse_floating_indices(function, dense, len(head.lead) + 1)
    _checks.same_shape(function, "labels", dense, (*head.lead, own))
    _checks.not_negative(function, "labels", labels)
    factors = None
    if e is not None or w is not None:
        factors = jnp.broadcast_to(kept, own) * (1 if w is None else w)
    costs = None
    if with_costs:
        costs = jnp.sum(dense.astype(dtype) * (1 if w is None else w), -1)
        costs = jax.lax.psum(costs, names) if names else costs
    return Targets(None, None, dense, spread, factors, None, costs)


def checked_labels(
    name: str,
    head: Head,
    labels: ArrayLike | None,
    ignore_index: int | None,
    class_axis: str | tuple[str, ...] | None,
    **of_loss: Any,
) -> tuple[Rows, Array | None, Array | None]:
    """Rows with all labels of each, the mass that smoothing spreads, and the costs of the examples.

    The mass of a label is 1, or 0 if it is ignored, or NaN if it is bad. If there is one label for
    each example, it occurs twice, the second time with its mass in the loss.
    """
    if labels is None:
        return Rows(head.hidden), None, None
    shape = _checks.shape_of(labels)
    if len(shape) != len(head.lead) + 1 or shape[:-1] != head.lead:
        _checks.same_shape(name, "labels", labels, head.lead)
        options = {"ignore_index": ignore_index, "class_axis": class_axis, **of_loss}
        targets = checked_targets(name, head, labels, **options)
        index, mass = _doubled(targets.index, targets.mass, targets.ignored)
        active = None if targets.ignored is None else ~targets.ignored
        return Rows(head.hidden, index, mass, None, active), targets.spread, targets.costs
    if ignore_index is not None:
        ignore_index = _checks.integer(name, "ignore_index", ignore_index)
    classes = all_classes(head.classes, class_axis)
    index, bad, ignored = class_indices(name, labels, classes, ignore_index)
    mass = _checks.nan_where(bad, jnp.ones(shape, compute_dtype(head.hidden.dtype)))
    mass = mass if ignored is None else jnp.where(ignored, 0, mass)
    return Rows(head.hidden, index, mass), None, None


@jax.jit
def _doubled(index: Array, mass: Array, ignored: Array | None) -> tuple[Array, Array]:
    """The label twice: first with the mass 1, 0 or NaN, then with its own mass."""
    mark = jnp.where(jnp.isnan(mass), mass, 1)
    mark = mark if ignored is None else jnp.where(ignored[..., None], 0, mark)
    return jnp.concatenate((index, index), -1), jnp.concatenate((mark, mass), -1)


def checked_weights(function: str, weights: ArrayLike | None, head: Head) -> Array | None:
    dtype = compute_dtype(head.hidden.dtype)
    return _checks.weights(function, "weights", weights, head.lead, dtype)

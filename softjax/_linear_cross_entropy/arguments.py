"""The arguments of a linear head and its loss: checked, and brought to one form."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
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
from softjax._sharding import looked_up


class Head(NamedTuple):
    """hidden [N, D], kernel [D, V] and bias [V], and the leading shape that N stands for."""

    hidden: Array
    kernel: Array
    bias: Array | None
    lead: tuple[int, ...]


class Targets(NamedTuple):
    """The targets of N rows: (index, mass) [N, k] or `dense` [N, V], and what the options add."""

    index: Array | None
    mass: Array | None
    dense: Array | None
    spread: Array | None
    class_weights: Array | None
    ignored: Array | None  # [N]


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
    *lead, features = h.shape
    h = h.reshape(math.prod(lead), features)
    return Head(h.astype(dtype), w.astype(dtype), b, tuple(lead))


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
            mass, ignored = jnp.where(ignored, 0, mass), ignored.reshape(-1)
        return Targets(index.reshape(-1, 1), mass.reshape(-1, 1), None, spread, None, ignored)

    if ignore_index is not None:
        expected = "None where labels are a distribution"
        raise TypeError(_checks.message(function, "ignore_index", expected, ignore_index))
    if isinstance(labels, TopKLabels):
        index, probabilities = sparse_distribution(function, labels, (*head.lead, classes))
        mass = kept * probabilities.astype(dtype) * (1 if w is None else looked_up(w, index))
        flat = len(head.hidden), index.shape[-1]
        return Targets(index.reshape(flat), mass.reshape(flat), None, spread, None, None)

    _checks.not_negative(function, "labels", labels)
    dense = _checks.real_array(function, "labels", labels)
    _checks.same_shape(function, "labels", dense, (*head.lead, classes))
    factors = None
    if e is not None or w is not None:
        factors = jnp.broadcast_to(kept, classes) * (1 if w is None else w)
    flat = len(head.hidden), classes
    return Targets(None, None, dense.reshape(flat), spread, factors, None)


def checked_weights(function: str, weights: ArrayLike | None, head: Head) -> Array | None:
    """The weights of the examples, [N]."""
    if weights is None:
        return None
    _checks.not_negative(function, "weights", weights)
    w = _checks.real_array(function, "weights", weights)
    _checks.same_shape(function, "weights", w, head.lead)
    return w.reshape(-1).astype(compute_dtype(head.hidden.dtype))


def checked_budget(function: str, max_temp_bytes: int | None) -> None:
    if max_temp_bytes is None:
        return
    if not isinstance(max_temp_bytes, int) or isinstance(max_temp_bytes, bool):
        expected = "an integer or None"
        raise TypeError(_checks.message(function, "max_temp_bytes", expected, repr(max_temp_bytes)))
    if max_temp_bytes <= 0:
        raise ValueError(_checks.message(function, "max_temp_bytes", "> 0", max_temp_bytes))


def _is_number(option: ArrayLike, value: float) -> bool:
    return isinstance(option, (int, float)) and option == value

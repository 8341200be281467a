"""linear_cross_entropy: arguments, checks, and the reduction of the losses."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import Labels, TopKLabels, class_indices, is_class_indices
from softjax._linear_cross_entropy.blocks import Classes, Rows, Scalars
from softjax._linear_cross_entropy.chunked import Arguments, each, total
from softjax._numerics import compute_dtype

NAME = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: Labels,
    bias: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Literal["none", "sum", "mean"] = "none",
    weights: ArrayLike | None = None,
    max_temp_bytes: int | None = None,
) -> Array:
    """x"""
    return _reduced(*head_arguments(NAME, hidden, kernel, labels, bias, label_smoothing, class_weights, ignore_index, z_loss, softcap, temperature, weights), reduction, max_temp_bytes)


def head_arguments(function, hidden, kernel, labels, bias, label_smoothing, class_weights, ignore_index, z_loss, softcap, temperature, weights):
    hidden = _checks.real_array(function, "hidden", hidden)
    kernel = _checks.real_array(function, "kernel", kernel)
    dtype = jnp.promote_types(hidden.dtype, kernel.dtype)
    hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    wide = compute_dtype(dtype)
    lead, V = hidden.shape[:-1], kernel.shape[-1]
    flat = lambda a: a.reshape(-1, *a.shape[len(lead):])
    e = None if isinstance(label_smoothing, (int, float)) and label_smoothing == 0 else jnp.asarray(label_smoothing, wide)
    z = None if isinstance(z_loss, (int, float)) and z_loss == 0 else jnp.asarray(z_loss, wide)
    T = None if isinstance(temperature, (int, float)) and temperature == 1 else _checks.positive_scalar(function, "temperature", temperature).astype(wide)
    cap = None if softcap is None else _checks.positive_scalar(function, "softcap", softcap).astype(wide)
    cw = None if class_weights is None else _checks.real_array(function, "class_weights", class_weights).astype(wide)
    b = None if bias is None else _checks.real_array(function, "bias", bias).astype(wide)
    w = None if weights is None else _checks.real_array(function, "weights", weights).astype(wide)
    index = mass = dense = factors = active = None
    keep = 1 if e is None else 1 - e
    if isinstance(labels, TopKLabels):
        index, bad, _ = class_indices(function, labels.indices, V)
        mass = jnp.asarray(labels.probabilities).astype(wide) * keep
        if cw is not None: mass = mass * cw[index]
        if bad is not None: mass = jnp.where(bad, jnp.nan, mass)
        index, mass = flat(index), flat(mass)
    elif is_class_indices(labels, function):
        index, bad, ignored = class_indices(function, labels, V, ignore_index)
        mass = jnp.ones(index.shape, wide) * keep
        if cw is not None: mass = mass * cw[index]
        if bad is not None: mass = jnp.where(bad, jnp.nan, mass)
        if ignored is not None:
            active = ~ignored
            mass = jnp.where(ignored, 0, mass)
            w = jnp.where(ignored, 0, 1 if w is None else w).astype(wide)
        index, mass = flat(index)[:, None], flat(mass)[:, None]
    else:
        dense = flat(jnp.asarray(labels))
        if cw is not None or e is not None:
            factors = keep * (jnp.ones(V, wide) if cw is None else cw)
    spread = None if e is None else e / V * (jnp.ones(V, wide) if cw is None else cw)
    if w is not None:
        w = flat(w)
        active = w != 0
    args = Arguments(Rows(flat(hidden), index, mass, dense, active), Classes(kernel, b, spread, factors), Scalars(cap, T, z))
    return args, w, lead


def _reduced(args, w, lead, reduction, budget):
    n = args.rows.hidden.shape[0]
    wide = compute_dtype(args.rows.hidden.dtype)
    if reduction == "none":
        l = each(args, budget)
        if w is not None: l = l * w
        return l.reshape(lead)
    scale = jnp.ones(n, wide) if w is None else w
    if reduction == "mean":
        tot = jnp.sum(scale)
        scale = scale / jnp.where(tot == 0, 1, tot)
    return total(args, scale, budget)

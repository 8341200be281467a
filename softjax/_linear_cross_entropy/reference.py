"""The plain form of linear_cross_entropy, with the same signature: all logits, then the loss."""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._cross_entropy import cross_entropy, weighted_mean
from softjax._labels import Labels
from softjax._numerics import compute_dtype


def linear_cross_entropy(
    hidden: Array,
    kernel: Array,
    labels: Labels,
    bias: Array | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Literal["none", "sum", "mean"] = "none",
    weights: Array | None = None,
    class_axis: str | tuple[str, ...] | None = None,
    feature_axis: str | tuple[str, ...] | None = None,
    max_temp_bytes: int | None = None,
) -> Array:
    """softjax.linear_cross_entropy as a user would write it; the last three have no effect."""
    del class_axis, feature_axis, max_temp_bytes
    dtype = compute_dtype(hidden.dtype)
    x = jnp.matmul(hidden, kernel, preferred_element_type=dtype)
    x = x if bias is None else x + bias.astype(dtype)
    if softcap is not None:
        out = jnp.isneginf(x)  # a class that the bias takes out stays out
        x = jnp.where(out, -jnp.inf, softcap * jnp.tanh(jnp.where(out, 0, x) / softcap))
    losses = cross_entropy(
        x / temperature,
        labels,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        ignore_index=ignore_index,
        z_loss=z_loss,
    )
    w = jnp.ones_like(losses) if weights is None else weights.astype(dtype)
    if ignore_index is not None and not isinstance(labels, tuple):
        w = jnp.where(jnp.asarray(labels) == ignore_index, 0, w)
    if reduction == "mean":
        return weighted_mean(losses, w)
    losses = w * jnp.where(w == 0, 0, losses)
    return jnp.sum(losses) if reduction == "sum" else losses

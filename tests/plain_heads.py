"""The loss of a linear head computed from all logits, with which the tests compare."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

import softjax
from softjax._numerics import compute_dtype


def plain_linear_cross_entropy(
    hidden: Array,
    kernel: Array,
    labels: Any,
    bias: Array | None = None,
    *,
    transpose_kernel: bool = False,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    **options: Any,
) -> Array:
    """The loss computed from all logits, as a user would write it."""
    dtype = compute_dtype(hidden.dtype)
    kernel = kernel.T if transpose_kernel else kernel
    x = jnp.matmul(hidden, kernel, preferred_element_type=dtype)
    x = x if bias is None else x + bias.astype(dtype)
    if softcap is not None:
        out = jnp.isneginf(x)  # a class that the bias removes stays removed
        x = jnp.where(out, -jnp.inf, softcap * jnp.tanh(jnp.where(out, 0, x) / softcap))
    return softjax.cross_entropy(x / temperature, labels, **options)

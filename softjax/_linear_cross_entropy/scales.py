"""What the loss of each example counts in a sum or a mean, and the sum with these scales."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from softjax._linear_cross_entropy.blocks import Rows
from softjax._numerics import compute_dtype
from softjax._sharding import axes_of, varying
from softjax._weights import is_zero, shares


def taking_part(rows: Rows, weights: Array | None) -> Rows:
    """The rows with those of weight 0 inactive."""
    if weights is None:
        return rows
    counted = ~is_zero(weights)
    return rows._replace(active=counted if rows.active is None else rows.active & counted)


def without_the_others(rows: Rows) -> Rows:
    """The rows with the features of those that take no part set to 0.

    These features may be anything, and 0 * inf is not 0.
    """
    if rows.active is None:
        return rows
    return rows._replace(hidden=jnp.where(rows.active[:, None], rows.hidden, 0))


def scale_of(rows: Rows, weights: Array | None, costs: Array | None, reduction: str) -> Array:
    """What the loss of each row counts in a sum or a mean."""
    count, active = rows.hidden.shape[0], rows.active
    scale = jnp.ones(count, compute_dtype(rows.hidden.dtype)) if weights is None else weights
    scale = varying(scale, axes_of(rows.hidden))
    if reduction in ("none", "sum"):
        return scale if active is None else jnp.where(active, scale, 0)
    if weights is active is costs is None:
        # The number of examples is known without any communication on a mesh.
        return scale / jnp.maximum(jnp.asarray(count, scale.dtype), 1)
    return shares(scale, True if active is None else active, costs)


def scaled_total(total: Callable[[Array], Array], scale: Array, *dtypes: jnp.dtype) -> Array:
    """total(scale), a sum of scaled losses, whose products have operands of these dtypes.

    In float16 the gradient of a logit times 1 / N would be lost below the range of the dtype, so
    that the largest scale is a factor of the sum.
    """
    if jnp.float16 not in dtypes:
        return total(scale)
    largest = jax.lax.stop_gradient(jnp.max(scale, initial=jnp.finfo(scale.dtype).tiny))
    return largest * total(scale / largest)

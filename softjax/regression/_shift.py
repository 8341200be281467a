"""Sparse columns that store an entry for every example, around their means.

Such a column, as a year or a temperature beside many one-hot columns, may be far from 0. Its mean c
can be taken from what is stored, and no place is filled: with x' = x - 1 c^T,

    X kernel + bias = X' kernel + (bias + kernel^T c).

The kernel, and with it the penalty, stays what it is. Columns with places that are empty keep what
they store: their standard deviation is no smaller than their mean / N^(1/2).
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from softjax import _checks
from softjax.regression._model import SoftmaxRegression
from softjax.regression._sparse import column_of, stored_mass, with_data

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO


def shift(x: "BCOO") -> "tuple[BCOO, Array | None]":
    """The features around the centres c [D], and c; None where no column stores all its places."""
    shifted, centre = _shifted(x)
    known = _checks.known(centre)
    return (x, None) if known is not None and not known.any() else (shifted, centre)


@jax.jit
def inside(centre: Array, params: SoftmaxRegression) -> SoftmaxRegression:
    """The parameters of the features around `centre`; of a stack of fits too."""
    kernel, bias = params
    return SoftmaxRegression(kernel, bias + jnp.einsum("d,...dk->...k", centre, kernel))


@jax.jit
def outside(centre: Array, params: SoftmaxRegression) -> SoftmaxRegression:
    """The parameters of the features as they are: the inverse of `inside`."""
    return inside(-centre, params)


@jax.jit
def _shifted(x: "BCOO") -> "tuple[BCOO, Array]":
    examples, width = x.shape
    whole = stored_mass(x, jnp.ones(examples, jnp.int32)) == examples
    total = jnp.zeros(width, x.dtype)
    for _ in range(2):  # the second time of small numbers, whose sum is accurate
        sums = jnp.zeros(width, x.dtype).at[x.indices[:, 1]].add(x.data, mode="drop")
        centre = jnp.where(whole, sums / examples, 0)
        x, total = with_data(x, x.data - column_of(x, centre)), total + centre
    return x, total

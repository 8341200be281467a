"""Sparse features, BCOO [N, D] without batch or dense dimensions, and one form for a fit.

A fit is given features that store every entry once, so that their squares are the squares of what
is stored, and so on for every function of the entries.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._numerics import compute_dtype

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO, BCSR

    Features: TypeAlias = ArrayLike | BCOO | BCSR


def is_sparse(x: Any) -> "TypeGuard[BCOO]":
    """Whether `x` is BCOO: without the import of what makes it, which brings scipy along."""
    module = sys.modules.get("jax.experimental.sparse")
    return module is not None and isinstance(x, module.BCOO)


def is_sparse_matrix(x: Any) -> bool:
    """Whether `x` is one of the sparse formats of JAX."""
    module = sys.modules.get("jax.experimental.sparse")
    return module is not None and isinstance(x, module.JAXSparse)


def sparse_array(function: str, argument: str, x: Any) -> "BCOO":
    """BCOO or BCSR as BCOO [N, D] of real numbers, at least float32."""
    from jax.experimental.sparse import BCSR

    expected = "BCOO or BCSR of shape (examples, features), without batch or dense dimensions"
    if isinstance(x, BCSR) and x.ndim == 2:
        x = x.to_bcoo()
    if not is_sparse(x):
        raise TypeError(_checks.message(function, argument, expected, type(x).__name__))
    if x.ndim != 2 or x.n_batch or x.n_dense:
        got = f"shape {x.shape}, of which {x.n_batch} batch and {x.n_dense} dense dimensions"
        raise ValueError(_checks.message(function, argument, expected, got))
    data = _checks.real_array(function, argument, x.data)
    return with_data(x, data.astype(compute_dtype(data.dtype)))


def with_data(x: "BCOO", data: Array) -> "BCOO":
    """`x` with other numbers in the same places."""
    return type(x)(
        (data, x.indices),
        shape=x.shape,
        indices_sorted=x.indices_sorted,
        unique_indices=x.unique_indices,
    )


def without_duplicates(x: "BCOO") -> "BCOO":
    """`x` with the sum of the entries of one place as one entry."""
    if x.unique_indices:
        return x
    indices = _checks.known(x.indices)
    if indices is not None:
        # Most files are in order already, which costs no sort to see.
        rows, columns = indices.astype(np.int64).T
        place = rows * (x.shape[1] + 1) + columns
        if np.all(np.diff(place) > 0) or len(np.unique(place)) == len(place):
            return type(x)((x.data, x.indices), shape=x.shape, unique_indices=True)
        return x.sum_duplicates()
    return x.sum_duplicates(nse=x.nse)


def column_of(x: "BCOO", of_columns: Array) -> Array:
    """[nse]: for every entry what is known of its column; 0 for an entry that only pads."""
    return of_columns.at[x.indices[:, 1]].get(mode="fill", fill_value=0)


def stored_mass(x: "BCOO", weights: Array) -> Array:
    """[D]: the weights of the examples that have an entry in each column, summed."""
    rows, columns = x.indices[:, 0], x.indices[:, 1]
    mass = weights.at[rows].get(mode="fill", fill_value=0)
    return jnp.zeros(x.shape[1], weights.dtype).at[columns].add(mass, mode="drop")


def largest_entries(x: "BCOO") -> Array:
    """[D]: the largest absolute entry of each column."""
    zeros = jnp.zeros(x.shape[1], x.dtype)
    return zeros.at[x.indices[:, 1]].max(jnp.abs(x.data), mode="drop")

"""Rows of weight 0, so that small data of many sizes come in few shapes.

A program is compiled once for each shape, which takes a hundred times as long as a fit to a small
table. So the rows are brought to a power of two, and no fewer than a pass over them is free of:
the folds of a cross-validation, and tables of nearly any size, share one program. What is added are
rows that are there already, of weight 0: no sum changes, nor any extreme, and the targets are those
of the rows alone to the last bit, since w / N is multiplied with a power of two and divided by it.

Data beyond LARGEST numbers stay as they are: their fits take longer than a compilation, and a copy
of their features would take memory. So do those of fewer rows than half of the columns where the
added rows would make them other than wide.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax import _checks
from softjax.regression._arguments import is_at_hand
from softjax.regression._objective import Data
from softjax.regression._sparse import is_sparse

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# Numbers, of the features and the logits.
SMALLEST, LARGEST = 2**16, 2**20
FEWEST_ROWS, FEWEST_ENTRIES = 2**11, 2**12


def in_bucket(data: Data, num_classes: int) -> Data:
    """The data with as many rows of weight 0 as bring them to a usual shape."""
    x, (examples, width) = data.features, data.features.shape
    entries = x.nse if is_sparse(x) else examples * width
    leaves = jax.tree.leaves(data)
    on_one_device = all(_checks.is_concrete(leaf) for leaf in leaves) and all(
        len(leaf.devices()) == 1 for leaf in leaves if isinstance(leaf, Array)
    )
    if not on_one_device or entries + examples * num_classes > LARGEST:
        return data
    size = _rows(examples, entries // examples + num_classes)
    if (2 * examples <= width) != (2 * size <= width):
        return data
    places = np.arange(size) % examples  # rows that are there, so that no extreme changes
    weights = np.ones(examples, x.dtype) if data.weights is None else np.asarray(data.weights)
    padded = np.zeros(size, x.dtype)
    padded[:examples] = weights / x.dtype.type(examples) * size
    count = np.asarray(examples if data.count is None else data.count, x.dtype)
    return data._replace(
        features=_with_entries(x, size) if is_sparse(x) else _taken(x, places),
        labels=_taken(data.labels, places),
        weights=jnp.asarray(padded),
        count=count,
        offset=None if data.offset is None else _taken(data.offset.T, places).T,
    )


def _rows(examples: int, row_size: int) -> int:
    """The number of rows of the bucket: a power of two."""
    least = min(FEWEST_ROWS, _power_of_two(SMALLEST // row_size + 1) // 2)
    return max(_power_of_two(examples), least)


def _power_of_two(number: int) -> int:
    """The smallest one that is no smaller than `number`."""
    return 1 << max(number - 1, 0).bit_length()


def _taken(x: Any, places: np.ndarray) -> Array:
    # NumPy has nothing to compile.
    return jnp.asarray(np.asarray(x)[places]) if is_at_hand(x) else x[places]


def _with_entries(x: "BCOO", size: int) -> "BCOO":
    """`x` with `size` rows. New rows are empty, and new entries lie outside of the matrix."""
    entries = max(_power_of_two(x.nse), FEWEST_ENTRIES)
    shape = (size, x.shape[1])
    data, indices = np.zeros(entries, x.dtype), np.full((entries, 2), shape, np.int32)
    data[: x.nse], indices[: x.nse] = np.asarray(x.data), np.asarray(x.indices)
    return type(x)((jnp.asarray(data), jnp.asarray(indices)), shape=shape, unique_indices=True)

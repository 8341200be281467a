"""Features, dense or sparse, and products with them.

Sparse features are BCOO [N, D] without batch or dense dimensions. In a fit they store every entry
once, so that a function f of the entries with f(0) = 0 can be applied to the stored entries.
Products are in full precision and do not copy the features.
"""

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from softjax import _checks
from softjax._numerics import compute_dtype
from softjax._platforms import platform_dependent
from softjax._sharding import fori_loop, mesh_of

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO, BCSR

    Features: TypeAlias = ArrayLike | BCOO | BCSR  # what the public functions take
    Matrix: TypeAlias = Array | BCOO  # the same, checked
else:  # jax.experimental.sparse would load SciPy
    Features = Matrix = Any


def is_sparse(x: Any) -> "TypeGuard[BCOO]":
    """Whether `x` is BCOO, without an import of jax.experimental.sparse, which loads SciPy."""
    module = sys.modules.get("jax.experimental.sparse")
    return module is not None and isinstance(x, module.BCOO)


def is_sparse_matrix(x: Any) -> bool:
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


def dense_or_sparse(function: str, features: Any) -> Any:
    """Features that are real numbers, as a dense array or as BCOO."""
    read = sparse_array if is_sparse_matrix(features) else _checks.real_array
    return read(function, "features", features)


def with_data(x: "BCOO", data: Array) -> "BCOO":
    """`x` with other numbers at the same indices."""
    return type(x)(
        (data, x.indices),
        shape=x.shape,
        indices_sorted=x.indices_sorted,
        unique_indices=x.unique_indices,
    )


def without_duplicates(x: "BCOO") -> "BCOO":
    """`x` in which entries with the same index are replaced by their sum."""
    if x.unique_indices:
        return x
    indices = _checks.known(x.indices)
    if indices is not None:
        # Most features are in order already, which is seen without a sort.
        rows, columns = indices.astype(np.int64).T
        place = rows * (x.shape[1] + 1) + columns
        if np.all(np.diff(place) > 0) or len(np.unique(place)) == len(place):
            return type(x)((x.data, x.indices), shape=x.shape, unique_indices=True)
        data = _checks.known(x.data)
        if data is None:
            return x.sum_duplicates()
        # NumPy needs no compilation. Entries out of bounds are padding and are dropped.
        inside = (rows < x.shape[0]) & (columns < x.shape[1])
        place, own = np.unique(place[inside], return_inverse=True)
        entries = np.bincount(own, data[inside], len(place)).astype(data.dtype)
        parts = entries, np.stack(np.divmod(place, x.shape[1] + 1), 1).astype(indices.dtype)
        parts = map(jax.device_put, parts)
        return type(x)(tuple(parts), shape=x.shape, indices_sorted=True, unique_indices=True)
    return x.sum_duplicates(nse=x.nse)


def column_of(x: "BCOO", of_columns: Array) -> Array:
    """[nse]: the number `of_columns` of the column of every entry; 0 for padding."""
    return of_columns.at[x.indices[:, 1]].get(mode="fill", fill_value=0)


def stored_mass(x: "BCOO", weights: Array) -> Array:
    """[D]: the sum of the weights of the examples that store an entry in each column."""
    rows, columns = x.indices[:, 0], x.indices[:, 1]
    mass = weights.at[rows].get(mode="fill", fill_value=0)
    return jnp.zeros(x.shape[1], weights.dtype).at[columns].add(mass, mode="drop")


def stored_entries(x: "BCOO") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers, rows and columns of the entries of a known matrix, without padding."""
    data, (rows, columns) = np.asarray(x.data), np.asarray(x.indices).T
    inside = (rows < x.shape[0]) & (columns < x.shape[1])
    if inside.all():
        return data, rows, columns
    return data[inside], rows[inside], columns[inside]


def largest_entries(x: "BCOO") -> np.ndarray:
    """[D]: the largest absolute entry of each column, by NumPy, which needs no compilation."""
    (data, _, columns), size = stored_entries(x), np.zeros(x.shape[1], x.dtype)
    np.maximum.at(size, columns, np.abs(data))
    return size


def in_numpy(features: Any) -> np.ndarray:
    """Known dense or sparse features as a dense array [N, D] of float64."""
    if not is_sparse(features):
        return np.asarray(features, np.float64)
    data, *places = stored_entries(features)
    filled = np.zeros(features.shape)
    np.add.at(filled, tuple(places), data)
    return filled


P = ParamSpec("P")
R = TypeVar("R")
# A function of features with more than SMALL numbers is computed in blocks of columns, each of
# about BLOCK numbers and at least FEWEST_COLUMNS columns.
SMALL, BLOCK, FEWEST_COLUMNS = 2**20, 2**19, 16
# Several arrays [K, N] with this many numbers each stay in the cache of a CPU.
CACHED = 2**16


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with exact products of float32 numbers.

    Accelerators round the factors to ten bits or fewer by default. The length of a step and the end
    of a fit depend on inner products, which are cheap compared with products with the features.
    """

    @wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return precise


def product(a: Any, b: Any) -> Array:
    """a @ b, one of which may be BCOO.

    Accelerators round float32 factors to ten bits or fewer by default, which would show in the
    third digit of a loss. The products are bound by memory, so that exact factors cost little.
    """
    if is_sparse(a) or is_sparse(b):
        return a @ b
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def linear(x: Any, kernel: Array, bias: Array) -> Array:
    """x kernel + bias, [..., K], of dense features [..., D] or BCOO [N, D]."""
    z = product(x, kernel)
    return z + jnp.expand_dims(bias, range(z.ndim - 1))


def by_columns(function: Callable[..., Array], x: Array, *of_column: Array) -> Array:
    """function(x, *of_column), [D, ...], computed in blocks of columns without a copy of x [N, D].

    Row j of the result must depend only on column j of x and on the entries j of `of_column`, each
    [D]. Blocks of columns are used since the rows may be sharded. The last block overlaps the one
    before.
    """
    examples, width = x.shape
    if examples * width <= SMALL:
        return function(x, *of_column)
    size = min(max(BLOCK // examples, FEWEST_COLUMNS), width)
    firsts = np.minimum(np.arange(0, width, size), width - size).astype(np.int32)

    def of_block(first):
        own = (lax.dynamic_slice_in_dim(known, first, size) for known in of_column)
        return function(lax.dynamic_slice_in_dim(x, first, size, 1), *own)

    blocks = lax.map(of_block, jnp.asarray(firsts))
    last = width - size * (len(firsts) - 1)
    first = blocks[:-1].reshape(-1, *blocks.shape[2:])
    return jnp.concatenate([first, blocks[-1, size - last :]])


def by_examples(function: Callable[..., Any], weights: Array, x: Any, *of_classes: Array) -> Any:
    """function(weights, x, *of_classes), sums over the examples, computed in blocks on a CPU.

    With blocks of examples each operation on the logits of a block finds them in the cache. Sparse
    features and features on a mesh are not divided. The last block overlaps the one before; it
    gives the examples of both the weight 0, with which an example must add 0. The weights are [N]
    or [K, N], the features [N, D] or None, and `of_classes` [K, N].
    """
    examples = weights.shape[-1]
    sizes = [CACHED // len(a) for a in of_classes]
    size = min(sizes if x is None else [BLOCK // max(x.shape[1], 1), *sizes])
    if is_sparse(x) or 2 * size > examples or not size or not mesh_of((x, of_classes)).empty:
        return function(weights, x, *of_classes)

    def blocks(weights: Array, x: Any, *of_classes: Array) -> Any:
        def block(number: Any, total: Any) -> Any:
            first = jnp.minimum(number * size, examples - size)
            fresh = first + jnp.arange(size, dtype=np.int32) >= number * size
            fresh = jnp.expand_dims(fresh, range(weights.ndim - 1))
            slices = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
            w, *others = (slices(a, axis=-1) for a in (weights, *of_classes))
            rows = None if x is None else slices(x)
            return jax.tree.map(jnp.add, total, function(jnp.where(fresh, w, 0), rows, *others))

        sums = jax.eval_shape(function, weights, x, *of_classes)
        zeros = jax.tree.map(jnp.zeros_like, sums)
        return fori_loop(np.int32(0), np.int32(-(-examples // size)), block, zeros)

    return platform_dependent(weights, x, *of_classes, cpu=blocks, default=function)


def same_order(function: str, features: Any, **others: Any) -> None:
    """Refuses an object of pandas whose index has the values of the features' in another order.

    All arguments are matched by position, but pandas matches its objects by their indices.
    """
    index: Any = getattr(features, "index", None)
    if not hasattr(index, "equals") or not index.is_unique:
        return
    for argument, x in others.items():
        other: Any = getattr(x, "index", None)
        if not hasattr(other, "equals") or len(other) != len(index) or index.equals(other):
            continue
        if index.isin(other).all():
            expected = "in the order of the rows of the features"
            got = f"an index of the same values in another order; {argument}.loc[features.index] "
            got += f"aligns them, and numpy.asarray({argument}) is taken by position"
            raise ValueError(_checks.message(function, argument, expected, got))


def refuse_scales(function: str, argument: str, size: np.ndarray, dtype: DTypeLike) -> None:
    """Refuses columns whose squares would overflow or become 0.

    `size` holds the largest absolute entry of each column, [D].
    """
    limits = np.finfo(dtype)
    least, most = 10 * np.sqrt(limits.tiny), np.sqrt(limits.max) / 10
    bad = np.flatnonzero((size > most) | (size > 0) & (size < least))
    if len(bad):
        expected = f"of columns whose largest entry is 0 or in [{least:.0e}, {most:.0e}]"
        got = f"{size[bad[0]]:.0e} in column {bad[0]}"
        raise ValueError(_checks.message(function, argument, expected, got))

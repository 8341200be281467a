"""How a fit transforms its data: the coordinates, the dimensions, the rows and hidden features.

**Coordinates.** A feature far from 0, such as a year in float32, has a rounding error that is not
small relative to its variation, and each product with it adds as much noise to the logits.
Subtracting a middle c avoids this: x' = x - 1 c^T is exact where x is near c, and

    X kernel + bias = X' kernel + (bias + kernel^T c).

The kernel, and so every penalty, does not change. Dense features are shifted only if their rounding
matters, since x' is a copy. Sparse features are shifted only in columns that store an entry for
every example, so that the stored entries stay the same; the other columns do not need it: their
standard deviation is no smaller than their mean / N^(1/2).

At the end of the fit the bias, of the size of kernel^T c, is rounded to the dtype. If this alone
costs more than the tolerance, the parameters are at the precision floor. A shift d of the bias
raises the mean loss by no more than range(d)^2 / 8, half of the largest variance of d. Without an
intercept no bias could absorb kernel^T c, and the features are not shifted.

**Dimensions.** With fewer examples than features, every gradient lies in the span of the rows of X
minus their mean m, since its residuals sum to 0 over the examples. With the QR factorization
(X - 1 m^T)^T = Q R,

    kernel = Q V,  X kernel + 1 bias^T = R^T V + 1 c^T,  c = bias + kernel^T m,

and |kernel| = |V|, so that an l2 penalty does not change. The factorization is of X and not of
X X^T, which would square the condition number; and of X minus its mean, which float32 could not
subtract from the kernel afterwards.

**Rows.** A program is compiled once for each shape, which takes a hundred times as long as a fit
to a small table. So the number of rows is increased to a power of two, and to at least as many rows
as cost no time: the folds of a cross-validation, and tables of nearly any size, share one program.
The added rows are copies of existing rows with weight 0: no sum and no extreme changes, and the
targets stay the same to the last bit, since w / N is multiplied with a power of two and divided by
it. Data with more than LARGEST numbers stay as they are: their fits take longer than a compilation,
and a copy of their features would need memory. Wide data, with no more than half as many rows as
columns, also stay as they are if the added rows would make them other than wide.

**Hidden features.** At the optimum l2 f_j kernel_j = -x_j^T (w p - q), so that no example's logits
have more than

    max_i |x_ij kernel_jk| <= max_i x_ij^2 / (l2 f_j)

from feature j. An example is the mass of an atom in kilograms beside an age in years. If this bound
is far below the rounding of the logits, the feature changes nothing. But the solvers require a
small gradient of every parameter, and the gradient of this one has the rounding of its coefficient,
magnified by the whole ratio: a fit at its optimum would continue to its precision floor. Therefore
the numbers of the feature are replaced by zeros.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax import _checks
from softjax.regression._features import (
    column_of,
    is_sparse,
    largest_entries,
    stored_mass,
    with_data,
)
from softjax.regression._host_arrays import is_at_hand, placed
from softjax.regression._model import SoftmaxRegression
from softjax.regression._preconditioner import LARGEST_FACTOR
from softjax.regression._problem import Data
from softjax.regression._result import Status

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# Features are shifted if the rounding of their middle is more than this part of their spread.
FELT = 1e-5
# The middle and the spread are computed from this number of rows.
ROWS = 65
# Rows are added until the features and the logits have SMALLEST numbers, but not to data of more
# than LARGEST numbers.
SMALLEST, LARGEST = 2**16, 2**20
FEWEST_ROWS, FEWEST_ENTRIES = 2**11, 2**12
# A feature is hidden if its penalty is more than this many times its largest square.
HIDING = 2.0**80
# The number of examples that are read first: they show that most features are not hidden.
FIRST = 64


class Frame(NamedTuple):
    """The transformation of the features; each part may be None."""

    centre: Any = None  # c [D], None if the features are not shifted
    rotation: "Rotation | None" = None  # of the shifted features, None if they are not rotated


def framed(data: Data, rotates: bool) -> tuple[Data, Frame]:
    """The data in the coordinates of a fit, and these; rotated if `rotates` and it saves time."""
    centre = centre_of(data.features, data.weights) if data.constant > 0 else None
    return framed_around(centre, data, rotates)


def framed_around(centre: Any, data: Data, rotates: bool) -> tuple[Data, Frame]:
    """The result of `framed` for a known centre."""
    x = data.features if centre is None else less(data.features, centre)
    # A fit in N dimensions has to be worth the factorization, of 2 N^2 D operations. Penalty
    # factors belong to single features and exclude a rotation.
    pays = not is_sparse(x) and is_wide(*x.shape) and len(x) < LARGEST_FACTOR
    if not (rotates and pays and data.factors is None):
        return replace(data, features=x), Frame(centre)
    rotated, rotation = _rotate(x, data.constant)
    return replace(data, features=rotated), Frame(centre, rotation)


def centre_of(x: Any, weights: Any) -> Any:
    """The centre c [D], or None if no feature is shifted."""
    if is_sparse(x):
        centre = _means_of_whole_columns(x)
    elif is_at_hand(x) and _checks.is_concrete(weights):
        known_weights = None if weights is None else np.asarray(weights)
        # NumPy needs no compilation.
        centre = placed(_far_middle(np, np.asarray(x), known_weights))
    else:
        centre = _far_middle(jnp, x, weights)
    known = _checks.known(centre)
    return centre if known is None or known.any() else None


def inside(frame: Frame, params: SoftmaxRegression) -> SoftmaxRegression:
    """The parameters in the coordinates of `frame`."""
    if frame.centre is not None:
        params = _moved(frame.centre, params)
    return params if frame.rotation is None else _into_basis(frame.rotation, params)


def expand(frame: Frame, params: SoftmaxRegression) -> SoftmaxRegression:
    """The parameters without the rotation of `frame`, for one fit or a stack of fits."""
    return params if frame.rotation is None else _out_of_basis(frame.rotation, params)


def outside(centre: Any, params: SoftmaxRegression) -> tuple[SoftmaxRegression, Any]:
    """The parameters of the features before the shift, and the rounding error of each bias.

    For one fit or a stack of fits. If the numbers are known, the bias is rounded once, at the end;
    within a trace the second result is a bound.
    """
    kernel, bias = params
    if centre is None:
        return params, np.zeros(bias.shape, bias.dtype)
    known = [_checks.known(leaf) for leaf in (centre, kernel, bias)]
    if any(leaf is None for leaf in known):
        size = jnp.abs(bias) + jnp.einsum("d,...dk->...k", jnp.abs(centre), jnp.abs(kernel))
        sign = 1 - 2 * (jnp.arange(bias.shape[-1]) % 2).astype(bias.dtype)
        return _moved(-centre, params), jnp.finfo(bias.dtype).eps * sign * size
    c, k, exact = (np.asarray(leaf, np.longdouble) for leaf in known)
    exact = exact - np.einsum("d,...dk->...k", c, k)
    rounded = exact.astype(bias.dtype)
    moved = placed((rounded - exact).astype(bias.dtype))
    return SoftmaxRegression(kernel, jax.device_put(rounded, bias.sharding)), moved


@jax.jit
def status_outside(status: Any, moved: Any, value: Any, tol: Any) -> Any:
    """The status after the biases were `moved` by rounding; `value` is as in `State`."""
    cost = jnp.square(jnp.max(moved, -1) - jnp.min(moved, -1)) / 8
    lost = (status == Status.CONVERGED) & (cost > tol * jnp.maximum(value, tol))
    return jnp.where(lost, Status.PRECISION_FLOOR, status).astype(jnp.int32)


@jax.jit
def less(x: Any, centre: Array) -> Any:
    """The features minus `centre`, which of sparse features changes only the stored entries."""
    return with_data(x, x.data - column_of(x, centre)) if is_sparse(x) else x - centre[None]


@jax.jit
def _moved(centre: Array, params: SoftmaxRegression) -> SoftmaxRegression:
    kernel, bias = params
    return SoftmaxRegression(kernel, bias + jnp.einsum("d,...dk->...k", centre, kernel))


def _far_middle(xp: Any, x: Any, weights: Any) -> Any:
    """A middle of each dense feature that is far from 0, and 0 for the others, [D].

    `xp` is NumPy or `jax.numpy`. A few outliers, such as sentinel values, do not change a median.
    """
    counted = xp.ones(len(x), bool) if weights is None else weights > 0
    places = xp.argsort(~counted)  # rows without weight come last
    last = xp.maximum(xp.sum(counted) - 1, 0)
    rows = xp.sort(x[places[(xp.arange(ROWS) * last) // (ROWS - 1)]], 0)
    low, middle, high = (rows[int(part * (ROWS - 1))] for part in (0.2, 0.5, 0.8))
    spread, felt = high - low, xp.finfo(x.dtype).eps * xp.abs(middle) / FELT

    # The spread of a feature that is constant except in a few examples is their distance.
    constant = (spread == 0) & (felt > 0)
    if xp is np:
        away = x[:, constant] - middle[constant]
        spread[constant] = np.max(np.abs(away[counted]), 0, initial=0)
    else:
        away = jnp.where(counted[:, None], jnp.abs(x - middle[None]), 0)
        spread = jnp.where(constant, jnp.max(away, 0), spread)
    return xp.where((felt > spread) & (spread > 0), middle, 0)


@jax.jit
def _means_of_whole_columns(x: "BCOO") -> Array:
    """The approximate mean of each column that stores all its entries, else 0, [D]."""
    examples, width = x.shape
    whole = stored_mass(x, jnp.ones(examples, jnp.int32)) == examples
    centre = jnp.zeros(width, x.dtype)
    for _ in range(2):  # the second sum has small terms, and so it is accurate
        sums = jnp.zeros(width, x.dtype).at[x.indices[:, 1]].add(less(x, centre).data, mode="drop")
        centre = centre + jnp.where(whole, sums / examples, 0)
    return centre


class Rotation(NamedTuple):
    """Q as in LAPACK, with Householder vectors [D, N] and their factors [N], and m [D]."""

    reflectors: Array
    factors: Array
    mean: Array


def is_wide(examples: int, width: int) -> bool:
    """Whether there are so few examples that a fit in N dimensions is worthwhile."""
    return 2 * examples <= width


@jax.jit
def _rotate(features: Array, constant: Array) -> tuple[Array, Rotation]:
    """R^T [N, N], the features in N dimensions, and the rotation; m = 0 without an intercept."""
    mean = jnp.mean(features, 0)
    mean = constant * mean
    transposed, factors = jnp.linalg.qr((features - mean[None]).T, mode="raw")  # pyright: ignore
    reflectors = transposed.T
    r = jnp.triu(reflectors[: len(factors)])
    # If examples are collinear, some rows of R are only rounding and must not be standardised.
    size = jnp.linalg.norm(r, axis=1, keepdims=True)
    r = jnp.where(size > len(r) * jnp.finfo(r.dtype).eps * jnp.max(size), r, 0)
    return r.T, Rotation(reflectors, factors, mean)


@jax.jit
def _into_basis(rotation: Rotation, params: SoftmaxRegression) -> SoftmaxRegression:
    """V = Q^T kernel: the part of the kernel within the span."""
    q, mean = rotation[:2], rotation.mean
    kernel = lax.linalg.ormqr(*q, params.kernel, transpose=True)[: len(rotation.factors)]
    return SoftmaxRegression(kernel, params.bias + mean @ params.kernel)


@jax.jit
def _out_of_basis(rotation: Rotation, params: SoftmaxRegression) -> SoftmaxRegression:
    """kernel = Q V, in one product for all kernels of a stack."""
    q, mean = rotation[:2], rotation.mean
    rank, *stack = jnp.moveaxis(params.kernel, -2, 0).shape
    columns = jnp.moveaxis(params.kernel, -2, 0).reshape(rank, -1)
    kernel = lax.linalg.ormqr(*q, jnp.pad(columns, ((0, len(mean) - rank), (0, 0))))
    bias = params.bias - (mean @ kernel).reshape(params.bias.shape)
    kernel = jnp.moveaxis(kernel.reshape(-1, *stack), 0, -2)
    return SoftmaxRegression(kernel, bias)


def in_bucket(data: Data, copies: int = 1) -> Data:
    """The data with added rows of weight 0, so that data of many sizes have the same shape.

    There are `copies` of the logits: one for each of the fits that run at once.
    """
    x, (examples, width) = data.features, data.features.shape
    row_logits = copies * data.num_classes
    entries = x.nse if is_sparse(x) else examples * width
    leaves = jax.tree.leaves(data)
    on_one_device = all(_checks.is_concrete(leaf) for leaf in leaves) and all(
        len(leaf.devices()) == 1 for leaf in leaves if isinstance(leaf, Array)
    )
    if not on_one_device or entries + examples * row_logits > LARGEST:
        return data
    row_size = entries // examples + row_logits
    least = min(FEWEST_ROWS, next_power_of_two(SMALLEST // row_size + 1) // 2)
    size = max(next_power_of_two(examples), least)
    if is_wide(examples, width) != is_wide(size, width):
        return data
    places = np.arange(size) % examples  # copies of existing rows, so that no extreme changes
    weights = np.ones(examples, x.dtype) if data.weights is None else np.asarray(data.weights)
    padded = np.zeros(size, x.dtype)
    padded[:examples] = weights / x.dtype.type(examples) * size
    return replace(
        data,
        features=_with_entries(x, size) if is_sparse(x) else _taken(x, places),
        labels=_taken(data.labels, places),
        weights=placed(padded),
        offset=None if data.offset is None else _taken(data.offset.T, places).T,
    )


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller than `number`."""
    return 1 << max(number - 1, 0).bit_length()


def _taken(x: Any, places: np.ndarray) -> Array:
    # NumPy needs no compilation.
    return placed(np.asarray(x)[places]) if is_at_hand(x) else x[places]


def _with_entries(x: "BCOO", size: int) -> "BCOO":
    """`x` with `size` rows. The new rows are empty, and the new entries are out of bounds."""
    entries = max(next_power_of_two(x.nse), FEWEST_ENTRIES)
    shape = (size, x.shape[1])
    data, indices = np.zeros(entries, x.dtype), np.full((entries, 2), shape, np.int32)
    data[: x.nse], indices[: x.nse] = np.asarray(x.data), np.asarray(x.indices)
    return type(x)(placed((data, indices)), shape=shape, unique_indices=True)


def without_hidden(data: Data) -> Data:
    """The data with zeros in place of the features that are hidden, if the features are known.

    Their coefficients are then 0. In a grid of penalties the smallest one hides them.
    """
    x = data.features
    entries = x.data if is_sparse(x) else x
    if not is_at_hand(entries) or not _checks.is_concrete([data.l2, data.factors]):
        return data
    factors = 1.0 if data.factors is None else np.asarray(data.factors, np.float64)
    ridge = np.broadcast_to(np.min(np.asarray(data.l2)) * factors, x.shape[1])
    host, root = np.asarray(entries), np.sqrt(ridge / HIDING)
    if is_sparse(x):
        # Most data have no entry that is small enough; this test is faster than one by columns.
        if not len(host) or np.min(np.abs(host), where=host != 0, initial=np.inf) >= root.max():
            return data
        largest = largest_entries(x)
    else:
        largest = np.abs(host[:FIRST]).max(0)
        places = np.flatnonzero(largest < root)
        largest[places] = np.abs(host[:, places]).max(0)
    hidden = (largest > 0) & (largest < root)
    if not hidden.any():
        return data
    if is_sparse(x):  # the column of an entry that is padding is D or more
        hidden = np.append(hidden, True)[np.minimum(np.asarray(x.indices)[:, 1], x.shape[1])]
    seen: Any = jax.device_put(np.where(hidden, 0, host), entries.sharding)
    return replace(data, features=with_data(x, seen) if is_sparse(x) else seen)

"""The coordinates that a fit works in: features around a middle of theirs, in few dimensions.

A feature far from 0, as a year in float32, is rounded to steps that are no small part of what it
varies by, and each product with it adds as much noise to the logits. Around a middle c nothing is
rounded: x' = x - 1 c^T is exact where x is near c, and with it

    X kernel + bias = X' kernel + (bias + kernel^T c).

The kernel, and with it every penalty, stays what it is. Dense features are shifted where their
rounding would be felt, since x' is a copy of them. Sparse ones are shifted in the columns that
store an entry for every example, so that no place is filled; columns with places that are empty
keep what they store: their standard deviation is no smaller than their mean / N^(1/2).

On the way back the bias, of the size of kernel^T c, is rounded to the dtype. Where that alone costs
more than the tolerance, the parameters are at the floor of the precision. A shift d of the bias
raises the mean loss by no more than range(d)^2 / 8, half of the largest variance of d.

Without an intercept no bias could take kernel^T c, and the features stay what they are.

What rotates the features into N < D dimensions is in `_dual`.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax import _checks
from softjax.regression import _reduced_basis
from softjax.regression._arguments import is_at_hand
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import Data
from softjax.regression._result import Status
from softjax.regression._sparse import column_of, is_sparse, stored_mass, with_data

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# Features are shifted where a rounding of their middle is more than this part of their spread.
FELT = 1e-5
# The middle and the spread are those of so many rows.
ROWS = 65


class Frame(NamedTuple):
    """How the features were changed; a part is None where they were not.

    Attributes:
        centre: c [D].
        rotation: of the shifted features.
    """

    centre: Any = None
    rotation: _reduced_basis.Rotation | None = None


def framed(data: Data, rotates: bool) -> tuple[Data, Frame]:
    """The data in the coordinates of a fit, and these; rotated where `rotates` and it pays."""
    x, centre = data.features, None
    if data.constant is None or data.constant > 0:
        centre = centre_of(x, data.weights)
    x = less(x, centre)
    if is_sparse(x) or not (rotates and _reduced_basis.rotation_pays(data)):
        return data._replace(features=x), Frame(centre)
    rotated, rotation = _reduced_basis.rotate(x, data.constant)
    return data._replace(features=rotated), Frame(centre, rotation)


def centre_of(x: Any, weights: Any) -> Any:
    """c [D]; None where no feature is shifted."""
    centre = _means_of_whole_columns(x) if is_sparse(x) else _far_middle(x, weights)
    known = _checks.known(centre)
    return centre if known is None or known.any() else None


def inside(frame: Frame, params: SoftmaxRegression) -> SoftmaxRegression:
    """The parameters of the features in the coordinates of `frame`."""
    if frame.centre is not None:
        params = _moved(frame.centre, params)
    return params if frame.rotation is None else _reduced_basis.project(frame.rotation, params)


def expand(frame: Frame, params: SoftmaxRegression) -> SoftmaxRegression:
    """The parameters of the features that are only shifted; of a stack of fits too."""
    return params if frame.rotation is None else _reduced_basis.expand(frame.rotation, params)


def outside(centre: Any, params: SoftmaxRegression) -> tuple[SoftmaxRegression, Any]:
    """The parameters of the features before the shift, and what rounding moved each bias by.

    Of a stack of fits too. Where the numbers are known, the bias is rounded once, at the end;
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
    moved = jnp.asarray((rounded - exact).astype(bias.dtype))
    return SoftmaxRegression(kernel, jax.device_put(rounded, bias.sharding)), moved


def status_outside(status: Any, moved: Any, value: Any, tol: Any) -> Any:
    """The status of parameters whose biases were `moved` by rounding; `value` as in `State`."""
    cost = jnp.square(jnp.max(moved, -1) - jnp.min(moved, -1)) / 8
    lost = (status == Status.CONVERGED) & (cost > tol * jnp.maximum(value, tol))
    return jnp.where(lost, Status.PRECISION_FLOOR, status).astype(jnp.int32)


def less(x: Any, centre: Array | None) -> Any:
    """The features less `centre`, sparse ones where they store an entry."""
    return x if centre is None else _less(x, centre)


@jax.jit
def _less(x: Any, centre: Array) -> Any:
    return with_data(x, x.data - column_of(x, centre)) if is_sparse(x) else x - centre[None]


@jax.jit
def _moved(centre: Array, params: SoftmaxRegression) -> SoftmaxRegression:
    kernel, bias = params
    return SoftmaxRegression(kernel, bias + jnp.einsum("d,...dk->...k", centre, kernel))


def _far_middle(x: Any, weights: Any) -> Any:
    """[D]: a middle of each dense feature that is far from 0, and 0 of the others."""
    if not is_at_hand(x) or not _checks.is_concrete(weights):
        return _far_middle_of(jnp, x, weights)
    weights = None if weights is None else np.asarray(weights)
    # NumPy has nothing to compile.
    return jnp.asarray(_far_middle_of(np, np.asarray(x), weights))


def _far_middle_of(xp: Any, x: Any, weights: Any) -> Any:
    """`xp` is NumPy or JAX's. What a few rows are, as of a sentinel, changes no median."""
    counted = xp.ones(len(x), bool) if weights is None else weights > 0
    places = xp.argsort(~counted)  # those without weight at the end
    last = xp.maximum(xp.sum(counted) - 1, 0)
    rows = xp.sort(x[places[(xp.arange(ROWS) * last) // (ROWS - 1)]], 0)
    low, middle, high = (rows[int(part * (ROWS - 1))] for part in (0.2, 0.5, 0.8))
    spread, felt = high - low, xp.finfo(x.dtype).eps * xp.abs(middle) / FELT

    # A feature that is constant but for a few examples varies by as much as these are away.
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
    """[D]: about the mean of each column that stores all its places, and 0 of the others."""
    examples, width = x.shape
    whole = stored_mass(x, jnp.ones(examples, jnp.int32)) == examples
    centre = jnp.zeros(width, x.dtype)
    for _ in range(2):  # the second time of small numbers, whose sum is accurate
        sums = jnp.zeros(width, x.dtype).at[x.indices[:, 1]].add(less(x, centre).data, mode="drop")
        centre = centre + jnp.where(whole, sums / examples, 0)
    return centre

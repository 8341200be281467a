"""The rows of a derivative or a statistic: the checked arguments, and sums over the rows.

The information matrix is a sum of Kronecker products, computed in chunks of rows,

    I = sum_i a_i (diag(p_i) - p_i p_i^T) kron x~_i x~_i^T,  x~ = (x, 1)

    diag(p) - p p^T = sum_{k < l} p_k p_l (e_k - e_l)(e_k - e_l)^T

so that with B_kl = X~^T diag(a p_k p_l) X~ the block of the classes k and l is -B_kl, and the block
of class k with itself is sum_{l != k} B_kl. No term is a difference, not even 1 - p: every block is
accurate relative to its own size, and I is positive semidefinite.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import ClassIndices, Labels, numbers_as_classes, targets_of
from softjax._losses import expected_loss_gradient, index_loss_gradient
from softjax._numerics import compute_dtype
from softjax._sharding import fori_loop
from softjax._softmax_core import softmax_core
from softjax._weights import is_zero, shares
from softjax.regression._features import (
    Features,
    dense_or_sparse,
    is_sparse,
    linear,
    same_order,
    with_data,
)
from softjax.regression._model import SoftmaxRegression, refuse_other_params

EXACT = lax.Precision.HIGHEST  # by default accelerators round float32 factors


class Rows(NamedTuple):
    """The checked arguments of a derivative or a statistic."""

    x: Any  # features [N, D], dense or BCOO
    targets: Any  # ClassIndices or a distribution; None if they are not used
    w: Array | None  # sample weights [N]; None for ones
    c: Array | None  # class weights [K]; None for ones
    offset: Array | None = None  # [N, K]; None for zeros
    constant: Any = 1  # 1, or 0 if the model has no intercept

    def dense(self) -> "Rows":
        """With dense features, for matrices over all parameters, which are larger than the rows."""
        return self._replace(x=self.x.todense()) if is_sparse(self.x) else self

    def counted(self) -> tuple[Any, Array]:
        """The features, 0 in a row of weight 0, and the share w_i / sum(w) of each row."""
        x, w = self.x, self.w
        if w is None:
            examples = jnp.asarray(x.shape[0], x.dtype)  # which may be symbolic
            return x, jnp.broadcast_to(1 / jnp.maximum(examples, 1), x.shape[:1])
        absent = is_zero(w)
        if is_sparse(x):
            absent = absent.at[x.indices[:, 0]].get(mode="fill", fill_value=True)
            x = with_data(x, jnp.where(absent, 0, x.data))
        else:
            x = jnp.where(absent[:, None], 0, x)
        return x, shares(w)

    def masses(self, dtype: Any) -> Array:
        """sum_k c_k y_ik of each row, NaN at a bad label."""
        targets, c = self.targets, self.c
        if not isinstance(targets, ClassIndices):
            return jnp.sum(targets if c is None else c[None] * targets, -1)
        masses = jnp.ones(targets.index.shape, dtype) if c is None else c[targets.index]
        return _checks.nan_where(targets.bad, masses)

    def residuals(self, z: Array) -> Array:
        """dl_i / dz_i at the logits z, NaN at a bad label."""
        targets, c = self.targets, self.c
        if isinstance(targets, ClassIndices):
            return self.masses(z.dtype)[:, None] * index_loss_gradient(z, targets.index, None)
        return expected_loss_gradient(z, targets if c is None else c[None] * targets)

    def logits(self, x: Any, params: SoftmaxRegression) -> Array:
        """The logits of the features `x` of `counted`, with the offset of the rows."""
        return self.with_offset(scores(x, params))

    def with_offset(self, z: Array) -> Array:
        """z + offset, where the offset of a row of weight 0 is ignored."""
        if self.offset is None:
            return z
        if self.w is None:
            return z + self.offset
        return z + jnp.where(is_zero(self.w)[:, None], 0, self.offset)


def checked_rows(
    function: str,
    params: SoftmaxRegression,
    features: Features,
    labels: Labels,
    sample_weights: ArrayLike | None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    fit_intercept: bool = True,
) -> Rows:
    """The checked arguments, in the dtype of the parameters, at least float32."""
    same_order(function, features, labels=labels)
    rows = rows_without_labels(function, params, features, sample_weights, offset)
    shape, dtype = (rows.x.shape[0], jnp.shape(params.kernel)[1]), rows.x.dtype
    targets = targets_of(function, numbers_as_classes(labels), shape, dtype)
    c = _checks.weights(function, "class_weights", class_weights, shape[1:], dtype)
    constant = np.asarray(_checks.flag(function, "fit_intercept", fit_intercept), dtype)
    return rows._replace(targets=targets, c=c, constant=constant)


def rows_without_labels(
    function: str,
    params: SoftmaxRegression,
    features: Features,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Rows:
    refuse_other_params(function, params)
    same_order(function, features, sample_weights=sample_weights, offset=offset)
    x = dense_or_sparse(function, features)
    if x.ndim != 2 or x.shape[1] != len(params.kernel):
        expected = f"of shape (examples, {len(params.kernel)}); one example is x[None]"
        raise ValueError(_checks.message(function, "features", expected, f"shape {x.shape}"))
    x = x.astype(compute_dtype(jnp.result_type(params.kernel)))
    w = _checks.weights(function, "sample_weights", sample_weights, x.shape[:1], x.dtype)
    if offset is not None:
        offset = _checks.real_array(function, "offset", offset)
        _checks.same_shape(function, "offset", offset, (x.shape[0], len(params.bias)))
        offset = offset.astype(x.dtype)
    return Rows(x, None, w, None, offset)


def times(share: Array, x: Array) -> Array:
    """share x, and 0 where the share is 0 even if x is NaN."""
    return jnp.where(share == 0, 0, share * x)


def scores(x: Any, params: SoftmaxRegression) -> Array:
    """The logits without an offset, in the dtype of x."""
    return linear(x, *(leaf.astype(x.dtype) for leaf in params))


def feature_column(l2: ArrayLike, dtype) -> Array:
    """A penalty, a scalar or one for each feature [D], as a column to multiply a kernel [D, K]."""
    return jnp.asarray(l2, dtype).reshape(-1, 1)


# A chunk of rows holds this many numbers, 2 MiB of float64, which stay in the cache; but at least
# CHUNK_ROWS rows, since every chunk reads and writes all blocks.
CHUNK_SIZE, CHUNK_ROWS = 2**18, 512


def augmented(x: Array) -> Array:
    return jnp.concatenate([x, jnp.ones((x.shape[0], 1), x.dtype)], 1)


def of_each_row(function: Callable, matrices: tuple[Array, ...], x: Array, *others: Array) -> Any:
    """function(*products, *entries) of each row, computed some rows at a time.

    The products [K, K] are X~_i^T M X~_i, X~_i = (x_i, 1) kron I, for the matrices M [D + 1, K,
    D + 1, K]; the entries are those of `others`, [N, ...], for the row.
    """
    d, k = matrices[0].shape[:2]
    pairs = [m.transpose(0, 2, 1, 3).reshape(d * d, k * k) for m in matrices]

    def of_row(row):
        x, *entries = row
        outer = (x[:, None] * x).ravel()
        products = (jnp.matmul(outer, p, precision=EXACT).reshape(k, k) for p in pairs)
        return function(*products, *entries)

    batch = max(1, CHUNK_SIZE // (d * d + k * k))
    return lax.map(of_row, (augmented(x), *others), batch_size=batch)


def information(x: Array, z: Array, a: Array) -> Array:
    """I [P, P], exactly symmetric; rows and columns have the features first, then the classes.

    The features x are [N, D], the logits z [N, K], and the weights a >= 0 of the rows [N].
    """
    size = (x.shape[1] + 1) * z.shape[1]
    if z.shape[1] < 2:  # with one class the label is certain
        return jnp.zeros((size, size), x.dtype)
    blocks = _pair_blocks(x, softmax_core(z, (1,)), a)
    matrix = _assembled(blocks).reshape(size, size)
    return (matrix + matrix.T) / 2


def _pair_blocks(x: Array, p: Array, a: Array) -> Array:
    """B[s, :, k, :] = B_kl for l = k + s + 1 mod K: [K // 2, D + 1, K, D + 1].

    On a circle of the classes, steps of 1 to K / 2 meet every pair once (twice if the step is
    K / 2), so that each step is one product X~^T (W kron X~) of the same shape.
    """
    d, k = x.shape[1] + 1, p.shape[1]

    def add_chunk(blocks, x, p, a):
        x, a_p = augmented(x), a[:, None] * p

        def add_step(s, blocks):
            w = a_p * jnp.roll(p, -1 - s, 1)
            weighted = (w[:, :, None] * x[:, None, :]).reshape(len(x), k * d)
            return blocks.at[s].add(jnp.matmul(x.T, weighted, precision=EXACT).reshape(d, k, d))

        return fori_loop(0, k // 2, add_step, blocks)

    return sum_of_chunks(add_chunk, jnp.zeros((k // 2, d, k, d), x.dtype), d * k, a, x, p)


def sum_of_chunks(add_chunk: Callable, total: Any, row_size: int, a: Array, *arrays: Array) -> Any:
    """add_chunk(total, *rows of the arrays, rows of a) for each chunk of rows in turn.

    The terms of a row must be 0 where its weight in `a` [N] is 0: the last chunk overlaps the one
    before, with weight 0 in the rows that were already added, so that no padding is needed.
    `row_size` is the number of temporary numbers per row.
    """
    n = len(a)
    if not n:
        return total
    rows = min(n, max(CHUNK_ROWS, CHUNK_SIZE // row_size))

    def step(chunk, total):
        first = jnp.minimum(chunk * rows, n - rows)
        a_rows, *parts = (lax.dynamic_slice_in_dim(v, first, rows) for v in (a, *arrays))
        is_new = first + jnp.arange(rows, dtype=jnp.int32) >= chunk * rows
        return add_chunk(total, *parts, jnp.where(is_new, a_rows, 0))

    return fori_loop(0, -(-n // rows), step, total)


def _assembled(blocks: Array) -> Array:
    """The matrix [D + 1, K, D + 1, K] assembled from the blocks."""
    k = blocks.shape[2]
    row, column = np.indices((k, k))
    ahead = (column - row) % k
    forward = ahead <= k // 2
    step = np.where(forward, ahead, k - ahead) - 1  # -1 on the diagonal, replaced below
    pairs = blocks[step, :, np.where(forward, row, column)]  # [K, K, D + 1, D + 1]
    is_diagonal = jnp.eye(k, dtype=bool)[:, :, None, None]
    pairs = jnp.where(is_diagonal, 0, pairs)
    full = jnp.where(is_diagonal, jnp.sum(pairs, 1)[:, None], -pairs)
    return full.transpose(2, 0, 3, 1)

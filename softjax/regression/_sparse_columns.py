"""Sparse features of mean 0 and standard deviation 1, in products with arrays of NumPy.

    s_ij = (x_ij - mean_j) / scale_j,   s_iD = 1

The matrix stays sparse: the means are applied to parameters and to gradients.

A softmax depends only on the differences of the logits. So the logits of the last class are
subtracted from all, and a residual sums to 0 over the classes, so that the gradient of the last
class is minus the sum of the others. Products then have K - 1 columns, or one for two classes.
"""

from functools import cached_property
from typing import Any

import numpy as np

from softjax.regression._features import stored_entries

# The number of examples in a dense block.
ROWS = 2**14


class SparseColumns:
    """The columns s_j, and with an intercept a column of ones.

    Attributes:
        x: x_ij / scale_j, a CSR array [N, D] of SciPy.
        shift: mean_j / scale_j [D]; 0 without an intercept.
        biases: the number of columns of ones, 1 or 0.
    """

    def __init__(self, x: Any, shift: np.ndarray, biases: int):
        self.x, self.shift, self.biases = x, shift.astype(x.dtype), biases
        self.transposed = x.T

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1] + self.biases

    def astype(self, dtype: Any) -> "SparseColumns":
        return SparseColumns(_with(self.x, self.x.data.astype(dtype)), self.shift, self.biases)

    def standardised(self, mean: np.ndarray, scale: np.ndarray) -> "SparseColumns":
        """These columns minus `mean`, divided by `scale`."""
        x = _with(self.x, self.x.data / scale[self.x.indices])
        return SparseColumns(x, (self.shift + mean) / scale, self.biases)

    def scores(self, v: np.ndarray) -> np.ndarray:
        """v S^T [K, N] for parameters v [K, D + 1], minus the row of the last class."""
        differences = v[:-1] - v[-1]
        kernel = differences[:, : len(self.shift)]
        z = np.zeros((len(v), self.x.shape[0]), v.dtype)
        z[:-1] = (self.x @ kernel.T).T
        constant = -(kernel @ self.shift)[:, None]
        z[:-1] += constant + differences[:, -1:] if self.biases else constant
        return z

    def pull_back(self, residual: np.ndarray) -> np.ndarray:
        """R S [K, D + 1] for a residual R [K, N] whose sum over the classes is 0."""
        gradient = np.empty((len(residual), self.shape[1]), residual.dtype)
        gradient[:-1] = self.sums(residual[:-1])
        gradient[-1] = -gradient[:-1].sum(0)
        return gradient

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """W S [M, D + 1] for any weights W [M, N]."""
        total, width = weights.sum(1, keepdims=True), len(self.shift)
        sums = np.empty((len(weights), self.shape[1]), weights.dtype)
        np.subtract((self.transposed @ weights.T).T, total * self.shift, out=sums[:, :width])
        sums[:, width:] = total
        return sums

    def mean_squares(self, weights: np.ndarray) -> np.ndarray:
        """sum_i w_i x_ij^2 [D + 1]."""
        squares = _with(self.x, np.square(self.x.data)).T @ weights
        return np.append(squares, [weights.sum()] * self.biases)

    def variances(self, weights: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """sum_i w_i (x_ij - mean_j)^2 [D], for weights [N].

        The squares are summed directly, since a difference would cancel. An entry that is not
        stored is 0.
        """
        away = _with(self.x, np.square(self.x.data - mean[self.x.indices]))
        stored = _with(self.x, np.ones_like(self.x.data)).T @ weights
        return away.T @ weights + np.maximum(weights.sum() - stored, 0) * np.square(mean)

    def around_means(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The means of s for each row of weights [K, N], and the sums of squares around them.

        Both are [K, D + 1]. For the column of ones the mean is 0 and the sum is the sum of the
        weights. Without an intercept all means are 0.
        """
        total, width = weights.sum(1, keepdims=True), len(self.shift)
        means = self.biases * self.sums(weights) / np.where(total > 0, total, 1)
        means[:, width:] = 0
        squares = np.empty_like(means)
        squares[:, :width] = (_with(self.x, np.square(self.x.data)).T @ weights.T).T
        squares[:, :width] -= total * np.square(self.shift + means[:, :width])
        squares[:, width:] = total
        return means, np.maximum(squares, 0)

    def dense(self, columns: np.ndarray) -> np.ndarray:
        """Some of the D + 1 columns, in ascending order, as an array that is stored by columns."""
        own = columns[columns < len(self.shift)]
        dense = np.ones((self.x.shape[0], len(columns)), order="F")
        dense[:, : len(own)] = self._by_column[:, own].toarray() - self.shift[own]
        return dense

    @cached_property
    def _by_column(self) -> Any:
        return self.x.tocsc()

    def gram(self, weights: np.ndarray, places: np.ndarray) -> np.ndarray:
        """sum_i w_i s_i s_i^T of the chosen columns and the ones, from dense blocks of examples."""
        chosen, shift = self.x[:, places], self.shift[places]
        gram = np.zeros((len(shift) + self.biases,) * 2)
        for first in range(0, len(weights), ROWS):
            dense = chosen[first : first + ROWS].toarray() - shift
            dense = np.concatenate([dense, *[np.ones((len(dense), 1))] * self.biases], 1)
            gram += (dense.T * weights[first : first + ROWS]) @ dense
        return gram


def sparse_columns(x: Any, biases: int) -> SparseColumns:
    """The original BCOO features, which are in the memory of the host, in float64."""
    from scipy.sparse import csr_array

    data, rows, columns = stored_entries(x)
    data = data.astype(np.float64)
    if np.all(rows[:-1] <= rows[1:]):
        starts = np.searchsorted(rows, np.arange(x.shape[0] + 1, dtype=rows.dtype))
        matrix = csr_array((data, np.ascontiguousarray(columns), starts), shape=x.shape)
    else:
        matrix = csr_array((data, (rows, columns)), shape=x.shape)
    return SparseColumns(matrix, np.zeros(x.shape[1]), biases)


def _with(x: Any, data: np.ndarray) -> Any:
    """`x` with other numbers at the same indices."""
    return type(x)((data, x.indices, x.indptr), shape=x.shape)

"""The objective of softmax regression in NumPy and float64, and the terms of its derivatives.

As in `_objective` parameters are [K, D + 1] and logits [K, N]; without an intercept parameters are
[K, D]. Nothing here is compiled. Newton's steps are taken for features s of mean 0 and standard
deviation 1, x_ij = mean_j + scale_j s_ij, whose bias absorbs the means.
"""

from typing import Any, NamedTuple

import numpy as np

from softjax.regression._features import in_numpy
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import balanced, centred
from softjax.regression._problem import Data
from softjax.regression._sparse_columns import SparseColumns, sparse_columns

# A variance below this part of the mean square is summed directly instead of as a difference.
CANCELLED = 1e-4


class End(NamedTuple):
    """The end of Newton's steps."""

    theta: np.ndarray  # the parameters
    first: Any  # the objective at the start
    decrement: Any  # the decrease that the model predicted for the last step, nats
    steps: int  # the number of steps
    passes: int  # the number of products with the features


class Table(NamedTuple):
    """A problem in NumPy and float64."""

    # [N, D], with an intercept [N, D + 1] and ones in the last column; an array, or
    # `SparseColumns`.
    features: Any
    targets: np.ndarray  # q [K, N], which sum to 1
    ridge: np.ndarray  # of each column of the features
    offset: Any  # [K, N], or 0
    biases: int  # the number of columns of ones, 1 or 0
    # A copy of the features by columns, [D + 1, N], for fast products; or None.
    transposed: Any = None

    @property
    def width(self) -> int:
        """The number of features, D."""
        return self.features.shape[1] - self.biases

    @property
    def is_loose(self) -> bool:
        """Whether some feature is not penalised."""
        return not np.all(self.ridge[: self.width] > 0)

    @property
    def weights(self) -> np.ndarray:
        """The weight of each example in the loss, [N]."""
        return self.targets.sum(0)

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """An array in the dtype of the features."""
        return array.astype(self.targets.dtype)

    def among(self, columns: np.ndarray) -> "Table":
        """The problem with some columns of the features, as a dense array stored by columns."""
        x = self.features
        is_sparse = isinstance(x, SparseColumns)
        x = x.dense(columns) if is_sparse else np.take(x.T, columns, 0).T
        return self._replace(features=x, ridge=self.ridge[columns])

    def in_float32(self) -> "Table":
        """The problem in float32 and without its offset, for computing directions."""
        features, targets = self.features.astype(np.float32), self.targets.astype(np.float32)
        by_columns = np.ascontiguousarray(features.T) if isinstance(features, np.ndarray) else None
        ridge = self.ridge.astype(np.float32)
        return Table(features, targets, ridge, 0, self.biases, by_columns)

    def standardised(self, mean: np.ndarray, scale: np.ndarray) -> "Table":
        """The problem with the features minus `mean`, divided by `scale`, both [D + 1]."""
        x = self.features
        is_sparse, width = isinstance(x, SparseColumns), self.width
        x = x.standardised(mean[:width], scale[:width]) if is_sparse else (x - mean) / scale
        return self._replace(features=x, ridge=self.ridge / scale / scale)

    def moments(self, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation as in `_standardised`; of the column of ones 0 and 1."""
        x, weights = self.features, self.weights
        root_mean_square = np.sqrt(squares)
        is_sparse, width = isinstance(x, SparseColumns), self.width
        mean = self.biases * (x.sums(weights[None])[0] if is_sparse else weights @ x)
        variance = squares - np.square(mean)
        if np.any(variance[:width] < CANCELLED * squares[:width]):
            if is_sparse:
                variance[:width] = x.variances(weights, mean[:width])
            else:
                variance = weights @ np.square(x - mean)
        mean[self.width :], variance[self.width :] = 0, 1
        deviation = np.sqrt(variance)
        varies = deviation > 64 * np.finfo(np.float64).eps * root_mean_square
        scale = np.where(varies, deviation, root_mean_square)
        return mean, np.where(scale > 0, scale, 1)

    def mean_squares(self) -> np.ndarray:
        """sum_i w_i x_ij^2 of the features."""
        if isinstance(self.features, SparseColumns):
            return self.features.mean_squares(self.weights)
        return self.weights @ np.square(self.features)

    def logits(self, theta: np.ndarray) -> np.ndarray:
        """The logits of parameters [K, D + 1]."""
        return self.scores(theta) + self.offset

    def scores(self, v: np.ndarray) -> np.ndarray:
        """v X^T, [K, N]; for sparse features minus the row of the last class."""
        x = self.features
        if isinstance(x, SparseColumns):
            return x.scores(v)
        return v @ (x.T if self.transposed is None else self.transposed)

    def pull_back(self, residual: np.ndarray) -> np.ndarray:
        """R X, [K, D + 1], for a residual R [K, N] whose sum over the classes is 0."""
        x = self.features
        return x.pull_back(residual) if isinstance(x, SparseColumns) else residual @ x

    def gradient(self, theta: np.ndarray, p: np.ndarray) -> np.ndarray:
        """The slope minus its mean over the classes."""
        return centred(self.slope(theta, p))

    def slope(self, theta: np.ndarray, p: np.ndarray) -> np.ndarray:
        """X^T (w p - q) + ridge theta."""
        return self.pull_back(self.residual(p)) + self.ridge * theta

    def residual(self, p: np.ndarray) -> np.ndarray:
        """w p - q, [K, N]."""
        return balanced(p, self.weights * p - self.targets)

    def value(self, theta: np.ndarray, logits: np.ndarray) -> Any:
        """The objective."""
        return np.vdot(self.targets, losses(logits)) + np.vdot(theta, self.ridge * theta) / 2

    def hessian_times(self, p: np.ndarray, v: np.ndarray) -> np.ndarray:
        """H v at the probabilities p."""
        return self.pull_back(curved(self.weights, p, self.scores(v))) + self.ridge * v

    def theta_of(self, params: SoftmaxRegression) -> np.ndarray:
        """Parameters as one array [K, D + 1]."""
        kernel, bias = (np.asarray(part, np.float64) for part in params)
        return np.column_stack([kernel.T, *[bias] * self.biases])

    def params_of(self, theta: np.ndarray) -> SoftmaxRegression:
        """One array [K, D + 1] as parameters, with a bias of 0 if there is no intercept."""
        kernel, bias = np.split(theta, [self.width], axis=1)
        bias = bias[:, 0] if self.biases else np.zeros(len(kernel), kernel.dtype)
        parts: Any = kernel.T, bias
        return SoftmaxRegression(*parts)


def table_of(data: Data, targets: np.ndarray, dense: bool) -> Table:
    """The problem of `data` with these targets [K, N]; its ridge is the penalty factors."""
    biases = int(data.constant > 0)
    width = data.features.shape[1]
    factors = np.ones(width) if data.factors is None else np.asarray(data.factors, np.float64)
    x: Any = sparse_columns(data.features, biases) if not dense else in_numpy(data.features)
    if dense:
        x = np.column_stack([x, *[np.ones(len(x))] * biases])
    offset = 0 if data.offset is None else np.asarray(data.offset, np.float64)
    return Table(x, targets, np.append(factors, [0] * biases), offset, biases)


def to_standard(theta: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Parameters of the original features as parameters of the standardised ones."""
    theta = theta.copy()
    theta[:, -1] += theta @ mean  # 0 without an intercept
    return theta * scale


def from_standard(theta: np.ndarray, mean: np.ndarray, scale: np.ndarray, dtype: Any) -> np.ndarray:
    """The inverse of `to_standard`, in a dtype; the bias absorbs the rounding of the kernel."""
    theta = theta / scale
    theta[:, :-1] = theta[:, :-1].astype(dtype)
    theta[:, -1] -= theta @ mean
    return theta.astype(dtype)


def targets_of(data: Data) -> tuple[np.ndarray, float]:
    """Targets q [K, N], divided by their sum, and this sum."""
    labels = np.asarray(data.labels)
    q = shares_of(labels, data.num_classes)
    if data.class_weights is not None:
        q = q * np.asarray(data.class_weights, np.float64)[:, None]
    if data.weights is not None:
        q = q * np.asarray(data.weights, np.float64)
    q = q / len(labels)
    mass = float(q.sum())
    return q / mass, mass


def shares_of(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels of either kind as the shares of the classes, [K, N]."""
    own = np.arange(num_classes)[:, None] == labels if labels.ndim == 1 else labels.T
    return own.astype(np.float64)


def probabilities(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(0))
    return e / e.sum(0)


def losses(logits: np.ndarray) -> np.ndarray:
    """-log p_ik, by log1p of the sum of the exponentials without the largest class."""
    top = logits.argmax(0)[None]
    below = logits - np.take_along_axis(logits, top, 0)
    others = np.exp(below)
    np.put_along_axis(others, top, 0, 0)
    return np.log1p(others.sum(0)) - below


def curved(weights: np.ndarray, p: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """w_i (diag p_i - p_i p_i^T) moves_i."""
    mean = (p * moves).sum(0)
    return weights * (p * (moves - mean))

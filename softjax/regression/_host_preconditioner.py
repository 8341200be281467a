"""The preconditioners of Newton's method in NumPy, each an approximate inverse of the Hessian.

Dense features have the preconditioner of `_preconditioner`. Sparse features have

    S diag(v_kj + r_j)^-1 S^T,  v_kj = sum_i u_ik (x_ij - mu_kj)^2,  u_ik = w_i p_ik (1 - p_ik)

for every class k, where S changes to the parameters of the features minus mu_k, their means under
the weights u_ik. It needs no dense matrix of the features, and conjugate gradients take half of the
steps that they take with the diagonal of the Hessian.
"""

from typing import Any, NamedTuple

import numpy as np

from softjax.regression._objective import centred, complements
from softjax.regression._preconditioner import BETWEEN
from softjax.regression._table import Table

# A dense D x D matrix is formed for fewer columns than this.
MOST_COLUMNS = 128
# A relative curvature above this is not rounding in float64.
CLEAR = 1e-8
# A penalty is sufficient if it is more than this part of the curvature of a sparse feature.
HELD = 1e-6
# The curvature of a bias is at least this part of the sum for all biases.
FLOOR = 1e-8


class Preconditioner(NamedTuple):
    """C S (I kron T) diag(inverse) (I kron T)^T S^T C, for C = I - 11^T/K over the classes.

    S subtracts kernel mu from the bias of each class.
    """

    means: np.ndarray  # mu [K, D + 1]; 0 for the bias, and without an intercept
    inverse: np.ndarray  # [K, D + 1]
    columns: np.ndarray | None  # T [D + 1, D + 1]; None for I
    least: Any  # the least relative curvature of the features; 0 if it is not clear
    distance: Any  # the largest mean of a feature, in standard deviations that include its penalty

    def rounded(self, table: Table) -> "Preconditioner":
        columns = None if self.columns is None else table.rounded(self.columns)
        parts = table.rounded(self.means), table.rounded(self.inverse), columns
        return Preconditioner(*parts, self.least, self.distance)

    def apply(self, gradient: np.ndarray) -> np.ndarray:
        """The product with a gradient [K, D + 1]."""
        gradient, t = centred(gradient), self.columns
        v = gradient - self.means * gradient[:, -1:]
        v = v * self.inverse if t is None else (v @ t * self.inverse) @ t.T
        v[:, -1] -= np.sum(self.means * v, 1)
        return centred(v)


def kronecker(table: Table, p: np.ndarray) -> Preconditioner:
    """The preconditioner `Kronecker` of dense features, by the formulas of `_preconditioner`."""
    p = table.rounded(p)
    u = table.weights * p * complements(p)
    of_class, of_example = u.sum(1, keepdims=True), u.sum(0)
    middle = table.biases * (of_example @ table.features) / u.sum()
    middle[table.width :] = 0
    x = table.features - middle
    means = table.biases * (u @ x) / np.where(of_class > 0, of_class, 1)
    means[:, table.width :] = 0
    x *= np.sqrt(of_example)[:, None]
    # NumPy computes one half of this symmetric product.
    return diagonalised(middle, means, of_class, x.T @ x, table.ridge)


def diagonalised(
    middle: np.ndarray,
    means: np.ndarray,
    of_class: np.ndarray,
    scatter: np.ndarray,
    ridge: np.ndarray,
) -> Preconditioner:
    """The preconditioner `Kronecker` of the sums over the examples that it depends on.

    These are the means of the features under the weights of the Hessian (`middle`, [D + 1]); the
    means for each class minus these, [K, D + 1]; the sum of the weights for each class, [K, 1]; and
    the scatter of the features around the middle, [D + 1, D + 1].
    """
    share = of_class[:, 0] / of_class.sum()
    m = share / (1 - np.minimum(share, 0.5))
    mean_eigenvalue = 1 / max(len(m) - 1, 1)
    a = mean_eigenvalue * (scatter - (1 - BETWEEN) * means.T @ (of_class * means))
    size = np.diag(a) + ridge
    distance = np.sqrt(np.max(mean_eigenvalue * of_class.sum() * np.square(middle) / size))
    unit = 1 / np.sqrt(size)
    a = unit[:, None] * a * unit
    whole = a + np.diag(ridge * unit * unit)
    unclear = Preconditioner(means, means, None, 0.0, distance)
    if not (np.isfinite(whole).all() and np.all(m > 0)):
        return unclear
    least = np.linalg.eigvalsh(whole)[0]
    if not least > CLEAR:
        return unclear
    inverse = np.linalg.inv(np.linalg.cholesky(whole))
    eigenvalues, q = np.linalg.eigh(inverse @ a @ inverse.T)
    scale = np.maximum(1 + (m / mean_eigenvalue - 1)[:, None] * eigenvalues, CLEAR)
    return Preconditioner(
        means + middle, 1 / scale, unit[:, None] * (inverse.T @ q), least, distance
    )


def diagonal(table: Table, narrow: Table, p: np.ndarray) -> Preconditioner:
    """The preconditioner of sparse features; `narrow` is the same problem in any dtype."""
    p = narrow.rounded(p)
    u = narrow.weights * p * complements(p)
    of_example = u.sum(0)
    if len(u) == 2 or np.all(u == u[0]):  # two classes, or a start at 0, share one diagonal
        u = u[:1]
    means, squares = narrow.features.around_means(u)
    size, width = squares + narrow.ridge, narrow.width
    of_class, middle = u.sum(1, keepdims=True), narrow.features.shift + means[:, :width]
    distance = of_class * np.square(middle) / size[:, :width]
    least = _least_curvature(table, of_example, np.min(narrow.ridge / size, 0)[:width])
    size[:, width:] = np.maximum(size[:, width:], FLOOR * of_class.sum())
    return Preconditioner(means, 1 / size, None, least, np.sqrt(np.max(distance, initial=0)))


def _least_curvature(table: Table, weights: np.ndarray, held: np.ndarray) -> float:
    """About the least relative curvature of sparse features.

    `held` is the part of the curvature of each feature that comes from the penalty. If it is too
    small for some features, their own curvature is computed. A combination of both kinds of
    features has about as much curvature, since one of its two parts is large.
    """
    least, weak = np.min(held, initial=1), np.flatnonzero(~(held > HELD))
    if least > CLEAR or not 0 < len(weak) < MOST_COLUMNS:
        return least
    gram = table.features.gram(weights, weak)
    gram[np.diag_indices(len(gram))] += np.append(table.ridge[weak], [0] * table.biases)
    unit = 1 / np.sqrt(np.diag(gram))
    curvature = np.linalg.eigvalsh(unit[:, None] * gram * unit)[0]
    return min(curvature, np.min(held[held > HELD], initial=1))

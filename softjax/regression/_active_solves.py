"""The linear systems of the steps of `_active_set`: among the free parts, H d = -v.

A small H is built once for a few steps and factored. A large one is solved by conjugate gradients,
which need products with the features.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from softjax.regression._linear_solves import conjugate_gradients_in_numpy
from softjax.regression._objective import complements
from softjax.regression._table import Table, curved

# The relative damping of the diagonal of H, and the relative jitters that are tried for a factor.
DAMPING, JITTERS = 1e-10, (1e-13, 1e-10)
# A curvature below this part of the diagonal's is rounding.
LEAST = 1e-16
# The limit of the steps of conjugate gradients, and the largest number of features for which their
# preconditioner is a matrix.
MOST_STEPS, FEW = 200, 256


class Corners(NamedTuple):
    """The l1 penalty of each column of a table."""

    strength: np.ndarray  # s, 0 for the bias, [D + 1]
    grouped: bool  # whether it penalises the norms over the classes

    def length(self, theta: np.ndarray) -> np.ndarray:
        """|theta_jk| [K, D + 1], or if grouped |theta_j| [1, D + 1]."""
        if self.grouped:
            return np.sqrt(np.square(theta).sum(0, keepdims=True))
        return np.abs(theta)

    def unit(self, theta: np.ndarray) -> np.ndarray:
        """The unit vector of each part; 0 for a part that is 0."""
        length = self.length(theta)
        return theta / np.where(length > 0, length, 1)

    def value(self, theta: np.ndarray) -> float:
        return float((self.strength * self.length(theta)).sum())

    def along(self, a: np.ndarray, unit: np.ndarray) -> np.ndarray:
        """The component of each part of `a` along its unit vector."""
        return (a * unit).sum(0, keepdims=True) if self.grouped else a * unit


@dataclass
class Faces:
    """The free parts at a point, and the derivatives of the penalty there."""

    free: np.ndarray  # whether each entry is free, [K, D + 1]
    unit: np.ndarray  # u, [K, D + 1]
    # If grouped, whether each row leaves 0, [D + 1]; a row leaves only along u.
    entering: np.ndarray
    held: np.ndarray  # whether each column has an l1 penalty, [D + 1]
    bend: np.ndarray  # s / |theta_j|, the curvature of a grouped penalty orthogonal to u, [D + 1]
    slope: np.ndarray  # v, [K, D + 1]; 0 for entries that are not free
    grouped: bool  # whether the parts are rows


@dataclass
class Hessian:
    """The Hessian of the smooth part at probabilities p, for the parameters requested so far.

    Between parameters (k, j) and (l, m) it is

        X_j^T diag(w p_k) X_m [k = l] - (w^(1/2) p_k X_j)^T (w^(1/2) p_l X_m)

    The vectors w^(1/2) p_l X_m of all these parameters are the columns of one matrix.
    """

    table: Table
    p: np.ndarray
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    matrix: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    columns: Any = None

    def solved(self, faces: Faces, d: np.ndarray, damping: float) -> tuple[np.ndarray, float]:
        """d with H d = -v for the free entries, given the other entries of `d`.

        The second result bounds the decrease that the model may predict beyond d. The factor is
        that of H + J, with the jitter J, and leaves the residual r = J d. Along a direction of
        curvature e, in the units of J, the model predicts a further decrease of r^2 / (2 e), and
        curvatures e below LEAST are only rounding.
        """
        from scipy.linalg import cho_solve

        moved = np.flatnonzero(~faces.free & (d != 0))
        free = np.flatnonzero(faces.free)
        self._include(np.union1d(free, moved))
        own, others = np.searchsorted(self.places, free), np.searchsorted(self.places, moved)
        b = -faces.slope.ravel()[free] - self.matrix[np.ix_(own, others)] @ d.ravel()[moved]
        h = self.matrix[np.ix_(own, own)]
        added = damping * np.broadcast_to(_bound(self.table), faces.free.shape).ravel()[free]
        h[np.diag_indices(len(h))] += added
        basis = None
        if faces.grouped:
            basis = _bent(h, faces, free)
            h, b = basis.T @ h @ basis, basis.T @ b
        factor, jitter = _factored(h)
        found = cho_solve(factor, b, check_finite=False)
        residual = jitter * np.diag(h) * found
        left = residual @ cho_solve(factor, residual, check_finite=False)
        d = d.copy()
        d.ravel()[free] = found if basis is None else basis @ found
        return d, float(left) * jitter / LEAST / 2

    def _include(self, places: np.ndarray) -> None:
        """Extends the matrix to these parameters."""
        new = np.setdiff1d(places, self.places, assume_unique=True)
        if not len(new):
            return
        scaled = np.sqrt(self.table.weights) * self.p
        columns = self._columns_of(new, scaled)
        between = -(columns.T @ columns)
        classes, features = np.divmod(new, self.table.features.shape[1])
        self._add_blocks(between, classes, features, classes, features)
        between[np.diag_indices(len(new))] += self.table.ridge[features]
        if len(self.places):
            old_classes, old_features = np.divmod(self.places, self.table.features.shape[1])
            across = -(self.columns.T @ columns)
            self._add_blocks(across, old_classes, old_features, classes, features)
            between = np.block([[self.matrix, across], [across.T, between]])
            columns = np.concatenate([self.columns, columns], 1)
        places = np.concatenate([self.places, new])
        order = np.argsort(places)
        self.places, self.matrix = places[order], between[np.ix_(order, order)]
        self.columns = columns[:, order]

    def _columns_of(self, places: np.ndarray, scaled: np.ndarray) -> np.ndarray:
        classes, features = np.divmod(places, self.table.features.shape[1])
        columns = self.table.features[:, features]
        for k in np.unique(classes):
            columns[:, classes == k] *= scaled[k][:, None]
        return columns

    def _add_blocks(self, matrix: np.ndarray, *places: np.ndarray) -> None:
        """Adds X_j^T diag(w p_k) X_m for parameters of the same class k."""
        rows, row_features, columns, column_features = places
        for k in np.intersect1d(rows, columns):
            a, b = np.flatnonzero(rows == k), np.flatnonzero(columns == k)
            weighted = (self.table.weights * self.p[k])[:, None]
            right = weighted * self.table.features[:, column_features[b]]
            matrix[np.ix_(a, b)] += self.table.features[:, row_features[a]].T @ right


def by_products(
    table: Table,
    corners: Corners,
    faces: Faces,
    p: np.ndarray,
    d: np.ndarray,
    damping: float,
    tol: float,
) -> tuple[np.ndarray, int]:
    """d with H d = -v for the free entries, by conjugate gradients, and the number of products."""
    among = _projection(corners, faces)
    curved_by = (table.weights * p * complements(p)) @ np.square(table.features)
    extra = table.ridge + faces.bend
    extra = extra + DAMPING * (curved_by + extra) + damping * _bound(table)
    precondition = _preconditioner(table, faces, p, curved_by, extra, among)

    def times(v: np.ndarray) -> np.ndarray:
        image = curved(table.weights, p, v @ table.features.T) @ table.features
        return image + extra * v - faces.bend * faces.unit * corners.along(v, faces.unit)

    r = among(-faces.slope - times(d))
    d, steps = conjugate_gradients_in_numpy(
        lambda v: among(times(v)), precondition, d, r, tol, MOST_STEPS
    )
    return d, 2 + 2 * steps


def _bent(h: np.ndarray, faces: Faces, free: np.ndarray) -> np.ndarray:
    """Adds the curvature of the norms of rows to h, and returns a basis of the possible steps.

    Rows that leave 0 do so along u. In a row without a penalty, such as that of the biases, one
    class is not free.
    """
    classes, features = np.divmod(free, faces.free.shape[1])
    for row in np.unique(features[faces.bend[features] > 0]):
        places = np.flatnonzero(features == row)
        unit = faces.unit[classes[places], row]
        orthogonal = np.eye(len(places)) - np.outer(unit, unit)
        h[np.ix_(places, places)] += faces.bend[row] * orthogonal
    enters, held = faces.entering[features], faces.held[features]
    whole = np.eye(len(free))[:, ~enters & (held | (classes > 0))]
    along = [
        np.where(features == row, faces.unit[classes, row], 0)[:, None]
        for row in np.unique(features[enters])
    ]
    return np.concatenate([whole, *along], 1)


def _factored(h: np.ndarray) -> tuple[Any, float]:
    """A Cholesky factor of H, and the smallest jitter of its diagonal that works."""
    from scipy.linalg import cho_factor

    for jitter in JITTERS:
        jittered = h.copy()
        jittered[np.diag_indices(len(h))] *= 1 + jitter
        with contextlib.suppress(np.linalg.LinAlgError):
            return cho_factor(jittered, lower=True, check_finite=False), jitter
    raise np.linalg.LinAlgError


def _bound(table: Table) -> np.ndarray:
    """Boehning's bound of the diagonal of H, for any probabilities, [D + 1]."""
    return table.weights @ np.square(table.features) / 2 + table.ridge


def _projection(corners: Corners, faces: Faces) -> Callable:
    """The projection on the possible steps: 0 if not free, and along u for rows that leave 0.

    With a grouped penalty the part that all classes have in common is removed too.
    """
    enters = faces.entering[None]

    def among(a: np.ndarray) -> np.ndarray:
        a = np.where(faces.free, a, 0)
        if not corners.grouped:
            return a
        a = np.where(enters, faces.unit * corners.along(a, faces.unit), a)
        return a - a.mean(0)

    return among


def _preconditioner(
    table: Table,
    faces: Faces,
    p: np.ndarray,
    curved_by: np.ndarray,
    extra: np.ndarray,
    among: Callable,
) -> Callable:
    """For each class, the inverse of an approximation of its block of H, among its free entries.

    The approximate curvature of the loss has the diagonal `curved_by`, as in H, and for all classes
    the correlations of X^T diag(u) X with the uncertainties u_i = w_i sum_k p_ik (1 - p_ik).
    `extra` is added to the diagonal. With many features only the diagonal is used.
    """
    x, diagonal = table.features, np.arange(table.features.shape[1])
    if x.shape[1] > FEW:
        size = curved_by + extra
        size = np.where(size > 0, size, 1)
        return lambda r: among(among(r) / size)
    gram = (x.T * (table.weights * p * complements(p)).sum(0)) @ x
    unit = np.sqrt(curved_by / np.where(gram[diagonal, diagonal] > 0, gram[diagonal, diagonal], 1))
    free = faces.free
    blocks = np.where(free[:, :, None] & free[:, None, :], gram, 0)
    blocks *= unit[:, :, None] * unit[:, None, :]
    size = blocks[:, diagonal, diagonal] * (1 + DAMPING) + extra
    blocks[:, diagonal, diagonal] = np.where(free & (size > 0), size, 1)
    inverse = np.linalg.inv(blocks)
    return lambda r: among((inverse @ among(r)[:, :, None])[:, :, 0])

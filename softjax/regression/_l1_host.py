"""A path of penalties with corners whose data are in the memory of the host, in NumPy.

The fits are those of `_active_set`, which need nothing compiled, and a few steps each from the fit
before. A fit without a clear end is made by the compiled solver, as all are on other devices.

The features that take part are dense, of mean 0 and standard deviation 1. In these units the
penalties of feature j are s_j / scale_j and r_j / scale_j^2; the bias takes up the means.
"""

import contextlib
import importlib.util
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softjax.regression import _active_set, _small
from softjax.regression._active_solves import Corners
from softjax.regression._convergence import converged
from softjax.regression._features import is_sparse
from softjax.regression._l1_path import Look, Path, nothing
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import Data
from softjax.regression._result import FitResult, Status
from softjax.regression._small import End, Table

# Products with no more numbers than this are computed by one thread, if `threadpoolctl` is there
# (scikit-learn brings it): more threads wait for each other, and take much longer on busy cores.
ONE_THREAD = 2**22
# More numbers of features that take part would not fit into memory as float64 beside the data.
MOST_NUMBERS = 2**27


def path_of(data: Data, *options: Any) -> Path:
    """A path in NumPy where its data are in the memory of the host, else by compiled programs."""
    return HostPath(data, *options) if takes(data) else Path(data, *options)


def takes(data: Data) -> bool:
    """Whether a path has its data in the memory of the host, and nothing without a penalty."""
    if not _small.is_on_host(data):
        return False
    if data.factors is not None and not np.all(np.asarray(data.factors) > 0):
        return False
    examples, width = data.features.shape
    if not is_sparse(data.features) and examples * width > MOST_NUMBERS:
        return False
    return bool(np.all(_small.targets_of(data)[0].sum(1) > 0))  # else the bias has no optimum


class HostPath(Path):
    """A path by `_active_set`."""

    def __init__(self, data: Data, *options: Any):
        super().__init__(data, *options)
        self.targets, self.mass = _small.targets_of(data)
        self.offset: Any = 0 if data.offset is None else np.asarray(data.offset, np.float64)
        self.standard = _Standard(
            data.features, self.targets.sum(0), data.constant is None or bool(data.constant)
        )
        square = self.standard.square
        self.bound = np.sqrt(np.where(square > 0, square, 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            share = self.targets / self.targets.sum(0)
            self.least = np.nansum(self.targets * np.where(share > 0, np.log(share), 0))

    def _among(
        self,
        penalised: Data,
        taking_part: np.ndarray,
        params: SoftmaxRegression,
        limit: int | None,
    ) -> tuple[FitResult, Look, bool]:
        found, places = None, np.flatnonzero(taking_part)
        strength = penalised.l1 if penalised.l1_rows is None else penalised.l1_rows
        if limit != 0 and strength > 0 and len(self.standard.weights) * len(places) < MOST_NUMBERS:
            # Numbers that are not finite, and a matrix without a factor, are no clear end.
            failures, warnings = (
                contextlib.suppress(np.linalg.LinAlgError),
                np.errstate(all="ignore"),
            )
            with failures, warnings, _threads(len(self.standard.weights) * len(places)):
                found = self._found(penalised, float(strength), places, params)
        if found is None or (limit is not None and found[0].steps > limit):
            return super()._among(penalised, taking_part, params, limit)
        return *found, False

    def _found(
        self, penalised: Data, strength: float, places: np.ndarray, params: SoftmaxRegression
    ) -> tuple[FitResult, Look] | None:
        """The fit to some features and what it looks like; None where its end is not clear."""
        standard, biases = self.standard, self.standard.biases
        mean, scale = standard.mean[places], standard.scale[places]
        kernel, bias = (np.asarray(part, np.float64) for part in params)
        theta = kernel[places].T * scale
        theta = np.column_stack([theta, *[bias + mean @ kernel[places]] * biases])
        s, r = (self.factors[places] * a / self.mass for a in (strength, float(penalised.l2)))
        s, r = (np.append(a, [0] * biases) for a in (s / scale, r / scale**2))
        table = Table(standard.columns(places), self.targets, r, self.offset, biases)
        corners, bound = Corners(s, penalised.l1_rows is not None), self.bound[places] / scale
        bound = np.append(bound, [1] * biases)
        end = _active_set.optimum(table, corners, theta, bound, self.tol)
        if end is None:
            return None
        kernel, bias = np.zeros((self.width, len(theta))), np.zeros(len(theta))
        kernel[places] = end.theta[:, : len(places)].T / scale[:, None]
        if biases:
            bias = end.theta[:, -1] - mean @ kernel[places]
        dtype = self.data.features.dtype
        kernel, bias = kernel.astype(dtype), bias.astype(dtype)
        return self._judged(table, corners, places, kernel, bias, end)

    def _judged(
        self,
        table: Table,
        corners: Corners,
        places: np.ndarray,
        kernel: np.ndarray,
        bias: np.ndarray,
        end: End,
    ) -> tuple[FitResult, Look] | None:
        """The result, where parameters that are rounded by now are the optimum."""
        standard, scale = self.standard, self.standard.scale[places]
        params = SoftmaxRegression(jnp.asarray(kernel), jnp.asarray(bias))
        theta, bias = kernel[places].T.astype(np.float64) * scale, bias + standard.mean @ kernel
        theta = np.column_stack([theta, *[bias] * standard.biases])
        z = table.logits(theta)
        residual = table.residual(_small.probabilities(z))
        gradient = standard.pull_back(residual)
        own = np.column_stack([gradient[:, places] / scale, *[residual.sum(1)] * standard.biases])
        slope = _active_set.smallest_subgradient(corners, theta, own + table.ridge * theta)
        bound = np.append(self.bound[places] / scale, [1] * standard.biases)
        norm = float(np.max(np.abs(slope) / bound, initial=0))
        objective = float(table.value(theta, z)) + corners.value(theta)
        if not converged(objective, end.first, norm, end.decrement, self.tol):
            return None
        slopes, loss = corners.length(gradient).max(0), table.loss(z) + self.least
        report: Any = ()
        if self.report_of.func is not nothing:
            report = _report(self.report_of, z.astype(kernel.dtype))
        seen: list[Any] = [self.mass * a for a in (slopes, self.bound, loss, objective)]
        separated = bool(_small.is_separated(self.targets, z - self.offset))
        counts = (end.steps, end.passes, norm, separated)
        fit = FitResult(params, self.mass * objective, int(Status.CONVERGED), *counts, [])
        return fit, Look(*seen, report=report)


def _threads(numbers: int) -> contextlib.AbstractContextManager:
    """A context in which NumPy's products with this many features take one thread, if small."""
    controller = _controller() if numbers <= ONE_THREAD else None
    if controller is None:
        return contextlib.nullcontext()
    return controller.limit(limits=1, user_api="blas")


@cache
def _controller() -> Any:
    """What limits the threads of NumPy and of SciPy, which must be loaded for it."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return None
    import scipy.linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


class _Standard:
    """Features of mean 0 and standard deviation 1 in float64; sparse ones column by column.

    Attributes:
        weights: of the examples, which sum to 1, [N].
        biases: the number of columns of ones, 1 or 0.
        mean: what is subtracted from each column, [D].
        scale: what it is divided by, [D].
        square: the mean square of each column, [D].
    """

    def __init__(self, x: Any, weights: np.ndarray, intercept: bool):
        self.weights, self.biases, self.sparse = weights, int(intercept), is_sparse(x)
        self.x: Any
        if self.sparse:
            from scipy.sparse import csc_array

            rows, columns = np.asarray(x.indices).T
            inside = (rows < x.shape[0]) & (columns < x.shape[1])
            data = np.asarray(x.data, np.float64)[inside]
            self.x = csc_array((data, (rows[inside], columns[inside])), shape=x.shape)
            squares = self.x.multiply(self.x)
        else:
            self.x = np.asarray(x, np.float64)
            squares = np.square(self.x)
        self.square = weights @ squares
        self.mean = self.biases * (weights @ self.x)
        if self.sparse:
            variance = np.maximum(self.square - np.square(self.mean), 0)
        else:
            variance = weights @ np.square(self.x - self.mean)
        varies = variance > (64 * np.finfo(np.float64).eps) * self.square
        scale = np.sqrt(np.where(varies, variance, self.square))
        self.scale = np.where(scale > 0, scale, 1)
        if not self.sparse:
            self.x = np.asfortranarray((self.x - self.mean) / self.scale)

    def columns(self, places: np.ndarray) -> np.ndarray:
        """Some columns, and one of ones where there is an intercept, [N, A + 1]."""
        chosen = np.ones((len(self.weights), len(places) + self.biases), order="F")
        if self.sparse:
            own = self.x[:, places].toarray()
            chosen[:, : len(places)] = (own - self.mean[places]) / self.scale[places]
        else:
            chosen[:, : len(places)] = self.x[:, places]
        return chosen

    def pull_back(self, residual: np.ndarray) -> np.ndarray:
        """[K, N] to [K, D], a product with the transposed features as they were given."""
        if self.sparse:
            return (self.x.T @ residual.T).T
        return residual @ self.x * self.scale + residual.sum(1, keepdims=True) * self.mean


@jax.jit
def _report(report_of: Any, logits: Any) -> Any:
    return report_of(logits)

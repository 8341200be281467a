"""A path of l1 penalties in NumPy, for data in the memory of the host.

The fits use `_active_set`, which needs no compilation; each takes a few steps from the fit before.
Fits without a clear end, and all fits on other devices, use the compiled solver.

The active features are dense, of mean 0 and standard deviation 1. In these units the penalties of
feature j are s_j / scale_j and r_j / scale_j^2; the bias absorbs the means.
"""

import contextlib
import importlib.util
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from softjax.regression import _active_set
from softjax.regression._active_solves import Corners
from softjax.regression._convergence import converged
from softjax.regression._features import is_sparse, stored_entries
from softjax.regression._l1_path import Evaluation, Path, no_report
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, Status
from softjax.regression._table import (
    End,
    Table,
    is_on_host,
    is_separated,
    probabilities,
    targets_of,
)

# Products with no more numbers than this are computed by one thread, if `threadpoolctl` is there
# (scikit-learn brings it): more threads wait for each other, and take much longer on busy cores.
ONE_THREAD = 2**22
# With more numbers, the active features might not fit into memory as float64 beside the data.
MOST_NUMBERS = 2**27
# The largest factor between the penalties of successive fits with more features than examples.
FALL = 10


def path_of(data: Data, *options: Any) -> Path:
    """A path in NumPy if it can take the data, else by compiled programs."""
    return HostPath(data, *options) if takes(data) else Path(data, *options)


def takes(data: Data) -> bool:
    """Whether the data are in the memory of the host and all features are penalised."""
    if not is_on_host(data):
        return False
    if data.factors is not None and not np.all(np.asarray(data.factors) > 0):
        return False
    examples, width = data.features.shape
    if not is_sparse(data.features) and examples * width > MOST_NUMBERS:
        return False
    return bool(np.all(targets_of(data)[0].sum(1) > 0))  # else the bias has no optimum


def optimum(data: Data, tol: float, max_steps: int | None) -> FitResult | None:
    """The fit with the penalties of `data`, as the end of a path; None if its end is not clear.

    With more features than examples, a large drop of the penalty would make many features enter and
    leave the model; then the penalty decreases by a factor of FALL from fit to fit.
    """
    examples, width = data.features.shape
    path = _OneFit(data, Partial(no_report), tol, max_steps, lambda: False)
    l1 = float(data.l1 if data.l1_rows is None else data.l1_rows)
    with contextlib.suppress(_NotClearError):
        step = path.null()
        strength = path.largest(step.evaluation)
        while True:
            before = strength
            strength = max(l1, before / FALL) if width > examples else l1
            step = path.at(step, before, strength, float(data.l2))
            if strength == l1:
                return step.fit
    return None


class HostPath(Path):
    """A path by `_active_set`."""

    def __init__(self, data: Data, *options: Any):
        super().__init__(data, *options)
        self.targets, self.mass = targets_of(data)
        self.offset: Any = 0 if data.offset is None else np.asarray(data.offset, np.float64)
        self.standard = _Standard(
            data.features, self.targets.sum(0), data.constant is None or bool(data.constant)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            share = self.targets / self.targets.sum(0)
            self.least = np.nansum(self.targets * np.where(share > 0, np.log(share), 0))

    def _among(
        self,
        penalised: Data,
        active: np.ndarray,
        params: SoftmaxRegression,
        limit: int | None,
    ) -> tuple[FitResult, Evaluation, bool]:
        found = self._in_numpy(penalised, active, params, limit)
        return super()._among(penalised, active, params, limit) if found is None else found

    def _in_numpy(
        self,
        penalised: Data,
        active: np.ndarray,
        params: SoftmaxRegression,
        limit: int | None,
    ) -> tuple[FitResult, Evaluation, bool] | None:
        """The result of `_among`; None if the end is not clear or takes more than `limit` steps."""
        places = np.flatnonzero(active)
        strength = penalised.l1 if penalised.l1_rows is None else penalised.l1_rows
        numbers = len(self.standard.weights) * len(places)
        if limit == 0 or not strength > 0 or numbers >= MOST_NUMBERS:
            return None
        # An end with numbers that are not finite, or a matrix that has no factor, is not clear.
        failures = contextlib.suppress(np.linalg.LinAlgError)
        with failures, np.errstate(all="ignore"), _threads(numbers):
            found = self._found(penalised, float(strength), places, params)
            if found is not None and (limit is None or found[0].steps <= limit):
                return *found, False
        return None

    def _found(
        self, penalised: Data, strength: float, places: np.ndarray, params: SoftmaxRegression
    ) -> tuple[FitResult, Evaluation] | None:
        """The fit to some features and its evaluation; None if its end is not clear."""
        standard, biases = self.standard, self.standard.biases
        mean, scale = standard.mean[places], standard.scale[places]
        kernel, bias = (np.asarray(part, np.float64) for part in params)
        theta = kernel[places].T * scale
        theta = np.column_stack([theta, *[bias + mean @ kernel[places]] * biases])
        s, r = (self.factors[places] * a / self.mass for a in (strength, float(penalised.l2)))
        s, r = (np.append(a, [0] * biases) for a in (s / scale, r / scale**2))
        table = Table(standard.columns(places), self.targets, r, self.offset, biases)
        corners = Corners(s, penalised.l1_rows is not None)
        end = _active_set.optimum(table, corners, theta, self.tol)
        if end is None:
            return None
        if self._point(table, corners, places, end.theta, end).reached:
            return self._judged(table, corners, places, end)
        return None

    def _judged(
        self, table: Table, corners: Corners, places: np.ndarray, end: End
    ) -> tuple[FitResult, Evaluation]:
        """The rounded optimum and its evaluation.

        It has converged if the rounded parameters satisfy the rule of all solvers, or if their
        objective, though not their gradient, is within the tolerance of the optimum.
        """
        standard, dtype = self.standard, self.data.features.dtype
        mean, scale = standard.mean[places], standard.scale[places]
        columns = (end.theta[:, : len(places)] / scale).astype(dtype).T
        # The bias absorbs the rounding of the kernel.
        shift = mean @ columns.astype(np.float64)
        bias = end.theta[:, -1] - shift if standard.biases else np.zeros(len(end.theta))
        kernel, bias = np.zeros((self.width, len(bias)), dtype), bias.astype(dtype)
        kernel[places] = columns
        theta = [columns.T * scale, *[bias + shift] * standard.biases]
        here = self._point(table, corners, places, np.column_stack(theta), end)
        objective, z = here.objective, here.logits
        rise = objective - float(table.value(end.theta, table.logits(end.theta)))
        rise += end.decrement - corners.value(end.theta)
        near = rise <= self.tol * max(objective, self.tol)
        status = Status.CONVERGED if here.reached or near else Status.PRECISION_FLOOR
        slopes, loss = corners.length(here.gradient).max(0), table.loss(z) + self.least
        report: Any = ()
        if self.report_of.func is not no_report:
            report = _report(self.report_of, z.astype(dtype))
        numbers: list[Any] = [self.mass * a for a in (slopes, standard.scale, loss, objective)]
        separated = bool(is_separated(self.targets, z - self.offset))
        params = SoftmaxRegression(jnp.asarray(kernel), jnp.asarray(bias))
        counts = (end.steps, end.passes, here.norm, separated)
        fit = FitResult(params, self.mass * objective, int(status), *counts, [])
        return fit, Evaluation(*numbers, report=report)

    def _point(
        self, table: Table, corners: Corners, places: np.ndarray, theta: np.ndarray, end: End
    ) -> "_Point":
        standard, scale = self.standard, self.standard.scale[places]
        z = table.logits(theta)
        residual = table.residual(probabilities(z))
        gradient = standard.pull_back(residual)
        own = np.column_stack([gradient[:, places] / scale, *[residual.sum(1)] * standard.biases])
        slope = _active_set.smallest_subgradient(corners, theta, own + table.ridge * theta)
        norm = float(np.max(np.abs(slope), initial=0))
        objective = float(table.value(theta, z)) + corners.value(theta)
        reached = bool(converged(objective, end.first, norm, end.decrement, self.tol))
        return _Point(z, gradient, objective, norm, reached)


class _NotClearError(Exception):
    """A fit has no clear end in NumPy."""


class _OneFit(HostPath):
    """A path for one fit, which raises an error if its end is not clear."""

    def _among(self, *args: Any) -> tuple[FitResult, Evaluation, bool]:
        found = self._in_numpy(*args)
        if found is None:
            raise _NotClearError
        return found


class _Point(NamedTuple):
    """Some parameters, evaluated.

    Attributes:
        logits: [K, N].
        gradient: of the loss with respect to the kernel of all features minus their means, [K, D].
            Without the means, the remaining gradient of the bias would hide the gradients of
            features far from 0.
        objective: divided by the mass.
        norm: the largest entry of the smallest subgradient, as in `_convergence`.
        reached: whether they have converged by the rule of all solvers.
    """

    logits: np.ndarray
    gradient: np.ndarray
    objective: float
    norm: float
    reached: bool


def _threads(numbers: int) -> contextlib.AbstractContextManager:
    """A context in which NumPy uses one thread if the features have only this many `numbers`."""
    controller = _controller() if numbers <= ONE_THREAD else None
    if controller is None:
        return contextlib.nullcontext()
    return controller.limit(limits=1, user_api="blas")


@cache
def _controller() -> Any:
    """The controller of the threads of NumPy and SciPy; both must be loaded before it is made."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return None
    import scipy.linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


class _Standard:
    """Features of mean 0 and standard deviation 1 in float64; sparse ones are stored by columns.

    Attributes:
        weights: the weights of the examples, which sum to 1, [N].
        biases: the number of columns of ones, 1 or 0.
        mean: subtracted from each column, [D].
        scale: the divisor of each column, [D].
    """

    def __init__(self, x: Any, weights: np.ndarray, intercept: bool):
        self.weights, self.biases, self.sparse = weights, int(intercept), is_sparse(x)
        self.x: Any
        if self.sparse:
            from scipy.sparse import csc_array

            data, *places = stored_entries(x)
            self.x = csc_array((data.astype(np.float64), tuple(places)), shape=x.shape)
            squares = self.x.multiply(self.x)
        else:
            self.x = np.asarray(x, np.float64)
            squares = np.square(self.x)
        square = weights @ squares
        self.mean = self.biases * (weights @ self.x)
        if self.sparse:
            variance = np.maximum(square - np.square(self.mean), 0)
        else:
            variance = weights @ np.square(self.x - self.mean)
        varies = variance > (64 * np.finfo(np.float64).eps) * square
        scale = np.sqrt(np.where(varies, variance, square))
        self.scale = np.where(scale > 0, scale, 1)
        if not self.sparse:
            self.x = np.asfortranarray((self.x - self.mean) / self.scale)

    def columns(self, places: np.ndarray) -> np.ndarray:
        """The chosen columns, and with an intercept a column of ones, [N, A + 1]."""
        chosen = np.ones((len(self.weights), len(places) + self.biases), order="F")
        if self.sparse:
            own = self.x[:, places].toarray()
            chosen[:, : len(places)] = (own - self.mean[places]) / self.scale[places]
        else:
            chosen[:, : len(places)] = self.x[:, places]
        return chosen

    def pull_back(self, residual: np.ndarray) -> np.ndarray:
        """[K, N] to [K, D]: the product with the features minus their means."""
        if self.sparse:
            return (self.x.T @ residual.T).T - residual.sum(1, keepdims=True) * self.mean
        return residual @ self.x * self.scale


@jax.jit
def _report(report_of: Any, logits: Any) -> Any:
    return report_of(logits)

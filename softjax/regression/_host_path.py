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
import numpy as np
from jax.tree_util import Partial

from softjax.regression import _active_set
from softjax.regression._active_solves import Corners
from softjax.regression._features import is_sparse
from softjax.regression._groups import no_report
from softjax.regression._host_arrays import is_on_host, placed
from softjax.regression._host_preconditioner import CLEAR
from softjax.regression._l1_path import Evaluation, Path
from softjax.regression._loop import converged, is_separated
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, Status
from softjax.regression._table import (
    End,
    Table,
    from_standard,
    losses,
    probabilities,
    table_of,
    targets_of,
    to_standard,
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
    """Whether the data are in the memory of the host."""
    if not is_on_host(data):
        return False
    examples, width = data.features.shape
    return is_sparse(data.features) or examples * width <= MOST_NUMBERS


def optimum(data: Data, tol: float, max_steps: int | None) -> FitResult | None:
    """The fit with the penalties of `data`, as the end of a path; None if its end is not clear.

    A large drop of the penalty can make many parameters enter and leave the model. So if there are
    more features than examples, or if one drop has no clear end, as for a few examples that are
    nearly separated, the penalty decreases by a factor of FALL from fit to fit.
    """
    examples, width = data.features.shape
    path = _OneFit(data, Partial(no_report), tol, max_steps, lambda: False)
    for fall in (FALL,) if width > examples else (np.inf, FALL):
        with contextlib.suppress(_NotClearError):
            return path.end(float(data.l1), float(data.l2), fall)
    return None


class HostPath(Path):
    """A path by `_active_set`.

    Attributes:
        table: the standardised features, [N, D + 1].
        mass: the sum of the targets before they were divided by it.
        mean: of the original features, [D + 1].
        scale: their standard deviations, [D + 1].
        least: the smallest loss that any probabilities could have.
    """

    def __init__(self, data: Data, *options: Any):
        super().__init__(data, *options)
        targets, self.mass = targets_of(data)
        with np.errstate(all="ignore"):
            table = table_of(data, targets, not is_sparse(data.features))
            self.mean, self.scale = table.moments(table.mean_squares())
            table = table.standardised(self.mean, self.scale)
            share = targets / table.weights
            self.least = np.nansum(targets * np.where(share > 0, np.log(share), 0))
        if isinstance(table.features, np.ndarray):
            table = table._replace(features=np.asfortranarray(table.features))
        self.table = table

    def _among(
        self, penalised: Data, active: np.ndarray, params: SoftmaxRegression, limit: int | None
    ) -> tuple[FitResult, Evaluation, bool]:
        found = self._in_numpy(penalised, active, params, limit)
        return super()._among(penalised, active, params, limit) if found is None else found

    def _in_numpy(
        self, penalised: Data, active: np.ndarray, params: SoftmaxRegression, limit: int | None
    ) -> tuple[FitResult, Evaluation, bool] | None:
        """The result of `_among`; None if the end is not clear or takes more than `limit` steps."""
        places = np.flatnonzero(active)
        strength = float(penalised.l1)
        numbers = len(self.table.weights) * len(places)
        if limit == 0 or not strength > 0 or numbers >= MOST_NUMBERS:
            return None
        if not np.all(self.table.targets.sum(1) > 0):  # the bias of such a class has no optimum
            return None
        # An end with numbers that are not finite, or a matrix that has no factor, is not clear.
        failures = contextlib.suppress(np.linalg.LinAlgError)
        with failures, np.errstate(all="ignore"), _threads(numbers):
            found = self._found(penalised, strength, places, params)
            if found is not None and (limit is None or found[0].steps <= limit):
                return *found, False
        return None

    def _found(
        self, penalised: Data, strength: float, places: np.ndarray, params: SoftmaxRegression
    ) -> tuple[FitResult, Evaluation] | None:
        """The fit to some features and its evaluation; None if its end is not clear."""
        whole, scale, none = self.table, self.scale, np.zeros(self.table.biases)
        columns = np.append(places, np.arange(self.width, len(scale)))
        s, r = (
            np.append(self.factors * a / self.mass, none) for a in (strength, float(penalised.l2))
        )
        table = whole._replace(ridge=r / scale**2).among(columns)
        corners = Corners((s / scale)[columns], penalised.grouped)
        theta = to_standard(whole.theta_of(params), self.mean, scale)[:, columns]
        if not _is_clear(table, corners):
            return None
        end = _active_set.optimum(table, corners, theta, self.tol)
        if end is None or not self._point(table, corners, columns, end.theta, end).reached:
            return None
        return self._judged(table, corners, columns, end)

    def _judged(
        self, table: Table, corners: Corners, columns: np.ndarray, end: End
    ) -> tuple[FitResult, Evaluation]:
        """The rounded optimum and its evaluation.

        It has converged if the rounded parameters satisfy the rule of all solvers, or if their
        objective, though not their gradient, is within the tolerance of the optimum.
        """
        whole, mean, scale, dtype = self.table, self.mean, self.scale, self.data.features.dtype
        theta = np.zeros((len(end.theta), len(scale)))
        theta[:, columns] = end.theta
        theta = from_standard(theta, mean, scale, dtype)
        rounded = to_standard(theta.astype(np.float64), mean, scale)[:, columns]
        here = self._point(table, corners, columns, rounded, end)
        objective, z = here.objective, here.logits
        rise = objective - float(table.value(end.theta, table.logits(end.theta)))
        rise += end.decrement - corners.value(end.theta)
        near = rise <= self.tol * max(objective, self.tol)
        status = Status.CONVERGED if here.reached or near else Status.PRECISION_FLOOR
        slopes = corners.length((here.gradient * scale)[:, : self.width]).max(0)
        report: Any = ()
        if self.report_of.func is not no_report:
            report = _report(self.report_of, z.astype(dtype))
        loss = np.vdot(table.targets, losses(z)) + self.least
        parts = (slopes, scale[: self.width], loss, objective)
        numbers: list[Any] = [self.mass * part for part in parts]
        separated = bool(is_separated(table.targets, z - table.offset))
        params = placed(whole.params_of(theta))
        counts = (end.steps, end.passes, here.norm, separated)
        fit = FitResult(params, self.mass * objective, int(status), *counts, [])
        return fit, Evaluation(*numbers, report=report)

    def _point(
        self, table: Table, corners: Corners, columns: np.ndarray, theta: np.ndarray, end: End
    ) -> "_Point":
        z = table.logits(theta)
        gradient = self.table.pull_back(table.residual(probabilities(z)))
        own = gradient[:, columns] + table.ridge * theta
        norm = np.max(np.abs(_active_set.smallest_subgradient(corners, theta, own)), initial=0)
        objective = float(table.value(theta, z)) + corners.value(theta)
        reached = bool(converged(objective, end.first, norm, end.decrement, self.tol))
        return _Point(z, gradient, objective, float(norm), reached)


def _is_clear(table: Table, corners: Corners) -> bool:
    """Whether the features without a penalty are not nearly collinear, nor constant."""
    loose = np.flatnonzero(corners.strength == 0)
    if len(loose) == table.biases:
        return True
    x = table.features[:, loose]
    return bool(np.linalg.eigvalsh((x.T * table.weights) @ x)[0] > CLEAR)


class _NotClearError(Exception):
    """A fit has no clear end in NumPy."""


class _OneFit(HostPath):
    """A path for one fit, which raises an error if its end is not clear."""

    def _among(self, *args: Any) -> tuple[FitResult, Evaluation, bool]:
        found = self._in_numpy(*args)
        if found is None:
            raise _NotClearError
        return found

    def end(self, l1: float, l2: float, fall: float) -> FitResult:
        """The fit at the penalty l1, to which the penalties decrease by the factor `fall`."""
        step = self.null()
        strength = self.largest(step.evaluation)
        while True:
            before = strength
            strength = max(l1, before / fall)
            step = self.at(step, before, strength, l2)
            if strength == l1:
                return step.fit


class _Point(NamedTuple):
    """Some parameters, evaluated."""

    logits: np.ndarray  # [K, N]
    # Of the loss with respect to the kernel of all standardised features, [K, D + 1]. With the
    # means, the remaining gradient of the bias would hide the gradients of features far from 0.
    gradient: np.ndarray
    objective: float  # divided by the mass
    norm: float  # the largest entry of the smallest subgradient, as in `_loop`
    reached: bool  # whether they have converged by the rule of all solvers


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


@jax.jit
def _report(report_of: Any, logits: Any) -> Any:
    return report_of(logits)

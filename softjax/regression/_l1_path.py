"""A path of l1 penalties, from the largest to the smallest; each fit starts at the one before.

Most features are not in the model along most of a path, and a fit can leave them out. Feature j
stays out at the penalty l1 if |g_j| <= f_j l1, where g_j [K] is the gradient of the loss and |g_j|
is its largest entry or, with a grouped penalty, its norm. The gradient seldom changes by more than
the penalty. So a fit begins with the active features

    |g_j| >= f_j (2 l1 - l1_before)    at the fit before (the strong rule),

and those that are in the model. The rule is not a proof: after the fit the gradient of all features
is computed, and features that were left out wrongly are added, until there are none. So every fit
of the path is the fit to all features, to the same tolerance.

Columns of zeros increase the number of active features to one of few numbers, so that the fits of a
path share some programs.

Source: R. Tibshirani et al., "Strong rules for discarding predictors in lasso-type problems"
(2012), sections 3 and 7.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from softjax._log_softmax_core import log_softmax_core
from softjax.regression import _frame, _solve, _standardised
from softjax.regression._features import is_sparse, stored_entries
from softjax.regression._host_arrays import placed
from softjax.regression._model import SoftmaxRegression, init
from softjax.regression._objective import pack, row_norms
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, Status

# The numbers of active columns are FEWEST times powers of GROWTH, or all columns.
FEWEST, GROWTH = 64, 4
# Active columns of sparse features are made dense if they have no more numbers than this, or than
# the stored entries of all features.
DENSE = 2**23


class Evaluation(NamedTuple):
    """The parameters of a fit, evaluated with all features, also those that were not active."""

    slopes: Array  # |g_j| of the loss, [D]
    bound: Array  # the largest possible |g_j|, [D]: the standard deviations
    # The loss without penalty, minus the smallest loss that any probabilities could have.
    loss: Array
    objective: Array  # with the penalties
    report: Any  # the result of `report_of` for the logits


class Step(NamedTuple):
    fit: FitResult
    evaluation: Evaluation


def steps(path: "Path", l1: np.ndarray, l2: np.ndarray) -> Iterator[Step]:
    """The fit without the penalised features, then the fits at the decreasing penalties."""
    step = path.null()
    yield step
    before = path.largest(step.evaluation)
    for strength, ridge in zip(l1, l2, strict=True):
        step = path.at(step, before, float(strength), float(ridge))
        yield step
        before = min(before, float(strength))


class Path:
    """A path: its data, and fits to some of their features, by compiled programs.

    Once `stopped()` is true, the remaining fits take no step.
    """

    def __init__(
        self,
        data: Data,
        report_of: Partial,
        tol: float,
        max_steps: int | None,
        stopped: Callable[[], bool],
    ):
        self.data, self.report_of = data, report_of
        self.tol, self.max_steps, self.stopped = tol, max_steps, stopped
        self.width, dtype = data.features.shape[1], data.features.dtype
        self.factors = np.ones(self.width, dtype)
        if data.factors is not None:
            self.factors = np.asarray(data.factors)

    @cached_property
    def columns(self) -> "_Columns":
        """The columns of the features, for compiled fits to some of them."""
        return _Columns(self.data.features)

    def null(self) -> Step:
        """The fit without penalised features, as a fit with a penalty above all slopes."""
        dtype = self.data.features.dtype
        zeros = init(self.width, self.data.num_classes, dtype)
        largest = 16 * max(1.0, float(np.max(self.factors, initial=0)))
        strength = float(np.finfo(dtype).max) / largest
        return self._fitted(zeros, self.factors == 0, strength, 0.0)

    def largest(self, evaluation: Evaluation) -> float:
        """The smallest penalty that leaves no penalised feature in the model."""
        held = self.factors > 0
        return float(np.max(np.asarray(evaluation.slopes)[held] / self.factors[held], initial=0))

    def at(self, step: Step, before: float, l1: float, l2: float) -> Step:
        params, slopes = step.fit.params, np.asarray(step.evaluation.slopes)
        inside = np.any(np.asarray(params.kernel) != 0, 1)  # in the model for some class
        active = inside | (slopes >= self.factors * (2 * l1 - before))
        return self._fitted(params, active, l1, l2)

    def _fitted(self, params: SoftmaxRegression, active: np.ndarray, l1: float, l2: float) -> Step:
        """The fit to all features, by fits to the active ones."""
        dtype = self.data.features.dtype
        penalised = replace(self.data, l2=np.asarray(l2, dtype), l1=np.asarray(l1, dtype))
        steps = passes = 0
        stopped = self.stopped()
        limit = 0 if stopped else self.max_steps
        while True:
            fit, evaluation, complete = self._among(penalised, active, params, limit)
            params, steps, passes = fit.params, steps + fit.steps, passes + fit.passes + 2
            excess = np.asarray(evaluation.slopes) - self.factors * l1
            missed = ~active & (excess > self.tol * np.asarray(evaluation.bound))
            ended = stopped or fit.status == Status.NON_FINITE
            if complete or ended or not missed.any():
                break
            active = active | missed
        if stopped and fit.status == Status.RUNNING:
            fit = fit._replace(status=Status.CALLBACK)
        fit = fit._replace(objective=float(evaluation.objective), steps=steps, passes=passes)
        return Step(fit, evaluation)

    def _among(
        self, penalised: Data, active: np.ndarray, params: SoftmaxRegression, limit: int | None
    ) -> tuple[FitResult, Evaluation, bool]:
        """A fit to the active features, its evaluation, and whether all features were active."""
        places, data = self.columns.chosen(penalised, active)
        own = _placed_in(params, places)
        run = _solve.Run("proximal", data, own, self.tol, limit)
        fit = run.advance(run.limit)
        params = _placed_back(fit.params, places, self.width)
        shifted, frame = self._framed
        penalised = replace(shifted, l2=penalised.l2, l1=penalised.l1)
        evaluation = _evaluated(penalised, _frame.inside(frame, params), self.report_of)
        return fit._replace(params=params), evaluation, places is None

    @cached_property
    def _framed(self) -> tuple[Data, _frame.Frame]:
        return _frame.framed(self.data, False)


class _Columns:
    """The columns of the features, of which some are chosen and padded with columns of zeros."""

    def __init__(self, x: Any):
        self.x, self.sparse = x, is_sparse(x)
        if not self.sparse:
            self.host = np.asarray(x)
            return
        data, rows, columns = stored_entries(x)
        order = np.argsort(columns, kind="stable")
        self.rows, self.values = rows[order], data[order]
        self.first = np.searchsorted(columns[order], np.arange(x.shape[1] + 1))

    def chosen(self, data: Data, active: np.ndarray) -> tuple[np.ndarray | None, Data]:
        """The indices of the active columns, and their data; None and all data if all are used."""
        examples, width = self.x.shape
        size = _usual_number(int(np.sum(active)))
        numbers = len(self.values) if self.sparse else examples * width
        if 2 * size >= width or (self.sparse and examples * size > max(DENSE, numbers)):
            return None, data
        places = np.flatnonzero(active)
        x = np.zeros((examples, size), self.x.dtype)
        if self.sparse:
            for place, column in enumerate(places):
                entries = slice(self.first[column], self.first[column + 1])
                x[self.rows[entries], place] = self.values[entries]
        else:
            x[:, : len(places)] = self.host[:, places]
        factors = None
        if data.factors is not None:
            factors = np.ones(size, self.x.dtype)
            factors[: len(places)] = np.asarray(data.factors)[places]
        return places, replace(data, features=placed(x), factors=factors)


def _usual_number(count: int) -> int:
    """The number of columns, with padding, for `count` active ones."""
    size = FEWEST
    while size < count:
        size *= GROWTH
    return size


def _placed_in(params: SoftmaxRegression, places: np.ndarray | None) -> SoftmaxRegression:
    """The parameters of the active columns, and zeros for the columns of zeros."""
    if places is None:
        return params
    size = _usual_number(len(places))
    kernel = np.zeros((size, params.kernel.shape[1]), params.kernel.dtype)
    kernel[: len(places)] = np.asarray(params.kernel)[places]
    return params._replace(kernel=placed(kernel))


def _placed_back(
    params: SoftmaxRegression, places: np.ndarray | None, width: int
) -> SoftmaxRegression:
    """The parameters of all columns: zeros for columns that were not active."""
    if places is None:
        return params
    kernel = np.zeros((width, params.kernel.shape[1]), params.kernel.dtype)
    kernel[places] = np.asarray(params.kernel)[: len(places)]
    return params._replace(kernel=placed(kernel))


@jax.jit
def _evaluated(data: Data, params: SoftmaxRegression, report_of: Partial) -> Evaluation:
    (problem, mass), theta = data.normalised_problem(), pack(params)
    logits = problem.logits(theta)
    of_loss = replace(problem, l2=jnp.zeros_like(problem.l2))
    # For the features minus their means, since the remaining gradient of the bias would hide the
    # gradients of features far from 0.
    mean, scale = _standardised.moments(problem, problem.gradient_bound())
    gradient = of_loss.point(theta, logits).gradient
    gradient = _standardised.to_standard(mean, scale, gradient)[:, :-1] * scale[None]
    slopes = row_norms(gradient)[0] if data.grouped else jnp.max(jnp.abs(gradient), 0)
    targets = problem.targets
    shares = targets / jnp.maximum(problem.weights, jnp.finfo(mass.dtype).tiny)[None]
    least = jnp.where(targets > 0, jnp.log(jnp.where(targets > 0, shares, 1)), 0)
    loss = jnp.vdot(targets, least - log_softmax_core(logits, (0,)))
    return Evaluation(
        mass * slopes,
        mass * scale,
        mass * loss,
        mass * problem.value(theta, logits),
        report_of(logits),
    )

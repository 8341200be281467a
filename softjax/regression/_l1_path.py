"""A path of penalties with corners, from the largest to the smallest, each fit from the one before.

Most features are not in the model along most of a path, and a fit need not see them. Feature j
stays out at the penalty l1 where |g_j| <= f_j l1. Here g_j [K] is the gradient of the loss, and
|g_j| is its largest entry or, where the penalty is grouped, its norm. The gradient seldom changes
by more than the penalty does. A fit therefore begins with the features that have

    |g_j| >= f_j (2 l1 - l1_before)    at the fit before (the strong rule),

and with those that were ever in the model. The rule proves nothing: after the fit the gradient of
all features is computed, and the features that should not have been left out join the fit, until
none is left. So every fit of the path is the fit to all features, to the same tolerance.

Columns of zeros bring the number of features that take part to one of few numbers, so that the fits
of a path share some programs.

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

from softjax._softmax import log_softmax_core
from softjax.regression import _frame, _solve, _standardised
from softjax.regression._features import is_sparse
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import (
    Data,
    example_weights,
    gradient_bound,
    logits_at,
    normalised,
    pack,
    point,
    problem_of,
    row_norms,
    value,
)
from softjax.regression._result import FitResult, Status

# The numbers of columns that take part are these times powers of GROWTH, or all.
FEWEST, GROWTH = 64, 4
# Features that take part are dense where they are no more numbers than this, or than the whole.
DENSE = 2**23


class Look(NamedTuple):
    """What all features, also those that took no part, say about the parameters of a fit.

    Attributes:
        slopes: |g_j| of the loss, [D].
        bound: what |g_j| can be at most, [D]: the standard deviations.
        loss: the loss of the labels, without penalty, less what no parameters could take from it.
        objective: with the penalties.
        report: what else was asked of the logits.
    """

    slopes: Array
    bound: Array
    loss: Array
    objective: Array
    report: Any


class Step(NamedTuple):
    """A fit of the path, and what was seen of it."""

    fit: FitResult
    look: Look


def steps(path: "Path", l1: np.ndarray, l2: np.ndarray) -> Iterator[Step]:
    """The fit without the features that are penalised, and those at the penalties, which fall."""
    step = path.null()
    yield step
    before = path.largest(step.look)
    for strength, ridge in zip(l1, l2, strict=True):
        step = path.at(step, before, float(strength), float(ridge))
        yield step
        before = min(before, float(strength))


class Path:
    """A path: its data, and fits to some of their features, by compiled programs.

    The fits after `stopped` says so take no step.
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
        self.columns = _Columns(data.features)

    def null(self) -> Step:
        """The fit of the unpenalised features: of all, at a penalty beyond all slopes."""
        data = self.data
        zeros = SoftmaxRegression(
            jnp.zeros((self.width, data.num_classes), self.data.features.dtype),
            jnp.zeros(data.num_classes, self.data.features.dtype),
        )
        largest = 16 * max(1.0, float(np.max(self.factors, initial=0)))
        strength = float(np.finfo(self.data.features.dtype).max) / largest
        return self._fitted(zeros, self.factors == 0, strength, 0.0)

    def largest(self, look: Look) -> float:
        """The smallest penalty that leaves no penalised feature in the model."""
        held = self.factors > 0
        return float(np.max(np.asarray(look.slopes)[held] / self.factors[held], initial=0))

    def at(self, step: Step, before: float, l1: float, l2: float) -> Step:
        params = step.fit.params
        slopes, inside = np.asarray(step.look.slopes), _is_inside(params)
        taking_part = inside | (slopes >= self.factors * (2 * l1 - before))
        return self._fitted(params, taking_part, l1, l2)

    def _fitted(
        self, params: SoftmaxRegression, taking_part: np.ndarray, l1: float, l2: float
    ) -> Step:
        """The fit to all features, by fits to those that take part."""
        penalised = self._with_penalties(l1, l2)
        steps = passes = 0
        stopped = self.stopped()
        limit = 0 if stopped else self.max_steps
        while True:
            fit, look, complete = self._among(penalised, taking_part, params, limit)
            params, steps, passes = fit.params, steps + fit.steps, passes + fit.passes + 2
            excess = np.asarray(look.slopes) - self.factors * l1
            missed = ~taking_part & (excess > self.tol * np.asarray(look.bound))
            ended = stopped or fit.status == Status.NON_FINITE
            if complete or ended or not missed.any():
                break
            taking_part = taking_part | missed
        if stopped and fit.status == Status.RUNNING:
            fit = fit._replace(status=Status.CALLBACK)
        fit = fit._replace(objective=float(look.objective), steps=steps, passes=passes)
        return Step(fit, look)

    def _among(
        self,
        penalised: Data,
        taking_part: np.ndarray,
        params: SoftmaxRegression,
        limit: int | None,
    ) -> tuple[FitResult, Look, bool]:
        """A fit to the features that take part, what it looks like, and whether all took part."""
        places, data = self.columns.chosen(penalised, taking_part)
        own = _placed_in(params, places)
        run = _solve.Run("proximal", data, own, self.tol, limit)
        fit = run.advance(run.limit)
        params = _placed_back(fit.params, places, self.width)
        shifted, frame = self._framed
        strengths = {name: getattr(penalised, name) for name in ("l2", "l1", "l1_rows")}
        seen = replace(shifted, **strengths)
        look = _look(seen, _frame.inside(frame, params), self.report_of)
        return fit._replace(params=params), look, places is None

    @cached_property
    def _framed(self) -> tuple[Data, _frame.Frame]:
        return _frame.framed(self.data, False)

    def _with_penalties(self, l1: float, l2: float) -> Data:
        dtype = self.data.features.dtype
        strength = np.asarray(l1, dtype)
        data = replace(self.data, l2=np.asarray(l2, dtype))
        if data.l1_rows is not None:
            return replace(data, l1_rows=strength)
        return replace(data, l1=strength)


class _Columns:
    """Some columns of the features, brought to a usual number by columns of zeros."""

    def __init__(self, x: Any):
        self.x, self.sparse = x, is_sparse(x)
        if not self.sparse:
            self.host = np.asarray(x)
            return
        rows, columns = np.asarray(x.indices).T
        inside = (rows < x.shape[0]) & (columns < x.shape[1])
        order = np.argsort(columns[inside], kind="stable")
        self.rows, self.values = rows[inside][order], np.asarray(x.data)[inside][order]
        self.first = np.searchsorted(columns[inside][order], np.arange(x.shape[1] + 1))

    def chosen(self, data: Data, taking_part: np.ndarray) -> tuple[np.ndarray | None, Data]:
        """Which columns take part, and the data of these alone; None where all do."""
        examples, width = self.x.shape
        size = _usual_number(int(np.sum(taking_part)))
        numbers = len(self.values) if self.sparse else examples * width
        if 2 * size >= width or (self.sparse and examples * size > max(DENSE, numbers)):
            return None, data
        places = np.flatnonzero(taking_part)
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
        return places, replace(data, features=jnp.asarray(x), factors=factors)


def _usual_number(count: int) -> int:
    """The number of columns that `count` of them are brought to."""
    size = FEWEST
    while size < count:
        size *= GROWTH
    return size


def _is_inside(params: SoftmaxRegression) -> np.ndarray:
    """[D]: which features are in the model for some class."""
    return np.any(np.asarray(params.kernel) != 0, 1)


def _placed_in(params: SoftmaxRegression, places: np.ndarray | None) -> SoftmaxRegression:
    """The parameters of the columns that take part, and zeros for the columns of zeros."""
    if places is None:
        return params
    size = _usual_number(len(places))
    kernel = np.zeros((size, params.kernel.shape[1]), params.kernel.dtype)
    kernel[: len(places)] = np.asarray(params.kernel)[places]
    return params._replace(kernel=jnp.asarray(kernel))


def _placed_back(
    params: SoftmaxRegression, places: np.ndarray | None, width: int
) -> SoftmaxRegression:
    """The parameters of all columns: zeros for the columns that took no part."""
    if places is None:
        return params
    kernel = np.zeros((width, params.kernel.shape[1]), params.kernel.dtype)
    kernel[places] = np.asarray(params.kernel)[: len(places)]
    return params._replace(kernel=jnp.asarray(kernel))


@jax.jit
def _look(data: Data, params: SoftmaxRegression, report_of: Partial) -> Look:
    data, mass = normalised(data)
    problem, theta = problem_of(data), pack(params)
    logits = logits_at(problem, theta)
    of_loss = problem._replace(l2=jnp.zeros_like(problem.l2))
    # Around the means: what is left of the gradient of the bias would hide that of features far
    # from 0.
    mean, scale = _standardised.moments(problem, gradient_bound(problem))
    gradient = point(of_loss, theta, logits).gradient
    gradient = _standardised.to_standard(mean, scale, gradient)[:, :-1] * scale[None]
    slopes = jnp.max(jnp.abs(gradient), 0)
    if data.l1_rows is not None:
        slopes = row_norms(gradient)[0]
    targets = problem.targets
    shares = targets / jnp.maximum(example_weights(targets), jnp.finfo(mass.dtype).tiny)[None]
    least = jnp.where(targets > 0, jnp.log(jnp.where(targets > 0, shares, 1)), 0)
    loss = jnp.vdot(targets, least - log_softmax_core(logits, (0,)))
    return Look(
        mass * slopes,
        mass * scale,
        mass * loss,
        mass * value(problem, theta, logits),
        report_of(logits),
    )


def nothing(logits: Array) -> tuple[()]:
    return ()

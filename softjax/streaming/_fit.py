"""fit: the exact optimum for streamed rows, with one pass over the rows for each gradient.

The solver is the L-BFGS of `regression.fit`, preconditioned by a sample of the rows. The sample
only affects the direction: the gradient is the gradient of all rows, and so determines the optimum.
The objective is convex, so that a step length t is accepted if the slope
<gradient(theta + t d), d> is small. The accepted trial gives the gradient of the next step, so that
most steps take one pass.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import Array

from softjax import _checks, processes
from softjax.regression import _frame, _preconditioner, _standardised
from softjax.regression._arguments import at_least, constant, errors_name, penalty
from softjax.regression._descent import OVERSHOOT, SLOPE_LEFT
from softjax.regression._features import in_full_precision
from softjax.regression._host_arrays import placed
from softjax.regression._lbfgs import LBFGS, Memory, lbfgs
from softjax.regression._loop import NEAR, STILL, converged, progressed
from softjax.regression._objective import centred, unpack
from softjax.regression._result import Event, FitResult, Status, Validation, recorded
from softjax.regression._steps import Batch
from softjax.streaming._passes import FIT, Passes, Sums, View
from softjax.streaming._rows import Rows, computed_in, refuse_other_rows, transformed, validation_of

# Each trial of a line search is a pass over the data.
TRIALS = 20


@in_full_precision
@errors_name(FIT)
def fit(
    rows: Rows,
    *,
    num_classes: int,
    l2: float = 0.0,
    fit_intercept: bool = True,
    tol: float = 1e-6,
    max_steps: int = 1000,
    transform: Callable[[Array], Array] | None = None,
    held_out: np.ndarray | None = None,
    validation: Validation | None = None,
    callback: Callable[[Event], bool | None] | None = None,
) -> FitResult:
    """Fits a softmax regression to rows that need not fit in memory: the exact optimum.

        argmin sum_i w_i loss_i / sum_i w_i + l2 / 2 |kernel|^2

    Each pass reads all rows once. With several processes, each reads its own part of the rows, and
    all have the same parameters. Sums over chunks are in float64, so that the result is as accurate
    as that of `regression.fit`.

    Edge cases: features and labels that `regression.fit` refuses are refused after the first pass.
        Floating labels [N] that are whole numbers are class indices. For separated classes, and for
        a class without examples, see `regression.fit`.

    Args:
        rows: `ArrayRows`, with weights w and an offset if they have them, the result of
            `open_rows`, or an object with the same methods.
        num_classes: K.
        l2: the strength of the penalty.
        fit_intercept: whether the model has a bias; otherwise the bias stays 0.
        tol: the fit stops if the gradient, relative to its largest possible value, and the
            predicted decrease of the last step, relative to the objective, are at most this.
        max_steps: the largest number of steps.
        transform: a function of the features [n, D] on the device, for example to standardise
            them; it must keep their number.
        held_out: the numbers of the rows that are left out of the fit.
        validation: the features, after `transform`, and labels of the examples to evaluate on.
        callback: called with an `Event` before each step; the fit stops if it returns True on any
            process.

    Returns:
        `FitResult`, whose `passes` counts two products with the features for each pass.

    Raises:
        TypeError, ValueError: an argument is not valid, a feature is not finite, a label is not a
            class, or all labels are of one class.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1, 0, 1])
        >>> rows = softjax.streaming.ArrayRows(x, y)
        >>> result = softjax.streaming.fit(rows, num_classes=2, l2=0.01)
        >>> result.stop_reason, round(result.objective, 4)
        ('converged', 0.5889)
    """
    begin = time.perf_counter()
    refuse_other_rows(FIT, rows)
    num_classes = at_least("num_classes", num_classes, 2)
    max_steps = at_least("max_steps", max_steps, 0)
    tol = _checks.not_negative_number(FIT, "tol", tol)
    _checks.refuse_uncallable(FIT, "transform", transform)
    _checks.refuse_uncallable(FIT, "callback", callback)
    dtype, width = computed_in(rows.read(0, 1)[0].dtype), rows.num_features
    transformed(FIT, transform, (rows.num_rows, width), dtype, width)
    strength = float(penalty("l2", l2, dtype))
    validation = validation_of(validation, (width, num_classes))
    intercept = constant(fit_intercept, dtype)
    passes = Passes(rows, num_classes, strength, intercept, transform, held_out, dtype)

    theta = np.zeros((num_classes, width + 1), dtype)
    here = passes.at(theta)
    sample = passes.sample()
    if passes.look_for_centre(sample):
        here = passes.at(theta)
    rule, memory, step = _StopRule(passes, tol, here.value), _first_memory(theta), 0
    history: list[dict[str, float]] = []
    while True:
        norm = here.relative_norm
        status = rule.status_at(theta, here, norm)
        seconds = time.perf_counter() - begin
        params, moved = _frame.outside(passes.centre, placed(unpack(theta)))
        event = Event(step, passes.count, here.value, norm, seconds, params)
        event = recorded(event, validation, history)
        interrupted = callback is not None and any(processes.gather(bool(callback(event))))
        if status != Status.RUNNING or interrupted or step == max_steps:
            break
        g, size = here.gradient.astype(dtype), dtype.type(norm)
        given = passes.view, sample, dtype.type(strength)
        d, memory, unseen = _direction(*given, theta, g, memory, np.int32(step), size)
        trial = _line_search(passes, theta, here, np.asarray(d))
        if trial is None:
            status = Status.PRECISION_FLOOR
            break
        rule.decrement = -np.vdot(here.gradient, d) / 2 + float(unseen)
        (theta, here), step = trial, step + 1

    if passes.centre is not None:
        status = int(_frame.status_outside(np.int32(status), moved, here.value, tol))
    status = rule.status_at_end(status, theta, here)
    status = Status.CALLBACK if status == Status.RUNNING and interrupted else status
    counts = (step, 2 * passes.count, norm, bool(here.separated))
    return FitResult(params, here.value, status, *counts, history)


def _first_memory(theta: np.ndarray) -> Memory:
    """The memory of L-BFGS before the first step, in the dtype of the fit.

    Float32 directions would save little time, since a pass over the rows costs more.
    """
    no_rows: Any = np.empty((0, theta.shape[1] - 1), theta.dtype)
    preconditioner = _preconditioner.empty(no_rows, len(theta), theta.dtype)
    return LBFGS.memory(no_rows, theta)._replace(preconditioner=preconditioner)


class _StopRule:
    """The stop rule of `regression`, for a loop on the host that checks after each pass.

    Without a penalty there may be no optimum. Quasi-complete separation is suspected if parameters
    that meet the rule have moved since the gradient was first below NEAR, or in the last step.

    Attributes:
        decrement: half of the predicted decrease of the last step, in nats; the loop sets it.
        suspected: whether quasi-complete separation is suspected.
    """

    def __init__(self, passes: Passes, tol: float, first: float):
        self._passes, self._tol, self._first = passes, tol, first
        self._lowest, self._best, self._stalled = np.inf, np.inf, 0
        self._near: np.ndarray | None = None
        self.decrement, self.suspected = np.inf, False

    def status_at(self, theta: np.ndarray, here: Sums, norm: float) -> int:
        """The status at `theta`, given the sums and the relative norm of the gradient there."""
        status = Status.RUNNING
        if not np.isfinite(here.value) or not np.isfinite(norm):
            status = Status.NON_FINITE
        elif converged(here.value, self._first, norm, self.decrement, self._tol):
            moving = self._may_move(theta, here)
            self.suspected = self.suspected or moving
            self._near = theta if moving else self._near
            status = Status.RUNNING if moving else Status.CONVERGED
        if status == Status.RUNNING and self._stalled >= LBFGS.patience:
            status = Status.PRECISION_FLOOR
        if self._near is None or self._best >= NEAR:
            self._near = theta
        better = progressed(here.value, self._lowest, norm, self._best)
        self._stalled = 0 if better else self._stalled + 1
        self._lowest, self._best = min(here.value, self._lowest), min(norm, self._best)
        return status

    def status_at_end(self, status: int, theta: np.ndarray, here: Sums) -> int:
        """SEPARATED or QUASI_SEPARATED if there is no optimum, otherwise `status`."""
        done = status in (Status.CONVERGED, Status.PRECISION_FLOOR)
        if done and here.separated and self._passes.l2 == 0:
            return Status.SEPARATED
        lacks_examples = bool(self._passes.view.constant) and not np.all(here.classes)
        if (done and lacks_examples) or (self.suspected and self._passes.is_proven(theta)):
            return Status.QUASI_SEPARATED
        return status

    def _may_move(self, theta: np.ndarray, here: Sums) -> bool:
        """Whether the logits of any example have changed since the gradient was below NEAR."""
        if self._passes.l2 or here.separated or self._near is None:
            return False
        return self._passes.move(theta - self._near) >= STILL


@jax.jit
def _direction(
    view: View,
    sample: Batch,
    l2: Array,
    theta: Array,
    gradient: Array,
    memory: Memory,
    step: Array,
    norm: Array,
) -> tuple[Array, Memory, Array]:
    """The direction and the memory of L-BFGS, and the decrement outside of its preconditioner.

    The gradients are sums over all rows; the preconditioner is computed from the sample. The norm
    of the gradient is relative to its largest possible value.
    """
    problem = replace(view.data(sample).problem(), l2=l2)
    s = _standardised.standardise(problem, problem.gradient_bound(), problem.features.dtype)
    here = problem.point(theta, problem.logits(theta))
    here = here._replace(gradient=centred(gradient))
    d, memory = lbfgs(problem, s, here, memory, step, norm)
    return centred(d), memory, _preconditioner.unseen(memory.preconditioner, here.gradient)


def _line_search(
    passes: Passes, theta: np.ndarray, here: Sums, d: np.ndarray
) -> tuple[np.ndarray, Sums] | None:
    """The first trial along d whose slope is small enough; None if the objective grows along d.

    The rule is that of `regression`, with the secant of two slopes instead of their derivative.
    """
    first = float(np.vdot(here.gradient, d))
    if not first < 0:
        return None
    low, high, t = (0.0, first), (np.inf, np.nan), 1.0
    lowest = None
    for _ in range(TRIALS):
        trial = (theta + t * d).astype(theta.dtype)
        sums = passes.at(trial)
        slope = float(np.vdot(sums.gradient, d))
        if SLOPE_LEFT * first <= slope <= -OVERSHOOT * first:
            return trial, sums
        if slope < 0:
            low, lowest = (t, slope), (trial, sums)
        else:
            high = (t, slope)
        t = _secant(low, high, first)
    return lowest


def _secant(low: tuple[float, float], high: tuple[float, float], first: float) -> float:
    """The zero of the line through two slopes, at least 5 % of the interval from its ends."""
    (a, slope_a), (b, slope_b) = low, high
    if not np.isfinite(b):
        return min(max(a * first / (first - slope_a), 2 * a), 10 * a) if slope_a > first else 4 * a
    t = a - slope_a * (b - a) / (slope_b - slope_a) if np.isfinite(slope_b) else a
    margin = 0.05 * (b - a)
    return min(max(t, a + margin), b - margin)

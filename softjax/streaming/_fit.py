"""fit: the exact optimum for rows that are streamed, with one pass over them for each gradient.

L-BFGS as in memory, preconditioned by a sample of the rows. A preconditioner only steers: the
gradient, which is that of all rows, decides. The objective is convex, so that a step length is good
where the slope <gradient(theta + t d), d> is small. The gradient of the accepted trial is that of
the next step, so that most steps take one pass.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax import _checks, processes
from softjax.regression import Event, FitResult, _ending, _frame, _preconditioner, _standardised
from softjax.regression._arguments import refuse_scales
from softjax.regression._batches import Batch, good_rows
from softjax.regression._convergence import NEAR, STILL, converged, progressed
from softjax.regression._existence import is_separated
from softjax.regression._lbfgs import LBFGS, Memory, lbfgs
from softjax.regression._line_search import OVERSHOOT, SLOPE_LEFT, TRIALS, largest_move
from softjax.regression._objective import (
    Data,
    Problem,
    centred,
    class_scores,
    gradient_bound,
    logits_at,
    point,
    problem_of,
    unpack,
    value,
)
from softjax.regression._products import in_full_precision
from softjax.regression._result import Status, Validation, record, with_validation
from softjax.streaming._devices import ahead
from softjax.streaming._rows import (
    Rows,
    as_labels,
    checked_validation,
    computed_in,
    parts_of,
    penalty,
    real_array,
    row_numbers,
)

FIT = "streaming.fit"
CHUNK_BYTES = 1 << 23
SAMPLE_BYTES = 1 << 25
RUNS = 16


class Sums(NamedTuple):
    """What a pass adds up, over all rows of all processes, in float64.

    Attributes:
        value: the objective.
        gradient: [K, D + 1].
        squares: w x^2, and w, summed, [D + 1].
        separated: whether every row has its own class strictly on top.
        largest: the largest |x| of each feature, [D], after the transform.
        classes: the weight of the rows of each class, [K].
    """

    value: Any
    gradient: Any
    squares: Any
    separated: Any
    largest: Any
    classes: Any


@in_full_precision
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

    Each pass streams all rows once. With many processes each streams its own part of the rows, and
    all have the same parameters. Sums over chunks are kept in float64, so that the result is as
    accurate as that of `regression.fit`.

    Edge cases: what `regression.fit` refuses in features and labels is refused after the first
        pass. Floating labels [N] that are whole numbers are class indices. For separated classes,
        and for a class without examples, see `regression.fit`.

    Args:
        rows: `ArrayRows`, with their weights w and their offset if they have them, the result of
            `open_rows`, or anything like them.
        num_classes: K.
        l2: the strength of the penalty.
        fit_intercept: whether there is a bias; without one it stays 0.
        tol: stop where the gradient is no larger, relative to what it can be at most, and neither
            is what the last step promised, relative to the objective.
        max_steps: the largest number of steps.
        transform: a function of the features [n, D] on the device, as to standardise them; it
            keeps their number.
        held_out: the numbers of rows that take no part in the fit.
        validation: features, as they are after `transform`, and labels to evaluate on.
        callback: called with an `Event` before each step; True, on any process, stops.

    Returns:
        `FitResult`, whose `passes` counts two products with the features for each pass.

    Raises:
        TypeError, ValueError: an argument that does not fit; a feature that is not finite, a label
            that is not a class, or labels of one class only.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1, 0, 1])
        >>> rows = softjax.streaming.ArrayRows(x, y)
        >>> result = softjax.streaming.fit(rows, num_classes=2, l2=0.01)
        >>> result.stop_reason, round(result.objective, 4)
        ('converged', 0.5889)
    """
    begin = time.perf_counter()
    num_classes = _checks.at_least(FIT, "num_classes", num_classes, 2)
    max_steps = _checks.at_least(FIT, "max_steps", max_steps, 0)
    tol = _checks.not_negative_number(FIT, "tol", tol)
    dtype = computed_in(rows.read(0, 1)[0].dtype)
    l2 = penalty(FIT, l2, dtype)
    validation = checked_validation(FIT, validation, rows.num_features, num_classes)
    constant = np.asarray(_checks.flag(FIT, "fit_intercept", fit_intercept), dtype)
    passes = _Passes(rows, num_classes, l2, constant, transform, held_out, dtype)

    theta = np.zeros((num_classes, rows.num_features + 1), dtype)
    here = passes.at(theta)
    sample = passes.sample()
    if passes.look_for_centre(sample):
        here = passes.at(theta)
    bound = np.sqrt(np.where(here.squares > 0, here.squares, 1))
    no_rows = jnp.empty((0, rows.num_features), dtype)
    # A pass over the rows costs more than a direction: it is computed in the dtype of the fit.
    preconditioner = _preconditioner.empty(no_rows, num_classes, dtype)
    memory = LBFGS.memory(no_rows, theta)._replace(preconditioner=preconditioner)
    rule, step = _StopRule(passes, tol, here.value), 0
    history: list[dict[str, float]] = []
    while True:
        norm = float(np.max(np.abs(here.gradient) / bound))
        status = rule.status_at(theta, here, norm)
        seconds = time.perf_counter() - begin
        params, moved = _frame.outside(passes.centre, unpack(jnp.asarray(theta)))
        event = Event(step, passes.count, here.value, norm, seconds, params, None, None)
        event = with_validation(event, validation)
        history.append(record(event))
        interrupted = callback is not None and any(processes.gather(bool(callback(event))))
        if status != Status.RUNNING or interrupted or step == max_steps:
            break
        gradient = here.gradient.astype(dtype)
        arguments = (theta, gradient, memory, np.int32(step), dtype.type(norm))
        problem = (*passes.fixed, passes.shift, constant, sample, dtype.type(l2))
        d, memory, unseen = _direction(*problem, *arguments)
        trial = _line_search(passes, theta, here, np.asarray(d))
        if trial is None:
            status = Status.PRECISION_FLOOR
            break
        rule.decrement = -np.vdot(here.gradient, d) / 2 + float(unseen)
        (theta, here), step = trial, step + 1

    if passes.centre is not None:
        status = int(_frame.status_outside(np.int32(status), moved, here.value, tol))
    status = rule.status_at_end(status, theta, here)
    if status == Status.RUNNING and interrupted:
        status = Status.CALLBACK
    return FitResult(
        params, here.value, status, step, 2 * passes.count, norm, bool(here.separated), history
    )


class _StopRule:
    """The stop rule of `regression`, for a loop on the host that looks at one pass at a time.

    Where no penalty holds them, parameters that still move, since the gradient has been NEAR or in
    the last step, may have no optimum: then quasi-complete separation is suspected.

    Attributes:
        decrement: half of what the model promised for the last step, nats; the loop sets it.
        suspected: whether quasi-complete separation is suspected.
    """

    def __init__(self, passes: "_Passes", tol: float, first: float):
        self._passes, self._tol, self._first = passes, tol, first
        self._lowest, self._best, self._stalled = np.inf, np.inf, 0
        self._near: np.ndarray | None = None
        self.decrement, self.suspected = np.inf, False

    def status_at(self, theta: np.ndarray, here: Sums, norm: float) -> int:
        """The status at parameters with these sums and this relative gradient."""
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
        """SEPARATED or QUASI_SEPARATED where there is no optimum, else `status`."""
        done = status in (Status.CONVERGED, Status.PRECISION_FLOOR)
        if done and here.separated and self._passes.l2 == 0:
            return Status.SEPARATED
        lacks_examples = bool(self._passes.constant) and not np.all(here.classes)
        if (done and lacks_examples) or (self.suspected and self._passes.is_proven(theta)):
            return Status.QUASI_SEPARATED
        return status

    def _may_move(self, theta: np.ndarray, here: Sums) -> bool:
        """Whether the parameters have moved some example since they were near their end."""
        if self._passes.l2 or here.separated or self._near is None:
            return False
        return self._passes.move(theta - self._near) >= STILL


class _Passes:
    """Passes over the rows of this process, and their sums over all."""

    def __init__(
        self,
        rows: Rows,
        num_classes: int,
        l2: float,
        constant: np.ndarray,
        transform: Callable[[Array], Array] | None,
        held_out: np.ndarray | None,
        dtype: np.dtype,
    ):
        self.rows, self.l2, self.constant, self.dtype = rows, l2, constant, dtype
        self.num_classes, self.fixed = num_classes, (num_classes, transform)
        self.held_out = row_numbers(FIT, held_out, rows.num_rows)
        self.row_bytes = (rows.num_features + num_classes) * self.dtype.itemsize
        weights = getattr(rows, "weights", None)
        self.weight = float(rows.num_rows - len(self.held_out))
        if weights is not None:
            self.weight = float(np.sum(weights) - np.sum(weights[self.held_out]))
        self.count = 0
        # What is subtracted from the features, in the memory of the host and of the device.
        self.centre, self.shift = None, jnp.zeros(rows.num_features, dtype)
        # The number of the first bad row that this process has read, and what is wrong with it.
        self.bad = (rows.num_rows, "")

    def look_for_centre(self, sample: Batch) -> bool:
        """Whether features are far from 0. If so, their middle is subtracted from now on."""
        features = _transformed(self.fixed[1], sample.features)
        self.centre = _frame.centre_of(features, sample.weights) if self.constant else None
        if self.centre is not None:
            self.shift = self.centre
        return self.centre is not None

    def move(self, d: np.ndarray) -> float:
        """The largest number of nats by which `d` moves a class of a row against another class."""
        fixed = (*self.fixed, self.shift, self.constant, jnp.asarray(d))
        moves = [_move(*fixed, chunk) for chunk in self._own()]
        self.count += 1
        return max(map(float, processes.gather(max(map(float, moves), default=0.0))))

    def is_proven(self, theta: np.ndarray) -> bool:
        """Whether the rows prove that they are quasi-separated, if all are few enough to hold."""
        count = self.rows.num_rows
        if count * self.row_bytes > SAMPLE_BYTES:
            return False
        batch = self._chunk(count, count, 0)
        features = _frame.less(_transformed(self.fixed[1], batch.features), self.shift)
        data = _data(features, jnp.asarray(self.constant), batch)
        return _ending.is_proven(self.num_classes, data, jnp.asarray(theta))

    def at(self, theta: np.ndarray) -> Sums:
        """The objective and its gradient, from one pass."""
        on_device = jnp.asarray(theta)
        width = self.rows.num_features + 1
        zero = (0.0, np.zeros((self.num_classes, width)), np.zeros(width), True)
        total = Sums(*zero, np.zeros(width - 1), np.zeros(self.num_classes))
        for chunk in self._own():
            total = _added(total, _sums(*self.fixed, self.shift, self.constant, on_device, chunk))
        everywhere = Sums(*zero, np.zeros(width - 1), np.zeros(self.num_classes))
        for part in processes.gather(total):
            everywhere = _added(everywhere, part)
        if not self.count:
            self._refuse(everywhere)
        self.count += 1
        kernel = theta.astype(np.float64)
        kernel[:, -1] = 0  # the bias
        return Sums(
            float(everywhere.value / self.weight + self.l2 / 2 * np.vdot(kernel, kernel)),
            everywhere.gradient / self.weight + self.l2 * kernel,
            everywhere.squares / self.weight,
            everywhere.separated,
            everywhere.largest,
            everywhere.classes,
        )

    def _own(self) -> Iterator[Batch]:
        """The rows of this process, in chunks."""
        own = own_rows(self.rows.num_rows)
        size = max(min(CHUNK_BYTES // self.row_bytes, len(own)), 1)
        starts = range(own.start, own.stop, size)
        with closing(ahead(partial(self._chunk, size, own.stop), starts)) as chunks:
            yield from chunks

    def sample(self) -> Batch:
        """Runs of rows from all over the data."""
        size = max(min(SAMPLE_BYTES // self.row_bytes, self.rows.num_rows) // RUNS, 1)
        last = self.rows.num_rows - size
        starts = np.unique(np.linspace(0, last, RUNS).astype(np.int64)).tolist()
        parts = [self._chunk(size, self.rows.num_rows, start) for start in starts]
        return jax.tree.map(lambda *part: jnp.concatenate(part), *parts)

    def _chunk(self, size: int, end: int, start: int) -> Batch:
        """Rows from `start` on, `size` of them, on the device; of weight 0 from `end` on."""
        stop = min(start + size, end)
        x, labels, weights, offset = parts_of(self.rows.read(start, stop))
        x, y = real_array(FIT, "features", x), as_labels(FIT, labels)
        weights = np.ones(len(y)) if weights is None else real_array(FIT, "weights", weights)
        first, last = np.searchsorted(self.held_out, [start, stop])

        def padded(part: np.ndarray, dtype: np.dtype = self.dtype) -> np.ndarray:
            whole = np.zeros((size, *part.shape[1:]), dtype)
            whole[: stop - start] = part
            whole[self.held_out[first:last] - start] = 0
            return whole

        with np.errstate(over="ignore"):  # what is infinite now is found to be so by `_look`
            if y.ndim == 2:
                _checks.same_shape(FIT, "labels", y, (len(y), self.num_classes))
            batch = Batch(
                padded(x),
                padded(y, self.dtype if y.ndim == 2 else np.dtype(np.int32)),
                padded(weights),
                None if offset is None else padded(real_array(FIT, "offset", offset)),
            )
        if not self.count:
            self._look(start, batch, labels)
        return jax.tree.map(jnp.asarray, batch)

    def _look(self, start: int, batch: Batch, labels: Any) -> None:
        """Notes the first bad row of a run of rows."""
        wrong = np.flatnonzero(~good_rows(np, batch, self.num_classes))
        if not len(wrong) or start + wrong[0] >= self.bad[0]:
            return
        row = int(wrong[0])
        x, place = batch.features, start + row
        if not np.isfinite(x[row]).all():
            column = int(np.argmin(np.isfinite(x[row])))
            got = f"{x[row, column]} at {place, column}"
            fault = _checks.message(FIT, "features", f"finite in {self.dtype}", got)
        elif batch.offset is not None and not np.isfinite(batch.offset[row]).all():
            got = f"{batch.offset[row]} at {(place,)}"
            fault = _checks.message(FIT, "offset", f"finite in {self.dtype}", got)
        else:
            soft = batch.labels.ndim == 2
            expected = "finite and >= 0" if soft else f"in [0, {self.num_classes})"
            fault = _checks.message(FIT, "labels", expected, f"{labels[row]} at {(place,)}")
        self.bad = place, fault

    def _refuse(self, sums: Sums) -> None:
        """Refuses, after the first pass of all processes, what `regression.fit` refuses."""
        _, fault = min(processes.gather(self.bad))
        if fault:
            raise ValueError(fault)
        classes = np.flatnonzero(sums.classes)
        if len(classes) < 2:
            got = f"class {classes[0]} only"
            raise ValueError(_checks.message(FIT, "labels", "of two classes or more", got))
        refuse_scales(FIT, "features", sums.largest, self.dtype)


def own_rows(num_rows: int) -> range:
    """The rows that this process streams."""
    index, count = jax.process_index(), jax.process_count()
    return range(num_rows)[num_rows * index // count : num_rows * (index + 1) // count]


def _added(total: Sums, part: Sums) -> Sums:
    def add(a: Any, b: Any) -> Any:
        return a + np.asarray(b, np.float64)

    return Sums(
        add(total.value, part.value),
        add(total.gradient, part.gradient),
        add(total.squares, part.squares),
        total.separated and bool(part.separated),
        np.maximum(total.largest, np.asarray(part.largest, np.float64)),
        add(total.classes, part.classes),
    )


def _transformed(transform: Callable[[Array], Array] | None, features: Array) -> Array:
    return features if transform is None else transform(features)


def _problem(num_classes: int, features: Array, constant: Array, batch: Batch) -> Problem:
    """The problem without a penalty, whose targets sum to the mean weight."""
    return problem_of(_data(features, constant, batch), num_classes)


def _data(features: Array, constant: Array, batch: Batch) -> Data:
    """The rows of a batch, whose features may have been changed, without a penalty."""
    zero = jnp.zeros((), features.dtype)
    offset = None if batch.offset is None else batch.offset.T
    return Data(
        features, batch.labels, batch.weights, None, zero, zero, constant=constant, offset=offset
    )


@partial(jax.jit, static_argnames=("num_classes", "transform"))
def _sums(
    num_classes: int,
    transform: Callable[[Array], Array] | None,
    shift: Array,
    constant: Array,
    theta: Array,
    batch: Batch,
) -> Sums:
    features = _transformed(transform, batch.features)
    problem = _problem(num_classes, _frame.less(features, shift), constant, batch)
    logits = logits_at(problem, theta)
    size = jnp.asarray(len(batch.labels), theta.dtype)
    bound = gradient_bound(problem)
    return Sums(
        size * value(problem, theta, logits),
        size * point(problem, theta, logits).gradient,
        size * bound * bound,
        is_separated(problem, logits),
        jnp.max(jnp.where(batch.weights[:, None] > 0, jnp.abs(features), 0), 0, initial=0),
        size * jnp.sum(problem.targets, 1),
    )


@partial(jax.jit, static_argnames=("num_classes", "transform"))
def _move(
    num_classes: int,
    transform: Callable[[Array], Array] | None,
    shift: Array,
    constant: Array,
    d: Array,
    batch: Batch,
) -> Array:
    features = _frame.less(_transformed(transform, batch.features), shift)
    problem = _problem(num_classes, features, constant, batch)
    return largest_move(jnp.where(batch.weights[None] > 0, class_scores(problem, d), 0))


@partial(jax.jit, static_argnames=("num_classes", "transform"))
def _direction(
    num_classes: int,
    transform: Callable[[Array], Array] | None,
    shift: Array,
    constant: Array,
    sample: Batch,
    l2: Array,
    theta: Array,
    gradient: Array,
    memory: Memory,
    step: Array,
    norm: Array,
) -> tuple[Array, Memory, Array]:
    """The direction and the memory of L-BFGS, and the decrement its preconditioner does not see.

    The gradients are those of all rows, the preconditioner is that of the sample.
    """
    features = _frame.less(_transformed(transform, sample.features), shift)
    problem = _problem(num_classes, features, constant, sample)._replace(l2=l2)
    s = _standardised.standardise(problem, gradient_bound(problem), problem.features.dtype)
    here = point(problem, theta, logits_at(problem, theta))
    here = here._replace(gradient=centred(gradient))
    d, memory = lbfgs(problem, s, here, memory, step, norm)
    return centred(d), memory, _preconditioner.unseen(s, memory.preconditioner, here.gradient)


def _line_search(
    passes: _Passes, theta: np.ndarray, here: Sums, d: np.ndarray
) -> tuple[np.ndarray, Sums] | None:
    """Parameters along d where the slope has fallen enough, or None where d does not go down.

    The rule of `regression`, by the secant of slopes in place of their derivative.
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
    """Where the line through two slopes vanishes, kept well inside of them."""
    (a, slope_a), (b, slope_b) = low, high
    if not np.isfinite(b):
        return min(max(a * first / (first - slope_a), 2 * a), 10 * a) if slope_a > first else 4 * a
    t = a - slope_a * (b - a) / (slope_b - slope_a) if np.isfinite(slope_b) else a
    margin = 0.05 * (b - a)
    return min(max(t, a + margin), b - margin)

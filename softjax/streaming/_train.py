"""train: the steps of any optax optimizer, on arrays in memory or on batches of a stream."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import chain
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks, processes
from softjax._auto_axes import on_auto_axes
from softjax._descriptions import described
from softjax.checkpoints import TRAINING, Checkpoints, Saved
from softjax.regression._arguments import (
    at_least,
    class_weights_array,
    constant,
    error,
    errors_name,
    factors_array,
    initial_params,
    is_traced,
    not_negative,
    penalty,
)
from softjax.regression._features import in_full_precision
from softjax.regression._model import SoftmaxRegression
from softjax.regression._result import Event, FitResult, Status, Validation, recorded
from softjax.regression._steps import (
    Form,
    State,
    Terms,
    advance,
    refuse_other_optimizers,
    start,
)
from softjax.streaming._batches import TRAIN, Source
from softjax.streaming._devices import Chunk
from softjax.streaming._feeds import BatchFeed, Feed, feed_of, spans
from softjax.streaming._rows import validation_of
from softjax.tables import DataError
from softjax.tables._columns import listed


class NonFiniteError(FloatingPointError):
    """The objective of a batch, or the parameters after its step, are not finite.

    Attributes:
        step: the step of the batch.
        rows: the numbers of its rows that are not finite or have no valid label; empty if all rows
            are good and the steps are too long.
        params: the parameters before the step, which are finite.
        outside: those of the rows whose label is not a class.

    Example:
        >>> import softjax
        >>> issubclass(softjax.streaming.NonFiniteError, FloatingPointError)
        True
    """

    def __init__(
        self, step: int, rows: list[int], params: SoftmaxRegression, outside: Sequence[int] = ()
    ):
        self.step, self.rows, self.params, self.outside = step, rows, params, outside
        shown = outside or rows
        where = "in row " if len(shown) == 1 else "in the rows "
        where += listed([str(row) for row in shown])
        why = f"is not finite {where}"
        if outside:
            why = f"has labels other than 0, ..., {len(params.bias) - 1} {where}"
        elif not rows:
            why = "is not finite, though its rows are: take shorter steps"
        super().__init__(f"the batch of step {step} {why}.")

    def __reduce__(self):
        return type(self), (self.step, self.rows, self.params, self.outside)


class Preempted(Exception):
    """All processes have stopped after the same step, because one of them was told to stop.

    Attributes:
        step: the number of steps taken; if there are checkpoints, this step was saved.
        params: the parameters after this step.

    Example:
        >>> import softjax
        >>> softjax.streaming.Preempted(3, softjax.regression.init(2, 3)).step
        3
    """

    def __init__(self, step: int, params: SoftmaxRegression):
        self.step, self.params = step, params
        super().__init__(step, params)

    def __str__(self) -> str:
        return f"stopped after step {self.step}"


@on_auto_axes
@in_full_precision
@errors_name(TRAIN)
def train(
    features: ArrayLike | Source | Callable[[int], Any] | Iterable[Any],
    labels: ArrayLike | None = None,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    num_classes: int | None = None,
    l2: float = 0.0,
    penalty_factors: ArrayLike | None = None,
    fit_intercept: bool = True,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    transform: Callable[[Array], Array] | None = None,
    init: SoftmaxRegression | None = None,
    tol: float | None = None,
    every: int | None = None,
    skip_nonfinite: bool = False,
    checkpoints: Checkpoints | None = None,
    validation: Validation | None = None,
    callback: Callable[[Event], bool | None] | None = None,
    preempted: Callable[[], bool] | None = None,
) -> FitResult:
    """Trains a softmax regression by the steps of any optax optimizer.

        params <- params - step of the optimizer on mean loss + sum_j f_j l2 / 2 |kernel_j|^2

    where sum_i w_i loss_i / sum_i c_i is the mean loss of a batch, and f_j the penalty factor of
    feature j. For the rows of arrays and of `Batches`, the weights w have the mean 1 and c_i = 1;
    for batches of a function or an iterable, c_i = w_i. Use `fit` to find the exact optimum.

    The first argument is an array of features, with `labels`, or batches. Arrays stay on their
    devices: one device or a mesh. A thread reads batches onto all devices while compiled chunks of
    steps run. With several processes, each reads its own part of a batch, and all have the same
    parameters. Arrays and batches use the same loop and the same compiled step.

    Edge cases: a batch whose weights are all 0 contributes only the gradient of the penalty. A step
        is not taken if its parameters would not be finite, or if a loss or the penalty would
        overflow.

    Args:
        features: real [N, D], finite. Or batches: `streaming.Batches`, a function of the step, or
            an iterable. The latter two give (features, labels), (features, labels, weights) or
            (features, labels, weights, offset), with at most as many rows as in the first batch. A
            negative probability in the labels of batches counts as NaN.
        labels: class indices, integer [N], or distributions over the classes, floating [N, K]; None
            if `features` are batches.
        optimizer: any optax optimizer, such as `optax.adam(1e-2)` or `optax.lbfgs()`.
        epochs: the number of passes over the data; for arrays and `Batches`, instead of `steps`.
        steps: the number of the last step, counted from the start of the first run.
        batch_size: the number of examples per step; None for all examples. Only for arrays.
        seed: determines the order of the examples; None for 0. Only for arrays.
        num_classes: K; None for the number of classes in the labels, if these are in memory.
        l2: the strength of the squared penalty, >= 0.
        penalty_factors: real [D], >= 0, f; None for ones.
        fit_intercept: whether the model has a bias; otherwise the bias stays 0.
        sample_weights: real [N], >= 0, w; only for arrays.
        class_weights: real [K], >= 0.
        offset: real [N, K], nats, added to the logits; only for arrays.
        transform: a function of the features [B, D] on the device, for example to standardise
            them.
        init: parameters to start from; None for zeros.
        tol: the run stops if no entry of the gradient of a step is larger than this; for arrays,
            each entry is divided by its largest possible value. None to never stop early.
            Gradients of small batches rarely become this small.
        every: the number of steps between two events, each with a checkpoint; None for one epoch
            if an epoch has several steps, and otherwise for all steps.
        skip_nonfinite: whether rows that are not finite, or have no valid label, are left out
            instead of raising an error; only for batches, since arrays with such rows are refused.
        checkpoints: where the run is saved; if a run is saved there already, it is resumed. A run
            with other data or settings is refused. Of `optimizer` and `transform`, the names of
            their functions and the values that these enclose are compared, such as the rates of
            optax; their code and global variables, and the attributes of other objects, cannot be
            compared, and neither can the batches of a function or an iterable. Put what determines
            them into the configuration of `Checkpoints`.
        validation: the features, after `transform`, and labels of the examples to evaluate on, and
            their offset if there is one.
        callback: called with an `Event` after every `every` steps; the run stops if it returns True
            on any process.
        preempted: called after every chunk of steps; all processes stop if it returns True on any.

    Returns:
        `FitResult`. The objectives in its history are means over the batches since the previous
        event; if each step takes all examples, they are objectives of all examples. For arrays,
        `objective` is the objective of all examples. For batches it is the last one in the history,
        or the objective of the first batch if no step was taken, and `separated` is False.

    Raises:
        NonFiniteError: a batch is not finite, or the steps are too long. The state before this step
            has been saved.
        Preempted: `preempted` returned True; the last step of all processes has been saved.
        softjax.tables.DataError: `checkpoints` belong to another run, to one with more steps, or to
            an earlier version, which did not record the settings.
        TypeError, ValueError: an argument is not valid.

    Example:
        >>> import optax, softjax
        >>> x, y, *_ = softjax.datasets.load_digits()
        >>> adam = optax.adam(1e-2)
        >>> result = softjax.regression.train(x, y, optimizer=adam, batch_size=256, epochs=20)
        >>> result.objective < 0.35
        True
        >>> batches = softjax.streaming.Batches(softjax.streaming.ArrayRows(x, y), 256)
        >>> result = softjax.regression.train(batches, optimizer=adam, epochs=20)
        >>> result.objective < 0.35
        True
    """
    begin = time.perf_counter()
    _refuse_others(optimizer, checkpoints, transform, callback, preempted)
    numbers = (sample_weights, offset, class_weights, penalty_factors, init, l2, tol)
    if is_traced((None if labels is None else features, labels, *numbers)):
        expected = "concrete, since the steps are called one chunk after the other; use `fit`"
        raise TypeError(_checks.message(TRAIN, "features", expected, "a tracer among the data"))
    of_arrays = {"batch_size": batch_size, "seed": seed}
    of_arrays |= {"sample_weights": sample_weights, "offset": offset}
    feed = feed_of(features, labels, num_classes, transform, of_arrays, skip_nonfinite)
    steps, every = _steps(feed, epochs, steps, every)
    strength = not_negative("l2", l2)
    settings = {"num_classes": feed.num_classes, "l2": strength, "fit_intercept": fit_intercept}
    settings |= {"penalty_factors": penalty_factors, "class_weights": class_weights, "init": init}
    settings |= {"transform": transform}
    settings |= {"optimizer": {"init": optimizer.init, "update": optimizer.update}}
    saved = _saved(checkpoints, feed, settings, steps, epochs)
    like = feed.begin(0 if saved is None else saved.step, every)
    width, dtype = like.shape[1], like.dtype
    intercept = constant(fit_intercept, dtype)
    params = initial_params(init, like, feed.num_classes, intercept)
    validation = validation_of(validation, params.kernel.shape)
    factors = factors_array(penalty_factors, width, dtype)
    strength = penalty("l2", strength, dtype)
    terms = Terms(
        strength if factors is None else strength * factors,
        class_weights_array(class_weights, feed.num_classes, dtype),
        intercept,
        # Without `tol`, no gradient is small enough: a norm is never below 0.
        np.asarray(-1.0 if tol is None else not_negative("tol", tol), dtype),
    )
    form = Form(feed.sums, optimizer, feed.transform, skip_nonfinite)
    state = start(optimizer, params)
    run = _Run(feed, form, feed.completed(terms), state, saved, checkpoints, begin)
    return run.to(steps, every, validation, callback, preempted)


class _Run:
    """A training run: its state, and methods for its steps, events and checkpoints."""

    def __init__(
        self,
        feed: Feed,
        form: Form,
        terms: Terms,
        state: State,
        saved: Saved | None,
        checkpoints: Checkpoints | None,
        begin: float,
    ):
        self.feed, self.form, self.terms, self.checkpoints = feed, form, terms, checkpoints
        self.history: list[dict[str, float]] = []
        if saved is not None:
            state, self.history = saved.state_like(state), saved.history
        self.state, self.step = feed.placed(state), int(state.step)
        self.begin = begin - (self.history[-1]["seconds"] if self.history else 0.0)

    def to(
        self,
        steps: int,
        every: int,
        validation: Validation | None,
        callback: Callable[[Event], bool | None] | None,
        preempted: Callable[[], bool] | None,
    ) -> FitResult:
        """Trains until step `steps`, with an event at the multiples of `every`."""
        status, runs = Status.RUNNING, spans(self.step, steps, self.feed.chunk_steps, every)
        with closing(self.feed.chunks(runs)) as chunks:
            for chunk in chunks:
                status, stops = self.take(chunk, preempted)
                if self.step % every == 0 or self.step == steps or status == Status.CONVERGED:
                    event = self.event(validation)
                    told = callback is not None and bool(callback(event))
                    stopped = callback is not None and any(processes.gather(told))
                    if stopped and status == Status.RUNNING:
                        status = Status.CALLBACK
                if status != Status.RUNNING:
                    break
                if stops:
                    self.save()
                    raise Preempted(self.step, self._params())
        return self.result(status)

    def take(self, chunk: Chunk, preempted: Callable[[], bool] | None) -> tuple[int, bool]:
        """Takes the steps of a chunk; returns the status, and whether any process asks to stop."""
        flag = self.feed.flag(preempted is not None and preempted())
        self.state, status, flag = advance(
            self.form, self.terms, self.state, chunk.feed, chunk.count, flag
        )
        self.step = int(self.state.step)
        if int(status) == Status.NON_FINITE:
            self.save()
            found = processes.gather(self.feed.bad_rows(chunk, self.step))
            rows, outside = (sorted(chain(*parts)) for parts in zip(*found, strict=True))
            raise NonFiniteError(self.step, rows, self._params(), outside)
        return int(status), bool(int(flag))

    def event(self, validation: Validation | None) -> Event:
        """Records the mean objective since the last event, and saves a checkpoint."""
        state, feed = self.state, self.feed
        figures = float(state.total) / max(int(state.taken), 1), float(state.norm)
        if feed.takes_all:
            figures = feed.evaluated(self.form, self.terms, state, figures)
        seconds = time.perf_counter() - self.begin
        epoch = self.step / feed.epoch_steps
        event = Event(self.step, epoch, *figures, seconds, self._params())
        event = recorded(event, validation, self.history)
        nothing = {"total": np.zeros((), state.total.dtype), "taken": np.int32(0)}
        self.state = state._replace(**feed.placed(nothing))
        self.save()
        return event

    def save(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(self.step, self.state, self.history)

    def result(self, status: int) -> FitResult:
        """The result of a run that has ended."""
        last = self.history[-1]["objective"] if self.history else np.nan
        params, figures = self.state.params, (last, float(self.state.norm))
        value, norm = self.feed.evaluated(self.form, self.terms, self.state, figures)
        separated = self.feed.separated(params)
        return FitResult(params, value, status, self.step, None, norm, separated, self.history)

    def _params(self) -> SoftmaxRegression:
        """A copy of the parameters on the host: the next chunk overwrites the device's arrays."""
        return jax.tree.map(np.asarray, self.state.params)


def _refuse_others(
    optimizer: Any, checkpoints: Any, transform: Any, callback: Any, preempted: Any
) -> None:
    """Refuses arguments of another type, such as the name of a folder as checkpoints."""
    refuse_other_optimizers(optimizer)
    _checks.refuse_uncallable(TRAIN, "transform", transform)
    _checks.refuse_uncallable(TRAIN, "callback", callback)
    _checks.refuse_uncallable(TRAIN, "preempted", preempted)
    if checkpoints is not None and not hasattr(checkpoints, "restore"):
        expected = "`softjax.checkpoints.Checkpoints(directory)` or None"
        raise TypeError(_checks.message(TRAIN, "checkpoints", expected, repr(checkpoints)))


def _saved(
    checkpoints: Checkpoints | None,
    feed: Feed,
    settings: dict[str, Any],
    steps: int,
    epochs: int | None,
) -> Saved | None:
    """The last checkpoint, or None; refuses processes that have different batches."""
    if checkpoints is None:
        if jax.process_count() > 1:
            _ = feed.configuration
        return None
    known = {name: described(value) for name, value in settings.items()}
    saved = checkpoints.restore({"batches": feed.configuration, TRAINING: known})
    if saved is not None and saved.step > steps:
        last, unit = (
            (f"the last step is {steps}", "steps")
            if epochs is None
            else (f"epoch {epochs} ends at step {steps}", "epochs")
        )
        at = f"the checkpoint is at step {saved.step}"
        raise DataError(f"{checkpoints.directory}: {last}, and {at}: take more {unit}.")
    return saved


def _steps(feed: Feed, epochs: int | None, steps: int | None, every: int | None) -> tuple[int, int]:
    """The number of the last step, and the number of steps between two events."""
    if (epochs is None) == (steps is None):
        given = "neither" if steps is None else "both"
        raise error("epochs", "given, or `steps`, but not both", given)
    if steps is not None:
        last = at_least("steps", steps, 0)
    elif isinstance(feed, BatchFeed) and not hasattr(feed.source, "batch_size"):
        expected = "None for batches of a function or an iterable, whose epochs have no known end"
        raise error("epochs", expected, epochs)
    else:
        last = at_least("epochs", epochs, 0) * feed.epoch_steps
    if every is not None:
        return last, at_least("every", every, 1)
    return last, feed.epoch_steps if feed.epoch_steps > 1 else max(last, 1)

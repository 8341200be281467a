"""train: the steps of any optax optimizer, on arrays in memory or on batches read ahead."""

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks, processes
from softjax.checkpoints import Checkpoints
from softjax.regression import Event, FitResult, SoftmaxRegression
from softjax.regression import init as zeros
from softjax.regression._auto_axes import on_auto_axes
from softjax.regression._products import in_full_precision
from softjax.regression._result import Status, Validation, record, with_validation
from softjax.regression._steps import Form, State, Terms, advance, start
from softjax.streaming._batches import TRAIN, Source
from softjax.streaming._feeds import ArrayFeed, BatchFeed, Feed, spans
from softjax.streaming._rows import checked_validation, penalty
from softjax.tables import DataError


class NonFiniteError(FloatingPointError):
    """The objective of a batch, or the parameters after its step, are not finite.

    Attributes:
        step: the step of the batch.
        rows: the numbers of its rows that are not finite or of no class; empty where all rows are
            good, and so the steps are too long.
        params: the parameters before the step, which are finite.

    Example:
        >>> import softjax
        >>> issubclass(softjax.streaming.NonFiniteError, FloatingPointError)
        True
    """

    def __init__(self, step: int, rows: list[int], params: SoftmaxRegression):
        self.step, self.rows, self.params = step, rows, params
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        why = f"of the rows {shown}" if rows else "though its rows are: take shorter steps"
        super().__init__(f"the batch of step {step} is not finite, {why}.")

    def __reduce__(self):
        return type(self), (self.step, self.rows, self.params)


class Preempted(Exception):
    """All processes have stopped after the same step, because one of them was told to stop.

    Attributes:
        step: the number of steps taken; saved if there are checkpoints.

    Example:
        >>> import softjax
        >>> softjax.streaming.Preempted(3).step
        3
    """

    def __init__(self, step: int):
        self.step = step
        super().__init__(step)


@on_auto_axes
@in_full_precision
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

    where the mean loss is that of a batch, sum_i w_i loss_i / sum_i c_i, and f_j the penalty factor
    of feature j. c_i is 1 for the rows of arrays and of `Batches`, whose weights w have the mean 1,
    and w_i for batches of a function or an iterable. `fit` is what finds the optimum.

    The first argument is an array of features, with `labels`, or batches. Arrays stay where they
    are, on one device or sharded over a mesh. Batches are read by a thread onto all devices, while
    compiled chunks of steps run; with many processes each reads its own part of a batch, and all
    have the same parameters. The same loop and the same compiled step serve both.

    Edge cases: a batch whose weights are 0 steps along the penalty alone. A step after which the
        parameters are not finite, or so large that a loss or the penalty overflows, is not taken.

    Args:
        features: real [N, D], finite. Or batches: `streaming.Batches`; a function of the step, or
            an iterable, of (features, labels), (features, labels, weights) or (features, labels,
            weights, offset), none with more rows than the first.
        labels: class indices, integer [N], or distributions over the classes, floating [N, K]; None
            where `features` are batches.
        optimizer: any optax optimizer, as `optax.adam(1e-2)` or `optax.lbfgs()`.
        epochs: the number of passes over the data; for arrays and `Batches`, in place of `steps`.
        steps: the number of the last step, counted from the start of the first run.
        batch_size: the examples of a step; None for all of them. Only for arrays.
        seed: determines the order of the examples; None for 0. Only for arrays.
        num_classes: K; None for the number that the labels show, where these are at hand.
        l2: the strength of the squared penalty, >= 0.
        penalty_factors: real [D], >= 0, f; None for ones.
        fit_intercept: whether there is a bias; without one it stays 0.
        sample_weights: real [N], >= 0, w; only for arrays.
        class_weights: real [K], >= 0.
        offset: real [N, K], nats, what is added to the logits; only for arrays.
        transform: a function of the features [B, D] on the device, as to standardise them.
        init: parameters to start from; None for zeros.
        tol: stop where no entry of the gradient of a step is larger, relative to what it can be at
            most for arrays; None for never. Gradients of small batches hardly ever are.
        every: the number of steps between two events, each with a checkpoint; None for an epoch
            where it has several steps, and else for all steps.
        skip_nonfinite: whether rows that are not finite, or of no class, are left out instead of
            stopping; only for batches, since arrays with such rows are refused.
        checkpoints: where to save, and to resume from what is saved there.
        validation: features, as they are after `transform`, and labels to evaluate on, and their
            offset if there is one.
        callback: called with an `Event` every so many steps; True, on any process, stops.
        preempted: called after every chunk of steps; True, on any process, stops all.

    Returns:
        `FitResult`. The objectives of its history are means over the batches since the event
        before, or of all examples where each step takes all. Its own objective is that of all
        examples for arrays, and for batches the last of the history; `separated` is False then.

    Raises:
        NonFiniteError: a batch is not finite, or the steps are too long. What was reached before
            has been saved.
        Preempted: `preempted` said so; the step that all have reached has been saved.
        TypeError, ValueError: an argument that does not fit, or `checkpoints` of another run, or of
            more steps.

    Example:
        >>> import optax, softjax
        >>> x, y, *_ = softjax.datasets.load_digits()
        >>> adam = optax.adam(1e-2)
        >>> result = softjax.regression.train(x, y, optimizer=adam, batch_size=256, epochs=20)
        >>> result.objective < 0.3
        True
        >>> batches = softjax.streaming.Batches(softjax.streaming.ArrayRows(x, y), 256)
        >>> result = softjax.regression.train(batches, optimizer=adam, epochs=20)
        >>> result.objective < 0.3
        True
    """
    begin = time.perf_counter()
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        expected = "an optax optimizer, as optax.adam(0.01)"
        raise TypeError(_checks.message(TRAIN, "optimizer", expected, repr(optimizer)))
    for_arrays = {
        "batch_size": batch_size,
        "seed": seed,
        "sample_weights": sample_weights,
        "offset": offset,
    }
    feed: Feed
    if labels is None:
        feed = _batch_feed(features, num_classes, for_arrays)
    else:
        if _checks.flag(TRAIN, "skip_nonfinite", skip_nonfinite):
            expected = "False for arrays in memory; leave such rows out of the arrays"
            raise ValueError(_checks.message(TRAIN, "skip_nonfinite", expected, True))
        for_arrays["seed"] = 0 if seed is None else _checks.at_least(TRAIN, "seed", seed, 0)
        feed = ArrayFeed(features, labels, num_classes, transform, **for_arrays)
        transform = None  # the feed has transformed all features
    num_classes = feed.num_classes
    steps = _steps(feed, epochs, steps)
    if every is None:
        every = feed.epoch_steps if feed.epoch_steps > 1 else max(steps, 1)
    every = _checks.at_least(TRAIN, "every", every, 1)

    saved = None
    if checkpoints is not None:
        saved = checkpoints.restore(feed.configuration)
    elif jax.process_count() > 1:
        _ = feed.configuration  # refused where it differs between the processes
    if checkpoints is not None and saved is not None and saved.step > steps:
        raise DataError(
            f"{checkpoints.directory}: holds step {saved.step}, beyond the {steps} to be taken."
        )
    batch = feed.begin(0 if saved is None else saved.step, every)
    params = _initial(init, transform, batch, num_classes, fit_intercept)
    dtype, width = params.kernel.dtype, params.kernel.shape[0]
    state, history = start(optimizer, params), []
    if saved is not None:
        state, history = saved.state_like(state), saved.history
    state = feed.placed(state)
    validation = checked_validation(TRAIN, validation, width, num_classes)
    terms = feed.known(
        Terms(
            _ridge(l2, penalty_factors, width, dtype),
            _not_negative("class_weights", class_weights, num_classes, dtype),
            None if _checks.flag(TRAIN, "fit_intercept", fit_intercept) else jnp.zeros((), dtype),
            None,
            None,
            jnp.asarray(-1 if tol is None else _tolerance(tol), dtype),
        )
    )
    form = Form(feed.sums, optimizer, transform, skip_nonfinite)
    before, zero = history[-1]["seconds"] if history else 0.0, np.zeros((), dtype)

    def save() -> None:
        if checkpoints is not None:
            checkpoints.save(int(state.step), state, history)

    status = Status.RUNNING
    runs = spans(int(state.step), steps, feed.chunk_steps, every)
    with closing(feed.chunks(runs)) as chunks:
        for chunk in chunks:
            flag = feed.flag(preempted is not None and preempted())
            state, reached, flag = advance(form, terms, state, chunk.feed, chunk.count, flag)
            step, status = int(state.step), int(reached)
            if status == Status.NON_FINITE:
                save()
                rows = processes.gather(feed.bad_rows(chunk, step))
                params = jax.tree.map(np.asarray, state.params)
                raise NonFiniteError(step, sorted(chain(*rows)), params)
            if step % every == 0 or step == steps or status == Status.CONVERGED:
                seconds = before + time.perf_counter() - begin
                event = with_validation(_event(feed, form, terms, state, seconds), validation)
                history.append(record(event))
                state = state._replace(**feed.placed({"total": zero, "taken": np.int32(0)}))
                save()
                if callback is not None and any(processes.gather(bool(callback(event)))):
                    status = Status.CALLBACK if status == Status.RUNNING else status
                    break
            if status == Status.CONVERGED:
                break
            if int(flag):
                save()
                raise Preempted(step)
    value = history[-1]["objective"] if history else np.nan
    norm, seen = float(state.norm), feed.value_and_norm(form, terms, state)
    if seen is not None:
        value, norm = seen
    separated = feed.separated(terms, state.params)
    return FitResult(state.params, value, status, int(state.step), None, norm, separated, history)


def _batch_feed(batches: Any, num_classes: int | None, for_arrays: dict[str, Any]) -> BatchFeed:
    """Batches, which have no need of the options for arrays."""
    for name, value in for_arrays.items():
        if value is not None:
            expected = "None where `features` are batches, which have their own"
            raise ValueError(_checks.message(TRAIN, name, expected, type(value).__name__))
    return BatchFeed(batches, num_classes)


def _steps(feed: Feed, epochs: int | None, steps: int | None) -> int:
    """The number of the last step."""
    if (epochs is None) == (steps is None):
        given = "neither" if steps is None else "both"
        raise ValueError(_checks.message(TRAIN, "epochs", "given, or `steps`, but not both", given))
    if steps is not None:
        return _checks.at_least(TRAIN, "steps", steps, 0)
    if isinstance(feed, BatchFeed) and not hasattr(feed.source, "batch_size"):
        expected = "None for batches of a function or an iterable, whose epochs have no known end"
        raise ValueError(_checks.message(TRAIN, "epochs", expected, epochs))
    return _checks.at_least(TRAIN, "epochs", epochs, 0) * feed.epoch_steps


def _initial(
    init: SoftmaxRegression | None,
    transform: Callable[[Array], Array] | None,
    features: jax.ShapeDtypeStruct,
    num_classes: int,
    fit_intercept: bool,
) -> SoftmaxRegression:
    """`init`, or zeros, in the dtype and for the number of the features."""
    seen = features if transform is None else jax.eval_shape(transform, features)
    params = zeros(seen.shape[1], num_classes, seen.dtype) if init is None else init
    expected = (seen.shape[1], num_classes)
    _checks.same_shape(TRAIN, "init.kernel", params.kernel, expected)
    _checks.same_shape(TRAIN, "init.bias", params.bias, expected[1:])
    for name, part in zip(("init.kernel", "init.bias"), params, strict=True):
        values = np.asarray(part)
        _checks.refuse_first(TRAIN, name, "finite", values, ~np.isfinite(values))
        if name == "init.bias" and not fit_intercept:
            expected_bias = "0 where `fit_intercept` is False"
            _checks.refuse_first(TRAIN, name, expected_bias, values, values != 0)
    return SoftmaxRegression(*(jnp.asarray(part, seen.dtype) for part in params))


def _ridge(l2: float, penalty_factors: ArrayLike | None, width: int, dtype: Any) -> Array:
    """The strength of the squared penalty, a scalar, or [D] with penalty factors."""
    strength = jnp.asarray(penalty(TRAIN, l2, dtype), dtype)
    if penalty_factors is None:
        return strength
    factors = _checks.real_array(TRAIN, "penalty_factors", penalty_factors).astype(dtype)
    _checks.same_shape(TRAIN, "penalty_factors", factors, (width,))
    values = np.asarray(factors)
    bad = ~((values >= 0) & np.isfinite(values))
    _checks.refuse_first(TRAIN, "penalty_factors", "finite and >= 0", values, bad)
    return strength * factors


def _not_negative(
    name: str, weights: ArrayLike | None, num_classes: int, dtype: Any
) -> Array | None:
    """Finite weights >= 0 of the classes, not all of them 0."""
    if weights is None:
        return None
    array = _checks.real_array(TRAIN, name, weights).astype(dtype)
    _checks.same_shape(TRAIN, name, array, (num_classes,))
    values = np.asarray(array)
    bad = ~((values >= 0) & np.isfinite(values))
    _checks.refuse_first(TRAIN, name, "finite and >= 0", values, bad)
    if not values.any():
        raise ValueError(_checks.message(TRAIN, name, "> 0 somewhere", "zeros only"))
    return array


def _tolerance(tol: float) -> float:
    return _checks.not_negative_number(TRAIN, "tol", tol)


def _event(feed: Feed, form: Form, terms: Terms, state: State, seconds: float) -> Event:
    step = int(state.step)
    value, norm = float(state.total) / max(int(state.taken), 1), float(state.norm)
    if feed.takes_all:
        value, norm = feed.value_and_norm(form, terms, state) or (value, norm)
    params = jax.tree.map(np.asarray, state.params)
    return Event(step, step / feed.epoch_steps, value, norm, seconds, params, None, None)

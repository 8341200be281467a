"""train: any optax optimizer over batches that are read ahead, in compiled chunks of steps."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
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
from softjax.regression._result import Status, Validation, record, with_validation
from softjax.streaming._batches import Source, source_of
from softjax.streaming._devices import Chunk, Devices, ahead
from softjax.streaming._rows import checked_validation, penalty
from softjax.streaming._steps import State, advance, start
from softjax.tables import DataError

TRAIN = "streaming.train"
CHUNK_BYTES = 1 << 23
LONGEST_CHUNK = 64


class NonFiniteError(FloatingPointError):
    """A batch whose objective, or the parameters after it, are not finite.

    Attributes:
        step: of the batch.
        rows: where its rows stand that are not finite, or of no class; none where the rows are
            good and the steps too long.
        params: those before the step, which are finite.

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
    """All processes stopped after one step because one of them was told to.

    Attributes:
        step: the last step taken, which is saved where there are checkpoints.

    Example:
        >>> import softjax
        >>> softjax.streaming.Preempted(3).step
        3
    """

    def __init__(self, step: int):
        self.step = step
        super().__init__(step)


def train(
    batches: Source | Callable[[int], Any] | Iterable[Any],
    *,
    num_classes: int,
    optimizer: optax.GradientTransformation,
    steps: int,
    l2: float = 0.0,
    class_weights: ArrayLike | None = None,
    transform: Callable[[Array], Array] | None = None,
    init: SoftmaxRegression | None = None,
    every: int | None = None,
    skip_nonfinite: bool = False,
    checkpoints: Checkpoints | None = None,
    validation: Validation | None = None,
    callback: Callable[[Event], bool | None] | None = None,
    preempted: Callable[[], bool] | None = None,
) -> FitResult:
    """Trains a softmax regression by any optax optimizer, on batches that need not fit in memory.

        params <- params - step of the optimizer on sum_i w_i loss_i / sum_i w_i + l2 / 2 |kernel|^2

    A thread reads the next batches onto the device while compiled chunks of steps run. With many
    processes each gives its own part of a batch, and all have the same parameters.

    Edge cases: a batch that weighs nothing steps along the penalty alone. A step after which
        anything is not finite is not taken.

    Args:
        batches: `Batches`; a function of the step, or an iterable, of (features, labels) or
            (features, labels, weights), none of more rows than the first.
        num_classes: K.
        optimizer: of optax.
        steps: the number of the last step, counted from the start of the first run.
        l2: the strength of the penalty.
        class_weights: real [K], >= 0.
        transform: of the features [B, D] on the device, as to standardise them.
        init: parameters to start from; None for zeros.
        every: steps between two events, each with a checkpoint; None for an epoch of `Batches`,
            and else for all of them.
        skip_nonfinite: leave out rows that are not finite, or of no class, in place of stopping.
        checkpoints: where to save, and to go on from what is saved there.
        validation: features, as they are after `transform`, and labels to evaluate on.
        callback: called with an `Event` every so many steps; True, on any process, stops.
        preempted: asked after every chunk of steps; True, on any process, stops all.

    Returns:
        `FitResult`; its objective and those of its history are the means over the batches of
        `every` steps.

    Raises:
        NonFiniteError: a batch is not finite. What was reached before it has been saved.
        Preempted: it was; the step that all have reached has been saved.
        TypeError, ValueError: an argument that does not fit, or `checkpoints` of another run, or of
            more steps.

    Example:
        >>> import optax, softjax
        >>> x, y, *_ = softjax.datasets.load_digits()
        >>> batches = softjax.streaming.Batches(softjax.streaming.ArrayRows(x, y), 128)
        >>> result = softjax.streaming.train(
        ...     batches, num_classes=10, optimizer=optax.adam(0.01), steps=10 * batches.epoch_steps
        ... )
        >>> result.objective < 0.4
        True
    """
    begin = time.perf_counter()
    num_classes = _checks.at_least(TRAIN, "num_classes", num_classes, 2)
    steps = _checks.at_least(TRAIN, "steps", steps, 0)
    source = source_of(batches)
    if every is None:
        every = source.epoch_steps if source.epoch_steps > 1 else max(steps, 1)
    every = _checks.at_least(TRAIN, "every", every, 1)

    _check_same(source.configuration)
    saved = None if checkpoints is None else checkpoints.restore(source.configuration)
    if checkpoints is not None and saved is not None and saved.step > steps:
        raise DataError(
            f"{checkpoints.directory}: holds step {saved.step}, beyond the {steps} to be taken."
        )
    first = source.read(0 if saved is None else saved.step)
    params = _initial(init, transform, first.features, num_classes)
    devices = Devices(len(first.labels), num_classes)
    state, history = start(optimizer, params), []
    if saved is not None:
        state, history = saved.state_like(state), saved.history
    state = devices.replicated(state)
    dtype = params.kernel.dtype
    validation = checked_validation(TRAIN, validation, params.kernel.shape[0], num_classes)
    weights = _class_weights(class_weights, num_classes, dtype)
    fixed = devices.replicated((jnp.asarray(penalty(TRAIN, l2, dtype), dtype), weights))
    before = history[-1]["seconds"] if history else 0.0

    def save() -> None:
        if checkpoints is not None:
            checkpoints.save(int(state.step), state, history)

    status = Status.RUNNING
    size = max(min(CHUNK_BYTES // max(first.features.nbytes, 1), LONGEST_CHUNK, every), 1)
    spans = _spans(int(state.step), steps, size, every)
    with closing(ahead(partial(devices.chunk, source, first, size), spans)) as chunks:
        for chunk in chunks:
            flag = devices.flag(preempted is not None and preempted())
            static = devices.layout, optimizer, transform, skip_nonfinite
            state, flag = advance(*static, fixed, state, chunk.batches, chunk.count, flag)
            step = int(state.step)
            if step < chunk.stop:
                save()
                rows = processes.gather(_bad_rows(source, chunk, step, num_classes))
                params = jax.tree.map(np.asarray, state.params)
                raise NonFiniteError(step, sorted(chain(*rows)), params)
            if step % every == 0 or step == steps:
                seconds = before + time.perf_counter() - begin
                event = with_validation(_event(state, source.epoch_steps, seconds), validation)
                history.append(record(event))
                state = devices.forgotten(state)
                save()
                if callback is not None and any(processes.gather(bool(callback(event)))):
                    status = Status.CALLBACK
                    break
            if int(flag):
                save()
                raise Preempted(step)
    value = history[-1]["objective"] if history else np.nan
    norm = float(state.norm)
    return FitResult(state.params, value, status, int(state.step), None, norm, False, history)


def _check_same(configuration: dict[str, Any]) -> None:
    """Refuses batches of other data, size or seed than those of process 0, as of stale copies."""
    first, *others = map(_without_times, processes.gather(configuration))
    for index, other in enumerate(others, 1):
        form = f"{{}} is {{}} of process 0 and {{}} of process {index}"
        if difference := "; ".join(_checks.differences(first, other, form)):
            raise DataError(f"the processes have different batches: {difference}.")


def _without_times(configuration: Any) -> Any:
    """What is the same for all copies of a file."""
    if not isinstance(configuration, dict):
        return configuration
    kept = {name: part for name, part in configuration.items() if name != "changed_ns"}
    return {name: _without_times(part) for name, part in kept.items()}


def _initial(
    init: SoftmaxRegression | None,
    transform: Callable[[Array], Array] | None,
    features: np.ndarray,
    num_classes: int,
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
    return SoftmaxRegression(*(jnp.asarray(part, seen.dtype) for part in params))


def _class_weights(class_weights: ArrayLike | None, num_classes: int, dtype: Any) -> Array | None:
    """Finite weights >= 0 of the classes, not all of them 0."""
    if class_weights is None:
        return None
    weights = _checks.real_array(TRAIN, "class_weights", class_weights).astype(dtype)
    _checks.same_shape(TRAIN, "class_weights", weights, (num_classes,))
    values = np.asarray(weights)
    bad = ~((values >= 0) & np.isfinite(values))
    _checks.refuse_first(TRAIN, "class_weights", "finite and >= 0", values, bad)
    if not values.any():
        expected = "> 0 somewhere"
        raise ValueError(_checks.message(TRAIN, "class_weights", expected, "zeros only"))
    return weights


def _spans(first: int, last: int, size: int, every: int) -> Iterator[tuple[int, int]]:
    """Runs of steps that end at the multiples of `size` and of `every`."""
    while first < last:
        stop = min(first - first % size + size, first - first % every + every, last)
        yield first, stop
        first = stop


def _event(state: State, epoch_steps: int, seconds: float) -> Event:
    step = int(state.step)
    value = float(state.total) / max(int(state.taken), 1)
    params = jax.tree.map(np.asarray, state.params)
    return Event(step, step / epoch_steps, value, float(state.norm), seconds, params, None, None)


def _bad_rows(source: Source, chunk: Chunk, step: int, num_classes: int) -> list[int]:
    """The rows of this process in the batch of `step` that are not finite, or of no class."""
    features, labels, weights = (part[step - chunk.first] for part in chunk.host)
    good = np.isfinite(features).all(1) & np.isfinite(weights)
    good &= (labels >= 0) & (labels < num_classes)
    numbers = source.row_numbers(step)
    return numbers[~good[: len(numbers)]].tolist()

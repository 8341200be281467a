"""fit: the loop around the compiled chunks of steps."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from softjax.regression import _arguments, _first_order
from softjax.regression._first_order import Data
from softjax.regression._model import SoftmaxRegression, predict
from softjax.regression._objective import objective

# Why a fit stopped.
CONVERGED = "converged"
PRECISION_FLOOR = "precision floor"
STEP_LIMIT = "step limit"
CALLBACK = "callback"
NON_FINITE = "non-finite objective"

# One object each, so that every fit finds the compiled program of the last.
_LBFGS = optax.lbfgs()
_ADAM = optax.adam(1e-2)

# A line search does not go up, so that as many steps without a new minimum are rounding.
_PATIENCE = 30


class Event(NamedTuple):
    """What a fit has come to, after a chunk of steps.

    Attributes:
        step: the number of steps taken.
        epoch: the number of passes over the data.
        objective: at `params`; with minibatches its mean over the batches of the chunk.
        gradient_norm: the largest entry of the gradient at `params`, of one batch with minibatches.
        seconds: since the fit began, compilation included.
        params: kernel [D, K] and bias [K].
        validation_loss: the mean loss on the validation data, without penalty or weights.
        validation_accuracy: the share of right predictions there.

    Example:
        >>> import numpy as np, softjax
        >>> seen = []
        >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1, 0, 1])
        >>> _ = softjax.regression.fit(x, y, epochs=3, callback=lambda e: seen.append(e.step))
        >>> seen
        [0, 3]
    """

    step: int
    epoch: float
    objective: float
    gradient_norm: float
    seconds: float
    params: SoftmaxRegression
    validation_loss: float | None
    validation_accuracy: float | None


class FitResult(NamedTuple):
    """A fitted softmax regression.

    Attributes:
        params: kernel [D, K] and bias [K].
        objective: at `params`, over all examples.
        converged: whether the gradient became as small as `tol`.
        stop_reason: CONVERGED; PRECISION_FLOOR (a line search finds nothing lower in this dtype);
            STEP_LIMIT; CALLBACK; NON_FINITE (`params` are those before that step).
        steps: the number of steps taken.
        history: one dictionary an event, without `params`; `validation_*` where there is such data.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1, 0, 1])
        >>> result = softjax.regression.fit(x, y, epochs=3)
        >>> result.stop_reason, result.steps, result.params.kernel.shape
        ('step limit', 3, (1, 2))
    """

    params: SoftmaxRegression
    objective: float
    converged: bool
    stop_reason: str
    steps: int
    history: list[dict[str, float]]


def fit(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    optimizer: optax.GradientTransformation | None = None,
    num_classes: int | None = None,
    l2: float = 0.0,
    batch_size: int | None = None,
    epochs: int = 1000,
    tol: float = 1e-6,
    seed: int = 0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    init: SoftmaxRegression | None = None,
    callback: Callable[[Event], bool | None] | None = None,
    steps_per_chunk: int | None = None,
) -> FitResult:
    """Fits a softmax regression: makes `objective` small with any optax optimizer.

        kernel, bias = argmin sum_i w_i loss_i / sum_i w_i + l2 / 2 |kernel|^2

    Steps are compiled in chunks, and the same optimizer on data of the same shapes is compiled
    once in a process. Between chunks `callback` sees how far it has come. In minibatches every
    epoch visits each example once, in an order that `seed` and the epoch determine.

    Derivative: none: this is a loop on the host, not a function to trace.
    Edge cases: separable data with l2 = 0 have no optimum: the steps go on to their limit, or to
        the precision floor.

    Args:
        features: real [N, D], finite; NumPy or JAX. float64 is computed with where it is on, all
            else in float32.
        labels: class indices, integer [N], or a distribution over the classes, floating [N, K].
        optimizer: None for `optax.lbfgs()`, and for `optax.adam(1e-2)` in minibatches.
        num_classes: K; None for what the labels show.
        l2: the strength of the penalty on the kernel.
        batch_size: examples a step; None for all of them.
        epochs: the largest number of passes over the data, each a step where `batch_size` is None.
        tol: stop where no entry of the gradient is larger; not looked at in minibatches.
        seed: of the order of the examples in minibatches.
        sample_weights: real [N], >= 0.
        class_weights: real [K], >= 0.
        validation: features and labels to evaluate on after every chunk.
        init: parameters to start from; None for zeros.
        callback: called with an `Event` before the first step and after every chunk; True stops.
        steps_per_chunk: None for 10, and for one epoch in minibatches.

    Returns:
        `FitResult`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, NaN or infinity, a label
            out of range, one class only.

    Example:
        >>> import numpy as np, softjax
        >>> features = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> result = softjax.regression.fit(features, np.array([0, 1, 0, 1]), l2=0.01)
        >>> result.stop_reason, round(result.objective, 4)
        ('converged', 0.5889)

    Source: J. Nocedal and S. J. Wright, "Numerical Optimization" (2006), algorithm 7.5 (L-BFGS).
    """
    begin = time.perf_counter()
    x = _arguments.features_array("features", features)
    y = _arguments.labels_array("labels", labels, len(x))
    num_classes = _arguments.class_count("labels", y, num_classes)
    _arguments.refuse_one_class(y, num_classes)
    data = Data(
        x,
        y,
        _arguments.mean_one_weights(sample_weights, len(x), x.dtype),
        _arguments.class_weights_array(class_weights, num_classes, x.dtype),
        jnp.asarray(_arguments.not_negative("l2", l2), x.dtype),
    )
    params = _arguments.initial_params(init, x.shape[1], num_classes, x.dtype)
    held_out = None if validation is None else _validation(validation, x, num_classes)
    if batch_size is not None:
        batch_size = min(_arguments.at_least("batch_size", batch_size, 1), len(x))
    if optimizer is None:
        optimizer = _LBFGS if batch_size is None else _ADAM
    tol = _arguments.not_negative("tol", tol) if batch_size is None else -1.0
    epoch_steps = _first_order.batches_per_epoch(len(x), batch_size)
    limit = _arguments.at_least("epochs", epochs, 0) * epoch_steps
    if steps_per_chunk is None:
        steps_per_chunk = 10 if batch_size is None else epoch_steps
    steps_per_chunk = _arguments.at_least("steps_per_chunk", steps_per_chunk, 1)
    key = jax.random.key(_arguments.at_least("seed", seed, 0))

    problem = (optimizer, batch_size, data, key, jnp.asarray(tol, x.dtype))
    state = _first_order.start(*problem, params)
    searches = batch_size is None and _first_order.stores_gradient(state.optimizer_state)
    step, value = 0, float(state.value)
    best_step, best_value = step, value
    history: list[dict[str, float]] = []
    while True:
        validated = (None, None) if held_out is None else _evaluate(state.params, *held_out)
        seconds = time.perf_counter() - begin
        norm = float(state.grad_norm)
        event = Event(step, step / epoch_steps, value, norm, seconds, state.params, *validated)
        history.append(_record(event))
        interrupted = callback is not None and bool(callback(event))
        if value < best_value:
            best_step, best_value = step, value
        at_floor = searches and step - best_step >= _PATIENCE
        reason = _stop_reason(int(state.status), interrupted, at_floor, step >= limit)
        if reason is not None:
            break
        stop = jnp.asarray(min(step + steps_per_chunk, limit), jnp.int32)
        state, mean = _first_order.advance(*problem, state, stop)
        step = int(state.step)
        value = float(state.value if batch_size is None else mean)

    if batch_size is not None:
        value = float(_first_order.objective(data, state.params))
    return FitResult(state.params, value, reason == CONVERGED, reason, step, history)


def _validation(
    validation: tuple[ArrayLike, ArrayLike], features: Array, num_classes: int
) -> tuple[Array, Array]:
    x = _arguments.features_array("validation", validation[0])
    if x.shape[1] != features.shape[1]:
        expected = f"of {features.shape[1]} features"
        raise _arguments.error("validation", expected, f"{x.shape[1]} features")
    y = _arguments.labels_array("validation", validation[1], len(x))
    _arguments.class_count("validation", y, num_classes)
    return x, y


def _evaluate(params: SoftmaxRegression, features: Array, labels: Array) -> tuple[float, float]:
    loss, accuracy = _loss_and_accuracy(params, features, labels)
    return float(loss), float(accuracy)


@jax.jit
def _loss_and_accuracy(
    params: SoftmaxRegression, features: Array, labels: Array
) -> tuple[Array, Array]:
    right = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    hits = predict(params, features) == right
    return objective(params, features, labels), jnp.mean(hits)


def _record(event: Event) -> dict[str, float]:
    fields = event._asdict()
    del fields["params"]
    return {name: value for name, value in fields.items() if value is not None}


def _stop_reason(status: int, interrupted: bool, at_floor: bool, at_limit: bool) -> str | None:
    reasons = {
        NON_FINITE: status == _first_order.NON_FINITE,
        CONVERGED: status == _first_order.CONVERGED,
        CALLBACK: interrupted,
        PRECISION_FLOOR: at_floor,
        STEP_LIMIT: at_limit,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)

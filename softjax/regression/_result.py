"""The events of a fit, its status and its result."""

from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._cross_entropy import cross_entropy
from softjax.regression._arguments import (
    called,
    class_count,
    error,
    features_array,
    labels_array,
    offset_array,
)
from softjax.regression._features import Matrix, same_order
from softjax.regression._model import SoftmaxRegression, logits

Validation = tuple[ArrayLike, ...]


class Status(IntEnum):
    """Why a fit stopped: a number for compiled programs, with its text for people.

    A finished fit whose status is RUNNING has reached its limit of steps.
    """

    text: str

    def __new__(cls, number: int, text: str):
        status = int.__new__(cls, number)
        status._value_, status.text = number, text
        return status

    RUNNING = 0, "step limit"
    CONVERGED = 1, "converged"
    PRECISION_FLOOR = 2, "precision floor"
    SEPARATED = 3, "separated"
    NON_FINITE = 4, "non-finite objective"
    CALLBACK = 5, "callback"
    QUASI_SEPARATED = 6, "quasi-separated"


# The texts by their public names.
STEP_LIMIT = Status.RUNNING.text
CONVERGED = Status.CONVERGED.text
PRECISION_FLOOR = Status.PRECISION_FLOOR.text
SEPARATED = Status.SEPARATED.text
NON_FINITE = Status.NON_FINITE.text
CALLBACK = Status.CALLBACK.text
QUASI_SEPARATED = Status.QUASI_SEPARATED.text


class Event(NamedTuple):
    """The progress of a fit, reported after a chunk of steps.

    Attributes:
        step: the number of steps taken.
        epoch: the number of passes over the data with minibatches, else `step`.
        objective: the objective at `params`; with minibatches its mean over the batches of the
            chunk.
        gradient_norm: the largest entry of the gradient at `params`, relative to its largest
            possible value; with minibatches that of the last batch.
        seconds: the time since the fit began, compilation included.
        params: kernel [D, K] and bias [K].
        validation_loss: the mean loss on the validation data, without penalty or weights.
        validation_accuracy: the share of correct predictions on the validation data.

    Example:
        >>> import numpy as np, softjax
        >>> seen = []
        >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1, 0, 1])
        >>> _ = softjax.regression.fit(x, y, max_steps=1, callback=lambda e: seen.append(e.step))
        >>> seen
        [0, 1]
    """

    step: int
    epoch: float
    objective: float
    gradient_norm: float
    seconds: float
    params: SoftmaxRegression
    validation_loss: float | None = None
    validation_accuracy: float | None = None


class ManyEvent(NamedTuple):
    """The progress of many fits.

    Attributes:
        done: the number of finished fits.
        count: the number of all fits.
        seconds: the time since the start, compilation included.

    Example:
        >>> import softjax
        >>> event = softjax.regression.ManyEvent(done=40, count=200, seconds=1.5)
        >>> f"{event.done} of {event.count}"
        '40 of 200'
    """

    done: int
    count: int
    seconds: float


class FitResult(NamedTuple):
    """A fitted softmax regression: a pytree of numbers, or of arrays if the fit was traced.

    Attributes:
        params: kernel [D, K] and bias [K].
        objective: the objective of all examples at `params`, nats.
        status: the index of `stop_reason` in (STEP_LIMIT, CONVERGED, PRECISION_FLOOR, SEPARATED,
            NON_FINITE, CALLBACK, QUASI_SEPARATED).
        steps: the number of steps taken.
        passes: the number of products with the features; None for the solver "optax".
        gradient_norm: the largest entry of the gradient at `params`, as in `Event`.
        separated: whether `params` rank every example's own class strictly first. Then there is no
            optimum without a penalty: the loss falls to 0 as the parameters grow.
        history: one dictionary per event, without `params`; with `validation_*` if there is
            validation data. Without `callback` or `validation` only the final event is recorded.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1, 0, 1])
        >>> result = softjax.regression.fit(x, y, max_steps=1)
        >>> result.stop_reason, result.steps, len(result.history)
        ('step limit', 1, 1)
    """

    params: SoftmaxRegression
    objective: Any
    status: Any
    steps: Any
    passes: Any
    gradient_norm: Any
    separated: Any
    history: list[dict[str, float]]

    @property
    def converged(self) -> Any:
        """Whether the gradient and the predicted decrease of the last step are small.

        Every solver uses the same rule, which `docs/fitting.md` gives. A fit in which rounding may
        hide a larger decrease has not converged.
        """
        return self.status == Status.CONVERGED

    @property
    def stop_reason(self) -> Any:
        """The reason in words; a list of reasons for stacked fits.

        - CONVERGED.
        - PRECISION_FLOOR: rounding hides whether the objective can still decrease.
        - SEPARATED: the data have no optimum without a penalty, and `params` separate the classes.
        - QUASI_SEPARATED: there is no optimum either, but some examples cannot be separated: some
          parameters grow for ever, and the loss stays above 0. A class without examples has the
          same effect, even with a penalty.
        - STEP_LIMIT.
        - CALLBACK: the callback stopped the fit.
        - NON_FINITE: `params` are the parameters before the step that was not finite.
        """
        return np.take([status.text for status in Status], np.asarray(self.status)).tolist()


def checked_validation(
    validation: Validation | None, shape: tuple[int, ...], has_offset: bool | None = None
) -> tuple[Matrix, Array, Array | None] | None:
    """The features, labels and offset of validation data, for a kernel of this shape [D, K].

    An offset is optional if `has_offset` is None.
    """
    if validation is None:
        return None
    lengths = (2, 3) if has_offset is None else (2 + has_offset,)
    if not isinstance(validation, (tuple, list)) or len(validation) not in lengths:
        expected = "features and labels, and the offset if the fit has one"
        got = f"{len(validation)} parts" if hasattr(validation, "__len__") else repr(validation)
        raise TypeError(_checks.message(called(), "validation", expected, got))
    features, labels, offset = [*validation, None][:3]
    same_order(called(), features, validation=labels)
    (num_features, num_classes), x = shape, features_array("validation", features)
    if x.shape[1] != num_features:
        raise error("validation", f"of {num_features} features", f"{x.shape[1]} features")
    y = labels_array("validation", labels, x.shape[0])
    class_count("validation", y, num_classes)
    offset = offset_array("validation", offset, x, num_classes)
    return x, y, None if offset is None else offset.T


def recorded(
    event: Event, validation: tuple[Any, ...] | None, history: list[dict[str, float]]
) -> Event:
    """The event with the loss and accuracy on validation data; its numbers go to the history."""
    if validation is not None:
        loss, accuracy = map(float, _loss_and_accuracy(event.params, *validation))
        event = event._replace(validation_loss=loss, validation_accuracy=accuracy)
    numbers = event._asdict()
    del numbers["params"]
    history.append({name: value for name, value in numbers.items() if value is not None})
    return event


@jax.jit
def _loss_and_accuracy(
    params: SoftmaxRegression, features: Matrix, labels: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    losses, hits = losses_and_hits(logits(params, features, offset=offset), labels)
    return jnp.mean(losses), jnp.mean(hits)


def losses_and_hits(logits: Array, labels: Array) -> tuple[Array, Array]:
    """The loss of each example, and whether its most probable class is that of the label."""
    right = labels if labels.ndim == 1 else jnp.argmax(labels, -1).astype(jnp.int32)
    return cross_entropy(logits, labels), jnp.argmax(logits, -1).astype(jnp.int32) == right

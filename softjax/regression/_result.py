"""The events of a fit, its status and its result."""

from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax._cross_entropy import cross_entropy
from softjax.regression._model import SoftmaxRegression, logits

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

Validation = tuple[ArrayLike, ...]


class Status(IntEnum):
    """Why a fit stopped: a number for compiled programs, with its text for people.

    A fit that still runs when it is over has come to its limit of steps.
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
    """What a fit has come to, after a chunk of steps.

    Attributes:
        step: the number of steps taken.
        epoch: the number of passes over the data; of minibatches, else `step`.
        objective: at `params`; with minibatches its mean over the batches of the chunk.
        gradient_norm: the largest entry of the gradient at `params`, of one batch with minibatches,
            relative to what it can be at most.
        seconds: since the fit began, compilation included.
        params: kernel [D, K] and bias [K].
        validation_loss: the mean loss on the validation data, without penalty or weights.
        validation_accuracy: the share of right predictions there.

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
    """How far many fits have come.

    Attributes:
        done: how many of them are done.
        count: how many there are.
        seconds: since the start, compilation included.

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
    """A fitted softmax regression: a pytree of numbers, or of arrays where the fit was traced.

    Attributes:
        params: kernel [D, K] and bias [K].
        objective: at `params`, over all examples, nats.
        status: the place of `stop_reason` in (STEP_LIMIT, CONVERGED, PRECISION_FLOOR, SEPARATED,
            NON_FINITE, CALLBACK, QUASI_SEPARATED).
        steps: the number of steps taken.
        passes: products with the features; None for the solver "optax".
        gradient_norm: as in `Event`.
        separated: whether `params` put every example's own class strictly on top. Without a
            penalty there is no optimum then: the loss falls to 0 as the parameters grow.
        history: one dictionary an event, without `params`; `validation_*` where there is such data.
            Without `callback` or `validation` only the final event is recorded.

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
        """Whether the gradient and what the last step promised are small, and nothing is hidden.

        The rule is that of `docs/fitting.md`, the same for every solver.
        """
        return self.status == Status.CONVERGED

    @property
    def stop_reason(self) -> Any:
        """In words; a list of them where fits are stacked.

        CONVERGED; PRECISION_FLOOR, rounding hides what may be left; SEPARATED, these data have no
        optimum without a penalty, and `params` are far on the way; QUASI_SEPARATED, the same, but
        that some examples cannot be told apart: some parameters grow for ever, the loss stays above
        0; also where a class has no examples, with a penalty too; STEP_LIMIT; CALLBACK; NON_FINITE,
        `params` are those before that step.
        """
        return np.take([status.text for status in Status], np.asarray(self.status)).tolist()


def recorded(
    event: Event, validation: tuple[Any, ...] | None, history: list[dict[str, float]]
) -> Event:
    """The event with the loss and accuracy on held-out data; its numbers join the history."""
    if validation is not None:
        loss, accuracy = map(float, _loss_and_accuracy(event.params, *validation))
        event = event._replace(validation_loss=loss, validation_accuracy=accuracy)
    numbers = event._asdict()
    del numbers["params"]
    history.append({name: value for name, value in numbers.items() if value is not None})
    return event


@jax.jit
def _loss_and_accuracy(
    params: SoftmaxRegression,
    features: "Array | BCOO",
    labels: Array,
    offset: Array | None = None,
) -> tuple[Array, Array]:
    z = logits(params, features, offset=offset)
    right = labels if labels.ndim == 1 else jnp.argmax(labels, -1).astype(jnp.int32)
    hits = jnp.argmax(z, -1).astype(jnp.int32) == right
    return jnp.mean(cross_entropy(z, labels)), jnp.mean(hits)

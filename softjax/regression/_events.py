"""What is told on the way: an event with what held-out data say, and its line in the history."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax.regression._model import SoftmaxRegression, predict
from softjax.regression._objective import objective
from softjax.regression._result import Event

Validation = tuple[ArrayLike, ArrayLike]


def with_validation(event: Event, validation: tuple[Any, Any] | None) -> Event:
    """The event with the loss and the accuracy on held-out data."""
    if validation is None:
        return event
    loss, accuracy = map(float, _loss_and_accuracy(event.params, *validation))
    return event._replace(validation_loss=loss, validation_accuracy=accuracy)


def record(event: Event) -> dict[str, float]:
    """The numbers of an event that there are."""
    fields = event._asdict()
    del fields["params"]
    return {name: value for name, value in fields.items() if value is not None}


@jax.jit
def _loss_and_accuracy(
    params: SoftmaxRegression, features: Array, labels: Array
) -> tuple[Array, Array]:
    right = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    hits = predict(params, features) == right
    return objective(params, features, labels), jnp.mean(hits)

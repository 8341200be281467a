"""What is told on the way: the event of a step, and its line in the history."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax.regression import Event, SoftmaxRegression, objective, predict

Validation = tuple[ArrayLike, ArrayLike]


def with_validation(event: Event, validation: Validation | None) -> Event:
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
    return objective(params, features, labels), jnp.mean(predict(params, features) == labels)

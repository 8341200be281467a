"""Who is measured: softjax and its peers, behind one small interface.

An implementation maps the name of an operation to a function of (logits, labels). A peer whose
package is not installed is absent, and `list` says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import optax

import softjax

Operation = Callable[[jax.Array, jax.Array], Any]


@dataclass(frozen=True)
class Implementation:
    """The operations of one package, all over the last axis."""

    name: str
    distribution: str
    operations: Mapping[str, Operation]

    @property
    def version(self) -> str | None:
        """The installed version, or None where the package is absent."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


SOFTJAX = Implementation(
    "softjax",
    "softjax-regression",
    {
        "logsumexp": lambda logits, labels: softjax.logsumexp(logits, axis=-1),
        "softmax": lambda logits, labels: softjax.softmax(logits),
        "log_softmax": lambda logits, labels: softjax.log_softmax(logits),
        "cross_entropy": softjax.cross_entropy,
    },
)

JAX_NN = Implementation(
    "jax.nn",
    "jax",
    {
        "logsumexp": lambda logits, labels: jax.nn.logsumexp(logits, axis=-1),
        "softmax": lambda logits, labels: jax.nn.softmax(logits),
        "log_softmax": lambda logits, labels: jax.nn.log_softmax(logits),
    },
)

OPTAX = Implementation(
    "optax",
    "optax",
    {"cross_entropy": optax.losses.softmax_cross_entropy_with_integer_labels},
)

PEERS = (JAX_NN, OPTAX)


def peers_of(operation: str) -> list[Implementation]:
    """The installed peers that have an operation."""
    return [peer for peer in PEERS if operation in peer.operations and peer.version]


def in_mode(operation: Operation, mode: str) -> Callable:
    """An operation as the function of (logits, labels) that a case measures.

    The gradient of `logsumexp` is that of its sum over the rows, which keeps the rows apart; a loss
    is averaged over the examples, as in training.
    """
    match mode:
        case "value":
            return operation
        case "gradient":
            return jax.grad(lambda logits, labels: jnp.sum(operation(logits, labels)))
        case "value_and_gradient":
            return jax.value_and_grad(lambda logits, labels: jnp.mean(operation(logits, labels)))
    raise ValueError(f"benchmarks: unknown mode {mode!r}.")

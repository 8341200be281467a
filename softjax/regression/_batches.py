"""Batches of examples: where a compiled step finds its own, and the mean loss of one.

A step takes its batch from what lies on the device, which is one of two things. `Held` holds all
examples and an order of them; `Stacked` holds the batches of the next steps, which were read from
elsewhere. Both have the method `batch(step, first)`, and the step is the same for both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._cross_entropy import cross_entropy
from softjax.regression._model import SoftmaxRegression, logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Examples, padded to one number of them, or the part of them that a process reads.

    Iteration gives features, labels and weights, and the offset where there is one.

    Attributes:
        features: [B, D], at least float32.
        labels: class indices, int32 [B], or distributions over the classes, floating [B, K].
        weights: [B]; 0 for padding and for what is held out. None for ones.
        offset: [B, K], nats, what is added to the logits; None for zeros.
        counts: [B], what each example adds to the divisor of the mean loss; None for its weight.

    Example:
        >>> import numpy as np, softjax
        >>> rows = softjax.streaming.ArrayRows(np.arange(3.0)[:, None], np.arange(3))
        >>> batch = softjax.streaming.Batches(rows, 3).read(0)
        >>> sorted(batch.labels[batch.weights > 0].tolist()), float(batch.weights.sum())
        ([0, 1, 2], 3.0)
    """

    features: Any
    labels: Any
    weights: Any
    offset: Any = None
    counts: Any = None

    def __iter__(self) -> Iterator[Any]:
        parts = (self.features, self.labels, self.weights, self.offset)
        return iter(parts if self.offset is not None else parts[:3])


class Stacked(NamedTuple):
    """The batches of some steps in a row.

    Attributes:
        batches: parts [S, B, ...].
    """

    batches: Batch

    def batch(self, step: Array, first: Array) -> Batch:
        """The batch of `step`; the stack begins with the batch of the step `first`."""
        place = step - first
        pick = partial(lax.dynamic_index_in_dim, index=place, keepdims=False)
        return jax.tree.map(pick, self.batches)


class Held(NamedTuple):
    """All examples, and which of them each step of an epoch takes.

    Attributes:
        rows: parts [N, ...].
        order: the places of the examples, int32 [steps, B], -1 for none; None where every step
            takes all of them.
    """

    rows: Batch
    order: Array | None

    def batch(self, step: Array, first: Array) -> Batch:
        """The batch of `step`; the first step does not matter."""
        if self.order is None:
            return self.rows
        places = self.order[step % len(self.order)]
        inside = places >= 0
        batch = jax.tree.map(lambda part: part[jnp.maximum(places, 0)], self.rows)
        weights = inside if batch.weights is None else jnp.where(inside, batch.weights, 0)
        return replace(batch, weights=weights, counts=inside)


def batches_per_epoch(num_examples: int, batch_size: int | None) -> int:
    """The number of batches in which every example is once; None is one batch of all."""
    return 1 if batch_size is None else -(-num_examples // batch_size)


@partial(jax.jit, static_argnames=("num_examples", "batch_size"))
def epoch_order(key: Array, epoch: Array, num_examples: int, batch_size: int) -> Array:
    """The examples of each batch of an epoch, [steps, batch_size], as (key, epoch) determine them.

    They are those of a random permutation, one after another; -1 fills the last batch.
    """
    examples = jnp.arange(num_examples, dtype=jnp.int32)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), examples)
    order = jnp.pad(order, (0, -num_examples % batch_size), constant_values=-1)
    return order.reshape(-1, batch_size)


class OneSum(NamedTuple):
    """The mean loss as XLA adds it up, over whatever devices the examples are on."""

    def mean_loss(
        self, batch: Batch, class_weights: Array | None, params: SoftmaxRegression
    ) -> Array:
        """sum_i w_i loss_i / sum_i c_i, nats; 0 where the counts c are 0."""
        z = logits(params, batch.features, offset=batch.offset)
        losses = cross_entropy(z, batch.labels, class_weights=class_weights)
        if batch.weights is None:
            return jnp.mean(losses)
        weights = batch.weights.astype(losses.dtype)
        counts = batch.weights if batch.counts is None else batch.counts
        total = jnp.sum(counts.astype(losses.dtype))
        # What is masked changes neither the value nor the gradient.
        return jnp.sum(jnp.where(weights != 0, weights * losses, 0)) / jnp.where(
            total == 0, 1, total
        )


def without_bad_rows(batch: Batch, num_classes: int) -> Batch:
    """The batch with weight 0, and with zeros, for rows that are not finite or of no class."""
    good = good_rows(jnp, batch, num_classes)

    def kept(part: Array) -> Array:
        shape = -1, *(1,) * (part.ndim - 1)
        return jnp.where(good.reshape(shape), part, jnp.zeros_like(part))

    return jax.tree.map(kept, batch)


def good_rows(xp: Any, batch: Batch, num_classes: int) -> Any:
    """Which rows are finite and of a class or a distribution, [B]; `xp` is NumPy or JAX's."""
    labels = batch.labels
    good = xp.all(xp.isfinite(batch.features), 1) & xp.isfinite(batch.weights)
    if batch.offset is not None:
        good &= xp.all(xp.isfinite(batch.offset), 1)
    if labels.ndim == 1:
        return good & (labels >= 0) & (labels < num_classes)
    return good & xp.all(xp.isfinite(labels) & (labels >= 0), 1)


Transform = Callable[[Array], Array] | None

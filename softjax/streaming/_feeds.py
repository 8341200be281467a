"""The data feeds of `train`: arrays in memory, and batches that a thread reads.

Both feeds have the same attributes and methods. They give the loop of `train` chunks of steps with
their batches on the devices, and properties of the examples:

    num_classes   K
    epoch_steps   the number of steps of a pass over the data; 1 if it is unknown
    chunk_steps   the largest number of steps in a chunk, which never crosses a multiple of it
    takes_all     whether every step takes all examples
    sums          how the mean loss is summed
    transform     the function that a step applies to the features of its batch, or None
"""

import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks, processes
from softjax.regression._arguments import at_least, checked_data, error
from softjax.regression._features import is_sparse
from softjax.regression._first_order import Examples, scales, separation
from softjax.regression._host_arrays import placed
from softjax.regression._model import SoftmaxRegression
from softjax.regression._steps import (
    Form,
    Held,
    State,
    Terms,
    Transform,
    good_rows,
    mean_loss,
    objective_and_norm,
)
from softjax.streaming._batches import TRAIN, source_of
from softjax.streaming._devices import Chunk, Devices, ahead
from softjax.streaming._rows import transformed
from softjax.tables import DataError
from softjax.tables._errors import differences

T = TypeVar("T")
Spans = Iterable[tuple[int, int]]
Figures = tuple[float, float]  # an objective, and the norm of its gradient
CHUNK_BYTES = 1 << 23
LONGEST_CHUNK = 64
SAMPLES = 64


class ArrayFeed:
    """Arrays in memory: each chunk is part of one epoch, whose order is drawn on the device."""

    def __init__(
        self,
        features: Any,
        labels: Any,
        num_classes: int | None,
        transform: Transform,
        batch_size: int | None,
        seed: int | None,
        sample_weights: ArrayLike | None,
        offset: ArrayLike | None,
    ):
        data = checked_data(features, labels, num_classes, sample_weights, None, offset=offset)
        self.num_classes = data.num_classes
        if is_sparse(data.features):
            expected = "dense; rows of a SciPy CSR matrix may be streamed, by `Batches`"
            raise error("features", expected, "a sparse array")
        if transform is not None:
            transformed(TRAIN, transform, data.features.shape, data.features.dtype)
            data = replace(data, features=jax.jit(transform)(data.features))
        self.seed = 0 if seed is None else at_least("seed", seed, 0)
        self.data, self.examples = data, Examples(data, batch_size, self.seed)
        self.takes_all, self.epoch_steps = self.examples.takes_all, self.examples.epoch_steps
        self.chunk_steps = LONGEST_CHUNK if self.takes_all else self.epoch_steps
        self.sums = mean_loss
        self.transform = None  # all features have been transformed

    @property
    def configuration(self) -> dict[str, Any]:
        """The shape of the features, checksums of the examples, and the order of the examples.

        Arrays with one number per example are checked as a whole, all others in some examples.
        """
        count, width = self.data.features.shape
        places = np.linspace(0, count - 1, min(SAMPLES, count)).astype(int)
        data = {}
        for name, part in vars(self.examples.rows).items():
            if part is not None:
                seen = part if part.ndim == 1 and _checks.is_concrete(part) else part[places]
                data[name] = zlib.crc32(np.asarray(seen).tobytes())
        order = {"batch_size": self.examples.batch_size, "seed": self.seed}
        return {"data": data, "rows": count, "features": width} | order

    def begin(self, step: int, every: int) -> Any:
        return self.data.features

    def completed(self, terms: Terms) -> Terms:
        """The terms on the devices, with bounds and scales of all examples if these are known."""
        known = {"class_weights": terms.class_weights, "l2": terms.l2, "constant": terms.constant}
        self.data = replace(self.data, **known)
        bound, largest = scales(self.data)
        return terms._replace(bound=bound, largest=largest)

    def placed(self, tree: T) -> T:
        """The arrays of a tree on the devices."""
        mesh = getattr(self.data.features.sharding, "mesh", None)
        if mesh is None:
            return placed(tree)
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.device_put(tree, everywhere)

    def flag(self, raised: bool) -> np.ndarray:
        return np.array([any(processes.gather(raised))], np.int32)

    def chunks(self, spans: Spans) -> Generator[Chunk]:
        for first, stop in spans:
            yield Chunk(first, np.int32(stop - first), self.examples.held(first), None)

    def bad_rows(self, chunk: Chunk, step: int) -> tuple[list[int], list[int]]:
        """The rows of the batch of `step` that are bad, and those of them without a valid class."""
        return [], []  # such arrays have been refused

    def evaluated(self, form: Form, terms: Terms, state: State, last: Figures) -> Figures:
        """The objective of all examples at the parameters, and the norm of its gradient."""
        value, norm = objective_and_norm(form, terms, state, Held(self.examples.rows, None))
        return float(value), float(norm)

    def separated(self, params: SoftmaxRegression) -> bool:
        return bool(separation(self.data, params, np.int32(0))[0])


class BatchFeed:
    """Batches that a thread reads onto the devices of all processes, before they are needed."""

    def __init__(self, batches: Any, num_classes: int | None, transform: Transform):
        self.source, self.transform = source_of(batches), transform
        if num_classes is None:
            num_classes = getattr(self.source, "num_classes", None)
        if num_classes is None:
            expected = "given, since the batches do not say how many classes there are"
            raise error("num_classes", expected, None)
        self.num_classes = at_least("num_classes", num_classes, 2)
        self.epoch_steps = self.source.epoch_steps
        self.takes_all = False

    @property
    def configuration(self) -> dict[str, Any]:
        """The settings that determine the batches; an error if they differ between processes."""
        configuration = self.source.configuration
        first, *others = map(_without_times, processes.gather(configuration))
        for index, other in enumerate(others, 1):
            form = f"{{}} is {{}} of process 0 and {{}} of process {index}"
            if difference := "; ".join(differences(first, other, form)):
                raise DataError(f"the processes have different batches: {difference}.")
        return configuration

    def begin(self, step: int, every: int) -> Any:
        first = self.source.read(step)
        shape = (len(first.labels), self.num_classes)
        if first.labels.ndim == 2:
            _checks.same_shape(TRAIN, "labels", first.labels, shape)
        if first.offset is not None:
            _checks.same_shape(TRAIN, "offset", first.offset, shape)
        self.like, self.devices = first, Devices(len(first.labels), self.num_classes)
        self.sums = self.devices.sums
        size = sum(part.nbytes for part in jax.tree.leaves(first))
        self.chunk_steps = max(min(CHUNK_BYTES // max(size, 1), LONGEST_CHUNK, every), 1)
        return transformed(TRAIN, self.transform, first.features.shape, first.features.dtype)

    def completed(self, terms: Terms) -> Terms:
        return self.devices.placed(terms)

    def placed(self, tree: T) -> T:
        return self.devices.placed(tree)

    def flag(self, raised: bool) -> Array:
        return self.devices.flag(raised)

    def chunks(self, spans: Spans) -> Generator[Chunk]:
        read = partial(self.devices.chunk, self.source, self.like, self.chunk_steps)
        with closing(ahead(read, spans)) as chunks:
            yield from chunks

    def bad_rows(self, chunk: Chunk, step: int) -> tuple[list[int], list[int]]:
        batch = jax.tree.map(lambda part: part[step - chunk.first], chunk.host)
        good = good_rows(np, batch, self.num_classes)
        numbers = self.source.row_numbers(step)
        bad, labels = ~good[: len(numbers)], batch.labels[: len(numbers)]
        if labels.ndim == 2:
            return numbers[bad].tolist(), []
        outside = bad & ((labels < 0) | (labels >= self.num_classes))
        return numbers[bad].tolist(), numbers[outside].tolist()

    def evaluated(self, form: Form, terms: Terms, state: State, last: Figures) -> Figures:
        """The objective and norm of the first batch before the first step; then the `last` ones."""
        if int(state.step):
            return last
        first = self.devices.chunk(self.source, self.like, self.chunk_steps, (0, 1))
        value, norm = objective_and_norm(form, terms, state, first.feed)
        return float(value), float(norm)

    def separated(self, params: SoftmaxRegression) -> bool:
        return False  # unknown without a pass over all rows


Feed = ArrayFeed | BatchFeed


def feed_of(
    features: Any,
    labels: Any,
    num_classes: int | None,
    transform: Transform,
    of_arrays: dict[str, Any],
    skip_nonfinite: bool,
) -> Feed:
    """The feed of arrays or, without `labels`, of batches; it refuses options of the other one."""
    skips = _checks.flag(TRAIN, "skip_nonfinite", skip_nonfinite)
    if labels is None:
        given = {name: value for name, value in of_arrays.items() if value is not None}
    else:
        given = {"labels": labels} if callable(features) or hasattr(features, "row_numbers") else {}
    for name, value in given.items():
        expected = "None where `features` are batches, which have their own"
        raise error(name, expected, type(value).__name__)
    if labels is None:
        return BatchFeed(features, num_classes, transform)
    if skips:
        expected = "False for arrays in memory; leave such rows out of the arrays"
        raise error("skip_nonfinite", expected, True)
    return ArrayFeed(features, labels, num_classes, transform, **of_arrays)


def spans(first: int, last: int, size: int, every: int) -> Iterator[tuple[int, int]]:
    """Divides the steps first, ..., last - 1 at the multiples of `size` and of `every`."""
    while first < last:
        stop = min(first - first % size + size, first - first % every + every, last)
        yield first, stop
        first = stop


def _without_times(configuration: Any) -> Any:
    """The configuration without the times at which files changed, which differ between copies."""
    if not isinstance(configuration, dict):
        return configuration
    kept = {name: part for name, part in configuration.items() if name != "changed_ns"}
    return {name: _without_times(part) for name, part in kept.items()}

"""Batches of rows in an order that (seed, step) determines, from reads that are sequential.

N rows are cut into blocks of nearly one size. An epoch is a random order of the blocks; W blocks
after another are a group, which is in memory while its batches are drawn. Each block of a group
is shuffled, and every batch takes an equal share of each: the rows of W distant places. Nothing
depends on the number of processes, each of which reads the blocks that are its own.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from softjax import _checks
from softjax._numerics import compute_dtype
from softjax.streaming._rows import Rows

BLOCKS = 16
BUFFER_BYTES = 1 << 26


class Batch(NamedTuple):
    """The part of a batch that a process reads, padded to one size.

    Attributes:
        features: [B, D], at least float32.
        labels: int32 [B].
        weights: [B]; 0 for padding and for what is held out.
    """

    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class Source(Protocol):
    """What `train` reads: batches by the number of their step."""

    epoch_steps: int

    @property
    def configuration(self) -> dict[str, Any]:
        """What determines the batches, as JSON can hold it."""
        ...

    def read(self, step: int) -> Batch:
        """The batch of a step, or this process's part of it."""
        ...

    def row_numbers(self, step: int) -> np.ndarray:
        """Where the entries of `read(step)` stand in the data; -1 for padding."""
        ...


class Batches:
    """Shuffled batches of rows; each is a pure function of (seed, step).

    Args:
        rows: `ArrayRows`, what `open_rows` gives, or anything like them.
        batch_size: B, the largest number of rows in a batch.
        seed: of the order.
        held_out: row numbers that count nothing.
        buffer_bytes: of the rows that are held in memory; a few times as much is used.
        process_index: None for that of JAX.
        process_count: None for that of JAX.

    Raises:
        TypeError, ValueError: `batch_size`, `seed` or `buffer_bytes` is too small or no integer.

    Example:
        >>> import numpy as np, softjax
        >>> rows = softjax.streaming.ArrayRows(np.arange(6.0)[:, None], np.arange(6))
        >>> batches = softjax.streaming.Batches(rows, 2, seed=1)
        >>> seen = [batches.read(step).labels.tolist() for step in range(batches.epoch_steps)]
        >>> sorted(sum(seen, []))
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        *,
        seed: int = 0,
        held_out: np.ndarray | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        name = "streaming.Batches"
        self.batch_size = min(_checks.at_least(name, "batch_size", batch_size, 1), rows.num_rows)
        self.seed = _checks.at_least(name, "seed", seed, 0)
        buffer_bytes = _checks.at_least(name, "buffer_bytes", buffer_bytes, 1)
        self.rows = rows
        self.held_out = np.unique(np.asarray([] if held_out is None else held_out, np.int64))
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count

        sample = rows.read(0, 1)[0]
        self.dtype = computed_in(sample.dtype)
        row_bytes = max(rows.num_features, 1) * self.dtype.itemsize
        in_buffer = max(buffer_bytes // (row_bytes * self.batch_size), 1)
        self.num_groups = -(-rows.num_rows // (in_buffer * self.batch_size))
        self.group_steps = -(-rows.num_rows // (self.num_groups * self.batch_size))
        self.epoch_steps = self.num_groups * self.group_steps
        self.width = min(BLOCKS, self.batch_size)
        num_blocks = self.num_groups * self.width
        self.bounds = np.linspace(0, rows.num_rows, num_blocks + 1).astype(np.int64)
        # One share of a block, and the places of the group whose blocks this process reads.
        self.share = -(-int(np.diff(self.bounds).max()) // self.group_steps)
        self.slots = -(-self.width // count)
        self.own = range(self.width)[index * self.slots : (index + 1) * self.slots]
        self.held: tuple[int, list[_Block]] = (-1, [])

    @property
    def configuration(self) -> dict[str, Any]:
        """What determines the batches."""
        return {
            "data": self.rows.fingerprint,
            "rows": self.rows.num_rows,
            "features": self.rows.num_features,
            "batch_size": self.batch_size,
            "groups": self.num_groups,
            "seed": self.seed,
            "held_out": len(self.held_out),
        }

    def read(self, step: int) -> Batch:
        """The rows of a step that are this process's."""
        size = self.slots * self.share
        batch = Batch(
            np.zeros((size, self.rows.num_features), self.dtype),
            np.zeros(size, np.int32),
            np.zeros(size, self.dtype),
        )
        end = 0
        for block, drawn in self._drawn(step):
            begin, end = end, end + len(drawn)
            np.take(block.features, drawn, 0, batch.features[begin:end], "clip")
            batch.labels[begin:end] = block.labels[drawn]
            batch.weights[begin:end] = block.weights[drawn]
        return batch

    def row_numbers(self, step: int) -> np.ndarray:
        """The rows of `read(step)`; -1 for padding."""
        found = [block.start + drawn for block, drawn in self._drawn(step)]
        numbers = np.concatenate([np.empty(0, np.int64), *found])
        return np.pad(numbers, (0, self.slots * self.share - len(numbers)), constant_values=-1)

    def _drawn(self, step: int) -> "Iterator[tuple[_Block, np.ndarray]]":
        """Of every own block of the group, the places that a step draws."""
        group, batch = divmod(step, self.group_steps)
        if self.held[0] != group:
            self.held = (-1, [])  # the memory of one group, never of two
            self.held = (group, [self._block(group, place) for place in self.own])
        for place, block in zip(self.own, self.held[1], strict=True):
            # By Hermite's identity sum_b floor(x + b / W) = floor(W x): batches of blocks of one
            # size differ in size by one row at most.
            begin, end = (
                (self.width * n * len(block.order) + place * self.group_steps)
                // (self.width * self.group_steps)
                for n in (batch, batch + 1)
            )
            yield block, block.order[begin:end]

    def _block(self, group: int, place: int) -> "_Block":
        epoch, in_epoch = divmod(group, self.num_groups)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.bounds) - 1)
        block = int(order[in_epoch * self.width + place])
        start, stop = self.bounds[block : block + 2].tolist()
        features, labels = self.rows.read(start, stop)
        weights = np.ones(stop - start, self.dtype)
        first, last = np.searchsorted(self.held_out, [start, stop])
        weights[self.held_out[first:last] - start] = 0
        within = np.arange(stop - start, dtype=np.int32)
        within = np.random.default_rng([self.seed, epoch, block]).permutation(within)
        with np.errstate(over="ignore"):  # infinite now, and found so
            features = features.astype(self.dtype, copy=False)
        return _Block(start, features, as_indices(labels), weights, within)


class _Block(NamedTuple):
    """A block in memory, and the order in which its rows are drawn."""

    start: int
    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    order: np.ndarray


class FromFunction:
    """Batches of a function of the step."""

    epoch_steps = 1

    def __init__(self, function: Callable[[int], Any]):
        self.function, self.size = function, None

    @property
    def configuration(self) -> dict[str, Any]:
        """Nothing is known of a function."""
        return {}

    def read(self, step: int) -> Batch:
        """What the function gives, padded to the size of what it gave first."""
        features, labels, *weights = self.function(step)
        features = np.asarray(features)
        dtype = computed_in(features.dtype)
        ones = np.ones(len(features), dtype)
        batch = Batch(
            features.astype(dtype, copy=False),
            as_indices(np.asarray(labels)),
            np.asarray(weights[0], dtype) if weights else ones,
        )
        self.size = len(features) if self.size is None else self.size
        missing = self.size - len(features)
        if features.ndim != 2 or missing < 0 or {len(part) for part in batch} != {len(features)}:
            shapes = ", ".join(str(part.shape) for part in batch)
            raise ValueError(
                f"softjax.streaming.train: batch {step} must be of at most {self.size} rows with "
                f"as many labels and weights, got shapes {shapes}."
            )
        pad = [np.pad(p, [(0, missing)] + [(0, 0)] * (p.ndim - 1)) for p in batch]
        return Batch(*pad)

    def row_numbers(self, step: int) -> np.ndarray:
        """The places in the batch."""
        return np.arange(self.size or 0)


class FromIterable(FromFunction):
    """Batches of an iterable, from its beginning again when it is exhausted.

    After a restart the batches before are read and dropped, for nothing else gives their number.
    """

    def __init__(self, iterable: Iterable[Any]):
        super().__init__(self._item)
        self.iterable, self.iterator = iterable, iter(iterable)
        self.position, self.last = 0, None

    def _item(self, step: int) -> Any:
        while self.position <= step:
            try:
                self.last = next(self.iterator)
            except StopIteration:
                self.iterator = iter(self.iterable)
                try:
                    self.last = next(self.iterator)
                except StopIteration:
                    raise ValueError(
                        f"softjax.streaming.train: `batches` must be an iterable that begins "
                        f"again, or of more than {self.position} batches."
                    ) from None
            self.position += 1
        return self.last


def source_of(batches: Any) -> Source:
    """Anything that gives batches."""
    if hasattr(batches, "read") and hasattr(batches, "row_numbers"):
        return batches
    if callable(batches):
        return FromFunction(batches)
    if isinstance(batches, Iterable):
        return FromIterable(batches)
    expected = "`Batches`, a function of the step or an iterable"
    got = type(batches).__name__
    raise TypeError(_checks.message("streaming.train", "batches", expected, got))


def computed_in(dtype: np.dtype) -> np.dtype:
    """float64 where the features are and it is on, else float32."""
    if not np.issubdtype(dtype, np.floating):
        dtype = np.dtype(float)
    return np.dtype(compute_dtype(jax.dtypes.canonicalize_dtype(dtype)))


def as_indices(labels: np.ndarray) -> np.ndarray:
    """Class indices in int32; -1, which no class has, for what is none."""
    if not np.issubdtype(labels.dtype, np.number):
        expected, got = "class indices", f"dtype {labels.dtype}"
        raise TypeError(_checks.message("streaming", "labels", expected, got))
    whole = (labels >= 0) & (labels < 2**31) & (labels == np.floor(labels))
    return np.where(whole, labels, -1).astype(np.int32)

"""Batches of rows in an order that (seed, step) determines, from reads that are sequential.

N rows are cut into blocks of nearly one size. An epoch is a random order of the blocks; W blocks
after another are a group, which is in memory while its batches are drawn. Each block of a group
is shuffled, and every batch takes an equal share of each: the rows of W distant places. Nothing
depends on the number of processes, each of which reads the blocks that are its own.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from softjax import _checks
from softjax.streaming._rows import (
    Rows,
    as_indices,
    computed_in,
    real_array,
    row_numbers,
)

BLOCKS = 16
BUFFER_BYTES = 1 << 26


class Batch(NamedTuple):
    """The part of a batch that a process reads, padded to one size.

    Attributes:
        features: [B, D], at least float32.
        labels: int32 [B].
        weights: [B]; 0 for padding and for what is held out.

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


class Source(Protocol):
    """What `train` reads: batches by the number of their step."""

    epoch_steps: int

    @property
    def configuration(self) -> dict[str, Any]:
        """What determines the batches, as JSON can hold it."""
        ...

    def read(self, step: int, out: Batch | None = None) -> Batch:
        """The batch of a step, or this process's part of it, into `out` where it is given."""
        ...

    def row_numbers(self, step: int) -> np.ndarray:
        """Where the entries of `read(step)` stand in the data; -1 for padding."""
        ...


class Batches:
    """Shuffled batches of rows; each is a pure function of (seed, step).

    Args:
        rows: `ArrayRows`, what `open_rows` gives, or anything like them.
        batch_size: about as many rows a batch: an epoch is divided evenly.
        seed: of the order.
        held_out: row numbers that count nothing.
        buffer_bytes: of the rows that are held in memory; a few times as much is used.
        process_index: None for that of JAX.
        process_count: None for that of JAX.

    Raises:
        TypeError, ValueError: `batch_size`, `seed` or `buffer_bytes` is too small or no integer,
            or `held_out` has a number that no row has, or all rows.

    Example:
        >>> import numpy as np, softjax
        >>> rows = softjax.streaming.ArrayRows(np.arange(6.0)[:, None], np.arange(6))
        >>> batches = softjax.streaming.Batches(rows, 2, seed=1)
        >>> seen = [batches.row_numbers(step) for step in range(batches.epoch_steps)]
        >>> sorted(row for rows in seen for row in rows.tolist() if row >= 0)  # -1 is padding
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
        self.held_out = row_numbers(name, held_out, rows.num_rows)
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
        # One share of a block, and the places of the group whose blocks this process reads: pairs
        # of them, for those are what is summed. A row has the same place in a batch at any count.
        self.share = -(-int(np.diff(self.bounds).max()) // self.group_steps)
        self.slots = 2 * -(-BLOCKS // 2 // count) if count < BLOCKS else 1
        self.own = range(self.width)[index * self.slots : (index + 1) * self.slots]
        self.group: _Group | None = None

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
            "held_out": {
                "rows": len(self.held_out),
                "checksum": zlib.crc32(self.held_out.tobytes()),
            },
        }

    def read(self, step: int, out: Batch | None = None) -> Batch:
        """The rows of a step that are this process's, into arrays where they are given."""
        if out is None:
            size = self.slots * self.share
            features = np.zeros((size, self.rows.num_features), self.dtype)
            out = Batch(features, np.zeros(size, np.int32), np.zeros(size, self.dtype))
        group, drawn = self._drawn(step)
        for held, part in zip(group.held, out, strict=True):
            np.take(held, drawn, 0, part, "clip")
        return out

    def row_numbers(self, step: int) -> np.ndarray:
        """Where the rows of `read(step)` stand in the data; -1 for padding."""
        group, drawn = self._drawn(step)
        return group.numbers[drawn]

    def _drawn(self, step: int) -> "tuple[_Group, np.ndarray]":
        """The group of a step, in memory, and the places of its rows there."""
        number, batch = divmod(step, self.group_steps)
        if self.group is None or self.group.number != number:
            self.group = self._load(number, None if self.group is None else self.group.held)
        return self.group, self.group.order[batch]

    def _load(self, number: int, held: Batch | None) -> "_Group":
        """Reads the own blocks of a group, into the memory of the group before."""
        epoch, in_epoch = divmod(number, self.num_groups)
        blocks = np.random.default_rng([self.seed, epoch]).permutation(len(self.bounds) - 1)
        size = len(self.own) * int(np.diff(self.bounds).max())
        if held is None:
            features = np.empty((size + 1, self.rows.num_features), self.dtype)
            held = Batch(features, np.empty(size + 1, np.int32), np.empty(size + 1, self.dtype))
            for part in held:
                part[size] = 0
        end, numbers = 0, np.full(size + 1, -1)
        order = np.full((self.group_steps, self.slots, self.share), size, np.int32)
        for slot, place in enumerate(self.own):
            block = int(blocks[in_epoch * self.width + place])
            start, stop = self.bounds[block : block + 2].tolist()
            begin, end = end, end + stop - start
            features, labels = self.rows.read(start, stop)
            with np.errstate(over="ignore"):  # infinite now, and found so
                held.features[begin:end] = real_array("streaming.Batches", "features", features)
            held.labels[begin:end] = as_indices("streaming.Batches", labels)
            held.weights[begin:end] = 1
            first, last = np.searchsorted(self.held_out, [start, stop])
            held.weights[begin + self.held_out[first:last] - start] = 0
            numbers[begin:end] = np.arange(start, stop)
            n = np.arange(stop - start)
            batch = self._batch_of(n, stop - start, place)
            shuffle = np.random.default_rng([self.seed, epoch, block]).permutation
            drawn = shuffle(np.arange(begin, end, dtype=np.int32))
            order[batch, slot, n - np.searchsorted(batch, batch)] = drawn
        return _Group(number, held, numbers, order.reshape(self.group_steps, -1))

    def _batch_of(self, n: np.ndarray, size: int, place: int) -> np.ndarray:
        """The batch of the group that the n-th row drawn from a block of `size` rows is in.

        Batch j draws floor((j + 1) R / m + b / W) - floor(j R / m + b / W) of the R rows of block
        b. By Hermite's identity sum_b floor(x + b / W) = floor(W x): batches of blocks of one size
        differ in size by one row at most.
        """
        w, m = self.width, self.group_steps
        # n < floor((j + 1) R / m + b / W)  <=>  (n + 1) W m - b m <= (j + 1) R W
        return np.maximum(-(-((n + 1) * w * m - place * m) // (size * w)) - 1, 0)


class _Group(NamedTuple):
    """The blocks of a group in memory.

    Attributes:
        number: of the group, counted from the first epoch.
        held: the rows, one block after another, and at the end one of zeros.
        numbers: where they stand in the data; -1 for the last.
        order: of each batch the places of its rows in `held`.
    """

    number: int
    held: Batch
    numbers: np.ndarray
    order: np.ndarray


class FromFunction:
    """Batches of a function of the step."""

    epoch_steps = 1

    def __init__(self, function: Callable[[int], Any]):
        self.function = function
        self.shape: tuple[int, ...] | None = None

    @property
    def configuration(self) -> dict[str, Any]:
        """Nothing is known of a function."""
        return {}

    def read(self, step: int, out: Batch | None = None) -> Batch:
        """What the function gives, padded to the size of what it gives first."""
        name = "streaming.train"
        if self.shape is None and step:  # a run that goes on may begin with a smaller batch
            self.shape = np.shape(self.function(0)[0])
        features, labels, *weights = self.function(step)
        features, labels = real_array(name, "features", features), as_indices(name, labels)
        self.shape = features.shape if self.shape is None else self.shape
        dtype = computed_in(features.dtype)
        weights = real_array(
            name, "weights", weights[0] if weights else np.ones(len(labels), dtype)
        )
        fits = len(self.shape) == 2 and features.shape[1:] == self.shape[1:]
        fits = fits and len(features) <= self.shape[0]
        if not fits or not labels.shape == weights.shape == features.shape[:1]:
            shapes = ", ".join(str(part.shape) for part in (features, labels, weights))
            raise ValueError(
                f"softjax.{name}: batch {step} must be of at most {self.shape[0]} rows, each of as "
                f"many features as in the first batch, with as many labels and weights, got shapes "
                f"{shapes}."
            )
        _checks.refuse_first(name, "weights", ">= 0", weights, weights < 0)
        if out is None:
            zeros = np.zeros(self.shape, dtype)
            out = Batch(zeros, np.zeros(len(zeros), np.int32), np.zeros(len(zeros), dtype))
        for part, given in zip(out, (features, labels, weights), strict=True):
            with np.errstate(over="ignore"):  # infinite now, and found so
                part[: len(given)] = given
        return out

    def row_numbers(self, step: int) -> np.ndarray:
        """The places in the batch."""
        return np.arange(self.shape[0] if self.shape else 0)


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

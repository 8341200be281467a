"""Batches of rows in an order that (seed, step) determines, read sequentially.

The N rows are divided into blocks of nearly equal size. Every epoch visits the blocks in a random
order, in groups of W blocks. The blocks of a group are in memory while the batches of the group are
drawn. The rows of each block are shuffled, and every batch takes equally many rows from each block,
so that its rows come from W distant places. The batches do not depend on the number of processes,
each of which reads only its own blocks.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from softjax import _checks
from softjax.regression._steps import Batch as Batch
from softjax.streaming._rows import Rows, computed_in, parts_of, refuse_other_rows, row_numbers

BATCHES = "streaming.Batches"
TRAIN = "regression.train"
BLOCKS = 16
BUFFER_BYTES = 1 << 26
PARTS = ("features", "labels", "weights", "offset", "counts")
END = object()  # no batch


class Source(Protocol):
    """A source of batches for `train`; the number of a step identifies its batch."""

    epoch_steps: int

    @property
    def configuration(self) -> dict[str, Any]:
        """The settings that determine the batches, as values for JSON."""
        ...

    def read(self, step: int, out: Batch | None = None) -> Batch:
        """The batch of a step, or this process's part of it, written into `out` if given."""
        ...

    def row_numbers(self, step: int) -> np.ndarray:
        """The row numbers, within the data, of the entries of `read(step)`; -1 for padding."""
        ...


class Batches:
    """Shuffled batches of rows; each is a pure function of (seed, step).

    Args:
        rows: `ArrayRows`, the result of `open_rows`, or an object with the same methods.
        batch_size: the approximate number of rows per batch; the rows of an epoch are divided
            evenly among its batches.
        seed: determines the order of the rows.
        held_out: the numbers of the rows that get weight 0, such as a validation set.
        buffer_bytes: the size of the rows that are in memory at a time; about three times as much
            memory is used.
        process_index: the number of this process; None for `jax.process_index()`.
        process_count: the number of processes; None for `jax.process_count()`.

    Raises:
        TypeError, ValueError: `batch_size`, `seed` or `buffer_bytes` is too small or not an
            integer; a number in `held_out` is not a row, or it contains all rows.

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
        refuse_other_rows(BATCHES, rows)
        batch_size = _checks.at_least(BATCHES, "batch_size", batch_size, 1)
        self.batch_size = min(batch_size, rows.num_rows)
        self.seed = _checks.at_least(BATCHES, "seed", seed, 0)
        buffer_bytes = _checks.at_least(BATCHES, "buffer_bytes", buffer_bytes, 1)
        self.rows = rows
        self.held_out = row_numbers(BATCHES, held_out, rows.num_rows)
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        count = _checks.at_least(BATCHES, "process_count", count, 1)
        if not 0 <= _checks.integer(BATCHES, "process_index", index) < count:
            raise ValueError(_checks.message(BATCHES, "process_index", f"in [0, {count})", index))

        self.sample = parts_of(BATCHES, rows.read(0, 1))
        self.dtype = computed_in(self.sample[0].dtype)
        row_bytes = max(rows.num_features, 1) * self.dtype.itemsize
        in_buffer = max(buffer_bytes // (row_bytes * self.batch_size), 1)
        self.num_groups = -(-rows.num_rows // (in_buffer * self.batch_size))
        self.group_steps = -(-rows.num_rows // (self.num_groups * self.batch_size))
        self.epoch_steps = self.num_groups * self.group_steps
        self.width = min(BLOCKS, self.batch_size)
        num_blocks = self.num_groups * self.width
        self.bounds = np.linspace(0, rows.num_rows, num_blocks + 1).astype(np.int64)
        # A batch takes `share` rows from each block. This process reads the blocks of a group at
        # the places `own`. Their number is even, since `ReproducibleSums` adds blocks in pairs, so
        # that the place of a row in a batch does not depend on the number of processes.
        self.share = -(-int(np.diff(self.bounds).max()) // self.group_steps)
        self.slots = 2 * -(-BLOCKS // 2 // count) if count < BLOCKS else 1
        self.own = range(self.width)[index * self.slots : (index + 1) * self.slots]
        self.group: _Group | None = None

    @property
    def configuration(self) -> dict[str, Any]:
        """The settings that determine the batches, as values for JSON."""
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

    @property
    def num_classes(self) -> int | None:
        """The number of classes in the rows; None if it is unknown."""
        return getattr(self.rows, "num_classes", None)

    def read(self, step: int, out: Batch | None = None) -> Batch:
        """This process's rows of the batch of a step, written into `out` if given."""
        if out is None:
            out = self._zeros(self.slots * self.share)
        group, drawn = self._drawn(step)
        for name in PARTS:
            held = getattr(group.held, name)
            if held is not None:
                np.take(held, drawn, 0, getattr(out, name), "clip")
        return out

    def row_numbers(self, step: int) -> np.ndarray:
        """The row numbers, within the data, of the entries of `read(step)`; -1 for padding."""
        group, drawn = self._drawn(step)
        return group.numbers[drawn]

    def _zeros(self, size: int) -> Batch:
        """A batch of zeros; it has counts if the rows have weights."""
        _, labels, weights, offset = self.sample
        soft = np.ndim(labels) == 2

        def zeros(like: np.ndarray, dtype: Any = self.dtype) -> np.ndarray:
            return np.zeros((size, *np.shape(like)[1:]), dtype)

        return Batch(
            np.zeros((size, self.rows.num_features), self.dtype),
            zeros(labels, self.dtype if soft else np.int32),
            np.zeros(size, self.dtype),
            None if offset is None else zeros(offset),
            None if weights is None else zeros(weights),
        )

    def _drawn(self, step: int) -> "tuple[_Group, np.ndarray]":
        """The group of a step, read into memory if necessary, and the places of the step's rows."""
        number, batch = divmod(step, self.group_steps)
        if self.group is None or self.group.number != number:
            self.group = self._load(number, None if self.group is None else self.group.held)
        return self.group, self.group.order[batch]

    def _load(self, number: int, held: Batch | None) -> "_Group":
        """Reads this process's blocks of a group into the memory of the previous group."""
        epoch, in_epoch = divmod(number, self.num_groups)
        blocks = np.random.default_rng([self.seed, epoch]).permutation(len(self.bounds) - 1)
        size = len(self.own) * int(np.diff(self.bounds).max())
        held = self._zeros(size + 1) if held is None else held
        end, numbers = 0, np.full(size + 1, -1)
        order = np.full((self.group_steps, self.slots, self.share), size, np.int32)
        for slot, place in enumerate(self.own):
            block = int(blocks[in_epoch * self.width + place])
            start, stop = self.bounds[block : block + 2].tolist()
            begin, end = end, end + stop - start
            with np.errstate(over="ignore"):  # the step detects numbers that overflow here
                self._read_into(held, begin, start, stop)
            numbers[begin:end] = np.arange(start, stop)
            n = np.arange(stop - start)
            batch = self._batch_of(n, stop - start, place)
            shuffle = np.random.default_rng([self.seed, epoch, block]).permutation
            drawn = shuffle(np.arange(begin, end, dtype=np.int32))
            order[batch, slot, n - np.searchsorted(batch, batch)] = drawn
        return _Group(number, held, numbers, order.reshape(self.group_steps, -1))

    def _read_into(self, held: Batch, begin: int, start: int, stop: int) -> None:
        """Reads rows start, ..., stop - 1 into `held`, beginning at the place `begin`."""
        features, labels, weights, offset = parts_of(BATCHES, self.rows.read(start, stop))
        places = slice(begin, begin + stop - start)
        held.features[places], held.labels[places] = features, labels
        held.weights[places] = 1 if weights is None else weights
        if held.offset is not None:
            held.offset[places] = offset
        if held.counts is not None:
            held.counts[places] = 1
        first, last = np.searchsorted(self.held_out, [start, stop])
        for part in (held.weights, held.counts):
            if last > first and part is not None:
                part[begin + self.held_out[first:last] - start] = 0

    def _batch_of(self, n: np.ndarray, size: int, place: int) -> np.ndarray:
        """The batch, within its group, that takes the n-th row drawn from a block of `size` rows.

        Batch j draws floor((j + 1) R / m + b / W) - floor(j R / m + b / W) of the R rows of block
        b. By Hermite's identity sum_b floor(x + b / W) = floor(W x), the sizes of batches differ by
        at most one row if all blocks have the same size.
        """
        w, m = self.width, self.group_steps
        # n < floor((j + 1) R / m + b / W)  <=>  (n + 1) W m - b m <= (j + 1) R W
        return np.maximum(-(-((n + 1) * w * m - place * m) // (size * w)) - 1, 0)


class _Group(NamedTuple):
    """The blocks of a group in memory."""

    number: int  # the number of the group, counted from the first epoch
    held: Batch  # the rows of all blocks in sequence, followed by one row of zeros for padding
    numbers: np.ndarray  # the numbers of these rows within the data; -1 for the row of zeros
    order: np.ndarray  # for each batch the places of its rows in `held`


class FromFunction:
    """Batches that a function of the step returns."""

    epoch_steps = 1
    num_classes = None

    def __init__(self, function: Callable[[int], Any]):
        self.function = function
        self.shapes: Batch | None = None

    @property
    def configuration(self) -> dict[str, Any]:
        """No settings: a function does not tell what determines its batches."""
        return {}

    def read(self, step: int, out: Batch | None = None) -> Batch:
        """The batch that the function returns, padded to the size of the first one."""
        if self.shapes is None and step:  # a resumed run may begin with a smaller batch
            self._given(0)
        given = self._given(step)
        shapes: Any = self.shapes
        if out is None:
            out = Batch(*(s and np.zeros(s.shape, s.dtype) for s in shapes))

        def write(part: np.ndarray, values: np.ndarray) -> None:
            part[: len(values)] = values

        with np.errstate(over="ignore"):  # the step detects numbers that overflow here
            jax.tree.map(write, out, given)
        return out

    def row_numbers(self, step: int) -> np.ndarray:
        """The places in the batch, since the rows of a function have no other numbers."""
        return np.arange(self.shapes.labels.shape[0] if self.shapes else 0)

    def _given(self, step: int) -> Batch:
        """The checked batch of a step, without padding; the first one sets the shapes."""
        features, labels, weights, offset = parts_of(TRAIN, self.function(step))
        if features.ndim != 2 or (self.shapes is None and not len(features)):
            raise ValueError(
                f"softjax.{TRAIN}: the features of batch {step} must be of shape (examples, "
                f"features), got shape {features.shape}."
            )
        dtype = computed_in(features.dtype)
        weights = np.ones(len(labels), dtype) if weights is None else weights
        given = Batch(features, labels, weights, offset)
        if self.shapes is None:
            dtypes = (dtype, dtype if labels.ndim == 2 else np.int32, dtype, dtype)
            shape = jax.ShapeDtypeStruct
            found = zip((features, labels, weights, offset), dtypes, strict=True)
            self.shapes = Batch(*(p if p is None else shape(p.shape, dtype) for p, dtype in found))
        parts, shapes = jax.tree.leaves(given), jax.tree.leaves(self.shapes)
        fits = weights.ndim == 1 and len(parts) == len(shapes)
        fits = fits and len(features) <= self.shapes.features.shape[0]
        for part, shape in zip(parts, shapes, strict=False):
            fits = fits and part.shape == (len(features), *shape.shape[1:])
        if not fits:
            found = ", ".join(str(part.shape) for part in parts)
            raise ValueError(
                f"softjax.{TRAIN}: batch {step} must be of at most {self.shapes.features.shape[0]} "
                f"rows, each of as many features as in the first batch, with as many labels, "
                f"weights and offsets, got shapes {found}."
            )
        _checks.refuse_first(TRAIN, "weights", ">= 0", weights, weights < 0)
        return given


class FromIterable(FromFunction):
    """Batches of an iterable, begun again at its end; a resumed run drops the earlier ones."""

    def __init__(self, iterable: Iterable[Any]):
        super().__init__(self._item)
        self.iterable, self.iterator = iterable, iter(iterable)
        self.position, self.last = 0, None

    def _item(self, step: int) -> Any:
        while self.position <= step:
            self.last = next(self.iterator, END)
            if self.last is END:
                self.iterator = iter(self.iterable)
                self.last = next(self.iterator, END)
            if self.last is END:
                raise ValueError(
                    f"softjax.{TRAIN}: the iterable ended after {self.position} batches and does "
                    f"not begin again, but more steps are to be taken: pass a list, a function of "
                    f"the step, or `steps`={self.position}."
                )
            self.position += 1
        return self.last


def source_of(batches: Any) -> Source:
    """The `Source` of a function, an iterable, or an object that is already a source."""
    if hasattr(batches, "read") and hasattr(batches, "row_numbers"):
        return batches
    if callable(batches):
        return FromFunction(batches)
    if isinstance(batches, Iterable) and not hasattr(batches, "shape"):
        return FromIterable(batches)
    expected = "arrays with `labels`, or `Batches`, a function of the step or an iterable"
    got = type(batches).__name__
    raise TypeError(_checks.message(TRAIN, "features", expected, got))

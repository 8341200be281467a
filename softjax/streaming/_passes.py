"""Passes over streamed rows: the objective, its gradient and other sums over all rows.

Each process reads its own part of the rows in chunks, and adds the sums of the chunks in float64.
Then the sums of all processes are added.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax import _checks, processes
from softjax.regression import _ending, _frame
from softjax.regression._descent import largest_move
from softjax.regression._features import refuse_scales
from softjax.regression._host_arrays import placed
from softjax.regression._loop import is_separated
from softjax.regression._problem import Data
from softjax.regression._steps import Batch, Transform, good_rows
from softjax.streaming._devices import ahead
from softjax.streaming._rows import Rows, parts_of, row_numbers

FIT = "streaming.fit"
# The bytes of a chunk, the bytes of the sample of rows for the preconditioner, and the number of
# contiguous runs of rows in this sample.
CHUNK_BYTES = 1 << 23
SAMPLE_BYTES = 1 << 25
RUNS = 16


class Sums(NamedTuple):
    """The results of a pass over all rows of all processes, in float64."""

    value: Any  # the objective
    gradient: Any  # the gradient of the objective, [K, D + 1]
    squares: Any  # the sum of w x^2 for each feature, and of w for the bias, [D + 1]
    separated: Any  # whether in every row the true class has the strictly largest logit
    largest: Any  # the largest |x| of each feature, after the transform, [D]
    classes: Any  # the total weight of the rows of each class, [K]

    @property
    def relative_norm(self) -> float:
        """The largest |entry| of the gradient, each relative to its largest possible value."""
        bound = np.sqrt(np.where(self.squares > 0, self.squares, 1))
        return float(np.max(np.abs(self.gradient) / bound))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """How the compiled functions see a batch; a program depends on the two static fields."""

    num_classes: int = field(metadata={"static": True})  # K
    transform: Transform = field(metadata={"static": True})  # of the features of a batch, or None
    shift: Any  # [D], subtracted from the transformed features
    constant: Any  # the factor of the bias, 1 or 0

    def features(self, batch: Batch) -> Array:
        return batch.features if self.transform is None else self.transform(batch.features)

    def data(self, batch: Batch) -> Data:
        """The data of a batch without a penalty; the sum of its targets is the mean weight."""
        features = _frame.less(self.features(batch), self.shift)
        zero = jnp.zeros((), features.dtype)
        return Data(
            num_classes=self.num_classes,
            features=features,
            labels=batch.labels,
            weights=batch.weights,
            l2=zero,
            l1=zero,
            constant=jnp.asarray(self.constant),
            offset=None if batch.offset is None else batch.offset.T,
        )


class Passes:
    """Passes over the rows of all processes; each process reads its own part."""

    def __init__(
        self,
        rows: Rows,
        num_classes: int,
        l2: float,
        constant: np.ndarray,
        transform: Transform,
        held_out: np.ndarray | None,
        dtype: np.dtype,
    ):
        self.rows, self.l2, self.dtype = rows, l2, dtype
        # No centre is subtracted from the features, unless one is found.
        shift = np.zeros(rows.num_features, dtype)
        self.centre, self.view = None, View(num_classes, transform, shift, constant)
        self.held_out = row_numbers(FIT, held_out, rows.num_rows)
        self.row_bytes = (rows.num_features + num_classes) * self.dtype.itemsize
        weights = getattr(rows, "weights", None)
        self.weight = float(rows.num_rows - len(self.held_out))
        if weights is not None:
            self.weight = float(np.sum(weights) - np.sum(weights[self.held_out]))
        self.count = 0
        # The number of the first bad row that this process has read, and its error message.
        self.bad = (rows.num_rows, "")

    def look_for_centre(self, sample: Batch) -> bool:
        """Whether features are far from 0; if so, all later passes subtract a centre from them."""
        if self.view.constant:
            self.centre = _frame.centre_of(self.view.features(sample), sample.weights)
        if self.centre is not None:
            self.view = replace(self.view, shift=self.centre)
        return self.centre is not None

    def move(self, d: np.ndarray) -> float:
        """The largest change, in nats, of a difference of two logits of a row along `d`."""
        moves = [_move(self.view, jnp.asarray(d), chunk) for chunk in self.chunks()]
        self.count += 1
        return max(map(float, processes.gather(max(map(float, moves), default=0.0))))

    def is_proven(self, theta: np.ndarray) -> bool:
        """Whether the rows are proven to be quasi-separated; False if they do not fit in memory."""
        count = self.rows.num_rows
        if count * self.row_bytes > SAMPLE_BYTES:
            return False
        data = self.view.data(placed(self._chunk(count, count, 0)))
        return bool(_ending.in_float64(_ending.quasi_separated, data, theta, np.True_))

    def at(self, theta: np.ndarray) -> Sums:
        """The objective and its gradient, from one pass."""
        on_device = placed(theta)
        width = self.rows.num_features + 1
        zero = (0.0, np.zeros((self.view.num_classes, width)), np.zeros(width), True)
        total = Sums(*zero, np.zeros(width - 1), np.zeros(self.view.num_classes))
        for chunk in self.chunks():
            total = _added(total, _sums(self.view, on_device, chunk))
        everywhere = reduce(_added, processes.gather(total))
        if not self.count:
            self._refuse(everywhere)
        self.count += 1
        kernel = theta.astype(np.float64)
        kernel[:, -1] = 0  # the bias
        return everywhere._replace(
            value=float(everywhere.value / self.weight + self.l2 / 2 * np.vdot(kernel, kernel)),
            gradient=everywhere.gradient / self.weight + self.l2 * kernel,
            squares=everywhere.squares / self.weight,
        )

    def chunks(self) -> Iterator[Batch]:
        """The rows of this process, in chunks."""
        own = own_rows(self.rows.num_rows)
        size = max(min(CHUNK_BYTES // self.row_bytes, len(own)), 1)
        starts = range(own.start, own.stop, size)

        def chunk(start: int) -> Batch:
            return placed(self._chunk(size, own.stop, start))

        with closing(ahead(chunk, starts)) as chunks:
            yield from chunks

    def sample(self) -> Batch:
        """A sample of rows: RUNS contiguous runs from all parts of the data."""
        size = max(min(SAMPLE_BYTES // self.row_bytes, self.rows.num_rows) // RUNS, 1)
        last = self.rows.num_rows - size
        starts = np.unique(np.linspace(0, last, RUNS).astype(np.int64)).tolist()
        parts = [self._chunk(size, self.rows.num_rows, start) for start in starts]
        return placed(jax.tree.map(lambda *part: np.concatenate(part), *parts))

    def _chunk(self, size: int, end: int, start: int) -> Batch:
        """`size` rows from `start` on, as NumPy arrays; rows from `end` on have weight 0."""
        stop = min(start + size, end)
        read = self.rows.read(start, stop)
        x, y, weights, offset = parts_of(FIT, read)
        weights = np.ones(len(y)) if weights is None else weights
        first, last = np.searchsorted(self.held_out, [start, stop])

        def padded(part: np.ndarray, dtype: np.dtype = self.dtype) -> np.ndarray:
            whole = np.zeros((size, *part.shape[1:]), dtype)
            whole[: stop - start] = part
            whole[self.held_out[first:last] - start] = 0
            return whole

        with np.errstate(over="ignore"):  # `_look` detects numbers that overflow here
            if y.ndim == 2:
                _checks.same_shape(FIT, "labels", y, (len(y), self.view.num_classes))
            if offset is not None:
                _checks.same_shape(FIT, "offset", offset, (len(y), self.view.num_classes))
            batch = Batch(
                padded(x),
                padded(y, self.dtype if y.ndim == 2 else np.dtype(np.int32)),
                padded(weights),
                None if offset is None else padded(offset),
            )
        if not self.count:
            self._look(start, batch, read[1])
        return batch

    def _look(self, start: int, batch: Batch, labels: Any) -> None:
        """Remembers the first bad row of a chunk, for an error after the first pass."""
        wrong = np.flatnonzero(~good_rows(np, batch, self.view.num_classes))
        if not len(wrong) or start + wrong[0] >= self.bad[0]:
            return
        row = int(wrong[0])
        x, place = batch.features, start + row
        if not np.isfinite(x[row]).all():
            column = int(np.argmin(np.isfinite(x[row])))
            got = f"{x[row, column]} at {place, column}"
            fault = _checks.message(FIT, "features", f"finite in {self.dtype}", got)
        elif batch.offset is not None and not np.isfinite(batch.offset[row]).all():
            got = f"{batch.offset[row]} at {(place,)}"
            fault = _checks.message(FIT, "offset", f"finite in {self.dtype}", got)
        else:
            expected = "finite and >= 0"
            if batch.labels.ndim == 1:
                whole = labels[row] == np.floor(labels[row])
                expected = f"{'' if whole else 'whole numbers '}in [0, {self.view.num_classes})"
            fault = _checks.message(FIT, "labels", expected, f"{labels[row]} at {(place,)}")
        self.bad = place, fault

    def _refuse(self, sums: Sums) -> None:
        """After the first pass, raises the errors that `regression.fit` would raise."""
        _, fault = min(processes.gather(self.bad))
        if fault:
            raise ValueError(fault)
        classes = np.flatnonzero(sums.classes)
        if len(classes) < 2:
            got = f"class {classes[0]} only"
            raise ValueError(_checks.message(FIT, "labels", "of two classes or more", got))
        refuse_scales(FIT, "features", sums.largest, self.dtype)


def own_rows(num_rows: int) -> range:
    """The numbers of the rows that this process reads."""
    index, count = jax.process_index(), jax.process_count()
    return range(num_rows)[num_rows * index // count : num_rows * (index + 1) // count]


def _added(total: Sums, part: Sums) -> Sums:
    sums = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), total, part)
    return sums._replace(
        separated=total.separated and bool(part.separated),
        largest=np.maximum(total.largest, np.asarray(part.largest, np.float64)),
    )


@jax.jit
def _sums(view: View, theta: Array, batch: Batch) -> Sums:
    problem = view.data(batch).problem()
    logits = problem.logits(theta)
    size = jnp.asarray(len(batch.labels), theta.dtype)
    bound, counted = problem.gradient_bound(), batch.weights[:, None] > 0
    return Sums(
        size * problem.value(theta, logits),
        size * problem.point(theta, logits).gradient,
        size * bound * bound,
        is_separated(problem.targets, problem.without_offset(logits)),
        jnp.max(jnp.where(counted, jnp.abs(view.features(batch)), 0), 0, initial=0),
        size * jnp.sum(problem.targets, 1),
    )


@jax.jit
def _move(view: View, d: Array, batch: Batch) -> Array:
    scores = view.data(batch).problem().scores(d)
    return largest_move(jnp.where(batch.weights[None] > 0, scores, 0))

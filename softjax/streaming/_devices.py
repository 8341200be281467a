"""Batches on the devices of all processes, read ahead: rows over one axis, all else on each."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softjax.streaming._batches import Batch, Source
from softjax.streaming._blocks import ROWS, Layout
from softjax.streaming._steps import State

T = TypeVar("T")
U = TypeVar("U")


class Chunk(NamedTuple):
    """The batches of steps first, ..., stop - 1, in arrays of one size for every chunk.

    Attributes:
        first: the first step.
        stop: the last, plus one.
        count: the number of steps, on the devices.
        host: the part of this process.
        batches: on the devices of all.
    """

    first: int
    stop: int
    count: Any
    host: Batch
    batches: Batch


class Devices:
    """All devices of all processes, along one axis, for batches of `rows` rows a process."""

    def __init__(self, rows: int, num_classes: int) -> None:
        mesh, processes = Mesh(np.array(jax.devices()), (ROWS,)), jax.process_count()
        layout = Layout(mesh, processes, of_classes=False)
        rows_of_all = layout.blocks * -(-rows // layout.of_process)
        self.layout = layout._replace(of_classes=num_classes > rows_of_all)
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.rows = NamedSharding(mesh, PartitionSpec(ROWS))
        self.rows_of_steps = NamedSharding(mesh, PartitionSpec(None, ROWS))

    def replicated(self, tree: T) -> T:
        """The same arrays on every device."""

        def put(x: Any) -> Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, self.everywhere, lambda index: x[index])

        return jax.tree.map(put, tree)

    def forgotten(self, state: State) -> State:
        """The state with nothing summed."""
        zeros = {name: np.zeros_like(getattr(state, name)) for name in ("total", "taken")}
        return state._replace(**self.replicated(zeros))

    def flag(self, raised: bool) -> Array:
        """Whether a flag is raised, by process."""
        raised_here = np.full(self.layout.mesh.local_mesh.size, raised, np.int32)
        return jax.make_array_from_process_local_data(self.rows, raised_here)

    def chunk(self, source: Source, like: Batch, size: int, span: tuple[int, int]) -> Chunk:
        """Reads the batches of the steps of `span`, of the shape `like`, onto the devices."""
        first, stop = span
        rows = len(like.labels)
        of_block = -(-rows // self.layout.of_process)
        padded = of_block * self.layout.of_device * self.layout.mesh.local_mesh.size
        host = Batch(*(np.zeros((size, padded, *p.shape[1:]), p.dtype) for p in like))
        for place in range(stop - first):
            source.read(first + place, Batch(*(part[place, :rows] for part in host)))
        count = self.replicated(np.int32(stop - first))
        return Chunk(first, stop, count, host, Batch(*map(self._sharded, host)))

    def _sharded(self, part: np.ndarray) -> Array:
        shape = (len(part), part.shape[1] * jax.process_count(), *part.shape[2:])
        return jax.make_array_from_process_local_data(self.rows_of_steps, part, shape)


def ahead(function: Callable[[T], U], arguments: Iterable[T], depth: int = 2) -> Generator[U]:
    """function(a) for every argument in order, up to `depth` of them before they are asked for.

    One thread does it, so that `function` may keep a state. What it raises is raised here.
    """
    remaining = iter(arguments)
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(function, a) for a in islice(remaining, depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, a) for a in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)

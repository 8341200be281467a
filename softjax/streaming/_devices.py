"""Batches on the devices of all processes: rows are sharded, everything else is replicated."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softjax._descriptions import is_random_key
from softjax.regression._steps import Batch, Held, Stacked
from softjax.streaming._batches import PARTS, Source
from softjax.streaming._reproducible_sums import ROWS, ReproducibleSums

T = TypeVar("T")
U = TypeVar("U")


class Chunk(NamedTuple):
    """The batches of the steps first, ..., stop - 1, in arrays of one size for all chunks."""

    first: int  # the number of the first step
    count: Any  # the number of steps, on the devices
    feed: Held | Stacked  # the batches, on the devices
    # The batches of this process in its memory; None for arrays, which are not read.
    host: Batch | None


class Devices:
    """All devices of all processes on one mesh axis; a process reads `rows` rows per batch."""

    def __init__(self, rows: int, num_classes: int) -> None:
        mesh, processes = Mesh(np.array(jax.devices()), (ROWS,)), jax.process_count()
        sums = ReproducibleSums(mesh, processes, of_classes=False)
        rows_of_all = sums.blocks * -(-rows // sums.of_process)
        self.sums = sums._replace(of_classes=num_classes > rows_of_all)
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.rows = NamedSharding(mesh, PartitionSpec(ROWS))
        self.rows_of_steps = NamedSharding(mesh, PartitionSpec(None, ROWS))

    def placed(self, tree: T) -> T:
        """The arrays of a tree, replicated on every device."""

        def put(x: Any) -> Array:
            if is_random_key(x):  # NumPy has no such dtype
                return jax.random.wrap_key_data(
                    put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
                )
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, self.everywhere, lambda index: x[index])

        return jax.tree.map(put, tree)

    def flag(self, raised: bool) -> Array:
        """Whether this process raises its flag, as an array over all devices."""
        raised_here = np.full(self.sums.mesh.local_mesh.size, raised, np.int32)
        return jax.make_array_from_process_local_data(self.rows, raised_here)

    def chunk(self, source: Source, like: Batch, size: int, span: tuple[int, int]) -> Chunk:
        """Reads the batches of the steps in `span`, with the shapes of `like`, onto the devices."""
        first, stop = span
        rows = len(like.labels)
        of_block = -(-rows // self.sums.of_process)
        padded = of_block * self.sums.of_device * self.sums.mesh.local_mesh.size
        host = jax.tree.map(lambda p: np.zeros((size, padded, *p.shape[1:]), p.dtype), like)
        for place in range(stop - first):
            out = (getattr(host, name) for name in PARTS)
            out = (None if part is None else part[place, :rows] for part in out)
            source.read(first + place, Batch(*out))
        count = self.placed(np.int32(stop - first))
        return Chunk(first, count, Stacked(jax.tree.map(self._sharded, host)), host)

    def _sharded(self, part: np.ndarray) -> Array:
        shape = (len(part), part.shape[1] * jax.process_count(), *part.shape[2:])
        return jax.make_array_from_process_local_data(self.rows_of_steps, part, shape)


def ahead(function: Callable[[T], U], arguments: Iterable[T], depth: int = 2) -> Generator[U]:
    """function(a) for every argument in order, by one thread, up to `depth` results in advance."""
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

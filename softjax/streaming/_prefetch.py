"""Work that is done ahead, in a thread of its own."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


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

"""How a function is measured: compiled ahead of time, checked against float64, timed in pairs."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

# The largest error that still counts as the same result, over the largest entry of the reference.
# In float32 the rounding of x - max alone is 1e-6 relative where the logits span 20; a wrong label,
# axis or mean is an error of order 1.
TOLERANCE = 1e-5

# One sample repeats a short function until it takes this long, far above the clock's resolution.
SAMPLE_SECONDS = 5e-3


@dataclass(frozen=True)
class Compiled:
    """A compiled function with its arguments bound, and what compiling it cost."""

    call: Callable[[], Any]
    lower_seconds: float
    compile_seconds: float
    temporary_bytes: int | None

    def seconds(self, repeats: int) -> float:
        """The time of one call, the mean over some repeats, each waited for."""
        start = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(self.call())
        return (time.perf_counter() - start) / repeats


@dataclass(frozen=True)
class Estimate:
    """A median with an interval that holds the true one with 95 % confidence."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Pairs:
    """Two functions timed alternately; `ratio` is the median of the ratios within the pairs."""

    first: Estimate
    second: Estimate
    ratio: Estimate
    count: int


def compile_ahead(function: Callable, *arguments: jax.Array | jax.ShapeDtypeStruct) -> Compiled:
    """Lower and compile a function for its arguments, each timed by itself."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    lowered_at = time.perf_counter()
    executable = lowered.compile()
    compiled_at = time.perf_counter()
    memory = executable.memory_analysis()
    return Compiled(
        call=lambda: executable(*arguments),
        lower_seconds=lowered_at - start,
        compile_seconds=compiled_at - lowered_at,
        temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def error(results: Any, references: Sequence[np.ndarray]) -> float:
    """The largest error of any result over the largest entry of its reference; NaN where one is."""
    relative = [
        np.abs(np.subtract(result, expected, dtype=np.float64)).max() / np.abs(expected).max()
        for result, expected in zip(jax.tree.leaves(results), references, strict=True)
    ]
    return float(np.max(relative))


def time_in_pairs(first: Compiled, second: Compiled, pairs: int) -> Pairs:
    """Time two functions alternately, the order swapped from pair to pair.

    What disturbs the machine for longer than one pair reaches both, so it leaves the ratio alone.
    """
    repeats = [_repeats(compiled) for compiled in (first, second)]
    samples = []
    for pair in range(pairs):
        if pair % 2:
            time_second = second.seconds(repeats[1])
            time_first = first.seconds(repeats[0])
        else:
            time_first = first.seconds(repeats[0])
            time_second = second.seconds(repeats[1])
        samples.append((time_first, time_second))
    return Pairs(
        first=estimate([a for a, _ in samples]),
        second=estimate([b for _, b in samples]),
        ratio=estimate([a / b for a, b in samples]),
        count=pairs,
    )


def estimate(samples: Sequence[float]) -> Estimate:
    """The median and its 95 % interval, which needs no assumption on the distribution.

    The k-th smallest and the k-th largest of n samples enclose the true median unless fewer than k
    fall on one side: 1 - 2 P(Binomial(n, 1/2) < k). With fewer than six samples they are the
    extremes and the confidence is lower.
    """
    ordered = sorted(samples)
    n = len(ordered)
    k, outside = 1, 2 * 0.5**n
    while (outside := outside + 2 * math.comb(n, k) * 0.5**n) <= 0.05:
        k += 1
    return Estimate(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def _repeats(compiled: Compiled) -> int:
    """Calls to a sample; the first, slower call is the warm-up."""
    compiled.seconds(1)
    return math.ceil(SAMPLE_SECONDS / compiled.seconds(1))

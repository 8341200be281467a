"""Measures a function: compiled ahead of time, checked against float64, timed in pairs."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import ROOT
from benchmarks.results import INTERVAL, RATIO, Row

# The largest error of a correct result, relative to the largest entry of the reference. In float32
# the rounding of x - max alone is 1e-6 relative if the logits span 20. A result in half precision
# is rounded, and a peer may round intermediate results: four units in the last place of 1. A wrong
# label, axis or mean causes an error of order 1.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2**-5, "float16": 2**-8}

# The number of pairs in a full run and in a quick one. A case stops after fewer pairs if each takes
# this long on average; the extremes of six samples enclose the median with 95 % confidence.
PAIRS, QUICK_PAIRS, FEWEST_PAIRS = 41, 9, 6
PAIR_SECONDS = 0.5

# A sample repeats a short function for this time, which is far above the clock's resolution.
SAMPLE_SECONDS = 5e-3


@dataclass(frozen=True)
class Compiled:
    """A compiled function with its arguments bound, and the cost of compiling it.

    `call` takes the buffers that it donates, which `fresh` makes; without donation there are none.
    `fetch` converts its results to NumPy arrays. Values that a package does not provide are None.
    """

    call: Callable[..., Any]
    lower_seconds: float | None = None
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    fresh: Callable[[], tuple] = tuple
    fetch: Callable[[Any], Any] = jax.device_get

    def results(self) -> Any:
        """The results of one call as NumPy arrays."""
        return self.fetch(self.call(*self.fresh()))

    def seconds(self, repeats: int) -> float:
        """The time of one call, the mean over some repeats, each of which is waited for."""
        donated = jax.block_until_ready([self.fresh() for _ in range(repeats)])
        start = time.perf_counter()
        for buffers in donated:
            jax.block_until_ready(self.call(*buffers))
        return (time.perf_counter() - start) / repeats

    def costs(self) -> dict[str, float | None]:
        """All costs except the times of the calls, as fields of a record."""
        return {
            "lower_seconds": self.lower_seconds,
            "compile_seconds": self.compile_seconds,
            "temporary_bytes": self.temporary_bytes,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Estimate:
    """A median with an interval that contains the true median with 95 % confidence."""

    median: float
    low: float
    high: float

    def fields(self, names: Sequence[str]) -> Row:
        """The median and the interval as fields of a row."""
        return dict(zip(names, (self.median, self.low, self.high), strict=True))


@dataclass(frozen=True)
class Side:
    """An implementation in a case, and the error of its result."""

    name: str
    compiled: Compiled
    error: float
    tolerance: float
    version: str | None = None

    def row(self) -> Row:
        """All fields of the row except the times."""
        wrong = not self.error <= self.tolerance
        named = {"side": self.name, "version": self.version, "error": self.error, "wrong": wrong}
        return named | self.compiled.costs()


def beside(head: Row, ours: Side, theirs: Side, pairs: int) -> tuple[Row, Row]:
    """The rows of softjax and of a peer, which are timed in pairs unless one of them is wrong."""
    first, second = (head | side.row() for side in (ours, theirs))
    if not (first["wrong"] or second["wrong"]):
        mine, other = paired(*time_in_pairs(ours.compiled, theirs.compiled, pairs))
        first, second = first | mine, second | other
    return first, second


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[Row, Row]:
    """The fields of the times of softjax and of a peer, which were measured in pairs."""
    ratio = estimate([a / b for a, b in zip(ours, theirs, strict=True)])
    mine, other = (estimate(samples).fields(INTERVAL) for samples in (ours, theirs))
    return mine, other | ratio.fields(RATIO) | {"pairs": len(ours)}


def compile_ahead(function: Callable, *arguments: Any, donate: bool = False) -> Compiled:
    """Lowers and compiles a function for its arguments, and times both steps.

    If only shapes and dtypes are given, the result cannot be called. With `donate` the result may
    overwrite the first argument, and each call gets a copy of it.

    Raises:
        OutOfMemory: on a CPU, if a call would need more memory than is free. The system would end
            the process, with all that it has measured, before an allocation fails.
    """
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=0 if donate else ()).lower(*arguments)
    lowered_at = time.perf_counter()
    executable = lowered.compile()
    compiled_at = time.perf_counter()
    memory = executable.memory_analysis()
    concrete = all(isinstance(argument, jax.Array) for argument in arguments)
    if memory is not None and concrete and jax.default_backend() == "cpu":
        _check_free(memory.temp_size_in_bytes + memory.output_size_in_bytes)
    return Compiled(
        call=lambda *donated: executable(*donated, *arguments[len(donated) :]),
        lower_seconds=lowered_at - start,
        compile_seconds=compiled_at - lowered_at,
        temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
        peak_bytes=getattr(memory, "peak_memory_in_bytes", None),
        fresh=(lambda: (jnp.copy(arguments[0]),)) if donate else tuple,
    )


def error(results: Any, references: Sequence[np.ndarray]) -> float:
    """The largest error of any result, relative to its reference's largest entry; may be NaN."""
    relative = [
        np.abs(np.subtract(result, expected, dtype=np.float64)).max() / np.abs(expected).max()
        for result, expected in zip(jax.tree.leaves(results), references, strict=True)
    ]
    return float(np.max(relative))


class OutOfMemory(MemoryError):
    """A call would need more memory than is free."""


def bytes_asked(error: Exception) -> int | None:
    """The bytes of a failed allocation, 0 if unknown; None for another kind of error."""
    text = str(error)
    if not isinstance(error, MemoryError) and not re.search(
        "RESOURCE_EXHAUSTED|out of memory", text
    ):
        return None
    size = re.search(r"(\d[\d.]*) ?(bytes|[KMGTPE]i?B)", text)
    if size is None:
        return 0
    power = " KMGTPE".index(size[2][0]) if size[2] != "bytes" else 0
    return round(float(size[1]) * 1024**power)


def failure(suite: str, name: str, error: Exception) -> Row:
    """The record of a case that raised; `bytes` is the size of a failed allocation."""
    asked = bytes_asked(error)
    return {
        "record": "failure",
        "suite": suite,
        "case": name,
        "kind": "error" if asked is None else "out of memory",
        "bytes": asked,
        "error": f"{type(error).__name__}: {error}"[:1000],
        "traceback": "".join(traceback.format_tb(error.__traceback__)[-3:]),
    }


def device_peak_bytes() -> int | None:
    """The peak memory of the device since the process began, if the device reports it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def time_in_pairs(first: Compiled, second: Compiled, pairs: int) -> Sequence[list[float]]:
    """The times of two functions that alternate; the order is swapped from pair to pair.

    A disturbance that lasts longer than one pair affects both functions, and so does not change the
    ratio.
    """
    repeats = [_repeats(compiled) for compiled in (first, second)]
    samples = []
    end = time.perf_counter() + PAIR_SECONDS * pairs
    for pair in range(pairs):
        if pair >= FEWEST_PAIRS and time.perf_counter() > end:
            break
        if pair % 2:
            time_second = second.seconds(repeats[1])
            time_first = first.seconds(repeats[0])
        else:
            time_first = first.seconds(repeats[0])
            time_second = second.seconds(repeats[1])
        samples.append((time_first, time_second))
    return [a for a, _ in samples], [b for _, b in samples]


def estimate(samples: Sequence[float]) -> Estimate:
    """The median and its 95 % interval, which makes no assumption on the distribution.

    The k-th smallest and the k-th largest of n samples enclose the true median unless fewer than k
    fall on one side: 1 - 2 P(Binomial(n, 1/2) < k). With fewer than six samples they are the
    extremes, and the confidence is lower.
    """
    ordered = sorted(samples)
    n = len(ordered)
    k, outside = 1, 2 * 0.5**n
    while (outside := outside + 2 * math.comb(n, k) * 0.5**n) <= 0.05:
        k += 1
    return Estimate(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def process_times(command: Sequence[str], environment: Mapping[str, str] = {}) -> tuple:
    """The CPU and the wall time of a process, from its start to its end."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, env={**os.environ, **environment})
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"benchmarks: a process must end with 0, got {child.returncode}.")
    return usage.ru_utime + usage.ru_stime, wall


def elsewhere(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] = {}
) -> Any:
    """The result of a function in a new process; arguments and result are converted to JSON."""
    program = (
        f"import json, sys; from {function.__module__} import {function.__name__} as function; "
        "print(json.dumps(function(*json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks: {function.__name__} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def peak_bytes() -> int:
    """The peak memory of this process (the value of `resource` includes its parent's)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _repeats(compiled: Compiled) -> int:
    """The number of calls in a sample; the first, slower call is the warm-up."""
    compiled.seconds(1)
    return math.ceil(SAMPLE_SECONDS / compiled.seconds(1))


def _check_free(needed: int) -> None:
    """Raises if the free memory, which Linux reports in a file, is too small."""
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.exists() else ""
    free = re.search(r"MemAvailable: *(\d+) kB", text)
    if free is not None and needed > 1024 * int(free[1]):
        raise OutOfMemory(f"{needed} bytes asked for, {1024 * int(free[1])} free")

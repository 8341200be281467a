"""What `import softjax` adds to `import jax, optax`: CPU seconds of whole processes, in pairs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import measure
from benchmarks.environment import version

PEER = "import jax, optax"
OURS = f"{PEER}, softjax"
# Each process takes a second.
MOST_PAIRS = 15


@dataclass(frozen=True)
class Case:
    """The import, and the asked ratio: a tenth more than JAX and optax take by themselves."""

    name: str = "import/process"
    bound: float = 1.1
    quick: bool = True


def run(case: Case, pairs: int) -> Iterator[dict[str, Any]]:
    """The CPU time of processes that import and end, alternately with softjax and without."""
    count = min(pairs, MOST_PAIRS)
    cpu_seconds(OURS)
    samples = [(cpu_seconds(OURS), cpu_seconds(PEER)) for _ in range(count)]
    ours, theirs = zip(*samples, strict=True)
    ratio = measure.estimate([a / b for a, b in samples])
    unknown = dict.fromkeys(("temporary_bytes", "lower_seconds", "compile_seconds"))
    yield {
        "record": "result",
        "suite": "core",
        "case": case.name,
        "operation": "import",
        "mode": "process",
        "shape": {"name": "process", "examples": 0, "classes": 0, "origin": "no logits"},
        "dtype": "float32",
        "bound": case.bound,
        "logits_bytes": 0,
        "softjax": {
            "name": "softjax",
            "version": version("softjax-regression"),
            "correct": True,
            "seconds": asdict(measure.estimate(ours)),
            **unknown,
        },
        "peer": {
            "name": "jax and optax",
            "version": version("jax"),
            "correct": True,
            "seconds": asdict(measure.estimate(theirs)),
            **unknown,
        },
        "added_seconds": asdict(measure.estimate([a - b for a, b in samples])),
        "pairs": count,
        "ratio": asdict(ratio),
        "wrong": False,
        "met": ratio.median <= case.bound,
    }


def cpu_seconds(program: str) -> float:
    """The user and system time of a process that runs a line of Python."""
    child = subprocess.Popen([sys.executable, "-c", program])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"benchmarks: `{program}` must end with 0, got {child.returncode}.")
    return usage.ru_utime + usage.ru_stime

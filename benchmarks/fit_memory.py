"""The memory of fits, in a process of its own: its peak above Python, packages and data.

Of the first fit, with features of NumPy, in which what a package does once is contained: XLA's
compilation, the copy on the device. And of the next, with the features where the package has them:
NumPy's for scikit-learn, on the device for softjax.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.environment import ROOT

# What is freed goes back to the kernel, so that a peak is of what is held.
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


class Peaks(NamedTuple):
    """Bytes: of the first fit, and of the next."""

    first: int
    next: int


def peaks(name: str, x: np.ndarray, y: np.ndarray, l2: float, tol: float) -> Peaks:
    """Of fits by the solver of this name in the suite `fit`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        np.savez(path, x=x, y=y)
        command = [sys.executable, "-m", "benchmarks.fit_memory", name, path, repr(l2), repr(tol)]
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            check=True,
            cwd=ROOT,
            env=os.environ | FREED,
        )
    return Peaks(*json.loads(done.stdout))


def measure(name: str, path: Path, l2: float, tol: float) -> Peaks:
    """In the child."""
    import jax
    from threadpoolctl import threadpool_limits

    from benchmarks import fit
    from benchmarks.stream import peak_bytes

    def peak_of(x: Any) -> int:
        solve = fit.solver_of(name, x, y, l2)
        time.sleep(1)  # what held the fit before lets go of it after its result is there
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        before = peak_bytes()
        solve(tol)
        return peak_bytes() - before

    jax.config.update("jax_enable_x64", True)
    with threadpool_limits(1):
        jax.block_until_ready(jax.device_put(np.zeros(8)) + 1)  # starts the backend
        with np.load(path) as data:
            x, y = data["x"], data["y"]
        where_it_is = jax.device_put(x) if name.startswith("softjax") else x
        return Peaks(peak_of(x), peak_of(jax.block_until_ready(where_it_is)))


if __name__ == "__main__":
    name, path, l2, tol = sys.argv[1:]
    print(json.dumps(measure(name, Path(path), float(l2), float(tol))))

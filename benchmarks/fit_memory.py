"""The memory of one fit, in a process of its own: its peak above Python, packages and data.

What compiling a program takes is in it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.environment import ROOT


def peak_bytes(name: str, x: np.ndarray, y: np.ndarray, l2: float, tol: float) -> int:
    """Of a fit by the solver of this name in the suite `fit`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        np.savez(path, x=x, y=y)
        command = [sys.executable, "-m", "benchmarks.fit_memory", name, path, repr(l2), repr(tol)]
        done = subprocess.run(list(map(str, command)), capture_output=True, check=True, cwd=ROOT)
    return int(done.stdout)


def measure(name: str, path: Path, l2: float, tol: float) -> int:
    """In the child."""
    import jax
    from threadpoolctl import threadpool_limits

    from benchmarks import fit
    from benchmarks.stream import peak_bytes

    jax.config.update("jax_enable_x64", True)
    with threadpool_limits(1):
        jax.block_until_ready(jax.device_put(np.zeros(8)) + 1)  # starts the backend
        with np.load(path) as data:
            x, y = data["x"], data["y"]
        solve = fit.solver_of(name, x, y, l2)
        before = peak_bytes()
        solve(tol)
        return peak_bytes() - before


if __name__ == "__main__":
    name, path, l2, tol = sys.argv[1:]
    print(measure(name, Path(path), float(l2), float(tol)))

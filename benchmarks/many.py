"""Many fits of softmax regression in one call beside as many fits of scikit-learn.

Each solver first finds its loosest tolerance at which every one of the fits comes near enough to
its best optimum known; then whole runs are timed in turn, softjax and the fastest peer, in an order
that alternates. Clocks and threads are those of the suite `fit`.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import fit

Record = dict[str, Any]
REPEATS = 7
SUBOPTIMALITY = 1e-8
RESAMPLES = 100
FOLDS = 5
# scikit-learn's own grid, of which 10 is its own number.
INVERSE_PENALTIES = np.logspace(-4, 4, 10)


@dataclass(frozen=True)
class Lanes:
    """Fits of the same data, which differ in the weights of the rows [B, N] and in l2 [B]."""

    x: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    l2: np.ndarray


@dataclass(frozen=True)
class Task:
    """The lanes, and how they are fitted: functions of a tolerance to theta [B, D + 1, K]."""

    lanes: Lanes
    softjax: Callable[[float], np.ndarray]
    peer: Callable[[str, float], np.ndarray]


@dataclass(frozen=True)
class Case:
    """A task and what is asked: the time of softjax over that of the fastest peer."""

    name: str
    task: Callable[[], Task]
    bound: float
    peers: tuple[str, ...] = fit.PEERS
    short: bool = False


def bootstrap() -> Task:
    """100 resamples of the digits, by `bootstrap` and by a fit for each with its counts."""
    from sklearn.linear_model import LogisticRegression

    from softjax import regression
    from softjax.regression._resampling import resample_counts

    x, y = fit.digits()
    l2 = 1 / len(y)
    draw = jax.vmap(partial(resample_counts, jax.random.key(0), num_examples=len(y)))
    weights = np.asarray(draw(jnp.arange(RESAMPLES, dtype=jnp.int32)), np.float64)

    def softjax(tol: float) -> np.ndarray:
        result = regression.bootstrap(x, y, resamples=RESAMPLES, l2=l2, tol=tol)
        return _theta(result.resamples.params)

    def peer(solver: str, tol: float) -> np.ndarray:
        found = []
        for counts in weights:
            model = LogisticRegression(solver=solver, tol=tol, max_iter=10_000)
            model.fit(x, y, sample_weight=counts)
            coefficients, intercept = np.asarray(model.coef_), np.asarray(model.intercept_)
            found.append(np.concatenate([coefficients.T, intercept[None]]))
        return np.stack(found)

    return Task(Lanes(x, y, weights, np.full(RESAMPLES, l2)), softjax, peer)


def path() -> Task:
    """10 penalties and 5 folds of the digits, by `fit_path` and by `LogisticRegressionCV`.

    Without the last two images, so that the folds are of one size and C is one l2 in all of them.
    """
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import PredefinedSplit, StratifiedKFold

    from softjax import regression

    x, y = (part[:-2] for part in fit.digits())
    l2 = FOLDS / (FOLDS - 1) / len(y) / INVERSE_PENALTIES
    folds = np.empty(len(y), int)
    split = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    for fold, (_, held_out) in enumerate(split.split(x, y)):
        folds[held_out] = fold
    kept = folds != np.arange(FOLDS)[:, None]
    lanes = Lanes(x, y, np.tile(kept, (len(l2), 1)).astype(float), np.repeat(l2, FOLDS))

    def softjax(tol: float) -> np.ndarray:
        result = jax.block_until_ready(regression.fit_path(x, y, l2=l2, folds=folds, tol=tol))
        theta = _theta(result.cross_validation.fits.params)
        return theta.reshape(-1, *theta.shape[2:])

    def peer(solver: str, tol: float) -> np.ndarray:
        model = LogisticRegressionCV(
            Cs=INVERSE_PENALTIES,  # pyright: ignore[reportArgumentType]
            cv=PredefinedSplit(folds),
            solver=solver,
            tol=tol,
            max_iter=10_000,
            scoring="neg_log_loss",
        )
        model.fit(x, y)
        classes: Any = model.coefs_paths_
        paths = np.stack([classes[name] for name in sorted(classes)], -1)  # [F, P, D + 1, K]
        return paths.swapaxes(0, 1).reshape(-1, *paths.shape[2:])

    return Task(lanes, softjax, peer)


summary = fit.summary
results_tables = partial(fit.results_tables, title="Many fits in one call")
CASES = (Case("digits-bootstrap", bootstrap, 0.2), Case("digits-path", path, 0.5))


def run(case: Case, pairs: int) -> Iterator[Record]:
    """A record of each solver's tolerance, suboptimality and times, and the ratio of the times."""
    with fit.precise_and_alone():
        yield _run_case(case, min(pairs, REPEATS))


def _run_case(case: Case, repeats: int) -> Record:
    task = case.task()
    best = _objectives(task.softjax(1e-11), task.lanes)
    ours = fit.Solver("softjax", task.softjax)
    peers = [fit.Solver(f"scikit-learn {name}", partial(task.peer, name)) for name in case.peers]

    def worst(theta: np.ndarray) -> float:
        return float(np.max((_objectives(theta, task.lanes) - best) / best))

    ours_found, *found = (
        fit.find_tolerance(solver, SUBOPTIMALITY, worst) for solver in (ours, *peers)
    )
    able = [(cpu, peer) for cpu, peer in zip(found, peers, strict=True) if cpu is not None]
    _, fastest = min(able, key=lambda entry: entry[0], default=(None, None))
    pair = [ours] if ours_found is not None else []
    if fastest is not None:
        pair.append(fastest)
    for solver in fit.in_turn(pair, repeats):
        solver.times.append(fit.timed(solver.fit, solver.tol or 0.0)[0])
    ratios = [] if fastest is None else zip(ours.times, fastest.times, strict=False)
    ratios = [a / b for (a, _), (b, _) in ratios]
    return {
        "record": "result",
        "suite": "many",
        "wrong": False,
        "case": case.name,
        "dtype": "float64",
        "shape": (*task.lanes.x.shape, len(np.unique(task.lanes.y))),
        "fits": len(task.lanes.l2),
        "asked_suboptimality": SUBOPTIMALITY,
        "bound": case.bound,
        "repeats": repeats,
        "solvers": [fit.solver_record(solver) for solver in (ours, *peers)],
        "ratio": statistics.median(ratios) if ratios else None,
    }


def _theta(params: Any) -> np.ndarray:
    kernel, bias = map(np.asarray, params)
    return np.concatenate([kernel, bias[..., None, :]], -2)


def _objectives(theta: np.ndarray, lanes: Lanes) -> np.ndarray:
    """Of each lane."""
    own = zip(theta, lanes.weights, lanes.l2, strict=True)
    return np.array([fit.objective(t, lanes.x, lanes.y, l2, weights) for t, weights, l2 in own])

"""The suite `inference`: statistics of a multinomial logit model, compared with statsmodels.

In the fit without a penalty both must reach the same objective; statsmodels has K - 1 columns of
parameters. Average marginal effects and their standard errors must be equal. All computations are
in float64, with one thread for the peer; `fits.py` explains how to limit the threads of XLA.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import fit_tasks, fits, measure
from benchmarks.peers import STATSMODELS
from benchmarks.results import Row

# The largest error of a correct result: of an objective relative to the better of the two, and of
# effects relative to the largest, which follows from the tolerance of two fits and the condition of
# H.
TOLERANCES = {"fit": 1e-8, "marginal-effects": 1e-6}
# The tolerance of both fits; for smaller values statsmodels takes one more step or none.
TOL = 1e-8

Pair = tuple[Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """Examples [N], features [D] and classes [K], and the largest allowed ratio of the times."""

    task: str
    shape: tuple[int, int, int]
    bound: float | None = None
    quick: bool = True

    @property
    def name(self) -> str:
        """The case in one word, such as `fit/2000x10x4`."""
        return f"{self.task}/{'x'.join(map(str, self.shape))}"

    def run(self, pairs: int) -> Iterator[Row]:
        """A row for softjax and one for statsmodels; nothing if statsmodels is absent."""
        if STATSMODELS.absence:
            return
        with fits.precise_and_alone():
            tasks = {"fit": _fits, "marginal-effects": _effects}
            both, errors = tasks[self.task](*_data(*self.shape))
            names = ("softjax", None), (STATSMODELS.name, STATSMODELS.version)
            tolerance = TOLERANCES[self.task]
            found = errors(*(call() for call in both))
            ours, theirs = (
                measure.Side(name, measure.Compiled(call), error, tolerance, version)
                for (name, version), call, error in zip(names, both, found, strict=True)
            )
            head = {"shape": self.shape, "dtype": "float64"}
            first, second = measure.beside(head, ours, theirs, pairs)
            if self.bound is not None:
                second["checks"] = {"time": [second.get("ratio"), self.bound]}
            yield from (first, second)


CASES = (
    Case("fit", (2000, 10, 4)),
    Case("fit", (20_000, 20, 5), quick=False),
    # The bound is one second; statsmodels takes 14.7.
    Case("marginal-effects", (20_000, 20, 5), bound=1 / 14.7, quick=False),
)


def _fits(x: np.ndarray, y: np.ndarray) -> tuple[Pair, Callable]:
    from softjax import regression

    def errors(ours: Any, theirs: Any) -> tuple[float, float]:
        reference = np.zeros((x.shape[1] + 1, 1))  # the reference class of statsmodels
        both = fit_tasks.joined(ours.params), np.hstack([reference, theirs.params])
        reached = [fit_tasks.objective(theta, x, y, 0.0) for theta in both]
        own, other = (value / min(reached) - 1 for value in reached)
        return own, other

    model = _mnlogit(x, y)
    return (lambda: regression.fit(x, y, tol=TOL), lambda: _solved(model)), errors


def _effects(x: np.ndarray, y: np.ndarray) -> tuple[Pair, Callable]:
    """Our time includes the covariance of the parameters, which statsmodels computes in its fit."""
    from softjax import regression
    from softjax.regression import inference

    params, fitted = regression.fit(x, y, tol=TOL).params, _solved(_mnlogit(x, y))

    def ours() -> Any:
        covariance = inference.covariance(params, x, y)
        return inference.average_marginal_effects(params, covariance, x)

    def errors(ours: Any, theirs: Any) -> tuple[float, float]:
        error = measure.error(
            [ours.value, ours.standard_error], [theirs.margeff, theirs.margeff_se]
        )
        return error, error

    return (ours, fitted.get_margeff), errors


def _mnlogit(x: np.ndarray, y: np.ndarray) -> Any:
    import statsmodels.api

    return statsmodels.api.MNLogit(y, np.column_stack([x, np.ones(len(x))]))


def _solved(model: Any) -> Any:
    return model.fit(method="newton", tol=TOL, maxiter=100, disp=False)


def _data(examples: int, features: int, classes: int) -> fit_tasks.Arrays:
    """Labels with the probabilities of a logit; the classes overlap, so that an optimum exists."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, features))
    logits = x @ rng.normal(size=(features, classes)) / np.sqrt(features)
    return x, fit_tasks.draw(logits, rng)

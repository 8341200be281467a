"""The suite `inference`: what a statistician asks of a multinomial logit, beside statsmodels.

A fit without a penalty, where both must reach the same objective, in statsmodels with K - 1 columns
of parameters; and average marginal effects with their standard errors, where both must return the
same. In float64, the peer's threads pinned to one; for those of XLA see the suite `fit`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from benchmarks import fit, measure
from benchmarks.peers import STATSMODELS

# The largest error that counts as the same result: of the objective relative to the better of the
# two; of effects over the largest, from the tolerance of two fits and the condition of H.
TOLERANCES = {"fit": 1e-8, "marginal-effects": 1e-6}
# Of both fits; below it statsmodels makes one step more or none.
TOL = 1e-8

Record = dict[str, Any]
Pair = tuple[Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """A task on examples [N], features [D] and classes [K]; the asked ratio of the times."""

    task: str
    shape: tuple[int, int, int]
    bound: float | None = None
    quick: bool = True

    @property
    def name(self) -> str:
        """The case in one word, such as `inference/fit/2000x10x4`."""
        return f"inference/{self.task}/{'x'.join(map(str, self.shape))}"


CASES = (
    Case("fit", (2000, 10, 4)),
    Case("fit", (20_000, 20, 5), quick=False),
    # Asked is under a second where statsmodels takes 14.7.
    Case("marginal-effects", (20_000, 20, 5), bound=1 / 14.7, quick=False),
)


def run(case: Case, pairs: int) -> Iterator[Record]:
    """A record of both times and errors; nothing where statsmodels is absent."""
    if STATSMODELS.absence:
        return
    with fit.precise_and_alone():
        yield _run_case(case, pairs)


def results_tables(records: Sequence[Record]) -> list[Table]:
    """One row a case."""
    table = Table(title="Beside statsmodels", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("task", "shape", "time, ms", "ratio (95 %)", "asked", "errors"):
        table.add_column(column, no_wrap=True)
    for record in records:
        both = record["softjax"], record["peer"]
        times, ratio = "", "[red]wrong[/]"
        if not record["wrong"]:
            times = " / ".join(f"{1e3 * side['seconds']['median']:.3g}" for side in both)
            ratio = "{median:.3f} ({low:.3f}, {high:.3f})".format(**record["ratio"])
        asked = "" if record["bound"] is None else f"<= {record['bound']:.3f}"
        errors = " / ".join(f"{side['error']:.1e}" for side in both)
        table.add_row(record["task"], str(tuple(record["shape"])), times, ratio, asked, errors)
    return [table]


def summary(records: Sequence[Record]) -> str:
    """One line: how many results are the same, and how many bounds are met."""
    same = sum(not record["wrong"] for record in records)
    met = sum(record.get("met", False) for record in records)
    return f"inference: {same} of {len(records)} results the same, {met} within the asked bound"


def _run_case(case: Case, pairs: int) -> Record:
    x, y = _data(*case.shape)
    tasks = {"fit": _fits, "marginal-effects": _effects}
    (ours, theirs), errors = tasks[case.task](x, y)
    own_error, their_error = errors(ours(), theirs())
    tolerance = TOLERANCES[case.task]
    record: Record = {
        "record": "result",
        "suite": "inference",
        "case": case.name,
        **asdict(case),
        "dtype": "float64",
        "softjax": {"name": "softjax", "error": own_error, "correct": own_error <= tolerance},
        "peer": {
            "name": STATSMODELS.name,
            "version": STATSMODELS.version,
            "error": their_error,
            "correct": their_error <= tolerance,
        },
        "wrong": not max(own_error, their_error) <= tolerance,
    }
    if not record["wrong"]:
        timed = measure.time_in_pairs(measure.Compiled(ours), measure.Compiled(theirs), pairs)
        record["softjax"]["seconds"] = asdict(timed.first)
        record["peer"]["seconds"] = asdict(timed.second)
        record |= {"pairs": timed.count, "ratio": asdict(timed.ratio)}
        record["met"] = case.bound is None or timed.ratio.median <= case.bound
    return record


def _fits(x: np.ndarray, y: np.ndarray) -> tuple[Pair, Callable]:
    from softjax import regression

    def errors(ours: Any, theirs: Any) -> tuple[float, float]:
        kernel, bias = ours.params
        reference = np.zeros((x.shape[1] + 1, 1))  # the class that statsmodels leaves out
        both = np.concatenate([kernel, bias[None]]), np.hstack([reference, theirs.params])
        reached = [fit.objective(theta, x, y, 0.0) for theta in both]
        own, other = (value / min(reached) - 1 for value in reached)
        return own, other

    model = _mnlogit(x, y)
    return (lambda: regression.fit(x, y, tol=TOL), lambda: _solved(model)), errors


def _effects(x: np.ndarray, y: np.ndarray) -> tuple[Pair, Callable]:
    """In our time is the covariance of the parameters, which statsmodels makes with its fit."""
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


def _data(examples: int, features: int, classes: int) -> fit.Arrays:
    """Labels with the probabilities of a logit, which overlap: an optimum exists."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, features))
    logits = x @ rng.normal(size=(features, classes)) / np.sqrt(features)
    return x, fit.draw(logits, rng)

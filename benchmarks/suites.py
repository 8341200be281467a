"""The suites by name, each a list of cases, and the function that runs a case.

A case has a `name` and `run(pairs)`, which yields rows (`results.py`) without suite and case. Quick
runs leave out cases whose `quick` is false, and quick runs of all suites also those whose `short`
is false.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import (
    accuracy,
    core,
    estimator,
    fits,
    fused,
    inference,
    kills,
    measure,
    scale,
    stream,
)
from benchmarks.results import Row

SUITES: dict[str, Sequence[Any]] = {
    "core": core.CASES,
    "accuracy": accuracy.CASES,
    "fused": fused.CASES,
    "fit": fits.FIT,
    "many": fits.MANY,
    "cold": fits.COLD,
    "tables": estimator.CASES,
    "inference": inference.CASES,
    "scale": scale.CASES,
    "stream": stream.CASES,
    "kills": kills.CASES,
}
# These suites take long or much disk space, and run only if they are named.
APART = ("stream", "kills")


def measured(suite: str, case: Any, pairs: int) -> Iterator[Row]:
    """The rows of a case; if it raises, the rows so far and the failure."""
    head = {"record": "result", "suite": suite, "case": case.name}
    try:
        for row in case.run(pairs):
            yield head | row
    except Exception as error:
        yield measure.failure(suite, case.name, error)

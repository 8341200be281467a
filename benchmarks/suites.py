"""The suites by name, each a list of cases, and how a case is run.

A case has a `name` and `run(pairs)`, which yields rows (`results.py`). Quick runs leave it out
where its `quick` is false, and those of all the suites where its `short` is false.
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
# What takes long and much of the disk is run where it is named only.
APART = ("stream", "kills")


def measured(suite: str, case: Any, pairs: int) -> Iterator[Row]:
    """The rows of a case; where it raises, what it gave until then and the failure."""
    try:
        yield from case.run(pairs)
    except Exception as error:
        yield measure.failure(suite, case.name, error)

"""The suite `accuracy`: the errors that `softjax check` prints, on the device at hand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich import box
from rich.table import Table

from benchmarks.measure import PAIRS
from softjax import accuracy

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """The sweep over lengths, scales and offsets of the logits, in every dtype."""

    name: str


CASES = [Case("accuracy/sweep")]


def run(case: Case, pairs: int) -> Iterator[Record]:
    """A record for each function and dtype; a run of fewer pairs sweeps fewer lengths."""
    quick = pairs < PAIRS
    with jax.enable_x64(True):
        rows = accuracy.measure(quick=quick)
    for row in rows:
        yield {
            "record": "result",
            "suite": "accuracy",
            "case": f"accuracy/{row.function}/{row.dtype}",
            "operation": row.function,
            "dtype": row.dtype,
            "lengths": accuracy.QUICK_SIZES if quick else accuracy.SIZES,
            "unit": row.unit,
            "softjax": {"name": "softjax", "error": row.softjax},
            "peer": {"name": row.peer_name, "error": row.peer},
            "goal": row.goal,
            "share_of_goal": row.ratio,
            "wrong": not row.ok,
        }


def results_tables(records: Sequence[Record]) -> list[Table]:
    """One row for each function and dtype."""
    table = Table(title="Largest errors", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("function", "dtype", "softjax", "peer", "", "unit", "goal"):
        table.add_column(column, no_wrap=True)
    for record in records:
        table.add_row(
            record["operation"],
            record["dtype"],
            *(f"{record[side]['error']:.3g}" for side in ("softjax", "peer")),
            record["peer"]["name"],
            record["unit"],
            record["goal"],
        )
    return [table]


def summary(records: Sequence[Record]) -> str:
    """One line: how many errors are within their goal."""
    within = sum(not record["wrong"] for record in records)
    return f"accuracy: {within} of {len(records)} errors within the goal"

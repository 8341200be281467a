"""The suite `accuracy`: the errors that `softjax check` prints, on the current device."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax

from benchmarks.measure import PAIRS
from benchmarks.results import Row
from softjax import accuracy


@dataclass(frozen=True)
class Case:
    """The sweep over lengths, scales and offsets of the logits, in every dtype."""

    name: str = "sweep"

    def run(self, pairs: int) -> Iterator[Row]:
        """Two rows for each function and dtype; a run with fewer pairs sweeps fewer lengths."""
        quick = pairs < PAIRS
        with jax.enable_x64(True):
            rows = accuracy.measure(quick=quick)
        for row in rows:
            head = {
                "case": f"{row.function}/{row.dtype}",
                "operation": row.function,
                "dtype": row.dtype,
                "lengths": accuracy.QUICK_SIZES if quick else accuracy.SIZES,
                "unit": row.unit,
                "goal": row.goal,
            }
            share = {"checks": {"share of the goal": [row.ratio, 1]}}
            yield head | {"side": "softjax", "error": row.softjax, "wrong": not row.ok} | share
            yield head | {"side": row.peer_name, "error": row.peer, "wrong": False}


CASES = (Case(),)

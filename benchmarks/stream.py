"""The suite `stream`: training on a file, compared with training on the same arrays in memory.

Each run is its own process, so that its peak memory is its own. Both kinds of runs alternate, and
the ratio is the median of the ratios of neighbouring runs.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.results import Row

FEATURES, CLASSES, BATCH = 64, 10, 1024
RUN_ROWS = 1 << 18
SIDES = {"stream": "softjax", "memory": "in memory"}


@dataclass(frozen=True)
class Case:
    """A file of the given size in gigabytes, and the number of its rows that a run trains on."""

    gigabytes: float = 4.0
    rows: int = 1 << 21
    pairs: int = 5
    quick: bool = False
    name: str = "train"

    def run(self, pairs: int) -> Iterator[Row]:
        """A row for the file and a row for the memory; `seconds` is the time per row of data."""
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), self.gigabytes)
            runs = [
                {kind: measure.elsewhere(train, kind, folder, self.rows) for kind in SIDES}
                for _ in range(self.pairs)
            ]
        seconds = ([run[kind]["seconds"] for run in runs] for kind in SIDES)
        for (kind, side), times in zip(SIDES.items(), measure.paired(*seconds), strict=True):
            yield times | {
                "side": side,
                "batch_size": BATCH,
                "cpu_seconds": float(np.median([run[kind]["cpu_seconds"] for run in runs])),
                "peak_bytes": max(run[kind]["peak_bytes"] for run in runs),
            }


def write(folder: Path, gigabytes: float) -> None:
    """Normal features and the labels of a linear model, in two files."""
    rows = round(gigabytes * 2**30 / 4 / FEATURES)
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(FEATURES, CLASSES)).astype(np.float32)
    create = np.lib.format.open_memmap
    x = create(folder / "x.npy", "w+", np.float32, (rows, FEATURES))
    y = create(folder / "y.npy", "w+", np.int32, (rows,))
    for start in range(0, rows, RUN_ROWS):
        part = rng.standard_normal((min(RUN_ROWS, rows - start), FEATURES), np.float32)
        noise = rng.gumbel(size=(len(part), CLASSES)).astype(np.float32)
        x[start : start + RUN_ROWS] = part
        y[start : start + RUN_ROWS] = np.argmax(part @ kernel + noise, 1)


def train(kind: str, folder: str, rows: int) -> Row:
    """The time per row of data, after the rows of a first event, which includes compilation."""
    import optax

    from softjax import streaming

    paths = Path(folder) / "x.npy", Path(folder) / "y.npy"
    if kind == "memory":
        source: Any = streaming.ArrayRows(*map(np.load, paths))
    else:
        source = streaming.open_rows(*paths)
    seen = []
    steps = rows // BATCH
    streaming.train(
        streaming.Batches(source, BATCH),
        num_classes=CLASSES,
        optimizer=optax.adam(0.01),
        steps=steps,
        every=max(steps // 8, 1),
        callback=lambda event: seen.append((event.step, time.time(), time.process_time())),
    )
    (first, begin, cpu_begin), (last, end, cpu_end) = seen[0], seen[-1]
    count = (last - first) * BATCH
    return {
        "seconds": (end - begin) / count,
        "cpu_seconds": (cpu_end - cpu_begin) / count,
        "peak_bytes": measure.peak_bytes(),
    }


CASES = (Case(),)

"""Training on a file beside training in memory: `python -m benchmarks.stream [--gigabytes 4]`.

Each run is a process of its own, whose largest memory is thereby its own. Runs alternate, and the
figure is the median of the ratios of neighbours.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import ROOT, environment

FEATURES, CLASSES, BATCH = 64, 10, 1024
RUN_ROWS = 1 << 18


def main() -> None:
    """Writes the file, runs, and prints and records what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1 << 21, help="to train on, a run")
    parser.add_argument("--folder", type=Path, help="where the file goes; it is removed after")
    parser.add_argument("--out", type=Path, help="where the JSON lines go")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], Path(options.one[1]), options.rows)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write(Path(folder), options.gigabytes)
        records = [environment() | {"suite": "stream", "bytes": size}]
        for _ in range(options.pairs):
            for kind in ("memory", "stream"):
                own = ["--one", kind, folder, "--rows", str(options.rows)]
                command = [sys.executable, "-m", "benchmarks.stream", *own]
                done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
                records.append(json.loads(done.stdout))
    runs = records[1:]
    ratios = [
        {name: b[name] / a[name] for name in ("rows_per_second", "rows_per_cpu_second")}
        for a, b in zip(runs[::2], runs[1::2], strict=True)
    ]
    records.append(
        {"record": "summary"}
        | {name: statistics.median(r[name] for r in ratios) for name in ratios[0]}
        | {"stream_peak_bytes": max(run["peak_bytes"] for run in runs[1::2])}
    )
    lines = "".join(json.dumps(record) + "\n" for record in records)
    print(lines, end="")
    if options.out:
        options.out.write_text(lines)


def write(folder: Path, gigabytes: float) -> int:
    """Normal features and the labels of a linear model, in two files; the size of the first."""
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
    return rows * FEATURES * 4


def measure(kind: str, folder: Path, rows: int) -> dict[str, Any]:
    """Trains on so many rows, after as many as a first event takes for compilation."""
    import optax

    from softjax import streaming

    paths = folder / "x.npy", folder / "y.npy"
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
        "record": kind,
        "batch_size": BATCH,
        "rows_per_second": count / (end - begin),
        "rows_per_cpu_second": count / (cpu_end - cpu_begin),
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """The largest memory of this process; that of `resource` begins with its parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()

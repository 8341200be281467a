"""The suite `scale`: what goes over the wire and what is held, against the number of devices.

Nothing is timed: programs are compiled for 1, 2, 4 and 8 CPU devices, in a process of their own,
and their collectives are counted (benchmarks/wire.py). Each is also run, and its results compared
with those of one device. `python -m benchmarks.scale FILE [PICTURE]` prints the table of a result
file as Markdown, and draws it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.table import Table

import softjax
from benchmarks import measure, wire

ROOT = Path(__file__).parents[1]
DEVICES = (1, 2, 4, 8)

# Float32 sums over as many as 8192 classes, in another order, over the largest entry.
TOLERANCE = 1e-5

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A program on a mesh, and the most megabytes that a device may send where there are eight.

    Attributes:
        program: "value_and_gradient" of the linear loss, or the values "logsumexp" and "loss".
        form: which axes are sharded, a name in FORMS.
        implementation: "softjax", or "plain" for the loss of optax on all logits.
        megabytes: the bound; None for no bound.
        shape: N, D and V.
        short: whether it is in quick runs of all the suites.
    """

    program: str
    form: str
    implementation: str = "softjax"
    megabytes: float | None = None
    shape: tuple[int, int, int] = (1024, 256, 8192)
    short: bool = False

    @property
    def name(self) -> str:
        """The case in one word, such as `scale/value_and_gradient/fsdp/softjax`."""
        return f"scale/{self.program}/{self.form}/{self.implementation}"


@dataclass(frozen=True)
class Form:
    """What is over which axes of a mesh: examples, features of the kernel, classes."""

    sizes: Callable[[int], dict[str, int]]
    rows: str | None
    features: str | None
    classes: str | None


def grid(devices: int) -> dict[str, int]:
    """A mesh of two axes, the first at most 2."""
    rows = min(devices, 2)
    return {"d": rows, "c": devices // rows}


FORMS = {
    "data": Form(lambda n: {"d": n}, "d", None, None),
    "classes": Form(lambda n: {"c": n}, None, None, "c"),
    "both": Form(grid, "d", None, "c"),
    "fsdp": Form(grid, "d", "d", "c"),
}

# The least that value and gradient can send on 2 x 4 devices is 2.884 MB, dX and dW alone.
CASES = [
    Case("value_and_gradient", "data"),
    Case("value_and_gradient", "classes"),
    Case("value_and_gradient", "both", megabytes=2.90),
    Case("value_and_gradient", "fsdp", megabytes=2.90, short=True),
    Case("value_and_gradient", "both", "plain"),
    # Three numbers a row: 3 x 4 bytes x 1024 rows x 2 (n - 1) / n.
    Case("logsumexp", "classes", megabytes=0.0216),
    Case("loss", "classes", megabytes=0.0216, short=True),
]


def run(case: Case, pairs: int) -> Iterator[Record]:
    """The records of a case, one for each number of devices, from a process that has as many."""
    del pairs  # nothing is timed
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(max(DEVICES))}
    command = [sys.executable, "-m", "benchmarks.scale", "--measure", json.dumps(asdict(case))]
    process = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    yield from map(json.loads, process.stdout.splitlines())


def records_of(case: Case) -> Iterator[Record]:
    """The same, in a process that has the devices."""
    expected: list[np.ndarray] = []
    for devices in DEVICES:
        sizes = FORMS[case.form].sizes(devices)
        program, arguments = compiled(case, sizes)
        results = [np.asarray(a) for a in jax.tree.leaves(program(*arguments))]
        expected = expected or results
        error = measure.error(results, expected)
        sent = wire.collectives(program)
        record = {
            "record": "result",
            "suite": "scale",
            **asdict(case),
            "case": f"{case.name}/{devices}",
            "devices": devices,
            "mesh": sizes,
            "wire_bytes": sum(one.bytes for one in sent),
            "collectives": sum(one.times for one in sent),
            "kinds": sorted({one.kind for one in sent}),
            "largest_array": wire.largest_array(program),
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "error": error,
            "wrong": not error <= TOLERANCE,
        }
        if case.megabytes is not None and devices == max(DEVICES):
            record["met"] = record["wire_bytes"] <= 1e6 * case.megabytes
        yield record


def compiled(case: Case, sizes: dict[str, int]) -> tuple[Any, tuple[jax.Array, ...]]:
    """The program for a mesh of these sizes, and its arguments, sharded as the gradients are."""
    form = FORMS[case.form]
    count = int(np.prod(list(sizes.values())))
    devices = np.array(jax.devices()[:count]).reshape(tuple(sizes.values()))
    mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    def put(array: np.ndarray, *spec: str | None) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    rng = np.random.default_rng(0)
    n, d, v = case.shape
    labels = put(rng.integers(v, size=n, dtype=np.int32), form.rows)
    if case.program != "value_and_gradient":
        logits = 3 * rng.standard_normal((n, v), np.float32)
        arguments = put(logits, form.rows, form.classes), labels
        return jax.jit(VALUES[case.program]).lower(*arguments).compile(), arguments
    hidden = rng.standard_normal((n, d), np.float32)
    kernel = 3 / np.sqrt(d, dtype=np.float32) * rng.standard_normal((d, v), np.float32)
    h, w = put(hidden, form.rows, None), put(kernel, form.features, form.classes)

    def fused(hidden, kernel, labels) -> jax.Array:
        return softjax.linear_cross_entropy(
            hidden,
            kernel,
            labels,
            reduction="mean",
            class_axis=form.classes or (),
            feature_axis=form.features,
        )

    loss = fused if case.implementation == "softjax" else plain
    step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, (h.sharding, w.sharding)))
    return step.lower(h, w, labels).compile(), (h, w, labels)


def plain(hidden, kernel, labels) -> jax.Array:
    """The mean loss of optax on all logits, as the partitioner shards it."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
    return jnp.mean(losses)


VALUES: dict[str, Callable] = {
    "logsumexp": lambda logits, labels: softjax.logsumexp(logits, -1),
    "loss": softjax.cross_entropy,
}

COLUMNS = ("program", "sharded", "by", "devices", "wire, MB", "collectives", "temp., MB", "asked")


def results_tables(records: Sequence[Record]) -> list[Table]:
    """All in one table."""
    table = Table(title="scale", title_justify="left", box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, no_wrap=True)
    for record in records:
        table.add_row(*cells(record))
    return [table]


def summary(records: Sequence[Record]) -> str:
    """One line: how many bounds are met, and what is wrong."""
    bounded = [record for record in records if "met" in record]
    met = sum(record["met"] for record in bounded)
    wrong = sum(record["wrong"] for record in records)
    return f"scale: {met} of {len(bounded)} within the asked bounds, {wrong} wrong results"


def cells(record: Record) -> tuple[str, ...]:
    """A record as the cells of a row; bytes are those of one device."""
    asked = f"{record['megabytes']:g}" if "met" in record else ""
    return (
        record["program"].replace("_", " "),
        record["form"],
        record["implementation"],
        str(record["devices"]),
        "wrong" if record["wrong"] else f"{record['wire_bytes'] / 1e6:.3f}",
        str(record["collectives"]),
        f"{record['temporary_bytes'] / 1e6:.1f}",
        asked,
    )


def markdown(records: Sequence[Record]) -> str:
    """The records as one Markdown table."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *map(cells, records)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(records: Sequence[Record], path: Path) -> None:
    """Bytes on the wire and temporaries against devices, a line for each program and form."""
    from matplotlib.figure import Figure

    lines: dict[str, list[Record]] = {}
    for record in records:
        label = f"{record['program'].replace('_', ' ')}, {record['form']}"
        label += "" if record["implementation"] == "softjax" else f", {record['implementation']}"
        lines.setdefault(label, []).append(record)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, line in lines.items():
        devices = [record["devices"] for record in line]
        for axes, quantity in ((left, "wire_bytes"), (right, "temporary_bytes")):
            axes.plot(devices, [record[quantity] / 1e6 for record in line], "o-", label=label)
    for axes, title in ((left, "sent by a device, MB"), (right, "temporaries of a device, MB")):
        axes.set(xlabel="devices", title=title)
        axes.set_xscale("log", base=2)
        axes.set_xticks(DEVICES, [str(count) for count in DEVICES])
        axes.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path)


def main(arguments: Sequence[str]) -> None:
    """Measure a case, or print and draw a result file."""
    if arguments[0] == "--measure":
        case = json.loads(arguments[1])
        for record in records_of(Case(**case | {"shape": tuple(case["shape"])})):
            print(json.dumps(record), flush=True)
        return
    lines = [json.loads(line) for line in Path(arguments[0]).read_text().splitlines()]
    records = [line for line in lines if line.get("suite") == "scale" and "case" in line]
    print(markdown(records))
    if len(arguments) > 1:
        draw(records, Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])

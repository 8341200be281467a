"""The suite `scale`: bytes sent and temporaries, against the number of devices.

Nothing is timed. Programs are compiled for 1, 2, 4 and 8 CPU devices, each number in its own
process, and their collectives are counted (benchmarks/wire.py). Each program is also run, and its
results are compared with the results on one device.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import softjax
from benchmarks import fused as fused_suite
from benchmarks import measure, wire
from benchmarks.results import Row

DEVICES = (1, 2, 4, 8)

# Relative to the largest entry: float32 sums over up to 8192 classes, in another order.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A program on a mesh, and a bound on the megabytes that a device sends with eight devices."""

    program: str  # "value_and_gradient" of the linear loss, or the values "logsumexp" and "loss"
    form: str  # the sharding, a name in FORMS
    implementation: str = "softjax"  # "softjax", or "plain" for the loss of optax on all logits
    megabytes: float | None = None  # the bound; None for no bound
    shape: tuple[int, int, int] = (1024, 256, 8192)  # N, D and V
    short: bool = False  # whether it is in quick runs of all suites

    @property
    def name(self) -> str:
        """The case in one word, such as `value_and_gradient/fsdp/softjax`."""
        return f"{self.program}/{self.form}/{self.implementation}"

    def run(self, pairs: int) -> Iterator[Row]:
        """A row for each number of devices, from a process with this number of devices."""
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(max(DEVICES))}
        yield from measure.elsewhere(rows_of, asdict(self), environment=environment)


@dataclass(frozen=True)
class Form:
    """The mesh axes over which examples, features of the kernel and classes are sharded."""

    sizes: Callable[[int], dict[str, int]]
    rows: str | None
    features: str | None
    classes: str | None


def grid(devices: int) -> dict[str, int]:
    """The sizes of a mesh of two axes; the first is at most 2."""
    rows = min(devices, 2)
    return {"d": rows, "c": devices // rows}


FORMS = {
    "data": Form(lambda n: {"d": n}, "d", None, None),
    "classes": Form(lambda n: {"c": n}, None, None, "c"),
    "both": Form(grid, "d", None, "c"),
    "fsdp": Form(grid, "d", "d", "c"),
}

# Value and gradient on 2 x 4 devices send at least 2.884 MB, for dX and dW.
CASES = [
    Case("value_and_gradient", "data"),
    Case("value_and_gradient", "classes"),
    Case("value_and_gradient", "both", megabytes=2.90),
    Case("value_and_gradient", "fsdp", megabytes=2.90, short=True),
    Case("value_and_gradient", "both", "plain"),
    # Three numbers per row: 3 x 4 bytes x 1024 rows x 2 (n - 1) / n.
    Case("logsumexp", "classes", megabytes=0.0216),
    Case("loss", "classes", megabytes=0.0216, short=True),
]


def rows_of(fields: dict[str, Any]) -> list[Row]:
    """The rows of a case, in a process that has the devices."""
    case = Case(**fields)
    rows, expected = [], []
    for devices in DEVICES:
        sizes = FORMS[case.form].sizes(devices)
        program, arguments = compiled(case, sizes)
        results = [np.asarray(a) for a in jax.tree.leaves(program(*arguments))]
        expected = expected or results
        error = measure.error(results, expected)
        sent = wire.collectives(program)
        row = {
            "case": f"{case.program}/{case.form}/{devices} device{'s'[: devices != 1]}",
            "side": case.implementation,
            "program": case.program,
            "form": case.form,
            "shape": case.shape,
            "devices": devices,
            "wire_bytes": sum(one.bytes for one in sent),
            "collectives": sum(one.times for one in sent),
            "kinds": sorted({one.kind for one in sent}),
            "largest_array": wire.largest_array(program),
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "error": error,
            "wrong": not error <= TOLERANCE,
        }
        if case.megabytes is not None and devices == max(DEVICES):
            row["checks"] = {"bytes sent": [row["wire_bytes"], 1e6 * case.megabytes]}
        rows.append(row)
    return rows


def compiled(case: Case, sizes: dict[str, int]) -> tuple[Any, tuple[jax.Array, ...]]:
    """The program for a mesh of these sizes, and its arguments, sharded like the gradients."""
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

    loss = fused if case.implementation == "softjax" else fused_suite.plain
    step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, (h.sharding, w.sharding)))
    return step.lower(h, w, labels).compile(), (h, w, labels)


VALUES: dict[str, Callable] = {
    "logsumexp": lambda logits, labels: softjax.logsumexp(logits, -1),
    "loss": softjax.cross_entropy,
}

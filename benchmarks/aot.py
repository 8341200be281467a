"""Programs compiled for an absent device: what they move, hold, launch and send.

JAX compiles for a TPU or a GPU that is not present, and the optimised program shows what it reads
and writes (benchmarks/traffic.py). For one version of the compiler the counts are the same in every
run, so that they can be compared with bounds; the time is an estimate. `--gate` compiles a few
cases and fails if one costs more than its committed figures.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import baselines, hlo, measure, traffic
from benchmarks.aot_cases import SMALL_BUDGET, Case, cases, largest
from benchmarks.environment import environment, version
from benchmarks.results import Row
from benchmarks.targets import Target

FILE = Path(__file__).with_name("aot_baselines.json")
# The bounds on softjax: passes relative to the peer's, float32 numbers per row beyond the peer's
# temporaries, kernels beyond the peer's, passes of the largest loss with its gradient, and the time
# to compile relative to the peer's on a TPU.
PASSES = {"value": 1.0, "derivative": 1.1, "loss and gradient": 1.1}
FLOATS_A_ROW = 8
MORE_KERNELS = 1
LOSS_PASSES, LOSS_SHAPE = 4.0, "/8192x128256/"
COMPILING_ON_TPU = 1.2
# The bounds on the gradient of a head relative to the gradient with all logits. For operands of
# half precision the temporaries do not count the float32 sum of the kernel's gradients.
HEAD_PASSES, HEAD_TIME, HEAD_KERNELS, HEAD_TEMPORARIES = 1.3, 1.05, 250, 1 / 6
HEAD_PRODUCTS = {"head": 1.0, "head, each": 4 / 3}
# The figures that the gate compares.
GATED = ("temporary_bytes", "moved_bytes", "launches")

# For each check the measured value and its bound.
Checks = dict[str, list[float]]


def records(target: Target, suites: Sequence[str], only: str = "") -> Iterator[Row]:
    """The rows of each case, as soon as it is compiled; for a failed case, the error."""
    program(jnp.negative, (jax.ShapeDtypeStruct((8,), "float32"),), target)  # starts the compiler
    for case in cases(target, suites):
        if only not in case.full_name:
            continue
        try:
            yield from rows(case, target)
        except Exception as error:  # an error of the compiler is the result of the case
            yield measure.failure("aot", case.full_name, error)


def rows(case: Case, target: Target) -> Iterator[Row]:
    """The rows of both programs of a case; the peer's row has the checks of softjax's bounds."""
    head = {"record": "result", "suite": "aot", "case": case.full_name, "target": target.name}
    head["kind"] = case.kind
    ours = program(case.ours, case.arguments, target)
    yield head | {"side": "softjax"} | ours
    if case.peer is None:
        return
    try:
        theirs = program(case.peer, case.arguments, target)
    except Exception as error:  # if only the peer fails, softjax has met its bounds
        text = f"{type(error).__name__}: {error}"[:300]
        yield head | {"side": case.peer_name, "failure": text}
        return
    # Figures are compared with two digits after the point, so that a few bytes per row do not
    # count.
    found = checks(case, ours, theirs, target.platform).items()
    rounded = {name: [round(got, 2), most] for name, (got, most) in found}
    yield head | {"side": case.peer_name, "checks": rounded} | theirs


def program(function: Callable[..., Any], arguments: tuple[Any, ...], target: Target) -> Row:
    """The figures of one compiled program, with the time to lower and to compile it here."""
    place = jax.sharding.SingleDeviceSharding(target.devices[0])
    placed = jax.tree.map(lambda a: a if a.sharding else a.update(sharding=place), arguments)
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    start = time.perf_counter()
    lowered = jitted.lower(*placed)
    lowered_at, lowered_cpu = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    compiled_at, compiled_cpu = time.perf_counter(), time.process_time()
    found = traffic.of_program(hlo.read(compiled.as_text()), target.chip)
    return {
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "moved_bytes": found.bytes,
        "passes": found.bytes / largest(placed),
        "kernels": len(found.kernels),
        "launches": found.launches,
        "flops": found.flops,
        "products": dict(found.products),
        "collectives": dict(found.collectives),
        "wire_bytes": found.collectives.total(),
        "asynchronous": dict(found.asynchronous),
        "estimated_seconds": found.seconds,
        "lower_seconds": lowered_at - start,
        "compile_seconds": compiled_at - lowered_at,
        "compile_cpu_seconds": compiled_cpu - lowered_cpu,
    }


def checks(case: Case, ours: Row, theirs: Row, platform: str) -> Checks:
    """The figures of a case that have a bound."""
    if not case.kind:
        return {}
    if case.kind.startswith("head"):
        return head_checks(case, ours, theirs)
    few = 4 * FLOATS_A_ROW * case.rows
    found = {
        "ratio of passes": [ours["passes"] / theirs["passes"], PASSES[case.kind]],
        "temporaries": [ours["temporary_bytes"], theirs["temporary_bytes"] + few],
        "kernels": [ours["launches"], theirs["launches"] + MORE_KERNELS],
    }
    if case.kind == "loss and gradient" and LOSS_SHAPE in case.name:
        found["passes"] = [ours["passes"], LOSS_PASSES]
    if platform == "tpu":
        # CPU time, which other processes on the machine disturb less.
        ratio = ours["compile_cpu_seconds"] / theirs["compile_cpu_seconds"]
        found["compile"] = [ratio, COMPILING_ON_TPU]
    return found


def head_checks(case: Case, ours: Row, theirs: Row) -> Checks:
    """The figures of the value and gradient of a head."""
    if case.kind == "head, small":
        return {"temporaries": [ours["temporary_bytes"], SMALL_BUDGET]}
    products = {"products": [ours["flops"] / theirs["flops"], HEAD_PRODUCTS[case.kind]]}
    if case.kind == "head, each":
        return products
    kernel = case.arguments[1]
    summed = 4 * kernel.size if kernel.dtype.itemsize < 4 else 0
    return products | {
        "ratio of passes": [ours["passes"] / theirs["passes"], HEAD_PASSES],
        "time": [ours["estimated_seconds"] / theirs["estimated_seconds"], HEAD_TIME],
        "kernels": [ours["launches"], HEAD_KERNELS],
        "temporaries": [
            ours["temporary_bytes"] - summed,
            HEAD_TEMPORARIES * theirs["temporary_bytes"],
        ],
    }


def gate(target: Target, write: bool = False) -> tuple[list[str], str]:
    """What costs more than its committed figures, and a line on what was compared.

    The figures belong to one version of JAX and of the compiler. With other versions nothing is
    compared, and the line says so.
    """
    committed = json.loads(FILE.read_text()) if FILE.exists() else {}
    belonging = {"jax": jax.__version__, "compiler": target.compiler}
    known = committed.get(target.name, {})
    if not write and known.get("versions") != belonging:
        theirs = known.get("versions") or "no version"
        return [], f"nothing compared: the figures of {target.name} belong to {theirs}"
    figures = {
        case.full_name: {key: found[key] for key in GATED}
        for case in cases(target, ("core",))
        if case.quick
        for found in [program(case.ours, case.arguments, target)]
    }
    if write:
        committed[target.name] = {"versions": belonging, "figures": figures}
        FILE.write_text(json.dumps(committed, indent=1) + "\n")
        return [], f"written to {FILE}"
    lines = baselines.growth(known["figures"], figures)
    return lines, f"{len(figures)} programs of {target.name} compared"


def environment_of(target: Target) -> Row:
    """The environment of a run that only compiles."""
    head = environment()
    package = target.compiler.split()[0]
    return head | {
        "platform": target.platform,
        "device": f"{target.kind}, compiled, not run",
        "devices": len(target.devices),
        "driver": target.compiler,
        "versions": head["versions"] | {package: version(package)},
        "target": target.name,
        "suite": "aot",
        "quick": False,
    }

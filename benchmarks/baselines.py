"""Deterministic figures with their committed values; the tests fail if one grows.

The figures are the bytes of temporaries, the exponentials and the fusions (passes over the data) of
compiled programs, which are not run, and errors in units in the last place, rounded up.
"""

import json
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import fused, peers
from benchmarks.core import CORE, GPT_2, IMAGENET, Case, Shape
from benchmarks.environment import version
from benchmarks.reference import inputs, reference

FILE = Path(__file__).with_name("baselines.json")
# A few thousand results, which are enough for a stable largest error.
SAMPLE = Shape("sample", 64, 100, "no model")
COMPILED = (
    *(Case(operation, mode, IMAGENET) for operation, mode, _ in CORE),
    Case("logsumexp", "hvp", IMAGENET),
    Case("softmax", "gradient", IMAGENET),
    Case("cross_entropy", "value_and_gradient", GPT_2, dtype="bfloat16"),
)
RUN = (
    *(Case(operation, mode, SAMPLE) for operation, mode, _ in CORE),
    Case("softmax", "value", SAMPLE, dtype="bfloat16"),
    Case("cross_entropy", "value_and_gradient", SAMPLE, dtype="bfloat16"),
)

Figures = dict[str, dict[str, int]]


def measure() -> dict[str, Any]:
    """All figures, with the versions and the platform that they belong to."""
    figures = {name: _program(*program) for name, program in _programs()}
    for case in RUN:
        figures[f"core/{case.name}"] = {"ulp": _ulp(case)}
    return versions() | {"figures": figures}


def versions() -> dict[str, str | None]:
    """The versions that the figures depend on."""
    return {
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "platform": jax.default_backend(),
        "machine": platform.machine(),
    }


def read() -> dict[str, Any]:
    """The committed figures."""
    return json.loads(FILE.read_text())


def write() -> None:
    """Writes the figures of this checkout as the committed ones."""
    FILE.write_text(json.dumps(measure(), indent=1) + "\n")


def growth(before: Figures, after: Figures) -> list[str]:
    """The figures that have grown or are missing, one line each."""
    lines = []
    for name, figures in before.items():
        for kind, old in figures.items():
            new = after.get(name, {}).get(kind)
            if new is None or new > old:
                lines.append(f"{name}: {kind} {old} -> {new}")
    unknown = [name for name in after if name not in before]
    return lines + [f"{name}: not in the committed figures" for name in unknown]


def _programs() -> Iterator[tuple[str, tuple[Callable, tuple]]]:
    for case in COMPILED:
        size = case.shape.examples, case.shape.classes
        logits = jax.ShapeDtypeStruct(size, case.dtype)
        labels = jax.ShapeDtypeStruct(size[:1], "int32")
        function = peers.in_mode(peers.SOFTJAX.operations[case.operation], case.mode)
        yield f"core/{case.name}", (function, (logits, labels, logits))
    function = fused.in_mode(fused.fused, "value_and_gradient")
    yield f"fused/value_and_gradient/{fused.HEAD.name}", (function, fused.structures(fused.HEAD))


def _program(function: Callable, arguments: tuple) -> dict[str, int]:
    executable: Any = jax.jit(function).lower(*arguments).compile()
    text = executable.as_text()
    return {
        "temporary_bytes": executable.memory_analysis().temp_size_in_bytes,
        "exponentials": len(re.findall(r" exponential\(", text)),
        "fusions": len(re.findall(r" fusion\(", text)),
    }


def _ulp(case: Case) -> int:
    """The largest error, divided by the spacing of the dtype at the exact result, rounded up."""
    arrays = inputs(case.shape, case.dtype)
    function = peers.in_mode(peers.SOFTJAX.operations[case.operation], case.mode)
    results = jax.tree.leaves(jax.jit(function)(*arrays))
    errors = []
    for result, exact in zip(results, reference(case, *arrays), strict=True):
        spacing = np.spacing(np.abs(exact).astype(result.dtype)).astype(np.float64)
        error = np.abs(np.asarray(result, np.float64) - exact)
        errors.append(float(np.max(error / spacing)))
    return int(np.ceil(max(errors)))

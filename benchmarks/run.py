"""A run: each case beside each of its peers, with the environment that the figures belong to."""

import datetime
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from functools import singledispatch
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks import fit, fused, measure, scale
from benchmarks.cases import Case, inputs, reference
from benchmarks.peers import SOFTJAX, Implementation, in_mode, peers_of

ROOT = Path(__file__).parents[1]
PACKAGES = ("softjax-regression", "jax", "jaxlib", "optax", "numpy")

Record = dict[str, Any]


def environment() -> Record:
    """Where and with what a run is made: the first line of its file."""
    device = jax.devices()[0]
    return {
        "record": "environment",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "clean": _git("status", "--porcelain") == "",
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": _cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "flags": {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))},
    }


@singledispatch
def run_case(case: Case, pairs: int) -> Iterator[Record]:
    """Measure softjax beside each installed peer that has the operation of a case.

    Both must first return what the float64 reference says. An implementation that does not is
    recorded as wrong and the pair is not timed.
    """
    logits, labels = inputs(case.shape, case.dtype)
    expected = reference(case, logits, labels)
    arguments = (jax.device_put(logits), jax.device_put(labels))

    def prepare(implementation: Implementation) -> tuple[measure.Compiled, Record]:
        function = in_mode(implementation.operations[case.operation], case.mode)
        compiled = measure.compile_ahead(function, *arguments)
        error = measure.error(compiled.call(), expected)
        return compiled, {
            "name": implementation.name,
            "error": error if math.isfinite(error) else None,
            "correct": error <= measure.TOLERANCE,
            "lower_seconds": compiled.lower_seconds,
            "compile_seconds": compiled.compile_seconds,
            "temporary_bytes": compiled.temporary_bytes,
        }

    ours, our_record = prepare(SOFTJAX)
    for peer in peers_of(case.operation):
        theirs, their_record = prepare(peer)
        record = {
            "record": "result",
            "case": case.name,
            **asdict(case),
            "logits_bytes": logits.nbytes,
            "softjax": our_record,
            "peer": their_record,
        }
        if our_record["correct"] and their_record["correct"]:
            timed = measure.time_in_pairs(ours, theirs, pairs)
            record["pairs"] = pairs
            record["softjax"] = our_record | {"seconds": asdict(timed.first)}
            record["peer"] = their_record | {"seconds": asdict(timed.second)}
            record["ratio"] = asdict(timed.ratio)
            record["met"] = timed.ratio.median <= case.bound
        yield record


run_case.register(fused.Case, fused.run)
run_case.register(fit.Case, fit.run)
run_case.register(scale.Case, scale.run)


def larger_temporaries(record: Record) -> bool:
    """Whether softjax holds a temporary the size of the input where the peer holds less."""
    ours, theirs = (record[side]["temporary_bytes"] for side in ("softjax", "peer"))
    return None not in (ours, theirs) and ours >= record["logits_bytes"] and ours > theirs


def _git(*arguments: str) -> str | None:
    """What git answers in this checkout; None outside of one."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The model of the processor; Linux tells it in a file alone."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _cores() -> int | None:
    """The cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()

"""A run: each case beside each of its peers; what fails is recorded, and the run goes on."""

import math
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import singledispatch
from typing import Any

import jax

from benchmarks import (
    accuracy,
    cold,
    fit,
    fused,
    imports,
    inference,
    many,
    measure,
    roofline,
    scale,
)
from benchmarks.cases import Case
from benchmarks.peers import JAX_NN, OPTAX, SOFTJAX, Implementation, compiled_by_jax, peers_of
from benchmarks.reference import inputs, reference

Record = dict[str, Any]


@singledispatch
def run_case(case: Case, pairs: int) -> Iterator[Record]:
    """Measure softjax beside each peer that has the operation and the mode of a case.

    Both must first return what the float64 reference says. An implementation that does not is
    recorded as wrong and the pair is not timed; one that raises is recorded with its error.
    """
    host = inputs(case.shape, case.dtype, operation=case.operation)
    expected = reference(case, *host)
    arguments = tuple(map(jax.device_put, host))
    examples, classes, itemsize = *host[0].shape, host[0].itemsize
    head = {
        "record": "result",
        "suite": "core",
        "case": case.name,
        **asdict(case),
        "logits_bytes": host[0].nbytes,
    }
    if case.mode != "eager":  # whose time is that of the call
        work = roofline.of_logits(case.operation, case.mode, examples, classes, itemsize)
        head["work"] = asdict(work)

    def prepare(implementation: Implementation) -> tuple[measure.Compiled, Record]:
        operation = implementation.operations[case.operation]
        compiled = implementation.prepare(operation, case.mode, arguments, case.donated)
        error = measure.error(compiled.results(), expected)
        return compiled, {
            "name": implementation.name,
            "version": implementation.version,
            "error": error if math.isfinite(error) else None,
            "correct": error <= measure.TOLERANCES[case.dtype],
            **compiled.costs(),
        }

    ours, our_record = prepare(SOFTJAX)
    quick = pairs < measure.PAIRS
    for peer in peers_of(case.operation, case.mode, case.dtype, quick):
        if case.donated and peer.prepare is not compiled_by_jax:
            continue
        try:
            theirs, their_record = prepare(peer)
        except Exception as error:
            yield failure("core", f"{case.name} {peer.name}", error)
            continue
        correct = our_record["correct"] and their_record["correct"]
        bound = case.bound if peer in (JAX_NN, OPTAX) else None
        record = head | {"bound": bound, "softjax": our_record, "peer": their_record}
        record["wrong"] = not correct
        if correct:
            timed = measure.time_in_pairs(ours, theirs, pairs)
            record["pairs"] = timed.count
            record["softjax"] = our_record | {"seconds": asdict(timed.first)}
            record["peer"] = their_record | {"seconds": asdict(timed.second)}
            record["ratio"] = asdict(timed.ratio)
            record["met"] = bound is None or timed.ratio.median <= bound
        record["device_peak_bytes"] = measure.device_peak_bytes()
        yield record


run_case.register(imports.Case, imports.run)
run_case.register(accuracy.Case, accuracy.run)
run_case.register(fused.Case, fused.run)
run_case.register(fit.Case, fit.run)
run_case.register(many.Case, many.run)
run_case.register(cold.Case, cold.run)
run_case.register(inference.Case, inference.run)
run_case.register(scale.Case, scale.run)


def measured(suite: str, case: Any, pairs: int) -> Iterator[Record]:
    """The records of a case; where it raises, what it gave until then and the failure."""
    try:
        yield from run_case(case, pairs)
    except Exception as error:
        yield failure(suite, case.name, error)


def failure(suite: str, name: str, error: Exception) -> Record:
    """The record of a case that raised; `bytes` is what it asked for where memory ran out."""
    asked = measure.bytes_asked(error)
    return {
        "record": "failure",
        "suite": suite,
        "case": name,
        "kind": "error" if asked is None else "out of memory",
        "bytes": asked,
        "error": f"{type(error).__name__}: {error}"[:1000],
        "traceback": "".join(traceback.format_tb(error.__traceback__)[-3:]),
    }

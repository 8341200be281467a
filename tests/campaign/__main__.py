"""The command line of the campaign."""

import argparse
import collections
import contextlib
import math
import shlex
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from types import ModuleType

import jax
import numpy as np

from tests.campaign import (
    Failure,
    convergence,
    data_files,
    fits,
    functions,
    invariance,
    linear,
    model_files,
)

KINDS: dict[str, ModuleType] = {
    kind.NAME: kind
    for kind in (functions, linear, invariance, fits, convergence, data_files, model_files)
}
# Cases after which compiled programs are forgotten: each has shapes of its own.
CASES_IN_MEMORY = 100
REPORT_SECONDS = 10


class Tally:
    """The results of the cases of one kind."""

    def __init__(self) -> None:
        self.cases, self.seconds = 0, 0.0
        self.failures: list[str] = []
        self.labels: collections.Counter[str] = collections.Counter()
        self.worst, self.worst_case = 0.0, 0


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Keeps compiled programs on disk: the command line compiles most again for every file."""
    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def generator(seed: int, kind: str, case: int) -> np.random.Generator:
    """The random generator of a case, which is independent of other cases."""
    return np.random.default_rng([seed, zlib.crc32(kind.encode()), case])


def run_case(tally: Tally, kind: str, seed: int, case: int) -> None:
    """Runs a case and adds it to the tally; any exception is a failure."""
    begin = time.perf_counter()
    try:
        outcome = KINDS[kind].run(generator(seed, kind, case))
    except Exception as error:
        message = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        line = " ".join(message.split())[:600]
        again = f"python -m tests.campaign --seed {seed} --only {kind} --case {case}"
        tally.failures.append(f"FAILED {kind} {case}: {line} | {again}")
        print(tally.failures[-1], flush=True)
        if not isinstance(error, Failure) and len(tally.failures) == 1:
            sys.excepthook(type(error), error, error.__traceback__)
    else:
        tally.labels[outcome.label] += 1
        if outcome.figure > tally.worst:
            tally.worst, tally.worst_case = outcome.figure, case
    tally.cases += 1
    tally.seconds += time.perf_counter() - begin


def campaign(kinds: Sequence[str], seed: int, seconds: float, cases: float) -> dict[str, Tally]:
    """Runs cases of all kinds, each kind for the same time, until the time or the cases are up."""
    begin = reported = time.perf_counter()
    tallies = {kind: Tally() for kind in kinds}
    while time.perf_counter() - begin < seconds:
        open_kinds = [kind for kind in kinds if tallies[kind].cases < cases]
        if not open_kinds:
            break
        kind = min(open_kinds, key=lambda kind: tallies[kind].seconds)
        run_case(tallies[kind], kind, seed, tallies[kind].cases)
        if sum(tally.cases for tally in tallies.values()) % CASES_IN_MEMORY == 0:
            jax.clear_caches()
        if time.perf_counter() - reported > REPORT_SECONDS:
            reported = time.perf_counter()
            counts = ", ".join(f"{kind} {tally.cases}" for kind, tally in tallies.items())
            failures = sum(len(tally.failures) for tally in tallies.values())
            print(f"{reported - begin:.0f} s: {counts}; failures {failures}", flush=True)
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """The figures, one line per kind."""
    lines = [f"{'kind':12} {'cases':>6} {'failures':>8} {'largest':>9}  of case; what it is"]
    for kind, tally in tallies.items():
        figure = f"{tally.worst:9.3g}  {tally.worst_case}; {KINDS[kind].FIGURE}"
        lines.append(f"{kind:12} {tally.cases:6} {len(tally.failures):8} {figure}")
        counts = ", ".join(f"{label} {count}" for label, count in tally.labels.most_common())
        lines.append(f"{'':12} {counts}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the campaign; returns 1 if a case failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign", description="Random cases against references."
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to run")
    parser.add_argument("--cases", type=int, help="end after this many cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--only", choices=KINDS, help="one kind of case")
    parser.add_argument("--case", type=int, help="one case of the kind that --only names")
    options = parser.parse_args(arguments)
    if options.case is not None and options.only is None:
        parser.error("--case needs --only")
    kinds = [options.only] if options.only else list(KINDS)
    print(f"campaign --seed {options.seed}: {shlex.join(kinds)}, jax {jax.__version__}", flush=True)
    with jax.enable_x64(True), compiled_once():
        if options.case is not None:
            tallies = {options.only: Tally()}
            run_case(tallies[options.only], options.only, options.seed, options.case)
        else:
            cases = math.inf if options.cases is None else options.cases
            tallies = campaign(kinds, options.seed, 60 * options.minutes, cases)
    print(table(tallies))
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())

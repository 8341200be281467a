"""The command line: `python -m benchmarks list | run [SUITE...]`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks import fit, fused, scale, tables
from benchmarks.cases import SUITES
from benchmarks.run import environment, run_case

RESULTS = Path(__file__).parent / "results"
# Who prints the records of a suite; `tables` those of `core`, which do not name it.
PRINTERS = {"fused": fused, "fit": fit, "scale": scale}
PAIRS = 41
QUICK_PAIRS = 9


def main(arguments: Sequence[str] | None = None) -> int:
    """List or run; the exit status is 1 where a result is wrong, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show suites, shapes and peers")
    run = commands.add_parser("run", help="measure softjax beside its peers")
    run.add_argument("suites", nargs="*", metavar="SUITE", help="all of them where none is named")
    run.add_argument(
        "--quick", action="store_true", help=f"{QUICK_PAIRS} pairs, not {PAIRS}; no large fits"
    )
    run.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    run.add_argument("--out", type=Path, metavar="FILE", help="where to write the JSON lines")
    options = parser.parse_args(arguments)
    # A pipe has no width of its own; the tables need this much.
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.command == "list":
        console.print(tables.cases_table())
        return 0

    suites = options.suites or list(SUITES)
    if unknown := set(suites) - set(SUITES):
        run.error(f"unknown suite {', '.join(sorted(unknown))}; there is {', '.join(SUITES)}")
    cases = [case for suite in suites for case in SUITES[suite] if options.only in case.name]
    if options.quick:
        cases = [case for case in cases if getattr(case, "quick", True)]
    if not cases:
        run.error(f"no case's name holds {options.only!r}; one name is {SUITES[suites[0]][0].name}")
    pairs = QUICK_PAIRS if options.quick else PAIRS
    return _run(cases, pairs, options.out, "-".join(suites), console)


def _run(cases: Sequence[Any], pairs: int, out: Path | None, suite: str, console: Console) -> int:
    """Measure the cases, write each record as soon as it is there, and print the tables."""
    head = environment() | {"suite": suite}
    stamp = head["date"][:19].replace(":", "-")
    out = out or RESULTS / f"{stamp}-{head['platform']}-{suite}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"{head['device']}, {head['processor']}, {head['cores']} cores", highlight=False)
    records, status = [], 0
    with out.open("w") as file:
        print(json.dumps(head), file=file, flush=True)
        try:
            for case in track(cases, "Measuring", console=Console(stderr=True)):
                for record in run_case(case, pairs):
                    print(json.dumps(record), file=file, flush=True)
                    records.append(record)
        except KeyboardInterrupt:
            console.print("Interrupted: what was measured so far is kept.")
            status = 130
    for name in dict.fromkeys(record.get("suite", "core") for record in records):
        printer = PRINTERS.get(name, tables)
        own = [record for record in records if record.get("suite", "core") == name]
        for table in printer.results_tables(own):
            console.print(table)
        console.print(printer.summary(own), highlight=False, soft_wrap=True)
    console.print(f"Written to {out}", highlight=False, soft_wrap=True)
    return status or int(any(record.get("wrong", "ratio" not in record) for record in records))


if __name__ == "__main__":
    sys.exit(main())

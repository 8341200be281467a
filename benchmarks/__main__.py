"""The commands `python -m benchmarks list | run | aot | compare | report | docs | baselines`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import track

from benchmarks import (
    accuracy,
    aot,
    aot_cases,
    baselines,
    cold,
    compare,
    docs,
    fit,
    fused,
    inference,
    many,
    measure,
    memory,
    results,
    roofline,
    scale,
    tables,
    targets,
)
from benchmarks.cases import SUITES
from benchmarks.environment import environment
from benchmarks.peers import PEERS
from benchmarks.run import measured
from softjax import _files

# Who prints the records of a suite; `tables` those of `core`.
PRINTERS = {
    "accuracy": accuracy,
    "fused": fused,
    "fit": fit,
    "many": many,
    "cold": cold,
    "inference": inference,
    "scale": scale,
    "aot": aot,
}
# Missing cases that are named; the others are counted.
SHOWN = 10
# Whose records hold the work of their cases.
WITH_ROOFLINE = ("core", "fused")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 1 where a figure is wrong, 2 for a bad file, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show suites, shapes and peers")

    run = commands.add_parser("run", help="measure softjax beside its peers")
    run.add_argument("suites", nargs="*", metavar="SUITE", help="all of them where none is named")
    quick = f"{measure.QUICK_PAIRS} pairs, not {measure.PAIRS}, and the short cases"
    run.add_argument("--quick", action="store_true", help=quick)
    run.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    run.add_argument("--out", type=Path, metavar="FILE", help="where to write the JSON lines")
    compiling = commands.add_parser("aot", help="compile for a device that is not there, and count")
    compiling.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(aot_cases.SUITES))
    place = "tpu:v5e:2x2, tpu:v5p:2x2x1, gpu:h100 and the like"
    compiling.add_argument("--target", required=True, help=place)
    compiling.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    compiling.add_argument("--out", type=Path, metavar="FILE", help="where to write the JSON lines")
    held = "fail where one of a few programs costs more than its committed figures"
    compiling.add_argument("--gate", action="store_true", help=held)
    anew = "write the figures that --gate holds anew"
    compiling.add_argument("--write-gate", action="store_true", help=anew)
    comparison = commands.add_parser("compare", help="what got slower or larger beyond the noise")
    comparison.add_argument("before", type=Path, metavar="A", help="a result file")
    comparison.add_argument("after", type=Path, metavar="B", help="a later one")
    page = commands.add_parser("report", help="one page of tables and pictures")
    page.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results, or folders")
    page.add_argument("--out", type=Path, default=Path("benchmarks.html"), help="the HTML page")
    page.add_argument("--markdown", type=Path, metavar="FILE", help="its tables as Markdown")
    page.add_argument("--github", type=Path, metavar="FILE", help="for github-action-benchmark")
    write = commands.add_parser("docs", help="write the figures in README and docs anew")
    write.add_argument("--check", action="store_true", help="write nothing; fail where one differs")
    commands.add_parser("baselines", help="write the figures that the tests hold anew")
    options = parser.parse_args(arguments)

    try:
        return _do(options, parsers=(run, compiling))
    except results.ResultError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _do(
    options: argparse.Namespace,
    parsers: tuple[argparse.ArgumentParser, argparse.ArgumentParser],
) -> int:
    """Run the command; the parsers of `run` and `aot` say what is wrong with their options."""
    run, compiling = parsers
    # A pipe has no width of its own; the tables need this much.
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.command == "list":
        console.print(tables.cases_table())
        return 0
    if options.command == "compare":
        return _compare(results.read(options.before), results.read(options.after), console)
    if options.command == "docs":
        return _docs(options.check, console)
    if options.command == "baselines":
        baselines.write()
        console.print(f"Written to {baselines.FILE}", highlight=False, soft_wrap=True)
        return 0
    if options.command == "report":
        return _report(options, console)
    if options.command == "aot":
        return _aot(options, compiling)
    return _run(options, run, console)


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser, console: Console) -> int:
    """Measure the cases, write each record as soon as it is there, and print the tables."""
    suites = options.suites or list(SUITES)
    if unknown := set(suites) - set(SUITES):
        parser.error(f"unknown suite {', '.join(sorted(unknown))}; there is {', '.join(SUITES)}")
    cases = [
        (suite, case)
        for suite in suites
        for case in SUITES[suite]
        if options.only in case.name
        and (not options.quick or getattr(case, "quick", True))
        and (not options.quick or options.suites or getattr(case, "short", True))
    ]
    if not cases:
        name = SUITES[suites[0]][0].name
        parser.error(f"no case's name holds {options.only!r}; one name is {name}")

    head = environment() | {"suite": "-".join(suites), "quick": options.quick, "only": options.only}
    stamp = head["date"][:19].replace(":", "-")
    kind = "-quick" if options.quick else ""
    out = options.out or results.RESULTS / f"{stamp}-{head['platform']}-{head['suite']}{kind}.jsonl"
    file = _opened(out, parser)
    console.print(f"{head['device']}, {head['processor']}, {head['cores']} cores", highlight=False)
    for peer in PEERS:
        if peer.absence:
            console.print(f"absent: {peer.name}, {peer.absence}", highlight=False)
    with file:
        results.write(head, file)
        records, status = _measure(cases, options.quick, file, console)
    _print(records, console)
    console.print(f"Written to {out}", highlight=False, soft_wrap=True)
    return status or int(any(map(_is_bad, records)))


def _aot(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compile for the target; the exit status is 1 where a case fails or the gate is closed."""
    # The table of two programs a row is wide.
    console = Console(width=None if sys.stdout.isatty() else 230)
    suites = options.suites or list(aot_cases.SUITES)
    if unknown := set(suites) - set(aot_cases.SUITES):
        known = ", ".join(aot_cases.SUITES)
        parser.error(f"unknown suite {', '.join(sorted(unknown))}; there is {known}")
    try:
        target = targets.target(options.target)
    except targets.UnknownTarget as error:
        parser.error(str(error))
    if options.gate or options.write_gate:
        lines, compared = aot.gate(target, write=options.write_gate)
        for line in [*lines, compared]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return int(bool(lines))

    head = environment() | aot.environment_of(target) | {"only": options.only, "quick": False}
    head["versions"] |= aot.versions_of(target)
    name = f"{head['date'][:10]}-{aot.file_name(target)}-aot.jsonl"
    out = options.out or results.RESULTS / name
    console.print(f"{target.name}: {head['device']}, {target.compiler}", highlight=False)
    found = []
    with _opened(out, parser) as file:
        results.write(head, file)
        try:
            for record in aot.records(target, suites, options.only):
                results.write(record, file)
                found.append(record)
                status = record.get("error", "").split("\n")[0][:150] or ""
                print(f"{record['case']} {status}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            console.print("Interrupted: what was compiled so far is kept.")
            return 130
    _print(found, console)
    console.print(f"Written to {out}", highlight=False, soft_wrap=True)
    return int(any(record["record"] == "failure" for record in found))


def _opened(out: Path, parser: argparse.ArgumentParser) -> TextIO:
    """The file to write to, or one line on why it cannot be."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.open("w")
    except OSError as error:
        parser.error(f"cannot write to {out} ({error.strerror}); name another place by --out FILE")


def _is_bad(record: results.Record) -> bool:
    """Whether a case raised or softjax is wrong; a peer that is wrong is reported, no more."""
    if record["record"] == "failure":
        return True
    ours = record.get("softjax", {})
    return not ours.get("correct", not record.get("wrong", False))


def _measure(
    cases: Sequence[tuple[str, Any]], quick: bool, file: TextIO, console: Console
) -> tuple[list[results.Record], int]:
    """The records of all cases, each written at once: an interrupt keeps what there is."""
    records = []
    pairs = measure.QUICK_PAIRS if quick else measure.PAIRS
    try:
        if any(suite in WITH_ROOFLINE for suite, _ in cases):
            results.write(roofline.ceilings(), file)
        for suite, case in track(cases, "Measuring", console=Console(stderr=True)):
            for record in measured(suite, case, pairs):
                results.write(record, file)
                records.append(record)
    except KeyboardInterrupt:
        console.print("Interrupted: what was measured so far is kept.")
        return records, 130
    return records, 0


def _print(records: Sequence[results.Record], console: Console) -> None:
    found = [record for record in records if record["record"] == "result"]
    for suite in dict.fromkeys(map(results.suite_of, found)):
        printer = PRINTERS.get(suite, tables)
        own = [record for record in found if results.suite_of(record) == suite]
        for table in printer.results_tables(own):
            console.print(table)
        console.print(printer.summary(own), highlight=False, soft_wrap=True)
    for record in records:
        if record["record"] == "failure":
            asked = f", {record['bytes']} bytes asked" if record["bytes"] else ""
            line = f"{record['kind']}{asked}: {record['case']}: {record['error'].splitlines()[0]}"
            console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)


def _compare(before: results.Run, after: results.Run, console: Console) -> int:
    """Print what changed; the exit status is 1 where anything got worse."""
    changes = compare.compare(before, after)
    for line in compare.differences(before, after):
        console.print(f"differs: {line}", highlight=False, markup=False, soft_wrap=True)
    missing = compare.missing(before, after)
    for name in missing[:SHOWN]:
        console.print(f"missing in the second: {name}", highlight=False, soft_wrap=True)
    if len(missing) > SHOWN:
        console.print(f"and {len(missing) - SHOWN} more", highlight=False)
    for name, found in (
        ("Worse", [change for change in changes if change.worse]),
        ("Better", [change for change in changes if change.better]),
    ):
        if found:
            console.print(tables.changes_table(name, found))
    worse = sum(change.worse for change in changes)
    verdict = f"{worse} got worse" if worse else "nothing got slower, larger or less accurate"
    for suite, factor in compare.sensitivity(changes).items():
        console.print(
            f"{suite}: only slowdowns above {factor:.2f}x can be detected in this run",
            highlight=False,
        )
    console.print(f"{len(changes)} figures compared: {verdict} beyond the noise", highlight=False)
    return int(worse > 0)


def _report(options: argparse.Namespace, console: Console) -> int:
    """Write the page, and what else is asked for."""
    from benchmarks import page, report  # matplotlib, which nothing else here needs

    for path in filter(None, (options.out, options.markdown, options.github)):
        try:
            _files.try_file(path)
        except OSError as error:
            raise results.ResultError(f"{path}: {error.strerror}.") from error
    runs = results.read_all(options.files)
    sections = report.sections(runs)
    texts = {options.out: page.page(sections)}
    if options.markdown:
        texts[options.markdown] = page.markdown(sections)
    if options.github:
        texts[options.github] = json.dumps(results.github(runs), indent=1)
    for path, text in texts.items():
        with _files.whole(path) as draft:
            draft.write_text(text, encoding="utf-8")
        console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def _docs(check: bool, console: Console) -> int:
    """Bring the figures of the documentation up to date; with `check`, 1 where they are not."""
    stale = docs.stale() if check else docs.write()
    for path in stale:
        console.print(f"{'Stale' if check else 'Written'}: {path}", highlight=False, soft_wrap=True)
    return int(check and bool(stale))


if __name__ == "__main__":
    memory.keep_memory()
    sys.exit(main())

"""The commands `python -m benchmarks list | run | aot | compare | report | docs | baselines`."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import track

from benchmarks import (
    aot,
    aot_cases,
    baselines,
    compare,
    core,
    docs,
    measure,
    memory,
    results,
    roofline,
    tables,
    targets,
)
from benchmarks.environment import environment
from benchmarks.peers import PEERS
from benchmarks.results import ResultError, Row
from benchmarks.suites import APART, SUITES, measured
from softjax import _files

# Up to this number, missing cases are listed; more of them are only counted.
SHOWN = 10
# The suites whose rows state the work of their cases, for the roofline.
WITH_ROOFLINE = ("core", "fused")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status is 1 for a wrong figure, 2 for a bad file, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show suites, shapes and peers").set_defaults(do=_list)

    run = commands.add_parser("run", help="measure softjax and its peers")
    apart = " and ".join(APART)
    run.add_argument("suites", nargs="*", metavar="SUITE", help=f"default: all but {apart}")
    quick = f"only short cases, {measure.QUICK_PAIRS} pairs instead of {measure.PAIRS}"
    run.add_argument("--quick", action="store_true", help=quick)
    run.set_defaults(do=_run)
    compiling = commands.add_parser("aot", help="compile for an absent device, and count its costs")
    compiling.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(aot_cases.SUITES))
    place = "such as tpu:v5e:2x2, tpu:v5p:2x2x1 or gpu:h100"
    compiling.add_argument("--target", required=True, help=place)
    held = "fail if one of a few programs costs more than its committed figures"
    compiling.add_argument("--gate", action="store_true", help=held)
    anew = "update the committed figures that --gate compares"
    compiling.add_argument("--write-gate", action="store_true", help=anew)
    compiling.set_defaults(do=_aot)
    for command in (run, compiling):
        command.add_argument(
            "--only", default="", metavar="TEXT", help="only cases whose name contains TEXT"
        )
        command.add_argument(
            "--out", type=Path, metavar="FILE", help="where to write the JSON lines"
        )
    comparison = commands.add_parser(
        "compare", help="show what got slower or larger beyond the noise"
    )
    comparison.add_argument("before", type=Path, metavar="A", help="a result file")
    comparison.add_argument("after", type=Path, metavar="B", help="a later result file")
    comparison.set_defaults(do=_compare)
    page = commands.add_parser("report", help="write a page of verdicts, tables and pictures")
    page.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="result files, or folders of them"
    )
    page.add_argument("--out", type=Path, default=Path("benchmarks.html"), help="the HTML page")
    page.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown"
    )
    page.add_argument(
        "--github", type=Path, metavar="FILE", help="also write for github-action-benchmark"
    )
    page.set_defaults(do=_report)
    write = commands.add_parser("docs", help="update the figures in README and docs")
    write.add_argument(
        "--check", action="store_true", help="write nothing; fail if a figure differs"
    )
    write.set_defaults(do=_docs)
    anew = "update the committed figures that the tests compare"
    commands.add_parser("baselines", help=anew).set_defaults(do=_baselines)
    options = parser.parse_args(arguments)
    # A pipe has no width; the tables need this many columns.
    console = Console(width=None if sys.stdout.isatty() else 230, highlight=False, soft_wrap=True)
    try:
        return options.do(options, console)
    except ResultError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _list(options: argparse.Namespace, console: Console) -> int:
    """Prints the suites, the shapes and the peers, also those that cannot be measured here."""
    table = tables.rich_table("What can be run", "kind", "name", "")
    for suite, cases in SUITES.items():
        quick = sum(getattr(case, "quick", True) for case in cases)
        table.add_row("suite", suite, f"{len(cases)} cases, {quick} of them with --quick")
    for shape in core.SHAPES:
        table.add_row("shape", shape.name, f"({shape.examples}, {shape.classes}): {shape.origin}")
    for peer in PEERS:
        table.add_row("peer", peer.name, peer.absence or f"{peer.distribution} {peer.version}")
    console.print(table)
    return 0


def _known(asked: Sequence[str], suites: Iterable[str]) -> list[str]:
    """The suites with the given names, or all suites; an unknown name is an error."""
    if unknown := set(asked) - set(suites):
        there = ", ".join(suites)
        raise ResultError(f"unknown suite {', '.join(sorted(unknown))}; there is {there}.")
    return list(asked or suites)


def _run(options: argparse.Namespace, console: Console) -> int:
    """Measures the cases, writes each row as soon as it is measured, and prints the tables."""
    suites = _known(options.suites, SUITES)
    suites = suites if options.suites else [suite for suite in suites if suite not in APART]
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
        raise ResultError(f"no case's name holds {options.only!r}; one name is {name}.")
    head = environment() | {"suite": "-".join(suites), "quick": options.quick, "only": options.only}
    stamp = head["date"][:19].replace(":", "-")
    kind = "-quick" if options.quick else ""
    out = options.out or results.RESULTS / f"{stamp}-{head['platform']}-{head['suite']}{kind}.jsonl"
    console.print(f"{head['device']}, {head['processor']}, {head['cores']} cores")
    for peer in PEERS:
        if peer.absence:
            console.print(f"absent: {peer.name}, {peer.absence}")
    pairs = measure.QUICK_PAIRS if options.quick else measure.PAIRS

    def records(file: TextIO) -> Iterable[Row]:
        if any(suite in WITH_ROOFLINE for suite in suites):
            results.write(roofline.ceilings(), file)
        for suite, case in track(cases, "Measuring", console=Console(stderr=True)):
            yield from measured(suite, case, pairs)

    return _write(out, head, records, console)


def _aot(options: argparse.Namespace, console: Console) -> int:
    """Compiles for the target; the exit status is 1 if a case fails or exceeds the gate."""
    suites = _known(options.suites, aot_cases.SUITES)
    target = targets.target(options.target)
    if options.gate or options.write_gate:
        lines, compared = aot.gate(target, write=options.write_gate)
        for line in [*lines, compared]:
            console.print(line, markup=False)
        return int(bool(lines))
    head = aot.environment_of(target) | {"only": options.only}
    name = re.sub(r"[^\w.]+", "-", target.name)
    out = options.out or results.RESULTS / f"{head['date'][:10]}-{name}-aot.jsonl"
    console.print(f"{target.name}: {head['device']}, {target.compiler}")
    return _write(out, head, lambda _: aot.records(target, suites, options.only), console)


def _write(out: Path, head: Row, records, console: Console) -> int:
    """Writes each record at once, so that an interrupt loses none, and prints the tables."""
    found, status = [], 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("w")
    except OSError as error:
        reason = f"cannot write to {out} ({error.strerror})"
        raise ResultError(f"{reason}; name another place by --out FILE.") from error
    with file:
        results.write(head, file)
        try:
            for record in records(file):
                results.write(record, file)
                found.append(record)
        except KeyboardInterrupt:
            console.print("Interrupted: what was measured so far is kept.")
            status = 130
    rows = [record for record in found if record["record"] == "result"]
    failures = [record for record in found if record["record"] == "failure"]
    for suite in dict.fromkeys(record["suite"] for record in found):
        own = [row for row in rows if row["suite"] == suite]
        console.print(tables.suite_table(suite, own))
        failed = sum(record["suite"] == suite for record in failures)
        console.print(f"{suite}: {results.verdict(own, failed)}")
    for record in failures:
        asked = f", {record['bytes']} bytes asked" if record["bytes"] else ""
        line = f"{record['kind']}{asked}: {record['case']}: {record['error'].splitlines()[0]}"
        console.print(line, style="red", markup=False)
    console.print(f"Written to {out}")
    # A wrong result of a peer is reported, but is not an error.
    wrong = any(row.get("wrong") and results.is_softjax(row) for row in rows)
    return status or int(bool(failures) or wrong)


def _compare(options: argparse.Namespace, console: Console) -> int:
    """Prints what changed; the exit status is 1 if anything got worse."""
    before, after = results.read(options.before), results.read(options.after)
    changes = compare.compare(before, after)
    for line in compare.differences(before, after):
        console.print(f"differs: {line}", markup=False)
    missing = compare.missing(before, after)
    for name in missing[:SHOWN]:
        console.print(f"missing in the second: {name}")
    if len(missing) > SHOWN:
        console.print(f"and {len(missing) - SHOWN} more")
    for name, found in (
        ("Worse", [change for change in changes if change.worse]),
        ("Better", [change for change in changes if change.better]),
    ):
        if found:
            console.print(tables.changes_table(name, found))
    worse = sum(change.worse for change in changes)
    verdict = f"{worse} got worse" if worse else "nothing got slower, larger or less accurate"
    for suite, factor in compare.sensitivity(changes).items():
        console.print(f"{suite}: only slowdowns above {factor:.2f}x can be detected in this run")
    console.print(f"{len(changes)} figures compared: {verdict} beyond the noise")
    return int(worse > 0)


def _report(options: argparse.Namespace, console: Console) -> int:
    """Writes the page, and the other formats that are asked for."""
    from benchmarks import report  # pandas and Altair, which nothing else here needs

    for path in filter(None, (options.out, options.markdown, options.github)):
        try:
            _files.try_file(path)
        except OSError as error:
            raise ResultError(f"{path}: {error.strerror}.") from error
    runs = results.read_all(options.files)
    sections = report.sections(runs)
    texts = {options.out: report.page(sections)}
    if options.markdown:
        texts[options.markdown] = report.markdown(sections)
    if options.github:
        texts[options.github] = json.dumps(results.github(runs), indent=1)
    for path, text in texts.items():
        with _files.whole(path) as draft:
            draft.write_text(text, encoding="utf-8")
        console.print(f"Written to {path}")
    return 0


def _docs(options: argparse.Namespace, console: Console) -> int:
    """Updates the figures of the documentation; with `check`, exits with 1 if any is stale."""
    stale = docs.stale() if options.check else docs.write()
    if not options.check:
        docs.draw()
    for path in stale:
        console.print(f"{'Stale' if options.check else 'Written'}: {path}")
    return int(options.check and bool(stale))


def _baselines(options: argparse.Namespace, console: Console) -> int:
    """Writes the figures of this checkout as the figures that the tests compare with."""
    baselines.write()
    console.print(f"Written to {baselines.FILE}")
    return 0


if __name__ == "__main__":
    memory.keep_memory()
    sys.exit(main())

"""Cases and the records of the suite `core` as tables for a terminal."""

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from benchmarks.cases import SHAPES, SUITES
from benchmarks.compare import Change
from benchmarks.peers import PEERS
from benchmarks.run import Record


def cases_table() -> Table:
    """The suites, the shapes and the peers, with those that cannot be measured here."""
    table = _table("What can be run", "kind", "name", "")
    for suite, cases in SUITES.items():
        quick = sum(getattr(case, "quick", True) for case in cases)
        table.add_row("suite", suite, f"{len(cases)} cases, {quick} of them with --quick")
    for shape in SHAPES:
        table.add_row("shape", shape.name, f"({shape.examples}, {shape.classes}): {shape.origin}")
    for peer in PEERS:
        table.add_row("peer", peer.name, peer.absence or f"{peer.distribution} {peer.version}")
    return table


def results_tables(records: Sequence[Record]) -> list[Table]:
    """One table a shape, softjax before the peer in each pair of figures."""
    tables: dict[str, Table] = {}
    for record in records:
        shape = record["shape"]
        title = f"{shape['name']} ({shape['examples']}, {shape['classes']}) {record['dtype']}"
        columns = ("peer", "time, ms", "ratio (95 %)", "asked", "compile, ms", "temp., MiB")
        table = tables.setdefault(title, _table(title, "softjax / peer", *columns))
        table.add_row(*_cells(record))
    return list(tables.values())


def summary(records: Sequence[Record]) -> str:
    """One line: how many ratios are within their bound, and what is wrong."""
    timed = [record for record in records if "ratio" in record]
    asked = [record for record in timed if record["bound"] is not None]
    met = sum(record["met"] for record in asked)
    larger = sum(map(larger_temporaries, records))
    return (
        f"core: {met} of {len(asked)} ratios within the asked bound, "
        f"{larger} temporaries the size of the input that the peer does without, "
        f"{len(records) - len(timed)} wrong results"
    )


def changes_table(title: str, changes: Sequence[Change]) -> Table:
    """What changed beyond the noise, the worst first."""
    table = _table(title, "what", "where", "before", "after", "change (interval)")
    for change in sorted(changes, key=lambda c: -abs(math.log((c.after or 1) / (c.before or 1)))):
        figures = (f"{value:.4g}" for value in (change.before, change.after))
        table.add_row(change.kind, change.name, *figures, change.interval)
    return table


def larger_temporaries(record: Record) -> bool:
    """Whether softjax holds a temporary the size of the input where the peer holds less."""
    ours, theirs = (record[side]["temporary_bytes"] for side in ("softjax", "peer"))
    return None not in (ours, theirs) and ours >= record["logits_bytes"] and ours > theirs


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first)
    for column in others:
        table.add_column(column, no_wrap=True)
    return table


def _cells(record: Record) -> tuple[str, ...]:
    sides = record["softjax"], record["peer"]
    asked = "" if record["bound"] is None else f"<= {record['bound']}"
    if "ratio" in record:
        time = " / ".join(f"{1e3 * side['seconds']['median']:.3g}" for side in sides)
        ratio = "{median:.2f} ({low:.2f}, {high:.2f})".format(**record["ratio"])
        asked = asked if record["met"] else f"[red]> {record['bound']}[/]"
    else:
        wrong = [side["name"] for side in sides if not side["correct"]]
        time, ratio, asked = "", f"[red]wrong: {', '.join(wrong)}[/]", ""
    temporaries = " / ".join(_mebibytes(side["temporary_bytes"]) for side in sides)
    if larger_temporaries(record):
        temporaries = f"[red]{temporaries}[/]"
    return (
        f"{record['operation']} {record['mode'].replace('_', ' ')}"
        + (", donated" if record.get("donated") else ""),
        record["peer"]["name"],
        time,
        ratio,
        asked,
        " / ".join(map(_compiling, sides)),
        temporaries,
    )


def _compiling(side: Record) -> str:
    """Milliseconds to lower and compile; nothing where there is nothing to compile."""
    seconds = [side[key] for key in ("lower_seconds", "compile_seconds") if side[key] is not None]
    return f"{1e3 * sum(seconds):.0f}" if seconds else "-"


def _mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f}"

"""Rows of results as tables, with the same columns for a terminal and for a page."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.results import RATIO, Row, missed


def number(value: float | None) -> str:
    """Three digits, or all digits before the point if there are more, up to ten."""
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e10 else f"{value:.3g}"


def interval(median: float | None, low: float | None, high: float | None) -> str:
    """A ratio, and its interval if it has one."""
    if median is None:
        return ""
    known = low is not None and high is not None and low < high
    return f"{median:.2f} ({low:.2f}, {high:.2f})" if known else f"{median:.2f}"


def scaled(key: str, factor: float) -> Callable[[Row], str]:
    """A field of a row in another unit; empty if it is unknown."""
    return lambda row: "" if row.get(key) is None else number(factor * row[key])


def error(row: Row) -> str:
    """The error, with its unit if it has one."""
    if row.get("wrong"):
        return "wrong" if row.get("error") is None else f"wrong: {number(row['error'])}"
    if "error" not in row:
        return row.get("failure", "")[:60]
    return f"{number(row['error'])} {row.get('unit', '')}".strip()


def checks(row: Row) -> str:
    """The measured values beside the largest allowed values."""
    named = (row.get("checks") or {}).items()
    return ", ".join(
        f"{name} {'unknown' if got is None else number(got)} {'>' if name in missed(row) else '≤'} "
        f"{number(most)}"
        for name, (got, most) in named
    )


def _counts(key: str) -> Callable[[Row], str]:
    return lambda row: ", ".join(f"{number(v)} {k}" for k, v in (row.get(key) or {}).items())


# The columns with the functions that give their cells; a table leaves out empty columns.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"].replace("_", " "),
    "by": lambda row: row["side"],
    "time, ms": scaled("seconds", 1e3),
    "estimated, ms": scaled("estimated_seconds", 1e3),
    "wall, ms": scaled("wall_seconds", 1e3),
    "ratio (95 %)": lambda row: interval(*map(row.get, RATIO)),
    "roofline": lambda row: f"{row['roofline']:.0%}" if row.get("roofline") else "",
    "temporaries, MB": scaled("temporary_bytes", 1e-6),
    "peak, MB": scaled("peak_bytes", 1e-6),
    "first peak, MB": scaled("first_peak_bytes", 1e-6),
    "passes": scaled("passes", 1),
    "kernels": scaled("kernels", 1),
    "launches": scaled("launches", 1),
    "moved, MB": scaled("moved_bytes", 1e-6),
    "products": _counts("products"),
    "sent, MB": scaled("wire_bytes", 1e-6),
    "collectives": lambda row: (
        _counts("collectives")(row)
        if isinstance(row.get("collectives"), dict)
        else scaled("collectives", 1)(row)
    ),
    "compile, s": scaled("compile_seconds", 1),
    "suboptimality": scaled("suboptimality", 1),
    "error": error,
    "asked": checks,
}


def cells(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of a table of some rows."""
    lines = [[show(row) for show in COLUMNS.values()] for row in rows]
    used = [k for k in range(len(COLUMNS)) if any(line[k] for line in lines)]
    names = list(COLUMNS)
    return [names[k] for k in used], [[line[k] for k in used] for line in lines]


def suite_table(suite: str, rows: Sequence[Row]) -> Table:
    """The rows of a suite for a terminal; a line is red if it misses a bound or is wrong."""
    header, lines = cells(rows)
    table = rich_table(suite, *header)
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*line, style="red" if missed(row) or row.get("wrong") else None)
    return table


def changes_table(title: str, changes: Sequence[Any]) -> Table:
    """What changed beyond the noise, the largest change first."""
    table = rich_table(title, "what", "where", "before", "after", "change (interval)")
    for change in sorted(changes, key=lambda c: -abs(math.log((c.after or 1) / (c.before or 1)))):
        figures = (f"{value:.4g}" for value in (change.before, change.after))
        table.add_row(change.kind, change.name, *figures, change.interval)
    return table


def rich_table(title: str, *columns: str) -> Table:
    """An empty table; only the first column is wrapped."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for k, column in enumerate(columns):
        table.add_column(column, no_wrap=k > 0)
    return table


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [list(header), ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)

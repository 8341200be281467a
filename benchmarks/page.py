"""Sections of a report as one HTML page, which loads nothing, or as Markdown."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells of text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading, a text, a table, and what draws its pictures: captions and SVG."""

    title: str
    text: str
    table: Table
    draw: Callable[[], Sequence[tuple[str, str]]] = tuple


def page(sections: Sequence[Section]) -> str:
    """One HTML page with everything in it, light or dark as the reader has it."""
    return PAGE.replace("BODY", "\n".join(map(_section, sections)))


def markdown(sections: Sequence[Section]) -> str:
    """The texts and the tables."""
    parts = []
    for section in sections:
        parts += [f"## {section.title}", section.text, markdown_table(section.table)]
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown_table(table: Table) -> str:
    """A table of Markdown; bars within cells are escaped."""
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _section(section: Section) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    for caption, picture in section.draw():
        parts.append(f"<figure><figcaption>{html.escape(caption)}</figcaption>{picture}</figure>")
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in section.table.rows
    )
    parts.append(f"<div class=table><table><tr>{header}</tr>{rows}</table></div></section>")
    return "\n".join(parts)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>softjax benchmarks</title>
<style>
:root { --ink: #1a1a1a; --paper: #ffffff; --grid: #e3e3e3; --soft: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181c; --grid: #34383f; --soft: #1f2228; }
}
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif;
  margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 3rem; }
figure { margin: 1.5rem 0; overflow-x: auto; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
svg { max-width: 100%; height: auto; }
.table { overflow: auto; max-height: 40rem; border: 1px solid var(--grid); }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  width: 100%; }
th { position: sticky; top: 0; background: var(--soft); text-align: left; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--grid); white-space: nowrap; }
</style>
</head>
<body>
<h1>softjax benchmarks</h1>
BODY
</body>
</html>
"""

"""A set of result files as one self-contained page, which opens with a verdict for each suite.

The figures of several devices are side by side. If a case was measured more than once on a device,
its last figures are shown. Its share of the roofline refers to the ceilings of the same run.
"""

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from benchmarks import pictures, roofline, tables
from benchmarks.results import Row, Run, is_softjax, verdict

ABOUT = {
    "core": "Normalizers and the loss on logits. Times are medians of pairs that alternate in one "
    "process, with intervals of 95 %.",
    "accuracy": "The largest error over lengths, scales and offsets of the logits.",
    "fused": "The loss of hidden @ kernel without its logits, beside plain and chunked forms.",
    "fit": "Whole fits of softmax regression to the same suboptimality, in CPU seconds.",
    "many": "Many fits in one call, in CPU seconds.",
    "cold": "Whole processes that import, compile and fit once, in CPU seconds.",
    "tables": "Estimators beside those of scikit-learn, in CPU seconds.",
    "inference": "A fit without a penalty, and average marginal effects with standard errors, in "
    "float64.",
    "scale": "The loss over several devices: what each sends, and what it holds.",
    "stream": "Training on a file beside training on arrays in memory; seconds for each row.",
    "kills": "Processes that were killed while they trained, and were started again.",
    "aot": "Compiled, not run: what the programs for a device that is not there read and write, "
    "hold, launch and send. The time is an estimate by the roofline.",
}
# The fields of a row that are drawn, with factor, title and caption.
DRAWN = (
    ("seconds", 1e3, "ms", "Time; less is better"),
    ("temporary_bytes", 1e-6, "MB", "Temporaries; less is better"),
)
# The figures that are drawn against the number of classes.
CURVES = (
    ("logsumexp", "value"),
    ("softmax", "value"),
    ("cross_entropy", "value"),
    ("cross_entropy", "value_and_gradient"),
)


@dataclass(frozen=True)
class Section:
    """A heading, a verdict, a text, a table, and the functions that draw captions and pictures."""

    title: str
    verdict: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    draw: Callable[[], Iterable[tuple[str, str]]] = tuple


def last_rows(runs: Sequence[Run]) -> dict[tuple[str, str, str, str], Row]:
    """The last row of each suite, case and side on each device; these four are the keys."""
    found = {}
    for run in runs:
        for row in run.rows():
            key = row["suite"], row["case"], row["side"], run.label
            found[key] = row | {"device": run.label, "roofline": share(row, run.ceilings)}
            if run.ceilings:
                found[key]["ceilings"] = run.ceilings
    return found


def share(row: Row, ceilings: Row | None) -> float | None:
    """The shortest possible time of a case on the device, divided by its measured time."""
    if ceilings is None or not row.get("seconds") or not row.get("work_bytes"):
        return None
    return roofline.ideal_seconds(row, ceilings) / row["seconds"]


def sections(runs: Sequence[Run]) -> list[Section]:
    """One section for each suite, then the failures, then the runs."""
    rows = list(last_rows(runs).values())
    failures = [(record, run.label) for run in runs for record in run.failures()]
    parts = []
    for suite in dict.fromkeys([*ABOUT, *(row["suite"] for row in rows)]):
        own = [row for row in rows if row["suite"] == suite]
        failed = sum(record["suite"] == suite for record, _ in failures)
        if own:
            header, lines = side_by_side(own)
            said = verdict(own, failed) + faster(own)
            draw = partial(draw_suite, own)
            parts.append(Section(suite, said, ABOUT.get(suite, ""), header, lines, draw))
    if failures:
        header = ("suite", "case", "what", "bytes asked", "error", "device")
        lines = [
            (r["suite"], r["case"], r["kind"], str(r["bytes"] or ""), r["error"], device)
            for r, device in failures
        ]
        parts.append(Section("What failed", f"{len(lines)} failed", "", header, lines))
    header, lines = _environments(runs)
    return [*parts, Section("Runs", f"{len(runs)} files", CEILINGS, header, lines)]


def faster(rows: Sequence[Row]) -> str:
    """The median of the ratios to the peers, in words."""
    ratios = [row["ratio"] for row in rows if row.get("ratio")]
    if not ratios:
        return ""
    middle = pd.Series(ratios).median()
    below = sum(ratio < 1 for ratio in ratios)
    return (
        f"; softjax takes {middle:.2f} of the peer's time (median), less than the peer in "
        f"{below} of {len(ratios)} cases"
    )


def side_by_side(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The table of a suite; if there are several devices, each line names its device."""
    header, lines = tables.cells(rows)
    devices = [row["device"] for row in rows]
    if len(set(devices)) == 1:
        return header, lines
    lines = [[*line[:2], device, *line[2:]] for line, device in zip(lines, devices, strict=True)]
    return [*header[:2], "device", *header[2:]], sorted(lines, key=lambda line: line[0])


def draw_suite(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Captions and pictures of measured rows; rows that were only compiled have no picture."""
    if rows[0]["suite"] != "aot":
        for caption, chart in _charts(rows[0]["suite"], rows):
            yield caption, pictures.svg(chart)


def _charts(suite: str, rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    of_rows = {row["side"] for row in rows}
    sides = sorted(of_rows, key=lambda side: (not side.startswith("softjax"), side))
    ratios = _frame(rows, "ratio", 1, "ratio_low", "ratio_high")
    if len(ratios):
        caption = "Time of softjax over that of the peer; left of 1, softjax is faster"
        yield caption, pictures.dots(ratios, "ratio of times", sides, line=1.0)
    if suite == "core":
        yield from _core(_having(rows, "operation", "mode", "dtype", "examples", "classes"), sides)
    elif suite == "scale":
        rows = _having(rows, "program", "form", "devices")
        yield "What a device sends and holds, MB, against devices", against_devices(rows)
    elif suite == "accuracy":
        errors = _frame([row for row in rows if "ulp" in row.get("unit", "")], "error", 1)
        # An error of 0 has no logarithm, and is drawn as a hundredth of a unit in the last place.
        errors[["value", "low", "high"]] = errors[["value", "low", "high"]].clip(lower=0.01)
        yield "Errors; less is better", pictures.dots(errors, "error, ulp", sides)
    else:
        for key, factor, title, caption in DRAWN:
            frame = _frame(rows, key, factor, *(("low", "high") if key == "seconds" else ()))
            if len(frame):
                yield caption, pictures.dots(frame, title, sides)


def _having(rows: Sequence[Row], *fields: str) -> list[Row]:
    """The rows that have the fields which are needed to draw them."""
    return [row for row in rows if all(row.get(field) for field in fields)]


def against_devices(rows: Sequence[Row]) -> Any:
    """The bytes that each device sends, and its temporaries, by the number of devices."""
    frame = pd.DataFrame(
        {
            "panel": panel,
            "side": f"{row['program']}, {row['form']}, {row['side']}".replace("_", " "),
            "devices": row["devices"],
            "value": row[key] / 1e6,
        }
        for row in rows
        for key, panel in (("wire_bytes", "sent"), ("temporary_bytes", "temporaries"))
        if row.get(key)
    )
    return pictures.curves(frame, "devices", "MB", sorted(frame.side.unique()), base=2)


def _frame(rows: Sequence[Row], key: str, factor: float, low: str = "", high: str = ""):
    """The data frame for `pictures.dots`: the rows in which a figure is known."""
    return pd.DataFrame(
        [
            {
                "case": row["case"].replace("_", " "),
                "side": row["side"],
                "device": row["device"],
                "value": factor * row[key],
                "low": factor * row.get(low, row[key]),
                "high": factor * row.get(high, row[key]),
            }
            for row in rows
            if row.get(key) or (key == "error" and row.get(key) is not None)
        ],
        columns=["case", "side", "device", "value", "low", "high"],
    )


def _core(rows: Sequence[Row], sides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Time and temporaries against the number of classes, and the rooflines."""
    for caption, key, factor, title in (
        ("Time", "seconds", lambda row: 1e9 / (row["examples"] * row["classes"]), "ns a logit"),
        ("Temporaries", "temporary_bytes", lambda row: 1 / row["logits_bytes"], "of the logits"),
    ):
        frame = pd.DataFrame(
            {
                "panel": f"{row['operation']}, {row['mode']}".replace("_", " "),
                "device": row["device"],
                "side": row["side"],
                "classes": row["classes"],
                "value": factor(row) * row[key],
            }
            for row in rows
            if (row["operation"], row["mode"]) in CURVES
            and row["dtype"] == "float32"
            and not row.get("donated")
            and row.get(key)
        )
        for device, own in frame.groupby("device") if len(frame) else ():
            text = f"{caption} against the number of classes (0 left out), float32, {device}"
            yield text, pictures.curves(own, "classes", title, sides)
    frame = pd.DataFrame(
        {
            "operation": f"{row['operation']}, {row['mode']}".replace("_", " "),
            "device": row["device"],
            "intensity": row["flops"] / row["work_bytes"],
            "speed": row["flops"] / row["seconds"],
            "ceiling": row["flops"] / roofline.ideal_seconds(row, row["ceilings"]),
        }
        for row in rows
        if is_softjax(row) and row.get("roofline") and row["dtype"] == "float32"
    )
    if len(frame):
        yield "Roofline of float32: what softjax reaches", pictures.roofline(frame)


CEILINGS = (
    "Copy and product are the ceilings of the roofline, measured in the run itself: a large copy "
    "and a large product of matrices in float32."
)


def _environments(runs: Sequence[Run]) -> tuple[Sequence[str], list[Sequence[str]]]:
    header = ("device", "suites", "date", "commit", "jax", "jaxlib", "driver", "copy", "product")
    lines = []
    for run in runs:
        head, ceilings = run.environment, run.ceilings
        suites = ", ".join(dict.fromkeys(row["suite"] for row in run.rows()))
        speed = ceilings and ceilings["flops_per_second"]["float32"] / 1e9
        lines.append(
            (
                run.label,
                suites + (", quick" if head.get("quick") else ""),
                head["date"][:10],
                str(head.get("commit") or "unknown")[:9]
                + ("" if head.get("clean") else ", changed"),
                head["versions"].get("jax") or "",
                head["versions"].get("jaxlib") or "",
                str(head.get("driver") or "")[:40],
                f"{ceilings['bytes_per_second'] / 1e9:,.0f} GB/s" if ceilings else "",
                f"{speed:,.0f} GFLOP/s" if ceilings else "",
            )
        )
    return header, lines


def markdown(parts: Sequence[Section]) -> str:
    """The texts and the tables."""
    texts = ["# softjax benchmarks", tables.markdown_table(("suite", "verdict"), _verdicts(parts))]
    for part in parts:
        table = tables.markdown_table(part.header, part.rows)
        texts += [f"## {part.title}", part.verdict, part.text, table]
    return "\n\n".join(filter(None, texts)) + "\n"


def page(parts: Sequence[Section]) -> str:
    """One HTML page with all pictures in it, light or dark as the reader's browser is."""
    contents = [
        (f'<a href="#{_anchor(title)}">{html.escape(title)}</a>', html.escape(said))
        for title, said in _verdicts(parts)
    ]
    body = [f"<nav>{_table(('suite', 'verdict'), contents)}</nav>", *map(_section, parts)]
    return PAGE.replace("BODY", "\n".join(body))


def _verdicts(parts: Sequence[Section]) -> list[tuple[str, str]]:
    return [(part.title, part.verdict) for part in parts]


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _section(part: Section) -> str:
    title, said, text = map(html.escape, (part.title, part.verdict, part.text))
    figures = "\n".join(
        f"<figure><figcaption>{html.escape(caption)}</figcaption>{picture}</figure>"
        for caption, picture in part.draw()
    )
    lines = [[html.escape(cell) for cell in line] for line in part.rows]
    return (
        f'<section id="{_anchor(part.title)}"><h2>{title}</h2><p><b>{said}.</b></p><p>{text}</p>\n'
        f"{figures}\n<details{' open' * (len(lines) < 20)}><summary>{len(lines)} rows</summary>"
        f"<div>{_table([html.escape(cell) for cell in part.header], lines)}</div></details>"
        "</section>"
    )


def _table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    rows = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>softjax benchmarks</title>
<style>
:root { --ink: #1a1a1a; --paper: #ffffff; --grid: #d8d8d8; --soft: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181c; --grid: #34383f; --soft: #1f2228; }
}
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif;
  margin: 1rem auto; max-width: 70rem; padding: 0 .8rem; overflow-wrap: break-word; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 3rem; }
a { color: inherit; }
figure { display: inline-block; vertical-align: top; margin: 1rem 1.5rem 1rem 0; max-width: 100%;
  overflow-x: auto; }
figcaption { font-weight: 600; margin-bottom: .3rem; max-width: 23rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { background: var(--soft); text-align: left; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--grid); vertical-align: top; }
details div { overflow: auto; max-height: 40rem; border: 1px solid var(--grid); }
details th { position: sticky; top: 0; }
details th, details td { white-space: nowrap; }
</style>
</head>
<body>
<h1>softjax benchmarks</h1>
BODY
</body>
</html>
"""

"""The figures in the documentation, written from committed result files.

A marked place in a Markdown file,

    <!-- benchmarks: core-table cpu -->
    ...
    <!-- end -->

holds what `BLOCKS` makes of the newest full run of a suite on a platform: the part of the name
before the dash is the suite.
"""

import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import fused, results, scale
from benchmarks.environment import ROOT
from benchmarks.page import Table, markdown_table
from benchmarks.results import Run

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# Not where a page quotes one.
MARK = re.compile(r"(?<!`)(<!-- benchmarks: ([\w-]+) (\w+) -->)(.*?)(<!-- end -->)", re.DOTALL)


def stale() -> list[Path]:
    """The pages with a marked place that is not what the result files say."""
    runs = results.read_all()
    return [path for path in PAGES if updated(path.read_text(), runs) != path.read_text()]


def write() -> list[Path]:
    """Bring every marked place up to date; the pages that changed."""
    runs, changed = results.read_all(), stale()
    for path in changed:
        path.write_text(updated(path.read_text(), runs))
    return changed


def updated(text: str, runs: list[Run]) -> str:
    """A page with its marked places written anew; in a line they stay in the line."""

    def block(match: re.Match[str]) -> str:
        start, name, platform, old, end = match.groups()
        if name not in BLOCKS:
            known = ", ".join(BLOCKS)
            raise ValueError(f"benchmarks: a marked place must be one of {known}, got {name!r}.")
        content = BLOCKS[name](results.newest(runs, name.split("-")[0], platform))
        return f"{start}\n{content}\n{end}" if "\n" in old else f"{start}{content}{end}"

    return MARK.sub(block, text)


def source(run: Run) -> str:
    """The file, from the root of the repository."""
    return f"`{run.path.relative_to(ROOT).as_posix()}`"


def core_met(run: Run) -> str:
    """How many of the asked ratios are met."""
    asked = [r for r in run.results("core") if r["bound"] is not None]
    return f"{sum(r.get('met', False) for r in asked)} of {len(asked)}"


def core_table(run: Run) -> str:
    """The asked ratios, one row an operation and one column a shape; bold is more than asked."""
    asked = [
        r
        for r in run.results("core")
        if r["bound"] is not None and r["mode"] not in ("eager", "process")
    ]
    shapes = list(dict.fromkeys((r["shape"]["examples"], r["shape"]["classes"]) for r in asked))
    rows: dict[str, list[str]] = {}
    for r in asked:
        mode = "" if r["mode"] == "value" else f", {r['mode'].replace('_', ' ')}"
        row = rows.setdefault(f"{r['operation']}{mode}", [f"{r['bound']:g}"])
        ratio = f"{r['ratio']['median']:.2f}" if "ratio" in r else "wrong"
        row.append(_bold(ratio, not r.get("met", False)))
    header = ("softjax / peer", "asked", *map(str, shapes))
    return markdown_table(Table(header, [(name, *row) for name, row in rows.items()]))


def fits_table(suite: str, run: Run) -> str:
    """CPU seconds of whole fits, and the ratio to the fastest peer."""
    rows = []
    for r in run.results(suite):
        if r["ratio"] is None:
            continue
        ours, fastest = _ours_and_fastest(r)
        peer = fastest["name"].removeprefix("scikit-learn ")
        shape = ", ".join(map(str, r["shape"]))
        rows.append(
            (
                f"{r['case']} ({shape}) {r['dtype']}",
                f"{ours['cpu_seconds']:.3g}",
                f"{fastest['cpu_seconds']:.3g}, {peer}",
                _bold(f"{r['ratio']:.2f}", r["ratio"] > r["bound"]),
                f"{r['bound']:g}",
            )
        )
    return markdown_table(Table(("", "softjax", "scikit-learn", "ratio", "asked"), rows))


def fit_memory_table(run: Run) -> str:
    """Megabytes beside the features, and what was asked: the fastest peer's and one copy."""
    rows = []
    for r in run.results("fit"):
        if r["ratio"] is None:
            continue
        ours, fastest = _ours_and_fastest(r)
        asked = fastest["peak_bytes"] + r["feature_bytes"]
        amounts = (ours["peak_bytes"], asked, r["feature_bytes"], ours["first_peak_bytes"])
        got, *others = (f"{amount / 1e6:.3g}" for amount in amounts)
        rows.append((f"{r['case']} {r['dtype']}", _bold(got, amounts[0] > asked), *others))
    header = ("MB", "a fit", "asked", "the features", "the first fit of a process")
    return markdown_table(Table(header, rows))


def _ours_and_fastest(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Softjax's solver, and the peer's that took the least time."""
    ours, *peers = record["solvers"]
    timed = (peer for peer in peers if "cpu_seconds" in peer)
    return ours, min(timed, key=lambda peer: peer["cpu_seconds"])


def accuracy_table(run: Run) -> str:
    """The largest errors, one row a function and dtype."""
    rows = [
        (
            r["operation"],
            r["dtype"],
            r["unit"],
            *(_error(r[side]["error"]) for side in ("softjax", "peer")),
            r["peer"]["name"],
            r["goal"],
        )
        for r in run.results("accuracy")
    ]
    header = ("function", "dtype", "unit", "softjax", "peer", "", "goal")
    return markdown_table(Table(header, rows))


def accuracy_of(operation: str, run: Run) -> str:
    """The largest error of an operation in float32, and that of the peer."""
    (r,) = (
        record
        for record in run.results("accuracy")
        if (record["operation"], record["dtype"]) == (operation, "float32")
    )
    return f"{_error(r['softjax']['error'])} | {_error(r['peer']['error'])} ({r['peer']['name']})"


def fused_memory(run: Run) -> str:
    """The temporaries of the loss of a language-model head with its gradient, MB."""
    (r,) = (
        record
        for record in run.results("fused")
        if (record["mode"], record["peer"]) == ("value_and_gradient", "plain")
    )
    ours, plain = (r[side]["temporary_bytes"] / 1e6 for side in ("softjax", "other"))
    return f"{ours:.0f} MB | {plain:.0f} MB (all logits at once)"


def fused_shape(run: Run) -> str:
    """The shape that `fused_memory` is measured with."""
    shapes = (r["shape"] for r in run.results("fused") if r["peer"] == "plain")
    shape = next(shapes)
    return f"{shape['rows']:,} tokens, {shape['features']} features, {shape['classes']:,} classes"


def fit_range(run: Run) -> str:
    """The smallest and the largest ratio of CPU seconds to the fastest peer."""
    ratios = [r["ratio"] for r in run.results("fit") if r["ratio"] is not None]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def scale_error(run: Run) -> str:
    """How far results on eight devices are from those on one, at most and relative."""
    errors = [
        r["error"]
        for r in run.results("scale")
        if r["implementation"] == "softjax" and r["devices"] == 8
    ]
    return f"{_error(max(errors))}"


def stream_text(run: Run) -> str:
    """The speed of a stream relative to arrays in memory, and the memory of both."""
    kinds = {kind: [r for r in run.records if r["record"] == kind] for kind in ("stream", "memory")}
    speeds = [
        stream["rows_per_second"] / memory["rows_per_second"]
        for stream, memory in zip(kinds["stream"], kinds["memory"], strict=True)
    ]
    most = {kind: max(r["peak_bytes"] for r in found) / 1e9 for kind, found in kinds.items()}
    return (
        f"{statistics.median(speeds):.2f} of the speed of arrays in memory, the median of "
        f"{len(speeds)} pairs, and at most {most['stream']:.2f} GB of memory against "
        f"{most['memory']:.1f}"
    )


def kills_text(run: Run) -> str:
    """What came of the kills."""
    (r,) = (record for record in run.records if record["record"] == "kills")
    return (
        f"Of {r['kills']} kills of {r['processes']} processes {r['before_they_met']} came before "
        f"they had met, and {r['amid_training']} fell into the training; {r['hung']} processes "
        f"hung, the slowest end took {r['slowest_end_seconds']:.1f} s, and of the {r['kills']} "
        f"runs, resumed, {r['resumed_to_the_same_bits']} had the bits of one left alone"
    )


# Of each block the suite, the part before the dash, and what it makes of a run.
BLOCKS: dict[str, Callable[[Run], str]] = {
    "core-file": source,
    "core-met": core_met,
    "core-table": core_table,
    "accuracy-file": source,
    "accuracy-table": accuracy_table,
    "accuracy-loss": partial(accuracy_of, "cross_entropy"),
    "accuracy-curvature": partial(accuracy_of, "its negative eigenvalues"),
    "fused-file": source,
    "fused-table": lambda run: fused.markdown(run.results("fused")),
    "fused-memory": fused_memory,
    "fused-shape": fused_shape,
    "fit-file": source,
    "fit-table": partial(fits_table, "fit"),
    "fit-memory": fit_memory_table,
    "fit-range": fit_range,
    "many-file": source,
    "many-table": partial(fits_table, "many"),
    "cold-file": source,
    "cold-table": partial(fits_table, "cold"),
    "scale-file": source,
    "scale-error": scale_error,
    "scale-table": lambda run: scale.markdown(run.results("scale")),
    "stream-file": source,
    "stream-text": stream_text,
    "kills-file": source,
    "kills-text": kills_text,
}


def _error(value: float | None) -> str:
    """Three digits, and exponents without a plus or a zero in front."""
    return "not finite" if value is None else re.sub(r"e\+?(-?)0?", r"e\1", f"{value:.3g}")


def _bold(text: str, condition: bool) -> str:
    return f"**{text}**" if condition else text

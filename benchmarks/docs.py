"""The figures in the documentation, written from committed result files.

A marked place in a Markdown file, which may span lines or be inside a line,

    <!-- benchmarks: core-table cpu -->
    ...
    <!-- end -->

contains what `BLOCKS` computes from the newest full run of a suite on a platform. The suite is the
part of the name before the dash.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import results, tables
from benchmarks.environment import ROOT
from benchmarks.results import Row, Run, is_softjax, missed

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PICTURE = ROOT / "docs" / "scaling.svg"
# A mark that a page quotes, after a backtick, is not a marked place.
MARK = re.compile(r"(?<!`)(<!-- benchmarks: ([\w-]+) (\w+) -->)(.*?)(<!-- end -->)", re.DOTALL)


def stale() -> list[Path]:
    """The pages whose marked places differ from the result files."""
    runs = results.read_all()
    return [path for path in PAGES if updated(path.read_text(), runs) != path.read_text()]


def write() -> list[Path]:
    """Updates all marked places; returns the pages that changed."""
    runs, changed = results.read_all(), stale()
    for path in changed:
        path.write_text(updated(path.read_text(), runs))
    return changed


def draw() -> None:
    """Draws docs/scaling.svg, in grey that is legible on white and on black."""
    from benchmarks import pictures, report  # pandas and Altair, which nothing else here needs

    rows = results.newest(results.read_all(), "scale", "cpu").rows("scale")
    picture = pictures.svg(report.against_devices(rows))
    for name, colour in ((pictures.INK, "#808080"), (pictures.GRID, "#80808040")):
        picture = picture.replace(name, colour)
    PICTURE.write_text(picture)


def updated(text: str, runs: list[Run]) -> str:
    """A page with its marked places updated; a place inside a line stays in this line."""

    def block(match: re.Match[str]) -> str:
        start, name, platform, old, end = match.groups()
        if name not in BLOCKS:
            known = ", ".join(BLOCKS)
            raise results.ResultError(f"a marked place must be one of {known}, got {name!r}.")
        content = BLOCKS[name](results.newest(runs, name.split("-")[0], platform))
        return f"{start}\n{content}\n{end}" if "\n" in old else f"{start}{content}{end}"

    return MARK.sub(block, text)


def source(run: Run) -> str:
    """The path of the file, relative to the root of the repository."""
    return f"`{run.path.relative_to(ROOT).as_posix()}`"


def pairs_of(run: Run, suite: str) -> list[tuple[Row, Row]]:
    """For each case the rows of softjax and of the peer that has a bound."""
    ours = {row["case"]: row for row in run.rows(suite) if is_softjax(row)}
    others = (row for row in run.rows(suite) if not is_softjax(row) and row.get("checks"))
    return [(ours[row["case"]], row) for row in others]


def core_met(run: Run) -> str:
    """How many ratios meet their bounds."""
    asked = pairs_of(run, "core")
    return f"{sum(not missed(row) for _, row in asked)} of {len(asked)}"


def core_table(run: Run) -> str:
    """The ratios with bounds: a row per operation, a column per shape; misses are bold."""
    rows: dict[str, list[str]] = {}
    shapes: dict[str, None] = {}
    for _, row in pairs_of(run, "core"):
        if row["mode"] in ("eager", "process"):
            continue
        mode = "" if row["mode"] == "value" else f", {row['mode'].replace('_', ' ')}"
        bound = row["checks"]["time"][1]
        line = rows.setdefault(f"{row['operation']}{mode}", [f"{bound:g}"])
        ratio = f"{row['ratio']:.2f}" if row.get("ratio") else "wrong"
        line.append(_bold(ratio, bool(missed(row))))
        shapes[f"({row['examples']}, {row['classes']})"] = None
    header = ("softjax / peer", "asked", *shapes)
    return tables.markdown_table(header, ([name, *line] for name, line in rows.items()))


def fits_table(suite: str, run: Run) -> str:
    """CPU seconds of whole fits, and the ratio to the fastest peer."""
    rows = []
    for ours, fastest in pairs_of(run, suite):
        peer = fastest["side"].removeprefix("scikit-learn ")
        name, dtype = ours["case"].rsplit("/", 1)
        rows.append(
            (
                f"{name} ({', '.join(map(str, ours['shape']))}) {dtype}",
                f"{ours['seconds']:.3g}",
                f"{fastest['seconds']:.3g}, {peer}",
                _bold(f"{fastest['ratio']:.2f}", bool(missed(fastest))),
                f"{fastest['checks']['time'][1]:g}",
            )
        )
    return tables.markdown_table(("", "softjax", "scikit-learn", "ratio", "asked"), rows)


def fit_memory_table(run: Run) -> str:
    """Megabytes beside the features, and the goal: the fastest peer's memory and one copy."""
    rows = []
    for ours, fastest in pairs_of(run, "fit"):
        asked = fastest["peak_bytes"] + ours["feature_bytes"]
        amounts = (ours["peak_bytes"], asked, ours["feature_bytes"], ours["first_peak_bytes"])
        got, *others = (f"{amount / 1e6:.3g}" for amount in amounts)
        rows.append((ours["case"].replace("/", " "), _bold(got, amounts[0] > asked), *others))
    header = ("MB", "a fit", "asked", "the features", "the first fit of a process")
    return tables.markdown_table(header, rows)


def accuracy_table(run: Run) -> str:
    """The largest errors, one row for each function and dtype."""
    rows = run.rows("accuracy")
    lines = [
        (a["operation"], a["dtype"], a["unit"], _error(a), _error(b), b["side"], a["goal"])
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]
    header = ("function", "dtype", "unit", "softjax", "peer", "", "goal")
    return tables.markdown_table(header, lines)


def accuracy_of(operation: str, run: Run) -> str:
    """The largest error of an operation in float32, and the peer's largest error."""
    ours, peer = (row for row in run.rows("accuracy") if row["case"] == f"{operation}/float32")
    return f"{_error(ours)} | {_error(peer)} ({peer['side']})"


def fused_head(run: Run) -> tuple[Row, Row]:
    """The rows of softjax and the plain loss for the head of a language model, with gradient."""
    asked = [pair for pair in pairs_of(run, "fused") if pair[1]["side"] == "plain"]
    return next(pair for pair in asked if pair[0]["mode"] == "value_and_gradient")


def fused_memory(run: Run) -> str:
    """The temporaries of that loss, in MB."""
    ours, plain = (row["temporary_bytes"] / 1e6 for row in fused_head(run))
    return f"{ours:.0f} MB | {plain:.0f} MB (all logits at once)"


def fused_shape(run: Run) -> str:
    """The shape of that loss."""
    row, _ = fused_head(run)
    return f"{row['rows']:,} tokens, {row['features']} features, {row['classes']:,} classes"


def fit_range(run: Run) -> str:
    """The smallest and the largest ratio of CPU seconds to the fastest peer."""
    ratios = [row["ratio"] for _, row in pairs_of(run, "fit")]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def scale_error(run: Run) -> str:
    """The largest relative difference between results on eight devices and on one."""
    ours = [row for row in run.rows("scale") if is_softjax(row) and row["devices"] == 8]
    return _error(max(ours, key=lambda row: row["error"]))


def suite_table(suite: str, run: Run) -> str:
    """All rows of a suite."""
    return tables.markdown_table(*tables.cells(run.rows(suite)))


def stream_text(run: Run) -> str:
    """The speed of a stream relative to arrays in memory, and the memory of both."""
    stream, memory = run.rows("stream")
    return (
        f"{1 / memory['ratio']:.2f} of the speed of arrays in memory (the median of "
        f"{memory['pairs']} pairs), and needed at most {stream['peak_bytes'] / 1e9:.2f} GB of "
        f"memory instead of {memory['peak_bytes'] / 1e9:.1f}"
    )


def kills_text(run: Run) -> str:
    """How runs ended in which a process was killed, and how they were resumed."""
    (r,) = run.rows("kills")
    return (
        f"In {r['kills']} runs of {r['processes']} processes, one was killed: in "
        f"{r['before_they_met']} runs before all had connected, in {r['amid_training']} during the "
        f"training. {r['hung']} processes hung, all others ended within "
        f"{r['slowest_end_seconds']:.1f} s of the kill, and {r['resumed_to_the_same_bits']} of the "
        f"resumed runs had the bits of an uninterrupted run"
    )


SUITES = ("core", "accuracy", "fused", "fit", "many", "cold", "scale", "stream", "kills")
# For each block, the function that computes its text from a run of its suite.
BLOCKS: dict[str, Callable[[Run], str]] = {f"{suite}-file": source for suite in SUITES} | {
    "core-met": core_met,
    "core-table": core_table,
    "accuracy-table": accuracy_table,
    "accuracy-loss": partial(accuracy_of, "cross_entropy"),
    "accuracy-curvature": partial(accuracy_of, "its negative eigenvalues"),
    "fused-table": partial(suite_table, "fused"),
    "fused-memory": fused_memory,
    "fused-shape": fused_shape,
    "fit-table": partial(fits_table, "fit"),
    "fit-memory": fit_memory_table,
    "fit-range": fit_range,
    "many-table": partial(fits_table, "many"),
    "cold-table": partial(fits_table, "cold"),
    "scale-error": scale_error,
    "scale-table": partial(suite_table, "scale"),
    "stream-text": stream_text,
    "kills-text": kills_text,
}


def _error(row: Row) -> str:
    """Three digits, and exponents without a plus or a zero in front."""
    value = row["error"]
    return "not finite" if value is None else re.sub(r"e\+?(-?)0?", r"e\1", f"{value:.3g}")


def _bold(text: str, condition: bool) -> str:
    return f"**{text}**" if condition else text

"""Which pictures a suite has data for: the records of its devices as points of `figures.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import figures
from benchmarks.figures import Panel, Point, Roof
from benchmarks.results import Record, Run, Side, case_of, peer_of, ratio, sides, suite_of

# What is drawn against the number of classes.
CURVES = (
    ("logsumexp", "value"),
    ("softmax", "value"),
    ("cross_entropy", "value"),
    ("cross_entropy", "value_and_gradient"),
)


@dataclass(frozen=True)
class Device:
    """One device and, for each suite, its figures, the newest of each case."""

    label: str
    runs: dict[str, Run]


def pictures(suite: str, devices: Sequence[Device]) -> list[tuple[str, str]]:
    """Captions and pictures; what no device has is left out."""
    runs = [(device.label, device.runs[suite]) for device in devices]
    if suite == "accuracy":
        drawn = [("Errors; less is better", _dots(runs, _error_points, "error, ulp"))]
    elif suite == "core":
        drawn = [
            (f"{name} against the number of classes, {dtype}", _curves(runs, dtype, value, ylabel))
            for dtype in ("float32", "bfloat16")
            for name, value, ylabel in (
                ("Time", _time, "ns a logit"),
                ("Temporaries", _temporaries, "bytes over those\nof the logits"),
            )
        ]
    else:
        drawn = [
            ("Time; less is better", _dots(runs, _second_points, "seconds")),
            ("Temporaries; less is better", _dots(runs, _memory_points, "MB")),
            ("Sent by each device; less is better", _dots(runs, _wire_points, "MB")),
        ]
    caption = "Time of softjax over that of the peer; left of 1, softjax is faster"
    drawn.append((caption, _dots(runs, _ratio_points, "ratio of times", line=1.0)))
    drawn.append(("Roofline of float32: what softjax reaches", _rooflines(runs)))
    return [(caption, picture) for caption, picture in drawn if picture]


def row_of(record: Record) -> str:
    """A case in words, without the peer."""
    suite, case, peer = suite_of(record), case_of(record), peer_of(record)
    if suite == "core":
        donated = ", donated" if record.get("donated") else ""
        place = f"{record['shape']['name']} {record['dtype']}{donated}"
        return f"{record['operation']}, {words(record['mode'])} · {place}"
    if suite == "accuracy":
        return f"{record['operation']} · {record['dtype']}"
    if suite == "scale":
        devices = record["devices"]
        parts = record["program"], record["form"], f"{devices} device{'s'[: devices != 1]}"
        return words(" · ".join(parts))
    if record.get("budget"):
        case = case.replace(f"budget-{record['budget']}", f"budget {record['budget'] / 1e6:g} MB")
    parts = [part for part in case.split("/") if part not in (suite, peer, "budget-None")]
    return words(" · ".join(parts))


def words(name: str) -> str:
    """A name without the underscores of code."""
    return name.replace("_", " ")


def _dots(
    runs: Sequence[tuple[str, Run]],
    points: Callable[[Record], list[Point]],
    xlabel: str,
    line: float | None = None,
) -> str | None:
    columns = [
        (label, list(dict.fromkeys(p for record in run.results() for p in points(record))))
        for label, run in runs
    ]
    columns = [(label, found) for label, found in columns if found]
    return figures.dots(columns, xlabel, line) if columns else None


def _ratio_points(record: Record) -> list[Point]:
    found, peer = ratio(record), peer_of(record)
    return [Point(row_of(record), peer, *found)] if found and peer else []


def _second_points(record: Record) -> list[Point]:
    row = row_of(record)
    return [Point(row, side.name, *side.seconds) for side in sides(record) if side.seconds]


def _memory_points(record: Record) -> list[Point]:
    return [
        Point(row_of(record), side.name, side.temporary_bytes / 1e6)
        for side in sides(record)
        if side.temporary_bytes
    ]


def _wire_points(record: Record) -> list[Point]:
    return [
        Point(row_of(record), side.name, side.wire_bytes / 1e6)
        for side in sides(record)
        if side.wire_bytes
    ]


def _error_points(record: Record) -> list[Point]:
    if "ulp" not in record["unit"]:
        return []
    # Errors of 0 have no logarithm; a hundredth of a unit in the last place is as good.
    return [
        Point(row_of(record), side.name, None if side.error is None else max(side.error, 0.01))
        for side in sides(record)
    ]


def _time(record: Record, side: Side) -> float | None:
    entries = record["shape"]["examples"] * record["shape"]["classes"]
    return side.seconds and 1e9 * side.seconds[0] / entries


def _temporaries(record: Record, side: Side) -> float | None:
    size = side.temporary_bytes
    return None if size is None else size / record["logits_bytes"]


def _curves(
    runs: Sequence[tuple[str, Run]],
    dtype: str,
    value: Callable[[Record, Side], float | None],
    ylabel: str,
) -> str | None:
    grid: list[tuple[str, list[Panel]]] = []
    for label, run in runs:
        panels = []
        for curve in CURVES:
            points = {
                (side.name, record["shape"]["classes"]): y
                for record in run.results()
                if (record["operation"], record["mode"]) == curve
                and record["dtype"] == dtype
                and not record.get("donated")
                for side in sides(record)
                if (y := value(record, side)) is not None
            }
            panels.append(
                Panel(
                    f"{curve[0]}\n{words(curve[1])}",
                    [(name, x, y) for (name, x), y in points.items()],
                )
            )
        grid.append((label, panels))
    if not any(panel.points for _, panels in grid for panel in panels):
        return None
    return figures.against_classes(grid, ylabel, logarithmic=value is _time)


def _rooflines(runs: Sequence[tuple[str, Run]]) -> str | None:
    roofs = []
    for label, run in runs:
        points = {
            record["case"]: (
                ", ".join((record.get("operation", suite_of(record)), words(record["mode"]))),
                record["work"]["flops"] / record["work"]["bytes"],
                record["work"]["flops"] / side.seconds[0],
            )
            for record in run.results()
            if "work" in record and (record.get("dtype") or record["shape"]["dtype"]) == "float32"
            for side in sides(record)[:1]
            if side.seconds
        }
        if run.ceilings and points:
            flops = run.ceilings["flops_per_second"]["float32"]
            roof = Roof(run.ceilings["bytes_per_second"], flops, list(points.values()))
            roofs.append((label, roof))
    return figures.rooflines(roofs) if roofs else None

"""A set of result files as the sections of a page: several devices side by side."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks import aot
from benchmarks.page import Section, Table
from benchmarks.pictures import Device, pictures, row_of
from benchmarks.results import (
    Record,
    Run,
    Side,
    case_of,
    peer_of,
    ratio,
    share_of_roofline,
    sides,
    suite_of,
)

ABOUT = {
    "core": "Normalizers and the loss on logits (examples, classes). Times are medians of pairs "
    "that alternate in one process, with intervals of 95 %. The shapes are ",
    "accuracy": "The largest error over lengths, scales and offsets of the logits, in units in the "
    "last place of the exact result.",
    "fused": "The loss of hidden @ kernel without its logits, beside plain and chunked forms.",
    "fit": "Whole fits of softmax regression to the same suboptimality, in CPU seconds; the ratio "
    "is to the fastest peer.",
    "many": "Many fits in one call, in CPU seconds; the ratio is to as many of the fastest peer.",
    "cold": "Whole processes that import, compile and fit once, in CPU seconds.",
    "inference": "A fit without a penalty, and average marginal effects with standard errors, in "
    "float64.",
    "scale": "The loss and the fit over several devices.",
    "aot": "Compiled, not run: what the programs for a device that is not there read and write, "
    "hold, launch and send, softjax before the peer. The time is an estimate by the roofline.",
}
COLUMNS = ("time, ms", "ratio (95 %)", "roofline", "temporaries, MB", "sent, MB", "compile, s")


def sections(runs: Sequence[Run]) -> list[Section]:
    """The runs, one section a suite, then what failed."""
    devices = by_device(runs)
    suites = dict.fromkeys([*ABOUT, *(suite for device in devices for suite in device.runs)])
    parts = [Section("Runs", CEILINGS, _environments(runs))]
    for suite in suites:
        having = [device for device in devices if suite in device.runs]
        if having:
            if suite == "aot":
                parts.append(Section(suite, ABOUT[suite], _compiled_table(having)))
                continue
            table = _accuracy_table(having) if suite == "accuracy" else _table(suite, having)
            text = ABOUT.get(suite, "")
            if suite == "core":
                text += _shapes(having)
            parts.append(Section(suite, text, table, partial(pictures, suite, having)))
    failures = [
        (r["suite"], r["case"], r["kind"], str(r["bytes"] or ""), r["error"], run.label)
        for run in runs
        for r in run.failures()
    ]
    if failures:
        header = ("suite", "case", "what", "bytes asked", "error", "device")
        parts.append(Section("What failed", "", Table(header, failures)))
    return parts


def by_device(runs: Sequence[Run]) -> list[Device]:
    """The runs of each device; of a case that was measured more often, the last figures count."""
    devices: dict[str, Device] = {}
    for run in runs:
        device = devices.setdefault(run.label, Device(run.label, {}))
        for suite in dict.fromkeys(map(suite_of, run.results())):
            earlier = device.runs.get(suite)
            known = {_key(r): r for r in earlier.results()} if earlier else {}
            known |= {_key(r): r for r in run.results(suite)}
            ceilings = run.ceilings or (earlier and earlier.ceilings)
            records = [*known.values(), *([ceilings] if ceilings else [])]
            device.runs[suite] = replace(run, records=records)
    return list(devices.values())


CEILINGS = (
    "Copy and product are the ceilings of the roofline, measured in the run itself: a large copy "
    "and a large product of matrices in float32."
)


def _environments(runs: Sequence[Run]) -> Table:
    header = ("device", "suites", "date", "commit", "jax", "jaxlib", "driver", "copy", "product")
    rows = []
    for run in runs:
        head, ceilings = run.environment, run.ceilings
        # Scripts write records of other kinds.
        found = list(map(suite_of, run.results())) or [r["record"] for r in run.records]
        suites = ", ".join(dict.fromkeys(found))
        copy = product = ""
        if ceilings:
            copy = f"{ceilings['bytes_per_second'] / 1e9:,.0f} GB/s"
            product = f"{ceilings['flops_per_second']['float32'] / 1e9:,.0f} GFLOP/s"
        rows.append(
            (
                run.label,
                suites + (", quick" if head.get("quick") else ""),
                head["date"][:10],
                (head["commit"] or "unknown")[:9] + ("" if head["clean"] else ", changed"),
                head["versions"]["jax"],
                head["versions"]["jaxlib"],
                head.get("driver", "")[:40],
                copy,
                product,
            )
        )
    return Table(header, rows)


def _shapes(devices: Sequence[Device]) -> str:
    shapes = {
        record["shape"]["name"]: record["shape"]
        for device in devices
        for record in device.runs["core"].results()
    }
    named = (f"{s['name']} ({s['examples']}, {s['classes']})" for s in shapes.values())
    return ", ".join(named) + "."


def _key(record: Record) -> tuple:
    return case_of(record), None if "solvers" in record else peer_of(record)


def _table(suite: str, devices: Sequence[Device]) -> Table:
    """One row for each case and peer, the columns of the devices side by side."""
    header = ["case", "peer"]
    rows: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {}
    for device in devices:
        prefix = f"{device.label}: " if len(devices) > 1 else ""
        header += [f"{prefix}{name}" for name in COLUMNS]
        run = device.runs[suite]
        for record in run.results():
            ours, *others = sides(record)
            for other in others or [None]:
                # A record of a peer alone, as those of `scale` are, has a row of its own.
                alone = "" if ours.is_softjax else ours.name
                key = row_of(record), other.name if other else alone
                cells = _cells(record, ours, other, run.ceilings)
                rows.setdefault(key, {})[device.label] = cells
    blank = ("",) * len(COLUMNS)
    lines = [
        (*key, *(cell for device in devices for cell in row.get(device.label, blank)))
        for key, row in rows.items()
    ]
    used = [k for k in range(len(header)) if any(line[k] for line in lines)]
    return Table([header[k] for k in used], [[line[k] for k in used] for line in lines])


def _cells(
    record: Record, ours: Side, other: Side | None, ceilings: Record | None
) -> tuple[str, ...]:
    """What `COLUMNS` says, softjax before the peer; nothing where there is nothing to say."""
    both = [ours, other] if other else [ours]
    wrong = ", ".join(side.name for side in both if side.wrong)
    share = share_of_roofline(record, ours, ceilings)
    compiling = record.get("softjax", {}).get("compile_seconds")
    return (
        _slashed([side.seconds and 1e3 * side.seconds[0] for side in both]),
        f"wrong: {wrong}" if wrong else _ratio(record, ours, other),
        "" if share is None else f"{100 * share:.0f} %",
        _slashed([None if s.temporary_bytes is None else s.temporary_bytes / 1e6 for s in both]),
        "" if ours.wire_bytes is None else number(ours.wire_bytes / 1e6),
        "" if compiling is None else f"{compiling:.2g}",
    )


def _ratio(record: Record, ours: Side, other: Side | None) -> str:
    """The ratio of the record; to another solver than the fastest, that of the medians."""
    found = ratio(record)
    if found is None or other is None:
        return ""
    if other.name != peer_of(record):
        return f"{ours.seconds[0] / other.seconds[0]:.2f}" if ours.seconds and other.seconds else ""
    interval = f" ({found[1]:.2f}, {found[2]:.2f})" if found[1] < found[2] else ""
    return f"{found[0]:.2f}{interval}"


def _slashed(values: Sequence[float | None]) -> str:
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else number(value) for value in values)


def number(value: float) -> str:
    """Three digits, without exponents."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _compiled_table(devices: Sequence[Device]) -> Table:
    """One row for each device and case."""
    rows = [
        (device.label, record["case"].partition("/")[0], *aot.cells(record))
        for device in devices
        for record in device.runs["aot"].results()
    ]
    return Table(("device", "suite", *aot.COLUMNS), rows)


def _accuracy_table(devices: Sequence[Device]) -> Table:
    header = ["function", "dtype", "unit", "goal", "peer"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for k, device in enumerate(devices):
        prefix = f"{device.label}: " if len(devices) > 1 else ""
        header += [f"{prefix}softjax", f"{prefix}peer"]
        for r in device.runs["accuracy"].results():
            key = r["operation"], r["dtype"], r["unit"], r["goal"], r["peer"]["name"]
            row = rows.setdefault(key, [])
            row += [""] * (2 * k - len(row))
            errors = (r[side]["error"] for side in ("softjax", "peer"))
            row += ["not finite" if error is None else f"{error:.3g}" for error in errors]
    return Table(header, [(*key, *row) for key, row in rows.items()])

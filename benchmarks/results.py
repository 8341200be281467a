"""Result files: JSON lines, the environment first, then one record a measurement.

The suites write records of their own; here they are read as one: who was measured in which case,
how long it took, what it held, how accurate it was.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import roofline

RESULTS = Path(__file__).parent / "results"
# Whose quick runs leave out cases, and measure the others as in a full run.
ALIKE = ("fit", "many", "cold", "inference", "scale")

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A result file; `label` names the device and tells it from others."""

    path: Path
    environment: Record
    records: list[Record]

    @property
    def label(self) -> str:
        """The device, and on a CPU the processor and its cores."""
        head = self.environment
        if head["platform"] == "cpu":
            return f"{head['processor']}, {head['cores']} core{'s'[: head['cores'] != 1]}"
        return head["device"]

    @property
    def ceilings(self) -> Record | None:
        """What the device can do at most; None where it was not measured."""
        return next((r for r in self.records if r["record"] == "ceilings"), None)

    def results(self, suite: str | None = None) -> list[Record]:
        """The measurements, of one suite or of all."""
        results = [record for record in self.records if record["record"] == "result"]
        return [record for record in results if suite in (None, suite_of(record))]

    def holds(self, suite: str) -> bool:
        """Whether there are measurements of a suite, or a script's records of that name."""
        return any(record["record"] == suite for record in self.records) or bool(
            self.results(suite)
        )

    def failures(self) -> list[Record]:
        """The cases that raised or ran out of memory."""
        return [record for record in self.records if record["record"] == "failure"]


@dataclass(frozen=True)
class Side:
    """One implementation in one case; what is not known is None. Times are (median, low, high)."""

    suite: str
    case: str
    name: str
    is_softjax: bool
    seconds: tuple[float, float, float] | None
    temporary_bytes: int | None
    wire_bytes: int | None
    moved_bytes: int | None
    error: float | None
    wrong: bool


def write(record: Record, file: Any) -> None:
    """Append a record; what is not finite becomes null, for JSON knows no infinity."""
    print(json.dumps(_finite(record), allow_nan=False), file=file, flush=True)


class ResultError(ValueError):
    """Why a file is not a result file, in one line."""


def read(path: Path) -> Run:
    """A result file. One that a crash cut in the middle of a line is read up to there."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ResultError(f"{path}: is not text in UTF-8.") from error
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError):
            break
    for number, record in enumerate(lines, 1):
        if not isinstance(record, dict) or not isinstance(record.get("record"), str):
            raise ResultError(
                f"{path}: line {number} is not a record of `python -m benchmarks run`."
            )
    if not lines or not _is_environment(lines[0]):
        raise ResultError(
            f"{path}: must begin with the environment of a run, got {lines[:1]!s:.60}."
        )
    run = Run(path, lines[0], lines[1:])
    for record in run.results():
        # What `compare` and `report` read of every result: whatever they would trip over.
        try:
            named = bool(case_of(record)) and (peer_of(record) is None or bool(sides(record)))
            good = named and all(value > 0 for value in ratio(record) or ())
        except Exception:
            good = False
        if not good:
            number = lines.index(record) + 1
            raise ResultError(
                f"{path}: line {number} is not a result of `python -m benchmarks run`."
            )
    return run


def _is_environment(record: Record) -> bool:
    """Whether it says when, where and with which versions a run was made."""
    if record["record"] != "environment" or not isinstance(record.get("versions"), dict):
        return False
    return isinstance(record.get("date"), str) and isinstance(record.get("platform"), str)


def read_all(paths: Sequence[Path] = ()) -> list[Run]:
    """The files, those in folders too; all committed results where none is named. By date."""
    files: list[Path] = []
    for path in paths or (RESULTS,):
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ResultError(f"{', '.join(map(str, paths))}: holds no result file (*.jsonl).")
    runs = sorted(map(read, files), key=lambda run: run.environment["date"])
    for run in runs:
        needed = ("processor", "cores") if run.environment["platform"] == "cpu" else ("device",)
        if not run.environment.keys() >= set(needed):
            raise ResultError(f"{run.path}: the environment must name its {' and '.join(needed)}.")
    return runs


def newest(runs: Sequence[Run], suite: str, platform: str) -> Run:
    """The last full run of a suite on a platform: neither quick nor a part of the cases.

    Where each case is measured alike in a quick run, one of the suite alone will do.
    """
    for run in reversed(runs):
        head = run.environment
        alike = suite in ALIKE and head.get("suite") == suite
        partial = (head.get("quick") and not alike) or head.get("only")
        if head["platform"] == platform and not partial and run.holds(suite):
            return run
    raise ValueError(f"benchmarks: there must be a full run of {suite} on {platform}, got none.")


def suite_of(record: Record) -> str:
    """The suite of a record; the first files did not say `core`."""
    return record.get("suite", "core")


def case_of(record: Record) -> str:
    """What tells a case from all others of its suite."""
    return f"{record['case']}/{record['dtype']}" if suite_of(record) == "fit" else record["case"]


def sides(record: Record) -> list[Side]:
    """Who was measured in a record, softjax first."""
    found = record.get("solvers") or [
        record[key] for key in ("softjax", "peer", "other") if isinstance(record.get(key), dict)
    ]
    # A record of one implementation alone is flat.
    found = found or [{"name": record.get("implementation", "softjax"), **record}]
    return [
        Side(
            suite_of(record),
            case_of(record),
            side["name"],
            side["name"].startswith("softjax"),
            _seconds(side),
            side.get("temporary_bytes"),
            side.get("wire_bytes"),
            side.get("moved_bytes"),
            side.get("error"),
            not side.get("correct", not record.get("wrong", False)),
        )
        for side in found
    ]


def ratio(record: Record) -> tuple[float, float, float] | None:
    """The time of softjax over that of its peer: (median, low, high)."""
    found = record.get("ratio")
    if isinstance(found, dict):
        return found["median"], found["low"], found["high"]
    return None if found is None else (found, found, found)


def peer_of(record: Record) -> str | None:
    """The peer that the ratio of a record is to: of solvers, the fastest."""
    others = [side for side in sides(record) if not side.is_softjax]
    timed = [side for side in others if side.seconds]
    if timed:
        return min(timed, key=lambda side: side.seconds or (math.inf,)).name
    return others[0].name if others else None


def share_of_roofline(record: Record, side: Side, ceilings: Record | None) -> float | None:
    """The least time that the device needs for the work of a case, over the time that it took."""
    if ceilings is None or side.seconds is None or "work" not in record:
        return None
    dtype = record.get("dtype") or record["shape"]["dtype"]
    return roofline.ideal_seconds(record["work"], ceilings, dtype) / side.seconds[0]


def github(runs: Sequence[Run]) -> list[Record]:
    """What github-action-benchmark reads as `customSmallerIsBetter`: our times and temporaries."""
    entries = []
    for run in runs:
        for side in _once(side for record in run.results() for side in sides(record)):
            name = f"{side.suite}/{side.case}"
            extra = f"{run.label}, {run.environment['date']}"
            if side.seconds:
                median, low, high = (1e3 * value for value in side.seconds)
                spread = f"{low:.4g} to {high:.4g}"
                entries.append(
                    {"name": name, "unit": "ms", "value": median, "range": spread, "extra": extra}
                )
            if side.temporary_bytes is not None:
                size = {"unit": "bytes", "value": side.temporary_bytes, "extra": extra}
                entries.append({"name": f"{name} temporaries", **size})
    return entries


def _once(found: Iterator[Side]) -> Iterator[Side]:
    """Softjax in each case once, though it was measured beside every peer."""
    seen = set()
    for side in found:
        if side.is_softjax and (side.suite, side.case) not in seen:
            seen.add((side.suite, side.case))
            yield side


def _seconds(side: Record) -> tuple[float, float, float] | None:
    if "seconds" in side:
        return side["seconds"]["median"], side["seconds"]["low"], side["seconds"]["high"]
    if "cpu_seconds" in side:
        return (side["cpu_seconds"],) * 3
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

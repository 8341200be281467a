"""Result files: JSON lines, first the environment, then a row for each measurement.

A row is flat. It names the implementation and the case:

    suite, case, side              `side` is "softjax", or begins with it, or is a peer
    seconds, low, high             the median of the times, and its interval of 95 %
    ratio, ratio_low, ratio_high   in the row of a peer: softjax's time divided by the peer's
    temporary_bytes, wire_bytes, moved_bytes, peak_bytes
    error, wrong                   a wrong result is not timed
    checks                         {name: [measured value, largest allowed value]}
    flops, work_bytes              the least work that the formula needs (`roofline.py`)

and further fields of the suite. Unknown values are left out or None.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# The quick runs of these suites leave out cases; the cases that they measure are as in a full run.
ALIKE = ("fit", "many", "cold", "tables", "inference", "scale")

Row = dict[str, Any]
INTERVAL = ("seconds", "low", "high")
RATIO = ("ratio", "ratio_low", "ratio_high")
# The fields with which tables and pictures calculate.
NUMBERS = (
    *("temporary_bytes", "wire_bytes", "moved_bytes", "peak_bytes", "first_peak_bytes", "error"),
    *("flops", "work_bytes", "logits_bytes", "examples", "classes", "devices", "suboptimality"),
    *("estimated_seconds", "wall_seconds", "compile_seconds", "passes", "kernels", "launches"),
)
KINDS = {"wrong": bool, "unit": str, "failure": str, "products": dict, "collectives": dict | int}
OF_RUN = "of `python -m benchmarks run`"


class ResultError(ValueError):
    """An error in a file or a command, in one line."""


@dataclass(frozen=True)
class Run:
    """A result file: its environment, and its lines of all kinds."""

    path: Path
    environment: Row
    records: list[Row]

    @property
    def label(self) -> str:
        """The name of the device; for a CPU its processor and the number of cores."""
        head = self.environment
        if head["platform"] == "cpu":
            return f"{head['processor']}, {head['cores']} core{'s'[: head['cores'] != 1]}"
        return head["device"]

    @property
    def ceilings(self) -> Row | None:
        """The limits of the device; None if they were not measured."""
        return next((r for r in self.records if r["record"] == "ceilings"), None)

    def rows(self, suite: str | None = None) -> list[Row]:
        """The measurements of one suite or of all suites."""
        rows = [record for record in self.records if record["record"] == "result"]
        return [row for row in rows if suite in (None, row["suite"])]

    def failures(self) -> list[Row]:
        """The cases that raised an exception or ran out of memory."""
        return [record for record in self.records if record["record"] == "failure"]


def is_softjax(row: Row) -> bool:
    """Whether a row measures softjax rather than a peer."""
    return row["side"].startswith("softjax")


def missed(row: Row) -> list[str]:
    """The names of the checks that a row does not pass; a missing value does not pass."""
    return [
        name
        for name, (got, most) in (row.get("checks") or {}).items()
        if got is None or not got <= most
    ]


def verdict(rows: Sequence[Row], failed: int = 0) -> str:
    """One line: how many bounds are met, and how many results are wrong."""
    asked = sum(len(row.get("checks") or {}) for row in rows)
    met = asked - sum(len(missed(row)) for row in rows)
    wrong = [row["side"] for row in rows if row.get("wrong")]
    parts = [f"{met} of {asked} bounds met"] if asked else ["no bound is asked"]
    if wrong:
        parts.append(f"{len(wrong)} wrong results ({', '.join(dict.fromkeys(wrong))})")
    elif any("wrong" in row for row in rows):
        parts.append("no wrong result")
    if failed:
        parts.append(f"{failed} failed")
    return ", ".join(parts)


def write(record: Row, file: Any) -> None:
    """Appends a record; values that are not finite become null, since JSON has no infinity."""
    print(json.dumps(_finite(record), allow_nan=False), file=file, flush=True)


def read(path: Path) -> Run:
    """Reads a result file; a last line that a crash has cut is ignored."""
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
            raise ResultError(f"{path}: line {number} is not a record {OF_RUN}.")
    if not lines or not _is_environment(lines[0]):
        got = f"{lines[:1]!s:.60}"
        raise ResultError(f"{path}: must begin with the environment of a run, got {got}.")
    for number, record in enumerate(lines, 1):
        kind = record["record"]
        if kind in READABLE and not READABLE[kind](record):
            raise ResultError(f"{path}: line {number} is not a {kind} {OF_RUN}.")
    return Run(path, lines[0], lines[1:])


def _is_environment(record: Row) -> bool:
    """Whether a record has the date, the place and the versions of a run."""
    needed = {"date": str, "platform": str, "versions": dict}
    needed |= {"processor": str, "cores": int} if record.get("platform") == "cpu" else {}
    needed |= {"device": str} if record.get("platform") != "cpu" else {}
    return record["record"] == "environment" and all(
        isinstance(record.get(key), kind) for key, kind in needed.items()
    )


def _is_row(record: Row) -> bool:
    """Whether a record has the fields that every reader needs, with numbers where needed."""
    named = all(isinstance(record.get(key), str) for key in ("suite", "case", "side"))
    named &= all(_is_number(record.get(key), unknown=True) for key in NUMBERS)
    named &= all(isinstance(record[key], kind) for key, kind in KINDS.items() if key in record)
    for start, *keys in (INTERVAL, RATIO):
        if record.get(start) is not None:
            values = [record[start], *(record.get(key, record[start]) for key in keys)]
            named &= all(_is_number(value) and value > 0 for value in values)
    checks = record.get("checks") or {}
    return (
        named
        and (not record.get("work_bytes") or isinstance(record.get("dtype"), str))
        and isinstance(checks, dict)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in checks.values())
        and all(_is_number(got, unknown=True) and _is_number(most) for got, most in checks.values())
    )


def _is_number(value: Any, unknown: bool = False) -> bool:
    """Whether a value is a number, or None if it may be unknown."""
    return (isinstance(value, int | float) and math.isfinite(value)) or (unknown and value is None)


def _is_ceilings(record: Row) -> bool:
    """Whether a record has the bandwidth and the throughput for the roofline."""
    flops = record.get("flops_per_second")
    found = [record.get("bytes_per_second"), isinstance(flops, dict) and flops.get("float32")]
    return all(_is_number(value) and value > 0 for value in found)


def _is_failure(record: Row) -> bool:
    """Whether a record names the case that failed and the reason."""
    named = all(isinstance(record.get(key), str) for key in ("suite", "case", "kind", "error"))
    return named and _is_number(record.get("bytes"), unknown=True)


READABLE = {"result": _is_row, "ceilings": _is_ceilings, "failure": _is_failure}


def read_all(paths: Sequence[Path] = ()) -> list[Run]:
    """The runs of files and folders, by date; all committed results if none are named."""
    files: list[Path] = []
    for path in paths or (RESULTS,):
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ResultError(f"{', '.join(map(str, paths))}: holds no result file (*.jsonl).")
    return sorted(map(read, files), key=lambda run: run.environment["date"])


def newest(runs: Sequence[Run], suite: str, platform: str) -> Run:
    """The last full run of a suite on a platform: neither quick nor restricted to some cases.

    If a quick run measures each case like a full run, a quick run of the suite alone is used too.
    """
    for run in reversed(runs):
        head = run.environment
        alike = suite in ALIKE and head.get("suite") == suite
        partial = (head.get("quick") and not alike) or head.get("only")
        if head["platform"] == platform and not partial and run.rows(suite):
            return run
    raise ResultError(f"there must be a full run of {suite} on {platform}, got none.")


def github(runs: Iterable[Run]) -> list[Row]:
    """Times and temporaries of softjax in the format `customSmallerIsBetter`."""
    entries = []
    for run in runs:
        for row in filter(is_softjax, run.rows()):
            entry = {"name": f"{row['suite']}/{row['case']}"}
            entry["extra"] = f"{run.label}, {run.environment['date']}"
            if row.get("seconds"):
                value, low, high = (1e3 * row.get(k, row["seconds"]) for k in INTERVAL)
                spread = f"{low:.4g} to {high:.4g}"
                entries.append(entry | {"unit": "ms", "value": value, "range": spread})
            if row.get("temporary_bytes") is not None:
                name = f"{entry['name']} temporaries"
                size = {"unit": "bytes", "value": row["temporary_bytes"], "name": name}
                entries.append(entry | size)
    return entries


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Rows of a file, read in runs, whatever its format, and the choice of its columns."""

import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softjax.tables._cells import as_features
from softjax.tables._errors import DataError

SAMPLES, SAMPLE_BYTES = 64, 4096

# The names that R, pandas and Arrow give to row numbers which stand in the file as a column.
ROW_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")


class FileRows(ABC):
    """Features and labels of the rows of a file.

    Attributes:
        path: the file.
        label: the column of the labels; None where none are read.
        names: the columns of the features.
        num_rows: N.
        num_features: D.
        fingerprint: what a change of the file changes, as JSON can hold it.
    """

    def __init__(self, path: Path, label: str | None, names: list[str], num_rows: int):
        if not num_rows:
            raise DataError(f"{path}: has no rows.")
        self.path, self.label, self.names = path, label, names
        self.num_rows, self.num_features = num_rows, len(names)

    @property
    def paths(self) -> list[Path]:
        """The files that are read."""
        return [self.path]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the files."""
        return {path.name: file_fingerprint(path) for path in self.paths}

    @abstractmethod
    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features [n, D], NaN where a cell is empty, and the labels [n] of a run of rows."""


class HeldRows(FileRows):
    """Rows that are in memory.

    Args:
        path: the file.
        label: the column of the labels, or None.
        names: the columns of the features.
        features: [N, D].
        labels: [N], or None.
    """

    def __init__(
        self,
        path: Path,
        label: str | None,
        names: list[str],
        features: np.ndarray,
        labels: np.ndarray | None,
    ):
        super().__init__(path, label, names, len(features))
        self.features = features
        self.labels = np.empty(len(features), object) if labels is None else labels

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the labels of a run of rows."""
        return self.features[start:stop], self.labels[start:stop]


def chosen_columns(
    path: Path,
    known: Sequence[str],
    label: str | None,
    names: Sequence[str] | None,
    index: Collection[str] = (),
) -> list[str]:
    """The columns of the features: `names`, or all but the labels, the index and row numbers."""
    repeated = [name for name, count in Counter(known).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: two columns have one name, {repeated[0]!r}.")
    if label is not None and label not in known:
        shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        raise DataError(f"{path}: has no column {label!r}; it has {shown}.")
    if names is None:
        names = [n for n in known if n not in (label, *index) and not ROW_NUMBERS.fullmatch(n)]
    there = set(known)
    missing = [name for name in names if name not in there]
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        form = f"lacks {len(missing)} of the model's {len(names)} features: {shown}"
        raise DataError(f"{path}: {form}.")
    if not names:
        raise DataError(f"{path}: has no columns besides the labels.")
    return list(names)


def stacked(
    path: Path, names: Sequence[str], columns: Iterable[np.ndarray], first: int = 0
) -> np.ndarray:
    """Columns of features side by side, [n, D]."""
    parts = [as_features(path, name, c, first) for name, c in zip(names, columns, strict=True)]
    return np.stack(parts, axis=-1)


def file_fingerprint(path: Path) -> dict[str, int]:
    """Size, time of change and a checksum of blocks that are spread over a file."""
    status = path.stat()
    checksum = 0
    with path.open("rb", buffering=0) as file:
        last = max(status.st_size - SAMPLE_BYTES, 0)
        for place in np.linspace(0, last, SAMPLES).astype(np.int64).tolist():
            file.seek(place)
            checksum = zlib.crc32(file.read(SAMPLE_BYTES), checksum)
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns, "sample": checksum}

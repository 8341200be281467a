"""The rows of a file of any format, read in runs, and the choice of its columns."""

import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softjax.tables._cells import as_features
from softjax.tables._columns import Column, Levels, encoded, feature_names, listed
from softjax.tables._errors import DataError

SAMPLES, SAMPLE_BYTES = 64, 4096

# The names that R, pandas and Arrow give to a column of row numbers.
ROW_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")


class FileRows(ABC):
    """Features and labels of the rows of a file.

    Attributes:
        path: the file.
        label: the column of the labels; None if none are read.
        columns: the columns of the features.
        names: the names of the features; a column of categories has several or none.
        num_rows: N.
        num_features: D.
        fingerprint: values that change when the file does, for JSON.
        any_classes: see `Reading`.
    """

    any_classes = False

    def __init__(self, path: Path, label: str | None, columns: list[Column], num_rows: int):
        if not num_rows:
            raise DataError(f"{path}: has no rows.")
        self.path, self.label, self.columns = path, label, columns
        self.names = feature_names(path, columns)
        self.num_rows, self.num_features = num_rows, len(self.names)
        if not self.names:
            raise DataError(f"{path}: has no column that varies besides the labels.")

    @property
    def paths(self) -> list[Path]:
        return [self.path]

    @property
    def coded(self) -> np.ndarray:
        """Which features are indicators of a category, [D]."""
        return np.array([c.levels is not None for c in self.columns for _ in c.features], bool)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprints of the files by their names."""
        return {path.name: file_fingerprint(path) for path in self.paths}

    @abstractmethod
    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features [n, D] and the labels [n] of a run of rows; NaN for an empty cell."""


class HeldRows(FileRows):
    """Rows that are in memory: features [N, D], and labels [N] or None."""

    def __init__(
        self,
        path: Path,
        label: str | None,
        columns: list[Column],
        features: np.ndarray,
        labels: np.ndarray | None,
    ):
        super().__init__(path, label, columns, len(features))
        self.features = features
        self.labels = np.empty(len(features), object) if labels is None else labels

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.features[start:stop], self.labels[start:stop]


def chosen_columns(
    path: Path,
    known: Sequence[str],
    label: str | None,
    names: Sequence[str | Column] | None,
    index: Collection[str] = (),
    drop: Collection[str] = (),
) -> list[Column]:
    """The columns of the features: `names`, or all but labels, index and row numbers."""
    there = Counter(known)
    for name in (label, *drop):
        if name is not None and name not in there:
            are_numbers = len(known) > 1 and known == [str(i) for i in range(len(known))]  # of .npy
            shown = f"0 to {known[-1]}" if are_numbers else listed(known)
            hint = " Repeat --drop for each column." if name in drop and "," in name else ""
            raise DataError(f"{path}: has no column {name!r}; it has {shown}.{hint}")
    if label in drop:
        raise DataError(f"{path}: column {label!r} has the labels; it cannot be dropped.")
    if names is None:
        without = {label, *index, *drop}
        names = [n for n in known if n not in without and not ROW_NUMBERS.fullmatch(n)]
    columns = [Column(name) if isinstance(name, str) else name for name in names]
    used = [column.name for column in columns] + ([] if label is None else [label])
    repeated = [name for name in used if there[name] > 1]
    if repeated:
        raise DataError(f"{path}: two columns have one name, {repeated[0]!r}.")
    missing = [column.name for column in columns if column.name not in there]
    if missing:
        form = f"lacks {len(missing)} of the model's {len(columns)} columns: {listed(missing)}"
        raise DataError(f"{path}: {form}.")
    if not columns:
        raise DataError(f"{path}: has no columns besides the labels.")
    return columns


def stacked(
    path: Path,
    columns: Sequence[Column],
    cells: Iterable[np.ndarray],
    levels: Mapping[str, Levels] | None = None,
    first: int = 0,
) -> np.ndarray:
    """The columns of cells as one matrix [n, D]; `first` is the number of the first row."""
    parts = []
    for column, values in zip(columns, cells, strict=True):
        if column.levels is None:
            parts.append(as_features(path, column.name, values, first))
        else:
            parts.append((levels or {})[column.name].codes(values.tolist(), first))
    return encoded(columns, np.stack(parts, axis=-1))


def known_levels(path: Path, columns: Sequence[Column]) -> dict[str, Levels]:
    return {c.name: Levels(path, c.name, c.levels) for c in columns if c.levels is not None}


def file_fingerprint(path: Path) -> dict[str, int]:
    """The size, the modification time and a checksum of blocks spread over a file."""
    status = path.stat()
    checksum = 0
    with path.open("rb", buffering=0) as file:
        last = max(status.st_size - SAMPLE_BYTES, 0)
        for place in np.linspace(0, last, SAMPLES).astype(np.int64).tolist():
            file.seek(place)
            checksum = zlib.crc32(file.read(SAMPLE_BYTES), checksum)
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns, "sample": checksum}

"""Rows of a file, read in runs: `.csv`, `.npy`, `.npz` and `.parquet`, all decoded in one way."""

import csv
import json
import re
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from softjax.tables._cells import as_features, number
from softjax.tables._errors import DataError, refuse_bytes, understood
from softjax.tables._npy import NpyFile, read_array

SAMPLES, SAMPLE_BYTES = 64, 4096

# The names that R, pandas and Arrow give to row numbers which stand in the file as a column.
ROW_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")


class FileRows:
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

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features [n, D], NaN where a cell is empty, and the labels [n] of a run of rows."""
        raise NotImplementedError


class HeldRows(FileRows):
    """Rows that are in memory.

    Args:
        path, label, names: as `FileRows`.
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


class CsvRows(HeldRows):
    """Rows of a CSV file in UTF-8, whose first line names the columns.

    Numbers are kept in 8 bytes a cell, and each text among the labels once.
    """

    def __init__(self, path: Path, label: str | None, names: Sequence[str] | None = None):
        with understood(path), path.open(newline="", encoding="utf-8-sig") as file:
            rows = filter(None, csv.reader(_without_nul(path, file), strict=True))
            header = next(rows, None)
            if header is None:
                raise DataError(f"{path}: it is empty.")
            chosen = chosen_columns(path, header, label, names)
            place = {name: i for i, name in enumerate(header)}
            places = [place[name] for name in chosen]
            values, labels, texts = array("d"), [], {}
            row = 0
            for row, cells in enumerate(rows, 1):
                if len(cells) != len(header):
                    fields = f"row {row} has {len(cells)} fields, the header {len(header)}"
                    raise DataError(f"{path}: {fields}.")
                values.extend(_numbers(path, chosen, row, [cells[i] for i in places]))
                if label is not None:
                    text = cells[place[label]]
                    labels.append(texts.setdefault(text, text))
        features = np.frombuffer(values, np.float64) if row else np.empty(0)
        super().__init__(
            path, label, chosen, features.reshape(row, len(chosen)), _typed(labels, texts)
        )


class NpyRows(FileRows):
    """Rows of a `.npy` file of rank 2, whose columns are named 0, 1, 2, ...

    Args:
        path: the file.
        label: the name of the column of the labels, or the path of a `.npy` file that holds them.
        names: those of the features; None for all the other columns.
    """

    def __init__(self, path: Path, label: str | None, names: Sequence[str] | None = None):
        self.file, self.apart = NpyFile(path), None
        if len(self.file.shape) != 2:
            raise DataError(f"{path}: expected an array of rank 2, got shape {self.file.shape}.")
        known = [str(i) for i in range(self.file.shape[1])]
        column = label
        if label is not None and label not in known and label.lower().endswith(".npy"):
            self.apart, column = NpyFile(Path(label)), None
            if self.apart.shape != self.file.shape[:1]:
                expected = f"expected shape ({self.file.shape[0]},), a label for each row of {path}"
                raise DataError(f"{label}: {expected}, got shape {self.apart.shape}.")
        chosen = chosen_columns(path, known, column, names)
        self.column = None if column is None else int(column)
        self.places = None if chosen == known else [int(name) for name in chosen]
        super().__init__(path, label, chosen, self.file.shape[0])

    @property
    def paths(self) -> list[Path]:
        """The files that are read."""
        return [self.path] if self.apart is None else [self.path, self.apart.path]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the labels of a run of rows."""
        block = self.file[start:stop]
        if self.apart is not None:
            labels = self.apart[start:stop]
        else:
            labels = np.empty(len(block), object) if self.column is None else block[:, self.column]
        features = block if self.places is None else block[:, self.places]
        if features.dtype.kind in "biuf":
            return as_features(self.path, "", features), labels
        return _stacked(self.path, self.names, features.T, start), labels


class NpzRows(HeldRows):
    """Rows of a `.npz` file, which names its arrays; columns of one of rank 2 are 0, 1, 2, ..."""

    def __init__(self, path: Path, label: str | None, names: Sequence[str] | None = None):
        columns: list[tuple[str, np.ndarray]] = []
        with understood(path), zipfile.ZipFile(path) as archive:
            refuse_bytes(path, sum(m.file_size for m in archive.infolist()), path.stat().st_size)
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    raise DataError(f"{path}: holds {member.filename!r}, which is no array.")
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    values = read_array(path, file, member.file_size)
                if values.ndim not in (1, 2):
                    expected = f"array {name!r}: expected an array of rank 1 or 2"
                    raise DataError(f"{path}: {expected}, got shape {values.shape}.")
                if values.ndim == 1:
                    columns.append((name, values))
                else:
                    columns += [(str(i), column) for i, column in enumerate(values.T)]
        known = dict(columns)
        chosen = chosen_columns(path, [name for name, _ in columns], label, names)
        used = chosen if label is None else [label, *chosen]
        lengths = {name: len(known[name]) for name in used}
        for name, length in lengths.items():
            if length != lengths[used[0]]:
                form = f"{used[0]!r} has {lengths[used[0]]} rows, and {name!r} {length}"
                raise DataError(f"{path}: has columns of different lengths: {form}.")
        features = _stacked(path, chosen, [known[name] for name in chosen])
        super().__init__(path, label, chosen, features, None if label is None else known[label])


class ParquetRows(FileRows):
    """Rows of a Parquet file, whose row groups are read one at a time.

    Args:
        path: the file.
        label: the name of the column of the labels.
        names: those of the features; None for all the other columns, without an index of pandas.
    """

    def __init__(self, path: Path, label: str | None, names: Sequence[str] | None = None):
        try:
            from pyarrow import parquet
        except ModuleNotFoundError:
            install = "pip install 'softjax-regression[parquet]'"
            raise DataError(f"{path}: Parquet files need pyarrow: {install}") from None
        with understood(path):
            self.file = parquet.ParquetFile(path)
            schema = self.file.schema_arrow
            metadata = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
            # A range is told by its bounds in place of a name; it is no column of the file.
            index = [name for name in metadata.get("index_columns", ()) if isinstance(name, str)]
            meta = self.file.metadata
            sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
            if min(sizes, default=0) < 0 or sum(sizes) != meta.num_rows:
                raise DataError(f"{path}: cannot be read: its numbers of rows do not add up.")
        chosen = chosen_columns(path, schema.names, label, names, index)
        self.ends = np.cumsum(sizes, dtype=np.int64)
        self.last: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None
        super().__init__(path, label, chosen, sum(sizes))

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the labels of a run of rows."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right").tolist()
        parts = []
        for group in range(first, last + 1):
            begin = int(self.ends[group - 1]) if group else 0
            inside = slice(max(start - begin, 0), stop - begin)
            parts.append([part[inside] for part in self._row_group(group, begin)])
        features, labels = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(labels)

    def _row_group(self, group: int, begin: int) -> tuple[np.ndarray, np.ndarray]:
        if self.last is None or self.last[0] != group:
            self.last = None  # the memory of one, never of two
            columns = self.names if self.label is None else [*self.names, self.label]
            with understood(self.path):
                table = self.file.read_row_group(group, columns=columns)
                arrays = {name: _decoded(table[name]) for name in columns}
            if len(table) != self.ends[group] - begin:
                raise DataError(f"{self.path}: cannot be read: a row group lacks rows.")
            features = _stacked(self.path, self.names, [arrays[n] for n in self.names], begin)
            labels = np.empty(len(table), object) if self.label is None else arrays[self.label]
            self.last = (group, (features, labels))
        return self.last[1]


READERS = {".csv": CsvRows, ".npy": NpyRows, ".npz": NpzRows, ".parquet": ParquetRows}


def open_file(path: Path, label: str | None, names: Sequence[str] | None = None) -> FileRows:
    """The rows of a file.

    Args:
        path: the file.
        label: the column of the labels; None to read none.
        names: the columns of the features; None for all others that are no row numbers.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: the suffix must be one of {', '.join(READERS)}.")
    with understood(path):
        if not path.exists():
            raise FileNotFoundError
        if not path.is_file():
            raise DataError(f"{path}: is no file, but a folder or a device.")
    return reader(path, label, names)


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
    missing = sorted(set(names).difference(known), key=list(names).index)
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        form = f"lacks {len(missing)} of the model's {len(names)} features: {shown}"
        raise DataError(f"{path}: {form}.")
    if not names:
        raise DataError(f"{path}: has no columns beside the labels.")
    return list(names)


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


def _without_nul(path: Path, file: IO[str]) -> Iterator[str]:
    for line in file:
        if "\0" in line:
            raise DataError(f"{path}: holds a byte of 0: it is not text in UTF-8.")
        yield line


def _numbers(path: Path, names: list[str], row: int, cells: list[str]) -> list[float]:
    """The numbers of a row, by the rule of `number`, which is asked only where it may differ."""
    text = "".join(cells)
    if text.isascii() and "_" not in text:
        try:
            return list(map(float, cells))
        except ValueError:
            pass
    return [number(path, name, row, cell) for name, cell in zip(names, cells, strict=True)]


def _typed(labels: list[str], texts: Iterable[str]) -> np.ndarray:
    """Labels as integers where each is one, as Python writes it; else as text."""
    try:
        if all(str(int(text)) == text for text in texts):
            return np.array([int(label) for label in labels], np.int64)
    except (ValueError, OverflowError):
        pass
    return np.array(labels, object)


def _stacked(
    path: Path, names: Sequence[str], columns: Iterable[np.ndarray], first: int = 0
) -> np.ndarray:
    parts = [as_features(path, name, c, first) for name, c in zip(names, columns, strict=True)]
    return np.stack(parts, axis=-1)


def _decoded(column: Any) -> np.ndarray:
    """A column of Arrow in NumPy; integers stay integers where some are missing."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count and pyarrow.types.is_integer(column.type):
        return np.array(column.to_pylist(), object)
    return column.to_numpy()

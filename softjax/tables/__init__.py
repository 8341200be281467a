"""Features and labels from CSV, NumPy and Parquet files, with errors that name row and column.

A fit in memory and a streamed fit use the same readers, so that both accept and refuse the same
files.
"""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np

from softjax import _foreign
from softjax.tables._cells import (
    MOST_CLASSES,
    NumberError,
    as_classes,
    as_features,
    check_classes,
    good_rows,
    like,
    numbers_as_classes,
)
from softjax.tables._columns import (
    PLAIN,
    SHOWN_LEVELS,
    Column,
    Levels,
    Names,
    Reading,
    constant_columns,
    described,
    encoded,
    filled,
    like_identifiers,
    refuse_identifiers,
    with_fills,
)
from softjax.tables._csv import CsvRows
from softjax.tables._errors import (
    DataError,
    IncompleteError,
    lacking_memory,
    refuse_bytes,
    understood,
)
from softjax.tables._npy import NpyRows, NpzRows
from softjax.tables._parquet import ParquetRows
from softjax.tables._rows import (
    FileRows,
    HeldRows,
    chosen_columns,
    file_fingerprint,
    known_levels,
    stacked,
)

__all__ = [
    "MOST_CLASSES",
    "PLAIN",
    "Column",
    "DataError",
    "Dataset",
    "FileRows",
    "IncompleteError",
    "Levels",
    "NumberError",
    "Reading",
    "as_classes",
    "as_features",
    "check_classes",
    "constant_columns",
    "dataset",
    "described",
    "encoded",
    "error_of_rows",
    "features",
    "features_of",
    "file_fingerprint",
    "filled",
    "good_rows",
    "is_text",
    "lacking_memory",
    "like",
    "like_identifiers",
    "missing_cells",
    "numbers_as_classes",
    "open_file",
    "refuse_empty",
    "suffix",
    "with_fills",
]

READERS = {
    ".csv": CsvRows,
    ".csv.gz": CsvRows,
    ".npy": NpyRows,
    ".npz": NpzRows,
    ".parquet": ParquetRows,
    ".tsv": CsvRows,
    ".tsv.gz": CsvRows,
}


class Dataset(NamedTuple):
    """Features and labels of a file."""

    features: np.ndarray  # float64 [N, D]
    labels: np.ndarray  # int32 [N], class indices
    feature_names: list[str]  # D names
    class_names: list[str]  # K names, in the order of the indices
    rows: np.ndarray  # the number of each example in the file, counted from 0, int64 [N]
    # The columns of the file. A column of categories becomes several features or none.
    columns: Sequence[Column] = ()
    skipped: int = 0  # the number of rows of the file that were skipped

    def part(self, chosen: np.ndarray) -> "Dataset":
        """The chosen examples."""
        arrays = {name: getattr(self, name)[chosen] for name in ("features", "labels", "rows")}
        return self._replace(**arrays)


def suffix(path: Path) -> str:
    """The suffix that determines the format of a file, such as .csv or .csv.gz."""
    name = path.name.lower()
    return next((s for s in sorted(READERS, key=len, reverse=True) if name.endswith(s)), "")


def is_text(path: Path) -> bool:
    """Whether a file is read as CSV, so that a separator and an encoding make sense."""
    return READERS.get(suffix(path)) is CsvRows


def open_file(
    path: Path, label: str | None, names: Names = None, reading: Reading = PLAIN
) -> FileRows:
    """The rows of a file; a `label` of None reads no labels.

    `names` are the columns of the features; None for all but the labels and row numbers.
    """
    reader = READERS.get(suffix(path))
    if reader is None:
        raise DataError(f"{path}: the suffix must be one of {', '.join(READERS)}.")
    if not is_text(path) and (reading.separator or reading.encoding or reading.decimal):
        options = "--separator, --encoding and --decimal"
        raise DataError(f"{path}: {options} are for .csv and .tsv files.")
    with understood(path):
        if not path.exists():
            raise FileNotFoundError
        if not path.is_file():
            raise DataError(f"{path}: is no file, but a folder or a device.")
    rows = reader(path, label, names, reading)
    there = [column.name for column in rows.columns]
    for name in reading.categories:
        if name not in there:
            hint = " Repeat --category for each column." if "," in name else ""
            raise DataError(f"{path}: --category {name}: has no such feature.{hint}")
    rows.any_classes = reading.any_classes
    return rows


def dataset(
    path: Path,
    label_column: str,
    skip_bad: bool = False,
    *,
    keep_missing: bool = False,
    reading: Reading = PLAIN,
) -> Dataset:
    """Reads one column as the labels and all other columns as the features.

    Rows without a label, or with a feature that is not finite in float32, raise an
    `IncompleteError`, or are skipped with `skip_bad`. With `keep_missing` a feature may be NaN, for
    a missing cell.
    """
    rows = open_file(path, label_column, reading=reading)
    x, labels = _all(rows)
    names, codes = as_classes(path, label_column, labels)
    if np.isnan(x[0]).any():  # otherwise no column is empty
        refuse_empty(rows, missing_cells(x))
    good = good_rows(x, codes, keep_missing)
    kept = np.flatnonzero(good)
    if len(kept) < len(x):
        if not skip_bad:
            raise error_of_rows(rows, np.flatnonzero(~good), missing_cells(x))
        x, codes = x[kept], codes[kept]
    refuse_identifiers(path, rows.columns, x)
    there = {names[code] for code in np.unique(codes)}
    classes = check_classes(path, label_column, there, len(x), reading.any_classes)
    place = {name: i for i, name in enumerate(classes)}
    indices = np.array([place.get(name, -1) for name in names], np.int32)[codes]
    skipped = rows.num_rows - len(kept)
    return Dataset(x, indices, rows.names, classes, kept, rows.columns, skipped)


def features(path: Path, names: Sequence[str | Column], reading: Reading = PLAIN) -> np.ndarray:
    """The features of the named columns as finite numbers, float64 [N, D]."""
    rows = open_file(path, None, names, reading)
    x, _ = _all(rows)
    x = filled(rows.columns, x)
    good = good_rows(x)
    if not good.all():
        raise error_of_rows(rows, np.flatnonzero(~good), missing_cells(x))
    return x


def missing_cells(features: np.ndarray) -> np.ndarray:
    """The number of entries of each feature that are not finite in float32, [D]."""
    return np.sum(~good_rows(features.reshape(-1, 1)).reshape(features.shape), axis=0)


def refuse_empty(rows: FileRows, missing: np.ndarray) -> None:
    """Refuses columns without any cell, which can neither be filled nor skipped with their rows.

    `missing` [D] has the number of entries of each feature that are not finite.
    """
    if (missing < rows.num_rows).all():
        return
    empty = (missing == rows.num_rows) & np.isnan(rows.read(0, 1)[0][0])
    names = list(dict.fromkeys(np.array(_columns_of_features(rows), object)[empty].tolist()))
    if names:
        what = "column" if len(names) == 1 else "columns"
        drop = " ".join(f"--drop {quote(name)}" for name in names[:SHOWN_LEVELS])
        it = "it" if len(names) == 1 else "them"
        listed = ", ".join(map(repr, names[:SHOWN_LEVELS]))
        raise DataError(
            f"{rows.path}: {what} {listed}: no row has a value. {drop} leaves {it} out."
        )


def error_of_rows(rows: FileRows, wrong: np.ndarray, counts: np.ndarray) -> IncompleteError:
    """The error of the first incomplete row, with the number of the other incomplete rows.

    `wrong` has the numbers of these rows, and `counts` [D] how many entries of each feature are not
    finite.
    """
    first = int(wrong[0])
    x, _ = rows.read(first, first + 1)
    bad = np.flatnonzero(~good_rows(x.T))
    others = len(wrong) - 1
    is_so = "1 other row is" if others == 1 else f"{others} other rows are"
    also = f"; {is_so} not complete either" if others else ""
    columns = {}
    for column, count in zip(_columns_of_features(rows), counts.tolist(), strict=True):
        if count:
            columns[column] = count
    if others and columns:
        listed = ", ".join(f"{name} {count}" for name, count in list(columns.items())[:20])
        also += f" (of {rows.num_rows} rows, {listed})"
    if not len(bad):
        where = f"{rows.path}: column {rows.label!r}, row {first + 1}"
        return IncompleteError(f"{where}: the label is missing{also}.", can_be_filled=False)
    value = x[0, bad[0]]
    where = f"{rows.path}: column {_columns_of_features(rows)[bad[0]]!r}, row {first + 1}"
    if rows.coded[bad[0]]:
        return IncompleteError(f"{where}: the cell is empty or NA{also}.", can_be_filled=True)
    empty = bool(np.isnan(value))
    got = "nan or an empty cell" if empty else value
    line = f"{where}: expected a finite number of float32, got {got}{also}."
    return IncompleteError(line, can_be_filled=empty)


def _columns_of_features(rows: FileRows) -> list[str]:
    """The name of the column of each feature."""
    return [column.name for column in rows.columns for _ in column.features]


def _all(rows: FileRows) -> tuple[np.ndarray, np.ndarray]:
    """The features in float64, and the labels, of all rows."""
    refuse_bytes(rows.path, 8 * rows.num_rows * rows.num_features)
    x, labels = rows.read(0, rows.num_rows)
    return x.astype(np.float64, copy=False), labels


def features_of(data: Any, columns: Sequence[Column]) -> np.ndarray:
    """The features of a DataFrame or another table with named columns, float64 [N, D].

    A record, which is a dictionary with one cell for each column, is a table of one row.
    Errors name the column and the row, as for files.
    """
    path = Path("data")
    there = _foreign.column_names(data) or list(data)
    # As in CSV files, spaces around a name do not count; a number may be a name in pandas.
    named = {str(name).strip(" "): name for name in there} | dict(zip(there, there, strict=True))
    chosen = chosen_columns(path, [*there, *(named.keys() - there)], None, columns)
    cells = []
    for column in chosen:
        values = data[named[column.name]]
        if hasattr(values, "to_pylist"):  # Arrow: keeps whole numbers beside missing cells
            values = values.to_pylist()
        elif hasattr(values, "cat"):  # categories of pandas, or any column of Polars
            values = values.astype(object) if hasattr(values, "astype") else values.to_list()
        values = np.atleast_1d(np.asarray(_foreign.filled(values)))  # a record has one cell
        shape = cells[0].shape if cells else (values.size,)
        if values.shape != shape:
            got = f"an array of shape {values.shape}"
            raise DataError(f"data: column {column.name!r}: expected shape {shape}, got {got}.")
        cells.append(values)
    x = filled(chosen, stacked(path, chosen, cells, known_levels(path, chosen)).astype(np.float64))
    good = good_rows(x)
    if not good.all():
        rows = HeldRows(path, None, chosen, x, None)
        raise error_of_rows(rows, np.flatnonzero(~good), missing_cells(x))
    return x

"""Data files as named columns: CSV, NumPy and Parquet, with errors that name the place."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

LARGEST = float(np.finfo(np.float32).max)

Columns = dict[str, np.ndarray]


class DataError(Exception):
    """What is wrong with a data file, in one line."""


class Dataset(NamedTuple):
    """Features and labels of a file.

    Attributes:
        features: float64 [N, D].
        labels: int32 [N], the index of the class.
        feature_names: D names.
        class_names: K names, in the order of the indices.
    """

    features: np.ndarray
    labels: np.ndarray
    feature_names: list[str]
    class_names: list[str]


def read(path: Path) -> Columns:
    """The columns of a file, each with its name.

    The columns of a .npy file, and those of an array of rank 2 in a .npz file, are named by number.
    """
    readers = {".csv": _csv, ".npy": _npy, ".npz": _npz, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise DataError(f"{path}: the suffix must be one of {', '.join(readers)}.")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    try:
        columns = readers[suffix](path)
    except (OSError, ValueError, EOFError, BadZipFile, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise DataError(f"{path}: has no rows, or columns of different lengths.")
    return columns


def dataset(path: Path, label_column: str) -> Dataset:
    """The column of labels, and all the others as features."""
    columns = read(path)
    labels, class_names = _classes(path, _column(path, columns, label_column), label_column)
    names = [name for name in columns if name != label_column]
    return Dataset(features(path, columns, names), labels, names, class_names)


def features(path: Path, columns: Mapping[str, np.ndarray], names: Iterable[str]) -> np.ndarray:
    """The named columns as finite numbers [N, D]."""
    numbers = [_numbers(path, name, _column(path, columns, name)) for name in names]
    if not numbers:
        raise DataError(f"{path}: has no columns beside the labels.")
    return np.stack(numbers, axis=-1)


def _column(path: Path, columns: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in columns:
        known = ", ".join(list(columns)[:10]) + (", ..." if len(columns) > 10 else "")
        raise DataError(f"{path}: has no column {name!r}; it has {known}.")
    return columns[name]


def _numbers(path: Path, name: str, column: np.ndarray) -> np.ndarray:
    if column.dtype.kind in "cmM":
        raise DataError(f"{path}: column {name!r}: expected numbers, got {column.dtype}.")
    try:
        numbers = column.astype(np.float64)
    except (TypeError, ValueError):
        row = next(i for i, value in enumerate(column) if not _is_number(value))
        where = f"column {name!r}, row {row + 1}"
        raise DataError(f"{path}: {where}: expected a number, got {str(column[row])!r}.") from None
    wrong = np.flatnonzero(~(np.abs(numbers) <= LARGEST))
    if len(wrong):
        where = f"column {name!r}, row {wrong[0] + 1}"
        expected = "a finite number of float32"
        raise DataError(f"{path}: {where}: expected {expected}, got {numbers[wrong[0]]}.")
    return numbers


def _classes(path: Path, column: np.ndarray, name: str) -> tuple[np.ndarray, list[str]]:
    missing = [
        i for i, value in enumerate(column) if value is None or value != value or value == ""
    ]
    if missing:
        raise DataError(f"{path}: column {name!r}, row {missing[0] + 1}: the label is missing.")
    values, labels = np.unique(
        column if column.dtype != object else column.astype(str), return_inverse=True
    )
    if len(values) < 2:
        raise DataError(f"{path}: column {name!r}: all labels are {values[0]!s}, one class only.")
    return labels.astype(np.int32), [str(value) for value in values]


def _is_number(value: object) -> bool:
    try:
        return np.asarray([value]).astype(np.float64).ndim == 1
    except (TypeError, ValueError):
        return False


def _csv(path: Path) -> Columns:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        raise ValueError("it is empty")
    header, *body = rows
    if len(set(header)) != len(header):
        raise ValueError("two columns have one name")
    for number, row in enumerate(body, 1):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} fields, the header {len(header)}")
    cells = np.array(body, dtype=str).reshape(len(body), len(header))
    return {name: _as_numbers(cells[:, i]) for i, name in enumerate(header)}


def _as_numbers(column: np.ndarray) -> np.ndarray:
    """Whole numbers as integers, so that labels are in their order; all else as it stands."""
    try:
        return column.astype(np.int64)
    except (ValueError, OverflowError):
        return column


def _npy(path: Path) -> Columns:
    return _numbered(np.load(path, allow_pickle=False))


def _npz(path: Path) -> Columns:
    columns: Columns = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            array = arrays[name]
            new = {name: array} if array.ndim == 1 else _numbered(array)
            if new.keys() & columns.keys():
                raise ValueError("two columns have one name")
            columns |= new
    return columns


def _numbered(array: np.ndarray) -> Columns:
    if array.ndim != 2:
        raise ValueError(f"expected an array of rank 2, got shape {array.shape}")
    return {str(i): array[:, i] for i in range(array.shape[1])}


def _parquet(path: Path) -> Columns:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        install = "pip install 'softjax-regression[parquet]'"
        raise DataError(f"{path}: Parquet files need pyarrow: {install}") from None
    table = parquet.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}

"""Data files as features and labels: CSV, NumPy and Parquet, with errors that name the place.

One reader serves a fit in memory and one that streams: both take, and refuse, the same files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softjax.tables._cells import MOST_CLASSES, as_classes, check_classes, good_rows
from softjax.tables._csv import CsvRows
from softjax.tables._errors import DataError, IncompleteError, refuse_bytes, understood
from softjax.tables._npy import NpyRows, NpzRows
from softjax.tables._parquet import ParquetRows
from softjax.tables._rows import FileRows, file_fingerprint

__all__ = [
    "MOST_CLASSES",
    "DataError",
    "Dataset",
    "FileRows",
    "IncompleteError",
    "as_classes",
    "check_classes",
    "dataset",
    "error_of_rows",
    "features",
    "file_fingerprint",
    "good_rows",
    "open_file",
]


READERS = {".csv": CsvRows, ".npy": NpyRows, ".npz": NpzRows, ".parquet": ParquetRows}


class Dataset(NamedTuple):
    """Features and labels of a file.

    Attributes:
        features: float64 [N, D].
        labels: int32 [N], the index of the class.
        feature_names: D names.
        class_names: K names, in the order of the indices.
        rows: the number of each example in the file, counted from 0, int64 [N].
    """

    features: np.ndarray
    labels: np.ndarray
    feature_names: list[str]
    class_names: list[str]
    rows: np.ndarray


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


def dataset(path: Path, label_column: str, skip_bad: bool = False) -> Dataset:
    """The column of labels, and all the others as features.

    Rows without a label, or with a feature that is no finite number of float32, are refused by an
    `IncompleteError`, or skipped.
    """
    rows = open_file(path, label_column)
    x, labels = _all(rows)
    names, codes = as_classes(path, label_column, labels)
    good = good_rows(x, codes)
    kept = np.flatnonzero(good)
    if len(kept) < len(x):
        if not skip_bad:
            raise error_of_rows(rows, np.flatnonzero(~good))
        x, codes = x[kept], codes[kept]
    classes = check_classes(path, label_column, {names[code] for code in np.unique(codes)}, len(x))
    place = {name: i for i, name in enumerate(classes)}
    indices = np.array([place.get(name, -1) for name in names], np.int32)[codes]
    return Dataset(x, indices, rows.names, classes, kept)


def features(path: Path, names: Sequence[str]) -> np.ndarray:
    """The named columns as finite numbers, float64 [N, D]."""
    rows = open_file(path, None, names)
    x, _ = _all(rows)
    good = good_rows(x)
    if not good.all():
        raise error_of_rows(rows, np.flatnonzero(~good))
    return x


def error_of_rows(rows: FileRows, wrong: np.ndarray) -> IncompleteError:
    """What is wrong with the first of the rows `wrong`, and how many others are not complete."""
    first = int(wrong[0])
    x, _ = rows.read(first, first + 1)
    bad = np.flatnonzero(~good_rows(x.T))
    others = len(wrong) - 1
    is_so = "1 other row is" if others == 1 else f"{others} other rows are"
    also = f"; {is_so} not complete either" if others else ""
    if not len(bad):
        where = f"{rows.path}: column {rows.label!r}, row {first + 1}"
        return IncompleteError(f"{where}: the label is missing{also}.")
    value = x[0, bad[0]]
    got = "nan or an empty cell" if np.isnan(value) else value
    where = f"{rows.path}: column {rows.names[bad[0]]!r}, row {first + 1}"
    return IncompleteError(f"{where}: expected a finite number of float32, got {got}{also}.")


def _all(rows: FileRows) -> tuple[np.ndarray, np.ndarray]:
    """The features in float64, and the labels, of all rows."""
    refuse_bytes(rows.path, 8 * rows.num_rows * rows.num_features)
    x, labels = rows.read(0, rows.num_rows)
    return x.astype(np.float64, copy=False), labels

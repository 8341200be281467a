"""Where rows come from: arrays that slice, `.npy` and `.parquet` files, read in runs of rows."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from softjax import _checks
from softjax._numerics import compute_dtype
from softjax.tables import DataError

SAMPLES, SAMPLE_BYTES = 64, 4096


class Rows(Protocol):
    """Features and labels of N rows, read in runs.

    Attributes:
        num_rows: N.
        num_features: D.
        fingerprint: what a change of the data changes, as JSON can hold it.
    """

    num_rows: int
    num_features: int

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features [n, D] and the labels [n] of rows start, start + 1, ..., stop - 1."""
        ...


class ArrayRows:
    """Rows of anything that has a shape and slices: NumPy, a memmap, h5py, zarr.

    Args:
        features: real [N, D].
        labels: [N], class indices.

    Raises:
        ValueError: the shapes do not agree.

    Example:
        >>> import numpy as np, softjax
        >>> rows = softjax.streaming.ArrayRows(np.zeros((5, 3)), np.arange(5))
        >>> rows.num_rows, rows.read(1, 3)[1].tolist()
        (5, [1, 2])
    """

    def __init__(self, features: Any, labels: Any):
        if len(features.shape) != 2 or not features.shape[0]:
            raise _error("features", "of shape (examples, features)", f"shape {features.shape}")
        if tuple(labels.shape) != (features.shape[0],):
            expected = f"of shape ({features.shape[0]},)"
            raise _error("labels", expected, f"shape {tuple(labels.shape)}")
        self.features, self.labels = features, labels
        self.num_rows, self.num_features = features.shape

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The shape, and a checksum of rows that are spread over the arrays."""
        places = np.linspace(0, self.num_rows - 1, min(SAMPLES, self.num_rows)).astype(int)
        checksum = 0
        for place in places.tolist():
            for part in self.read(place, place + 1):
                part = part.astype(str) if part.dtype == object else part  # not where it lies
                checksum = zlib.crc32(np.ascontiguousarray(part).tobytes(), checksum)
        return {"shape": list(self.features.shape), "sample": checksum}

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the labels of a run of rows."""
        return _in_memory(self.features[start:stop]), _in_memory(self.labels[start:stop])


class NpyFile:
    """An array in a `.npy` file, sliced by reads in place of a map.

    What is read does not stay in the memory of the process, and a file that has been cut short
    since is an error with a name, where a map of it would end the process.
    """

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                self.shape, fortran_order, self.dtype = read_header(file)
                self.offset = file.tell()
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such file.") from None
        except (ValueError, AttributeError, OSError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        if self.dtype.hasobject or (fortran_order and len(self.shape) > 1):
            raise DataError(f"{path}: expected numbers, row after row, as np.save writes them.")
        if not self.shape:
            raise DataError(f"{path}: expected rows, got shape ().")
        self.path = path
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        if path.stat().st_size < self.offset + self.shape[0] * self.row_bytes:
            raise DataError(f"{path}: is shorter than its header says: it was cut.")

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.row_bytes)
            bytes_of_out, done = out.reshape(-1).view(np.uint8), 0
            while done < out.nbytes:
                count = file.readinto(bytes_of_out[done:].data)
                if not count:
                    raise DataError(f"{self.path}: ends before row {stop}: it was cut.")
                done += count
        return out


class NpyRows(ArrayRows):
    """Rows of `.npy` files: labels in a file of their own, or in a column of the features'.

    Args:
        path: features [N, D], or [N, D + 1] with the labels.
        labels: the path of the labels [N], or the number of their column.
    """

    def __init__(self, path: Path, labels: Path | int):
        file = NpyFile(path)
        if len(file.shape) != 2:
            raise DataError(f"{path}: expected an array of rank 2, got shape {file.shape}.")
        if file.dtype.kind not in "biuf":
            raise DataError(f"{path}: expected numbers, got {file.dtype}.")
        self.paths, self.column = [path], None
        if isinstance(labels, Path):
            self.paths.append(labels)
            try:
                super().__init__(file, NpyFile(labels))
            except ValueError as error:
                raise DataError(f"{labels}: {error}") from error
            return
        self.column = labels
        if not 0 <= self.column < file.shape[1]:
            known = f"0 to {file.shape[1] - 1}"
            raise DataError(f"{path}: has no column {str(labels)!r}; it has {known}.")
        self.features = file
        self.num_rows, self.num_features = file.shape[0], file.shape[1] - 1

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the files."""
        return {path.name: file_fingerprint(path) for path in self.paths}

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the labels of a run of rows."""
        if self.column is None:
            return super().read(start, stop)
        both = self.features[start:stop]
        return np.delete(both, self.column, axis=1), both[:, self.column]


class ParquetRows:
    """Rows of a Parquet file, whose row groups are read one at a time.

    Args:
        path: the file.
        label_column: the name of the column of the labels.
        names: those of the features; None for all the other columns.
    """

    def __init__(self, path: Path, label_column: str, names: Sequence[str] | None = None):
        try:
            from pyarrow import ArrowInvalid, parquet
        except ModuleNotFoundError:
            install = "pip install 'softjax-regression[parquet]'"
            raise DataError(f"{path}: Parquet files need pyarrow: {install}") from None
        try:
            self.file = parquet.ParquetFile(path)
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such file.") from None
        except (ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        known = self.file.schema_arrow.names
        if len(set(known)) != len(known):
            raise DataError(f"{path}: cannot be read: two columns have one name")
        self.names = [n for n in known if n != label_column] if names is None else list(names)
        for name in (label_column, *self.names):
            if name not in known:
                shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
                raise DataError(f"{path}: has no column {name!r}; it has {shown}.")
        self.path, self.label_column = path, label_column
        sizes = [self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)]
        self.ends = np.cumsum(sizes, dtype=np.int64)
        self.num_rows, self.num_features = self.file.metadata.num_rows, len(self.names)
        self.last: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the file."""
        return {self.path.name: file_fingerprint(self.path)}

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the labels of a run of rows."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right").tolist()
        parts = []
        for group in range(first, last + 1):
            begin = int(self.ends[group - 1]) if group else 0
            inside = slice(max(start - begin, 0), stop - begin)
            parts.append([part[inside] for part in self._row_group(group)])
        features, labels = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(labels)

    def _row_group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        if self.last is None or self.last[0] != group:
            self.last = None  # the memory of one, never of two
            table = self.file.read_row_group(group, columns=[*self.names, self.label_column])
            labels = table[self.label_column].to_numpy()
            columns = [self._numbers(name, table[name].to_numpy()) for name in self.names]
            features = np.stack(columns, axis=-1) if columns else np.empty((len(labels), 0))
            self.last = (group, (features, labels))
        return self.last[1]

    def _numbers(self, name: str, column: np.ndarray) -> np.ndarray:
        """A column in a floating dtype; of objects, as decimals are, in float64."""
        try:
            dtype = float if column.dtype == object else np.result_type(np.float32, column.dtype)
            if not np.issubdtype(dtype, np.floating):
                raise TypeError(f"got {column.dtype}")
            return column.astype(dtype, copy=False)
        except (TypeError, ValueError) as error:
            expected = f"column {name!r}: expected numbers"
            raise DataError(f"{self.path}: {expected}: {error}") from error


class Encoded:
    """Rows whose labels are the places of those of `rows` among `classes`, around an origin.

    Args:
        rows: labels of any kind that has an order.
        classes: all of them, in order.
        origin: of the features, float32 [D], taken from them before they are rounded to float32,
            which holds no small differences far from 0.
    """

    def __init__(self, rows: Rows, classes: np.ndarray, origin: np.ndarray):
        self.rows, self.classes, self.origin = rows, classes, origin
        self.num_rows, self.num_features = rows.num_rows, rows.num_features

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the rows."""
        return self.rows.fingerprint

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the indices of the classes of a run of rows; -1 for no class."""
        features, labels = self.rows.read(start, stop)
        if labels.dtype == object:  # a missing one has no order among the others
            missing = np.array([x is None or x != x for x in labels], bool)
            labels = np.where(missing, self.classes[:1], labels)
        else:
            missing = np.zeros(len(labels), bool)
        place = np.minimum(np.searchsorted(self.classes, labels), len(self.classes) - 1)
        known = ~missing & (self.classes[place] == labels)
        indices = np.where(known, place, -1).astype(np.int32)
        with np.errstate(over="ignore"):  # infinite now, and found so
            features = (features - self.origin).astype(computed_in(features.dtype))
        return features, indices


def open_rows(path: str | Path, labels: str | Path | int) -> NpyRows | ParquetRows:
    """The rows of a file that need not fit into memory.

    Args:
        path: a `.npy` file, C order, or a `.parquet` file.
        labels: of `.npy`, the path of another with the labels [N], or the number of their column;
            of `.parquet`, the name of their column.

    Returns:
        `Rows`: what `Batches` and `fit` read.

    Raises:
        softjax.tables.DataError: the file cannot be read, or is not as it has to be.

    Example:
        >>> import tempfile, numpy as np, softjax
        >>> path = tempfile.mkdtemp() + "/data.npy"
        >>> np.save(path, np.array([[0.5, 1.0], [0.25, 0.0], [2.0, 1.0]]))
        >>> softjax.streaming.open_rows(path, 1).read(1, 3)[0].tolist()
        [[0.25], [2.0]]
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ParquetRows(path, str(labels))
    if suffix != ".npy":
        raise DataError(f"{path}: the suffix must be one of .npy, .parquet.")
    column = str(labels)
    return NpyRows(path, int(column) if column.isdecimal() else Path(column))


def row_numbers(function: str, held_out: Any, num_rows: int) -> np.ndarray:
    """`held_out` in order, each once; every one of them is a row, and not all rows are."""
    numbers = np.unique(np.asarray([] if held_out is None else held_out, np.int64))
    bad = (numbers < 0) | (numbers >= num_rows)
    _checks.refuse_first(function, "held_out", f"in [0, {num_rows})", numbers, bad)
    if num_rows and len(numbers) == num_rows:
        raise ValueError(
            _checks.message(function, "held_out", "fewer than all rows", f"all {num_rows}")
        )
    return numbers


def file_fingerprint(path: Path) -> dict[str, int]:
    """Size, time of change and a checksum of blocks that are spread over a file."""
    status = path.stat()
    checksum = 0
    with path.open("rb", buffering=0) as file:
        last = max(status.st_size - SAMPLE_BYTES, 0)
        for place in np.linspace(0, last, SAMPLES).astype(np.int64).tolist():
            checksum = zlib.crc32(os.pread(file.fileno(), SAMPLE_BYTES, place), checksum)
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns, "sample": checksum}


def _in_memory(part: Any) -> np.ndarray:
    """An array; of a map a copy, so that it is read in the order of the file."""
    return np.array(part) if isinstance(part, np.memmap) else np.asarray(part)


def _error(argument: str, expected: str, got: str) -> ValueError:
    return ValueError(_checks.message("streaming.ArrayRows", argument, expected, got))


def computed_in(dtype: np.dtype) -> np.dtype:
    """float64 where the features are and it is on, else float32."""
    if not np.issubdtype(dtype, np.floating):
        dtype = np.dtype(float)
    return np.dtype(compute_dtype(jax.dtypes.canonicalize_dtype(dtype)))


def as_indices(labels: np.ndarray) -> np.ndarray:
    """Class indices in int32; -1, which no class has, for what is none."""
    if not np.issubdtype(labels.dtype, np.number):
        expected, got = "class indices", f"dtype {labels.dtype}"
        raise TypeError(_checks.message("streaming", "labels", expected, got))
    whole = (labels >= 0) & (labels < 2**31) & (labels == np.floor(labels))
    return np.where(whole, labels, -1).astype(np.int32)

"""Where rows come from: arrays that slice, and files, read in runs of rows."""

import zlib
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from softjax import _checks, tables
from softjax._numerics import compute_dtype
from softjax.regression._result import Validation
from softjax.tables import FileRows

SAMPLES = 64


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
    """Rows of anything that has a shape and slices: NumPy, a memmap, h5py, zarr, pandas.

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
        features, labels = (
            part if hasattr(part, "shape") else np.asarray(part) for part in (features, labels)
        )
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
                checksum = zlib.crc32(np.ascontiguousarray(part).tobytes(), checksum)
        return {"shape": list(self.features.shape), "sample": checksum}

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the labels of a run of rows."""
        features, labels = (
            _in_memory(_checks.native("streaming.ArrayRows", name, part[start:stop]))
            for name, part in (("features", self.features), ("labels", self.labels))
        )
        return features, labels


class Standardised:
    """Rows of a file as they are fitted: (features - mean) / scale, and indices of classes.

    The differences are taken before the features are rounded to float32, which holds no small
    differences far from 0.

    Args:
        rows: of a file.
        mean: of the features, float64 [D].
        scale: float64 [D].
        classes: the names of all classes, in order.
    """

    def __init__(self, rows: FileRows, mean: np.ndarray, scale: np.ndarray, classes: list[str]):
        self.rows, self.mean, self.scale = rows, mean, scale
        self.place = {name: i for i, name in enumerate(classes)}
        self.num_rows, self.num_features = rows.num_rows, rows.num_features

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the rows."""
        return self.rows.fingerprint

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the indices of the classes of a run of rows; -1 for no class."""
        features, labels = self.rows.read(start, stop)
        names, codes = tables.as_classes(self.rows.path, str(self.rows.label), labels, start)
        places = np.array([*(self.place.get(name, -1) for name in names), -1], np.int32)
        x = np.subtract(features, self.mean, dtype=np.float64)
        x /= self.scale
        with np.errstate(over="ignore"):  # infinite now, and found so
            return x.astype(computed_in(np.dtype(np.float64))), places[codes]


def open_rows(path: str | Path, labels: str | Path | int) -> FileRows:
    """The rows of a file: `.npy` and `.parquet` need not fit into memory.

    Args:
        path: a `.npy`, `.parquet`, `.csv` or `.npz` file; the latter two are read whole.
        labels: the name of the column of the labels, which of `.npy` is its number; of `.npy` it
            may also be the path of another with the labels [N].

    Returns:
        `Rows`: what `Batches` and `fit` read. The features are all other columns, but for an index
        of pandas and columns of row numbers.

    Raises:
        softjax.tables.DataError: the file cannot be read, or is not as it has to be.

    Example:
        >>> import tempfile, numpy as np, softjax
        >>> path = tempfile.mkdtemp() + "/data.npy"
        >>> np.save(path, np.array([[0.5, 1.0], [0.25, 0.0], [2.0, 1.0]]))
        >>> softjax.streaming.open_rows(path, 1).read(1, 3)[0].tolist()
        [[0.25], [2.0]]
    """
    return tables.open_file(Path(path), str(labels))


def row_numbers(function: str, held_out: Any, num_rows: int) -> np.ndarray:
    """`held_out` in order, each once; every one of them is a row, and not all rows are."""
    numbers = np.asarray([] if held_out is None else held_out)
    if numbers.size and numbers.dtype.kind not in "iu":  # a mask, or fractions of rows
        expected = "row numbers (integer)"
        raise TypeError(_checks.message(function, "held_out", expected, f"dtype {numbers.dtype}"))
    numbers = np.unique(numbers.astype(np.int64))
    bad = (numbers < 0) | (numbers >= num_rows)
    _checks.refuse_first(function, "held_out", f"in [0, {num_rows})", numbers, bad)
    if num_rows and len(numbers) == num_rows:
        raise ValueError(
            _checks.message(function, "held_out", "fewer than all rows", f"all {num_rows}")
        )
    return numbers


def _in_memory(part: Any) -> np.ndarray:
    """An array; of a map a copy, so that it is read in the order of the file."""
    return np.array(part) if isinstance(part, np.memmap) else np.asarray(part)


def _error(argument: str, expected: str, got: str) -> ValueError:
    return ValueError(_checks.message("streaming.ArrayRows", argument, expected, got))


def computed_in(dtype: np.dtype) -> np.dtype:
    """float64 where the features are and it is on, else float32."""
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        dtype = np.dtype(float)
    return np.dtype(compute_dtype(jax.dtypes.canonicalize_dtype(dtype.newbyteorder("="))))


def real_array(function: str, argument: str, x: Any) -> np.ndarray:
    """An array of real numbers in NumPy, by the rule of `regression.fit`."""
    x = _in_memory(_checks.native(function, argument, x))
    if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        expected = "an array of real numbers"
        raise TypeError(_checks.message(function, argument, expected, f"dtype {x.dtype}"))
    return x


def penalty(function: str, l2: Any, dtype: np.dtype) -> float:
    """`l2` as a number >= 0 that is finite in `dtype`."""
    number = _checks.not_negative_number(function, "l2", l2)
    if number > float(np.finfo(dtype).max):
        raise ValueError(_checks.message(function, "l2", f"finite in {dtype}", number))
    return number


def checked_validation(
    function: str, validation: Validation | None, num_features: int, num_classes: int
) -> Validation | None:
    """Features [n, D], and class indices [n] or distributions [n, K], by the rule of a fit."""
    if validation is None:
        return None
    x, y = (real_array(function, "validation", part) for part in validation)
    if x.ndim != 2 or not len(x) or x.shape[1] != num_features:
        expected = f"of features of shape (examples, {num_features})"
        raise ValueError(_checks.message(function, "validation", expected, f"shape {x.shape}"))
    x = x.astype(computed_in(x.dtype), copy=False)
    _checks.refuse_first(function, "validation", f"finite in {x.dtype}", x, ~np.isfinite(x))
    if y.shape == (len(x), num_classes):
        return x, y.astype(x.dtype, copy=False)
    if y.shape != (len(x),):
        expected = f"of labels of shape ({len(x)},) or ({len(x)}, {num_classes})"
        raise ValueError(_checks.message(function, "validation", expected, f"shape {y.shape}"))
    indices = as_indices(function, y)
    bad = (indices < 0) | (indices >= num_classes)
    _checks.refuse_first(function, "validation", f"of labels in [0, {num_classes})", y, bad)
    return x, indices


def as_indices(function: str, labels: Any) -> np.ndarray:
    """Class indices in int32; -1, which no class has, for what is none.

    A column of a `.npy` file of floating numbers holds labels too: those that are whole are taken.
    """
    y = _in_memory(_checks.native(function, "labels", labels, "class indices"))
    if y.dtype.kind not in "iuf":
        expected = "class indices"
        raise TypeError(_checks.message(function, "labels", expected, f"dtype {y.dtype}"))
    whole = (y >= 0) & (y < 2**31) & (y == np.floor(y))
    return np.where(whole, y, -1).astype(np.int32)

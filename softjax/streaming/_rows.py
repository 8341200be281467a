"""Sources of rows: arrays that can be sliced, and files, both read in runs of rows."""

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from softjax import _checks, tables
from softjax._labels import are_indices, numbers_as_classes
from softjax._numerics import compute_dtype
from softjax.regression._arguments import called
from softjax.regression._result import Validation, checked_validation
from softjax.tables import FileRows

ARRAY_ROWS = "streaming.ArrayRows"
SAMPLES = 64


class Rows(Protocol):
    """Features and labels of N rows, read in runs.

    Attributes:
        num_rows: N.
        num_features: D.
        fingerprint: a value for JSON that differs if the data differ.
    """

    num_rows: int
    num_features: int

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def read(self, start: int, stop: int) -> tuple[Any, ...]:
        """The features [n, D] and the labels [n] or [n, K] of rows start, ..., stop - 1.

        Weights [n], with mean 1 over all rows, and offsets [n, K] may follow; either may be None.
        """
        ...


class ArrayRows:
    """Rows of anything that has a shape and can be sliced: NumPy, a memmap, h5py, zarr, pandas.

    SciPy's sparse matrices stay sparse in memory; only the rows that are read become dense.

    Args:
        features: real [N, D]; a sparse matrix is read fastest in the format CSR.
        labels: class indices [N], or distributions over the classes, floating [N, K].
        sample_weights: real [N], >= 0; None for equal weights.
        offset: real [N, K], nats, added to the logits; None for zeros.

    Raises:
        TypeError, ValueError: the shapes do not agree, weights are not numbers >= 0, or all weights
            are 0.

    Example:
        >>> import numpy as np, softjax
        >>> rows = softjax.streaming.ArrayRows(np.zeros((5, 3)), np.arange(5))
        >>> rows.num_rows, rows.read(1, 3)[1].tolist()
        (5, [1, 2])
    """

    def __init__(self, features: Any, labels: Any, sample_weights: Any = None, offset: Any = None):
        features, labels = (
            part if hasattr(part, "shape") else np.asarray(part) for part in (features, labels)
        )
        if hasattr(features, "tocsr"):
            features = features.tocsr()  # rows are read from it one after the other
        if len(features.shape) != 2 or not features.shape[0]:
            expected = "of shape (examples, features), with at least one example"
            raise _error("features", expected, f"shape {features.shape}")
        shape, count = tuple(labels.shape), features.shape[0]
        if len(shape) not in (1, 2) or shape[0] != count:
            expected = f"of shape ({count},)" + f" or ({count}, classes)" * (len(shape) != 1)
            raise _error("labels", expected, f"shape {shape}")
        self.features, self.labels = features, labels
        self.num_rows, self.num_features = features.shape
        self.weights = None if sample_weights is None else self._mean_one(sample_weights)
        self.offset = offset
        if offset is not None and (len(offset.shape) != 2 or offset.shape[0] != self.num_rows):
            raise _error("offset", f"of shape ({self.num_rows}, classes)", f"shape {offset.shape}")

    @property
    def num_classes(self) -> int | None:
        """The number of classes: the columns of the labels, or the largest class index plus 1."""
        if len(self.labels.shape) == 2:
            return self.labels.shape[1]
        return int(as_labels(ARRAY_ROWS, self.labels[:]).max()) + 1

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The shape of the features, and a checksum of rows from all parts of the arrays."""
        places = np.linspace(0, self.num_rows - 1, min(SAMPLES, self.num_rows)).astype(int)
        checksum = 0
        for place in places.tolist():
            for part in self.read(place, place + 1):
                if part is not None:
                    checksum = zlib.crc32(np.ascontiguousarray(part).tobytes(), checksum)
        return {"shape": list(self.features.shape), "sample": checksum}

    def read(self, start: int, stop: int) -> tuple[Any, ...]:
        """The features and labels of a run of rows, and weights and offsets if there are any."""
        features = self.features[start:stop]
        features = features.toarray() if hasattr(features, "tocsr") else features
        features, labels = (
            _in_memory(_checks.native(ARRAY_ROWS, name, part))
            for name, part in (("features", features), ("labels", self.labels[start:stop]))
        )
        if self.weights is None and self.offset is None:
            return features, labels
        weights = None if self.weights is None else self.weights[start:stop]
        offset = None if self.offset is None else _in_memory(self.offset[start:stop])
        return features, labels, weights, offset

    def _mean_one(self, sample_weights: Any) -> np.ndarray:
        """The weights divided by their mean."""
        name = "sample_weights"
        weights = real_array(ARRAY_ROWS, name, sample_weights).astype(np.float64)
        _checks.same_shape(ARRAY_ROWS, name, weights, (self.num_rows,))
        bad = ~((weights >= 0) & np.isfinite(weights))
        _checks.refuse_first(ARRAY_ROWS, name, "finite and >= 0", weights, bad)
        if not weights.any():
            raise _error(name, "> 0 somewhere", "zeros only")
        weights = np.ldexp(weights, -np.frexp(weights.max())[1])
        return weights / weights.mean()


class Standardised:
    """The rows of a file in the form that is fitted: (features - mean) / scale, class indices.

    The means and scales are float64 [D]. The means are subtracted before the features are rounded
    to float32, which cannot hold small differences between large numbers. `classes` are the names
    of all classes, in order.
    """

    def __init__(self, rows: FileRows, mean: np.ndarray, scale: np.ndarray, classes: list[str]):
        self.rows, self.mean, self.scale = rows, mean, scale
        self.place = {name: i for i, name in enumerate(classes)}
        self.num_rows, self.num_features = rows.num_rows, rows.num_features
        self.num_classes = len(classes)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the rows of the file, and what fills their missing cells."""
        fills = {c.name: c.fill for c in self.rows.columns if c.fill is not None}
        return self.rows.fingerprint | ({"fills": fills} if fills else {})

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the class indices of a run of rows; -1 for a row without a label."""
        features, labels = self.rows.read(start, stop)
        features = tables.filled(self.rows.columns, features)
        names, codes = tables.as_classes(self.rows.path, str(self.rows.label), labels, start)
        places = np.array([*(self.place.get(name, -1) for name in names), -1], np.int32)
        x = np.subtract(features, self.mean, dtype=np.float64)
        x /= self.scale
        with np.errstate(over="ignore"):  # the step detects numbers that overflow here
            return x.astype(computed_in(np.dtype(np.float64))), places[codes]


class ClassWeighted:
    """Rows with class indices as labels, each with the weight of its class.

    The weights are those of a loss, not numbers of examples: a mean loss is divided by the number
    of rows, as `class_weights` of `regression.fit` are.
    """

    def __init__(self, rows: Rows, class_weights: np.ndarray):
        self.rows, self.class_weights = rows, class_weights
        self.num_rows, self.num_features = rows.num_rows, rows.num_features

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.rows.fingerprint | {"class_weights": self.class_weights.tolist()}

    def read(self, start: int, stop: int) -> tuple[Any, ...]:
        """The features, the class indices and the weights of a run of rows."""
        features, labels = self.rows.read(start, stop)
        return features, labels, self.class_weights[labels]


def open_rows(path: str | Path, labels: str | Path | int) -> FileRows:
    """Opens a file of rows; `.npy` and `.parquet` files need not fit into memory.

    Args:
        path: a `.npy`, `.parquet`, `.csv` or `.npz` file; the latter two are read into memory.
        labels: the name of the column of the labels. For a `.npy` file it is the number of the
            column, or the path of another `.npy` file, which has the labels [N].

    Returns:
        Rows for `Batches` and `fit`. The features are all other columns except an index of pandas
        and columns of row numbers.

    Raises:
        softjax.tables.DataError: the file cannot be read, or does not have the expected form.

    Example:
        >>> import tempfile, numpy as np, softjax
        >>> path = tempfile.mkdtemp() + "/data.npy"
        >>> np.save(path, np.array([[0.5, 1.0], [0.25, 0.0], [2.0, 1.0]]))
        >>> softjax.streaming.open_rows(path, 1).read(1, 3)[0].tolist()
        [[0.25], [2.0]]
    """
    return tables.open_file(Path(path), str(labels))


def row_numbers(function: str, held_out: Any, num_rows: int) -> np.ndarray:
    """`held_out`, sorted and without repetitions; an error if a number is not a row, or for all."""
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
    """An array in memory; a memmap is copied, so that it is read in the order of the file."""
    return np.array(part) if isinstance(part, np.memmap) else np.asarray(part)


def _error(argument: str, expected: str, got: str) -> ValueError:
    return ValueError(_checks.message(ARRAY_ROWS, argument, expected, got))


def computed_in(dtype: np.dtype) -> np.dtype:
    """The dtype of the computation: float64 for float64 features if JAX enables it, or float32."""
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        dtype = np.dtype(float)
    return np.dtype(compute_dtype(jax.dtypes.canonicalize_dtype(dtype.newbyteorder("="))))


def real_array(function: str, argument: str, x: Any) -> np.ndarray:
    """Real numbers as a NumPy array; refuses the same values as `regression.fit`."""
    x = _in_memory(_checks.native(function, argument, x))
    if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        expected = "an array of real numbers"
        raise TypeError(_checks.message(function, argument, expected, f"dtype {x.dtype}"))
    return x


def transformed(
    function: str, transform: Any, shape: tuple[int, ...], dtype: Any, width: int | None = None
) -> Any:
    """Shape and dtype of features [n, D] after `transform`, which must be [n, width] if given."""
    given = jax.ShapeDtypeStruct(shape, dtype)
    if transform is None:
        return given
    seen = jax.eval_shape(transform, given)
    is_array = isinstance(seen, jax.ShapeDtypeStruct)
    columns = seen.shape[1:] if width is None and is_array else (width,)
    if not is_array or len(columns) != 1 or seen.shape != (shape[0], *columns):
        wanted = f"({shape[0]}, {'any' if width is None else width})"
        expected = f"a function that returns features {wanted} for features {shape}"
        got = f"shape {seen.shape}" if is_array else type(seen).__name__
        raise ValueError(_checks.message(function, "transform", expected, got))
    return seen


def validation_of(validation: Validation | None, shape: tuple[int, ...]) -> tuple[Any, ...] | None:
    """Checked validation data, whose distributions may be numbers of any dtype, as in files."""
    if (
        isinstance(validation, (tuple, list))
        and len(validation) > 1
        and np.ndim(validation[1]) == 2
    ):
        x, labels, *offset = validation
        labels = real_array(called(), "validation", labels)
        labels = labels.astype(np.promote_types(labels.dtype, np.float32), copy=False)
        validation = x, labels, *offset
    return checked_validation(validation, shape)


def refuse_other_rows(function: str, rows: Any) -> None:
    """Refuses objects that are not rows, such as arrays."""
    if not (hasattr(rows, "num_rows") and hasattr(rows, "read")):
        got = f"{type(rows).__name__}; wrap arrays in ArrayRows"
        expected = "`ArrayRows`, the result of `open_rows` or an object with the same methods"
        raise TypeError(_checks.message(function, "rows", expected, got))


def parts_of(function: str, read: Any) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    """Features, labels by `as_labels`, weights and offset; the last two are None if not given."""
    named = isinstance(read, str | bytes | Mapping)
    parts = tuple(read) if isinstance(read, Iterable) and not named else ()
    if not 2 <= len(parts) <= 4:
        expected = "(features, labels), and weights and an offset if there are any"
        got = f"{len(parts)} parts" if parts else type(read).__name__
        raise TypeError(f"softjax.streaming: a batch must be {expected}, got {got}.")
    features, labels, weights, offset = (*parts, None, None)[:4]
    weights = None if weights is None else real_array(function, "weights", weights)
    offset = None if offset is None else real_array(function, "offset", offset)
    features = real_array(function, "features", features)
    return features, as_labels(function, labels), weights, offset


def as_labels(function: str, labels: Any) -> np.ndarray:
    """Distributions [n, K], with NaN for what is negative, or class indices by `as_indices`."""
    if len(np.shape(labels)) != 2:
        return as_indices(function, labels)
    y = real_array(function, "labels", labels)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        expected = "class indices [n], or distributions over the classes, floating [n, K]"
        raise TypeError(_checks.message(function, "labels", expected, f"{y.dtype} of two axes"))
    return np.where(y < 0, y.dtype.type(np.nan), y) if np.any(y < 0) else y


def as_indices(function: str, labels: Any) -> np.ndarray:
    """Class indices in int32; -1 for labels that are not whole numbers >= 0.

    Whole numbers in floating point are indices too, because labels may be a column of a `.npy` file
    of floating numbers.
    """
    y = numbers_as_classes(_in_memory(_checks.native(function, "labels", labels, "class indices")))
    if y.dtype.kind not in "iuf":
        expected = "class indices"
        raise TypeError(_checks.message(function, "labels", expected, f"dtype {y.dtype}"))
    return np.where(are_indices(y), y, -1).astype(np.int32)

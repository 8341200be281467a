"""model.npz: the parameters and the names that `softjax fit` writes and `softjax predict` reads."""

import math
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from softjax import _files
from softjax.tables import DataError

# The versions of the .npy format in which NumPy writes numbers and text.
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Model(NamedTuple):
    """A softmax regression of named features; the fields are the arrays of the file.

    Attributes:
        kernel: float64 [D, K], for the features as they are in the data.
        bias: float64 [K].
        classes, features: K and D names.
    """

    kernel: np.ndarray
    bias: np.ndarray
    classes: list[str]
    features: list[str]

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.kernel).all() and np.isfinite(self.bias).all())


def write(path: Path, model: Model) -> Path:
    """Writes the file, whole or not at all."""
    with _files.whole(path) as draft, draft.open("wb") as file:
        arrays: dict[str, Any] = {name: np.asarray(part) for name, part in model._asdict().items()}
        np.savez(file, **arrays)
    return path


def read(path: Path) -> Model:
    """Reads the file, and raises a DataError unless it is a model that can predict."""
    if not path.exists():
        raise DataError(f"{path}: there is no such file.")
    with path.open("rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # NumPy warns of what it only guesses
                with zipfile.ZipFile(file) as archive:
                    kernel, bias, classes, features = (
                        _array(archive, name) for name in Model._fields
                    )
        # The bytes may be anything, and each layer that reads them raises errors of its own. What
        # it does not understand is not a model.
        except Exception as error:
            raise _not_a_model(path, _first_line(error)) from error
    if kernel.ndim != 2 or kernel.shape[0] < 1 or kernel.shape[1] < 2:
        expected = "[features, classes], with 1 feature and 2 classes or more"
        raise _not_a_model(path, f"`kernel` must be of shape {expected}, got {kernel.shape}")
    num_features, num_classes = kernel.shape
    model = Model(
        _numbers(path, "kernel", kernel, kernel.shape),
        _numbers(path, "bias", bias, (num_classes,)),
        _names(path, "classes", classes, num_classes),
        _names(path, "features", features, num_features),
    )
    if not model.is_finite:
        raise _not_a_model(path, "`kernel` and `bias` must be finite, got NaN or infinity")
    return model


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array, whose header is checked before memory is taken for what it promises."""
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"it has no array `{name}`")
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as file:
        shape, by_columns, dtype = HEADERS[npy.read_magic(file)](file)
        if dtype.kind not in "fiuU":
            raise ValueError(f"`{name}` must be numbers or text, got {dtype}")
        size = math.prod(shape) * dtype.itemsize
        if size != entry.file_size - file.tell():
            raise ValueError(f"`{name}` has another size than its header says")
        array = np.frombuffer(file.read(), dtype, math.prod(shape))
    return array.reshape(shape, order="F" if by_columns else "C")


def _numbers(path: Path, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.dtype.kind == "U" or array.shape != shape:
        got = f"{array.dtype} of shape {array.shape}"
        raise _not_a_model(path, f"`{name}` must be numbers of shape {shape}, got {got}")
    with np.errstate(over="ignore", invalid="ignore"):  # seen by `is_finite`
        return array.astype(np.float64)


def _names(path: Path, name: str, array: np.ndarray, count: int) -> list[str]:
    if array.dtype.kind != "U" or array.shape != (count,):
        got = f"{array.dtype} of shape {array.shape}"
        raise _not_a_model(path, f"`{name}` must be text of shape ({count},), got {got}")
    try:
        names = array.tolist()
        "".join(names).encode()
    except ValueError as error:  # numbers that are no characters
        raise _not_a_model(path, f"`{name}` must be text, got {_first_line(error)}") from error
    if len(set(names)) != count:
        raise _not_a_model(path, f"`{name}` must be different from each other, got one name twice")
    return names


def _first_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")


def _not_a_model(path: Path, why: Any) -> DataError:
    return DataError(f"{path}: is not a model that `softjax fit` wrote: {why}.")

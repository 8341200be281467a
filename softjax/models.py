"""The file model.npz of `softjax fit`: the parameters and the encoding of a table as features."""

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from softjax import _checks, _files, regression, tables
from softjax._foreign import is_lazy
from softjax.regression import SoftmaxRegression
from softjax.tables import Column, DataError
from softjax.tables._errors import first_line
from softjax.tables._npy import read_array

__all__ = ["Model", "load_model"]

NOT_FINITE = "`kernel` and `bias` must be finite, got NaN or infinity"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A softmax regression of the columns of a table, as `softjax fit` writes it.

    Attributes:
        kernel: float64 [D, K], for the original features of the data.
        bias: float64 [K].
        classes: K names.
        features: D names; the feature of a category is named column=category.
        columns: the columns of the table, with their categories and the values that fill missing
            cells; empty if each feature is a column of numbers.

    Raises:
        ValueError: the parts do not fit together, such as two names of features for three rows of
            the kernel. Parameters need not be finite.

    Example:
        >>> import numpy as np
        >>> from softjax.models import Model
        >>> model = Model(np.array([[-1.0, 1.0]]), np.zeros(2), ["low", "high"], ["x"])
        >>> model.predict({"x": [-3.0, 2.0]})
        ['low', 'high']
    """

    kernel: np.ndarray
    bias: np.ndarray
    classes: list[str]
    features: list[str]
    columns: Sequence[Column] = ()

    def __post_init__(self) -> None:
        try:
            fields = _checked(**self._arrays())
        except ValueError as error:
            raise ValueError(f"softjax.models.Model: {error}.") from error
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the file of the model."""
        return {
            "kernel": np.asarray(self.kernel),
            "bias": np.asarray(self.bias),
            "classes": np.array(list(self.classes)),
            "features": np.array(list(self.features)),
            "columns": np.array([json.dumps(column._asdict()) for column in self.table]),
        }

    @property
    def is_finite(self) -> bool:
        """Whether all parameters are finite."""
        return bool(np.isfinite(self.kernel).all() and np.isfinite(self.bias).all())

    @property
    def params(self) -> SoftmaxRegression:
        """The parameters for the functions of `softjax.regression`, as float64 NumPy arrays."""
        kernel: Any = self.kernel
        bias: Any = self.bias
        return SoftmaxRegression(kernel, bias)

    @property
    def table(self) -> list[Column]:
        """The columns that a table must have."""
        return list(self.columns) or [Column(name) for name in self.features]

    def encode(self, data: Any, reading: tables.Reading = tables.PLAIN) -> np.ndarray:
        """The features of a table.

        Args:
            data: the path of a file, or an object with named columns, such as a DataFrame or a
                dictionary; or a record, which is a dictionary with one cell for each column, or a
                list of records. Columns that the model does not use are ignored.
            reading: options for reading the file.

        Returns:
            float64 [N, D].

        Raises:
            TypeError: `data` is neither a path nor a table.
            softjax.tables.DataError: a column is missing; a cell is missing in a column in which
                the fit had no missing cells; a cell is not a number, or not a category of the fit.
        """
        if isinstance(data, (str, Path)):
            return tables.features(Path(data), self.table, reading)
        if isinstance(data, (list, tuple)) and data and all(isinstance(row, dict) for row in data):
            names = dict.fromkeys(name for row in data for name in row)
            data = {name: [row.get(name) for row in data] for name in names}
        expected = "a path, a table with named columns or a list of records"
        if is_lazy(data):
            _checks.native("models.Model", "data", data, expected)
        is_row = hasattr(data, "keys") and hasattr(data, "ndim")  # a Series of pandas
        if not hasattr(data, "columns") and (is_row or not hasattr(data, "keys")):
            hint = "for arrays use softjax.regression with its `params`"
            hint = "a row of a frame is a table as `frame.iloc[[i]]`" if is_row else hint
            got = f"{type(data).__name__}; {hint}"
            raise TypeError(_checks.message("models.Model", "data", expected, got))
        return tables.features_of(data, self.table)

    def predict(self, data: Any) -> list[str]:
        """The name of the most probable class of each row; `encode` describes `data`."""
        places = self.logits(self.encode(data)).argmax(axis=1)
        return [self.classes[place] for place in places.tolist()]

    def predict_proba(self, data: Any) -> np.ndarray:
        """The probabilities of the classes, float64 [N, K]; `encode` describes `data`."""
        with jax.enable_x64(True):  # features are not standardised and may be far from 0
            return np.asarray(regression.predict_proba(self.params, self.encode(data)))

    def save(self, path: str | Path) -> Path:
        """Writes the model to a file as `softjax fit` does, completely or not at all.

        Raises:
            ValueError: the parameters are not finite, so that `load_model` would refuse the file.
        """
        if not self.is_finite:
            raise ValueError(f"softjax.models.Model: {NOT_FINITE}.")
        arrays: dict[str, Any] = self._arrays()
        with _files.whole(Path(path)) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)
        return Path(path)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """The logits of features [N, D], float64 [N, K]."""
        with jax.enable_x64(True):
            return np.asarray(regression.logits(self.params, features))


def load_model(path: str | Path) -> Model:
    """Reads a model that `softjax fit` has written.

    Args:
        path: the path of model.npz.

    Returns:
        `Model`, which holds the parameters and predicts for files and tables.

    Raises:
        TypeError: `path` is not a path.
        softjax.tables.DataError: the file is missing, or is not a valid model.

    Example:
        >>> import pathlib, tempfile, numpy as np, softjax
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.npz")
        >>> kernel, names = np.array([[-1.0, 1.0]]), {"classes": ["low", "high"], "features": ["x"]}
        >>> np.savez(path, kernel=kernel, bias=np.zeros(2), **names)
        >>> softjax.load_model(path).predict({"x": [-3.0, 2.0]})
        ['low', 'high']
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(_checks.message("load_model", "path", "a path", type(path).__name__))
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such file.")
    if path.is_dir():  # such as the folder of `softjax fit --out`
        hint = "softjax.checkpoints.Checkpoints(folder).restore().params reads a checkpoint"
        for name in ("unfinished.npz", "model.npz"):
            if (path / name).exists():
                hint = f"a model is a file in it, {path / name}"
        raise DataError(f"{path}: Is a directory; {hint}.")
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                names = ("kernel", "bias", "classes", "features")
                arrays = {name: _array(archive, name) for name in names}
                if "columns.npy" in archive.namelist():
                    arrays["columns"] = _array(archive, "columns")
            model = Model(**_checked(**arrays))
            if not model.is_finite:
                raise ValueError(NOT_FINITE)
            return model
        # The file may contain anything, and each layer that reads it raises its own kinds of
        # errors. Every such error means that the file is not a model.
        except Exception as error:
            why = first_line(error)
            raise DataError(f"{path}: is not a model that `softjax fit` wrote: {why}.") from error


def _checked(
    kernel: np.ndarray,
    bias: np.ndarray,
    classes: np.ndarray,
    features: np.ndarray,
    columns: np.ndarray | None = None,
) -> dict[str, Any]:
    """The fields of the model of the arrays of a file; a ValueError says why they are none."""
    if kernel.ndim != 2 or kernel.shape[0] < 1 or kernel.shape[1] < 2:
        expected = "[features, classes], with 1 feature and 2 classes or more"
        raise ValueError(f"`kernel` must be of shape {expected}, got {kernel.shape}")
    num_features, num_classes = kernel.shape
    names = _names("features", features, num_features)
    return {
        "kernel": _numbers("kernel", kernel, kernel.shape),
        "bias": _numbers("bias", bias, (num_classes,)),
        "classes": _names("classes", classes, num_classes),
        "features": names,
        "columns": () if columns is None else _columns(columns, names),
    }


def _columns(array: np.ndarray, features: list[str]) -> list[Column]:
    """The columns, decoded from JSON; together they must have the features of the model."""
    texts = _names("columns", array, len(array))
    try:
        columns = []
        for text in texts:
            name, levels, fill = (json.loads(text)[key] for key in Column._fields)
            good = isinstance(name, str)
            if levels is None:
                good &= fill is None or (isinstance(fill, float) and math.isfinite(fill))
            else:
                good &= all(isinstance(level, str) for level in levels)
                good &= len(set(levels)) == len(levels) > 0 and (fill is None or fill in levels)
                levels = tuple(levels)
            if not good:
                raise ValueError(text)
            columns.append(Column(name, levels, fill))
        known = [name for column in columns for name in column.features]
        distinct = len({column.name for column in columns}) == len(columns)
    except Exception as error:
        raise ValueError(f"`columns` cannot be read: {first_line(error)}") from error
    if known != features or not distinct:
        raise ValueError("`columns` and `features` do not match")
    return columns


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"it has no array `{name}`")
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as file:
        return read_array(Path(f"`{name}`"), file, entry.file_size)


def _numbers(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.dtype.kind not in "fiu" or array.shape != shape:
        got = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"`{name}` must be numbers of shape {shape}, got {got}")
    with np.errstate(over="ignore", invalid="ignore"):  # `is_finite` detects the result
        return array.astype(np.float64)


def _names(name: str, array: np.ndarray, count: int) -> list[str]:
    if array.dtype.kind != "U" or array.shape != (count,):
        got = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"`{name}` must be text of shape ({count},), got {got}")
    try:
        names = array.tolist()
        "".join(names).encode()
    except ValueError as error:  # code points that are not characters
        raise ValueError(f"`{name}` must be text, got {first_line(error)}") from error
    if len(set(names)) != count:
        raise ValueError(f"`{name}` must be distinct, got one name twice")
    return names

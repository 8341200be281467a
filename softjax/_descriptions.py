"""Descriptions of arguments, by which two runs of a trainer are compared."""

import inspect
import zlib
from collections.abc import Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeGuard

import jax
import numpy as np

from softjax import _checks

DEEPEST = 12  # functions that enclose one another are described to this depth


def described(value: Any, depth: int = 0) -> Any:
    """What can be compared of an argument between two runs, as a value for JSON.

    Numbers and text stand for themselves, and arrays are digested. A function is described by its
    name and by the variables that it encloses, among which optax keeps its hyperparameters; its
    code and global variables are not compared. Any other object is described by its type alone.
    """
    value = inspect.unwrap(value) if callable(value) else value
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)  # NaN differs from itself
    parts: Any = None
    if hasattr(value, "__array__") or isinstance(value, jax.Array):
        if _checks.is_concrete(value):
            array = np.asarray(data_of(value))
            content = str(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
            return f"{array.dtype}{list(array.shape)} {zlib.crc32(content):08x}"
    elif isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        parts = {name: cell.cell_contents for name, cell in cells if cell != CellType()}
        parts |= {"defaults": value.__defaults__, "keywords": value.__kwdefaults__}
        parts = {name: part for name, part in parts.items() if part is not None}
        parts |= {"function": value.__qualname__.replace("<locals>.", "")}
    elif isinstance(value, MethodType):
        parts = {"function": value.__func__, "object": getattr(value.__self__, "__dict__", {})}
    elif isinstance(value, partial):
        parts = {"function": value.func, "arguments": value.args, "keywords": value.keywords}
    elif isinstance(value, Mapping):
        parts = value
    elif isinstance(value, list | tuple):
        parts = dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    if parts is None or depth == DEEPEST:
        return type(value).__qualname__
    return {str(name): described(part, depth + 1) for name, part in parts.items()}


def is_random_key(x: Any) -> TypeGuard[jax.Array]:
    """Whether `x` is an array of typed random keys, which NumPy cannot hold."""
    return isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def data_of(leaf: Any) -> Any:
    """The array that represents a leaf in a file; for a typed random key, its data."""
    return jax.random.key_data(leaf) if is_random_key(leaf) else leaf

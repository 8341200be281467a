"""Arrays of other libraries: conversion to a dtype of JAX, and detection of missing values."""

import numbers
from decimal import Decimal
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array


def unwrapped(x: Any) -> Any:
    """The array of a variable, such as one of Flax, which may be traced; all else unchanged."""
    convert = getattr(x, "__jax_array__", None)
    return x if convert is None else convert()


def numbers_of(x: np.ndarray) -> np.ndarray | None:
    """`x` in a dtype of JAX; None if its values are not numbers."""
    if x.dtype != object:
        if x.dtype.kind == "f" and x.dtype.itemsize > 8:
            return x.astype(np.float64)
        is_number = x.dtype.kind != "m" and jnp.issubdtype(x.dtype, jnp.number)
        if x.dtype.kind not in "biuf" and not is_number:  # NumPy counts durations as integers
            return None
        return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))
    entries = [np.nan if is_missing(entry) else entry for entry in x.ravel().tolist()]
    for kind, dtype in (
        ((bool, np.bool_), np.bool_),
        (numbers.Integral, np.int64),
        ((numbers.Real, np.bool_, Decimal), np.float64),
    ):
        if all(isinstance(entry, kind) for entry in entries):
            try:
                return np.array(entries, dtype).reshape(x.shape)
            except OverflowError:  # an integer beyond int64
                continue
    return None


def is_missing(entry: Any) -> bool:
    """Whether an entry is None, NaN or pandas' NA, whose comparisons have no truth value."""
    try:
        return entry is None or bool(entry != entry)
    except ValueError:  # an array, whose comparison has many results
        return False
    except TypeError:
        return not isinstance(entry, Array)


def is_lazy(table: Any) -> bool:
    """Whether a table is a plan of a computation, such as a LazyFrame of Polars."""
    return hasattr(table, "collect_schema") and not hasattr(table, "__array__")


def column_names(table: Any) -> list[Any]:
    """The names of the columns of a DataFrame of pandas or Polars, or of a table of Arrow.

    The attribute `columns` of Arrow has the columns themselves and not their names. Other objects
    have no names.
    """
    return list(getattr(table, "column_names", getattr(table, "columns", ())))


def column_at(table: Any, place: int) -> Any:
    """A column of such a table by its place; its name may belong to several columns of pandas."""
    if hasattr(table, "column_names"):
        return table.columns[place]
    return table.iloc[:, place] if hasattr(table, "iloc") else table[table.columns[place]]


def numbers_of_columns(table: Any) -> np.ndarray | str:
    """The numbers of a table, whose columns may have different dtypes; or which column has none."""
    parts = []
    for place, name in enumerate(column_names(table)):
        column = column_at(table, place)
        found = numbers_of(np.asarray(column))
        if found is None or found.dtype.kind not in "biuf":
            dtype = column.dtype if hasattr(column, "dtype") else column.type
            return f"column {name!r} of dtype {dtype}"
        parts.append(found)
    return np.column_stack(parts) if parts else np.empty(table.shape)


def filled(x: Any) -> Any:
    """A masked array with NaN, or None among texts, where it is masked; all else is unchanged.

    `np.asarray` would take the numbers below the mask.
    """
    mask = getattr(x, "mask", False) if isinstance(x, np.ndarray) else False
    if not np.any(mask):
        return x
    is_number = x.dtype.kind in "biuf"
    values = np.array(x, np.result_type(x.dtype, np.float16) if is_number else object)
    values[mask] = np.nan if is_number else None
    return values

"""Errors of data files, in one line that begins with the path; differences of configurations."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Compression reduces zeros to a thousandth of their size, but measured numbers to a tenth at best.
LARGEST_UNPACKED, LARGEST_RATIO = 1 << 30, 100

LONGEST_LINE = 1000


class DataError(Exception):
    """An error of a data file, in one line.

    The line may show names and cells of the file. Their line breaks are escaped, and a long line is
    cut.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:LONGEST_LINE])
        super().__init__(line if len(message) <= LONGEST_LINE else f"{line}...")


class IncompleteError(DataError):
    """Rows without a label, or with a feature that is not finite in float32.

    `can_be_filled` is whether the first of them lacks a feature, which can be imputed; a label and
    a number that is infinite or too large cannot.
    """

    def __init__(self, message: str, can_be_filled: bool):
        super().__init__(message)
        self.can_be_filled = can_be_filled


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turns any exception of a library that cannot read the file into a `DataError`."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be read: {' '.join(str(reason).split())}") from error


def first_line(error: Exception) -> str:
    """The first line of an error, cut to 200 characters; the name of its type if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def refuse_bytes(path: Path, size: int, packed: int | None = None) -> None:
    """Refuses `size` bytes if memory is too small, or if `packed` bytes unpack to too many."""
    if packed is not None and size > max(LARGEST_UNPACKED, LARGEST_RATIO * packed):
        form = f"{size / 1e9:.1f} GB from a file of {packed / 1e6:.1f} MB"
        raise DataError(f"{path}: would unpack to {form}. Save the arrays without compression.")
    lacking = lacking_memory(size)
    if lacking:
        hint = "--stream reads .npy and .parquet files in parts"
        raise DataError(f"{path}: needs {lacking}. {hint}.")


def lacking_memory(size: int) -> str | None:
    """How large `size` bytes and the memory are if the memory is smaller; otherwise None."""
    if not hasattr(os, "sysconf"):
        return None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size <= memory:
        return None
    return f"{size / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB"


def differences(
    first: Any, second: Any, form: str = "{} was {} and is {}", name: str = ""
) -> Iterator[str]:
    """The differences between two configurations: the name and both values of each."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys([*first, *second]):
            below = f"{name}.{key}" if name else key
            yield from differences(first.get(key), second.get(key), form, below)
    elif first != second:
        yield form.format(name, _shown(first), _shown(second))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Arrays in the format of `np.save`, read by what is understood of its header."""

import re
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from softjax.tables._errors import DataError, understood

MAGIC = b"\x93NUMPY"
LONGEST_HEADER = 10_000
# The dictionary that NumPy writes, for a dtype that is not structured. Python 2 wrote 3L for 3.
HEADER = re.compile(
    r"\{'descr': *'([^']*)', *'fortran_order': *(True|False), *"
    r"'shape': *\(((?:\d{1,40}L?, *)*(?:\d{1,40}L?)?)\),? *\}\s*"
)
DTYPE = re.compile(r"[<>|=](b1|[iu][1248]|f2|f4|f8|f12|f16|[SU]\d{1,9})")


class Header(NamedTuple):
    """The header of an array.

    Attributes:
        shape: of the array.
        fortran_order: whether the first index runs fastest.
        dtype: of numbers, truth values or text.
        offset: where the array begins.
    """

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    offset: int

    @property
    def size(self) -> int:
        """The bytes of the array."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length  # in Python's integers, which do not overflow
        return size


def read_header(path: Path, file: IO[bytes], file_size: int) -> Header:
    """The header of an array that takes all of a file of `file_size` bytes."""
    start = file.read(8)
    length_bytes = {1: 2, 2: 4}.get(start[6] if len(start) == 8 else 0)
    if start[:6] != MAGIC or length_bytes is None:
        raise DataError(f"{path}: cannot be read: it does not begin as np.save writes arrays.")
    length = int.from_bytes(file.read(length_bytes), "little")
    text = file.read(length).decode("latin1") if length <= LONGEST_HEADER else ""
    found = HEADER.fullmatch(text)
    if found is None:
        expected = "its header is not that of an array of numbers or text"
        raise DataError(f"{path}: cannot be read: {expected}.")
    descr, order, shape = found.groups()
    try:
        dtype = np.dtype(descr) if DTYPE.fullmatch(descr) else None
    except TypeError:  # a long double, which this machine has not
        dtype = None
    if dtype is None or not dtype.itemsize:
        raise DataError(f"{path}: expected numbers or text, got dtype {descr!r}.")
    lengths = tuple(int(n) for n in re.findall(r"\d+", shape))
    header = Header(lengths, order == "True", dtype, 8 + length_bytes + length)
    if file_size != header.offset + header.size:
        what = "shorter" if file_size < header.offset + header.size else "longer"
        raise DataError(f"{path}: is {what} than its header says: it was cut or changed.")
    return header


def read_array(path: Path, file: IO[bytes], file_size: int) -> np.ndarray:
    """The whole array of an open file."""
    header = read_header(path, file, file_size)
    data = file.read()  # to the end, where a checksum of the file is compared
    if len(data) != header.size:
        raise DataError(f"{path}: ends before its last row: it was cut.")
    order = "F" if header.fortran_order else "C"
    return np.frombuffer(data, header.dtype).reshape(header.shape, order=order)


class NpyFile:
    """An array in a `.npy` file, sliced by reads in place of a map.

    What is read does not stay in the memory of the process, and a file that has been cut short
    since is an error with a name, where a map of it would end the process.
    """

    def __init__(self, path: Path):
        with understood(path), path.open("rb") as file:
            header = read_header(path, file, path.stat().st_size)
        self.path, self.shape, self.dtype = path, header.shape, header.dtype
        self.offset = header.offset
        if not self.shape:
            raise DataError(f"{path}: expected rows, got shape ().")
        self.by_columns = header.fortran_order and len(self.shape) == 2

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        if not self.by_columns:
            out = np.empty((stop - start, *self.shape[1:]), self.dtype)
            row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
            runs = [(start * row_bytes, out)]
        else:
            out = np.empty((self.shape[1], stop - start), self.dtype)
            places = start + self.shape[0] * np.arange(self.shape[1])
            runs = [(int(p) * self.dtype.itemsize, o) for p, o in zip(places, out, strict=True)]
        with understood(self.path), self.path.open("rb", buffering=0) as file:
            for place, run in runs:
                file.seek(self.offset + place)
                bytes_of_run, done = run.reshape(-1).view(np.uint8), 0
                while done < run.nbytes:
                    count = file.readinto(bytes_of_run[done:].data)
                    if not count:
                        raise DataError(f"{self.path}: ends before row {stop}: it was cut.")
                    done += count
        return out.T if self.by_columns else out

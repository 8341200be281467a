"""Rows of `.npy` and `.npz` files, whose array headers are parsed strictly."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from softjax.tables._cells import as_features, is_missing, reads_as_number
from softjax.tables._columns import PLAIN, Column, Doubt, Levels, Names, Reading, refuse_texts
from softjax.tables._errors import DataError, refuse_bytes, understood
from softjax.tables._rows import FileRows, HeldRows, chosen_columns, known_levels, stacked

MAGIC = b"\x93NUMPY"
LONGEST_HEADER = 10_000
# The dictionary that NumPy writes if the dtype is not structured. Python 2 wrote 3L for 3.
HEADER = re.compile(
    r"\{'descr': *'([^']*)', *'fortran_order': *(True|False), *"
    r"'shape': *\(((?:\d{1,40}L?, *)*(?:\d{1,40}L?)?)\),? *\}\s*"
)
DTYPE = re.compile(r"[<>|=](b1|[iu][1248]|f2|f4|f8|f12|f16|[SU]\d{1,9})")


class Header(NamedTuple):
    """The header of an array."""

    shape: tuple[int, ...]  # the shape of the array
    fortran_order: bool  # whether the first index varies fastest
    dtype: np.dtype  # a dtype of numbers, truth values or text
    offset: int  # the byte at which the array begins

    @property
    def size(self) -> int:
        """The number of bytes of the array."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length  # in Python's integers, which do not overflow
        return size


def read_header(path: Path, file: IO[bytes], file_size: int) -> Header:
    """Reads the header of an array that fills a file of `file_size` bytes."""
    start = file.read(8)
    length_bytes = {1: 2, 2: 4, 3: 4}.get(start[6] if len(start) == 8 else 0)
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
    except TypeError:  # a long double that this machine lacks
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
    """Reads the whole array of an open file."""
    header = read_header(path, file, file_size)
    data = file.read()  # up to the end, where zipfile compares the checksum
    if len(data) != header.size:
        raise DataError(f"{path}: ends before its last row: it was cut.")
    order = "F" if header.fortran_order else "C"
    return np.frombuffer(data, header.dtype).reshape(header.shape, order=order)


class NpyFile:
    """An array in a `.npy` file that is sliced by reads instead of a memory map.

    The bytes do not stay in the memory of the process. If the file is truncated, an error names it,
    whereas a memory map would kill the process.
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


class NpyRows(FileRows):
    """Rows of a `.npy` file [N, columns 0, 1, ...]; labels are a column or another `.npy` file."""

    def __init__(
        self, path: Path, label: str | None, names: Names = None, reading: Reading = PLAIN
    ):
        if reading.categories:
            raise DataError(f"{path}: --category takes columns of .csv, .npz and .parquet files.")
        self.file, self.apart = NpyFile(path), None
        if len(self.file.shape) != 2:
            raise DataError(f"{path}: expected an array of rank 2, got shape {self.file.shape}.")
        if not self.file.shape[0]:  # before the columns, of which there may be none
            raise DataError(f"{path}: has no rows.")
        known = [str(i) for i in range(self.file.shape[1])]
        column = label
        if label is not None and label not in known and label.lower().endswith(".npy"):
            self.apart, column = NpyFile(Path(label)), None
            if self.apart.shape != self.file.shape[:1]:
                expected = f"expected shape ({self.file.shape[0]},), a label for each row of {path}"
                raise DataError(f"{label}: {expected}, got shape {self.apart.shape}.")
        chosen = chosen_columns(path, known, column, names, drop=reading.drop)
        self.column = None if column is None else int(column)
        places = [int(c.name) for c in chosen]
        self.places = None if len(places) == len(known) else places
        super().__init__(path, label, chosen, self.file.shape[0])

    @property
    def paths(self) -> list[Path]:
        return [self.path] if self.apart is None else [self.path, self.apart.path]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The features and the labels of a run of rows."""
        block = self.file[start:stop]
        if self.apart is not None:
            labels = self.apart[start:stop]
        else:
            labels = np.empty(len(block), object) if self.column is None else block[:, self.column]
        features = block if self.places is None else block[:, self.places]
        if features.dtype.kind in "biuf":
            return as_features(self.path, "", features), labels
        return stacked(self.path, self.columns, features.T, first=start), labels


class NpzRows(HeldRows):
    """Rows of a `.npz` file of named arrays; the columns of a matrix are named 0, 1, 2, ..."""

    def __init__(
        self, path: Path, label: str | None, names: Names = None, reading: Reading = PLAIN
    ):
        columns: list[tuple[str, np.ndarray]] = []
        with understood(path), zipfile.ZipFile(path) as archive:
            refuse_bytes(path, sum(m.file_size for m in archive.infolist()), path.stat().st_size)
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    raise DataError(f"{path}: holds {member.filename!r}, which is not an array.")
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    named = Path(f"{path}: array {name!r}")
                    values = read_array(named, file, member.file_size)
                if values.ndim not in (1, 2):
                    expected = f"array {name!r}: expected an array of rank 1 or 2"
                    raise DataError(f"{path}: {expected}, got shape {values.shape}.")
                if not len(values):
                    raise DataError(f"{path}: array {name!r} has no rows.")
                if values.ndim == 1:
                    columns.append((name, values))
                else:
                    columns += [(str(i), column) for i, column in enumerate(values.T)]
        known = dict(columns)
        there = [name for name, _ in columns]
        chosen = chosen_columns(path, there, label, names, drop=reading.drop)
        used = [*([] if label is None else [label]), *(column.name for column in chosen)]
        lengths = {name: len(known[name]) for name in used}
        for name, length in lengths.items():
            if length != lengths[used[0]]:
                form = f"{used[0]!r} has {lengths[used[0]]} rows, and {name!r} {length}"
                raise DataError(f"{path}: has columns of different lengths: {form}.")
        if names is None:
            found = [_column(path, c.name, known[c.name], reading.categories) for c in chosen]
            refuse_texts(path, [doubt for _, doubt in found])
            chosen = [column for column, _ in found]
        cells = [known[column.name] for column in chosen]
        features = stacked(path, chosen, cells, known_levels(path, chosen))
        super().__init__(path, label, chosen, features, None if label is None else known[label])


def _column(
    path: Path, name: str, cells: np.ndarray, categories: Sequence[str]
) -> tuple[Column, Doubt | None]:
    """The column, which holds categories if `categories` has its name or no cell is a number."""
    if name not in categories:
        if cells.dtype.kind not in "SU":
            return Column(name), None
        texts = [text for text in np.unique(cells).astype(str).tolist() if not is_missing(text)]
        if not texts or any(map(reads_as_number, texts)):
            return Column(name), None
    levels = Levels(path, name)
    codes = levels.codes(cells.tolist(), 0)
    counts = np.bincount(codes[~np.isnan(codes)].astype(np.intp), minlength=len(levels.place))
    return levels.column()[0], levels.doubt(counts, name in categories)

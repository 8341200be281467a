"""Data files for tests, and two ways of reading them that must agree."""

import io
from decimal import Decimal

import numpy as np
import pytest

from softjax import tables
from softjax.streaming._rows import Standardised
from softjax.streaming._survey import survey
from softjax.tables import DataError

pytest.importorskip("pyarrow")
import pyarrow
from pyarrow import parquet

RNG = np.random.default_rng(0)
N = 12
A, B = RNG.normal(size=(2, N)).round(3)
Y = np.arange(N) % 3
TEXT = np.array(["no", "yes", "perhaps"], object)[Y]


def csv_text(labels, features=A):
    cells = zip(features, labels, strict=True)
    return "x,y\n" + "".join(f"{number},{label}\n" for number, label in cells)


def parquet_bytes(columns, **options):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file, **options)
    return file.getvalue()


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def written(folder, name, data):
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def in_memory(path, label):
    """What a fit in memory is given: features, codes, names of features, names of classes."""
    return tables.dataset(path, label)


def in_a_stream(path, label):
    """The same, read as `softjax fit --stream` reads it: a survey, then runs of rows."""
    rows = tables.open_file(path, label)
    seen = survey(rows, False)
    none = np.zeros(rows.num_features), np.ones(rows.num_features)
    fitted = Standardised(rows, *none, seen.classes)
    parts = [
        fitted.read(start, min(start + 5, rows.num_rows)) for start in range(0, rows.num_rows, 5)
    ]
    features, codes = map(np.concatenate, zip(*parts, strict=True))
    return tables.Dataset(features, codes, rows.names, seen.classes, np.arange(rows.num_rows))


def outcome(read, path, label):
    try:
        return read(path, label)
    except DataError as error:
        (line,) = str(error).splitlines()
        assert line.startswith(str(path))
        return line


def refused(path, label="y"):
    """The line that both ways of reading say."""
    line = outcome(in_memory, path, label)
    assert isinstance(line, str), f"{path} was read"
    assert outcome(in_a_stream, path, label) == line
    return line


def read(path, label="y"):
    """What both ways of reading find."""
    data, again = (outcome(way, path, label) for way in (in_memory, in_a_stream))
    assert not isinstance(data, str), data
    np.testing.assert_allclose(data.features, again.features, rtol=1e-6)
    np.testing.assert_array_equal(data.labels, again.labels)
    assert data[2:4] == again[2:4]
    np.testing.assert_array_equal(data.rows, again.rows)
    return data


MISSING = pyarrow.array([None, *A[1:]])
GOOD = {
    "integers.csv": (csv_text(Y), "y"),
    "text.csv": (csv_text(TEXT), "y"),
    "text-16.csv": (csv_text(TEXT).encode("utf-16"), "y"),
    "bom.csv": ("\ufeff" + csv_text(TEXT), "y"),
    "crlf.csv": (csv_text(TEXT).replace("\n", "\r\n"), "y"),
    "quoted.csv": ('"x","y"\n' + '"1.5","a, ""b"""\n2,"c\nd"\n' * 6, "y"),
    "rows.npy": (npy_bytes(np.column_stack([A, Y])), "1"),
    "columns.npy": (npy_bytes(np.asfortranarray(np.column_stack([A, B, Y]))), "2"),
    "big-endian.npy": (npy_bytes(np.column_stack([A, Y]).astype(">f4")), "1"),
    "half.npy": (npy_bytes(np.column_stack([A, Y]).astype("f2")), "1"),
    "long.npy": (npy_bytes(np.column_stack([A, Y]).astype("g")), "1"),
    "truths.npy": (npy_bytes(np.column_stack([A > 0, B > 0])), "1"),
    "text.npy": (npy_bytes(np.column_stack([A, Y]).astype(str)), "1"),
    "bytes.npy": (npy_bytes(np.column_stack([A, Y]).astype("S")), "1"),
    "arrays.npz": (npz_bytes(x=A, y=Y), "y"),
    "matrix.npz": (npz_bytes(x=np.column_stack([A, B]), y=TEXT.astype(str)), "y"),
    "other.npz": (npz_bytes(x=A.astype(">f8"), y=Y.astype(">i2")), "y"),
    "numbers.parquet": (parquet_bytes({"x": A, "y": Y}, row_group_size=5), "y"),
    "text.parquet": (parquet_bytes({"x": A, "y": TEXT}), "y"),
    "bytes.parquet": (parquet_bytes({"x": A, "y": [t.encode() for t in TEXT]}), "y"),
    "category.parquet": (
        parquet_bytes(
            {
                "x": pyarrow.array(Y).dictionary_encode(),
                "y": pyarrow.array(TEXT.tolist()).dictionary_encode(),
            },
            row_group_size=5,
        ),
        "y",
    ),
    "truths.parquet": (parquet_bytes({"x": A > 0, "y": B > 0}), "y"),
    "decimals.parquet": (
        parquet_bytes({"x": [Decimal(str(a)) for a in A.tolist()], "y": Y}, row_group_size=5),
        "y",
    ),
    "half.parquet": (parquet_bytes({"x": A.astype("f2"), "y": Y.astype("u1")}), "y"),
    "number-text.parquet": (parquet_bytes({"x": A.astype(str), "y": Y}), "y"),
    "large.parquet": (parquet_bytes({"x": A, "y": 2**62 + Y}), "y"),
}

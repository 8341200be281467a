"""Broken files are refused in one line, and files take memory by their size."""

import io
import os
import tracemalloc
import zipfile
from collections import Counter

import numpy as np
import pytest
from data_files import (
    GOOD,
    TEXT,
    A,
    N,
    Y,
    csv_text,
    in_a_stream,
    in_memory,
    npy_bytes,
    npz_bytes,
    outcome,
    parquet_bytes,
    refused,
    written,
)

from softjax import tables
from softjax.tables import DataError, _errors

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def header(shape, descr="'<f8'", size=320):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(size)


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in members.items():
            target.writestr(name.replace("_", "."), data)
    return file.getvalue()


BROKEN = {
    "huge.npy": header("(1000000000000, 4)"),
    "void.npy": header("(10, 4)", "'|V8'"),
    "overflow.npy": header(f"({2**70}, 4)"),
    "negative.npy": header("(-10, 4)"),
    "expression.npy": header("(10 * 1, 4)"),
    "wide.npy": header("(0, 1000000000000)", size=0),
    "wide.npz": archive(x_npy=header("(0, 1000000000000)", size=0)),
    "bracket.npy": b"\x93NUMPY\x01\x00\x40\x00" + b"(" * 64,
    "long-header.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 64,
    "version.npy": b"\x93NUMPY\x09" + header("(10, 4)")[7:],
    "readme.npz": archive(x_npy=npy_bytes(A), y_npy=npy_bytes(Y), README_txt="hello"),
    "short.npz": archive(x_npy=npy_bytes(A)[:-8], y_npy=npy_bytes(Y)),
    "text.npz": archive(x_npy="hello", y_npy=npy_bytes(Y)),
    "none.npz": archive(),
    "encrypted.npz": npz_bytes(x=A, y=Y)
    .replace(b"PK\x01\x02\x2d\x03\x2d\x00\x00", b"PK\x01\x02\x2d\x03\x2d\x00\x01")
    .replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
    "metadata.parquet": parquet_bytes({"x": A, "y": Y}).replace(b"PAR1", b"PARX"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(tmp_path, name):
    refused(written(tmp_path, name, BROKEN[name]), "3" if name.endswith(".npy") else "y")


def test_what_is_no_file_that_can_be_read_is_one_line(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    assert "is no file" in refused(tmp_path / "folder.csv")
    assert "there is no such file" in refused(tmp_path / "absent.parquet")
    path = written(tmp_path, "x.csv", csv_text(TEXT))
    assert "no such file" in refused(path / "below.csv") or "cannot be read" in refused(
        path / "below.csv"
    )
    os.symlink("loop.csv", tmp_path / "loop.csv")
    refused(tmp_path / "loop.csv")


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path, "zeros.npz", npz_bytes(x=np.zeros(10**6), y=np.zeros(10**6)))
    monkeypatch.setattr(_errors, "LARGEST_UNPACKED", 1 << 20)
    assert "would unpack to 0.0 GB from a file of 0.0 MB" in refused(path)


def test_what_memory_does_not_hold_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path, "x.npy", npy_bytes(np.column_stack([A, Y])))
    monkeypatch.setattr(os, "sysconf", lambda name: 8)
    with pytest.raises(DataError, match=r"needs .* GB.*--stream"):
        tables.dataset(path, "1")
    assert len(in_a_stream(path, "1").labels) == N


@pytest.mark.parametrize(
    "name", ["text.csv", "rows.npy", "columns.npy", "matrix.npz", "all.parquet"]
)
def test_a_file_with_changed_bytes_is_read_or_refused_in_one_line(tmp_path, name):
    """Any byte may change, be left out or come twice; both ways of reading agree on each file."""
    columns = {"x": A, "z": A > 0, "t": A.astype(str), "y": TEXT}
    data, label = {"all.parquet": (parquet_bytes(columns), "y")}.get(name) or GOOD[name]
    data = data.encode() if isinstance(data, str) else data
    rng, seen = np.random.default_rng(7), Counter()
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            place, other = rng.integers(len(broken), size=2)
            match rng.integers(4):
                case 0:
                    broken[place] = rng.integers(256)
                case 1:
                    broken[place] ^= 1 << rng.integers(8)
                case 2:
                    del broken[place : place + rng.integers(1, 20)]
                case 3:
                    broken[place:place] = broken[other : other + 8]
        path = written(tmp_path, name, bytes(broken))
        plain, stream = (outcome(way, path, label) for way in (in_memory, in_a_stream))
        seen[type(plain)] += 1
        if isinstance(plain, str):
            assert stream == plain
        else:
            np.testing.assert_array_equal(plain.labels, stream.labels)
            assert plain[2:4] == stream[2:4]
    assert seen[str] > 20


@pytest.mark.parametrize("longest", [5, 100_000])
def test_a_csv_takes_memory_by_its_size(tmp_path, longest):
    cells = ",".join(["1.5"] * 20)
    rows = "".join(f"{cells},{'ab'[i % 2]}\n" for i in range(5000))
    head = ",".join(f"f{i}" for i in range(20))
    path = written(tmp_path, "x.csv", f"{head},y\n{cells},{'x' * longest}\n{rows}")
    tracemalloc.start()
    data = tables.dataset(path, "y")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.class_names) == 3
    assert peak < 10 * path.stat().st_size

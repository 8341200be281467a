"""Batches of rows: their order, their sources, and the survey of a file."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from streams import batches_of, data

from softjax import streaming, tables
from softjax.streaming import _survey
from softjax.streaming._fills import fills
from softjax.streaming._rows import Standardised
from softjax.streaming._survey import survey
from softjax.tables import DataError
from softjax.tables._columns import Column
from softjax.tables._rows import HeldRows

pytestmark = pytest.mark.compiled_quickly


@pytest.mark.x64_once
@pytest.mark.parametrize("n", [1, 2, 17, 100, 257])
@pytest.mark.parametrize("size", [1, 3, 16, 40, 300])
@pytest.mark.parametrize("buffer_bytes", [1, 1000, 1 << 20])
def test_an_epoch_has_every_row_once(n, size, buffer_bytes):
    batches = batches_of(np.zeros((n, 1)), np.zeros(n, int), size, buffer_bytes=buffer_bytes)
    for epoch in range(2):
        steps = epoch * batches.epoch_steps + np.arange(batches.epoch_steps)
        numbers = [rows[rows >= 0] for rows in map(batches.row_numbers, steps.tolist())]
        assert sorted(np.concatenate(numbers).tolist()) == list(range(n))
        sizes = [len(rows) for rows in numbers]
        assert max(sizes) - min(sizes) <= max(min(16, size), 1)


@pytest.mark.x64_once
def test_a_batch_is_a_function_of_seed_and_step_whatever_the_number_of_processes():
    x, y = data()
    options = {"seed": 3, "buffer_bytes": 1500, "held_out": np.array([5, 200])}
    one = batches_of(x, y, **options)
    assert one.num_groups > 1
    steps = [7, 0, 2 * one.epoch_steps, 1, 7]
    expected = {step: one.read(step) for step in steps}
    for step in steps:
        numbers = one.row_numbers(step)
        again = batches_of(x, y, **options).read(step)
        for part, other in zip(expected[step], again, strict=True):
            np.testing.assert_array_equal(part, other)
        given = numbers >= 0
        np.testing.assert_array_equal(again.features, np.where(given[:, None], x[numbers], 0))
        np.testing.assert_array_equal(again.labels, np.where(given, y[numbers], 0))
        np.testing.assert_array_equal(again.weights, given & ~np.isin(numbers, [5, 200]))
    for count in (2, 3, 4, 5, 6, 8, 20):
        parts = [
            batches_of(x, y, **options, process_index=index, process_count=count)
            for index in range(count)
        ]
        assert len({part.read(1).features.shape for part in parts}) == 1
        found = np.concatenate([part.row_numbers(9) for part in parts])
        if count <= 8:  # the same places too; there may be more padding at the end
            size = len(one.row_numbers(9))
            np.testing.assert_array_equal(found[:size], one.row_numbers(9))
            assert (found[size:] == -1).all()
        assert sorted(found[found >= 0].tolist()) == sorted(n for n in one.row_numbers(9) if n >= 0)
    first = one.row_numbers(0).tolist()
    assert first != one.row_numbers(one.epoch_steps).tolist()
    assert first != batches_of(x, y, seed=4, buffer_bytes=1500).row_numbers(0).tolist()


@pytest.mark.x64_once
def test_only_a_group_of_blocks_is_in_memory(tmp_path):
    rows, width, buffer_bytes = 1 << 15, 32, 1 << 18
    np.save(tmp_path / "x.npy", np.zeros((rows, width), np.float32))
    np.save(tmp_path / "y.npy", np.zeros(rows, np.int32))
    size = (tmp_path / "x.npy").stat().st_size
    tracemalloc.start()
    opened = streaming.open_rows(tmp_path / "x.npy", tmp_path / "y.npy")
    batches = streaming.Batches(opened, 256, buffer_bytes=buffer_bytes)
    for step in range(batches.epoch_steps):
        batches.read(step)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert buffer_bytes < peak < 3 * buffer_bytes < size / 5


@pytest.mark.x64_once
@pytest.mark.parametrize("kind", ["column", "file", "memmap", "parquet"])
def test_all_sources_have_the_same_rows(tmp_path, kind):
    x, y = data(61)
    path = tmp_path / "x.npy"
    if kind == "column":
        np.save(path, np.insert(x, 2, y, axis=1))
        rows = streaming.open_rows(path, "2")
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = {str(j): column for j, column in enumerate(x.T)} | {"label": y}
        path = tmp_path / "x.parquet"
        parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
        rows = streaming.open_rows(path, "label")
    else:
        np.save(path, x)
        np.save(tmp_path / "y.npy", y)
        rows = streaming.open_rows(path, tmp_path / "y.npy")
        if kind == "memmap":
            rows = streaming.ArrayRows(np.load(path, mmap_mode="r"), y)
    assert (rows.num_rows, rows.num_features) == x.shape
    for start, stop in ((0, 61), (5, 6), (6, 22), (60, 61)):
        features, labels = rows.read(start, stop)
        np.testing.assert_array_equal(features, x[start:stop])
        np.testing.assert_array_equal(labels, y[start:stop])
    assert rows.fingerprint == rows.fingerprint
    if kind == "memmap":  # no file of a table
        return
    seen = survey(rows)
    np.testing.assert_allclose(seen.mean, x.mean(0, dtype=float), rtol=1e-6)
    np.testing.assert_allclose(seen.scale, x.std(0, dtype=float), rtol=1e-6)
    assert list(map(float, seen.classes)) == [0, 1, 2, 3]


@pytest.mark.x64_once
def test_what_is_wrong_with_a_file_is_said(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((9, 3)))
    whole = path.read_bytes()
    with pytest.raises(DataError, match="has no column '3'; it has 0 to 2"):
        streaming.open_rows(path, 3)
    with pytest.raises(DataError, match="no such file"):
        streaming.open_rows(path, tmp_path / "y.npy")
    rows = streaming.open_rows(path, 0)
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="ends before row 9: it was cut"):
        rows.read(8, 9)
    with pytest.raises(DataError, match="shorter than its header says"):
        streaming.open_rows(path, 0)
    path.write_bytes(whole[:20])
    with pytest.raises(DataError, match="cannot be read"):
        streaming.open_rows(path, 0)
    for wrong, words in (
        (np.float64(3), r"rows, got shape \(\)"),
        (np.ones((9, 3), complex), "expected numbers or text, got dtype '<c16'"),
    ):
        np.save(path, wrong)
        with pytest.raises(DataError, match=words):
            streaming.open_rows(path, 0)
    np.save(path, np.zeros((9, 3)))
    np.save(tmp_path / "y.npy", np.zeros(8))
    with pytest.raises(DataError, match=r"y\.npy: expected shape \(9,\), a label for each row"):
        streaming.open_rows(path, tmp_path / "y.npy")
    with pytest.raises(DataError, match="suffix must be one of"):
        streaming.open_rows(tmp_path / "x.txt", 0)
    with pytest.raises(ValueError, match=r"`labels` must be of shape \(3,\), got shape \(2,\)"):
        streaming.ArrayRows(np.zeros((3, 2)), np.zeros(2))
    for mask in (np.arange(50) == 3, [0.5]):
        with pytest.raises(
            TypeError, match=r"`held_out` must be row numbers \(integer\), got dtype"
        ):
            batches_of(*data(50), 10, held_out=mask)
    for number in (-1, 50):
        with pytest.raises(ValueError, match=r"`held_out` must be in \[0, 50\), got"):
            batches_of(*data(50), 10, held_out=[number])
        with pytest.raises(ValueError, match=r"`held_out` must be in \[0, 50\), got"):
            streaming.fit(streaming.ArrayRows(*data(50)), num_classes=3, held_out=[number])
    with pytest.raises(ValueError, match=r"`held_out` must be fewer than all rows, got all 50"):
        batches_of(*data(50), 10, held_out=np.arange(50))
    one, other = (batches_of(*data(50), 10, held_out=[row]).configuration for row in (3, 4))
    assert one != other  # a run of the one does not go on as the other
    with pytest.raises(TypeError, match="`batch_size` must be an integer"):
        batches_of(*data(), 2.5)


@pytest.mark.x64_once
def test_what_is_wrong_with_a_column_of_parquet_is_said(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, labels = tmp_path / "x.parquet", [0, 1]
    for column in ([[1.0], [2.0]], np.zeros(2, "datetime64[s]")):
        parquet.write_table(pyarrow.table({"a": column, "y": labels}), path)
        with pytest.raises(DataError, match=r"column 'a'.*: expected (a number|numbers)") as plain:
            tables.dataset(path, "y")
        with pytest.raises(DataError, match=re.escape(str(plain.value))):
            streaming.open_rows(path, "y").read(0, 2)
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(labels)] * 2, ["y", "y"]), path)
    with pytest.raises(DataError, match="two columns have one name"):
        streaming.open_rows(path, "y")


def held(features, labels):
    columns = [Column(str(i)) for i in range(features.shape[1])]
    return HeldRows(Path("held"), "y", columns, features, labels)


@pytest.mark.x64_once
@pytest.mark.parametrize("count", [1, 2, 9, 400])
def test_the_medians_of_a_stream_are_those_of_numpy(count, monkeypatch):
    """For any signs, magnitudes and ties, whatever the runs and the processes that read them."""
    rng = np.random.default_rng(count)
    x = rng.normal(size=(count, 5))
    x[:, 1] = rng.integers(-2, 3, count) * 0.0  # zeros of both signs
    x[:, 2] = rng.integers(-2, 3, count)
    x[:, 3] *= 10.0 ** rng.integers(-300, 30, count)
    x[rng.random(x.shape) < 0.3] = np.nan
    x[0] = rng.normal(size=5)
    left_out = np.arange(1, count, 7)
    rows = held(x, np.zeros(count))
    monkeypatch.setattr(_survey, "RUN_BYTES", 1000)  # 25 rows
    seen = fills(rows, left_out, lambda: False)
    expected = np.nanmedian(np.delete(x, left_out, 0), axis=0)
    assert [column.fill for column in seen] == expected.tolist()
    assert fills(rows, left_out, lambda: True) is None
    with pytest.raises(DataError, match="column '0': has no cell to impute others from"):
        fills(rows, np.flatnonzero(~np.isnan(x[:, 0])), lambda: False)


@pytest.mark.x64_once
def test_the_survey_names_bad_rows_and_the_labels_are_encoded():
    x, _ = data(50)
    x[[7, 31], [0, 2]] = np.nan, np.inf
    labels = np.array(["b", "a", "c"], object)[np.arange(50) % 3]
    labels[40] = None
    rows = held(x, labels)
    seen = survey(rows)
    assert (seen.bad.tolist(), seen.classes) == ([7, 31, 40], ["a", "b", "c"])
    good = np.delete(x, [7, 31, 40], 0)
    names, counts = np.unique(np.delete(labels, [7, 31, 40]), return_counts=True)
    assert (names.tolist(), counts.tolist()) == (seen.classes, seen.counts.tolist())
    np.testing.assert_allclose(seen.mean, good.mean(0, dtype=float), atol=1e-8)
    np.testing.assert_allclose(seen.scale, good.std(0, dtype=float), rtol=1e-8)
    fitted = Standardised(rows, seen.mean, seen.scale, seen.classes)
    features, codes = fitted.read(39, 43)
    assert codes.tolist() == [1, -1, 2, 1]
    assert (features.dtype, features.shape) == (np.float32, (4, 5))
    expected = (x[39:43] - good.mean(0, dtype=float)) / good.std(0, dtype=float)
    np.testing.assert_allclose(features, expected, atol=1e-6)
    too_large = np.where(np.arange(50)[:, None] == 4, 1e300, x.astype(float))
    assert survey(held(too_large, labels)).bad.tolist() == [4, 7, 31, 40]
    with pytest.raises(DataError, match="one class only"):
        survey(held(x, np.ones(50)))
    with pytest.raises(DataError, match="column '0', row 8: expected a finite number"):
        survey(rows, False)
    assert survey(rows, True, lambda: True) is None

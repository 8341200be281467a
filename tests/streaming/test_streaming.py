"""Streamed data: the batches, the training on them, and the exact fit."""

import re
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from meshes import put

from softjax import regression, streaming, tables
from softjax.regression import _steps
from softjax.regression._steps import Stacked
from softjax.streaming import _devices, _passes
from softjax.streaming._reproducible_sums import ReproducibleSums
from softjax.streaming._rows import Standardised
from softjax.streaming._survey import survey
from softjax.tables import DataError
from softjax.tables._columns import Column
from softjax.tables._rows import HeldRows

pytestmark = pytest.mark.compiled_quickly

K = 4
TERMS = _steps.Terms(np.float32(0), None, np.float32(1), np.float32(-1))


def data(n=257, d=5, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(dtype) * np.arange(1, d + 1, dtype=dtype)
    return x, (np.argmax(x[:, :K] + rng.gumbel(size=(n, K)), 1)).astype(np.int32)


def batches_of(x, y, size=32, **options):
    return streaming.Batches(streaming.ArrayRows(x, y), size, **options)


def numpy_gradient(kernel, bias, x, y, w, l2):
    z = x @ kernel + bias
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    g = w[:, None] * (p - np.eye(K)[y]) / w.sum()
    value = -(w * np.log(p[np.arange(len(y)), y])).sum() / w.sum()
    return value + l2 / 2 * (kernel**2).sum(), x.T @ g + l2 * kernel, g.sum(0)


# --- batches ---

once = pytest.mark.x64_once


@once
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


@once
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


@once
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


@once
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


@once
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


@once
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


@once
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


# --- training ---


def test_training_is_sgd_on_the_batches(dtype):
    """Beside NumPy in float64, with what is held out and a transform."""
    x, y = data(dtype=dtype)
    batches = batches_of(x, y, 40, seed=1, buffer_bytes=1500, held_out=np.arange(9))
    l2, rate, steps, shift = 0.1, 0.1, 11, 0.5
    result = streaming.train(
        batches,
        num_classes=K,
        optimizer=optax.sgd(rate),
        steps=steps,
        l2=l2,
        every=4,
        transform=lambda features: features + shift,
        validation=(x[:9], y[:9]),
    )
    kernel, bias, values = np.zeros((5, K)), np.zeros(K), []
    for step in range(steps):
        features, labels, weights = batches.read(step)
        inputs = (features.astype(float) + shift, labels, weights.astype(float))
        value, of_kernel, of_bias = numpy_gradient(kernel, bias, *inputs, l2)
        kernel, bias = kernel - rate * of_kernel, bias - rate * of_bias
        values.append(value)
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    assert result.params.kernel.dtype == dtype
    np.testing.assert_allclose(result.params.kernel, kernel, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(result.params.bias, bias, rtol=tolerance, atol=tolerance)
    assert (result.stop_reason, result.steps) == ("step limit", 11)
    means = [np.mean(values[:4]), np.mean(values[4:8]), np.mean(values[8:])]
    history = result.history
    np.testing.assert_allclose([h["objective"] for h in history], means, rtol=10 * tolerance)
    assert [h["step"] for h in history] == [4, 8, 11]
    loss = numpy_gradient(kernel, bias, x[:9], y[:9], np.ones(9), 0)[0]
    np.testing.assert_allclose(history[-1]["validation_loss"], loss, rtol=10 * tolerance)


@once
def test_functions_and_iterables_give_batches_too():
    x, y = data()
    batches = batches_of(x, y)

    def read(step):
        step %= batches.epoch_steps
        numbers = batches.row_numbers(step)
        numbers = numbers[numbers >= 0]
        return x[numbers], y[numbers]

    list_of_them = [read(step) for step in range(batches.epoch_steps)]
    list_of_them.sort(key=lambda batch: -len(batch[1]))  # none larger than the first
    optimizer = optax.sgd(0.1)
    kernels = [
        streaming.train(source, num_classes=K, optimizer=optimizer, steps=13).params.kernel
        for source in (list_of_them, lambda step: list_of_them[step % len(list_of_them)])
    ]
    np.testing.assert_array_equal(*kernels)
    with pytest.raises(ValueError, match=r"iterable ended after .* does not begin again"):
        streaming.train(iter(list_of_them), num_classes=K, optimizer=optimizer, steps=13)
    sizes = [(x[:3], y[:3]), (x[:4], y[:4])]
    with pytest.raises(ValueError, match="batch 1 must be of at most 3 rows"):
        streaming.train(sizes, num_classes=K, optimizer=optimizer, steps=3)
    with pytest.raises(TypeError, match="`features` must be arrays with `labels`, or `Batches`"):
        streaming.train(3, num_classes=K, optimizer=optimizer, steps=3)
    with pytest.raises(ValueError, match="`num_classes` must be >= 2"):
        streaming.train(read, num_classes=1, optimizer=optimizer, steps=3)
    init = regression.init(3, K)
    with pytest.raises(ValueError, match=r"`init.kernel` must be of shape"):
        streaming.train(read, num_classes=K, optimizer=optimizer, steps=3, init=init)


@once
def test_an_error_of_the_source_arrives_after_the_steps_before_it():
    x, y = data()
    seen = []

    def read(step):
        if step == 5:
            raise OSError("the disk is gone")
        return x[:16], y[:16]

    def look(event):
        seen.append(event.step)

    with pytest.raises(OSError, match="the disk is gone"):
        streaming.train(
            read, num_classes=K, optimizer=optax.sgd(0.1), steps=9, every=1, callback=look
        )
    assert seen == [1, 2, 3, 4, 5]


@once
def test_a_bad_row_stops_the_training_and_is_named_or_left_out():
    x, y = data()
    x[100, 1], y[20] = np.nan, K
    batches = batches_of(x, y)
    bad = {step for step in range(9) if {20, 100} & set(batches.row_numbers(step).tolist())}
    step = min(bad)
    rows = sorted({20, 100} & set(batches.row_numbers(step).tolist()))
    optimizer = optax.adam(0.1)
    options = {"num_classes": K, "optimizer": optimizer, "steps": 9}
    with pytest.raises(streaming.NonFiniteError, match=f"of step {step} ") as caught:
        streaming.train(batches, **options)
    assert (caught.value.step, caught.value.rows) == (step, rows)
    named = (
        f"has labels other than 0, ..., {K - 1} in row 20."
        if 20 in rows
        else "is not finite in row"
    )
    assert named in str(caught.value)
    before = streaming.train(batches, **options | {"steps": step}).params
    np.testing.assert_array_equal(caught.value.params.kernel, before.kernel)

    skipped = streaming.train(batches, **options, skip_nonfinite=True)
    good_x, good_y = np.where(np.isfinite(x), x, 0), np.where(y < K, y, 0)
    held = batches_of(good_x, good_y, held_out=np.array([20, 100]))
    expected = streaming.train(held, **options).params.kernel
    np.testing.assert_allclose(skipped.params.kernel, expected, rtol=1e-6)

    with pytest.raises(streaming.NonFiniteError, match="take shorter steps"):
        streaming.train(held, **options | {"optimizer": optax.sgd(1e38), "l2": 1.0})


@once
@pytest.mark.parametrize(
    ("optimizer", "size", "counts"),
    [
        (optax.adam(0.1), 64, (1, 2, 3, 4, 8)),
        # Evaluates the objective too, of batches that are smaller than the number of blocks.
        (optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)), 7, (1, 4)),
    ],
)
def test_any_number_of_devices_gives_the_same_bits(monkeypatch, optimizer, size, counts):
    x, y = data(d=70)
    x[100, 1], y[20] = np.nan, K
    shift = np.linspace(0, 1, 70, dtype=np.float32)
    options = {"num_classes": K, "optimizer": optimizer, "steps": 20, "every": 7, "l2": 1e-3}
    options |= {"skip_nonfinite": True, "class_weights": np.arange(1.0, 5.0)}
    options |= {"transform": lambda features: (features - shift) / 3, "validation": (x[:9], y[:9])}
    devices, found = jax.devices(), {}
    for count in counts:
        monkeypatch.setattr(jax, "devices", lambda count=count: devices[:count])
        found[count] = streaming.train(batches_of(x, y, size, held_out=np.arange(9)), **options)
        assert len(found[count].params.kernel.sharding.device_set) == count
        for part, other in zip(found[count].params, found[1].params, strict=True):
            np.testing.assert_array_equal(part, other)
        values = [[e["objective"] for e in result.history] for result in (found[count], found[1])]
        assert values[0] == values[1]
    assert np.abs(found[1].params.kernel).min() > 0


@once
def test_a_batch_of_fewer_rows_than_classes_has_the_same_bits_and_one_gradient(monkeypatch):
    rng, devices, width, classes = np.random.default_rng(5), jax.devices(), 40, 61
    x, y = rng.normal(size=(96, width)).astype(np.float32), rng.integers(classes, size=96)
    optimizer = optax.chain(optax.adam(0.1), optax.scale_by_backtracking_linesearch(3))
    options = {"num_classes": classes, "optimizer": optimizer, "steps": 6, "l2": 1e-3}
    options |= {"class_weights": np.arange(1.0, classes + 1)}
    batches, found = batches_of(x, y, 32), {}
    for count in (1, 3, 8):
        monkeypatch.setattr(jax, "devices", lambda count=count: devices[:count])
        found[count] = streaming.train(batches, **options).params
        for part, other in zip(found[count], found[1], strict=True):
            np.testing.assert_array_equal(part, other)
    assert np.abs(found[1].kernel).min() > 0

    # The same as the gradient of the whole batch, of one step of SGD.
    first = batches.read(0)
    monkeypatch.setattr(jax, "devices", lambda: devices[:4])
    options |= {"optimizer": optax.sgd(1.0), "steps": 1, "l2": 0}
    step = streaming.train(batches, **options).params
    weights = first.weights * options["class_weights"][first.labels]
    g = weights[:, None] * (1 / classes - np.eye(classes)[first.labels]) / first.weights.sum()
    np.testing.assert_allclose(step.kernel, -first.features.T @ g, atol=1e-6)
    np.testing.assert_allclose(step.bias, -g.sum(0), atol=1e-6)

    monkeypatch.setattr(jax, "devices", lambda: devices[:1])
    optimizer = optax.sgd(0.1)
    program = _steps.advance.lower(
        _steps.Form(_devices.Devices(32, classes).sums, optimizer),
        TERMS,
        _steps.start(optimizer, regression.init(width, classes)),
        Stacked(jax.tree.map(lambda part: part[None], first)),
        np.int32(1),
        np.zeros(1, np.int32),
    )
    kernel, batch = 4 * width * classes, 4 * 32 * (width + classes)
    assert program.compile().memory_analysis().temp_size_in_bytes < 3 * kernel + 3 * batch


@once
def test_a_step_sends_what_an_all_reduce_does():
    optimizer, sums = optax.adam(0.1), _devices.Devices(64, 10).sums
    batch = batches_of(*data(), 64).read(0)
    program = _steps.advance.lower(
        _steps.Form(sums, optimizer),
        TERMS,
        _steps.start(optimizer, regression.init(5, K)),
        Stacked(jax.tree.map(lambda part: put(sums.mesh, part[None], None, "rows"), batch)),
        np.int32(1),
        put(sums.mesh, np.zeros(8, np.int32), "rows"),
    ).compile()
    found = re.findall(r"= (.*?) ((?:all|collective|reduce)-[a-z-]+)\(", program.as_text())
    # Of 26 numbers: kernel, bias, loss and weight; the flag goes alone, once a chunk.
    size = -(-(5 * K + K + 2) // 8)
    kinds = sorted(kind for _, kind in found)
    assert kinds == ["all-gather", "all-reduce", "all-to-all"]
    sent = {kind: shape for shape, kind in found}
    assert sent["all-gather"].startswith(f"f32[{8 * size}]")
    assert sent["all-reduce"].startswith("s32[]")


@once
def test_the_second_run_does_not_compile_and_a_callback_stops_it():
    batches, optimizer = batches_of(*data()), optax.adam(0.1)
    options = {"num_classes": K, "optimizer": optimizer, "every": 3}
    streaming.train(batches, steps=8, **options)
    programs = _steps.advance._cache_size()
    result = streaming.train(batches, steps=20, **options, callback=lambda e: e.step >= 6)
    assert _steps.advance._cache_size() == programs
    assert (result.stop_reason, result.steps) == ("callback", 6)
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    text = _steps.advance.lower(
        _steps.Form(ReproducibleSums(mesh, 1, of_classes=False), optimizer),
        TERMS,
        _steps.start(optimizer, regression.init(5, K)),
        Stacked(jax.tree.map(lambda part: part[None], batches.read(0))),
        np.int32(1),
        np.zeros(1, np.int32),
    ).as_text()
    assert text.count("tf.aliasing_output") == len(
        jax.tree.leaves(_steps.start(optimizer, regression.init(5, K)))
    )


# --- the exact fit ---


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_the_streamed_fit_is_the_fit_in_memory(l2, monkeypatch):
    monkeypatch.setattr(_passes, "CHUNK_BYTES", 2000)
    x, y = data(dtype=np.float64)
    x[:, 3] = 7.0  # constant
    held_out = np.array([3, 4, 250])
    keep = np.delete(np.arange(len(y)), held_out)
    expected = regression.fit(x[keep], y[keep], l2=l2, num_classes=K, tol=1e-11)
    rows = streaming.ArrayRows(x, y)
    got = streaming.fit(rows, num_classes=K, l2=l2, tol=1e-11, held_out=held_out)
    assert got.stop_reason == "converged"
    np.testing.assert_allclose(got.objective, expected.objective, rtol=1e-12)
    np.testing.assert_allclose(got.params.kernel, expected.params.kernel, atol=1e-6)
    np.testing.assert_allclose(got.params.bias, expected.params.bias, atol=1e-6)
    assert got.passes < 80  # two products a pass, and most steps one pass


@once
def test_the_streamed_fit_says_why_it_stopped():
    x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 0, 1, 1])
    rows = streaming.ArrayRows(x, y)
    separated = streaming.fit(rows, num_classes=2)
    assert (separated.stop_reason, separated.separated) == ("separated", True)
    stopped = streaming.fit(rows, num_classes=2, l2=0.1, callback=lambda event: event.step == 1)
    assert (stopped.stop_reason, stopped.steps) == ("callback", 1)
    limit = streaming.fit(rows, num_classes=2, l2=0.1, max_steps=0)
    assert (limit.stop_reason, limit.objective) == ("step limit", pytest.approx(np.log(2)))
    with pytest.raises(ValueError, match="`l2` must be a finite number >= 0"):
        streaming.fit(rows, num_classes=2, l2=-1.0)


# --- what is refused ---


def changed(x, place, value):
    x = np.array(x, np.result_type(x, type(value)))
    x[place] = value
    return x


X, Y = (
    np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32),
    np.arange(60, dtype=np.int32),
)
Y %= 3
REFUSED = {
    "complex features": (X + 1j, Y, 0.0),
    "text features": (X.astype(str), Y, 0.0),
    "dates": (X.astype("M8[s]"), Y, 0.0),
    "NaN": (changed(X, (41, 2), np.nan), Y, 0.0),
    "infinite": (changed(X, (41, 2), -np.inf), Y, 0.0),
    "beyond float32": (changed(X.astype(float), (41, 2), 1e39), Y, 0.0),
    "squares beyond float32": (changed(X, (41, 2), 1e25), Y, 0.0),
    "squares that vanish": (X * np.float32([1, 1e-25, 1]), Y, 0.0),
    "one class": (X, Y * 0 + 1, 0.0),
    "a label that is no class": (X, changed(Y, 41, 3), 0.0),
    "a negative label": (X, changed(Y, 41, -1), 0.0),
    "a label beyond int32": (X, changed(Y.astype(np.int64), 41, 2**32), 0.0),
    "text labels": (X, Y.astype(str), 0.0),
    "complex labels": (X, Y + 0j, 0.0),
    "a negative penalty": (X, Y, -1.0),
    "an infinite penalty": (X, Y, np.inf),
    "a penalty beyond float32": (X, Y, 1e39),
}


@once
@pytest.mark.parametrize("name", REFUSED)
def test_the_streamed_fit_refuses_what_the_fit_in_memory_refuses(name, monkeypatch):
    monkeypatch.setattr(_passes, "CHUNK_BYTES", 800)  # the row stands in the second chunk
    x, y, l2 = REFUSED[name]
    with pytest.raises((TypeError, ValueError)) as plain:
        regression.fit(x, y, num_classes=3, l2=l2)
    with pytest.raises(plain.type) as streamed:
        streaming.fit(streaming.ArrayRows(x, y), num_classes=3, l2=l2)
    first, second = (
        re.fullmatch(r"softjax\.[\w.]+: (`(\w+)` must be .*, got (.*))\.", str(e.value))
        for e in (plain, streamed)
    )
    assert first[2] == second[2]
    if not name.endswith(("labels", "label", "values", "int32")):
        assert first[1] == second[1]
    # Rows that are held out are not looked at.
    if " 41" in second[3] or "(41," in second[3]:
        rows = streaming.ArrayRows(x, y)
        assert streaming.fit(rows, num_classes=3, held_out=[41], max_steps=0).steps == 0


@once
def test_training_refuses_weights_features_and_starts_that_a_fit_refuses():
    optimizer, ones = optax.sgd(0.1), np.ones(60, np.float32)

    def train(x=X, y=Y, w=ones, **options):
        options = {"num_classes": 3, "optimizer": optimizer, "steps": 3} | options
        return streaming.train(lambda step: (x, y, w), **options)

    bad_start = regression.SoftmaxRegression(np.full((3, 3), np.nan, np.float32), ones[:3])
    refused = {
        "`weights` must be >= 0, got -1.0 at (7,)": {"w": changed(ones, 7, -1.0)},
        "`weights` must be an array of real numbers, got dtype complex64": {"w": ones + 0j},
        "`features` must be an array of real numbers, got dtype complex64": {"x": X + 0j},
        "`features` must be an array of real numbers, got dtype object": {
            "x": X.astype(str).astype(object)
        },
        "`labels` must be class indices, got dtype complex": {"y": Y + 0j},
        "`class_weights` must be finite and >= 0, got -1.0 at (1,)": {"class_weights": [1, -1, 1]},
        "`class_weights` must be finite and >= 0, got nan at (0,)": {"class_weights": [np.nan] * 3},
        "`class_weights` must be > 0 somewhere": {"class_weights": [0, 0, 0]},
        "`class_weights` must be of shape (3,)": {"class_weights": [1, 1]},
        "`init.kernel` must be finite in float32, got nan at (0, 0)": {"init": bad_start},
        "`validation` must be of 3 features, got 2 features": {"validation": (X[:, 1:], Y)},
        "`validation` must be finite in float32, got nan at (4, 1)": {
            "validation": (changed(X, (4, 1), np.nan), Y)
        },
        "`validation` must be in [0, 3), got 3 at (5,)": {"validation": (X, changed(Y, 5, 3))},
        "`validation` must be of shape (60,), got shape (59,)": {"validation": (X, Y[1:])},
        "`validation` must be an array of real numbers, got dtype complex": {
            "validation": (X + 0j, Y)
        },
        "`l2` must be finite in float32, got 1e+39": {"l2": 1e39},
        "`l2` must be a finite number >= 0": {"l2": -1.0},
        "batch 0 must be of at most 60 rows": {"w": ones[:, None]},
        "the features of batch 0 must be of shape (examples, features), got shape (0, 3)": {
            "x": X[:0],
            "y": Y[:0],
            "w": ones[:0],
        },
        "features of batch 0 must be of shape (examples, features), got shape (60,)": {
            "x": X[:, 0]
        },
        "features (60, any) for features (60, 3), got shape (59, 3)": {
            "transform": lambda x: x[1:]
        },
        "features (60, any) for features (60, 3), got NoneType": {"transform": lambda x: None},
    }
    for words, options in refused.items():
        with pytest.raises((TypeError, ValueError), match=re.escape(words)):
            train(**options)
    with pytest.raises((TypeError, ValueError), match="each of as many features as in the first"):
        streaming.train([(X, Y), (X[:, :1], Y)], num_classes=3, optimizer=optimizer, steps=3)
    wide = streaming.ArrayRows(X, Y, offset=np.zeros((60, 4), np.float32))
    options = {"num_classes": 3, "optimizer": optimizer, "epochs": 1}
    for run in (
        lambda: streaming.train(streaming.Batches(wide, 60), **options),
        lambda: streaming.fit(wide, num_classes=3),
    ):
        with pytest.raises(ValueError, match=r"`offset` must be of shape .* 3\), got shape .* 4\)"):
            run()
    with pytest.raises(ValueError, match=r"`transform` .*\(60, 3\) for .* got shape \(60, 2\)"):
        streaming.fit(streaming.ArrayRows(X, Y), num_classes=3, transform=lambda x: x[:, :2])
    soft = changed(np.full((60, 3), 1 / 3, np.float32), (7, 1), -1 / 3)
    for source in (lambda step: (X, soft), streaming.Batches(streaming.ArrayRows(X, soft), 60)):
        with pytest.raises(streaming.NonFiniteError, match="not finite in row 7"):
            streaming.train(source, num_classes=3, optimizer=optimizer, steps=1)
    for place in ({"process_index": 2}, {"process_index": -1}):
        with pytest.raises(ValueError, match=r"`process_index` must be in \[0, 2\)"):
            batches_of(X, Y, process_count=2, **place)
    for x, y in ((X + 0j, Y), (X, Y + 0j)):
        with pytest.raises(
            TypeError, match=r"softjax.streaming.Batches: `(features|labels)` must be"
        ):
            batches_of(x, y).read(0)
    # Numbers in other dtypes are numbers.
    plain = streaming.train(lambda step: (X, Y), num_classes=3, optimizer=optimizer, steps=3)
    for x, y in ((X.astype(">f4"), Y.astype(">i8")), (X.astype(object), Y.astype(object))):
        other = train(x, y, ones.astype(">f8"), validation=(x, y))
        np.testing.assert_array_equal(plain.params.kernel, other.params.kernel)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abc")).assign(b=X[:, 1] > 0)
    rows = streaming.ArrayRows(frame, pandas.Series(Y).astype("Int64"))
    expected = np.column_stack([X[:, 0], X[:, 1] > 0, X[:, 2]])[5:9]
    np.testing.assert_array_equal(rows.read(5, 9)[0], expected)
    np.testing.assert_array_equal(rows.read(5, 9)[1], Y[5:9])
    with pytest.raises(TypeError, match="got column 'b' of dtype"):
        streaming.ArrayRows(frame.assign(b="x"), Y).read(0, 1)

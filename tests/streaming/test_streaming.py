"""Streamed data: the training on batches, and the exact fit."""

import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from meshes import put
from streams import K, batches_of, data

from softjax import regression, streaming
from softjax.regression import _steps
from softjax.regression._steps import Stacked
from softjax.streaming import _devices, _passes
from softjax.streaming._reproducible_sums import ReproducibleSums

pytestmark = pytest.mark.compiled_quickly

TERMS = _steps.Terms(np.float32(0), None, np.float32(1), np.float32(-1))


def numpy_gradient(kernel, bias, x, y, w, l2):
    z = x @ kernel + bias
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    g = w[:, None] * (p - np.eye(K)[y]) / w.sum()
    value = -(w * np.log(p[np.arange(len(y)), y])).sum() / w.sum()
    return value + l2 / 2 * (kernel**2).sum(), x.T @ g + l2 * kernel, g.sum(0)


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


@pytest.mark.x64_once
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


@pytest.mark.x64_once
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


@pytest.mark.x64_once
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


@pytest.mark.x64_once
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


@pytest.mark.x64_once
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


@pytest.mark.x64_once
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


@pytest.mark.x64_once
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


@pytest.mark.x64_once
def test_the_streamed_fit_compiles_a_pass_and_a_direction_and_nothing_else(caplog):
    x, y = data(n=83, d=4)
    with jax.log_compiles():
        streaming.fit(streaming.ArrayRows(x, y), num_classes=K, l2=0.1)
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    assert sorted(compiled) == ["_direction", "_sums"]


@pytest.mark.x64_once
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

"""The trainer against NumPy: arrays in memory and batches take the same steps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from meshes import mesh_of, put
from weighted_rows import (
    CLASS_WEIGHTS,
    FACTORS,
    OFFSET,
    RATE,
    RNG,
    SGD,
    SHARES,
    STEPS,
    WEIGHTS,
    D,
    K,
    N,
    X,
    Y,
)

from softjax import cross_entropy, regression, streaming

pytestmark = pytest.mark.compiled_quickly


def steps_of_numpy(y, w, divisor, class_weights, offset, l2, constant):
    """SGD on all rows, from zeros, in float64."""
    shares = np.eye(K)[y] if y.ndim == 1 else y
    shares = shares * class_weights
    kernel, bias = np.zeros((D, K)), np.zeros(K)
    for _ in range(STEPS):
        p = oracles.softmax(X @ kernel + bias + offset)
        g = w[:, None] * (shares.sum(1, keepdims=True) * p - shares) / divisor
        kernel = kernel - RATE * (X.T @ g + l2[:, None] * kernel)
        bias = bias - RATE * constant * g.sum(0)
    return kernel, bias


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("labels", [Y, SHARES], ids=["indices", "distributions"])
@pytest.mark.parametrize("plain", [True, False])
def test_arrays_rows_and_functions_take_the_steps_of_numpy(labels, plain):
    """Weights, class weights, offset, penalty factors and no intercept, or none of these."""
    options = {"optimizer": SGD, "steps": STEPS, "num_classes": K, "l2": 0.1}
    arrays = {} if plain else {"sample_weights": WEIGHTS, "offset": OFFSET}
    if not plain:
        options |= {"class_weights": CLASS_WEIGHTS, "penalty_factors": FACTORS}
        options |= {"fit_intercept": False}
    w, offset = (np.ones(N), np.zeros((N, K))) if plain else (WEIGHTS, OFFSET)
    model = (
        (np.ones(K), offset, np.full(D, 0.1), 1.0)
        if plain
        else (CLASS_WEIGHTS, offset, 0.1 * FACTORS, 0.0)
    )
    rows = streaming.ArrayRows(X, labels, **arrays)
    batch = (X, labels) if plain else (X, labels, WEIGHTS, OFFSET)
    found = {
        "arrays": regression.train(X, labels, **options, **arrays),
        "rows": regression.train(streaming.Batches(rows, N), **options),
        "function": regression.train(lambda step: batch, **options),
    }
    for name, result in found.items():
        divisor = w.sum() if name == "function" else N * w.mean()
        expected = steps_of_numpy(labels, w, divisor, *model)
        np.testing.assert_allclose(result.params.kernel, expected[0], rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(result.params.bias, expected[1], rtol=1e-10, atol=1e-13)
    whole = regression.objective(
        found["arrays"].params,
        X,
        labels,
        l2=model[2],
        sample_weights=w,
        class_weights=model[0],
        offset=offset,
    )
    assert found["arrays"].objective == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.x64_once
def test_minibatches_of_arrays_are_those_of_a_fit():
    """They have the same order and the same bits, and nothing is traced again."""
    adam, traces = optax.adam(0.05), []

    def update(*arguments):
        traces.append(1)
        return adam.update(*arguments)

    optimizer = optax.GradientTransformation(adam.init, update)
    options = {"optimizer": optimizer, "batch_size": 7, "epochs": 3, "seed": 5, "l2": 0.01}
    trained = regression.train(X, Y, **options, every=4)
    once = len(traces)
    fitted = regression.fit(X, Y, **options)
    again = regression.train(X[::-1], Y[::-1], **options)
    assert len(traces) == once > 0
    for part, other in zip(trained.params, fitted.params, strict=True):
        np.testing.assert_array_equal(part, other)
    assert trained.objective == fitted.objective
    assert [event["step"] for event in trained.history] == [4, 8, 12, 16, 18]
    assert [event["epoch"] for event in again.history] == [1, 2, 3]


@pytest.mark.x64_once(True)
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.lbfgs(),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)),
        optax.adam(optax.cosine_decay_schedule(0.3, 300)),
    ],
    ids=["lbfgs", "backtracking", "schedule"],
)
def test_any_optimizer_reaches_the_optimum_that_fit_finds(optimizer):
    options = {"l2": 0.1, "sample_weights": WEIGHTS, "tol": 1e-7}
    expected = regression.fit(X, Y, **options)
    result = regression.train(X, Y, optimizer=optimizer, steps=600, **options)
    assert (result.stop_reason, result.converged) == ("converged", True)
    assert result.steps < 600
    assert result.gradient_norm <= 1e-7
    assert result.objective == pytest.approx(expected.objective, rel=1e-10)
    np.testing.assert_allclose(result.params.kernel, expected.params.kernel, atol=1e-5)


@pytest.mark.x64_once
def test_arrays_on_a_mesh_take_the_steps_of_one_device():
    options = {"optimizer": SGD, "batch_size": 8, "epochs": 2, "l2": 0.1}
    alone = regression.train(X, Y, **options)
    mesh = mesh_of("explicit", d=8)
    over = regression.train(put(mesh, X, "d"), put(mesh, Y, "d"), **options)
    for part, other in zip(over.params, alone.params, strict=True):
        np.testing.assert_allclose(part, other, rtol=1e-5, atol=1e-6)


@pytest.mark.x64_once
def test_steps_that_are_too_long_stop_and_are_not_taken():
    def rate(step):  # good for six steps
        return jnp.where(step < 6, 0.1, 1e38)

    with pytest.raises(streaming.NonFiniteError, match="take shorter steps") as caught:
        regression.train(X, Y, optimizer=optax.sgd(rate), batch_size=16, epochs=9)
    assert (caught.value.step, caught.value.rows) == (6, [])
    good = regression.train(X, Y, optimizer=optax.sgd(0.1), batch_size=16, steps=6)
    np.testing.assert_allclose(caught.value.params.kernel, good.params.kernel, rtol=1e-5)


@pytest.mark.x64_once
def test_it_has_one_name_and_counts_classes_and_epochs():
    assert regression.train is streaming.train
    assert "train" in dir(regression)
    with pytest.raises(AttributeError, match=r"softjax\.regression' has no attribute 'trane'"):
        regression.trane  # noqa: B018
    separable = np.eye(K, dtype=np.float32)[Y]
    batches = streaming.Batches(streaming.ArrayRows(separable, Y), 8)
    result = regression.train(batches, optimizer=SGD, epochs=2)
    assert (result.steps, result.params.bias.shape) == (2 * batches.epoch_steps, (K,))
    result = regression.train(separable, Y, optimizer=optax.lbfgs(), steps=5)
    assert result.separated


@pytest.mark.x64_once
def test_without_a_step_the_objective_is_that_of_the_start():
    """The objective is that of all examples for arrays, and of the first batch for batches."""
    x, kernel, bias = X.astype(np.float32), RNG.normal(size=(D, K)), RNG.normal(size=K)
    start = regression.SoftmaxRegression(*(jnp.asarray(p, jnp.float32) for p in (kernel, bias)))
    batches = streaming.Batches(streaming.ArrayRows(x, Y), 8)
    first = batches.read(0)
    some = (first.features[first.weights > 0], first.labels[first.weights > 0])
    for data, rows in (((x, Y), (x, Y)), ((batches,), some)):
        result = regression.train(*data, optimizer=SGD, epochs=0)
        assert (result.steps, result.stop_reason, result.history) == (0, "step limit", [])
        np.testing.assert_allclose(result.objective, np.log(K), rtol=1e-6)
        result = regression.train(*data, optimizer=SGD, epochs=0, init=start, l2=0.1)
        expected = regression.objective(start, *rows, l2=0.1)
        np.testing.assert_allclose(result.objective, expected, rtol=1e-6)
        gradient = regression.gradient(start, *rows, l2=0.1)
        largest = max(float(abs(leaf).max()) for leaf in gradient)
        assert len(data) == 2 or np.isclose(result.gradient_norm, largest, rtol=1e-5)


@pytest.mark.x64_once
def test_what_does_not_fit_is_refused_by_name():
    batches, both = streaming.Batches(streaming.ArrayRows(X, Y), 8), (X, Y)
    refused = {
        "`epochs` must be given, or `steps`, but not both, got neither": (both, {}),
        "but not both, got both": (both, {"epochs": 1, "steps": 1}),
        "`batch_size` must be None where `features` are batches": (
            (batches,),
            {"batch_size": 3, "steps": 1},
        ),
        "`epochs` must be None for batches of a function": (
            (lambda step: both,),
            {"epochs": 2, "num_classes": K},
        ),
        "`num_classes` must be given": ((lambda step: both,), {"steps": 2}),
        "`skip_nonfinite` must be False": (both, {"steps": 1, "skip_nonfinite": True}),
        "softjax.regression.train: `features` must be finite": ((X * np.nan, Y), {"steps": 1}),
        "softjax.regression.train: `labels` must be of two": ((X, Y * 0), {"steps": 1}),
        "`optimizer` must be an optax optimizer": (both, {"steps": 1, "optimizer": "adam"}),
        "`penalty_factors` must be finite and >= 0": (
            both,
            {"steps": 1, "penalty_factors": [1, -1, 1]},
        ),
        "`tol` must be a finite number >= 0": (both, {"steps": 1, "tol": -1.0}),
        "`features` must be arrays with `labels`": ((X,), {"steps": 1}),
        "`labels` must be None where `features` are batches": ((batches, Y), {"steps": 1}),
        "a batch must be (features, labels), and weights and an offset if there are any, got 5": (
            (lambda step: (X, Y, np.ones(N), SHARES, SHARES),),
            {"steps": 1, "num_classes": K},
        ),
        "if there are any, got str": (("x.npy",), {"steps": 1, "num_classes": K}),
        "if there are any, got NoneType": (
            (lambda step: None,),
            {"steps": 1, "num_classes": K},
        ),
        "`labels` must be of shape (40, 3), got": (
            (lambda step: (X, SHARES),),
            {"steps": 1, "num_classes": 3},
        ),
        "`init.bias` must be 0 where": (
            both,
            {
                "steps": 1,
                "fit_intercept": False,
                "init": regression.SoftmaxRegression(np.zeros((D, K)), np.ones(K)),
            },
        ),
    }
    for words, (arguments, options) in refused.items():
        with pytest.raises((TypeError, ValueError), match=re.escape(words)):
            regression.train(*arguments, **{"optimizer": SGD} | options)
    with pytest.raises(TypeError, match="floating"):
        streaming.Batches(streaming.ArrayRows(X, np.eye(K, dtype=int)[Y]), 8).read(0)
    with pytest.raises(ValueError, match="`sample_weights` must be > 0 somewhere"):
        streaming.ArrayRows(X, Y, sample_weights=np.zeros(N))


@pytest.mark.x64_once
def test_batches_of_rows_with_weights_hold_out_and_leave_out(monkeypatch):
    """A row that is held out or bad is as if it were not there, on any number of devices."""
    x, labels, offset = X.astype(np.float32), SHARES.copy(), OFFSET.copy()
    weights = np.ones(N)
    labels[5, 1], offset[7, 2] = -1.0, np.nan
    gone = np.array([5, 7, 30])
    keep = np.delete(np.arange(N), gone)
    options = {"optimizer": SGD, "steps": STEPS, "num_classes": K}
    expected = regression.train(x[keep], labels[keep], offset=offset[keep], **options).params
    rows = streaming.ArrayRows(x, labels, sample_weights=weights, offset=offset)
    batches = streaming.Batches(rows, N, held_out=gone[2:])
    devices = jax.devices()
    for count in (1, 4):
        monkeypatch.setattr(jax, "devices", lambda count=count: devices[:count])
        found = regression.train(batches, skip_nonfinite=True, **options).params
        for part, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(part, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(streaming.NonFiniteError) as caught:
        regression.train(batches, **options)
    assert caught.value.rows == [5, 7]


@pytest.mark.x64_once(True)
def test_a_streamed_fit_takes_weights_soft_labels_and_offsets(monkeypatch):
    monkeypatch.setattr(streaming._passes, "CHUNK_BYTES", 700)
    held_out = np.array([3, 20])
    keep = np.delete(np.arange(N), held_out)
    expected = regression.fit(
        X[keep],
        SHARES[keep],
        l2=0.1,
        tol=1e-10,
        sample_weights=WEIGHTS[keep],
        offset=OFFSET[keep],
    )
    rows = streaming.ArrayRows(X, SHARES, sample_weights=WEIGHTS, offset=OFFSET)
    got = streaming.fit(rows, num_classes=K, l2=0.1, tol=1e-10, held_out=held_out)
    assert got.stop_reason == "converged"
    np.testing.assert_allclose(got.objective, expected.objective, rtol=1e-10)
    np.testing.assert_allclose(got.params.kernel, expected.params.kernel, atol=1e-6)
    bad = OFFSET.copy()
    bad[9, 1] = np.inf
    rows = streaming.ArrayRows(X, SHARES, offset=bad)
    with pytest.raises(ValueError, match=r"`offset` must be finite in float64, got .* at \(9,\)"):
        streaming.fit(rows, num_classes=K)


@pytest.mark.x64_once
@pytest.mark.parametrize("kind", ["csr_matrix", "csr_array", "csc_array", "coo_array"])
def test_sparse_rows_of_scipy_are_read_as_their_numbers(kind):
    sparse = pytest.importorskip("scipy.sparse")
    x = np.where(RNG.random((N, D)) < 0.4, X, 0).astype(np.float32)
    rows = streaming.ArrayRows(getattr(sparse, kind)(x), Y)
    np.testing.assert_array_equal(rows.read(5, 17)[0], x[5:17])
    dense = streaming.ArrayRows(x, Y)
    assert rows.fingerprint == dense.fingerprint
    results = [
        regression.train(streaming.Batches(each, 8, seed=1), optimizer=SGD, epochs=2)
        for each in (rows, dense)
    ]
    np.testing.assert_array_equal(*(result.params.kernel for result in results))


@pytest.mark.x64_once
@pytest.mark.parametrize(
    "options",
    [
        {"init": (np.zeros((3, 3)), np.zeros(3))},
        {"init": "zeros"},
        {"callback": 3},
        {"preempted": True},
        {"transform": "standardise"},
        {"validation": (np.zeros((4, 3)),)},
        {"validation": 4},
        {"sample_weights": "traced"},
    ],
    ids=lambda options: "-".join(f"{k} {type(v).__name__}" for k, v in options.items()),
)
def test_what_is_no_argument_is_refused_before_the_first_step(options):
    x, y = np.random.default_rng(0).normal(size=(12, 3)).astype("f4"), np.arange(12) % 3
    given = {"optimizer": optax.sgd(0.1), "epochs": 1, "num_classes": 3, **options}

    def train(weights):
        if "sample_weights" in options:
            given["sample_weights"] = weights
        return regression.train(x, y, **given).objective

    with pytest.raises(TypeError, match=r"softjax\.regression\.train: `\w+` must be "):
        jax.grad(train)(np.ones(12, "f4"))


@pytest.mark.x64_once
def test_validation_has_the_offset_of_its_rows(dtype):
    rng = np.random.default_rng(0)
    x, y, offset = rng.normal(size=(24, 2)), np.arange(24) % 3, rng.normal(size=(24, 3))
    x, offset = x.astype(dtype), offset.astype(dtype)
    given = {"optimizer": optax.sgd(0.1), "epochs": 2, "num_classes": 3}
    for labels in (y, y.astype(float), np.eye(3, dtype=int)[y]):  # also numbers as in files
        result = regression.train(x, y, offset=offset, validation=(x, labels, offset), **given)
        event, ours = result.history[-1], regression.logits(result.params, x, offset=offset)
        assert event["validation_loss"] == pytest.approx(
            float(np.mean(cross_entropy(ours, y))), rel=1e-6
        )

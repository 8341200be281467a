"""Softmax regression against float64 NumPy and scipy.optimize."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
from jax.experimental.sparse import BCOO

import softjax
from softjax import regression
from softjax.regression._steps import Batch as Rows
from softjax.regression._steps import Held, epoch_order

pytestmark = pytest.mark.compiled_quickly

N, D, K = 60, 4, 3
L2 = 0.01


def problem(seed=0):
    """Classes that overlap, so that there is an optimum at any l2 > 0."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, D))
    scores = x @ rng.normal(size=(D, K)) + rng.gumbel(size=(N, K))
    return x, np.argmax(scores, -1)


def objective(theta, x, y, l2=L2, sample_weights=None, class_weights=None):
    """The objective and its gradient, in float64; y is a distribution [N, K]."""
    kernel, bias = theta[: D * K].reshape(D, K), theta[D * K :]
    w = np.ones(len(x)) if sample_weights is None else np.asarray(sample_weights, float)
    w = (w / w.sum())[:, None]
    y = y if class_weights is None else y * class_weights
    z = x @ kernel + bias
    value = -np.sum(w * y * scipy.special.log_softmax(z, -1)) + l2 / 2 * np.sum(kernel**2)
    g = w * (y.sum(-1, keepdims=True) * scipy.special.softmax(z, -1) - y)
    return value, np.concatenate([(x.T @ g + l2 * kernel).ravel(), g.sum(0)])


def optimum(x, y, **options):
    """The kernel, the centred bias and the objective: adding a number to the bias is free."""
    y = np.eye(K)[y] if y.ndim == 1 else y
    start = np.zeros((D + 1) * K)
    found = scipy.optimize.minimize(
        lambda theta: objective(theta, x, y, **options),
        start,
        jac=True,
        method="BFGS",
        options={"gtol": 1e-10},
    )
    bias = found.x[D * K :]
    return found.x[: D * K].reshape(D, K), bias - bias.mean(), found.fun


def assert_optimal(result, expected, tol):
    kernel, bias, value = expected
    ours = np.asarray(result.params.bias, np.float64)
    np.testing.assert_allclose(result.params.kernel, kernel, atol=tol)
    np.testing.assert_allclose(ours - ours.mean(), bias, atol=tol)
    assert result.objective == pytest.approx(value, abs=1e-6)


def tolerance(x64):
    # The curvature is at least l2 = 0.01: the error is at most 100 times the gradient, which is
    # 1e-6 (the default tol, in 32 bits) or 1e-9.
    return 1e-7 if x64 else 1e-4


# The model and the objective


def test_the_model_is_that_of_numpy(dtype):
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.normal(size=shape).astype(dtype) for shape in ((N, D), (D, K), K))
    params = regression.SoftmaxRegression(jnp.asarray(kernel), jnp.asarray(bias))
    z = x.astype(float) @ kernel.astype(float) + bias
    tol = 8 * np.finfo(dtype).eps  # D + 1 roundings of numbers below 8
    np.testing.assert_allclose(regression.logits(params, x), z, atol=8 * tol)
    np.testing.assert_allclose(
        regression.predict_proba(params, x), scipy.special.softmax(z, -1), atol=8 * tol
    )
    np.testing.assert_allclose(
        regression.predict_log_proba(params, x), scipy.special.log_softmax(z, -1), atol=16 * tol
    )
    predicted = regression.predict(params, x)
    assert predicted.dtype == np.int32
    np.testing.assert_array_equal(predicted, z.argmax(-1))
    assert regression.logits(params, x).dtype == dtype
    assert regression.predict(params, x[0]) == predicted[0]


def test_the_parameters_are_a_pytree_of_zeros(x64):
    params = regression.init(D, K)
    leaves = jax.tree.leaves(params)
    assert [leaf.shape for leaf in leaves] == [(D, K), (K,)]
    assert all(leaf.dtype == (np.float64 if x64 else np.float32) for leaf in leaves)
    assert not any(leaf.any() for leaf in leaves)
    assert regression.init(D, K, np.float16).kernel.dtype == np.float16


def test_the_objective_and_its_gradient_are_those_of_numpy(dtype):
    x, y = problem()
    x = x.astype(dtype)
    rng = np.random.default_rng(1)
    theta = rng.normal(size=(D + 1) * K).astype(dtype)
    weights = rng.uniform(size=N).astype(dtype)
    class_weights = np.array([1, 2, 0.5], dtype)
    expected = objective(
        theta.astype(float), x.astype(float), np.eye(K)[y], L2, weights, class_weights
    )
    params = regression.SoftmaxRegression(
        jnp.asarray(theta[: D * K].reshape(D, K)), jnp.asarray(theta[D * K :])
    )

    def ours(params):
        return regression.objective(
            params, x, y, l2=L2, sample_weights=weights, class_weights=class_weights
        )

    value, gradient = jax.value_and_grad(ours)(params)
    rtol = 100 * np.finfo(dtype).eps  # some hundred terms of like size
    np.testing.assert_allclose(value, expected[0], rtol=rtol)
    flat = np.concatenate([np.ravel(leaf) for leaf in gradient])
    np.testing.assert_allclose(flat, expected[1], atol=rtol)


# The optimum


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        optax.lbfgs(memory_size=5),
        optax.sgd(0.5, momentum=0.9, nesterov=True),
        optax.adam(0.1),
    ],
    ids=["default", "lbfgs", "sgd", "adam"],
)
def test_every_optimizer_reaches_the_optimum(optimizer, x64, dtype):
    x, y = problem()
    result = regression.fit(
        x.astype(dtype), y, optimizer=optimizer, l2=L2, epochs=3000, tol=1e-9 if x64 else 1e-6
    )
    assert result.params.kernel.dtype == dtype
    assert result.converged
    assert result.stop_reason == regression.CONVERGED
    assert_optimal(result, optimum(x.astype(dtype).astype(float), y), tolerance(x64))


def test_an_optimizer_with_state_of_other_dtypes_keeps_the_dtype(x64):
    x, y = problem()
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_schedule(optax.cosine_decay_schedule(0.1, 100)),
        optax.scale(-1.0),
    )
    result = regression.fit(x.astype(np.float32), y, optimizer=optimizer, epochs=20)
    assert result.params.kernel.dtype == np.float32
    assert result.history[-1]["objective"] < result.history[0]["objective"]


def test_distributions_and_weights_and_a_start_elsewhere(x64, dtype):
    x, _ = problem()
    rng = np.random.default_rng(2)
    soft = rng.dirichlet(np.ones(K), N).astype(dtype)
    weights = rng.uniform(size=N)
    class_weights = np.array([1.0, 2.0, 0.5])
    start = regression.SoftmaxRegression(jnp.ones((D, K), dtype), jnp.zeros(K, dtype))
    options = {"sample_weights": weights, "class_weights": class_weights}
    result = regression.fit(
        x.astype(dtype), soft, l2=L2, tol=1e-9 if x64 else 1e-6, init=start, **options
    )
    expected = optimum(x.astype(dtype).astype(float), soft.astype(float), **options)
    assert_optimal(result, expected, tolerance(x64))


@pytest.mark.x64_once(True)
def test_sample_weights_are_repeated_rows():
    x, y = problem()
    counts = np.random.default_rng(3).integers(0, 4, N)
    weighted = regression.fit(x, y, l2=L2, num_classes=K, tol=1e-10, sample_weights=counts)
    rows = np.repeat(np.arange(N), counts)
    repeated = regression.fit(x[rows], y[rows], l2=L2, num_classes=K, tol=1e-10)
    np.testing.assert_allclose(weighted.params.kernel, repeated.params.kernel, atol=1e-7)
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-12)


@pytest.mark.x64_once
def test_separable_data_without_penalty_end_with_a_reason():
    x = np.array([[-1.0], [1.0]], np.float32)
    result = regression.fit(x, np.array([0, 1]), tol=0.0, epochs=500)
    assert result.stop_reason == regression.SEPARATED
    assert result.separated
    assert result.objective < 1e-6
    assert np.isfinite(result.params.kernel).all()


# Minibatches


@pytest.mark.x64_once
@pytest.mark.parametrize("batch_size", [1, 7, 30, 59, 60])
def test_an_epoch_visits_every_example_once(batch_size):
    steps, rows = -(-N // batch_size), Rows(np.zeros((N, 1)), np.arange(N), None)
    orders = []
    for epoch in range(2):
        order = epoch_order(jax.random.key(0), np.int32(epoch), N, batch_size)
        assert order.shape == (steps, batch_size)
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = jax.tree.map(np.asarray, Held(rows, order).batch(step, 0))
            assert batch.labels.shape == (batch_size,)
            np.testing.assert_array_equal(batch.weights, batch.counts)
            seen += batch.labels[batch.weights].tolist()
        assert sorted(seen) == list(range(N))
        orders.append(seen)
    assert orders[0] != orders[1]


@pytest.mark.x64_once(True)
def test_minibatch_steps_are_those_of_numpy():
    """SGD, with a ragged tail, weights and two epochs, step by step."""
    x, y = problem()
    weights = np.random.default_rng(4).uniform(0.5, 2, N)
    rate, batch_size, epochs, seed = 0.1, 16, 2, 5
    result = regression.fit(
        x,
        y,
        optimizer=optax.sgd(rate),
        l2=L2,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        sample_weights=weights,
    )
    theta = np.zeros((D + 1) * K)
    w = weights / weights.mean()
    for epoch in range(epochs):
        order = epoch_order(jax.random.key(seed), np.int32(epoch), N, batch_size)
        for rows in np.asarray(order):
            rows = rows[rows >= 0]
            scale = w[rows].mean()  # the mean loss divides by the number of rows, not the weights
            _, gradient = objective(theta, x[rows], np.eye(K)[y[rows]], L2 / scale, w[rows])
            theta -= rate * scale * gradient
    assert result.steps == epochs * 4
    assert result.stop_reason == regression.STEP_LIMIT
    np.testing.assert_allclose(np.ravel(result.params.kernel), theta[: D * K], rtol=1e-10)
    np.testing.assert_allclose(result.params.bias, theta[D * K :], rtol=1e-10, atol=1e-14)


@pytest.mark.x64_once
def test_a_seed_determines_the_result_bit_for_bit():
    x, y = problem()
    fits = [regression.fit(x, y, batch_size=16, epochs=3, seed=seed).params for seed in (1, 1, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(fits[0], fits[1], strict=True))
    assert not np.array_equal(fits[0].kernel, fits[2].kernel)


@pytest.mark.x64_once
def test_the_length_of_a_chunk_does_not_change_the_fit():
    x, y = problem()
    fits = [
        regression.fit(x, y, batch_size=16, epochs=3, steps_per_chunk=steps).params
        for steps in (1, 5, 12)
    ]
    for other in fits[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(fits[0], other, strict=True))


# The loop


@pytest.mark.x64_once
@pytest.mark.parametrize("batch_size", [None, 16])
def test_later_chunks_and_later_fits_trace_nothing(batch_size):
    x, y = problem()
    traces = []
    sgd = optax.sgd(0.1)

    def update(updates, state, params=None):
        traces.append(1)
        return sgd.update(updates, state, params)

    optimizer = optax.GradientTransformation(sgd.init, update)
    options = {"optimizer": optimizer, "batch_size": batch_size, "l2": L2}
    regression.fit(x, y, epochs=10, steps_per_chunk=5, **options)
    first = len(traces)
    assert first > 0
    regression.fit(x, y, epochs=40, steps_per_chunk=5, **options)
    x, y = problem(1)
    regression.fit(x, y, epochs=20, steps_per_chunk=7, seed=3, num_classes=K, **options)
    assert len(traces) == first


@pytest.mark.x64_once
@pytest.mark.parametrize("batch_size", [None, 16])
def test_a_step_that_is_not_finite_is_not_taken(batch_size):
    x, y = problem()

    def rate(step):  # good for six steps
        return jnp.where(step < 6, 0.1, 1e30)

    options = {"l2": 0.1, "batch_size": batch_size}
    result = regression.fit(x, y, optimizer=optax.sgd(rate), epochs=50, **options)
    good = regression.fit(
        x,
        y,
        optimizer=optax.sgd(0.1),
        epochs=50,
        **options,
        steps_per_chunk=6,
        callback=lambda event: event.step >= 6,
    )
    assert result.stop_reason == regression.NON_FINITE
    assert not result.converged
    assert result.steps == 6
    assert np.isfinite(result.objective)
    np.testing.assert_allclose(result.params.kernel, good.params.kernel, rtol=1e-5)


@pytest.mark.x64_once
def test_without_features_the_bias_is_the_share_of_each_class():
    _, y = problem()
    params = regression.fit(np.zeros((N, 0)), y).params
    shares = np.bincount(y) / N
    # The gradient is p - shares, and at most `tol` = 1e-6.
    np.testing.assert_allclose(regression.predict_proba(params, np.zeros(0)), shares, atol=2e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64"])
def test_labels_of_any_integer_dtype(dtype):
    x, y = problem()
    x = x.astype(np.float32)
    expected = regression.fit(x, y, l2=L2).params.kernel
    for labels in (y.astype(dtype), jnp.asarray(y).astype(jax.dtypes.canonicalize_dtype(dtype))):
        np.testing.assert_array_equal(regression.fit(x, labels, l2=L2).params.kernel, expected)


@pytest.mark.x64_once
def test_the_step_limit_is_said():
    x, y = problem()
    result = regression.fit(x, y, l2=L2, epochs=3)
    assert (result.stop_reason, result.steps, result.converged) == ("step limit", 3, False)
    assert regression.fit(x, y, epochs=0).objective == pytest.approx(np.log(K))


@pytest.mark.x64_once
def test_the_callback_sees_every_chunk_and_can_stop():
    x, y = problem()
    events = []

    def callback(event):
        events.append(event)
        return event.step >= 4

    options = {"solver": "optax", "steps_per_chunk": 2, "validation": (x, y)}
    result = regression.fit(x, y, l2=L2, callback=callback, **options)
    assert result.stop_reason == regression.CALLBACK
    assert [event.step for event in events] == [0, 2, 4]
    assert [record["step"] for record in result.history] == [0, 2, 4]
    for event, record in zip(events, result.history, strict=True):
        value = regression.objective(event.params, x, y, l2=L2)
        loss = regression.objective(event.params, x, y)
        accuracy = np.mean(np.asarray(regression.predict(event.params, x)) == y)
        assert "params" not in record
        assert record["objective"] == event.objective == pytest.approx(float(value), rel=1e-6)
        assert record["validation_loss"] == pytest.approx(float(loss), rel=1e-6)
        assert record["validation_accuracy"] == pytest.approx(accuracy, rel=1e-6)


# Errors


def bad(**changes):
    x, y = problem()
    return {"features": x, "labels": y} | changes


@pytest.mark.x64_once
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(features=np.zeros(N)), ValueError, r"`features` must be of shape \(examples, feat"),
        (bad(features=np.array([["a"]])), TypeError, "`features` must be an array of real numbers"),
        (bad(features=np.full((N, D), np.nan)), ValueError, r"`features` .* got nan at \(0, 0\)"),
        (bad(labels=np.zeros(3, int)), ValueError, r"`labels` must be of shape \(60,\)"),
        (bad(labels=["a"] * N), TypeError, "`labels` must be class indices"),
        (
            bad(labels=np.full(N, -1)),
            ValueError,
            r"`labels` must be class indices >= 0 .* got -1 at",
        ),
        (bad(labels=np.full(N, 2**40)), ValueError, r"`labels` must be .* < 2\^31, got 1099"),
        (bad(features=np.full((N, D), 1e300)), ValueError, "`features` must be finite in float32"),
        (bad(features=np.full((N, D), 1e20)), ValueError, r"entry is 0 or in \[1e-18, 2e\+18\]"),
        (bad(features=np.full((N, D), 1e-20)), ValueError, "got 1e-20 in column 0"),
        (bad(labels=np.zeros((N, K))), ValueError, "`labels` must be > 0 somewhere"),
        (bad(l2=1e39), ValueError, "`l2` must be finite in float32, got 1e"),
        (bad(labels=np.zeros(N, int)), ValueError, "`labels` must be of two classes or more"),
        (bad(num_classes=2), ValueError, r"`labels` must be in \[0, 2\), got 2"),
        (bad(num_classes=2.5), TypeError, "`num_classes` must be an integer, got 2.5"),
        (bad(labels=np.full((N, K), np.inf)), ValueError, "`labels` must be finite and >= 0"),
        (bad(l2=-1.0), ValueError, "`l2` must be a finite number >= 0, got -1.0"),
        (bad(l2="a"), TypeError, "`l2` must be a finite number >= 0, got 'a'"),
        (bad(batch_size=0), ValueError, "`batch_size` must be >= 1, got 0"),
        (bad(epochs=-1), ValueError, "`epochs` must be >= 0, got -1"),
        (bad(tol=np.nan), ValueError, "`tol` must be a finite number >= 0, got nan"),
        (bad(seed=-1), ValueError, "`seed` must be >= 0, got -1"),
        (bad(sample_weights=np.zeros(N)), ValueError, "`sample_weights` must be > 0 somewhere"),
        (bad(sample_weights=np.ones(3)), ValueError, r"`sample_weights` must be of shape \(60,\)"),
        (bad(class_weights=[1.0, -1.0, 1.0]), ValueError, "`class_weights` must be finite and >="),
        (bad(class_weights=np.zeros(K)), ValueError, "`class_weights` must be > 0 somewhere"),
        (
            bad(init=regression.init(D, K)._replace(bias=np.full(K, np.nan))),
            ValueError,
            "init.bias",
        ),
        (bad(init=regression.init(D, 5)), ValueError, r"`init.kernel` must be of shape \(4, 3\)"),
        (bad(validation=problem()[::-1]), ValueError, "`validation` must be of shape"),
        (bad(validation=(np.ones((2, 3)), [0, 1])), ValueError, "must be of 4 features, got 3"),
    ],
)
def test_a_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=f"softjax.regression.fit: .*{message}"):
        regression.fit(**arguments)


@pytest.mark.x64_once
def test_columns_of_pandas_are_labels():
    import pandas  # comes with statsmodels

    x, y = problem()
    for kind in ("Int64", "category"):
        result = regression.fit(x, pandas.Series(y).astype(kind), max_steps=0)
        assert result.params.bias.shape == (K,)


@pytest.mark.x64_once
def test_no_class_is_predicted_from_logits_that_are_nan():
    x, params = np.zeros((2, D)), regression.init(D, K)
    x[1, 2] = np.nan
    bad = params._replace(bias=params.bias.at[1].set(np.nan))
    sparse = BCOO.fromdense(jnp.asarray(x))
    for of, features in ((params, x), (params, x[1]), (params, sparse), (bad, x[:1])):
        with pytest.raises(ValueError, match=r"`features` must be such that no logit is NaN"):
            regression.predict(of, features)
        assert regression.predict(params, np.nan_to_num(x[:1])).tolist() == [0]
        with softjax.checks(False):
            unchecked = regression.predict(of, features)
        np.testing.assert_array_equal(jax.jit(regression.predict)(of, features), unchecked)


@pytest.mark.x64_once
def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"`features` must be of shape \(\.\.\., 4\), got"):
        regression.predict(regression.init(D, K), np.zeros((2, 3)))

"""The form for each backend, run on the CPU: the same digits, and NaN for any number of rows."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax
from softjax import (
    _one_pass,
    _reductions,
    _row_maps,
    accuracy,
    choice,
    derivatives,
    information,
    regression,
)
from softjax._platforms import tracing_for
from softjax.regression import _preconditioner

pytestmark = pytest.mark.x64_once
# More classes than one kernel of a GPU has in a row: these rows have other forms.
LONG = _reductions.ROW_OF_ONE_KERNEL + 17


def joined_as_tree(join, axes, parts, empty):
    """A reduction in the order of many lanes; XLA:CPU would add to one sum entry by entry."""
    (axis,) = axes
    start = [jnp.full_like(a[..., :1], value) for value, a in zip(empty, parts, strict=True)]
    while (length := parts[0].shape[axis]) > 1:
        ends = (slice(None, length // 2), slice(length // 2, length // 2 * 2))
        first, second = (tuple(a[..., end] for a in parts) for end in ends)
        rest = tuple(a[..., length // 2 * 2 :] for a in parts)
        both = join(first, second)
        parts = tuple(jnp.concatenate(pair, -1) for pair in zip(both, rest, strict=True))
    return join(start, parts)


def summed_as_tree(terms, axis):
    """The sums over the last axis, in the order of `joined_as_tree`."""

    def join(first, second):
        return tuple(a + b for a, b in zip(first, second, strict=True))

    return tuple(a[..., 0] for a in joined_as_tree(join, (axis,), terms, [0] * len(terms)))


@pytest.fixture(params=["cpu", "cuda", "tpu"])
def backend(request, monkeypatch):
    """The functions as they are lowered for a backend, linear maps among them."""
    monkeypatch.setattr(_one_pass, "_reduced", joined_as_tree)
    monkeypatch.setattr(_one_pass, "sums_down", summed_as_tree)

    def of_backend(*operands, **forms):
        with tracing_for(request.param):
            return _row_maps._apply(*operands, **forms)

    _row_maps.lower_by_platform(_row_maps._linear_map_p, lambda _: of_backend)
    with tracing_for(request.param):
        yield request.param
    _row_maps.lower_by_platform(_row_maps._linear_map_p, lambda _: _row_maps._apply)


@pytest.mark.compiled_quickly  # a CPU's optimisations say nothing about another backend
@pytest.mark.parametrize("backend", ["cuda", "tpu"], indirect=True)  # cpu: test_accuracy.py
def test_every_goal_of_accuracy_holds(backend, monkeypatch):
    monkeypatch.setattr(accuracy, "QUICK_SIZES", (2, 10, 257))
    # The peers have no forms: softjax takes their places, which compiles nothing more.
    quantities = [q._replace(functions=2 * q.functions[:1]) for q in accuracy._QUANTITIES]
    monkeypatch.setattr(accuracy, "_QUANTITIES", quantities)
    rows = accuracy.measure(quick=True)
    assert {row.dtype for row in rows} == {"float32", "bfloat16", "float16"}
    assert [row for row in rows if not row.ok] == []


@pytest.mark.compiled_quickly
@pytest.mark.parametrize("classes", [3, LONG])
def test_edges(backend, classes):
    inf, nan = np.inf, np.nan
    x = np.full((5, classes), -inf, np.float32)
    x[:, :3] = [[-inf, -inf, -inf], [inf, 0, inf], [nan, 0, 1], [nan, inf, 0], [0, -inf, 1]]
    if classes == LONG and backend != "cpu":
        # Run on a CPU, the maximum of such a row would lose NaN, which a GPU and a TPU keep.
        x[3, 1] = 0
    v = np.ones_like(x)
    v[:, 0] = 2

    @jax.jit
    def results(x, v):
        slope = jax.grad(lambda x: jnp.sum(softjax.log_softmax(x)[:, 2]))(x)
        losses = softjax.cross_entropy(x, jnp.zeros(5, jnp.int32))
        values = softjax.logsumexp(x, -1), softjax.softmax(x), losses
        return *values, slope, derivatives.logsumexp_hvp(x, v)

    y, p, losses, slope, product = map(np.asarray, results(x, v))
    np.testing.assert_allclose(y, [-inf, inf, nan, nan, np.log1p(np.e)], rtol=1e-6)
    assert not p[0].any()
    assert np.isnan(p[1:4]).all()
    assert p[4, 1] == 0
    np.testing.assert_allclose(losses, [0, nan, nan, nan, np.log1p(np.e)], rtol=1e-6)
    assert not slope[0].any()
    assert np.isnan(slope[1:4]).all()
    assert not product[0].any()
    assert np.isnan(product[1:4]).all()


@pytest.mark.compiled_quickly
@pytest.mark.parametrize("classes", [12, LONG])
def test_tangents_count_on_no_offset(backend, classes):
    """H v and (I - 1 p^T) v, and the transposes: 1e6 in every entry of v changes no digit."""
    rng = np.random.default_rng(0)
    x = (4 * rng.standard_normal((8, classes))).astype(np.float32)
    x[:4, 3] = x[:4].max(-1) + np.array([2, 5, 12, 17], np.float32)
    v = rng.integers(-8, 8, x.shape).astype(np.float32)
    p, w = oracles.softmax(x.astype(np.float64)), v.astype(np.float64)
    centred = w - np.sum(p * w, -1, keepdims=True)
    top = np.argmax(x, -1)[:, None]
    at_top = np.take_along_axis(w, top, -1)
    # The mean less that of the top entry, which has all of p but a small part: no cancellation.
    np.put_along_axis(centred, top, -np.sum(p * (w - at_top), -1, keepdims=True), -1)

    @jax.jit
    def products(x, v):
        _, forward = jax.jvp(softjax.softmax, (x,), (v,))
        (backward,) = jax.vjp(softjax.softmax, x)[1](v)
        _, of_logarithm = jax.jvp(softjax.log_softmax, (x,), (v,))
        return forward, backward, of_logarithm, derivatives.logsumexp_hvp(x, v)

    for offset in (0, 1e6):
        forward, backward, of_logarithm, product = products(x, v + np.float32(offset))
        np.testing.assert_allclose(forward, p * centred, rtol=2e-5, atol=1e-12)
        np.testing.assert_allclose(product, p * centred, rtol=2e-5, atol=1e-12)
        np.testing.assert_allclose(backward, p * centred, rtol=2e-5, atol=1e-12)
        np.testing.assert_allclose(of_logarithm, centred, rtol=2e-5, atol=1e-7)


@pytest.mark.compiled_quickly
@pytest.mark.parametrize("classes", [12, LONG])
def test_the_transpose_of_log_softmax(backend, classes):
    rng = np.random.default_rng(1)
    x = (4 * rng.standard_normal((8, classes))).astype(np.float32)
    x[:4, 3] = x[:4].max(-1) + np.array([2, 5, 12, 17], np.float32)
    u = rng.standard_normal(x.shape).astype(np.float32)
    p = oracles.softmax(x.astype(np.float64))
    expected = u - p * np.sum(u.astype(np.float64), -1, keepdims=True)
    result = jax.jit(lambda x, u: jax.vjp(softjax.log_softmax, x)[1](u)[0])(x, u)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-6)
    # Of the log-probability of a sure class: -(1 - p), which p - 1 would not have a digit of.
    sure = np.array([[20, 0, 0]], np.float32)
    slope = jax.jit(jax.grad(lambda x: softjax.log_softmax(x)[0, 0]))(sure)
    np.testing.assert_allclose(slope, [[4.1223072e-9, -2.0611537e-9, -2.0611537e-9]], rtol=1e-6)


ROWS = {
    "softmax": softjax.softmax,
    "log_softmax": softjax.log_softmax,
    "softmin": softjax.softmin,
    "softmax, T": lambda x: softjax.softmax(x, temperature=0.5),
    "softmax, where": lambda x: softjax.softmax(x, where=jnp.ones(x.shape, bool)),
    "logsumexp": lambda x: softjax.logsumexp(x, -1),
    "logsumexp, b": lambda x: softjax.logsumexp(x, -1, b=2.0),
    "logmeanexp": lambda x: softjax.logmeanexp(x, -1),
    "smooth_max": lambda x: softjax.smooth_max(x, -1, temperature=0.5),
    "smooth_min": lambda x: softjax.smooth_min(x, -1, temperature=0.5),
    "loss": lambda x: softjax.cross_entropy(x, jnp.zeros(len(x), jnp.int32)),
    "loss of a distribution": lambda x: softjax.cross_entropy(x, jnp.full(x.shape, 0.25)),
    "gradient of logsumexp": jax.grad(lambda x: jnp.sum(softjax.logsumexp(x, -1))),
    "gradient of the loss": jax.grad(
        lambda x: jnp.sum(softjax.cross_entropy(x, jnp.zeros(len(x), jnp.int32)))
    ),
    "gradient of softmax": jax.grad(lambda x: jnp.sum(softjax.softmax(x)[:, 0] ** 2)),
    "closed gradient": lambda x: derivatives.cross_entropy_gradient(
        x, jnp.zeros(len(x), jnp.int32)
    ),
    "hvp": lambda x: derivatives.logsumexp_hvp(x, jnp.ones_like(x).at[:, 0].set(2)),
    "entropy": information.entropy,
    "information.cross_entropy": lambda x: information.cross_entropy(x, jnp.zeros_like(x)),
    "kl_divergence": lambda x: information.kl_divergence(x, jnp.zeros_like(x)),
    "reverse kl_divergence": lambda x: information.kl_divergence(jnp.zeros_like(x), x),
    "bradley_terry": lambda x: choice.bradley_terry_probability(x[:, 0], x[:, 1]),
    "predict_proba": lambda x: regression.predict_proba(
        regression.SoftmaxRegression(jnp.eye(4), jnp.zeros(4)), x
    ),
}


# Those to which +inf is a number like others.
WITHOUT_INFINITY = {
    *("logsumexp", "logsumexp, b", "logmeanexp", "smooth_max", "smooth_min", "softmin"),
    *("reverse kl_divergence", "bradley_terry"),
}


quickly = pytest.mark.compiled_quickly


@pytest.mark.parametrize(
    ("rows", "by_row"),
    [
        pytest.param(4095, False, marks=quickly),
        pytest.param(4095, True, marks=quickly),
        pytest.param(4096, True, marks=quickly),
        (4096, False),
    ],
)
def test_nan_is_nan_beside_any_number_of_rows(rows, by_row):
    """From 4,096 rows on XLA:CPU computes minima and maxima that lose NaN, with any optimisations.

    All functions are one program, each of an argument of its own: what they compute is not shared.
    """
    x = np.zeros((rows, 4), np.float32)
    x[1, 0], x[2, 1] = np.nan, np.inf

    def value(name, x):
        f = ROWS[name]
        return jax.vmap(lambda row: f(row[None])[0])(x) if by_row else f(x)

    program = jax.jit(lambda arguments: {name: value(name, x) for name, x in arguments.items()})
    for name, y in program(dict.fromkeys(ROWS, x)).items():
        y = np.asarray(y).reshape(rows, -1)
        assert np.isnan(y[1]).any(), name
        assert name in WITHOUT_INFINITY or np.isnan(y[2]).any(), name
        assert np.isfinite(y[0]).all(), name


@pytest.mark.compiled_quickly
def test_a_tpu_needs_no_eigenvectors_of_large_matrices(monkeypatch):
    """Its form, here for any width: as few steps to the optimum, and no eigenvectors in them."""
    monkeypatch.setattr(_preconditioner, "LARGEST_EIGH_OF_TPU", 0)
    jax.clear_caches()
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, 8)) @ rng.standard_normal((8, 8))).astype("f4")
    y = np.argmax(x[:, :3] + rng.gumbel(size=(200, 3)), 1)

    def fit(x, y):
        return regression.fit(x, y, num_classes=3, l2=0.1, solver="newton-cg")

    with tracing_for("tpu"):
        lowered = jax.jit(fit).lower(x, y)
    assert "eigh" not in lowered.as_text().lower()
    result = lowered.compile()(x, y)
    assert result.stop_reason == "converged"
    assert result.steps <= 8
    jax.clear_caches()


LOSSES = {
    "logsumexp": lambda x: jnp.sum(softjax.logsumexp(x, -1)),
    "cross_entropy": lambda x: jnp.sum(softjax.cross_entropy(x, jnp.zeros(len(x), jnp.int32))),
}


@pytest.mark.x64_once
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_each_exponential_is_computed_once(loss):
    x = jnp.ones((64, 100))
    results = {
        "value and gradient": jax.value_and_grad(loss),
        "Hessian times a vector": lambda v: jax.jvp(jax.grad(loss), (v,), (v,))[1],
    }
    for name, function in results.items():
        program = jax.jit(function).lower(x).compile().as_text()
        sizes = re.findall(r"f32\[64,(\d+)\]\S* exponential\(", program)
        assert sum(int(size) for size in sizes if size != "1") == 100, name

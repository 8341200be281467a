"""Small data of many sizes share a program: rows of weight 0 change no fit and no statistic."""

import jax
import numpy as np
import pytest
from scipy.special import softmax
from sparse_rows import sparse_rows

from softjax import regression
from softjax.regression import _frame, _solve

pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.x64_once(True),
    pytest.mark.usefixtures("compiled_fits"),
]
N, D, K = 90, 4, 3
FEWEST_ROWS = _frame.FEWEST_ROWS  # of users; in the tests it is smaller


def drawn(examples=N):
    rng = np.random.default_rng(examples)
    x = rng.normal(size=(examples, D)) + np.array([0.0, 1.0, -3.0, 1e3])
    return x, np.argmax((x - x.mean(0))[:, :K] + rng.gumbel(size=(examples, K)), 1)


def test_data_of_ten_sizes_are_fitted_by_one_program(monkeypatch):
    monkeypatch.setattr(_frame, "FEWEST_ROWS", FEWEST_ROWS)
    programs = _solve.quickly_compiled()._cache_size()
    for examples in (20, 41, 100, 237, 500, 777, 1000, 1320, 1999, 2048):
        x, labels = drawn(examples)
        weights = None if examples % 2 else np.arange(examples) % 3
        result = regression.fit(x, labels, l2=0.1, sample_weights=weights)
        assert result.converged
        kernel, bias = map(np.asarray, result.params)
        shares = np.ones(examples) if weights is None else weights
        residual = softmax(x @ kernel + bias, 1) - np.eye(K)[labels]
        g = x.T @ (shares[:, None] / shares.sum() * residual) + 0.1 * kernel
        assert np.abs(g / np.sqrt((x**2).mean(0))[:, None]).max() < 1e-5
    assert _solve.quickly_compiled()._cache_size() == programs + 1


CASES = {
    "plain": {"l2": 0.1},
    "unpenalised": {},
    "weights and offset": {
        "l2": 0.1,
        "sample_weights": np.arange(N) % 4 / 7,
        "class_weights": np.array([1e-3, 1.0, 5.0]),
        "offset": np.linspace(-1, 1, N * K).reshape(N, K),
    },
    "corners": {"l1": 0.05, "l2": 0.01},
    "firth": {"solver": "firth", "sample_weights": 1 + np.arange(N) % 2},
}


@pytest.mark.parametrize("case", CASES)
def test_the_fit_is_that_of_the_rows_alone(case, monkeypatch):
    x, labels = drawn()
    kinds = [(x, labels)]
    if case == "plain":
        counts = np.eye(K)[labels] * (1 + np.arange(N) % 3)[:, None]
        kinds += [(x, counts), (sparse_rows(np.where(x > 0, x, 0)), labels)]
    for features, y in kinds:
        padded = regression.fit(features, y, tol=1e-7, **CASES[case])
        with monkeypatch.context() as patch:
            patch.setattr(_frame, "LARGEST", 0)
            alone = regression.fit(features, y, tol=1e-7, **CASES[case])
        assert padded.converged
        assert padded.stop_reason == alone.stop_reason
        # Of a step more or less where a rounding decides.
        assert abs(padded.steps - alone.steps) <= 2
        for leaf, expected in zip(padded.params, alone.params, strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(padded.objective, alone.objective, rtol=1e-8)


def test_targets_are_those_of_the_rows_alone_to_the_last_bit():
    x, labels = drawn()
    weights = np.arange(N) % 5 / 3.0
    data = regression._arguments.checked_data(x, labels, K, weights, None)
    alone = data.problem()
    padded = _frame.in_bucket(data).problem()
    rows, width = padded.features.shape
    assert rows & (rows - 1) == 0
    assert rows > N
    assert width == D
    np.testing.assert_array_equal(padded.targets[:, :N], alone.targets)
    assert not np.asarray(padded.targets[:, N:]).any()
    assert padded.count == alone.count
    extremes = [np.asarray(f(padded.features, axis=0)) for f in (np.min, np.max)]
    np.testing.assert_array_equal(extremes, [x.min(0), x.max(0)])


def test_separation_is_seen_in_the_rows_alone():
    x, labels = drawn()
    apart = np.eye(D)[labels]
    assert regression.fit(apart, labels).stop_reason == "separated"
    partly = np.column_stack([x[:, :3], (labels == 0) & (np.arange(N) % 5 == 0)])
    assert regression.fit(partly, labels).stop_reason == "quasi-separated"


def test_what_stays_as_it_is():
    x, labels = drawn(20)
    few = np.tile(x, 20)  # fewer rows than half of the columns
    data = regression._arguments.checked_data(few, labels, K, None, None)
    assert _frame.in_bucket(data).features.shape in {few.shape, (32, few.shape[1])}
    large = np.zeros((2**18, D)) + np.arange(D)
    data = regression._arguments.checked_data(large, np.arange(2**18) % K, K, None, None)
    assert _frame.in_bucket(data) is data
    leaves = jax.tree.leaves(_frame.in_bucket(data))
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(data), strict=True))

"""Separated data are told from others: completely, quasi-completely, and by no mistake."""

import jax
import numpy as np
import pytest

from softjax import regression

N = 24


def two_classes():
    """Features [N, 2] of every kind, for the labels 0, 1, 0, 1, ..."""
    rng = np.random.default_rng(0)
    y = np.arange(N) % 2
    side, noise = 2 * y - 1, rng.normal(size=N)
    level = np.where(np.arange(N) < 10, 0, side)  # the first ten cannot be told apart
    rare = 1.0 * (y * (np.arange(N) < 4))
    outlier = np.where(np.arange(N) == 1, 1e3, noise)
    other_way_round = np.where(np.arange(N) < 2, -1e-3, 1) * side
    more = rng.normal(size=N)
    return y, {
        "complete": (np.stack([side * (1 + noise**2), more], 1), regression.SEPARATED),
        "a boundary": (np.stack([level, more], 1), regression.QUASI_SEPARATED),
        "a boundary at 2000": (np.stack([2000 + level, more], 1), regression.QUASI_SEPARATED),
        "a boundary, collinear": (np.stack([level, 3 * level], 1), regression.QUASI_SEPARATED),
        "a rare level": (np.stack([rare, more], 1), regression.QUASI_SEPARATED),
        "overlap": (np.stack([noise, more], 1), regression.CONVERGED),
        "overlap, collinear": (np.stack([noise, 3 * noise], 1), regression.CONVERGED),
        "almost collinear": (np.stack([noise, noise + 1e-7 * more], 1), regression.CONVERGED),
        "an outlier": (np.stack([outlier, more], 1), regression.CONVERGED),
        "a pair the other way round": (other_way_round[:, None] * [1, 3], regression.CONVERGED),
    }


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("name", two_classes()[1])
def test_two_classes(name):
    y, cases = two_classes()
    x, expected = cases[name]
    result = regression.fit(x, y)
    assert result.stop_reason == expected
    assert result.separated == (expected == regression.SEPARATED)
    assert all(np.isfinite(leaf).all() for leaf in result.params)
    if expected == regression.QUASI_SEPARATED:
        assert result.objective > 0.1


def three_classes():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(N, 2))
    y = np.arange(N) % 3
    last = np.stack([np.where(y == 2, rng.integers(0, 3, N), 0), noise[:, 0]], 1)
    return {
        "overlap": (noise, y, regression.CONVERGED),
        "without examples": (noise, np.arange(N) % 2, regression.QUASI_SEPARATED),
        "one ahead of two": (last, y, regression.QUASI_SEPARATED),
        "complete": (10 * np.eye(3)[y, :2] + noise / 4, y, regression.SEPARATED),
    }


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("name", three_classes())
def test_three_classes(name):
    x, y, expected = three_classes()[name]
    assert regression.fit(x, y, num_classes=3).stop_reason == expected
    assert regression.fit(x, y, num_classes=3, l2=0.01).converged


@pytest.mark.x64_once(True)
def test_under_jit_and_vmap():
    y, cases = two_classes()
    names = ("complete", "a boundary", "overlap")
    x, expected = zip(*map(cases.get, names), strict=True)
    fits = jax.jit(jax.vmap(lambda x: regression.fit(x, y, num_classes=2)))(np.stack(x))
    assert fits.stop_reason == list(expected)

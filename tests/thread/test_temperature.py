"""Q proportional to P^alpha, and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

import softjax
from softjax.information import entropy, temper

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def power(p, alpha):
    q = p**alpha
    return q / q.sum(-1, keepdims=True)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 2.0), (2.0, 0.5)])
def test_which_power_doubles_the_temperature_and_which_halves_it(alpha, temperature, dtype):
    energies = np.random.default_rng(0).normal(size=(10, 5)).astype(dtype)
    p = np.exp(-energies.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    tempered = np.exp(np.asarray(temper(-energies, alpha), np.float64))
    np.testing.assert_allclose(tempered, power(p, alpha), 1e-5)
    hotter = np.exp(-energies.astype(np.float64) / temperature)
    np.testing.assert_allclose(tempered, hotter / hotter.sum(-1, keepdims=True), 1e-5)
    np.testing.assert_allclose(softjax.softmin(energies, temperature=temperature), tempered, 1e-5)
    # A hotter distribution has more entropy.
    assert np.all((entropy(temper(-energies, alpha)) > entropy(-energies)) == (temperature > 1))


@pytest.mark.parametrize("ties", [1, 2, 3])
def test_what_if_the_temperature_tends_to_zero(ties, dtype):
    x = np.array([2.0] * ties + [1.0, 0.5], dtype)
    limit = np.array([1 / ties] * ties + [0, 0])
    previous = np.inf
    for alpha in (1.0, 10.0, 1000.0):
        q = np.exp(np.asarray(temper(x, alpha), np.float64))
        distance = np.abs(q - limit).max()
        assert distance < previous
        previous = distance
        np.testing.assert_allclose(q.sum(), 1, 1e-6)
    np.testing.assert_allclose(q, limit, 1e-6)
    np.testing.assert_allclose(softjax.softmax(x, temperature=1e-3), limit, 1e-6)
    np.testing.assert_allclose(entropy(temper(x, 1000.0)), np.log(ties), 1e-6, 1e-6)


def test_what_if_the_temperature_tends_to_infinity(dtype):
    x = np.array([2.0, 1.0, -3.0, -jnp.inf], dtype)
    limit = np.array([1 / 3, 1 / 3, 1 / 3, 0])
    previous = np.inf
    for alpha in (1.0, 0.1, 1e-3, 0.0):
        q = np.exp(np.asarray(temper(x, alpha), np.float64))
        distance = np.abs(q - limit).max()
        assert distance < previous
        previous = distance
        assert q[3] == 0
    np.testing.assert_allclose(q, limit, 1e-6)
    np.testing.assert_allclose(softjax.softmax(x, temperature=1e8), limit, 1e-6)
    np.testing.assert_allclose(entropy(temper(x, 0.0)), np.log(3), 1e-6)

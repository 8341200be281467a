"""The temperature: traced, differentiated, and the bounds of the smooth maximum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from functions import close, logits
from orders import check_two_orders

import softjax

# Where digits or equal bits are asserted, programs are compiled as users have them.
pytestmark = pytest.mark.compiled_quickly
compiled_fully = pytest.mark.compiled_quickly(False)


@pytest.mark.x64_once
def test_temperature_is_traced_and_differentiated(dtype):
    x = jnp.asarray(logits(dtype, 7))

    def entropy(temperature):
        p = oracles.softmax(x, temperature=float(temperature))
        return -np.sum(p * np.log(p))

    for t in (0.5, 1.0, 3.0):
        temperature = jnp.asarray(t, dtype)
        value, slope = jax.jit(jax.value_and_grad(lambda t: softjax.smooth_max(x, temperature=t)))(
            temperature
        )
        close(value, oracles.smooth_max(x, temperature=t), dtype)
        close(slope, entropy(t), dtype, ulps=40)  # T log sum - <p, x> / T: terms of some ten
        slope = jax.grad(lambda t: softjax.smooth_min(-x, temperature=t))(temperature)
        close(slope, -entropy(t), dtype, ulps=40)


@pytest.mark.x64_once(True)
def test_derivatives_with_respect_to_temperature():
    x, t = jnp.asarray(logits("float64", 7)), jnp.asarray(1.5)
    check_two_orders(lambda x, t: softjax.log_softmax(x, temperature=t), x, t)


@compiled_fully
@pytest.mark.x64_once
def test_smooth_max_is_within_its_bounds(dtype):
    rng = np.random.default_rng(6)
    for scale in (0.0, 0.01, 1.0, 30.0):
        x = logits(dtype, 50, 6, scale=scale)
        where = rng.random(x.shape) < 0.7
        where[:, 0] = True
        for temperature in (0.01, 1.0, 10.0):
            options: dict[str, Any] = {"axis": -1, "where": where, "temperature": temperature}
            lower, upper = softjax.smooth_max_bounds(x, **options)
            y = softjax.smooth_max(x, **options)
            slack = 4 * jnp.finfo(dtype).eps * (jnp.abs(lower) + temperature)
            assert jnp.all(y >= lower)
            assert jnp.all(y <= upper + slack)
            np.testing.assert_array_equal(lower, np.max(x, -1, where=where, initial=-np.inf))
            count = np.log(np.sum(where, -1))
            close(upper, np.asarray(lower, np.float64) + temperature * count, dtype)

"""Logits and tangents that the program computes itself, which a compiler fuses with the function.

XLA may compute a product and the difference that uses it with one rounding. The difference of an
entry from itself is then not 0, but the rounding error of the product.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax
from softjax import derivatives

ROWS = 24

PRODUCERS = {
    "product": lambda a: a * 1.37,
    "division by 3": lambda a: a / 3,
    "division by 0.3": lambda a: a / 0.3,
    "affine": lambda a: a * 1.37 + 0.21,
    "product with another use": lambda a: a * 1.37 + 1e-3 * jnp.sin(a * 1.37),
    "bfloat16": lambda a: a.astype(jnp.bfloat16).astype(a.dtype),
}


def cases(producer, classes, dtype):
    """Sources of logits and of directions [ROWS, K], and what the producer makes of them alone.

    One class is e^5 to e^80 above the others.
    """
    rng = np.random.default_rng(0)
    a = rng.standard_normal((ROWS, classes))
    a[np.arange(ROWS), rng.integers(classes, size=ROWS)] = a.max(-1) + np.linspace(5, 80, ROWS)
    u, s = rng.standard_normal((2, ROWS, classes))
    sources = [np.asarray(part, dtype) for part in (a, u, s)]
    return sources, [np.asarray(producer(jnp.asarray(part))) for part in sources]


def covariance(x, v, s):
    """H v and its derivative along s, with what the entries of both are sums of, in 200 bits.

        (H v)_i = p_i (w_i - <p, w>),    w = v - v_top

    and the derivative is p_i ((w_i - <p, w>) (z_i - <p, z>) - Cov(w, z)) with z = s - s_top. The
    entries of v and s are rounded once more or once less within a program, and so are w and z, but
    those of the top entry are exactly 0.
    """
    p = oracles.softmax(oracles.exact(x))
    top = np.argmax(x, -1)[:, None]

    def relative(v):
        v = oracles.exact(v)
        at_top = np.take_along_axis(v, top, -1)
        size = abs(v) + abs(at_top)
        np.put_along_axis(size, top, 0, -1)
        return v - at_top, size

    def mean(v):
        return (p * v).sum(-1, keepdims=True)

    (w, w_size), (z, z_size) = relative(v), relative(s)
    first = p * (w - mean(w))
    first_size = p * (w_size + mean(w_size))
    second = p * ((w - mean(w)) * (z - mean(z)) - (mean(w * z) - mean(w) * mean(z)))
    both = mean(w_size * z_size) + mean(w_size) * mean(z_size)
    second_size = p * ((w_size + mean(w_size)) * (z_size + mean(z_size)) + both)
    return [oracles.rounded(part) for part in (first, first_size, second, second_size)]


def worst(computed, expected, size, x, dtype):
    """The largest error in roundings of the size.

    An exponential is as accurate as its argument: to the rounding of its logit and of the maximum.
    """
    largest = np.abs(np.float64(x)).max(-1, keepdims=True)
    unit = np.finfo(dtype).eps * (8 + 2 * largest + np.sqrt(x.shape[-1]))
    allowed = unit * size + 8 * x.shape[-1] * np.finfo(dtype).tiny
    return np.max(np.abs(np.float64(computed) - expected) / allowed)


@pytest.mark.parametrize(
    ("name", "classes"), [*((name, 10) for name in PRODUCERS), ("product", 100)]
)
def test_a_dominated_row_keeps_its_digits(name, classes, dtype):
    """Every mode that multiplies by diag(p) - p p^T, of logits and directions in the program.

    The CPU has one form of the sums for short rows and one for long rows.
    """
    make = PRODUCERS[name]
    sources, (x, v, s) = cases(make, classes, dtype)
    labels = np.argmax(x, -1)

    def of_sum(function):
        return jax.grad(lambda x: jnp.sum(function(x)))

    gradients = {
        "softmax": softjax.softmax,
        "logsumexp": of_sum(lambda x: softjax.logsumexp(x, -1)),
        "loss": of_sum(lambda x: softjax.cross_entropy(x, labels)),
    }

    def products(a, u, s):
        x, v, s = make(a), make(u), make(s)
        results = {key: jax.jvp(f, (x,), (v,))[1] for key, f in gradients.items()}
        results["vjp"] = jax.vjp(softjax.softmax, x)[1](v)[0]
        results["vjp of vjp"] = jax.grad(lambda x: jnp.vdot(v, gradients["loss"](x)))(x)
        results["closed form"] = derivatives.logsumexp_hvp(x, v)
        results["log_softmax"] = softjax.softmax(x) * jax.jvp(softjax.log_softmax, (x,), (v,))[1]
        one_row = jax.vmap(lambda x, v: jax.jvp(softjax.softmax, (x,), (v,))[1])
        results["vmap"] = one_row(x, v)
        twice = jax.jvp(lambda x: jax.jvp(softjax.softmax, (x,), (v,))[1], (x,), (s,))[1]
        return results, twice

    expected, size, second, second_size = covariance(x, v, s)
    results, twice = jax.jit(products)(*sources)
    errors = {key: worst(result, expected, size, x, dtype) for key, result in results.items()}
    errors["jvp of jvp"] = worst(twice, second, second_size, x, dtype)
    assert {key: error for key, error in errors.items() if not error <= 1} == {}


@pytest.mark.x64_once
def test_factors_of_large_products():
    """A residue of 2e10's last place would be an exponent of 1000."""
    rng = np.random.default_rng(0)
    a = (1e10 * rng.standard_normal((ROWS, 5))).astype(np.float32)
    b = rng.uniform(0.5, 2, a.shape).astype(np.float32)
    slope = jax.jit(jax.grad(lambda a: jnp.sum(softjax.logsumexp(2.71 * a, 1, b))))(a)
    expected = np.where(a == a.max(-1, keepdims=True), np.float32(2.71), 0)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


@pytest.mark.x64_once
def test_a_class_tied_with_the_top_has_a_slope():
    """The value of the difference is 0 by choice there, but a Hessian needs its slope."""
    x = jnp.array([1.0, 1.0, 0.0])
    v = jnp.array([1.0, -1.0, 0.5])
    by_hand = oracles.exact(x)
    p, log_p = oracles.softmax(by_hand), oracles.log_softmax(by_hand)
    entropy = -(p * log_p).sum()
    excess = log_p + entropy
    # d/dt of -p (log p + H) along v, with p_dot = p (v - <p, v>) and log_p_dot = v - <p, v>.
    centred = oracles.exact(v) - (p * oracles.exact(v)).sum()
    slope = -(p * excess * oracles.exact(v)).sum()
    expected = oracles.rounded(-p * centred * excess - p * (centred + slope))
    hvp = jax.jvp(jax.grad(softjax.information.entropy), (x,), (v,))[1]
    np.testing.assert_allclose(hvp, expected, rtol=1e-5, atol=1e-7)

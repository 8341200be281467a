"""logsumexp with factors of any sign and size, against 200-bit arithmetic."""

import gmpy2
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.special

import softjax

# Where no digits are asserted.
quickly = pytest.mark.compiled_quickly

ROWS, TERMS = 50, 5  # rows of each kind


def rows(kind, dtype):
    """Exponents and factors [ROWS, TERMS] of one kind."""
    rng = np.random.default_rng(0)
    x, b = rng.normal(size=(2, ROWS, TERMS))
    limits = np.finfo(dtype)
    if kind == "signs":
        b = np.sign(b)
    if kind == "cancelling":
        b[:, -1] = -(b * np.exp(x))[:, :-1].sum(1) / np.exp(x[:, -1])
        b[:, -1] *= 1 + 10 ** rng.uniform(-5, -1, ROWS)
    if kind == "equal terms":
        x, b = np.zeros_like(x), rng.integers(-3, 4, b.shape)
    if kind == "large factors that cancel":
        b *= 1e30
        b[:, -1] = -(b * np.exp(x))[:, :-1].sum(1) / np.exp(x[:, -1]) * 1.001
    if kind == "factors of any size":
        size = rng.uniform(np.log(limits.tiny), np.log(limits.max), b.shape)
        x, b = x - size, np.copysign(np.exp(size), b)
    if kind == "subnormal factors":
        b *= limits.tiny / 100
    if kind == "far":
        x = 1e4 + 50 * x
    if kind == "zeros":
        b *= rng.random(b.shape) < 0.5
        x = np.where(b == 0, 200 + x, x)
        b[:, 0] = 1
    return x.astype(dtype), b.astype(dtype)


KINDS = (
    "normal",
    "signs",
    "cancelling",
    "equal terms",
    "large factors that cancel",
    "factors of any size",
    "subnormal factors",
    "far",
    "zeros",
)


def in_200_bits(function, *arrays):
    return np.float64(np.frompyfunc(function, len(arrays), 1)(*arrays))


def test_factors_of_any_sign_and_size(dtype):
    """The error is that of rounded inputs: sum |b e^x| (1 + |x|) / |sum b e^x| roundings."""
    x, b = (np.concatenate(parts) for parts in zip(*(rows(k, dtype) for k in KINDS), strict=True))
    unit = np.finfo(dtype).eps / 2
    wide, factors = oracles.exact(x), oracles.exact(b)
    expected, expected_sign = oracles.signed_logsumexp(wide, b)
    y, sign = softjax.logsumexp(x, 1, b, return_sign=True)
    np.testing.assert_array_equal(sign, expected_sign)
    np.testing.assert_array_equal(np.isneginf(y), expected_sign == 0)

    # Where the sum is exactly 0 there is nothing more to compare.
    kept = expected_sign != 0
    x, b, wide, factors, y, expected = (v[kept] for v in (x, b, wide, factors, y, expected))
    signs = expected_sign[kept][:, None]
    by_x = in_200_bits(lambda x, b, y: b * gmpy2.exp(x - y), wide, factors, expected[:, None])
    by_b = in_200_bits(lambda x, y: gmpy2.exp(x - y), wide, expected[:, None])
    condition = (np.abs(by_x) * (1 + np.abs(np.float64(x)))).sum(1)
    size = np.abs(np.float64(expected))
    assert (np.abs(np.float64(oracles.exact(y) - expected)) <= 8 * unit * (condition + size)).all()

    def total(x, b):
        return jnp.sum(softjax.logsumexp(x, 1, b, return_sign=True)[0])

    got_by_x, got_by_b = jax.jit(jax.grad(total, (0, 1)))(x, b)
    around = condition[:, None] + np.abs(x) + 1
    for got, want, bound in (
        (got_by_x, signs * by_x, around),
        (got_by_b, signs * by_b, around + size[:, None]),  # exp(x - y), with y rounded
    ):
        fits = np.abs(want) < np.finfo(dtype).max
        np.testing.assert_array_equal(~np.isfinite(got), ~fits)
        got, want = np.where(fits, got, 0), np.where(fits, want, 0)
        error, bound = np.abs(np.float64(got) - want), 12 * unit * bound * np.abs(want)
        assert (error <= bound + 2 * np.finfo(dtype).tiny).all()


@quickly
@pytest.mark.x64_once(True)
def test_factors_have_derivatives_of_higher_order():
    """The first and second ones against differences of the order below."""
    x, b = np.array([0.3, -0.2, 0.5]), np.array([-1.0, 0.6, 0.9])

    def y(v):
        return softjax.logsumexp(v[:3], b=v[3:], return_sign=True)[0]

    v = np.concatenate([x, b])
    gradient, hessian = jax.jit(jax.grad(y)), jax.jit(jax.hessian(y))
    steps = 1e-6 * np.eye(6)
    slopes = [(gradient(v + step) - gradient(v - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(hessian(v), slopes, rtol=1e-6, atol=1e-6)


@quickly
@pytest.mark.x64_once
@pytest.mark.parametrize("far", [88.0, 1e30])
def test_an_entry_of_factor_0_has_no_gradient(far, dtype):
    x, b = np.array([far, 0.0, 1.0], dtype), np.array([0.0, 1.0, 1.0], dtype)

    def y(x, b):
        return softjax.logsumexp(x, b=b)

    p = scipy.special.softmax([0.0, 1.0])
    by_x, by_b = map(np.asarray, jax.jit(jax.grad(y, (0, 1)))(x, b))
    np.testing.assert_allclose(by_x, [0, *p], rtol=1e-6)
    np.testing.assert_allclose(by_b[1:], p, rtol=1e-6)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(by_b[0], np.exp(far - y(x, b)), rtol=1e-4)  # infinite at last
    along = jax.jit(lambda x, b, b_dot: jax.jvp(lambda b: y(x, b), (b,), (b_dot,))[1])
    for i in (1, 2):
        np.testing.assert_allclose(along(x, b, np.eye(3, dtype=dtype)[i]), by_b[i], 1e-6)
    hessian = np.asarray(jax.jit(jax.hessian(y))(x, b))
    np.testing.assert_allclose(hessian[1:, 1:], np.diag(p) - np.outer(p, p), rtol=1e-5)
    np.testing.assert_array_equal(hessian[0], 0)
    np.testing.assert_array_equal(hessian[:, 0], 0)


@quickly
@pytest.mark.x64_once
def test_infinite_and_missing_terms(dtype):
    def pair(x, b):
        y, sign = softjax.logsumexp(np.array(x, dtype), b=np.array(b, dtype), return_sign=True)
        return float(y), float(sign)

    inf = np.inf
    assert pair([inf, inf, 0], [2, 3, -1]) == (inf, 1)
    assert pair([inf, 0], [-2, 1]) == (inf, -1)
    assert pair([0, 1], [-inf, 1]) == (inf, -1)
    assert pair([inf, 0], [0, 1]) == (0, 1)
    assert pair([-inf, -inf], [1, -1]) == (-inf, 0)
    assert pair([3, 4], [0, 0]) == (-inf, 0)
    assert pair([0, 0], [1, -1]) == (-inf, 0)
    for x, b in (([inf, inf], [1, -2]), ([np.nan, inf], [1, 1]), ([0, 1], [np.nan, 1])):
        assert np.isnan(pair(x, b)).all()
    for x, b in (([-inf, -inf], [1.0, -1]), ([3.0, 4], [0.0, 0]), ([-inf, 1], [1.0, 2])):
        x, b = np.array(x, dtype), np.array(b, dtype)
        gradient = jax.grad(lambda x, b: softjax.logsumexp(x, b=b))(x, b)
        np.testing.assert_array_equal(gradient, [0, float(np.isfinite(x[1]) and b[1] != 0)])


@quickly
@pytest.mark.x64_once
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_does_not_round_the_factors(half):
    wide = np.array([1, 2], np.float32)
    x = wide.astype(jnp.dtype(half))
    for b in (70000, 1e-9):
        got = softjax.logsumexp(x, b=b)
        assert got.dtype == half
        assert np.asarray(got) == np.asarray(softjax.logsumexp(wide, b=b)).astype(x.dtype)
    got = softjax.logsumexp(x, b=np.array([1e-30, 3e30], np.float32))
    assert got.dtype == half
    assert np.asarray(got) == np.asarray(np.log(3e30) + 2).astype(x.dtype)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 5.0])
def test_logmeanexp_to_a_few_units(spread, dtype):
    x = (np.random.default_rng(0).normal(size=(300, 3)) * spread).astype(dtype)
    want = oracles.logmeanexp(oracles.exact(x))
    gap = np.abs(np.float64(want - x.max(1)))
    errors = oracles.ulps(softjax.logmeanexp(x, 1), want, np.abs(np.float64(want)) + gap)
    assert errors.max() <= 5

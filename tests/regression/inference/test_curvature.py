"""The closed forms of the objective against float64 NumPy and against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree

from softjax import regression
from softjax.regression import _rows

pytestmark = pytest.mark.compiled_quickly

N, D, K = 40, 3, 4
L2 = 0.1


def problem(dtype, n=N, d=D, k=K, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(dtype)
    params = regression.SoftmaxRegression(
        jnp.asarray(scale * rng.normal(size=(d, k)), dtype), jnp.asarray(rng.normal(size=k), dtype)
    )
    return params, x, rng.integers(0, k, n), rng.uniform(size=n).astype(dtype)


def targets(labels, k=K):
    return np.eye(k)[labels] if np.ndim(labels) == 1 else np.asarray(labels, np.float64)


def oracle(params, x, labels, l2=0.0, sample_weights=None, class_weights=None):
    """The gradient [P] and the Hessian [P, P] in float64, one example after the other."""
    kernel, bias = (np.asarray(leaf, np.float64) for leaf in params)
    k = len(bias)
    y = targets(labels, k) * (1.0 if class_weights is None else np.float64(class_weights))
    w = np.ones(len(x)) if sample_weights is None else np.float64(sample_weights)
    w = w / (w.sum() or 1)
    x = np.concatenate([np.float64(x), np.ones((len(x), 1))], 1)
    z = x @ np.concatenate([kernel, bias[None]])
    g, h = np.zeros(x.shape[1] * k), np.zeros((x.shape[1] * k,) * 2)
    for x_i, y_i, z_i, w_i in zip(x, y, z, w, strict=True):
        g += w_i * np.kron(x_i, y_i.sum() * oracles.softmax(z_i) - y_i)
        h += w_i * y_i.sum() * np.kron(np.outer(x_i, x_i), oracles.hessian(z_i))
    penalised = np.arange(len(g)) < kernel.size
    return g + l2 * np.where(penalised, ravel(params), 0), h + l2 * np.diag(penalised)


def ravel(params):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in params])


def tolerance(dtype):
    # N terms below 10, each with a few roundings.
    return 50 * float(np.finfo(dtype).eps)


OPTIONS = {
    "plain": {},
    "class weights": {"class_weights": np.array([0.0, 1.0, 2.5, 0.5])},
    "all": {
        "l2": L2,
        "sample_weights": np.linspace(0, 2, N),
        "class_weights": np.array([1.0, 3.0, 0.0, 0.5]),
    },
}


def labels_of(kind, labels):
    if kind == "integer":
        return labels
    return np.random.default_rng(5).uniform(size=(N, K)).astype(np.float32) * 3  # of any mass


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("kind", ["integer", "soft"])
def test_gradient_hessian_and_product_are_those_of_numpy(kind, options, dtype):
    params, x, labels, _ = problem(dtype)
    labels = labels_of(kind, labels)
    given = {k: v if k == "l2" else v.astype(dtype) for k, v in options.items()}
    g, h = oracle(params, x, labels, **given)
    tol = tolerance(dtype)
    np.testing.assert_allclose(
        ravel(regression.gradient(params, x, labels, **given)), g, atol=tol, rtol=tol
    )
    ours = np.asarray(regression.hessian(params, x, labels, **given))
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, h, atol=tol, rtol=tol)
    np.testing.assert_array_equal(ours, ours.T)
    tangent = problem(dtype, seed=1)[0]
    product = regression.hvp(params, tangent, x, labels, **given)
    np.testing.assert_allclose(ravel(product), h @ ravel(tangent), atol=10 * tol, rtol=tol)


@pytest.mark.x64_once(True)
def test_gradient_and_hessian_are_those_of_autodiff():
    params, x, labels, _ = problem(np.float64)
    options = OPTIONS["all"]
    flat, unravel = ravel_pytree(params)

    def objective(flat):
        return regression.objective(unravel(flat), x, labels, **options)

    g, h = jax.grad(objective)(flat), jax.hessian(objective)(flat)
    ours = ravel_pytree(regression.gradient(params, x, labels, **options))[0]
    np.testing.assert_allclose(ours, g, atol=1e-14)
    np.testing.assert_allclose(
        regression.hessian(params, x, labels, **options), h, atol=1e-14, rtol=1e-12
    )


@pytest.mark.x64_once
@pytest.mark.parametrize(("k", "d"), [(1, 3), (2, 0), (3, 1), (8, 2)])
def test_information_of_any_number_of_classes_and_features(k, d, dtype):
    params, x, labels, weights = problem(dtype, 9, d, k)
    information = regression.fisher_information(params, x, sample_weights=weights)
    expected = oracle(params, x, labels, sample_weights=weights)[1] * np.float64(weights.sum())
    np.testing.assert_allclose(information, expected, atol=tolerance(dtype))
    np.testing.assert_array_equal(information, information.T)
    unweighted = oracle(params, x, labels)[1] * 9
    np.testing.assert_allclose(
        regression.fisher_information(params, x), unweighted, atol=tolerance(dtype)
    )


@pytest.mark.x64_once
@pytest.mark.parametrize("n", [0, 1, 7, 15])
def test_chunks_of_rows_are_exact(n, dtype, monkeypatch):
    monkeypatch.setattr(_rows, "CHUNK_SIZE", 1)
    monkeypatch.setattr(_rows, "CHUNK_ROWS", 7)
    params, x, labels, weights = problem(dtype, n)
    z = np.asarray(regression.logits(params, x))
    ours = _rows.information(jnp.asarray(x), jnp.asarray(z), jnp.asarray(weights))
    expected = oracle(params, x, labels, sample_weights=weights)[1] * np.float64(weights.sum())
    np.testing.assert_allclose(ours, expected, atol=tolerance(dtype))


@pytest.mark.x64_once
def test_the_memory_does_not_grow_with_the_rows():
    def temporary(n):
        params, x, _, weights = problem(np.float32, n, 20, 10)
        compiled = jax.jit(regression.fisher_information).lower(params, x, sample_weights=weights)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    params_size = 21 * 10
    grown = temporary(20_000) - temporary(10_000)
    # Logits, probabilities and features without their rows of weight 0, but no row times P.
    assert grown <= 10_000 * 4 * 100 < 10_000 * 4 * params_size


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_confident_rows_keep_the_curvature_positive(scale, dtype):
    """Where every p is 0 or 1 to the last digit, the Hessian is small, not lost."""
    params, x, labels, _ = problem(dtype, scale=scale)
    h = np.asarray(regression.hessian(params, x, labels), np.float64)
    expected = oracle(params, x, labels)[1]
    largest = np.linalg.eigvalsh(expected)[-1]
    assert np.linalg.eigvalsh(h)[0] >= -tolerance(dtype) * largest
    # exp costs |z| roundings; the logits themselves have as many.
    np.testing.assert_allclose(h, expected, atol=20 * scale * tolerance(dtype) * largest)


@pytest.mark.x64_once
def test_the_gauge_is_in_the_kernel_of_the_hessian(dtype):
    params, x, labels, _ = problem(dtype)
    shift = regression.SoftmaxRegression(jnp.ones((D, K), dtype), jnp.ones(K, dtype))
    h = np.asarray(regression.hessian(params, x, labels))
    np.testing.assert_allclose(h @ ravel(shift), 0, atol=tolerance(dtype))
    assert not np.any(ravel(regression.hvp(params, shift, x, labels)) > tolerance(dtype))


@pytest.mark.x64_once
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_hessian_exceeds_the_lipschitz_constant(options, dtype):
    given = {k: v if k == "l2" else v.astype(dtype) for k, v in options.items()}
    params, x, labels, _ = problem(dtype)
    bound = float(regression.lipschitz_constant(x, labels, K, **given))
    for scale in (0.0, 0.1, 1.0):
        params = problem(dtype, scale=scale, seed=int(10 * scale))[0]
        h = oracle(params, x, labels, **given)[1]
        assert np.linalg.eigvalsh(h)[-1] <= bound * (1 + tolerance(dtype))


@pytest.mark.x64_once
def test_the_lipschitz_constant_is_reached_by_two_equal_classes(dtype):
    params, x, labels, weights = problem(dtype, k=2, scale=0.0)
    params = params._replace(bias=jnp.zeros_like(params.bias))
    soft = np.eye(2)[labels] * 0.75
    given = {"l2": 0.5, "sample_weights": weights}
    bound = float(regression.lipschitz_constant(x, soft.astype(dtype), 2, **given))
    largest = np.linalg.eigvalsh(oracle(params, x, soft, **given)[1])[-1]
    assert bound == pytest.approx(largest, rel=tolerance(dtype))


@pytest.mark.x64_once
def test_one_class_has_no_curvature_but_the_penalty(dtype):
    params, x, _, _ = problem(dtype, k=1)
    labels = np.zeros(N, int)
    assert not np.any(ravel(regression.gradient(params, x, labels)))
    expected = np.diag([L2] * D + [0.0])
    np.testing.assert_allclose(regression.hessian(params, x, labels, l2=L2), expected, rtol=1e-6)
    assert float(regression.lipschitz_constant(x, labels, 1, l2=L2)) == pytest.approx(L2)


@pytest.mark.x64_once
def test_a_row_of_weight_zero_takes_no_part(dtype):
    params, x, labels, weights = problem(dtype)
    weights[3] = 0
    spoiled = x.copy()
    spoiled[3] = [np.nan, np.inf, 1e30]
    for function in (regression.gradient, regression.hessian):
        clean = function(params, x, labels, sample_weights=weights)
        np.testing.assert_array_equal(
            ravel_pytree(function(params, spoiled, labels, sample_weights=weights))[0],
            ravel_pytree(clean)[0],
        )
    nothing = regression.gradient(params, x, labels, l2=L2, sample_weights=0 * weights)
    np.testing.assert_allclose(nothing.kernel, L2 * np.asarray(params.kernel), rtol=1e-6)


@pytest.mark.x64_once
def test_a_bad_label_is_refused_or_under_a_trace_gives_nan(dtype):
    params, x, labels, weights = problem(dtype)
    labels[5] = K
    with pytest.raises(ValueError, match=r"regression\.hessian: `labels` .* got 4 at \(5,\)"):
        regression.hessian(params, x, labels)
    for function in (regression.gradient, regression.hessian):
        assert np.isnan(ravel_pytree(jax.jit(function)(params, x, labels))[0]).any()
    weights[5] = 0
    traced = jax.jit(regression.hessian)(params, x, labels, sample_weights=weights)
    assert np.isfinite(traced).all()


@pytest.mark.x64_once
def test_half_precision_is_computed_in_float32():
    params, x, labels, _ = problem(np.float32)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    g, h = oracle(half, x, labels, l2=0.5)
    ours = regression.gradient(half, x, labels, l2=0.5)
    assert ours.kernel.dtype == ours.bias.dtype == jnp.bfloat16
    np.testing.assert_allclose(ravel(ours), g, rtol=2**-8, atol=1e-6)  # rounded once
    hessian = regression.hessian(half, x, labels, l2=0.5)
    assert hessian.dtype == np.float32
    np.testing.assert_allclose(hessian, h, atol=tolerance(np.float32))


@pytest.mark.x64_once
def test_the_closed_forms_transform(dtype):
    params, x, labels, weights = problem(dtype)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def h(params):
        return regression.hessian(params, x, labels, sample_weights=weights)

    batched = jax.vmap(h)(many)
    twice = jax.tree.map(lambda leaf: 2 * leaf, params)
    np.testing.assert_allclose(batched[1], h(twice), atol=tolerance(dtype))
    # The derivative of the gradient along a tangent is the product.
    tangent = problem(dtype, seed=1)[0]
    product = jax.jvp(lambda p: regression.gradient(p, x, labels), (params,), (tangent,))[1]
    ours = regression.hvp(params, tangent, x, labels)
    np.testing.assert_allclose(ravel(ours), ravel(product), atol=tolerance(dtype))


@pytest.mark.x64_once
def test_bad_arguments_are_named():
    params, x, labels, _ = problem(np.float32)
    with pytest.raises(ValueError, match=r"regression\.gradient: `features` must be of shape"):
        regression.gradient(params, x[:, :2], labels)
    with pytest.raises(ValueError, match="`labels` must be of shape"):
        regression.hessian(params, x, labels[:-1])
    with pytest.raises(ValueError, match="`sample_weights` must be >= 0"):
        regression.hessian(params, x, labels, sample_weights=-np.ones(N))
    with pytest.raises(ValueError, match="`class_weights` must be of shape"):
        regression.hessian(params, x, labels, class_weights=np.ones(K + 1))
    with pytest.raises(ValueError, match=r"`tangent\.kernel` must be of shape"):
        regression.hvp(params, params._replace(kernel=jnp.ones(3)), x, labels)
    with pytest.raises(TypeError, match="`labels` must be class indices"):
        regression.lipschitz_constant(x, labels + 0j, K)

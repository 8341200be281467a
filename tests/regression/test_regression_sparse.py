"""Sparse features: all functions of a fitted model take the same features as a fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental.sparse import BCOO, BCSR, CSR
from sparse_rows import sparse_rows

from softjax import regression

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.usefixtures("compiled_fits")]

N, D, K = 40, 4, 3


def data():
    rng = np.random.default_rng(0)
    x = np.where(rng.random((N, D)) < 0.6, rng.normal(size=(N, D)), 0)
    return x, (x[:, :K] + rng.gumbel(size=(N, K))).argmax(1), 1.0 * (np.arange(N) % 5 > 0)


def formats(x):
    """The same matrix, also with entries that are stored in two parts and with padding."""
    rows = sparse_rows(x)
    halves = jnp.concatenate([rows.data / 2, rows.data / 2])
    return {
        "BCOO": rows,
        "BCSR": BCSR.fromdense(jnp.asarray(x)),
        "in two parts": BCOO((halves, jnp.tile(rows.indices, (2, 1))), shape=x.shape),
        "padded": sparse_rows(x, nse=x.size),
    }


inference = regression.inference
x, y, w = data()
params = regression.SoftmaxRegression(
    *(np.random.default_rng(1).normal(size=shape).astype("f4") for shape in ((D, K), (K,)))
)


@functools.cache
def fitted():
    return regression.fit(x, y, l2=0.1, solver="newton", tol=1e-5).params


@functools.cache
def covariance():
    return inference.covariance(fitted(), x, y, l2=0.1)


FUNCTIONS = {
    "logits": lambda x: regression.logits(params, x),
    "predict": lambda x: regression.predict(params, x),
    "predict_proba": lambda x: regression.predict_proba(params, x),
    "predict_log_proba": lambda x: regression.predict_log_proba(params, x),
    "predict_proba under jit": lambda x: jax.jit(regression.predict_proba)(params, x),
    "objective": lambda x: regression.objective(params, x, y, l2=0.1, sample_weights=w),
    "gradient": lambda x: regression.gradient(params, x, y, l2=0.1, sample_weights=w),
    "hvp": lambda x: regression.hvp(params, params, x, y, l2=0.1, sample_weights=w),
    "hessian": lambda x: regression.hessian(params, x, y, l2=0.1, sample_weights=w),
    "fisher_information": lambda x: regression.fisher_information(params, x, sample_weights=w),
    "lipschitz_constant": lambda x: regression.lipschitz_constant(x, y, K),
    "leave_one_out": lambda x: regression.leave_one_out(fitted(), x, y, l2=0.1),
    "covariance": lambda x: inference.covariance(fitted(), x, y, l2=0.1, robust=True),
    "predictions": lambda x: inference.predictions(fitted(), covariance(), x),
    "marginal": lambda x: inference.average_marginal_effects(fitted(), covariance(), x),
    "log_likelihood": lambda x: inference.log_likelihood(params, x, y, sample_weights=w),
    "goodness_of_fit": lambda x: inference.goodness_of_fit(params, x, y, sample_weights=w),
    "validation": lambda z: regression.fit(x, y, max_steps=1, validation=(z, y)).history[-1][
        "validation_loss"
    ],
}


@pytest.mark.x64_once
@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_sparse_features_every_function_is_what_it_is_of_dense_ones(name):
    expected = FUNCTIONS[name](x)
    kinds = formats(x)
    for kind in kinds if name in ("logits", "gradient") else ["BCSR"]:
        results = FUNCTIONS[name](kinds[kind]), expected
        for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-5, err_msg=kind)


@pytest.mark.x64_once
@pytest.mark.parametrize("many", [False, True])
def test_every_kind_of_fit_takes_every_format(many):
    kinds, penalties = formats(x), (0.1, 1.0) if many else (0.1,)
    expected = [regression.fit(x, y, l2=l2).params for l2 in penalties]
    for kind in ("BCSR",) if many else ("BCSR", "in two parts"):
        if many:
            fits = regression.fit_many(kinds[kind], y, l2=np.array(penalties)).params
        else:
            fits = jax.tree.map(lambda a: a[None], regression.fit(kinds[kind], y, l2=0.1).params)
        for lane, theirs in enumerate(expected):
            np.testing.assert_allclose(fits.kernel[lane], theirs.kernel, atol=2e-3)
            np.testing.assert_allclose(fits.bias[lane], theirs.bias, atol=2e-3)


@pytest.mark.x64_once
def test_other_formats_are_refused_by_the_name_of_the_argument():
    others = [
        CSR.fromdense(jnp.asarray(x)),
        BCOO.fromdense(jnp.asarray(x), n_batch=1),
        BCOO.fromdense(jnp.asarray(x), n_dense=1),
    ]
    for rows in others:
        for function in (lambda x: regression.fit(x, y), FUNCTIONS["predict"]):
            with pytest.raises((TypeError, ValueError), match="`features` must be BCOO or BCSR"):
                function(rows)
    for solver in ("newton", "firth"):
        with pytest.raises(ValueError, match="`features` must be dense for the solver"):
            regression.fit(formats(x)["BCSR"], y, solver=solver)
    with pytest.raises(ValueError, match=r"`features` must be of columns .* in column 1"):
        regression.fit(formats(x * [1, 1e25, 1, 1])["BCOO"], y)


@pytest.mark.x64_once
def test_matrices_of_scipy_are_refused_with_what_converts_them():
    rows = scipy.sparse.csr_array(x)
    with pytest.raises(TypeError, match=r"`features` must be .*BCSR.from_scipy_sparse"):
        regression.fit(rows, y)
    converted = BCSR.from_scipy_sparse(rows)
    assert regression.fit(converted, y, l2=0.1).converged

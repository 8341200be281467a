"""Arrays on Explicit mesh axes: functions accept them, and the results are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of, put

import softjax
from softjax import choice, derivatives, information, regression
from softjax.regression import inference

pytestmark = [pytest.mark.x64_once, pytest.mark.compiled_quickly]

N, D, K = 16, 3, 4
RNG = np.random.default_rng(0)
X, T = RNG.standard_normal((2, N, K)).astype(np.float32)
Q = np.exp(T) / np.exp(T).sum(1, keepdims=True)
RANKING = np.argsort(T, 1).astype(np.int32)
FEATURES = RNG.standard_normal((N, D)).astype(np.float32)
LABELS = (np.arange(N) % K).astype(np.int32)


def of_logits(x, t, q, ranking, labels):
    """The functions of logits [N, K], of one array of them or of two."""
    one = {
        **{f.__name__: f(x, axis=-1) for f in NORMALIZERS},
        **{f.__name__: f(x) for f in (information.entropy, information.perplexity)},
        **{f.__name__: f(x) for f in MATRICES},
        "surprisal": information.surprisal(x, labels),
        "loss": softjax.cross_entropy(x, labels),
        "gradient of the loss": derivatives.cross_entropy_gradient(x, labels),
        "temper": information.temper(x, 0.5),
    }
    two = {
        **{f.__name__: f(x, t) for f in PRODUCTS},
        "kl": information.kl_divergence(x, t),
        "cross_entropy": information.cross_entropy(x, t),
        "loss of a distribution": softjax.cross_entropy(x, q),
        "its gradient": derivatives.cross_entropy_gradient(x, q),
        "its hessian": derivatives.cross_entropy_hessian(x, q),
        "its hvp": derivatives.cross_entropy_hvp(x, q, t),
        "rankings": choice.plackett_luce_loss(x, ranking),
    }
    return one, two


NORMALIZERS = (
    softjax.softmax,
    softjax.log_softmax,
    softjax.softmin,
    softjax.logsumexp,
    softjax.logmeanexp,
    softjax.smooth_max,
    softjax.smooth_min,
)
MATRICES = (
    derivatives.logsumexp_hessian,
    derivatives.logsumexp_hessian_pinv,
    derivatives.logsumexp_hessian_sqrt,
)
PRODUCTS = (
    derivatives.logsumexp_hvp,
    derivatives.softmax_jvp,
    derivatives.softmax_vjp,
    derivatives.log_partition_cumulants,
)


def of_examples(features, labels, params):
    """The derivatives and statistics of a softmax regression."""
    options = {"l2": 0.5}
    covariance = inference.covariance(params, features, labels, **options)
    return {
        "objective": regression.objective(params, features, labels, **options),
        "gradient": regression.gradient(params, features, labels, **options),
        "hessian": regression.hessian(params, features, labels, **options),
        "hvp": regression.hvp(params, params, features, labels, **options),
        "fisher": regression.fisher_information(params, features),
        "lipschitz": regression.lipschitz_constant(features, labels, K, **options),
        "leave_one_out": regression.leave_one_out(params, features, labels, **options),
        "log_likelihood": inference.log_likelihood(params, features, labels),
        "influence": inference.influence(params, features, labels, **options),
        "coefficients": inference.coefficients(params, covariance),
        "predictions": inference.predictions(params, covariance, features),
        "effects": inference.average_marginal_effects(params, covariance, features),
        "elasticities": inference.average_elasticities(params, covariance, features),
        "goodness": inference.goodness_of_fit(params, features, labels),
    }


def placed(a, *spec):
    return put(mesh_of("explicit", d=2), a, *spec)


def assert_equal(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


ROWS, CLASSES = ("d", None), (None, "d")


@pytest.mark.parametrize(
    ("spec", "others"), [(ROWS, CLASSES), (CLASSES, ROWS), ((), ROWS)], ids=str
)
def test_logits(spec, others):
    """The logits are sharded in another way than the second array, the rankings and the labels."""
    expected = jax.jit(of_logits)(X, T, Q, RANKING, LABELS)
    x, t, q = placed(X, *spec), placed(T, *others), placed(Q, *others)
    got = jax.jit(of_logits)(x, t, q, placed(RANKING, *others), placed(LABELS, others[0]))
    assert_equal(got, expected)


@pytest.mark.parametrize(("spec", "others"), [(ROWS, ()), ((), ROWS), (ROWS, CLASSES)], ids=str)
def test_gradients_have_the_sharding_of_their_argument(spec, others):
    def total(x, t, labels, where):
        results = softjax.cross_entropy(x, labels, where=where), softjax.softmax(x, where=where)
        results += derivatives.logsumexp_hvp(x, t), information.kl_divergence(x, t)
        results += (softjax.cross_entropy(t, softjax.softmax(x)), information.surprisal(x, labels))
        return sum(jnp.sum(jnp.sin(result)) for result in results)

    where = LABELS[:, None] >= np.arange(K)
    gradients = jax.jit(jax.grad(total, (0, 1)))
    expected = gradients(X, T, LABELS, where)
    x, t = placed(X, *spec), placed(T, *others)
    with jax.set_mesh(mesh_of("explicit", d=2)):
        got = gradients(x, t, placed(LABELS, *others[:1]), placed(where, *others))
    assert [jax.typeof(a) for a in got] == [jax.typeof(a) for a in (x, t)]
    assert_equal(got, expected)


@pytest.mark.every_platform
def test_derivatives_of_a_batch_that_is_split():
    """`jax.vmap` over an Explicit axis, as for the derivatives of each example."""
    kernel, teacher = jnp.asarray(T[:K].T), softjax.LinearHead(jnp.asarray(X), jnp.asarray(T[:K]))

    def total(x):
        results = softjax.softmax(x, temperature=2), softjax.cross_entropy(x, LABELS)
        results += information.kl_divergence(x, T), softjax.smooth_max(x, temperature=2)
        results += (softjax.linear_distillation_loss(x, kernel, teacher, reduction="sum"),)
        # Cotangents that are the same in the whole batch, as for a part of a larger function.
        return sum(jnp.vdot(jnp.arange(1.0, r.size + 1), r.ravel()) for r in results)

    def derivatives_of(x):
        return jax.jvp(jax.grad(total), (x,), (jnp.sin(x),))

    of_each, batch = jax.jit(jax.vmap(derivatives_of)), np.stack([X, T])
    split = of_each(put(mesh_of("explicit", d=2), batch, "d"))
    assert all(jax.typeof(a).sharding.spec[0] == "d" for a in split)
    assert_equal(split, of_each(batch))


def test_eager_calls():
    x, t = placed(X, "d"), placed(T, None, "d")
    assert_equal(information.kl_divergence(x, t), information.kl_divergence(X, T))
    hessian = derivatives.logsumexp_hessian(t)
    assert_equal(hessian, derivatives.logsumexp_hessian(T))


def test_examples():
    params = regression.fit(FEATURES, LABELS, l2=0.5).params
    expected = jax.jit(of_examples)(FEATURES, LABELS, params)
    features, labels = placed(FEATURES, "d"), placed(LABELS, "d")
    assert_equal(jax.jit(of_examples)(features, labels, params), expected)
    # Outside of a trace the arrays are moved by themselves.
    assert_equal(regression.gradient(params, features, labels, l2=0.5), expected["gradient"])
    covariance = inference.covariance(params, features, labels, l2=0.5)
    assert_equal(inference.coefficients(params, covariance), expected["coefficients"])


def test_many_fits():
    """Several fits at once, beside fits of NumPy arrays one by one."""
    features, labels = placed(FEATURES, "d"), placed(LABELS, "d")
    options = {"l2": 0.5, "num_classes": K}
    several = regression.fit_many(features, jnp.stack([labels, labels]), **options)
    alone = regression.fit(FEATURES, LABELS, **options)
    np.testing.assert_allclose(several.params.kernel[0], alone.params.kernel, atol=1e-3)

    validated = regression.cross_validate(features, labels, folds=2, **options)
    held_out = np.asarray(validated.folds) == 0
    weights = (~held_out).astype(np.float32)
    alone = regression.fit(FEATURES, LABELS, sample_weights=weights, **options)
    log_p = np.asarray(regression.predict_log_proba(alone.params, FEATURES))
    loss = -log_p[np.arange(N), LABELS][held_out].mean()
    np.testing.assert_allclose(validated.loss[0], loss, rtol=1e-3)

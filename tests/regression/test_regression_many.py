"""Many fits at once against single fits and float64 NumPy: the fits are independent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.experimental.sparse import BCOO
from sparse_rows import sparse_rows
from test_regression import L2, D, K, N, problem
from test_regression_solvers import gradient

from softjax import regression
from softjax._platforms import quickly_compiled
from softjax.regression import _batched, _bootstrap, _cross_validation, _groups, _host_folds

pytestmark = pytest.mark.compiled_quickly

EYE = np.eye(K)


@pytest.fixture(autouse=True)
def _folds_are_fitted_at_once(monkeypatch):
    """And not one after another in NumPy, as those of a table as small as these."""
    monkeypatch.setattr(_host_folds, "MOST_WORK", 0)


def lane(fits, index):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], fits)


def assert_optimal(params, x, y, l2, weights, tol):
    """The gradient of the objective vanishes, in float64 NumPy; y may be a distribution."""
    targets = y if y.ndim == 2 else np.eye(len(params.bias))[y]
    for part in gradient(params, x, weights[:, None] / weights.sum() * targets, l2):
        np.testing.assert_allclose(part, 0, atol=tol)


def losses_and_hits(params, x, y):
    z = np.float64(x) @ np.float64(params.kernel) + np.float64(params.bias)
    return -scipy.special.log_softmax(z, -1)[np.arange(len(y)), y], np.argmax(z, -1) == y


# --- lanes of every kind ---


@pytest.mark.x64_once(True)
def test_label_sets_weights_and_penalties_take_turns_in_two_slots(monkeypatch):
    x, y = problem()
    rng = np.random.default_rng(1)
    labels = np.stack([y, rng.permutation(y), y, np.argmax(x[:, :K], -1), y, (y + 1) % K, y % 2])
    weights = rng.integers(0, 3, labels.shape).astype(float)
    weights[3] = 1
    l2 = np.array([L2, 1.0, 0.0, 0.0, 1e-4, 100.0, L2])
    class_weights = np.array([1.0, 2.0, 0.5])
    monkeypatch.setattr(_batched, "CACHE_BYTES", 2 * _batched.SLOT_ARRAYS * K * N * 8)
    options = {"l2": l2, "sample_weights": weights, "class_weights": class_weights}
    fits = regression.fit_many(x, labels, tol=1e-9, **options)
    assert fits.params.kernel.shape == (7, D, K)
    # Lane 3 is separated, and lane 6 has no example of the last class, whose bias nothing holds.
    expected = [regression.CONVERGED] * 7
    expected[3], expected[6] = regression.SEPARATED, regression.QUASI_SEPARATED
    assert fits.stop_reason == expected
    assert np.asarray(fits.separated).tolist() == [False] * 3 + [True] + [False] * 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fits))
    for b in (0, 1, 2, 4, 5, 6):
        targets = EYE[labels[b]] * class_weights
        assert_optimal(lane(fits.params, b), x, targets, l2[b], weights[b], 2e-8)


@pytest.mark.x64_once
def test_under_jit_soft_labels_of_more_features_than_examples_and_nan_in_one_lane():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(12, 30)).astype(np.float32)
    soft = rng.dirichlet([1.0, 1.0], size=(3, 12)).astype(np.float32)
    soft[1, 4] = np.nan
    fits = jax.jit(lambda soft: regression.fit_many(x, soft, l2=0.1))(jnp.asarray(soft))
    assert fits.params.kernel.shape == (3, 30, 2)
    assert fits.params.kernel.dtype == np.float32
    for b in (0, 2):
        assert_optimal(lane(fits.params, b), x, soft[b], 0.1, np.ones(12), 1e-5)
    reasons = [regression.CONVERGED, regression.NON_FINITE, regression.CONVERGED]
    assert fits.stop_reason == reasons
    assert np.isnan(fits.objective[1])


@pytest.mark.x64_once
def test_slots_take_what_the_features_or_a_cache_take():
    def slots(examples, count, num_features=8):
        features = jax.ShapeDtypeStruct((examples, num_features), jnp.float32)
        return _batched.slot_count(features, K, count)

    assert slots(100, 5) == 5
    assert slots(10_000, 1000) == _batched.CACHE_BYTES // (_batched.SLOT_ARRAYS * K * 10_000 * 4)
    assert slots(10**6, 1000, 240) == 240 // (_batched.SLOT_ARRAYS * K)
    assert slots(10**7, 1000) == 1


# --- the bootstrap ---


@pytest.fixture(scope="module")
def resampled():
    """Arguments, and what a bootstrap of them comes to in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        x = rng.normal(size=(300, 2))
        y = np.argmax(x @ np.array([[0.0, 0.5, 1], [0, -1, 0]]) + rng.gumbel(size=(300, K)), -1)
        return x, y, regression.bootstrap(x, y, resamples=200, tol=1e-9)


@pytest.mark.x64_once(True)
def test_every_resample_is_a_fit_with_its_counts_as_weights(resampled):
    x, y, result = resampled
    assert bool(result.resamples.converged.all())
    for b in (0, 1, 150, 199):
        counts = np.asarray(_bootstrap.resample_counts(jax.random.key(0), jnp.int32(b), 300))
        assert counts.sum() == 300
        assert_optimal(lane(result.resamples.params, b), x, y, 0.0, counts, 1e-8)
    assert_optimal(result.fit.params, x, y, 0.0, np.ones(300), 1e-8)


@pytest.mark.x64_once(True)
def test_standard_errors_and_intervals_are_those_of_the_information(resampled):
    x, y, result = resampled
    covariance = regression.inference.covariance(result.fit.params, x, y)
    model = regression.inference.coefficients(result.fit.params, covariance)
    errors = result.standard_errors()
    ours = np.concatenate([errors.kernel, errors.bias[None]])
    # 200 draws know a standard deviation to 5 %, and the model's own one is asymptotic.
    np.testing.assert_allclose(ours, model.standard_error, rtol=0.25)
    lower, upper = result.intervals(0.95)
    widths = np.concatenate([upper.kernel - lower.kernel, (upper.bias - lower.bias)[None]])
    np.testing.assert_allclose(widths, model.upper - model.lower, rtol=0.3)
    with pytest.raises(ValueError, match="`level` must be a number in"):
        result.intervals(95)


@pytest.mark.x64_once(True)
def test_the_seed_determines_the_resamples_and_a_callback_sees_and_stops_them(resampled):
    x, y, result = resampled
    programs = quickly_compiled(_batched.advance)._cache_size
    compiled = programs()
    seen = []
    same = regression.bootstrap(
        x, y, resamples=200, tol=1e-9, seed=jax.random.PRNGKey(0), callback=seen.append
    )
    for ours, expected in zip(jax.tree.leaves(same), jax.tree.leaves(result), strict=True):
        np.testing.assert_array_equal(ours, expected)
    done = [event.done for event in seen]
    assert done == sorted(done)
    assert (done[0], done[-1], seen[-1].count) == (0, 200, 200)
    other = regression.bootstrap(
        x, y, resamples=200, tol=1e-9, seed=1, callback=lambda event: len(seen) < 10**9
    )
    assert set(other.resamples.stop_reason) == {regression.CALLBACK}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(other))
    assert programs() == compiled > 0


# --- cross-validation ---

PENALTIES = np.array([1e-3, 1.0, 0.03])
FOLDS = 4


@pytest.fixture(scope="module", params=[0, _host_folds.MOST_WORK], ids=["compiled", "in NumPy"])
def path(request):
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_host_folds, "MOST_WORK", request.param)
        x, y = problem()
        weights = np.random.default_rng(4).uniform(0, 2, N) * (np.arange(N) % 7 > 0)
        options = {"folds": FOLDS, "sample_weights": weights, "tol": 1e-9}
        return x, y, weights, regression.fit_path(x, y, l2=PENALTIES, **options)


@pytest.mark.x64_once(True)
def test_a_path_is_the_fits_to_all_and_to_all_folds_but_one(path):
    x, y, weights, result = path
    validated = result.cross_validation
    folds = np.asarray(validated.folds)
    assert validated.fits.params.kernel.shape == (3, FOLDS, D, K)
    assert bool(validated.fits.converged.all() & result.fits.converged.all())
    numbers = ("float64", "int32", "int32", "int32", "float64", "bool")
    for fits in (validated.fits, result.fits):
        assert tuple(str(leaf.dtype) for leaf in fits[1:-1]) == numbers
    for p, l2 in enumerate(PENALTIES):
        assert_optimal(lane(result.fits.params, p), x, y, l2, weights, 1e-8)
        for f in range(FOLDS):
            params = lane(validated.fits.params, (p, f))
            assert_optimal(params, x, y, l2, np.where(folds == f, 0, weights), 1e-8)
            losses, hits = losses_and_hits(params, x, y)
            share = np.where(folds == f, weights, 0) / weights[folds == f].sum()
            np.testing.assert_allclose(validated.loss[p, f], share @ losses, rtol=1e-12)
            np.testing.assert_allclose(validated.accuracy[p, f], share @ hits, rtol=1e-12)
    programs = quickly_compiled(_groups._begun)._cache_size()
    alone = regression.cross_validate(x, y, l2=1.0, folds=folds, sample_weights=weights, tol=1e-9)
    assert quickly_compiled(_groups._begun)._cache_size() == programs  # of any number of penalties
    assert alone.loss.shape == (FOLDS,)
    np.testing.assert_allclose(alone.loss, validated.loss[1], rtol=1e-7)


@pytest.mark.x64_once
def test_the_rules_of_choice():
    loss = jnp.array([[2.0, 2.2, 2.4], [1.0, 1.2, 1.4], [1.1, 1.3, 1.5], [1.3, 1.5, 1.7]])
    validated = regression.CrossValidation(None, loss, 1 - loss / 4, None)
    l2 = jnp.array([10.0, 0.1, 1.0, 3.0])
    result = regression.PathResult(l2, None, validated)
    # The standard error is 0.2 / sqrt(3) = 0.115: it lets in 1.3, not 1.5.
    np.testing.assert_allclose(validated.standard_error, 0.2 / 3**0.5, rtol=1e-5)
    assert (int(result.best), int(result.best_within_one_standard_error)) == (1, 2)
    one = result._replace(cross_validation=validated._replace(loss=loss[:, :1]))
    assert (int(one.best), int(one.best_within_one_standard_error)) == (1, 1)


@pytest.mark.x64_once
def test_folds_are_stratified_and_determined_by_the_seed():
    labels = jnp.asarray(np.repeat([0, 1, 2], [23, 9, 70]), jnp.int32)
    draw = jax.jit(lambda key: _cross_validation._stratified(key, labels, 5))
    folds = np.asarray(draw(jax.random.key(0)))
    for part in (slice(None), slice(0, 23), slice(23, 32), slice(32, None)):
        assert np.ptp(np.bincount(folds[part], minlength=5)) <= 1
    np.testing.assert_array_equal(folds, draw(jax.random.key(0)))
    assert (folds != np.asarray(draw(jax.random.key(1)))).any()


@pytest.mark.x64_once(True)
def test_a_class_that_one_fold_has_alone():
    x, y = problem()
    folds = np.where(y == 2, 0, np.arange(N) % FOLDS)
    weights = np.ones(N)
    result = regression.cross_validate(
        x, y, l2=PENALTIES, folds=folds, sample_weights=weights, tol=1e-9
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    single = regression.fit(
        x, y, l2=PENALTIES[2], sample_weights=np.where(folds == 0, 0.0, 1.0), tol=1e-9
    )
    np.testing.assert_allclose(result.fits.objective[2, 0], single.objective, atol=1e-8)
    assert result.loss[2, 0] > result.loss[2, 1]


@pytest.mark.x64_once(True)
def test_one_fold_in_the_metric_of_large_problems():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(90, 40))
    assert 41 * K > _groups.DENSE_A_LANE  # for one lane a dense metric does not pay
    y = np.argmax(x[:, :K] + rng.gumbel(size=(90, K)), -1)
    folds = np.where(np.arange(90) < 70, -1, 0)
    result = regression.cross_validate(x, y, l2=0.05, folds=folds, tol=1e-9)
    assert np.isnan(result.standard_error)
    params = lane(result.fits.params, 0)
    assert_optimal(params, x, y, 0.05, np.where(folds < 0, 1.0, 0.0), 1e-8)
    losses, _ = losses_and_hits(params, x[70:], y[70:])
    np.testing.assert_allclose(result.mean_loss, losses.mean(), rtol=1e-10)


# --- sparse features ---


@pytest.mark.x64_once(True)
def test_sparse_features_give_the_fits_of_dense_ones(monkeypatch):
    x, y = problem()
    x = np.where(np.random.default_rng(6).uniform(size=x.shape) < 0.5, x, 0)
    sparse = sparse_rows(x)
    monkeypatch.setattr(_batched, "CACHE_BYTES", 2 * _batched.SLOT_ARRAYS * K * N * 8)
    path = regression.fit_path(sparse, y, l2=np.array([L2, 1.0]), folds=FOLDS, tol=1e-9)
    folds = np.asarray(path.cross_validation.folds)
    for p, l2 in enumerate((L2, 1.0)):
        assert_optimal(lane(path.fits.params, p), x, y, l2, np.ones(N), 1e-8)
        for f in range(FOLDS):
            params = lane(path.cross_validation.fits.params, (p, f))
            assert_optimal(params, x, y, l2, np.where(folds == f, 0.0, 1.0), 2e-8)


@pytest.mark.x64_once
def test_sparse_features_are_never_made_dense():
    examples, width, count = 37, 59, 5
    indices = jnp.stack([jnp.arange(examples)] * 2, 1)
    y = np.arange(examples) % K

    def fits(data, labels):
        x = BCOO((data, indices), shape=(examples, width))
        many = regression.fit_many(x, labels, l2=0.1, num_classes=K)
        resampled = regression.bootstrap(x, y, resamples=count, l2=0.1, num_classes=K)
        return many.params, resampled.resamples.params

    labels = jnp.zeros((count, examples), jnp.int32)
    program, shapes = jax.make_jaxpr(fits, return_shape=True)(jnp.ones(examples), labels)
    assert all(params.kernel.shape == (count, width, K) for params in shapes)
    dense = rf"\[[\d,]*({examples},({width}|{width + 1})|({width}|{width + 1}),{examples})\]"
    assert "bcoo_dot_general" in str(program)
    assert not re.findall(dense, str(program))


# --- arguments ---


@pytest.mark.x64_once
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x, y: regression.fit_many(x, y), "`labels` must be stacked"),
        (
            lambda x, y: regression.fit_many(x, np.stack([y, y]), l2=np.ones(3)),
            "same number of lanes",
        ),
        (lambda x, y: regression.fit_many(x, y[None, :-1]), "`labels` must be integer of shape"),
        (
            lambda x, y: regression.fit_many(x, y, sample_weights=np.outer([1, 0], np.ones(N))),
            "zeros only in lane 1",
        ),
        (lambda x, y: regression.fit_many(x, y, l2=np.array([0.1, -1.0])), "`l2` must be finite"),
        (lambda x, y: regression.fit_path(x, y, l2=0.1), "`l2` must be an array of penalties"),
        (lambda x, y: regression.cross_validate(x, y, folds=1), "`folds` must be >= 2"),
        (lambda x, y: regression.cross_validate(x, y, folds=N + 1), "`folds` must be at most"),
        (lambda x, y: regression.cross_validate(x, y, folds=np.zeros(N, int)), "and not all"),
        (
            lambda x, y: regression.cross_validate(x, y, folds=2 * (np.arange(N) % 2)),
            "fold 1 with 0 of 60",
        ),
        (lambda x, y: regression.bootstrap(x, y, resamples=1), "`resamples` must be >= 2"),
        (lambda x, y: regression.bootstrap(x, y, l2=np.ones(2)), "`l2` must be a scalar"),
        (lambda x, y: regression.bootstrap(x, np.zeros(N, int)), "two classes or more"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call(*problem())


@pytest.mark.x64_once
def test_folds_are_integers():
    for folds in (np.zeros(N), 2.0, object()):
        with pytest.raises(TypeError, match="`folds` must be an integer, or known integers"):
            regression.cross_validate(*problem(), folds=folds)

"""Calibration against float64 NumPy and scipy.optimize."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

import softjax
from softjax import calibration
from softjax._weights import sums_by_class

pytestmark = pytest.mark.compiled_quickly


def problem(dtype, n=200, k=5, scale=1.0, seed=0):
    """Logits that are right at T = scale / 2, up to chance."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, k))
    y = np.argmax(2 * x + rng.gumbel(size=(n, k)), -1)
    return (scale * x).astype(dtype), y, rng.integers(0, 3, n).astype(dtype)


def optimal_temperature(x, y, w=None):
    """The root of the slope of the loss, in float64."""
    x = np.float64(x)
    q = np.eye(x.shape[1])[y] if y.ndim == 1 else np.float64(y)
    w = np.ones(len(x)) if w is None else np.float64(w)
    unit = np.abs(x).max()

    def slope(log_b):
        p = scipy.special.softmax(np.exp(log_b) * x / unit, -1)
        return (w[:, None] * (q.sum(-1, keepdims=True) * p - q) * x / unit).sum()

    return unit / np.exp(scipy.optimize.brentq(slope, -20, 20, xtol=1e-15))


def rounding(dtype):
    return 20 * float(np.finfo(dtype).eps)  # a sum of some hundred terms of one sign


# The temperature


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e20])
@pytest.mark.parametrize("kind", ["integer", "soft", "weighted"])
def test_the_temperature_is_the_optimum(kind, scale, dtype):
    x, y, w = problem(dtype, scale=scale)
    weights = w if kind == "weighted" else None
    if kind == "soft":
        y = np.random.default_rng(1).dirichlet(np.ones(5) / 2, len(x)) * 3  # of any mass
        y = (y + np.eye(5)[np.argmax(x, -1)]).astype(dtype)
    ours = calibration.calibrate_temperature(x, y, sample_weights=weights)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, optimal_temperature(x, y, weights), rtol=rounding(dtype))
    np.testing.assert_allclose(
        calibration.calibrate_temperature(x.reshape(20, 10, 5), y.reshape(20, 10, *y.shape[1:])),
        calibration.calibrate_temperature(x, y),
        rtol=rounding(dtype),
    )


def test_one_error_among_confident_rows_is_found(dtype):
    """The loss is flat for many decades of T but for one row."""
    x, _, _ = problem(dtype, 1000, scale=100.0)
    y = np.argmax(x, -1)
    x[0] *= np.asarray(1e-3, dtype)
    y[0] = np.argsort(x[0])[-2]
    ours = calibration.calibrate_temperature(x, y)
    np.testing.assert_allclose(ours, optimal_temperature(x, y), rtol=1e-4)


@pytest.mark.x64_once
def test_limits_of_the_temperature(dtype):
    x, y, _ = problem(dtype)
    right, wrong = np.argmax(x, -1), np.argmin(x, -1)
    assert calibration.calibrate_temperature(x, right) == 0
    assert calibration.calibrate_temperature(x, wrong) == np.inf
    assert np.isnan(calibration.calibrate_temperature(np.zeros((3, 4), dtype), y[:3] % 4))
    assert np.isnan(calibration.calibrate_temperature(x, y, sample_weights=np.zeros(200, dtype)))
    spoiled = x.copy()
    spoiled[7, 2] = np.nan
    with pytest.raises(ValueError, match=r"`logits` must be without NaN.* nan at \(7, 2\)"):
        calibration.calibrate_temperature(spoiled, y)
    with softjax.checks(False):
        assert np.isnan(calibration.calibrate_temperature(spoiled, y))
    weights = np.ones(200, dtype)
    weights[7] = 0
    np.testing.assert_array_equal(
        calibration.calibrate_temperature(spoiled, y, sample_weights=weights),
        calibration.calibrate_temperature(x, y, sample_weights=weights),
    )


@pytest.mark.x64_once
def test_the_temperature_has_the_scale_of_the_logits(dtype):
    x, y, _ = problem(dtype)
    plain = calibration.calibrate_temperature(x, y)
    for scale in (1e-30, 1e30, 1e37):
        scaled = calibration.calibrate_temperature(x * np.asarray(scale, dtype), y)
        np.testing.assert_allclose(scaled, plain * scale, rtol=rounding(dtype))


@pytest.mark.x64_once
def test_a_class_of_logit_minus_infinity_takes_no_part(dtype):
    x, y, _ = problem(dtype)
    wide = np.concatenate([x, np.full((200, 1), -np.inf, dtype)], 1)
    np.testing.assert_allclose(
        calibration.calibrate_temperature(wide, y),
        calibration.calibrate_temperature(x, y),
        rtol=rounding(dtype),
    )
    y[0] = 5
    assert calibration.calibrate_temperature(wide, y) == np.inf


def test_the_temperature_is_differentiable(x64, dtype):
    x, y, w = problem(dtype)
    x[:9, 1] = x[:9, 2] = x[:9].max(-1)  # two or three logits are the largest of their row

    def temperature(x, w):
        return calibration.calibrate_temperature(x, y, sample_weights=w)

    w = w + np.asarray(1, dtype)
    direction = np.random.default_rng(1).normal(size=x.shape).astype(dtype)
    step = 1e-5
    moved = [
        optimal_temperature(np.float64(x) + s * np.float64(direction), y, w) for s in (step, -step)
    ]
    expected = (moved[0] - moved[1]) / (2 * step)
    value, forward = jax.jvp(lambda x: temperature(x, w), (x,), (direction,))
    np.testing.assert_array_equal(value, temperature(x, w))
    np.testing.assert_allclose(forward, expected, rtol=1e-6 if x64 else 1e-3)
    by_x, by_w = jax.grad(temperature, (0, 1))(jnp.asarray(x), jnp.asarray(w))
    np.testing.assert_allclose(
        np.sum(np.float64(by_x) * direction), expected, rtol=1e-6 if x64 else 1e-3
    )
    # The same rows at any scale of their weights.
    assert abs(np.sum(np.float64(by_w) * w)) < (1e-9 if x64 else 1e-3)


@pytest.mark.x64_once
def test_the_temperature_transforms(dtype):
    x, y, _ = problem(dtype)
    plain = calibration.calibrate_temperature(x, y)
    batched = jax.vmap(calibration.calibrate_temperature)(jnp.stack([x, 2 * x]), jnp.stack([y, y]))
    np.testing.assert_allclose(batched, [plain, 2 * plain], rtol=rounding(dtype))
    np.testing.assert_allclose(
        jax.jit(calibration.calibrate_temperature)(x, y), plain, rtol=rounding(dtype)
    )
    y[0] = 5
    assert np.isnan(jax.jit(calibration.calibrate_temperature)(x, y))
    with pytest.raises(ValueError, match=r"calibrate_temperature: `labels` .* got 5 at \(0,\)"):
        calibration.calibrate_temperature(x, y)


@pytest.mark.x64_once
def test_half_precision_is_computed_in_float32():
    x, y, _ = problem(np.float32)
    half = jnp.asarray(x, jnp.bfloat16)
    ours = calibration.calibrate_temperature(half, y)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(
        ours, calibration.calibrate_temperature(half.astype(np.float32), y)
    )


# The bins


def oracle_bins(p, y, w, num_bins, adaptive):
    """Confidence, accuracy and weight of each bin, one example after the other."""
    p, w = np.float64(p), np.float64(w)
    confidence, right = p.max(-1), p.argmax(-1) == y
    sums = np.zeros((3, num_bins))
    for i in range(len(p)):
        position = confidence[i]
        if adaptive:
            position = w[confidence < confidence[i]].sum() / w.sum()
        m = min(int(position * num_bins), num_bins - 1)
        sums[:, m] += w[i] * confidence[i], w[i] * right[i], w[i]
    with np.errstate(invalid="ignore"):
        return sums[0] / sums[2], sums[1] / sums[2], sums[2]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("num_bins", [8, 1000])
def test_the_bins_are_those_of_numpy(num_bins, adaptive, dtype):
    x, y, w = problem(dtype)
    p = np.array(softjax.softmax(x))
    p[:40] = p[40:80]  # ties stay together
    given = {"num_bins": num_bins, "adaptive": adaptive, "sample_weights": w}
    expected = oracle_bins(p, y, w, num_bins, adaptive)
    ours = calibration.reliability_diagram(p, y, **given)
    for got, want in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=rounding(dtype))
    confidence, accuracy, weight = (np.where(expected[2] > 0, v, 0) for v in expected)
    ece = (weight * np.abs(confidence - accuracy)).sum() / weight.sum()
    ours = calibration.expected_calibration_error(p, y, **given)
    np.testing.assert_allclose(ours, ece, rtol=100 * rounding(dtype))


@pytest.mark.x64_once
def test_soft_labels_are_right_with_their_probability(dtype):
    x, y, _ = problem(dtype)
    p = softjax.softmax(x)
    hard = calibration.reliability_diagram(p, y)
    soft = calibration.reliability_diagram(p, np.eye(5, dtype=dtype)[y])
    jax.tree.map(np.testing.assert_array_equal, hard, soft)
    half = calibration.reliability_diagram(p, np.eye(5, dtype=dtype)[y] / 2)
    np.testing.assert_allclose(half.accuracy, hard.accuracy / 2, rtol=rounding(dtype))
    tied = calibration.reliability_diagram(np.full((2, 2), 0.5, dtype), np.array([0, 1]))
    assert np.nansum(tied.accuracy) == 0.5


@pytest.mark.x64_once
def test_calibrated_probabilities_have_a_small_error(dtype):
    x, y, _ = problem(dtype, 20_000, scale=10.0)
    temperature = calibration.calibrate_temperature(x, y)
    before, after = (
        calibration.expected_calibration_error(softjax.softmax(x, temperature=t), y)
        for t in (1.0, temperature)
    )
    # Of 20000 examples in 15 bins, chance leaves sqrt(15 / 20000) / 2 at most.
    assert after < 0.014 < 0.1 < before
    np.testing.assert_allclose(temperature, 5, rtol=0.05)


@pytest.mark.x64_once
def test_the_bins_at_the_edge(dtype):
    sure = calibration.reliability_diagram(np.eye(3, dtype=dtype), np.arange(3), num_bins=4)
    np.testing.assert_array_equal(sure.weight, [0, 0, 0, 3])
    np.testing.assert_array_equal(sure.accuracy, [np.nan, np.nan, np.nan, 1])
    for adaptive in (False, True):
        nothing = calibration.expected_calibration_error(
            np.eye(3, dtype=dtype),
            np.arange(3),
            sample_weights=np.zeros(3, dtype),
            adaptive=adaptive,
        )
        assert np.isnan(nothing)
        spoiled = np.eye(3, dtype=dtype)
        spoiled[1, 1] = np.nan
        with pytest.raises(ValueError, match=r"`probabilities` must be without NaN"):
            calibration.expected_calibration_error(spoiled, np.arange(3), adaptive=adaptive)
        with softjax.checks(False):
            error = calibration.expected_calibration_error(spoiled, np.arange(3), adaptive=adaptive)
            assert np.isnan(error)
    bad = jax.jit(calibration.expected_calibration_error)(np.eye(3, dtype=dtype), np.arange(3) + 1)
    assert np.isnan(bad)


@pytest.mark.x64_once
def test_bad_arguments_are_named():
    p, y = np.full((4, 2), 0.5, np.float32), np.zeros(4, int)
    with pytest.raises(ValueError, match=r"reliability_diagram: `probabilities` .*\[0, 1\], got 3"):
        calibration.reliability_diagram(p * 6, y)
    with pytest.raises(ValueError, match="`num_bins` must be >= 1, got 0"):
        calibration.expected_calibration_error(p, y, num_bins=0)
    with pytest.raises(TypeError, match="`num_bins` must be an integer"):
        calibration.expected_calibration_error(p, y, num_bins=2.0)
    with pytest.raises(ValueError, match="`labels` must be of shape"):
        calibration.expected_calibration_error(p, y[:3])
    with pytest.raises(ValueError, match="`sample_weights` must be of shape"):
        calibration.calibrate_temperature(p, y, sample_weights=np.ones(3))
    with pytest.raises(ValueError, match="`sample_weights` must be >= 0"):
        calibration.calibrate_temperature(p, y, sample_weights=-np.ones(4))
    with pytest.raises(ValueError, match="`logits` must be of rank >= 1"):
        calibration.calibrate_temperature(np.float32(1), 0)
    with pytest.raises(TypeError, match="`labels` must be class indices"):
        calibration.calibrate_temperature(p, y > 0)


MASKS = [-1e9, -1e19, -1e30, -1e35, "least", -np.inf]


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e18])
def test_the_temperature_beside_masked_classes_and_outliers(scale, dtype):
    """Gaps of any size: a masked class and a row of one huge logit change nothing."""
    x, y, w = problem(dtype, scale=scale)
    w = w + np.asarray(1, dtype)
    x, y, w = x[:100], y[:100], w[:100]
    expected = optimal_temperature(x, y, w)

    def weighted(x, y, w):
        return calibration.calibrate_temperature(x, y, sample_weights=w)

    fit = jax.jit(jax.value_and_grad(weighted))
    _, plain = fit(x, y, w)
    for mask in MASKS:
        if isinstance(mask, float) and abs(mask) < 1e9 * scale:
            continue
        wide = np.full((101, 6), np.finfo(dtype).min if mask == "least" else mask, dtype)
        wide[:100, :5] = x
        wide[100] = [np.finfo(dtype).max / 4 if mask == "least" else 1e30, 0, 0, 0, 0, 0]
        temperature, slope = fit(wide, np.append(y, 0), np.append(w, w[:1]))
        np.testing.assert_allclose(temperature, expected, rtol=2 * rounding(dtype))
        np.testing.assert_allclose(
            slope[:100, :5], plain, rtol=1e-3, atol=1e-5 * np.abs(plain).max()
        )
        np.testing.assert_array_equal(slope[:, 5], 0)
        np.testing.assert_array_equal(slope[100], 0)


@pytest.mark.x64_once
def test_a_label_on_a_masked_class_costs_what_its_logit_says():
    x, y, _ = problem(np.float32, 20)
    for mask in (-1e9, -1e30):
        wide = np.concatenate([x, np.full((20, 1), mask, np.float32)], 1)
        labels = np.append(y[:-1], 5)
        expected = optimal_temperature(wide, labels)
        ours = calibration.calibrate_temperature(wide, labels)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [2.0**126, 2.0**-126, 2.0**-133])
def test_calibration_at_any_scale_of_the_weights(scale, dtype):
    x, y, w = problem(dtype)
    scaled = w * np.asarray(scale, dtype)  # exact, also where it is subnormal
    p = np.asarray(softjax.softmax(x))
    for of_weights in (
        lambda w: calibration.calibrate_temperature(x, y, sample_weights=w),
        lambda w: calibration.expected_calibration_error(p, y, sample_weights=w),
        lambda w: calibration.expected_calibration_error(p, y, sample_weights=w, adaptive=True),
        lambda w: calibration.reliability_diagram(p, y, sample_weights=w)[:2],
    ):
        np.testing.assert_allclose(of_weights(scaled), of_weights(w), rtol=2 * rounding(dtype))


@pytest.mark.x64_once
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_over_many_examples_keep_their_digits(weighted):
    """A million examples in one bin: one after the other, float32 sums of 0.9 are off by 1 %."""
    n = 2**20
    p = jnp.broadcast_to(jnp.array([0.9, 0.1], jnp.float32), (n, 2))
    labels = (np.arange(n) % 16 == 0).astype(np.int32)  # 15 of 16 are right
    given = {"sample_weights": jnp.full(n, 0.1, jnp.float32)} if weighted else {}
    diagram = calibration.reliability_diagram(p, labels, **given)
    np.testing.assert_allclose(diagram.weight[13], n * 0.1 if weighted else n, rtol=3e-6)
    np.testing.assert_allclose(diagram.confidence[13], 0.9, rtol=3e-6)
    np.testing.assert_allclose(diagram.accuracy[13], 15 / 16, rtol=3e-6)
    error = calibration.expected_calibration_error(p, labels, **given)
    np.testing.assert_allclose(error, 15 / 16 - 0.9, rtol=2e-5)


@pytest.mark.x64_once
def test_a_sum_of_ones_does_not_stop_at_2_to_the_24():
    n = 2**24 + 2**20
    classes = jnp.asarray(np.arange(n) % 64 == 0, jnp.int32)
    ones = jnp.ones(n, jnp.float32)
    sums = jax.jit(sums_by_class, static_argnums=2)(classes, ones, 3)
    np.testing.assert_array_equal(sums, [n - n // 64, n // 64, 0])


@pytest.mark.x64_once
def test_an_empty_bin_is_nowhere_divided_by():
    p, y = jnp.array([[0.75, 0.25], [0.25, 0.75]]), jnp.array([0, 0])
    with jax.debug_nans(True):
        assert calibration.expected_calibration_error(p, y) == 0.25
        weights = jnp.array([1.0, 0.0])
        assert calibration.expected_calibration_error(p, y, sample_weights=weights) == 0.25


BINNED = (
    calibration.reliability_diagram,
    calibration.expected_calibration_error,
    calibration.classwise_calibration_error,
)


@pytest.mark.x64_once
@pytest.mark.parametrize("function", BINNED)
def test_rows_that_are_no_distributions_and_no_rows_are_refused(function):
    y = np.arange(4) % 3
    for kind in (np.float16, jnp.bfloat16, np.float32, np.float64):
        p = np.asarray(softjax.softmax(np.linspace(-9, 9, 12).reshape(4, 3))).astype(kind)
        function(p, y)
        for factor in (0.8, 0.0):
            spoiled = p.copy()
            spoiled[1] *= factor
            with pytest.raises(ValueError, match=r"rows that sum to 1, got 0\.\d* at \(1,\)"):
                function(spoiled, y)
            function(spoiled, y, sample_weights=np.array([1.0, 0.0, 1.0, 2.0]))
    jax.jit(function)(spoiled, y)
    with softjax.checks(False):
        function(spoiled, y)
    with pytest.raises(ValueError, match=r"`probabilities` must be of at least one example"):
        function(p[:0], y[:0])


# The picture


@pytest.mark.x64_once
def test_the_reliability_plot_is_a_picture(tmp_path):
    plots = pytest.importorskip("softjax.plots")
    x, y, _ = problem(np.float32)
    plots.reliability(tmp_path / "reliability.png", y, np.asarray(softjax.softmax(x)))
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")

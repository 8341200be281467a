"""Weights, temperatures and options of any size, shape and kind."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax
from softjax import information

pytestmark = pytest.mark.compiled_quickly

TINY = np.finfo(np.float32).tiny
HIDDEN, LABELS = jnp.eye(3), jnp.array([0, 2, 1])


# Weights


def weights_of(scale, dtype):
    """Weights of one scale, or of very different ones."""
    if scale == "mixed":
        return np.array([3e38, 1e-40, 0.0], dtype)
    return (np.array([1.0, 0.5, 0.0]) * float(scale)).astype(dtype)


@pytest.mark.parametrize("scale", ["3e38", "1", "1e-38", "1e-40", "1e-44", "mixed"])
def test_the_scale_of_the_weights_does_not_matter(scale, dtype):
    w = weights_of(scale, dtype)
    exact = w.astype(np.longdouble)
    share = np.float64(exact / exact.sum())
    losses = np.array([1.0, 2.0, np.nan], dtype)
    mean, slope = jax.value_and_grad(softjax.weighted_mean)(losses, w)
    np.testing.assert_allclose(mean, share[:2] @ losses[:2], rtol=1e-6)
    np.testing.assert_allclose(slope, share, rtol=1e-6, atol=TINY)

    logits = jnp.asarray(2 * HIDDEN, dtype)
    per_row = np.float64(softjax.cross_entropy(logits, LABELS))
    fused = softjax.linear_cross_entropy(
        logits, HIDDEN.astype(dtype), LABELS, weights=w, reduction="mean"
    )
    np.testing.assert_allclose(fused, share @ per_row, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e38, 1e-30, 1e-38, 1e-45])
@pytest.mark.x64_once
def test_the_scale_of_the_class_weights_does_not_matter_to_their_mean(scale):
    """sum_i w_i c_y l_i / sum_i w_i c_y was 0 or NaN for class weights whose products underflow."""
    logits = 2 * HIDDEN

    def fused(of_classes):
        options = {"class_weights": of_classes, "reduction": "class_weighted_mean"}
        return softjax.linear_cross_entropy(logits, HIDDEN, LABELS, **options)

    def outputs(of_classes):
        options = {"class_weights": of_classes, "reduction": "class_weighted_mean"}
        return softjax.linear_cross_entropy_outputs(logits, HIDDEN, LABELS, **options).loss

    def plain(of_classes):
        options = {"class_weights": of_classes, "reduction": "class_weighted_mean"}
        return softjax.cross_entropy(logits, LABELS, label_smoothing=0.1, **options)

    weights = jnp.array([1.0, 3.0, 2.0])
    of_scale = jnp.full(3, scale, jnp.float32)  # weights of 1e-45 are all equal
    for mean in (fused, outputs, plain):
        np.testing.assert_allclose(mean(of_scale), mean(jnp.ones(3)), rtol=1e-6)
        if 1e-38 < scale < 1e38:
            value, slope = jax.value_and_grad(mean)(scale * weights)
            expected, expected_slope = jax.value_and_grad(mean)(weights)
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            np.testing.assert_allclose(slope * scale, expected_slope, rtol=1e-4, atol=1e-7)


@pytest.mark.x64_once
def test_an_infinite_loss_of_a_tiny_weight_stays():
    losses, weights = jnp.array([1.0, jnp.inf]), jnp.array([3e38, 1e-40])
    assert softjax.weighted_mean(losses, weights) == np.inf
    assert softjax.weighted_mean(losses, jnp.array([1e-40, 0])) == 1
    assert softjax.weighted_mean(losses, jnp.zeros(2)) == 0


# Temperatures


@pytest.mark.x64_once
@pytest.mark.parametrize("empty", ["-inf", "where"])
@pytest.mark.parametrize("name", ["smooth_max", "smooth_min"])
def test_an_empty_row_does_not_feel_the_temperature(name, empty, dtype):
    sign = 1 if name == "smooth_max" else -1
    x = np.array([[1.0, 2.0], [3.0, 4.0]], dtype)
    where = np.array([[True, True], [empty == "-inf", empty == "-inf"]])
    if empty == "-inf":
        x[1] = -sign * np.inf
    smooth = getattr(softjax, name)

    def total(x, t):
        y = smooth(x, 1, where, temperature=t)
        return jnp.sum(jnp.where(jnp.isinf(y), 0, y))

    def of_row(x, t):
        return smooth(x, temperature=t)

    def derivatives(f):
        def gradient_and_second(x, t):
            return jax.grad(f, (0, 1))(x, t), jax.grad(jax.grad(f, 1), 1)(x, t)

        return jax.jit(gradient_and_second)

    (by_x, by_t), second = derivatives(total)(x, 0.7)
    (row_by_x, row_by_t), row_second = derivatives(of_row)(x[0], 0.7)
    np.testing.assert_allclose(by_t, row_by_t, rtol=1e-6)
    np.testing.assert_allclose(by_x, [row_by_x, [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(second, row_second, rtol=1e-5)


WITH_TEMPERATURE = {
    "softmax": lambda x, t: softjax.softmax(x, temperature=t),
    "log_softmax": lambda x, t: softjax.log_softmax(x, temperature=t),
    "softmin": lambda x, t: softjax.softmin(x, temperature=t),
    "smooth_max": lambda x, t: softjax.smooth_max(x, temperature=t),
    "smooth_min": lambda x, t: softjax.smooth_min(x, temperature=t),
    "smooth_max_bounds": lambda x, t: softjax.smooth_max_bounds(x, temperature=t)[1],
    "linear_cross_entropy": lambda x, t: softjax.linear_cross_entropy(
        x, jnp.eye(3, dtype=x.dtype), jnp.array(0), temperature=t
    ),
    "linear_logsumexp": lambda x, t: softjax.linear_logsumexp(
        x, jnp.eye(3, dtype=x.dtype), temperature=t
    ),
}


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_a_temperature_that_the_dtype_reads_as_0_is_refused(name, x64):
    f = WITH_TEMPERATURE[name]
    for dtype in ("float16", "float32") + ("float64",) * x64:
        x = jnp.array([1.0, 2.0, 3.0], dtype)
        least = float(np.finfo("float64" if dtype == "float64" else "float32").tiny)
        assert not np.isnan(f(x, least * 1.01)).any()
        with pytest.raises(ValueError, match=r"`temperature` must be >= .*, the smallest positive"):
            f(x, least * 0.9)
    traced = jax.jit(f)
    for t in (1e-40, 0.0, -1.0):
        assert np.isnan(traced(jnp.array([1.0, 2.0, 3.0], "float32"), np.float32(t))).all()


@pytest.mark.x64_once
def test_temper_by_any_finite_number():
    x, inf = jnp.array([1.0, 2.0, 3.0]), np.inf
    for alpha in (1e300, 1e38, 3e38):
        for k in (10.0, 1e30):
            np.testing.assert_array_equal(information.temper(k * x, alpha), [-inf, -inf, 0])
            np.testing.assert_array_equal(information.temper(k * x, -alpha), [0, -inf, -inf])
    where = jnp.array([True, True, False])
    np.testing.assert_array_equal(information.temper(x, 1e300, where=where), [-inf, 0, -inf])
    for alpha in (-3.0, 0.0, 2.5):
        want = oracles.log_softmax(alpha * np.float64(x))
        np.testing.assert_allclose(information.temper(x, alpha), want, rtol=1e-6)
        slope = jax.jacobian(information.temper, 1)(x, alpha)
        np.testing.assert_allclose(slope, x - np.exp(want) @ np.float64(x), rtol=1e-5, atol=1e-6)
    for alpha in (inf, np.nan):
        with pytest.raises(ValueError, match="`alpha` must be finite"):
            information.temper(x, alpha)


# Options that are one number


def fused(**options):
    return softjax.linear_cross_entropy(HIDDEN, HIDDEN, LABELS, **options)


def plain(**options):
    return softjax.cross_entropy(HIDDEN, LABELS, **options)


SCALAR_OPTIONS = [
    *((name, f) for name, f in WITH_TEMPERATURE.items()),
    *(
        (f"{f.__name__}: {option}", lambda x, v, f=f, option=option: f(**{option: v}))
        for f in (plain, fused)
        for option in ("label_smoothing", "z_loss")
    ),
    ("fused: softcap", lambda x, v: fused(softcap=v)),
    ("temper: alpha", lambda x, v: information.temper(x, v)),
]


@pytest.mark.x64_once
@pytest.mark.parametrize(("name", "f"), SCALAR_OPTIONS, ids=[name for name, _ in SCALAR_OPTIONS])
def test_an_option_is_one_number(name, f):
    """Of another shape it is refused, traced or not; of a bad value, refused or NaN."""
    x = jnp.array([1.0, 2.0, 3.0])
    for shape in ((1,), (3,), (3, 1)):
        for call in (f, jax.jit(f)):
            with pytest.raises(ValueError, match=r"^softjax\.\w.*must be a scalar, got shape \("):
                call(x, jnp.full(shape, 0.5))
    for bad in ("0.5", None, [0.5, [1]], 1j, object()):
        if bad is None and "softcap" in name:
            continue
        with pytest.raises((TypeError, ValueError), match=r"^softjax\."):
            f(x, bad)
    bad = [-1.0, np.nan] if "alpha" not in name else [np.nan]
    for value in bad + [2.0] * ("smoothing" in name):
        with pytest.raises(ValueError, match=r"^softjax\."):
            f(x, value)
        assert np.isnan(jax.jit(f)(x, value)).all()
    f(x, np.float64(0.5)), f(x, np.int64(1)), f(x, jnp.bfloat16(0.5))


# Masks of examples


MASKED = {
    "cross_entropy": lambda x, where: softjax.cross_entropy(x, LABELS, where=where),
    "information.entropy": lambda x, where: information.entropy(x, where=where),
    "information.cross_entropy": lambda x, where: information.cross_entropy(x, x, where=where),
    "information.kl_divergence": lambda x, where: information.kl_divergence(x, x, where=where),
    "information.surprisal": lambda x, where: information.surprisal(x, LABELS, where=where),
    "information.perplexity": lambda x, where: information.perplexity(x, where=where),
    "information.joint_entropy": lambda x, where: information.joint_entropy(x, 2, where=where),
    "information.temper": lambda x, where: information.temper(x, 0.5, where=where),
    "choice.plackett_luce_loss": lambda x, where: softjax.choice.plackett_luce_loss(
        x, LABELS[:, None], where=where
    ),
}


@pytest.mark.x64_once
@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_examples_is_not_taken_for_one_of_classes(name):
    f = MASKED[name]
    for call in (f, jax.jit(f)):
        with pytest.raises(
            ValueError, match=r"of rank 2, to broadcast .*, got shape \(3,\)\. .*weight"
        ):
            call(HIDDEN, jnp.array([True, True, False]))
    everything = f(HIDDEN, jnp.ones((3, 3), bool))
    for where in (True, np.True_, jnp.ones((1, 3), bool), jnp.ones((3, 1), bool)):
        np.testing.assert_array_equal(f(HIDDEN, where), everything)


@pytest.mark.x64_once
def test_a_normalizer_takes_a_mask_as_jax_nn_does():
    where = jnp.array([True, True, False])
    np.testing.assert_allclose(
        softjax.softmax(HIDDEN, where=where), jax.nn.softmax(HIDDEN, where=where), 1e-6
    )

"""Kernels [V, D] in all functions of a linear head; frozen arguments take no product."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import KINDS, mesh_of, put

import softjax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]

N, D, V = 16, 4, 12
RNG = np.random.default_rng(0)
HIDDEN, KERNEL, BIAS = (RNG.standard_normal(s) for s in ((N, D), (D, V), V))
LABELS, WEIGHTS = RNG.integers(V, size=N), RNG.random(N)
CLASS_WEIGHTS, DOT = RNG.random(V), RNG.standard_normal((D, V))
COTANGENT = RNG.standard_normal(N)


def mean(hidden, kernel, **options):
    return softjax.linear_cross_entropy(
        hidden, kernel, LABELS, BIAS, reduction="mean", weights=WEIGHTS, **options
    )


def losses(hidden, kernel, **options):
    return COTANGENT * softjax.linear_cross_entropy(
        hidden, kernel, LABELS, class_weights=CLASS_WEIGHTS, label_smoothing=0.1, **options
    )


def outputs(hidden, kernel, **options):
    parts = softjax.linear_cross_entropy_outputs(hidden, kernel, LABELS, BIAS, top_k=2, **options)
    top = parts.top_log_probabilities
    return COTANGENT * (parts.loss + parts.entropy + top[:, 0] * top[:, 1])


def logsumexp(hidden, kernel, **options):
    return COTANGENT * softjax.linear_logsumexp(hidden, kernel, **options)


def distilled(hidden, kernel, **options):
    teacher = softjax.LinearHead(2 * lax.stop_gradient(hidden), kernel)
    return COTANGENT * softjax.linear_distillation_loss(hidden, kernel, teacher, **options)


def curved(hidden, kernel, **options):
    dots = (hidden + 1, jnp.sin(kernel), None)
    of_hidden, of_kernel, _ = softjax.linear_cross_entropy_ggn_vp(hidden, kernel, dots, **options)
    return jnp.sum(of_hidden**2) + jnp.sum(of_kernel**2)


FUNCTIONS = (mean, losses, outputs, logsumexp, distilled, curved)


def derivatives(function, transposed, hidden, kernel, dot=DOT, **options):
    """Value, gradients and a Hessian product, as of a kernel [D, V]."""
    if transposed:
        kernel, dot = kernel.T, dot.T

    def f(hidden, kernel):
        return jnp.sum(function(hidden, kernel, transpose_kernel=transposed, **options))

    def gradient(kernel):
        return jax.value_and_grad(f, (0, 1))(hidden, kernel)

    (value, (of_hidden, of_kernel)), tangents = jax.jvp(gradient, (kernel,), (dot,))
    results = value, of_hidden, of_kernel, tangents[1][0], tangents[1][1]
    return tuple(a.T if transposed and n in (2, 4) else a for n, a in enumerate(results))


@cache
def of_columns(function):
    """The derivatives of a kernel [D, V]."""
    run = jax.jit(derivatives, static_argnums=(0, 1))
    return jax.device_get(run(function, False, HIDDEN, KERNEL))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_transposed_kernel_is_as_good(function):
    hidden, kernel = jnp.asarray(HIDDEN), jnp.asarray(KERNEL)
    desired = of_columns(function)
    options = [{}, {"max_temp_bytes": 1}] if function is mean else [{}]
    for each in options:
        actual = jax.jit(partial(derivatives, function, True, **each))(hidden, kernel)
        for a, b in zip(actual, desired, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [False, True])
def test_over_a_mesh(features, kind):
    """Classes over one axis, and the features over the axis of the rows (FSDP), or whole."""
    mesh, of_features = mesh_of(kind, d=2, c=2), "d" if features else None
    options = {}
    if kind == "auto":
        options = {"class_axis": "c", "feature_axis": of_features}
    functions = (mean, distilled, curved)
    expected = [of_columns(f) for f in functions]
    with jax.set_mesh(mesh):
        hidden, kernel = put(mesh, HIDDEN, "d", None), put(mesh, KERNEL.T, "c", of_features)
        for function, desired in zip(functions, expected, strict=True):

            @jax.jit
            def gradients(hidden, kernel, function=function):
                def f(hidden, kernel):
                    return jnp.sum(function(hidden, kernel, transpose_kernel=True, **options))

                return jax.value_and_grad(f, (0, 1))(hidden, kernel)

            value, (of_hidden, of_kernel) = gradients(hidden, kernel)
            for a, b in zip((value, of_hidden, of_kernel.T), desired, strict=False):
                np.testing.assert_allclose(np.asarray(a), b, rtol=1e-10, atol=1e-12)


def test_within_a_shard_map():
    mesh = mesh_of("auto", c=4)
    specs = P(), P("c", None)

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=(P(), specs))
    def over_devices(hidden, kernel):
        def f(hidden, kernel):
            return softjax.linear_cross_entropy(
                hidden, kernel, LABELS, transpose_kernel=True, class_axis="c", reduction="mean"
            )

        return jax.value_and_grad(f, (0, 1))(hidden, kernel)

    value, gradients = jax.jit(over_devices)(jnp.asarray(HIDDEN), jnp.asarray(KERNEL.T))
    plain = partial(softjax.linear_cross_entropy, labels=LABELS, reduction="mean")
    desired, expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(HIDDEN, KERNEL)
    np.testing.assert_allclose(value, desired, rtol=1e-12)
    np.testing.assert_allclose(gradients[0], expected[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gradients[1].T, expected[1], rtol=1e-10, atol=1e-12)


SHAPES = ((256, 48), (4096, 48), (256,))


def lowered(f, dtype=jnp.float32):
    *arrays, labels = (jax.ShapeDtypeStruct(s, dtype) for s in SHAPES)
    return jax.jit(f).lower(*arrays, jax.ShapeDtypeStruct(labels.shape, jnp.int32))


def of_loss(reduction, hidden, kernel, labels):
    return jnp.mean(
        softjax.linear_cross_entropy(
            hidden, kernel, labels, transpose_kernel=True, reduction=reduction
        )
    )


@pytest.mark.parametrize(
    ("reduction", "dtype"),
    [("none", "float32"), ("none", "bfloat16"), ("mean", "float32"), ("mean", "bfloat16")],
)
def test_no_copy_of_the_kernel_is_turned(reduction, dtype):
    f = jax.value_and_grad(partial(of_loss, reduction), (0, 1))
    text = lowered(f, dtype).compile().as_text()
    assert "[4096,48]" in text
    assert not re.search(r"\[48,4096\]", text)
    assert not re.search(r"transpose\(.*\[4096,48\]", text)


def products(f):
    """How many products are written in a program, whose pieces divide N and V."""
    return len(re.findall(r"= \S+ dot\(", lowered(f).compile().as_text()))


def test_what_is_frozen_costs_no_product():
    """By what is differentiated, or by stop_gradient; 3 for a mean and 4 for the losses in all."""

    def frozen_kernel(loss):
        return lambda h, w, y: loss(h, lax.stop_gradient(w), y)

    def frozen_hidden(loss):
        return lambda h, w, y: loss(lax.stop_gradient(h), w, y)

    for reduction, every in (("mean", 3), ("none", 4)):
        loss = partial(of_loss, reduction)
        assert products(jax.value_and_grad(loss, (0, 1))) == every
        for frozen, by in (
            (loss, 0),
            (loss, 1),
            (frozen_kernel(loss), (0, 1)),
            (frozen_hidden(loss), (0, 1)),
        ):
            assert products(jax.value_and_grad(frozen, by)) == every - 1


def test_the_error_names_the_option():
    h, w = jnp.zeros((4, 3)), jnp.zeros((3, 5))
    labels = jnp.zeros(4, jnp.int32)
    match = r"`kernel` must be of shape \(3, V\).* got shape \(5, 3\).*pass transpose_kernel=True"
    with pytest.raises(ValueError, match=match):
        softjax.linear_cross_entropy(h, w.T, labels)
    match = r"`kernel` must be of shape \(V, 3\).* got shape \(3, 5\).*pass transpose_kernel=False"
    with pytest.raises(ValueError, match=match):
        softjax.linear_cross_entropy(h, w, labels, transpose_kernel=True)
    with pytest.raises(ValueError, match=r"got shape \(7, 5\)\.$"):
        softjax.linear_cross_entropy(h, jnp.zeros((7, 5)), labels)
    with pytest.raises(TypeError, match="`transpose_kernel` must be True or False"):
        softjax.linear_logsumexp(h, w, transpose_kernel=1)
    with pytest.raises(ValueError, match=r"`bias` must be of shape \(5,\)"):
        softjax.linear_logsumexp(h, w.T, jnp.zeros(3), transpose_kernel=True)

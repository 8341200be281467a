"""The compiled linear_cross_entropy: no array of all logits, few products, few temporaries."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain_heads import plain_linear_cross_entropy

import softjax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

N, D, V = 384, 48, 1543  # all three differ, and V is a prime
HIDDEN = jax.ShapeDtypeStruct((N, D), jnp.float32)
KERNEL = jax.ShapeDtypeStruct((D, V), jnp.float32)
LABELS = jax.ShapeDtypeStruct((N,), jnp.int32)


def loss(reduction="mean", function=softjax.linear_cross_entropy, **options):
    def of(hidden, kernel, labels):
        return jnp.mean(function(hidden, kernel, labels, reduction=reduction, **options))

    return of


def loss_of_outputs(hidden, kernel, labels):
    return jnp.mean(softjax.linear_cross_entropy_outputs(hidden, kernel, labels).loss)


def loss_with_metrics(hidden, kernel, labels):
    outputs = softjax.linear_cross_entropy_outputs(hidden, kernel, labels, reduction="mean")
    hits = jnp.mean(outputs.top_classes[:, 0] == labels)
    return outputs.loss, (jnp.mean(outputs.logsumexp**2), jnp.mean(outputs.entropy), hits)


def gradient(f):
    return lambda h, w, y: jax.value_and_grad(f, (0, 1))(h, w, y)


def hessian_product(f):
    def of(h, w, y):
        return jax.jvp(lambda h, w: jax.grad(f, (0, 1))(h, w, y), (h, w), (h + 1, w + 1))[1]

    return of


def reverse_over_reverse(f):
    def of(h, w, y):
        def inner(h, w):
            a, b = jax.grad(f, (0, 1))(h, w, y)
            return jnp.sum(a**2) + jnp.sum(b**2)

        return jax.grad(inner, (0, 1))(h, w)

    return of


def scanned(f):
    def of(h, w, y):
        def step(w, _):
            return w - jax.grad(jax.checkpoint(f), 1)(h, w, y), None

        return jax.lax.scan(step, w, length=3)[0]

    return of


MODES = {
    "value": lambda f: f,
    "gradient": gradient,
    "jvp": lambda f: lambda h, w, y: jax.jvp(lambda h, w: f(h, w, y), (h, w), (h, w)),
    "jacfwd": lambda f: lambda h, w, y: jax.jacfwd(lambda t: f(h * t, w, y))(1.0),
    "hessian product": hessian_product,
    "reverse over reverse": reverse_over_reverse,
    "vmap": lambda f: (
        lambda h, w, y: jax.vmap(gradient(f), (0, None, 0))(
            h.reshape(2, N // 2, D), w, y.reshape(2, N // 2)
        )
    ),
    "scan and checkpoint": scanned,
}


# LLVM takes nearly half of the time, after the fusions and the temporaries are decided.
# Without its optimisations `compiled` gives the text and the memory that users have, to the letter.
WITHOUT_LLVM = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(f, *shapes):
    lowered = jax.jit(f).lower(*(shapes or (HIDDEN, KERNEL, LABELS)))
    return lowered.compile(compiler_options=WITHOUT_LLVM)


def largest_array(executable) -> int:
    """The most elements of any array of the program."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", executable.as_text())
    return max(int(np.prod(tuple(map(int, shape.split(","))))) for shape in shapes)


def products(executable) -> int:
    return len(re.findall(r"= \S+ dot\(", executable.as_text()))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mode", MODES)
def test_no_array_has_as_many_elements_as_the_logits(mode, reduction):
    assert largest_array(compiled(MODES[mode](loss(reduction)))) < N * V
    plain = loss(reduction, plain_linear_cross_entropy)
    if mode == "gradient":
        assert largest_array(compiled(MODES[mode](plain))) >= N * V


def test_only_what_is_asked_for_is_multiplied():
    """The pieces divide N and V here, so that each product is written once."""
    shapes = (
        jax.ShapeDtypeStruct((256, 64), jnp.float32),
        jax.ShapeDtypeStruct((64, 4096), jnp.float32),
        jax.ShapeDtypeStruct((256,), jnp.int32),
    )
    f = loss()
    assert products(compiled(f, *shapes)) == 1
    assert products(compiled(jax.grad(f, 0), *shapes)) == 2
    assert products(compiled(jax.grad(f, 1), *shapes)) == 2
    assert products(compiled(gradient(f), *shapes)) == 3
    assert products(compiled(gradient(loss("none")), *shapes)) == 4
    assert products(compiled(gradient(loss_of_outputs), *shapes)) == 4
    for by, count in (((0, 1), 3), (0, 2), (1, 2)):
        step = jax.value_and_grad(loss_with_metrics, by, has_aux=True)
        assert products(compiled(step, *shapes)) == count
    assert products(compiled(gradient(loss(max_temp_bytes=300_000)), *shapes)) == 4


@pytest.mark.compiled_quickly(False)
def test_temporaries_and_kernels_beside_those_of_the_plain_loss():
    """The bounds are those of the benchmark at (1024, 512, 50257), compiled and not run.

    XLA:CPU compiles each fusion by itself, so that their number is a measure of the time it takes.
    """
    shapes = (
        jax.ShapeDtypeStruct((1024, 512), jnp.float32),
        jax.ShapeDtypeStruct((512, 50257), jnp.float32),
        jax.ShapeDtypeStruct((1024,), jnp.int32),
    )
    for mode, bound in [("value", 0.1), ("gradient", 0.3), ("hessian product", 0.3)]:
        programs = [compiled(MODES[mode](f), *shapes) for f in (loss(), optax_loss)]
        ours, plain = (p.memory_analysis().temp_size_in_bytes for p in programs)
        assert ours <= bound * plain, mode
        ours, plain = (p.as_text().count(" fusion(") for p in programs)
        assert ours <= 2.1 * plain, mode


def optax_loss(hidden, kernel, labels):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
    return losses.mean()


@pytest.mark.compiled_quickly(False)
@pytest.mark.parametrize(("budget", "limit"), [(None, 0.7e9), (400_000_000, 0.4e9)])
def test_the_budget_bounds_the_temporaries_of_a_large_vocabulary(budget, limit):
    """Gemma 2 2B in bfloat16; its logits alone are 8 GB in float32, its kernel 1.2 GB."""
    shapes = (
        jax.ShapeDtypeStruct((8192, 2304), jnp.bfloat16),
        jax.ShapeDtypeStruct((2304, 256000), jnp.bfloat16),
        jax.ShapeDtypeStruct((8192,), jnp.int32),
    )
    executable = compiled(gradient(loss(max_temp_bytes=budget)), *shapes)
    assert executable.memory_analysis().temp_size_in_bytes < limit


def test_half_precision_has_no_float32_product():
    """Read before XLA:CPU widens what it cannot multiply."""
    hidden, kernel = (jax.ShapeDtypeStruct(s.shape, jnp.bfloat16) for s in (HIDDEN, KERNEL))
    for reduction in ("none", "mean"):
        text = jax.jit(gradient(loss(reduction))).lower(hidden, kernel, LABELS).as_text()
        operands = re.findall(r"stablehlo.dot_general.*: \((\S+), (\S+)\) ->", text)
        assert len(operands) >= 4
        assert all("bf16" in a and "bf16" in b for a, b in operands)


def test_the_backward_pass_keeps_inputs_and_gradients_only():
    f = loss("none")
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.standard_normal(s.shape), s.dtype) for s in (HIDDEN, KERNEL))
    labels = jnp.asarray(rng.integers(V, size=N))
    _, pullback = jax.vjp(lambda h, w: f(h, w, labels), hidden, kernel)
    assert sum(a.size for a in jax.tree.leaves(pullback)) < 2 * D * V + 2 * N * D + 16 * N

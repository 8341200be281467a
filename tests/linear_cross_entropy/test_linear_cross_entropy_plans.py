"""The sizes of the pieces for a large vocabulary, and the forms for every platform."""

import functools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_heads import plain_linear_cross_entropy

import softjax
from softjax._linear_cross_entropy import plans, readings, tops
from softjax._linear_cross_entropy.plans import Plan, Shapes
from softjax._platforms import tracing_for

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

GEMMA_2_2B, LLAMA_3_8B = (8192, 2304, 256000), (16384, 4096, 128256)
QWEN, WIDE = (32768, 2560, 128256), (32768, 4096, 131072)


def whole(rows, classes):
    """n rows by all classes at a time, and a quarter of them for the second derivative."""
    return Plan(rows, rows // 4, classes, keep=True)


@pytest.mark.parametrize(
    ("sizes", "half", "platform", "budget", "memory", "plan"),
    [
        (GEMMA_2_2B, True, "gpu", None, None, whole(1664, 256000)),
        (GEMMA_2_2B, True, "tpu", None, None, whole(1024, 256000)),
        (LLAMA_3_8B, True, "gpu", None, None, whole(3328, 128256)),
        (LLAMA_3_8B, True, "tpu", None, None, whole(2048, 128256)),
        (QWEN, True, "gpu", None, None, whole(3328, 128256)),
        (WIDE, True, "tpu", None, None, whole(3072, 131072)),
        (GEMMA_2_2B, False, "gpu", None, None, whole(2048, 256000)),
        (GEMMA_2_2B, False, "tpu", None, None, whole(1024, 256000)),
        # All rows at once take no more than half of them and the sum, which is needed no longer.
        ((2048, 4096, 128256), True, "tpu", None, None, Plan(2048, 2048, 128256, keep=True)),
        ((2048, 512, 128256), True, "tpu", None, None, whole(1024, 128256)),
        # What a device of 16 GB can spare, and one that has more than enough.
        (GEMMA_2_2B, True, "gpu", None, 2**34, whole(512, 256000)),
        (GEMMA_2_2B, True, "gpu", None, 2**40, whole(1664, 256000)),
        # The sum of the gradients of the kernel takes 2.4 GB of the 6.
        (GEMMA_2_2B, True, "gpu", 6 * 10**9, None, whole(1664, 256000)),
        # In float32 it is the gradient itself.
        (GEMMA_2_2B, False, "gpu", 2**30, None, whole(512, 256000)),
        # A TPU holds a copy of the kernel in bfloat16, 1.2 GB, which no plan avoids.
        (GEMMA_2_2B, False, "tpu", 4 * 10**9, None, whole(1024, 256000)),
        (GEMMA_2_2B, False, "tpu", 2**30, None, whole(512, 256000)),
        # All rows by some classes, and the logits of a row are multiplied again.
        (GEMMA_2_2B, True, "gpu", 10**9 // 2, None, Plan(8192, 8192, 6400, keep=False)),
        (GEMMA_2_2B, True, "tpu", 10**9 // 2, None, Plan(8192, 8192, 4992, keep=False)),
        # The gradient of hidden, of all rows in float32, would take more than all of it.
        (WIDE, True, "gpu", 10**9 // 2, None, Plan(464, 116, 2048, keep=True, apart=True)),
        # Few rows are one piece, and none is allowed.
        ((300, 64, 1000), True, "gpu", None, None, Plan(300, 300, 1000, keep=True)),
        ((0, 64, 1000), False, "tpu", None, None, Plan(1, 1, 1000, keep=True)),
    ],
)
def test_the_table_of_plans(sizes, half, platform, budget, memory, plan):
    shapes = Shapes(*sizes, 4, half)
    assert plans.plan_of_accelerator(shapes, platform, budget, memory, with_kernel=True) == plan


def test_a_budget_is_kept_and_used():
    """The arrays of a piece fit, and the pieces are as few as fit, but for a quarter."""
    for sizes in (GEMMA_2_2B, LLAMA_3_8B, QWEN, WIDE):
        shapes = Shapes(*sizes, 4, half=True)
        n, d, classes = sizes
        for budget in (10**8, 10**9, 10**10):
            for rows in plans.rows_of_values(shapes, budget)[1:]:
                row = 4 * (2 * classes + d)
                assert rows * row <= budget or rows == 1
                assert -(-n // rows) <= 1.5 * n * row / budget + 1
            with_kernel, without = (
                plans.plan_of_accelerator(shapes, "gpu", budget, None, with_kernel=kernel)
                for kernel in (True, False)
            )
            assert (without.keep, without.apart) == (True, False)
            assert without.rows >= with_kernel.rows or not with_kernel.keep


def test_a_budget_has_room_for_what_no_piece_makes_smaller():
    """The sum of the gradients of a kernel in half precision, and a TPU's copy in bfloat16."""
    half, wide = (Shapes(*GEMMA_2_2B, 4, half=of) for of in (True, False))
    kernel = 4 * math.prod(GEMMA_2_2B[1:])
    budget = 2**30
    of_values = plans.rows_of_values(half, budget)
    assert plans.rows_of_values(wide, budget + kernel // 2).tpu == of_values.tpu
    assert plans.rows_of_values(wide, budget).gpu == of_values.gpu
    alone = plans.rows_of_tangents(half, budget, 0)
    assert plans.rows_of_tangents(half, budget + kernel, 1) == alone
    assert plans.rows_of_tangents(wide, budget, 1).gpu == alone.gpu
    of_pairs = plans.rows_of_pairs(half, budget)
    assert plans.rows_of_pairs(half, budget + 2 * kernel, 2) == of_pairs
    # Where there is no such room, the pieces have the budget.
    assert plans.rows_of_tangents(half, budget, 1) == alone
    assert (
        plans.rows_of_values(wide, kernel // 2).tpu == plans.rows_of_values(half, kernel // 2).tpu
    )


N, D, V = 7, 3, 61
RNG = np.random.default_rng(0)
POINT = RNG.standard_normal((N, D)), RNG.standard_normal((D, V)), RNG.standard_normal(V)
DIRECTION = tuple(RNG.standard_normal(a.shape) for a in POINT)
LABELS = RNG.integers(V, size=N)
WEIGHTS = RNG.random(N)


def derivatives(loss, dtype, reduction, **options):
    """Value, gradient and Hessian times a vector of a weighted sum."""

    def f(hidden, kernel, bias):
        given = {"label_smoothing": 0.1, "softcap": 5.0, "weights": WEIGHTS} | options
        return jnp.sum(loss(hidden, kernel, LABELS, bias, reduction=reduction, **given))

    point, direction = ([jnp.asarray(a, dtype) for a in t] for t in (POINT, DIRECTION))
    gradient = jax.value_and_grad(f, (0, 1, 2))
    return jax.jit(lambda *point: jax.jvp(gradient, point, tuple(direction)))(*point)


@functools.cache
def of_the_plain_form(reduction):
    return jax.device_get(derivatives(plain_linear_cross_entropy, "float32", reduction))


@pytest.mark.parametrize(
    ("platform", "dtype", "budget", "plan"),
    [
        ("cuda", "float32", None, Plan(3, 1, V, keep=True)),
        ("cuda", "bfloat16", None, Plan(3, 1, V, keep=True)),
        ("tpu", "bfloat16", None, Plan(2, 1, V, keep=True)),
        ("tpu", "bfloat16", 2000, Plan(2, 1, V, keep=True)),
        ("tpu", "bfloat16", 300, Plan(N, N, 2, keep=False)),
        ("tpu", "float32", 150, Plan(1, 1, 1, keep=True, apart=True)),
        ("tpu", "bfloat16", 150, Plan(1, 1, 1, keep=True, apart=True)),
    ],
)
def test_the_form_of_every_platform(platform, dtype, budget, plan, monkeypatch):
    """The programs as they are lowered for a GPU and a TPU; in pieces of few rows."""
    for name, value in [
        ("FASTEST", 1600),
        ("FASTEST_WIDE", 1600),
        ("ENOUGH_ROWS", 2),
        ("FEWEST_ROWS_OF_SUMS", 2),
    ]:
        monkeypatch.setattr(plans, name, value)
    monkeypatch.setattr(plans, "TILE", 1)
    jax.clear_caches()
    shapes, name = Shapes(N, D, V, 4, dtype == "bfloat16"), {"cuda": "gpu", "tpu": "tpu"}
    found = plans.plan_of_accelerator(shapes, name[platform], budget, None, with_kernel=True)
    assert found == plan
    for reduction in ("sum", "none") if budget is None else ("sum",):
        desired = of_the_plain_form(reduction)
        with tracing_for(platform):
            actual = derivatives(
                softjax.linear_cross_entropy, dtype, reduction, max_temp_bytes=budget
            )
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
            size = max(np.max(np.abs(b)), 1)
            atol = (2e-6 if dtype == "float32" else 6 / 256) * size
            np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0, atol=atol)
    jax.clear_caches()


@pytest.mark.every_platform
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_gpu_and_a_tpu_read_the_logits_few_times(platform):
    """Sums over a row cost them a pass over the logits: of the loss, with metrics, of two heads."""
    wide = 997
    hidden, kernel = (jax.ShapeDtypeStruct(s, "bfloat16") for s in ((N, D), (D, wide)))
    labels = jnp.asarray(LABELS)

    def with_metrics(hidden, kernel):
        outputs = softjax.linear_cross_entropy_outputs(hidden, kernel, labels, reduction="mean")
        return outputs.loss, (outputs.entropy, outputs.top_classes)

    def distilled(hidden, kernel):
        teacher = jax.lax.stop_gradient(softjax.LinearHead(hidden, kernel))
        return softjax.linear_distillation_loss(hidden, kernel, teacher, reduction="mean")

    def loss(hidden, kernel):
        return softjax.linear_cross_entropy(hidden, kernel, labels, reduction="mean")

    of_label = int(platform == "tpu")  # which sums over a mask where a GPU gathers
    for function, has_aux, count in (
        (loss, False, 1 + of_label),
        (with_metrics, True, 2 + of_label),
        (distilled, False, 2),
    ):
        step = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=has_aux))
        text = step.trace(hidden, kernel).lower(lowering_platforms=(platform,)).as_text()
        reductions = re.findall(rf"stablehlo.reduce.*?tensor<\d+x{wide}x", text)
        assert len(reductions) == count, function.__name__
        assert not re.search(r"stablehlo.(scatter|sort)|top_k", text)


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_tops_and_excesses_of_one_pass(temperature):
    """Whatever is in a row: ties, infinities, NaN, nothing but -inf, a large offset."""
    x = np.concatenate([RNG.standard_normal((2, 301)) * 5, np.zeros((6, 301))]).astype(np.float32)
    x[1] += 1e4
    x[2] = -np.inf
    x[3, 5:] = -np.inf
    x[4, 7], x[5, 9], x[6, 3], x[7, 1:] = np.nan, np.inf, 200, -300
    operands = [jnp.asarray(a, jnp.float32) for a in (x, temperature) if a is not None]
    top, r = jax.jit(tops._in_one_pass)(*operands)
    with np.errstate(invalid="ignore"):
        d = (x.astype(np.float64) - x.max(-1, keepdims=True)) / (temperature or 1)
        expected = np.sum(np.exp(np.where(d == 0, -np.inf, d)), -1) + np.sum(d == 0, -1) - 1
    expected[2], expected[5] = -1, 0
    np.testing.assert_allclose(r, expected, rtol=2e-6, atol=0)
    finite = [0, 1, 3, 5, 6, 7]
    assert np.all(np.asarray(top)[finite] == x.max(-1)[finite])
    assert top[2] == jnp.finfo(jnp.float32).min


@pytest.mark.parametrize("form", [tops._two_in_one_pass, tops._two_in_two_passes])
def test_the_gap_between_the_excesses_of_close_heads(form):
    """Also where their tops differ, and where classes or whole rows are at -inf in one or both."""
    x = (RNG.standard_normal((7, 301)) * 5).astype(np.float32)
    y = x + np.float32(1e-4) * RNG.standard_normal(x.shape).astype(np.float32)
    y[1], y[5, 3], x[6, 2:] = y[1][::-1], 200, -300
    x[2, 5:] = y[3] = x[4] = y[4] = -np.inf
    of_x, of_y, gap = jax.jit(form)(x, y)
    terms = []
    for a, (top, r) in ((x, of_x), (y, of_y)):
        largest = np.maximum(a.max(-1), np.finfo(np.float32).min)
        np.testing.assert_array_equal(top, largest)
        terms.append(np.exp(a - largest[:, None].astype(np.float64)))
        np.testing.assert_allclose(r, terms[-1].sum(-1) - 1, rtol=2e-6, atol=1e-6)
    differences = terms[0] - terms[1]
    assert np.all(np.abs(gap - differences.sum(-1)) <= 1e-4 * np.abs(differences).sum(-1))


def test_the_best_class_of_one_pass_is_that_of_top_k():
    """Of equal logits the first, and NaN before every number."""
    x = RNG.integers(5, size=(6, 40)).astype(np.float32)
    x[1], x[2], x[3, 8], x[3, 9], x[4, :] = 0, -np.inf, np.nan, np.nan, -1
    terms = jnp.asarray(RNG.random(x.shape), jnp.float32)
    for a, b in zip(
        jax.jit(readings._sum_and_largest)(terms, x),
        jax.jit(partial(readings._sum_and_top_k, 1))(terms, x),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_two_heads_in_the_form_of_every_platform(divergence):
    hidden, kernel, bias = (jnp.asarray(a, jnp.float32) for a in POINT)
    probabilities = jnp.full((N, 2), 0.3)
    index = jnp.stack([LABELS, (LABELS + 1) % V], -1)
    teachers = (
        softjax.LinearHead(hidden + 1, kernel, 2 * bias),
        softjax.TopKLabels(index, probabilities),
    )

    def losses(hidden, kernel, bias, teacher):
        return softjax.linear_distillation_loss(
            hidden, kernel, teacher, bias, divergence=divergence, temperature=2.0, reduction="mean"
        )

    for teacher in teachers:
        step = jax.value_and_grad(losses, (0, 1, 2))
        desired = jax.jit(step)(hidden, kernel, bias, teacher)
        for platform in ("cuda", "tpu"):
            with tracing_for(platform):
                actual = jax.jit(step)(hidden, kernel, bias, teacher)
            for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-7, err_msg=platform)

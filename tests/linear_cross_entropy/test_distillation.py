"""linear_distillation_loss against float64: both kinds of teachers, all divergences and modes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import PartitionSpec as P
from meshes import KINDS, mesh_of, put

import softjax
from softjax._linear_cross_entropy.divergences import DIVERGENCES

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]

N, D, E, V, K = 9, 3, 4, 7, 3  # two pieces of rows
RNG = np.random.default_rng(0)
POINT = {
    "hidden": RNG.standard_normal((N, D)),
    "kernel": RNG.standard_normal((D, V)),
    "bias": RNG.standard_normal(V),
    "of_teacher": {
        "hidden": RNG.standard_normal((N, E)),
        "kernel": RNG.standard_normal((E, V)),
        "bias": RNG.standard_normal(V),
        "softcap": np.float64(4),
    },
    "softcap": np.float64(3),
    "temperature": np.float64(1.7),
}
DIRECTION = jax.tree.map(lambda a: RNG.standard_normal(np.shape(a)), POINT)
COTANGENT = RNG.standard_normal(N)
WEIGHTS = np.arange(N) / 4
INDEX = np.argsort(RNG.random((N, V)), -1)[:, :K]
PROBABILITIES = RNG.dirichlet(np.ones(K + 1), N)[:, :K]


def fused(point, divergence, **options):
    point = dict(point)
    teacher = point.pop("of_teacher", None)
    if teacher is None:
        teacher = softjax.TopKLabels(INDEX, point.pop("probabilities"))
    else:
        teacher = softjax.LinearHead(**teacher)
    beta = {"beta": 0.3} if divergence == "jensen_shannon" else {}
    return softjax.linear_distillation_loss(
        teacher=teacher, divergence=divergence, **beta, **point, **options
    )


def logits(hidden, kernel, bias, softcap, temperature):
    return softcap * jnp.tanh((hidden @ kernel + bias) / softcap) / temperature


def plain(point, divergence):
    """As one would write it, with all logits; of the top k, with the tail as one class more."""
    point = dict(point)
    t = point["temperature"]
    teacher, probabilities = point.pop("of_teacher", None), point.pop("probabilities", None)
    log_q = jax.nn.log_softmax(logits(**point))
    if teacher is None:
        q = jnp.take_along_axis(jnp.exp(log_q), INDEX, -1)
        log_p, log_q = (
            jnp.log(jnp.concatenate((a, 1 - a.sum(-1, keepdims=True)), -1))
            for a in (probabilities, q)
        )
    else:
        log_p = jax.nn.log_softmax(logits(**teacher, temperature=t))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if divergence == "forward_kl":
        terms = p * (log_p - log_q)
    elif divergence == "reverse_kl":
        terms = q * (log_q - log_p)
    else:
        log_m = jnp.log(0.3 * p + 0.7 * q)
        terms = 0.3 * p * (log_p - log_m) + 0.7 * q * (log_q - log_m)
    return t**2 * terms.sum(-1)


def without_head(tree, other):
    return {name: value for name, value in tree.items() if name != "of_teacher"} | other


POINTS = {
    "head": (POINT, DIRECTION),
    "top-k": tuple(
        without_head(tree, {"probabilities": a})
        for tree, a in ((POINT, PROBABILITIES), (DIRECTION, 0.1 * COTANGENT[:, None] + 0 * INDEX))
    ),
}


def weighted_mean(losses, weights):
    return jnp.sum(weights * losses) / jnp.sum(weights)


@pytest.mark.parametrize(
    ("divergence", "teacher", "reduction"),
    [
        *[(divergence, "head", "none") for divergence in DIVERGENCES],
        ("jensen_shannon", "top-k", "none"),
        ("forward_kl", "head", "mean"),
        ("reverse_kl", "top-k", "mean"),
    ],
)
def test_every_mode_is_that_of_the_plain_form(divergence, teacher, reduction):
    """By every array of both heads, softcaps and the temperature among them, and by the weights."""
    point, direction = (jax.tree.map(jnp.asarray, tree) for tree in POINTS[teacher])
    point, direction = (t | {"weights": jnp.asarray(COTANGENT**2)} for t in (point, direction))

    @partial(jax.jit, static_argnums=0)
    def modes(function, point):
        def losses(point):
            if function is fused:
                return fused(point, divergence, reduction=reduction)
            point = dict(point)
            weights = point.pop("weights")
            every = plain(point, divergence)
            return weights * every if reduction == "none" else weighted_mean(every, weights)

        def f(point):
            return jnp.sum(COTANGENT * losses(point))

        of_gradient = jax.jvp(jax.grad(f), (point,), (direction,))
        value, slope = jax.jvp(losses, (point,), (direction,))
        names = ("value", "jvp", "gradient", "jvp of grad")
        return dict(zip(names, (value, slope, *of_gradient), strict=True))

    actual, desired = modes(fused, point), modes(plain, point)
    for mode in desired:
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11, err_msg=mode),
            actual[mode],
            desired[mode],
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_heads_have_no_divergence_and_close_ones_all_its_digits(divergence, dtype):
    """Exactly 0 with zero gradients by both; at 1/1024 beside each other as in 200 bits."""
    rng = np.random.default_rng(1)
    hidden, kernel = (np.round(rng.standard_normal(s) * 4) / 4 for s in ((N, D), (D, V)))

    @jax.jit
    def run(hidden, kernel, other):
        def f(hidden, kernel, other):
            teacher = softjax.LinearHead(hidden, kernel, other)
            losses = softjax.linear_distillation_loss(
                hidden, kernel, teacher, jnp.zeros_like(other), divergence=divergence
            )
            return jnp.sum(losses), losses

        return jax.grad(f, (0, 1, 2), has_aux=True)(hidden, kernel, other)

    arrays = [jnp.asarray(a, dtype) for a in (hidden, kernel)]
    gradients, losses = run(*arrays, jnp.zeros(V, "float32"))
    for a in (losses, *gradients):
        np.testing.assert_array_equal(a, 0)

    other = (np.arange(V) % 3) / 1024
    _, losses = run(*arrays, jnp.asarray(other, "float32"))
    x = hidden @ kernel
    log_p, log_q = (oracles.log_softmax(oracles.exact(a)) for a in (x + other, x))
    desired = oracles.rounded(oracles.divergence(log_p, log_q, divergence))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, desired, rtol=2e-3)  # of logits rounded to 1/2^23


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_close_heads_keep_their_digits_at_every_temperature(divergence):
    """In float32 as in 200 bits, with the student's gradient, for logits that are exact."""
    rng = np.random.default_rng(2)
    student = 0.01 * rng.standard_normal((N, 101)).astype("float32")
    teacher = student + np.float32(1e-5) * rng.standard_normal(student.shape).astype("float32")
    hidden = np.eye(N, dtype="float32")

    @jax.jit
    def run(student, temperature):
        def f(student):
            losses = softjax.linear_distillation_loss(
                hidden,
                student,
                softjax.LinearHead(hidden, teacher),
                divergence=divergence,
                temperature=temperature,
            )
            return jnp.sum(losses), losses

        return jax.grad(f, has_aux=True)(student)

    for temperature in (1.0, 25.0, 1e6):
        gradient, losses = run(student, jnp.float32(temperature))
        t = oracles.exact(temperature)
        log_p, log_q = (oracles.log_softmax(oracles.exact(a) / t) for a in (teacher, student))
        desired = oracles.rounded(t**2 * oracles.divergence(log_p, log_q, divergence))
        np.testing.assert_allclose(losses, desired, rtol=1e-3)
        p, q = oracles._exp(log_p), oracles._exp(log_q)
        # The three divergences of close distributions have the same gradient, but for a factor.
        factor = 0.25 if divergence == "jensen_shannon" else 1
        desired = oracles.rounded(factor * t * (q - p))
        scale = np.linalg.norm(desired, axis=-1, keepdims=True)
        np.testing.assert_allclose(np.asarray(gradient) / scale, desired / scale, atol=2e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_tail_keeps_its_digits_where_both_are_sure(divergence):
    """In float32 both tails are below the rounding of 1 - P, down to e^-60 for the student."""
    margins = np.array([2.0, 12.0, 20.0, 60.0], np.float32)
    kernel = np.zeros((1, 6), np.float32)
    kernel[0, 2], kernel[0, 4] = 1, 0.75
    first = np.float32(1) - np.float32(2.0) ** -np.arange(2, 24, 7)
    probabilities = np.stack([first, (1 - first) / 4], -1).astype(np.float32)
    index = np.broadcast_to([2, 4], (4, 2))
    labels = softjax.TopKLabels(index, probabilities)

    x = oracles.exact(margins[:, None] * kernel)
    others = oracles.logsumexp(x[:, [0, 1, 3, 5]]) - oracles.logsumexp(x)
    log_q = np.concatenate((oracles.log_softmax(x)[:, [2, 4]], others[:, None]), -1)
    p = oracles.exact(probabilities)
    log_p = oracles._log(np.concatenate((p, 1 - p.sum(-1, keepdims=True)), -1))
    desired = oracles.rounded(oracles.divergence(log_p, log_q, divergence))
    actual = softjax.linear_distillation_loss(
        margins[:, None], kernel, labels, divergence=divergence
    )
    np.testing.assert_allclose(actual, desired, rtol=3e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "k"), [("float32", V), ("bfloat16", 4)])
def test_the_rounding_of_probabilities_is_no_tail(divergence, dtype, k):
    """It gives no +inf where a student has no other class, nor where a sure teacher leaves none."""
    rng, scale = np.random.default_rng(3), np.geomspace(0.1, 8, 64)[:, None]
    p = jnp.asarray(jax.nn.softmax(jnp.asarray(rng.standard_normal((64, k)) * scale)), dtype)
    hidden = rng.standard_normal((64, D)).astype("float32")
    kernel = rng.standard_normal((D, V)).astype("float32")
    of_class = np.where(np.arange(V) < k, 0, [0, 0, 0, 0, -np.inf, -1e9, -3e38])
    labels = softjax.TopKLabels(np.broadcast_to(np.arange(k), p.shape), p)

    @jax.jit
    def run(bias, p):
        def f(bias, p):
            losses = softjax.linear_distillation_loss(
                hidden, kernel, labels._replace(probabilities=p), bias, divergence=divergence
            )
            return jnp.sum(losses), losses

        return jax.grad(f, (0, 1), has_aux=True)(bias, p)

    listed = oracles.exact(np.asarray(p, "float64"))
    log_p = oracles._log(listed / listed.sum(-1, keepdims=True))
    x = oracles.exact((hidden @ kernel[:, :k]).astype("float64"))
    desired = oracles.rounded(oracles.divergence(log_p, oracles.log_softmax(x), divergence))
    gradients, losses = run(of_class.astype("float32"), p)
    np.testing.assert_allclose(losses, desired, rtol=2e-5, atol=1e-6)  # of logits in float32
    every, all_losses = run(np.zeros(V, "float32"), p)
    for a in jax.tree.leaves((gradients, every, all_losses)):
        assert jnp.all(jnp.isfinite(a))


def test_a_class_without_probability():
    """On one side its term is finite or +inf, as by the definition; on both it is nothing."""
    hidden, kernel = np.zeros((1, 1)), np.zeros((1, 4))
    out = np.array([0, 0, 0, -np.inf])
    student = partial(softjax.linear_distillation_loss, hidden, kernel)
    head = softjax.LinearHead(hidden, kernel, out)
    expected = {"forward_kl": np.log(4 / 3), "reverse_kl": np.inf}
    for divergence, value in expected.items():
        np.testing.assert_allclose(student(head, divergence=divergence), [value], rtol=1e-12)
        np.testing.assert_array_equal(student(head, out, divergence=divergence), 0)
    gradient = jax.grad(lambda b: jnp.sum(student(head, b)))(jnp.zeros(4))
    np.testing.assert_allclose(gradient, [-1 / 12, -1 / 12, -1 / 12, 1 / 4], rtol=1e-12)
    gradient = jax.grad(lambda b: jnp.sum(student(head, b, divergence="jensen_shannon")))
    np.testing.assert_array_equal(gradient(jnp.asarray(out)), 0)
    every = softjax.TopKLabels(np.arange(4)[None], np.full((1, 4), 0.25))
    np.testing.assert_allclose(student(every), [0], atol=1e-15)  # nothing left for the tail
    none = softjax.TopKLabels(np.zeros((1, 0), int), np.zeros((1, 0)))
    np.testing.assert_array_equal(student(none), 0)  # everything is the tail, of both


def test_reductions_and_who_takes_no_part():
    weights, losses = WEIGHTS, fused(POINT, "forward_kl")
    part = jax.tree.map(np.copy, POINT)
    part["hidden"][0] = part["of_teacher"]["hidden"][0] = np.nan
    for reduction, desired in (
        ("none", weights * losses),
        ("sum", weights @ losses),
        ("mean", weights @ losses / weights.sum()),
    ):
        actual = fused(part, "forward_kl", reduction=reduction, weights=weights)
        np.testing.assert_allclose(actual, desired, rtol=1e-12)
        packed = fused(part, "forward_kl", reduction=reduction, weights=weights, max_active=8)
        np.testing.assert_allclose(packed, desired, rtol=1e-12)
    with pytest.raises(ValueError, match=r"`max_active` must be at least 8, .* got 7"):
        fused(part, "forward_kl", weights=weights, max_active=7)
    np.testing.assert_allclose(fused(POINT, "forward_kl", reduction="mean"), jnp.mean(losses))
    small = fused(POINT, "forward_kl", max_temp_bytes=1)  # row by row
    np.testing.assert_allclose(small, losses, rtol=1e-12)
    shaped = jax.tree.map(lambda a: a.reshape(3, 3, -1) if a.shape[:1] == (N,) else a, POINT)
    np.testing.assert_array_equal(fused(shaped, "forward_kl").reshape(N), losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", POINTS)
def test_over_a_mesh(teacher, kind):
    """Rows over one axis and classes, which do not divide on an Auto mesh, over the other."""
    mesh = mesh_of(kind, rows=2, classes=2)
    point = dict(POINTS[teacher][0])
    if kind == "explicit":  # whose shards have to be equal
        pad = ((0, 0), (0, 1))
        point["kernel"], point["bias"] = np.pad(point["kernel"], pad), np.pad(point["bias"], (0, 1))
        if teacher == "head":
            head = dict(point["of_teacher"])
            head["kernel"], head["bias"] = np.pad(head["kernel"], pad), np.pad(head["bias"], (0, 1))
            point["of_teacher"] = head
    options = {"class_axis": "classes"} if kind == "auto" else {}

    def of_all_logits(point):
        mean = WEIGHTS @ plain(point, "reverse_kl") / WEIGHTS.sum()
        return WEIGHTS * plain(point, "jensen_shannon"), mean

    def over_the_mesh(point):
        losses = fused(point, "jensen_shannon", weights=WEIGHTS, max_active=8, **options)
        return losses, fused(point, "reverse_kl", weights=WEIGHTS, reduction="mean", **options)

    def gradient(function, point):
        def f(point):
            losses, mean = function(point)
            return jnp.sum(COTANGENT * losses) + 3 * mean, (losses, mean)

        return jax.jit(jax.grad(f, has_aux=True))(point)

    desired = gradient(of_all_logits, jax.tree.map(jnp.asarray, point))
    spec = P(None, "classes" if kind == "explicit" else None)
    placed = dict(jax.tree.map(jnp.asarray, point))
    with jax.set_mesh(mesh):
        placed["kernel"] = put(mesh, placed["kernel"], *spec)
        actual = gradient(over_the_mesh, placed)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), actual, desired)


def test_no_array_has_as_many_elements_as_the_logits():
    n, d, v = 384, 48, 1543
    hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((n, d), (d, v)))

    def loss(hidden, kernel, teacher):
        return softjax.linear_distillation_loss(hidden, kernel, teacher, reduction="mean")

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(
        hidden, kernel, softjax.LinearHead(hidden, kernel)
    )
    text = lowered.compile().as_text()
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    assert max(np.prod(tuple(map(int, shape.split(",")))) for shape in shapes) < n * v / 2
    operands = re.findall(r"stablehlo.dot_general.*: \((\S+), (\S+)\) ->", lowered.as_text())
    assert all("bf16" in a and "bf16" in b for a, b in operands)


def test_products():
    """Two of the logits, two of each head's gradients; two more of the logits for single losses."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 48), (48, 4096))]

    def products(of, reduction):
        def loss(hidden, kernel, teacher):
            losses = softjax.linear_distillation_loss(hidden, kernel, teacher, reduction=reduction)
            return jnp.mean(losses)

        arguments = *shapes, softjax.LinearHead(*shapes)
        text = jax.jit(of(loss)).lower(*arguments).compile().as_text()
        return len(re.findall(r"= \S+ dot\(", text))

    def of_student(loss):
        return jax.value_and_grad(loss, (0, 1))

    assert products(of_student, "mean") == 4
    assert products(of_student, "none") == 6
    assert products(lambda loss: jax.value_and_grad(loss, (0, 1, 2)), "mean") == 6
    assert products(lambda loss: jax.grad(loss, 1), "mean") == 3


def test_misuse():
    h, w = jnp.zeros((4, 3)), jnp.zeros((3, 5))
    head = softjax.LinearHead(h, w)

    def misuse(error, match, teacher=head, **options):
        with pytest.raises(error, match=r"softjax\.linear_distillation_loss: " + match):
            softjax.linear_distillation_loss(h, w, teacher, **options)

    misuse(ValueError, "`divergence` must be one of .*got 'kl'", divergence="kl")
    misuse(ValueError, "`reduction` must be one of", reduction="class_weighted_mean")
    for beta in (0, 1, 2):
        misuse(ValueError, r"`beta` must be in \(0, 1\)", beta=beta)
    misuse(TypeError, "`teacher` must be a LinearHead or TopKLabels, got ArrayImpl", h)
    misuse(ValueError, "`teacher` must be a head of examples", softjax.LinearHead(h[:2], w))
    misuse(ValueError, r"`teacher.kernel` must be of shape \(3, V\)", softjax.LinearHead(h, w.T))
    two = np.full((4, 2), 0.6)
    misuse(
        ValueError,
        "`teacher.probabilities`",
        softjax.TopKLabels(np.arange(8).reshape(4, 2) % 5, two),
    )
    every = softjax.TopKLabels(np.tile(np.arange(5), (4, 1)), np.full((4, 5), 0.1))
    misuse(ValueError, "`teacher.probabilities` must be .* sum to 1, since all", every)
    misuse(ValueError, "`teacher.indices`", softjax.TopKLabels(np.zeros((4, 2), int), two / 2))
    misuse(
        ValueError,
        r"`teacher` must be in \[0, 5\)",
        softjax.TopKLabels(two.astype(int) + 5, two),
    )
    run = jax.jit(lambda i, p: softjax.linear_distillation_loss(h, w, softjax.TopKLabels(i, p)))
    index = jnp.asarray([[0, 0], [0, 1], [0, 5], [0, 1]])
    losses = run(index, jnp.asarray(two) / jnp.asarray([[2.0], [2.0], [2.0], [1.0]]))
    np.testing.assert_array_equal(np.isnan(losses), [True, False, True, True])


def test_a_known_teacher_is_checked_under_a_trace_of_the_student():
    h, w, index = jnp.zeros((2, 3)), jnp.zeros((3, 4)), np.array([[0, 1], [2, 3]])

    def loss(share):
        teacher = softjax.TopKLabels(index, jnp.full((2, 2), share))
        return jax.jit(lambda h: softjax.linear_distillation_loss(h, w, teacher))(h)

    np.testing.assert_allclose(loss(0.5), np.log(2), rtol=1e-6)  # two of four classes
    with pytest.raises(ValueError, match=r"`teacher.probabilities`"):
        loss(0.75)

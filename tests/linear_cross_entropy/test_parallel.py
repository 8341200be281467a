"""linear_cross_entropy over a mesh of 8 devices, against its plain form on one."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from meshes import KINDS, mesh_of, put, structure
from plain_heads import plain_linear_cross_entropy

import softjax
from benchmarks import wire

pytestmark = pytest.mark.compiled_quickly

N, D, V = 16, 8, 24
RNG = np.random.default_rng(0)
HIDDEN, KERNEL, BIAS = (RNG.standard_normal(shape) for shape in ((N, D), (D, V), (V,)))
POINT = HIDDEN, KERNEL, BIAS
DIRECTION = tuple(RNG.standard_normal(a.shape) for a in POINT)
COTANGENT = RNG.standard_normal(N)
WEIGHTS = RNG.integers(3, size=N) / 2  # with zeros
INDICES = RNG.integers(V, size=(N, 2))
DENSE = RNG.random((N, V)) / V
OPTIONS = {
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 3.0,
    "temperature": 0.7,
    "class_weights": 0.5 + RNG.random(V),
}

# What is sharded over which axes: rows of hidden, features and classes of the kernel.
FORMS = {
    "data": ({"d": 8}, "d", None, None),
    "classes": ({"c": 8}, None, None, "c"),
    "both": ({"d": 2, "c": 4}, "d", None, "c"),
    "fsdp": ({"d": 2, "c": 4}, "d", "d", "c"),
}


def told(kind: str, features: str | None, classes: str | None) -> dict:
    """What a caller says about these shardings: on an Explicit mesh nothing."""
    if kind == "explicit":
        return {}
    return {"class_axis": classes or (), "feature_axis": features}


def derivatives(loss, *point) -> dict:
    direction = tuple(dot.reshape(a.shape) for dot, a in zip(DIRECTION, point, strict=True))
    gradient = jax.grad(loss, (0, 1, 2))
    slopes, product = jax.jvp(gradient, point, direction)
    value, value_dot = jax.jvp(loss, point, direction)
    return {"value": value, "jvp": value_dot, "gradient": slopes, "hessian product": product}


def in_every_mode(function, labels, cotangent, options, *point) -> dict:
    def loss(hidden, kernel, bias):
        return jnp.sum(cotangent * function(hidden, kernel, labels, bias, **options))

    return jax.jit(partial(derivatives, loss))(*point)


# Every option meets a mesh of either kind; the sums have one cotangent, the losses one each.
CASES = {
    "auto": (INDICES[:, 0], -1.5, {**OPTIONS, "reduction": "mean", "weights": WEIGHTS}),
    "explicit": (DENSE, COTANGENT, {**OPTIONS, "reduction": "none"}),
}


@cache
def on_one_device(kind: str) -> dict:
    labels, cotangent, options = CASES[kind]
    plain = plain_linear_cross_entropy
    return in_every_mode(plain, jnp.asarray(labels), cotangent, options, *POINT)


@pytest.mark.x64_once(True)
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("auto", "data"),
        ("auto", "fsdp"),
        ("explicit", "data"),
        ("explicit", "both"),
        ("explicit", "fsdp"),
    ],
)
def test_every_form_is_the_plain_loss_in_every_mode(kind, form):
    sizes, rows, features, classes = FORMS[form]
    mesh = mesh_of(kind, **sizes)
    labels, cotangent, options = CASES[kind]
    labels = put(mesh, labels, rows, *(classes,) * (labels.ndim - 1))
    placed = put(mesh, HIDDEN, rows), put(mesh, KERNEL, features, classes), put(mesh, BIAS, classes)
    with jax.set_mesh(mesh):
        if kind == "explicit":
            cotangent = put(mesh, cotangent, rows)
        options = options | told(kind, features, classes)
        ours = softjax.linear_cross_entropy
        actual = in_every_mode(ours, labels, cotangent, options, *placed)
    desired = on_one_device(kind)
    for mode in desired:
        close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12, err_msg=mode)
        jax.tree.map(close, actual[mode], desired[mode])
    if kind == "explicit":
        gradient = actual["gradient"]
        assert [jax.typeof(a).sharding for a in placed] == [
            jax.typeof(a).sharding for a in gradient
        ]


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_and_classes_need_not_divide(reduction):
    """13 rows over 2 devices, 21 classes over 4; top-k labels, an ignored class at -inf."""
    mesh = mesh_of("auto", d=2, c=4)
    n, v = 13, 21
    bias = BIAS[:v].copy()
    bias[5] = -np.inf
    labels = softjax.TopKLabels(
        np.where(INDICES[:n] == 5, 6, INDICES[:n]) % v, np.full((n, 2), 0.4)
    )
    arrays = HIDDEN[:n], KERNEL[:, :v], bias
    options = {"reduction": reduction, "softcap": 3.0, "z_loss": 0.1}

    def of(function, *point, **said):
        def loss(hidden, kernel, bias):
            losses = function(hidden, kernel, labels, bias, **options, **said)
            return jnp.sum(losses * COTANGENT[: losses.size].reshape(losses.shape))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*point)

    desired = of(plain_linear_cross_entropy, *arrays)
    placed = tuple(put(mesh, a) for a in arrays)
    actual = of(softjax.linear_cross_entropy, *placed, class_axis="c")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), actual, desired)


@pytest.mark.x64_once(True)
def test_the_outputs_are_those_of_one_device():
    """And their gradient; one class is out, and more are asked for than a shard has."""
    bias = BIAS.copy()
    bias[3] = -np.inf

    @jax.jit
    def of(labels, *point):
        def total(hidden, kernel, bias):
            outputs = partial(
                softjax.linear_cross_entropy_outputs,
                *(hidden, kernel, labels, bias),
                top_k=7,
                temperature=0.7,
                softcap=3.0,
            )
            found, beside = outputs(), outputs(reduction="mean")
            return sum(jnp.sum(jnp.sin(a)) for a in found[:4]) + beside.loss, (found, beside)

        return jax.grad(total, (0, 1), has_aux=True)(*point)

    mesh = mesh_of("explicit", d=2, c=4)
    placed = put(mesh, HIDDEN, "d"), put(mesh, KERNEL, None, "c"), put(mesh, bias, "c")
    with jax.set_mesh(mesh):
        actual = of(put(mesh, INDICES[:, 0], "d"), *placed)
    desired = of(INDICES[:, 0], HIDDEN, KERNEL, bias)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), actual, desired)


@pytest.mark.x64_once(True)
def test_the_gradient_of_a_gradient():
    """Through the maximum over the devices; two shards share the top of the first row."""
    kernel = KERNEL.copy()
    kernel[:, 20] = kernel[:, 3] = 2 * HIDDEN[0]

    def of(kernel, **said):
        def slope(kernel):
            return jax.grad(lambda w: jnp.sum(softjax.linear_logsumexp(HIDDEN, w, **said)))(kernel)

        return jax.jit(jax.grad(lambda kernel: jnp.sum(slope(kernel) ** 3)))(kernel)

    sharded = put(mesh_of("auto", c=8), kernel, None, "c")
    np.testing.assert_allclose(of(sharded, class_axis="c"), of(kernel), rtol=1e-9, atol=1e-11)


@pytest.mark.x64_once
@pytest.mark.parametrize("kind", KINDS)
def test_a_confident_row_keeps_its_digits_wherever_its_top_is(kind):
    """Row i has its top in shard i, its label there or elsewhere, or ties over all shards."""
    shards, width = 8, 3
    logits = np.full((3 * shards, shards * width), -17.0, np.float32)
    rows = np.arange(3 * shards)
    logits[rows, (rows * width + 1) % logits.shape[1]] = 0.0
    logits[2 * shards :, ::width] = 0.0  # one tie a shard, and the top of the row
    labels = (rows * width + 1 + 5 * width * (rows // shards == 1)) % logits.shape[1]
    hidden = np.eye(len(rows), dtype=np.float32)
    mesh = mesh_of(kind, c=8)
    kernel = put(mesh, logits, None, "c")
    said = told(kind, None, "c")

    def losses(kernel):
        return softjax.linear_cross_entropy(hidden, kernel, labels, **said)

    with jax.set_mesh(mesh):
        values, pullback = jax.vjp(losses, kernel)
        (slope,) = pullback(jnp.ones_like(values))
    np.testing.assert_allclose(values, oracles.cross_entropy(logits, labels), rtol=1e-6)
    expected = oracles.softmax(logits)
    others = np.where(np.arange(logits.shape[1]) == labels[:, None], 0, expected)
    expected[rows, labels] = -others.sum(-1)
    np.testing.assert_allclose(slope, expected, rtol=4e-6)


@pytest.mark.x64_once
def test_rows_that_take_no_part():
    """Ignored, of weight 0, without a class, with a bad label; NaN behind the first two."""
    mesh = mesh_of("auto", d=2, c=4)
    hidden = np.ones((4, 2), np.float32)
    hidden[:2] = np.nan
    labels = np.array([-100, 1, 2, 24])
    weights = np.array([1.0, 0.0, 1.0, 1.0], np.float32)
    kernel = np.zeros((2, 24), np.float32)

    @jax.jit
    def losses(hidden, kernel, labels, bias):
        def total(hidden, kernel):
            losses = softjax.linear_cross_entropy(
                hidden,
                kernel,
                labels,
                bias,
                ignore_index=-100,
                weights=weights,
                class_axis="c",
            )
            return jnp.sum(losses), losses

        return jax.grad(total, (0, 1), has_aux=True)(hidden, kernel)

    placed = put(mesh, hidden, "d"), put(mesh, kernel, None, "c"), put(mesh, labels, "d")
    (hidden_bar, _), values = losses(*placed, put(mesh, np.zeros(24, np.float32), "c"))
    np.testing.assert_allclose(values, [0, 0, np.log(24), np.nan], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(hidden_bar), [[False] * 2] * 3 + [[True] * 2])
    (hidden_bar, kernel_bar), values = losses(
        *placed[:2],
        put(mesh, np.array([-100, 1, 2, 3]), "d"),
        put(mesh, np.full(24, -np.inf, np.float32), "c"),
    )
    for zeros in (values, hidden_bar, kernel_bar):
        np.testing.assert_array_equal(zeros, np.zeros_like(zeros))


@pytest.mark.x64_once
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_beside_the_same_rounded_inputs_in_float32(reduction):
    mesh = mesh_of("auto", d=2, c=4)
    h, w = (jnp.asarray(a, jnp.bfloat16) for a in (HIDDEN, KERNEL))
    y = jnp.asarray(INDICES[:, 0], jnp.int32)

    def of(function, *point, **said):
        def loss(hidden, kernel):
            return jnp.mean(function(hidden, kernel, y, reduction=reduction, **said))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(*point)

    value, slopes = of(
        softjax.linear_cross_entropy, put(mesh, h, "d"), put(mesh, w, None, "c"), class_axis="c"
    )
    wide = (h.astype(jnp.float32), w.astype(jnp.float32))
    desired, expected = of(plain_linear_cross_entropy, *wide)
    np.testing.assert_allclose(value, desired, rtol=1e-6)
    for a, b in zip(slopes, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        atol = 4 / 256 * float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=atol)


# The figures: value and gradient at N = 1024, D = 256, V = 8192 in float32, on 8 devices.
LARGE = 1024, 256, 8192


def compiled_form(kind: str, form: str, **options):
    n, d, v = LARGE
    sizes, rows, features, classes = FORMS[form]
    mesh = mesh_of(kind, **sizes)
    arguments = (
        structure(mesh, (n, d), rows, None),
        structure(mesh, (d, v), features, classes),
        structure(mesh, (n,), rows, dtype="int32"),
    )
    said = told(kind, features, classes)

    def loss(hidden, kernel, labels):
        return softjax.linear_cross_entropy(
            hidden, kernel, labels, reduction="mean", **said, **options
        )

    gradients = arguments[0].sharding, arguments[1].sharding
    step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, gradients))
    return step.lower(*arguments).compile()


@pytest.mark.x64_once
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("auto", "data"),
        ("auto", "both"),
        ("auto", "fsdp"),
        ("explicit", "classes"),
        ("explicit", "both"),
        ("explicit", "fsdp"),
    ],
)
def test_what_goes_over_the_wire(kind, form):
    """dX over the classes, dW over the rows, once, and four numbers a row: nothing else.

    The latter come with each piece of rows, so that its logits serve the gradients too: three
    products. No array is larger than dX or dW, least of all the logits.
    """
    n, d, v = LARGE
    sizes, rows, features, classes = FORMS[form]
    of_rows, of_classes = (sizes[axis] if axis else 1 for axis in (rows, classes))
    program = compiled_form(kind, form)
    sent = wire.collectives(program)
    local_rows, local_classes = n // of_rows, v // of_classes
    assert wire.largest_array(program) == max(d * local_classes, local_rows * d)
    assert len(sent) <= 6
    assert all(one.times == 1 for one in sent if one.elements > 4 * local_rows)
    assert len(re.findall(r"= \S+ dot\(", program.as_text())) == 3
    kernel_bar = 4 * d * local_classes * 2 * (of_rows - 1) / of_rows
    hidden_bar = 4 * d * local_rows * 2 * (of_classes - 1) / of_classes
    numbers = 4 * 4 * local_rows * 2 * (of_classes - 1) / of_classes
    assert wire.wire_bytes(program) <= kernel_bar + hidden_bar + numbers + 16
    if len(sizes) == 2:
        assert wire.wire_bytes(program) <= 2.90e6
    gathered = [one for one in sent if one.kind == "all-gather"]
    if features is None:
        assert not gathered
    else:
        (kernel,) = gathered
        assert kernel.elements == d * local_classes
        assert [one.kind for one in sent].count("reduce-scatter") == 1


@pytest.mark.x64_once
def test_only_what_is_asked_for_is_sent():
    n, d, v = LARGE
    mesh = mesh_of("explicit", d=2, c=4)
    arguments = (
        structure(mesh, (n, d), "d", None),
        structure(mesh, (d, v), None, "c"),
        structure(mesh, (n,), "d", dtype="int32"),
    )
    loss = partial(softjax.linear_cross_entropy, reduction="sum")
    sizes = {}
    for name, f in {"value": loss, "hidden": jax.grad(loss), "kernel": jax.grad(loss, 1)}.items():
        sent = wire.collectives(jax.jit(f).lower(*arguments).compile())
        sizes[name] = max(one.elements for one in sent)
    assert sizes == {"value": 3 * n // 2, "hidden": n // 2 * d, "kernel": d * v // 4}


@pytest.mark.x64_once
def test_misuse_is_refused():
    h, w, y = np.ones((4, 2), np.float32), np.ones((2, 8), np.float32), np.zeros(4, int)
    loss = softjax.linear_cross_entropy
    with pytest.raises(ValueError, match="`class_axis` must be None where no argument is on"):
        loss(h, w, y, class_axis="c")
    mesh = mesh_of("auto", d=2, c=4)
    on = put(mesh, w)
    with pytest.raises(ValueError, match=r"`class_axis` must be among the Auto axes .*'d', 'c'"):
        loss(h, on, y, class_axis="model")
    with pytest.raises(TypeError, match="`class_axis` must be the name of an axis"):
        loss(h, on, y, class_axis=1)
    with pytest.raises(ValueError, match=r"`feature_axis` must be other axes than"):
        loss(h, on, y, class_axis="c", feature_axis="c")
    with pytest.raises(ValueError, match="`feature_axis` must be over devices that divide the 2"):
        loss(h, on, y, class_axis="d", feature_axis="c")
    explicit = put(mesh_of("explicit", c=8), w)
    with pytest.raises(ValueError, match="`class_axis` must be None for an Explicit axis"):
        loss(h, explicit, y, class_axis="c")


@pytest.mark.x64_once
def test_a_batch_on_an_axis_of_the_examples_is_refused():
    """Whichever argument has it; without the name of an axis the batch is computed."""
    hidden, labels = np.stack([HIDDEN, HIDDEN + 1]).astype(np.float32), INDICES.T

    def loss(hidden, labels):
        return softjax.linear_cross_entropy(hidden, KERNEL, labels, reduction="mean", class_axis=())

    with jax.set_mesh(mesh_of("auto", d=2, e=4)):
        for step, in_axes in (jax.grad(loss), (0, None)), (jax.jit(loss), (None, 0)):
            every = zip((hidden, labels), in_axes, strict=True)
            operands = [a[0] if axis is None else a for a, axis in every]
            with pytest.raises(ValueError, match=r"`spmd_axis_name` must be .* got \('d',\)"):
                jax.vmap(step, in_axes, spmd_axis_name="d")(*operands)
        each = jax.vmap(loss)(hidden, labels)
        expected = [loss(*one) for one in zip(hidden, labels, strict=True)]
    np.testing.assert_allclose(each, expected, rtol=1e-6)


@pytest.mark.x64_once
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_auto_mesh_shares_the_examples_unasked(reduction):
    """Over the wire goes the gradient of the kernel, and neither hidden nor the kernel."""
    n, d, v = LARGE
    mesh = mesh_of("auto", d=8)
    arguments = (
        structure(mesh, (n, d), "d", None),
        structure(mesh, (d, v)),
        structure(mesh, (n,), "d", dtype="int32"),
    )

    def loss(hidden, kernel, labels):
        losses = softjax.linear_cross_entropy(hidden, kernel, labels, reduction=reduction)
        return jnp.mean(losses)

    gradients = arguments[0].sharding, arguments[1].sharding
    step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, gradients))
    (sent,) = wire.collectives(step.lower(*arguments).compile())
    assert (sent.kind, sent.times) == ("all-reduce", 1)
    assert sent.elements <= d * v + 1


@pytest.mark.x64_once
def test_what_an_auto_mesh_may_hide_is_asked_for():
    """A trace cannot see which of several axes the classes are over; outside of one it is seen."""
    mesh = mesh_of("auto", d=2, c=4)
    arrays = HIDDEN[:13].astype("f4"), KERNEL.astype("f4"), INDICES[:13, 0]
    losses = softjax.linear_cross_entropy(*arrays)
    hidden, kernel, labels = (put(mesh, arrays[0]), put(mesh, arrays[1], None, "c"), arrays[2])
    loss = softjax.linear_cross_entropy
    np.testing.assert_allclose(loss(hidden, kernel, labels), losses, rtol=1e-5)
    with pytest.warns(
        UserWarning, match=r"linear_cross_entropy: .* pass their axis as `class_axis`"
    ) as warned:
        actual = jax.jit(lambda *a: loss(*a))(hidden, kernel, labels)
    assert warned[0].filename == __file__
    np.testing.assert_allclose(actual, losses, rtol=1e-5)


@pytest.mark.x64_once
def test_a_mesh_that_no_trace_saw_is_warned_of(recwarn):
    """`in_shardings` are for the compiler alone: each device would compute all rows, in silence."""
    mesh = mesh_of("auto", d=8)
    arguments = (
        structure(mesh, HIDDEN.shape, "d", None),
        structure(mesh, KERNEL.shape),
        structure(mesh, HIDDEN.shape[:1], "d", dtype="int32"),
    )
    shardings = tuple(a.sharding for a in arguments)
    unplaced = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments]

    def lowered(arguments, **placed):
        loss = jax.grad(lambda *a: softjax.linear_cross_entropy(*a, reduction="mean"), (0, 1))
        jax.jit(loss, **placed).lower(*arguments)

    lowered(unplaced)
    lowered(arguments)
    with jax.set_mesh(mesh):
        lowered(unplaced, in_shardings=shardings)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="for 8 devices, .* every device computes the losses"):
        lowered(unplaced, in_shardings=shardings)

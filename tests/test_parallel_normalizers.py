"""The normalizers and losses on logits sharded over 8 devices, against one device."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType
from meshes import KINDS, mesh_of, put, structure

import softjax
from benchmarks import wire

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

N, K = 16, 264  # 33 classes a device of eight, 66 of four
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.standard_normal((N, K))).astype(np.float32)
LABELS = RNG.integers(K, size=N).astype(np.int32)
MASK = RNG.random((N, K)) < 0.7
FACTORS = RNG.standard_normal(K).astype(np.float32) ** 2
WEIGHTS = RNG.standard_normal((N, K)).astype(np.float32)
TOP_K = np.array([[0.5, 0.25]] * N, np.float32)

FUNCTIONS = {
    "logsumexp": lambda x, y, q: softjax.logsumexp(x, -1),
    "logsumexp of all": lambda x, y, q: softjax.logsumexp(x),
    "logsumexp of columns": lambda x, y, q: softjax.logsumexp(x, 0),
    "logsumexp with b": lambda x, y, q: softjax.logsumexp(x, -1, b=FACTORS),
    "logmeanexp": lambda x, y, q: softjax.logmeanexp(x, -1),
    "softmax": lambda x, y, q: softjax.softmax(x, temperature=0.7),
    "log_softmax": lambda x, y, q: softjax.log_softmax(x, where=MASK),
    "smooth_max": lambda x, y, q: softjax.smooth_max(x, -1, temperature=0.5),
    "index": lambda x, y, q: softjax.cross_entropy(x, y),
    "options": lambda x, y, q: softjax.cross_entropy(
        x, y, where=MASK, label_smoothing=0.1, z_loss=0.1, class_weights=FACTORS, ignore_index=3
    ),
    "distribution": lambda x, y, q: softjax.cross_entropy(x, q),
    "top-k": lambda x, y, q: softjax.cross_entropy(
        x, softjax.TopKLabels(jnp.stack([y, K - 1 - y], -1), TOP_K)
    ),
}


def values_and_gradients(names, x, y, q) -> dict:
    """Of some functions, in one program."""
    results = {}
    for name in names:
        function = FUNCTIONS[name]
        value, pullback = jax.vjp(partial(function, y=y, q=q), x)
        results[name] = value, pullback(1 / (1 + jnp.abs(value)))[0]
    return results


@cache
def on_one_device() -> dict:
    return jax.jit(partial(values_and_gradients, FUNCTIONS))(LOGITS, LABELS, np.abs(WEIGHTS))


# On Auto axes one program serves, whatever is sharded.
@pytest.mark.parametrize(
    ("kind", "sizes", "rows", "classes", "names"),
    [
        ("auto", {"d": 2, "c": 4}, "d", "c", FUNCTIONS),
        ("explicit", {"d": 2, "c": 4}, "d", "c", FUNCTIONS),
        ("explicit", {"d": 8}, "d", None, ("logsumexp", "index", "top-k")),
    ],
)
def test_what_is_sharded_changes_no_result(kind, sizes, rows, classes, names):
    """To rounding: float32 sums in another order."""
    mesh = mesh_of(kind, **sizes)
    x, q = (put(mesh, a, rows, classes) for a in (LOGITS, np.abs(WEIGHTS)))
    actual = jax.jit(partial(values_and_gradients, names))(x, put(mesh, LABELS, rows), q)
    for name in names:
        for a, b in zip(actual[name], on_one_device()[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=4e-6, atol=1e-6, err_msg=name)
    for name in ("logsumexp", "index"):
        value, gradient = actual[name]
        assert gradient.sharding.is_equivalent_to(x.sharding, 2)
        assert value.sharding.is_equivalent_to(put(mesh, LABELS, rows).sharding, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_without_jit(kind):
    mesh = mesh_of(kind, d=2, c=4)
    x, y = put(mesh, LOGITS, "d", "c"), put(mesh, LABELS, "d")
    np.testing.assert_allclose(
        softjax.cross_entropy(x, y), oracles.cross_entropy(LOGITS, LABELS), rtol=1e-6
    )
    np.testing.assert_allclose(softjax.softmax(x), oracles.softmax(LOGITS), rtol=4e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dominated_row_keeps_its_digits_wherever_its_top_is(kind):
    x = np.full((24, 64), -20.0, np.float32)
    rows = np.arange(24)
    x[rows, 3 * rows % 64] = 0
    x[16:20, :] = -np.inf  # a row of nothing, and three with one class
    x[17:20, [5, 30, 63]] = np.diag([1.0, 2.0, 3.0])
    x[17:20][x[17:20] == 0] = -np.inf
    x[20:, ::8] = 0  # a tie a shard
    labels = np.where(np.arange(24) % 2, x.argmax(1), 7).astype(np.int32)
    mesh = mesh_of(kind, c=8)

    @jax.jit
    def of(x, labels):
        losses, pullback = jax.vjp(lambda x: softjax.cross_entropy(x, labels), x)
        return softjax.logsumexp(x, -1), losses, pullback(jnp.ones_like(losses))[0]

    lse, losses, slopes = of(put(mesh, x, None, "c"), put(mesh, labels))
    expected_m, expected_r = oracles.excess(x)
    np.testing.assert_allclose(lse, (expected_m + np.log1p(expected_r))[:, 0], rtol=4e-6)
    expected = np.where(np.arange(24) == 16, 0, oracles.cross_entropy(x, labels))
    np.testing.assert_allclose(losses, expected, rtol=4e-6)
    p = np.where(np.isneginf(x), 0, oracles.softmax(x))
    p[16] = 0
    others = np.where(np.arange(64) == labels[:, None], 0, p)
    is_label = (np.arange(64) == labels[:, None]) & (np.arange(24) != 16)[:, None]
    expected = np.where(is_label, -others.sum(1, keepdims=True), p)
    np.testing.assert_allclose(slopes, expected, rtol=4e-6)


def losses_and_gradient(x, y):
    losses, pullback = jax.vjp(lambda x: softjax.cross_entropy(x, y), x)
    return losses, pullback(jnp.ones_like(losses))[0]


COUNTED = {
    "logsumexp": (3, lambda x, y: softjax.logsumexp(x, -1)),
    "softmax": (2, lambda x, y: softjax.softmax(x)),
    "log_softmax": (3, lambda x, y: softjax.log_softmax(x)),
    "smooth_max": (5, lambda x, y: softjax.smooth_max(x, -1, temperature=0.5)),
    "cross_entropy": (3, lambda x, y: softjax.cross_entropy(x, y)),
    "and its gradient": (3, losses_and_gradient),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COUNTED)
def test_how_many_numbers_a_row_go_over_the_wire(kind, name):
    most, function = COUNTED[name]
    n, k = 1024, 8192
    mesh = mesh_of(kind, d=2, c=4)
    x, y = structure(mesh, (n, k), "d", "c"), structure(mesh, (n,), "d", dtype="int32")
    sent = wire.collectives(jax.jit(function).lower(x, y).compile())
    assert {(one.kind, one.devices, one.times) for one in sent} == {("all-reduce", 4, 1)}
    assert sum(one.elements for one in sent) <= most * n // 2


ALONG = {
    "logsumexp": softjax.logsumexp,
    "logmeanexp": softjax.logmeanexp,
    "softmax": softjax.softmax,
    "log_softmax": softjax.log_softmax,
}


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_classes_are_whole_nothing_is_sent(kind):
    mesh = mesh_of(kind, d=2, s=2, c=2)
    x = structure(mesh, (8, 24, 64), "d", None, "c")
    labels = structure(mesh, (8, 64), "d", "c", dtype="int32")

    def of(x, labels):
        functions = [partial(f, axis=1) for f in ALONG.values()]
        functions.append(partial(softjax.cross_entropy, labels=labels, axis=1))
        pairs = [jax.vjp(f, x) for f in functions]
        return [(value, pullback(jnp.ones_like(value))) for value, pullback in pairs]

    assert not wire.collectives(jax.jit(of).lower(x, labels).compile())


@pytest.mark.parametrize(
    ("axis", "spec"),
    [
        (-1, ("d", "s", "c")),
        (1, ("d", "s", "c")),
        (-3, (("d", "c"), None, "s")),
        ((-1, 0), ("d", None, ("s", "c"))),
        (None, ("d", "s", "c")),
        (-1, ("d", "s", None)),
    ],
)
def test_any_axes_sharded_and_any_along_which(axis, spec):
    """On Explicit axes: as on one device; numbers a row are all that is sent, if anything.

    XLA sums over one axis of the array after the other.
    """
    shape, sizes = (4, 8, 16), {"d": 2, "s": 2, "c": 2}
    rng = np.random.default_rng(1)
    x, q = rng.standard_normal(shape).astype(np.float32), rng.random(shape).astype(np.float32)
    functions = {name: partial(f, axis=axis) for name, f in ALONG.items()}
    along = range(3) if axis is None else [a % 3 for a in np.atleast_1d(axis)]
    mesh = mesh_of("explicit", **sizes)
    labels, placed = {}, {}
    if isinstance(axis, int):
        functions["index"] = functions["distribution"] = partial(softjax.cross_entropy, axis=axis)
        rows = [entry for i, entry in enumerate(spec) if i not in along]
        y = rng.integers(shape[axis], size=np.delete(shape, axis)).astype(np.int32)
        labels = {"index": (y,), "distribution": (q,)}
        placed = {"index": (put(mesh, y, *rows),), "distribution": (put(mesh, q, *spec),)}

    def of(x, labels):
        results = {}
        for name, f in functions.items():
            value, pullback = jax.vjp(lambda x, f=f, name=name: f(x, *labels.get(name, ())), x)
            results[name] = value, pullback(1 / (1 + jnp.abs(value)))[0]
        return results

    on_mesh = put(mesh, x, *spec)
    program = jax.jit(of).lower(on_mesh, placed).compile()
    desired = jax.jit(of)(x, labels)
    for name, (value, gradient) in program(on_mesh, placed).items():
        np.testing.assert_allclose(value, desired[name][0], rtol=4e-6, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(gradient, desired[name][1], rtol=4e-6, atol=1e-6, err_msg=name)
        assert gradient.sharding == on_mesh.sharding

    sent = wire.collectives(program)
    assert {one.kind for one in sent} <= {"all-reduce"}
    devices = [math.prod(sizes[name] for name in entry or ()) for entry in spec]
    sums = sum(devices[i] > 1 for i in along)
    rows = math.prod(shape[i] // devices[i] for i in range(3) if i not in along)
    most = 24 + (14 if isinstance(axis, int) else 0)  # of the four functions, and of two losses
    assert sum(one.elements for one in sent) <= sums * (most * rows + 1)


def test_an_odd_number_of_rows_is_not_split_on_explicit_axes():
    mesh = jax.make_mesh((3,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:3])
    for spec in [("d", None), (None, "d")]:
        y = jax.eval_shape(lambda x: softjax.logsumexp(x, -1), structure(mesh, (9, 6), *spec))
        assert y.shape == (9,)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_on_a_mesh(kind):
    mesh = mesh_of(kind, d=2, c=4)
    with jax.set_mesh(mesh):
        logits = put(mesh, np.zeros((0, 8), np.float32), "d", "c")
        labels = put(mesh, np.zeros(0, np.int32), "d")
        loss, slope = jax.vjp(lambda x: softjax.cross_entropy(x, labels), logits)
        assert (loss.shape, slope(loss)[0].shape) == ((0,), (0, 8))
        assert softjax.logsumexp(logits, -1).shape == (0,)
        np.testing.assert_array_equal(softjax.logsumexp(logits, 0), np.full(8, -np.inf))


@pytest.mark.x64_once
def test_a_mesh_axis_of_size_1_splits_nothing():
    """As on a mesh for data and model parallelism with one device per model."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 5)).astype("f4"), rng.integers(5, size=16)
    mesh = mesh_of("explicit", d=8, c=1)

    def loss(x):
        return jnp.mean(softjax.cross_entropy(x, y, label_smoothing=0.1))

    with jax.set_mesh(mesh):
        placed = put(mesh, x, "d", "c")
        over = softjax.cross_entropy(placed, y), jax.grad(loss)(placed)
    for ours, alone in zip(over, (softjax.cross_entropy(x, y), jax.grad(loss)(x)), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-7)

"""max_active: inactive examples take no product, and no active example is dropped."""

import re
from contextlib import nullcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import KINDS, mesh_of, put

import softjax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]

N, D, V, MOST = 24, 3, 7, 16
RNG = np.random.default_rng(0)
HIDDEN, KERNEL = RNG.standard_normal((N, D)), RNG.standard_normal((D, V))
LABELS = np.where(RNG.random(N) < 0.3, -1, RNG.integers(V, size=N))
WEIGHTS = RNG.random(N) * (RNG.random(N) < 0.8)
ACTIVE = (LABELS >= 0) & (WEIGHTS > 0)
HIDDEN[~ACTIVE] = np.nan
OPTIONS = {"ignore_index": -1, "class_weights": RNG.random(V), "label_smoothing": 0.1}


def run(reduction, hidden=HIDDEN, kernel=KERNEL, labels=LABELS, weights=WEIGHTS, **options):
    def f(hidden, kernel, weights):
        losses = softjax.linear_cross_entropy(
            hidden, kernel, labels, weights=weights, reduction=reduction, **OPTIONS, **options
        )
        return jnp.sum(losses * jnp.arange(1.0, 1 + losses.size)), losses

    arguments = map(jnp.asarray, (hidden, kernel, weights))
    return jax.jit(jax.grad(f, (0, 1), has_aux=True))(*arguments)


@cache
def without_packing(reduction):
    return jax.device_get(run(reduction))


def same(actual, desired):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean", "class_weighted_mean"])
def test_results_are_those_without_packing(reduction):
    assert MOST < N
    assert ACTIVE.sum() <= MOST
    desired = without_packing(reduction)
    same(run(reduction, max_active=MOST), desired)
    same(run(reduction, max_active=int(ACTIVE.sum())), desired)


@pytest.mark.parametrize("kind", KINDS)
def test_over_a_mesh_each_device_has_room_for_its_share(kind):
    mesh = mesh_of(kind, rows=2, classes=1)
    desired = {reduction: without_packing(reduction) for reduction in ("none", "mean")}
    with jax.set_mesh(mesh):
        hidden = put(mesh, jnp.asarray(HIDDEN), "rows")
        options = {"class_axis": ()} if kind == "auto" else {}
        for reduction in desired:
            packed = run(reduction, hidden, max_active=20, **options)
            same(packed, desired[reduction])


def test_known_rows_for_which_a_device_has_no_room_are_an_error():
    """For every placement of the rows: NaN without values is an error with them, and only it."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    hidden, kernel = jnp.ones((4, 8, D)), jnp.ones((D, V))
    options = {"ignore_index": -1, "reduction": "mean"}
    with jax.set_mesh(mesh):
        for spec in (P("a", "b"), P(None, ("a", "b")), P("b", "a")):
            h = jax.device_put(hidden, NamedSharding(mesh, P(*spec, None)))
            for active in (np.eye(4, 8), np.arange(32).reshape(4, 8) < 9):
                labels = jnp.asarray(np.where(active, 1, -1))
                for most in (9, 17):
                    f = partial(softjax.linear_cross_entropy, max_active=most, **options)
                    bad = bool(np.isnan(jax.jit(f)(h, kernel, labels)))
                    with (
                        pytest.raises(ValueError, match="over 8 devices") if bad else nullcontext()
                    ):
                        f(h, kernel, labels)


def test_too_many_are_an_error_or_nan():
    count = int(ACTIVE.sum())

    def loss(labels, weights, **options):
        return softjax.linear_cross_entropy(
            HIDDEN, KERNEL, labels, weights=weights, ignore_index=-1, **options
        )

    with pytest.raises(ValueError, match=f"`max_active` must be at least {count}, .* got 3"):
        loss(LABELS, WEIGHTS, max_active=3)
    with pytest.raises(ValueError, match=f"`max_active` must be at least {N}"):
        softjax.linear_cross_entropy(HIDDEN, KERNEL, np.abs(LABELS), max_active=N - 1)
    with pytest.raises(ValueError, match="`max_active` must be >= 1"):
        loss(LABELS, WEIGHTS, max_active=0)
    with pytest.raises(TypeError, match="`max_active` must be an integer"):
        loss(LABELS, WEIGHTS, max_active=3.0)
    gradients, value = run("sum", max_active=count - 1)
    assert np.isnan(value)
    assert np.all(np.isnan(gradients[1]))
    losses = jax.jit(lambda y: loss(y, WEIGHTS, max_active=count - 1))(jnp.asarray(LABELS))
    assert np.any(np.isnan(losses))


def test_every_product_is_of_the_rows_that_there_is_room_for():
    n, most = 1024, 128

    def f(hidden, kernel, labels):
        return softjax.linear_cross_entropy(
            hidden, kernel, labels, ignore_index=-1, reduction="mean", max_active=most
        )

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, 16), (16, 512))]
    labels = jax.ShapeDtypeStruct((n,), jnp.int32)
    compiled = jax.jit(jax.grad(f, (0, 1))).lower(*shapes, labels).compile()
    flops = compiled.cost_analysis()["flops"]
    whole = jax.jit(jax.grad(lambda h, w, y: f(h[:most], w, y[:most]), (0, 1)))
    small = whole.lower(*shapes, labels).compile().cost_analysis()["flops"]
    assert flops < 1.3 * small
    assert not re.search(r"f32\[(1024,512|512,1024)\]", compiled.as_text())


def test_hessian_product_with_packing():
    def product(**options):
        def f(kernel):
            return softjax.linear_cross_entropy(
                np.nan_to_num(HIDDEN),
                kernel,
                LABELS,
                reduction="mean",
                weights=WEIGHTS,
                **OPTIONS,
                **options,
            )

        kernel = jnp.asarray(KERNEL)
        return jax.jit(lambda w: jax.jvp(jax.grad(f), (w,), (w,))[1])(kernel)

    same(product(max_active=MOST), product())

"""The linear losses in the caller's shard_map, with the classes on a manual axis."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import softjax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]

N, D, V = 8, 3, 12
RNG = np.random.default_rng(0)
POINT = {
    "hidden": RNG.standard_normal((N, D)),
    "kernel": RNG.standard_normal((D, V)),
    "bias": RNG.standard_normal(V),
    "class_weights": RNG.random(V) + 0.1,
}
LABELS = np.array([0, 3, -1, 11, 7, 5, 9, -1])  # of each half one is ignored
IDS = RNG.integers(V, size=(N, 2))
TOP = softjax.TopKLabels(np.argsort(RNG.random((N, V)), -1)[:, :3], np.full((N, 3), 0.3))


def every_loss(point, labels, ids, top, class_axis=None):
    """Scalars [4] of the rows, and what has one number for each of them."""
    of_head = {name: point[name] for name in ("hidden", "kernel", "bias")}
    loss = partial(
        softjax.linear_cross_entropy,
        **point,
        labels=labels,
        ignore_index=-1,
        label_smoothing=0.1,
        z_loss=0.01,
        class_axis=class_axis,
    )
    outputs = softjax.linear_cross_entropy_outputs(
        **of_head, labels=ids, top_k=5, class_axis=class_axis
    )
    beside = softjax.linear_cross_entropy_outputs(
        **point, labels=labels, ignore_index=-1, top_k=4, reduction="sum", class_axis=class_axis
    )
    distilled = softjax.linear_distillation_loss(**of_head, teacher=top, class_axis=class_axis)
    rows = {
        "none": loss(),
        "packed": loss(max_active=len(labels) * 3 // 4),
        "log_probability": outputs.log_probability.sum(-1),
        "entropy": outputs.entropy,
        "top": (outputs.top_log_probabilities * jnp.arange(5.0)).sum(-1),
        "logsumexp": softjax.linear_logsumexp(**of_head, class_axis=class_axis),
        "distilled": distilled,
    }
    rows |= {
        "beside": beside.entropy + beside.logsumexp,
        "top beside": (beside.top_log_probabilities * jnp.arange(4.0)).sum(-1),
        "classes beside": beside.top_classes.astype(float).sum(-1),
    }
    return {**rows, "sum": loss(reduction="sum") + 2 * beside.loss}


def weighted(losses, weights):
    return sum(jnp.sum(losses[name] * weights) for name in losses)


def test_losses_and_gradients_are_those_of_one_device():
    """2 x 4 devices: rows over one manual axis, classes over the other, with check_vma."""
    mesh, weights = mesh_of("auto", data=2, model=4), jnp.linspace(-1, 2, N)
    specs = {"hidden": P("data"), "kernel": P(None, "model")}
    specs |= dict.fromkeys(("bias", "class_weights"), P("model"))
    in_specs = specs, P("data"), P("data"), P("data"), P("data")

    @partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=(P(), specs, P("data")))
    def over_devices(point, labels, ids, top, weights):
        def f(point):
            losses = every_loss(point, labels, ids, top, "model")
            whole = losses.pop("sum")
            total = weighted(losses, weights) + whole
            return jax.lax.psum(total, "data"), losses

        (value, losses), gradients = jax.value_and_grad(f, has_aux=True)(point)
        return value, gradients, losses

    def on_one(point, labels, ids, top, weights):
        def f(point):
            losses = every_loss(point, labels, ids, top)
            whole = losses.pop("sum")
            return weighted(losses, weights) + whole, losses

        (value, losses), gradients = jax.value_and_grad(f, has_aux=True)(point)
        return value, gradients, losses

    arguments = jax.tree.map(jnp.asarray, (POINT, LABELS, IDS, TOP, weights))
    actual, desired = (jax.jit(f)(*arguments) for f in (over_devices, on_one))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), actual, desired)


def test_the_curvature_is_that_of_one_device():
    mesh = mesh_of("auto", model=4)
    specs = P(), P(None, "model")
    product = partial(softjax.linear_cross_entropy_ggn_vp, reduction="sum")
    hidden, kernel = jnp.asarray(POINT["hidden"]), jnp.asarray(POINT["kernel"])

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=specs)
    def over_devices(hidden, kernel):
        return product(hidden, kernel, (hidden, kernel, None), class_axis="model")[:2]

    desired = product(hidden, kernel, (hidden, kernel, None))[:2]
    for a, b in zip(jax.jit(over_devices)(hidden, kernel), desired, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)

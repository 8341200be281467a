"""On an Explicit mesh, the arguments of a linear loss may have any sharding, or none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of, put

import softjax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

N, D, V = 8, 4, 8
RNG = np.random.default_rng(0)
REALS = {
    "hidden": RNG.normal(size=(N, D)),
    "kernel": RNG.normal(size=(D, V)),
    "bias": RNG.normal(size=V),
    "weights": RNG.random(N) + 0.5,
    "dense": RNG.dirichlet(np.ones(V), N),
    "class_weights": RNG.random(V) + 0.5,
    "shares": RNG.dirichlet(np.ones(4), N),
}
ARRAYS = {name: a.astype("float32") for name, a in REALS.items()} | {
    "labels": RNG.integers(V, size=N),
    "index": RNG.integers(V, size=(N, 4)),
}


def any_spec(rng: np.random.Generator, ndim: int) -> P | None:
    """Each axis over none, one or both axes of the mesh; None for an array off the mesh."""
    if rng.random() < 0.1:
        return None
    free, names = ["data", "model"], [()] * ndim
    for axis in rng.permutation(ndim):
        taken = rng.permutation(free)[: rng.integers(len(free) + 1)].tolist()
        names[axis], free = tuple(taken), [name for name in free if name not in taken]
    return P(*names)


def loss(arrays: dict, kind: str, reduction: str) -> jax.Array:
    options = {"weights": arrays["weights"], "reduction": reduction, "label_smoothing": 0.1}
    labels = arrays[kind]
    if kind == "labels":
        options["ignore_index"] = 0
    else:
        options["class_weights"] = arrays["class_weights"]
    if kind == "index":
        labels = softjax.TopKLabels(arrays["index"], arrays["shares"])
    hidden, kernel, bias = (arrays[name] for name in ("hidden", "kernel", "bias"))
    return jnp.sum(softjax.linear_cross_entropy(hidden, kernel, labels, bias, **options))


def gradient(arrays: dict, kind: str, reduction: str) -> dict:
    def of(reals):
        return loss(arrays | reals, kind, reduction)

    return jax.grad(of)({name: arrays[name] for name in ("hidden", "kernel", "bias")})


def derivatives(arrays: dict, kind: str, reduction: str):
    """Value, gradient and Hessian along the arguments themselves."""
    names = ("hidden", "kernel", "bias")
    point = {name: arrays[name] for name in names}

    def slope(reals):
        return gradient(arrays | reals, kind, reduction)

    return loss(arrays, kind, reduction), *jax.jvp(slope, (point,), (point,))


def outputs(arrays: dict, kind: str, reduction: str):
    h, w, y, b = (arrays[name] for name in ("hidden", "kernel", "labels", "bias"))
    products = softjax.linear_cross_entropy_ggn_vp(h, w, (h, w, b), b, weights=arrays["weights"])
    found = softjax.linear_cross_entropy_outputs(h, w, y, b, top_k=2)
    return found, products, softjax.linear_logsumexp(h, w, b)


FUNCTIONS = (gradient, derivatives, gradient, outputs)


@pytest.mark.parametrize("seed", range(16))
def test_every_placement_has_its_types(seed):
    rng = np.random.default_rng(seed)
    kind, reduction = ("labels", "dense", "index")[seed % 3], ("none", "sum", "mean")[seed % 3 - 1]
    mesh = mesh_of("explicit", data=2, model=2)
    specs = {name: any_spec(rng, a.ndim) for name, a in ARRAYS.items()}
    placed = {
        name: a if specs[name] is None else put(mesh, a, *specs[name]) for name, a in ARRAYS.items()
    }
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda a: FUNCTIONS[seed % 4](a, kind, reduction), placed)


def test_whole_arrays_and_weights_elsewhere_change_no_number():
    """Hidden whole or over its features, labels and weights over axes that differ; eager too."""
    mesh = mesh_of("explicit", data=2, model=2)
    specs = {"hidden": (None, "data"), "weights": ("model",), "labels": ("data",)}
    placed = {name: put(mesh, a, *specs.get(name, ())) for name, a in ARRAYS.items()}
    desired = jax.jit(lambda a: derivatives(a, "labels", "mean"))(ARRAYS)
    with jax.set_mesh(mesh):
        actual = jax.jit(lambda a: derivatives(a, "labels", "mean"))(placed)
        eager = loss(placed, "labels", "mean")
    np.testing.assert_allclose(eager, desired[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), actual, desired)


def test_labels_of_the_best_of_a_teacher_are_taken_outside_of_jit():
    mesh = mesh_of("explicit", data=8)
    logits, index, shares = (
        put(mesh, ARRAYS[name], "data") for name in ("dense", "index", "shares")
    )
    losses = softjax.cross_entropy(logits, softjax.TopKLabels(index, shares))
    whole = softjax.TopKLabels(ARRAYS["index"], ARRAYS["shares"])
    expected = softjax.cross_entropy(ARRAYS["dense"], whole)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)

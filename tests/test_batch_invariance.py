"""The results of a row have the same bits in any batch and at any place."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of, put

import softjax

pytestmark = pytest.mark.x64_once

N, D = 70, 48
# One row, less than a vector and more, full vectors and tiles, and one beside them. All sizes up to
# 70 are tried by `python -m tests.campaign --only invariance`.
COUNTS = (1, 7, 33, 64, 69)
RNG = np.random.default_rng(0)


def same_in_any_company(function, *rows, counts=COUNTS):
    """Of the first rows alone, and of all rows in another order."""
    every = jax.tree.map(np.asarray, function(*rows))  # slices of arrays of JAX are programs
    for count in counts:
        some = function(*(a[:count] for a in rows))
        jax.tree.map(
            lambda a, b, n=count: np.testing.assert_array_equal(a, b[:n], err_msg=str(n)),
            some,
            every,
        )
    order = RNG.permutation(N)
    shuffled = function(*(a[order] for a in rows))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), shuffled, every)


FUNCTIONS = {
    "softmax": lambda x, labels: softjax.softmax(x),
    "log_softmax": lambda x, labels: softjax.log_softmax(x),
    "logsumexp": lambda x, labels: softjax.logsumexp(x, -1),
    "cross_entropy": softjax.cross_entropy,
    "options": partial(softjax.cross_entropy, label_smoothing=0.1, z_loss=0.1),
    "distribution": lambda x, labels: softjax.cross_entropy(x, softjax.softmax(x[:, ::-1])),
}


@pytest.mark.parametrize("classes", [63, 131])
def test_the_normalizers_and_the_loss(classes):
    """In one program, each of arguments of its own, so that nothing is shared but the program."""
    names = ["softmax"] if classes == 63 else list(FUNCTIONS)

    @jax.jit
    def every(arguments):
        return {name: FUNCTIONS[name](*own) for name, own in arguments.items()}

    def function(x, labels):
        return every(dict.fromkeys(names, (x, labels)))

    x = (3 * RNG.standard_normal((N, classes))).astype(np.float32)
    counts = COUNTS if classes == 131 else (1, 7, 33, 64)
    same_in_any_company(function, x, RNG.integers(classes, size=N), counts=counts)


@pytest.mark.parametrize(
    ("transposed", "dtype", "counts"),
    [
        (False, "float32", (1, 7, 33, 64)),
        (True, "float32", (1, 33)),
        (False, "bfloat16", (7, 64)),
    ],
)
def test_the_linear_heads(transposed, dtype, counts):
    kernel = jnp.asarray(RNG.standard_normal((D, 131)), dtype)
    kernel = kernel.T if transposed else kernel
    options = {"transpose_kernel": transposed, "batch_invariant": True}

    @jax.jit
    def function(hidden, labels):
        outputs = softjax.linear_cross_entropy_outputs(hidden, kernel, labels, top_k=3, **options)
        losses = softjax.linear_cross_entropy(
            hidden, kernel, labels, label_smoothing=0.1, **options
        )
        return outputs, losses, softjax.linear_logsumexp(hidden, kernel, **options)

    hidden = RNG.standard_normal((N, D)).astype(jnp.dtype(dtype))
    same_in_any_company(function, hidden, RNG.integers(131, size=N), counts=counts)


def test_gradients_are_those_without_the_option_and_any_device_has_the_same_bits():
    hidden, kernel = (jnp.asarray(RNG.standard_normal(s), "float32") for s in ((N, D), (D, 131)))
    labels, c = RNG.integers(131, size=N), jnp.asarray(RNG.standard_normal(N), "float32")

    def run(batch_invariant, hidden, **options):
        def f(hidden, kernel):
            losses = softjax.linear_cross_entropy(
                hidden, kernel, labels, batch_invariant=batch_invariant, **options
            )
            return jnp.sum(c * losses), losses

        return jax.jit(jax.grad(f, (0, 1), has_aux=True))(hidden, kernel)

    gradients, losses = run(True, hidden)
    desired, others = run(False, hidden)
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    for a, b in zip(gradients, desired, strict=True):
        np.testing.assert_array_equal(a, b)
    mesh = mesh_of("auto", d=2)
    with jax.set_mesh(mesh):
        _, over_devices = run(True, put(mesh, hidden, "d"), class_axis=())
    np.testing.assert_array_equal(over_devices, losses)


def test_misuse():
    h, w, y = jnp.zeros((4, 3)), jnp.zeros((3, 8)), jnp.zeros(4, jnp.int32)
    loss = partial(softjax.linear_cross_entropy, h, w, y)
    with pytest.raises(
        ValueError, match='`batch_invariant` must be False for the reduction "mean"'
    ):
        loss(reduction="mean", batch_invariant=True)
    with pytest.raises(TypeError, match="`batch_invariant` must be True or False"):
        loss(batch_invariant=1)
    match = r"`batch_invariant` must be False where .*\('c',\)"
    with jax.set_mesh(mesh_of("auto", c=2)), pytest.raises(ValueError, match=match):
        loss(batch_invariant=True, class_axis="c")

"""The normalizers and the loss in a Pallas kernel: the same numbers, and a kernel for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import softjax

pytestmark = [pytest.mark.every_platform, pytest.mark.x64_once]

ROWS = 16
FUNCTIONS = {
    "softmax": lambda x, labels: softjax.softmax(x),
    "log_softmax": lambda x, labels: softjax.log_softmax(x),
    "logsumexp": lambda x, labels: softjax.logsumexp(x, -1, keepdims=True),
    "cross_entropy": lambda x, labels: softjax.cross_entropy(x, labels[:, 0])[:, None],
}


def every_result(x, labels):
    return tuple(function(x, labels) for function in FUNCTIONS.values())


def in_kernel(x, labels, **options):
    """Eight rows in each step of the grid."""

    def kernel(x_ref, labels_ref, *results):
        every = every_result(x_ref[...], labels_ref[...])
        for ref, result in zip(results, every, strict=True):
            ref[...] = result

    def rows(width):
        return pl.BlockSpec((8, width), lambda i: (i, 0))

    shapes = jax.eval_shape(every_result, x, labels)
    call = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=ROWS // 8,
        in_specs=[rows(x.shape[1]), rows(1)],
        out_specs=[rows(shape.shape[1]) for shape in shapes],
        **options,
    )
    return call(x, labels)


def test_results_are_those_outside():
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.standard_normal((ROWS, 128)), "float32")
    labels = jnp.asarray(rng.integers(128, size=(ROWS, 1)), "int32")
    desired = every_result(x, labels)
    actual = in_kernel(x, labels, interpret=True)
    for name, expected, result in zip(FUNCTIONS, desired, actual, strict=True):
        np.testing.assert_allclose(result, expected, rtol=3e-7, err_msg=name)


@pytest.mark.parametrize("classes", [128, 32768])
def test_the_kernel_of_a_tpu_lowers(classes):
    """Mosaic has no barrier and few primitives: what the forms of a CPU use is not there.

    Outside of a kernel, a TPU reduces pairs in rows of more than 16,384 classes.
    """
    shapes = [
        jax.ShapeDtypeStruct((ROWS, width), dtype)
        for width, dtype in ((classes, "float32"), (1, "int32"))
    ]
    text = jax.jit(in_kernel).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text

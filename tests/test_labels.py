"""Class indices of every dtype, and bad ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax

# What depends on the code of XLA:CPU for a reduction is compiled as users have it.
pytestmark = pytest.mark.compiled_quickly


@pytest.mark.x64_once
@pytest.mark.parametrize("kind", [jnp.int8, jnp.uint8, jnp.int16, jnp.int32, jnp.uint32])
def test_labels_of_every_integer_dtype(kind, dtype):
    x = jnp.linspace(0, 1, 300, dtype=dtype)
    loss = softjax.cross_entropy(x, jnp.asarray(100, kind))
    np.testing.assert_array_equal(loss, softjax.cross_entropy(x, 100))
    largest = int(jnp.iinfo(kind).max)
    if largest >= 300:
        with pytest.raises(ValueError, match=rf"\[0, 300\), got {largest}"):
            softjax.cross_entropy(x, jnp.asarray(largest, kind))


@pytest.mark.x64_once
def test_a_known_bad_label_is_named(dtype):
    labels = jnp.asarray([[0, 1], [2, 7]])
    with pytest.raises(
        ValueError, match=r"softjax\.cross_entropy: `labels` must be in \[0, 3\)"
    ) as e:
        softjax.cross_entropy(jnp.zeros((2, 2, 3), dtype), labels)
    assert "got 7 at (1, 1)" in str(e.value)


@pytest.mark.x64_once
def test_a_traced_bad_label_is_nan(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), dtype)
    labels = jnp.asarray([0, 3, -1, 2])
    bad = np.array([False, True, True, False])

    def loss(x, label):
        return softjax.cross_entropy(x, label)

    def check(losses, gradient):
        np.testing.assert_array_equal(np.isnan(losses), bad)
        np.testing.assert_array_equal(np.isnan(gradient), np.repeat(bad[:, None], 3, 1))

    value_and_gradient = jax.value_and_grad(loss)
    check(*jax.jit(jax.vmap(value_and_gradient))(x, labels))
    check(*jax.lax.map(lambda row: value_and_gradient(*row), (x, labels)))

    def step(carry, row):
        return carry, value_and_gradient(*row)

    check(*jax.lax.scan(step, None, (x, labels))[1])
    tangents = jax.jit(lambda y: jax.jvp(lambda x: loss(x, y), (x,), (x,))[1])(labels)
    np.testing.assert_array_equal(np.isnan(tangents), bad)


@pytest.mark.x64_once
def test_a_bad_index_among_top_k(dtype):
    x = jnp.zeros((2, 3), dtype)
    halves = jnp.full((2, 2), 0.5, dtype)
    bad = jnp.asarray([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"`labels.*` must be in \[0, 3\), got 3"):
        softjax.cross_entropy(x, softjax.TopKLabels(bad, halves))

    @jax.jit
    def loss_and_gradient(indices):
        def losses(x):
            return softjax.cross_entropy(x, softjax.TopKLabels(indices, halves))

        return losses(x), jax.grad(lambda x: jnp.sum(losses(x)))(x)

    losses, gradient = loss_and_gradient(bad)
    np.testing.assert_array_equal(np.isnan(losses), [False, True])
    np.testing.assert_array_equal(np.isnan(gradient), [[False] * 3, [True] * 3])

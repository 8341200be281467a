# %% [markdown]
# # Over a mesh of devices
#
# One program works for any number of devices: place the arrays on a mesh, and call the same
# functions. This notebook pretends that the computer has eight devices, so that it runs anywhere.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import softjax

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
print(mesh)


def put(array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


# %% [markdown]
# The mesh has two axes. Over `data` the devices share the tokens, and over `model` they share the
# classes of the head.
#
# ## The head of a language model

# %%
rng = np.random.default_rng(0)
hidden = rng.normal(size=(256, 32)).astype(np.float32)
kernel = (rng.normal(size=(32, 4096)) / 6).astype(np.float32)
labels = rng.integers(4096, size=256)


def loss(hidden, kernel, labels):
    return softjax.linear_cross_entropy(hidden, kernel, labels, reduction="mean")


on_one = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel, labels)
shared = put(hidden, "data"), put(kernel, None, "model"), put(labels, "data")
on_eight = jax.jit(jax.value_and_grad(loss, (0, 1)))(*shared)
print("loss on one device", on_one[0], "and on eight", on_eight[0])
print("gradients:", *(jax.typeof(gradient) for gradient in on_eight[1]))
for one, eight in zip(on_one[1], on_eight[1], strict=True):
    assert np.allclose(one, eight, atol=1e-6)

# %% [markdown]
# No argument was needed for this: on an Explicit mesh the sharding is a part of the type,
# `float32[32,4096@model]`. The gradients come back sharded as their arguments are, so that the
# optimizer needs no communication.
#
# ## What each device needs
#
# The classes are divided over four devices and the tokens over two, so that each device has an
# eighth of the work. The compiler reports how much temporary memory a device needs:


# %%
def kilobytes(*arguments):
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e3


alone, of_eight = kilobytes(hidden, kernel, labels), kilobytes(*shared)
print(f"one device {alone:.0f} kB, each of eight {of_eight:.0f} kB")
assert of_eight < alone

# %% [markdown]
# ## A training step
#
# Parameters, optimizer state and gradients all stay where they are. The step is the one that you
# would write for one device.

# %%
optimizer = optax.adam(0.05)


@jax.jit
def step(kernel, state, hidden, labels):
    value, gradient = jax.value_and_grad(loss, 1)(hidden, kernel, labels)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(kernel, updates), state, value


weights = shared[1]
state = optimizer.init(weights)
for _ in range(20):
    weights, state, value = step(weights, state, shared[0], shared[2])
print(f"loss after 20 steps {value:.3f}, kernel {jax.typeof(weights)}")
assert value < on_one[0]

# %% [markdown]
# ## Logits that are sharded
#
# The functions that take logits also accept sharded logits. Here the classes are divided over
# four devices: each computes its share, and sends only two numbers for each row.

# %%
logits = put(hidden @ kernel, "data", "model")
losses = jax.jit(softjax.cross_entropy)(logits, shared[2])
print(jax.typeof(logits), "->", jax.typeof(losses))
assert np.allclose(jnp.mean(losses), on_one[0], rtol=1e-5)

# %% [markdown]
# ## Softmax regression
#
# A fit takes sharded examples too, and finds the optimum that it finds on one device.

# %%
digits = softjax.datasets.load_digits()
features, digit = digits.train_features[:800], digits.train_labels[:800]
fitted = softjax.regression.fit(put(features, "data"), put(digit, "data"), l2=1e-3)
alone = softjax.regression.fit(features, digit, l2=1e-3)
print(f"objective {fitted.objective:.6f} on eight devices, {alone.objective:.6f} on one")
assert np.isclose(fitted.objective, alone.objective, rtol=1e-4)

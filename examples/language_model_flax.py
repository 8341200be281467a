# %% [markdown]
# # A language-model head in Flax NNX
#
# The last layer of a language model turns each hidden vector into one logit for each token of the
# vocabulary. With a large vocabulary these logits need more memory than all the rest of the
# model. `softjax.linear_cross_entropy` computes the loss from the hidden vectors and the kernel
# of that layer, so that all logits never exist at once. This notebook trains a small model with
# what a large one has: bfloat16, padding, gradient accumulation and rematerialisation.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import softjax

# %% [markdown]
# ## Data with a known answer
#
# The text is random, so that we know how good a model can become. Each token has four possible
# successors, with the probabilities 1/2, 1/4, 1/8 and 1/8. The best model knows them, and its
# loss is the entropy of that distribution, 1.75 bits or 1.213 nats. Sentences have different
# lengths; what is left of a row is padding, with the label -100.

# %%
VOCABULARY, LENGTH, PADDING = 500, 16, -100
rng = np.random.default_rng(0)
successors = rng.integers(VOCABULARY, size=(VOCABULARY, 4))
probabilities = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])
best_loss = -np.sum(probabilities * np.log(probabilities))


def sentences(number):
    tokens = [rng.integers(VOCABULARY, size=number)]
    for _ in range(LENGTH):
        choice = rng.choice(4, p=probabilities, size=number)
        tokens.append(successors[tokens[-1], choice])
    tokens = np.stack(tokens, axis=1)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()
    lengths = rng.integers(4, LENGTH + 1, size=(number, 1))
    labels[np.arange(LENGTH) >= lengths] = PADDING
    return inputs, labels


inputs, labels = sentences(8)
print(f"{np.mean(labels == PADDING):.0%} of the labels are padding; best loss {best_loss:.3f} nats")

# %% [markdown]
# ## The model
#
# The parameters are float32 and the computation is bfloat16, as usual on accelerators.
# `nnx.remat` forgets the values inside a block after the forward pass, and computes them again
# for the gradient. The model returns hidden vectors: it does not apply its head.


# %%
class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = nnx.LayerNorm(width, dtype=jnp.bfloat16, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, dtype=jnp.bfloat16, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, dtype=jnp.bfloat16, rngs=rngs)

    @nnx.remat
    def __call__(self, hidden):
        return hidden + self.down(nnx.gelu(self.up(self.norm(hidden))))


class Model(nnx.Module):
    def __init__(self, width, rngs):
        self.embed = nnx.Embed(VOCABULARY, width, dtype=jnp.bfloat16, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, dtype=jnp.bfloat16, rngs=rngs)
        self.head = nnx.Linear(width, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)


model = Model(64, nnx.Rngs(0))
graph, params = nnx.split(model, nnx.Param)

# %% [markdown]
# ## The loss of a part of a batch
#
# The loss returns a sum and the number of labels that count, and not a mean. The reason comes in
# the next section. `ignore_index` leaves out the padding: its hidden vectors change neither the
# loss nor the gradient, whatever is in them.


# %%
def summed_loss(params, inputs, labels):
    model = nnx.merge(graph, params)
    kernel = model.head.kernel[...].astype(jnp.bfloat16)
    total = softjax.linear_cross_entropy(
        model(inputs), kernel, labels, ignore_index=PADDING, reduction="sum"
    )
    return total, jnp.sum(labels != PADDING)


total, count = jax.jit(summed_loss)(params, inputs, labels)
print(f"before training {total / count:.2f} nats, {total.dtype}; uniform {np.log(VOCABULARY):.2f}")
assert abs(total / count - np.log(VOCABULARY)) < 1

# %% [markdown]
# The model is bfloat16, and the loss is float32: the sum over the vocabulary is never rounded to
# bfloat16.
#
# ## Gradient accumulation
#
# A batch that does not fit into memory is cut into parts, and the gradients of the parts are
# added. A common mistake is to average the mean losses of the parts. The parts have different
# numbers of labels, so that a label in a part with much padding counts more. Add the sums, and
# divide once:


# %%
def accumulated(params, inputs, labels):
    def add_part(carry, part):
        value_and_gradient = jax.value_and_grad(summed_loss, has_aux=True)
        (total, count), gradient = value_and_gradient(params, *part)
        return jax.tree.map(jnp.add, carry, (total, count, gradient)), None

    zeros = jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
    (total, count, gradient), _ = jax.lax.scan(add_part, zeros, (inputs, labels))
    count = jnp.maximum(count, 1)
    return total / count, jax.tree.map(lambda g: g / count, gradient)


def in_parts(array, parts=4):
    return array.reshape(parts, -1, *array.shape[1:])


inputs, labels = sentences(16)
compiled = jax.jit(summed_loss)
total, count = compiled(params, inputs, labels)
each = [compiled(params, *part) for part in zip(in_parts(inputs), in_parts(labels), strict=True)]
added = sum(total for total, _ in each) / sum(count for _, count in each)
mean_of_means = np.mean([float(total / count) for total, count in each])
print(
    f"whole batch {total / count:.5f}, added parts {added:.5f}, mean of means {mean_of_means:.5f}"
)
assert abs(total / count - added) < 1e-4

# %% [markdown]
# ## Training

# %%
optimizer = optax.adam(0.02)


@jax.jit
def step(params, state, inputs, labels):
    value, gradient = accumulated(params, in_parts(inputs), in_parts(labels))
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


state, losses = optimizer.init(params), []
for _ in range(100):
    params, state, value = step(params, state, *sentences(64))
    losses.append(float(value))
print(
    f"loss {losses[0]:.2f} at first, {np.mean(losses[-10:]):.3f} at the end, best {best_loss:.3f}"
)
assert losses[-1] < 2

# %% alt="The loss falls from 6.5 nats towards a dashed line, the best loss of 1.213 nats."
plt.plot(losses, label="loss of the model")
plt.axhline(best_loss, color="gray", linestyle="--", label="entropy of the data")
plt.xlabel("step")
plt.ylabel("nats per token")
plt.legend()

# %% [markdown]
# ## What is saved
#
# The compiler knows how much temporary memory each program needs. Here is the loss with its
# gradient for 4,096 hidden vectors and a vocabulary of 32,768, for the plain loss of optax and
# for the fused one. Nothing is computed: the programs are only compiled.


# %%
def plain(hidden, kernel, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
    return jnp.mean(losses)


def fused(hidden, kernel, labels):
    return softjax.linear_cross_entropy(hidden, kernel, labels, reduction="mean")


def megabytes(loss):
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((4096, 64), "float32"), ((64, 32768), "float32"), ((4096,), "int32"))
    ]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


plain_size, fused_size = megabytes(plain), megabytes(fused)
print(f"plain {plain_size:.0f} MB, fused {fused_size:.0f} MB")
assert fused_size < 0.1 * plain_size

# %% [markdown]
# # A language-model head in Equinox
#
# In this model the head shares its matrix with the embedding of the tokens, as in many language
# models. It also has two more options of real models: a soft cap of the logits, and a penalty
# that keeps the logits from drifting (z-loss). The model computes in bfloat16, does not keep the
# values inside its blocks but computes them again (`eqx.filter_checkpoint`), and adds up the
# gradients of the parts of a batch.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import softjax

# %% [markdown]
# ## Data with a known answer
#
# Each token has two possible successors, with the probabilities 3/4 and 1/4. So the loss of the
# best model is the entropy of that choice, 0.562 nats. The rows end in padding.

# %%
VOCABULARY, LENGTH, PADDING = 400, 16, -1
rng = np.random.default_rng(1)
successors = rng.integers(VOCABULARY, size=(VOCABULARY, 2))
best_loss = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))


def sentences(number):
    tokens = [rng.integers(VOCABULARY, size=number)]
    for _ in range(LENGTH):
        second = (rng.random(number) < 0.25).astype(int)
        tokens.append(successors[tokens[-1], second])
    tokens = np.stack(tokens, axis=1)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()
    labels[np.arange(LENGTH) >= rng.integers(4, LENGTH + 1, size=(number, 1))] = PADDING
    return inputs, labels


# %% [markdown]
# ## The model
#
# Equinox models are pytrees of arrays, here all in float32. The model is cast to bfloat16 where
# it is used, so that the optimizer goes on working with all digits.


# %%
class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width, key):
        up, down = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(width)
        self.up = eqx.nn.Linear(width, 2 * width, key=up)
        self.down = eqx.nn.Linear(2 * width, width, key=down)

    def __call__(self, hidden):
        return hidden + self.down(jax.nn.gelu(self.up(self.norm(hidden))))


class Model(eqx.Module):
    embedding: jax.Array
    block: Block
    norm: eqx.nn.LayerNorm

    def __init__(self, width, key):
        embedding, block = jax.random.split(key)
        self.embedding = jax.random.normal(embedding, (VOCABULARY, width)) / np.sqrt(width)
        self.block = Block(width, block)
        self.norm = eqx.nn.LayerNorm(width)

    def __call__(self, token):
        hidden = eqx.filter_checkpoint(self.block)(self.embedding[token])
        return self.norm(hidden)


def in_bfloat16(model):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)


model = Model(48, jax.random.key(0))

# %% [markdown]
# ## The loss
#
# The kernel of the head is the transposed embedding. Padding is masked by `weights` here, which
# may also be numbers between 0 and 1, such as the reliability of a source. A row of weight 0
# takes no part, even if its label is not a class at all: the label of padding is replaced by 0
# only because -1 would be refused as a mistake.


# %%
def summed_loss(model, inputs, labels):
    half = in_bfloat16(model)
    hidden = jax.vmap(jax.vmap(half))(inputs)
    counts = labels != PADDING
    total = softjax.linear_cross_entropy(
        hidden,
        half.embedding.T,
        jnp.where(counts, labels, 0),
        weights=counts,
        softcap=30.0,  # logits stay between -30 and 30
        z_loss=1e-4,  # adds 1e-4 logsumexp^2
        reduction="sum",
    )
    return total, jnp.sum(counts)


inputs, labels = sentences(64)
total, count = eqx.filter_jit(summed_loss)(model, inputs, labels)
print(f"before training {total / count:.2f} nats, in {total.dtype}")

# %% [markdown]
# ## A step
#
# The parts of a batch go through `jax.lax.scan`, which keeps one part in memory. Sums and numbers
# of labels are added, and divided once, so that each label counts the same in whatever part it
# is.

# %%
optimizer = optax.adam(0.01)


@eqx.filter_jit
def step(model, state, inputs, labels):
    def add_part(carry, part):
        value_and_gradient = eqx.filter_value_and_grad(summed_loss, has_aux=True)
        (total, count), gradient = value_and_gradient(model, *part)
        return jax.tree.map(jnp.add, carry, (total, count, gradient)), None

    parts = inputs.reshape(4, -1, LENGTH), labels.reshape(4, -1, LENGTH)
    zeros = jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, model)
    (total, count, gradient), _ = jax.lax.scan(add_part, zeros, parts)
    count = jnp.maximum(count, 1)
    updates, state = optimizer.update(jax.tree.map(lambda g: g / count, gradient), state)
    return eqx.apply_updates(model, updates), state, total / count


state, losses = optimizer.init(model), []
for _ in range(120):
    model, state, value = step(model, state, *sentences(64))
    losses.append(float(value))
print(
    f"loss {losses[0]:.2f} at first, {np.mean(losses[-10:]):.3f} at the end, best {best_loss:.3f}"
)
assert losses[-1] < 1.5

# %% alt="The loss falls towards a dashed line, the best loss of 0.562 nats."
plt.plot(losses, label="loss of the model, with z-loss")
plt.axhline(best_loss, color="gray", linestyle="--", label="entropy of the data")
plt.xlabel("step")
plt.ylabel("nats per token")
plt.legend()

# %% [markdown]
# ## What the model knows
#
# A report needs more than the loss. `linear_cross_entropy_outputs` also computes the two most
# probable successors of each token, and the entropy of the prediction, and does not hold all
# logits either.

# %%
tokens = jnp.arange(VOCABULARY)
outputs = softjax.linear_cross_entropy_outputs(
    jax.vmap(model)(tokens), model.embedding.T, successors[:, 0], softcap=30.0, top_k=2
)
right = np.mean(np.asarray(outputs.top_classes[:, 0]) == successors[:, 0])
print(f"the likelier successor comes first for {right:.0%} of the tokens")
print(f"entropy of the predictions: {outputs.entropy.mean():.2f} nats on average")
assert right > 0.8

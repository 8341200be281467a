# %% [markdown]
# # Distillation
#
# A small student learns from a large teacher: not from one right label, but from the whole
# distribution that the teacher predicts. For a language model that distribution has as many
# entries as the vocabulary, for each token. `linear_distillation_loss` compares the two without
# the logits of either.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import softjax

# %% [markdown]
# ## Teacher and student
#
# The teacher has hidden vectors of 48 features and a head for 200 classes. The student sees the
# same inputs, and has 12 features. Real models would have a network in front of the heads; the
# losses would not change.

# %%
rng = np.random.default_rng(0)
TOKENS, CLASSES = 256, 200
inputs = jnp.asarray(rng.normal(size=(TOKENS, 48)), jnp.float32)
teacher_kernel = jnp.asarray(rng.normal(size=(48, CLASSES)) / 2, jnp.float32)
teacher = softjax.LinearHead(inputs, teacher_kernel)
student = {
    "features": jnp.asarray(rng.normal(size=(48, 12)) / 7, jnp.float32),
    "kernel": jnp.zeros((12, CLASSES)),
}

# %% [markdown]
# ## The whole distribution
#
# The forward divergence KL(teacher, student) asks the student to put mass wherever the teacher
# does. A temperature above 1 shows more of what the teacher thinks of the less likely classes;
# the factor $T^2$ keeps the size of the gradients.


# %%
def loss(student, divergence):
    return softjax.linear_distillation_loss(
        inputs @ student["features"],
        student["kernel"],
        teacher,
        divergence=divergence,
        temperature=2.0,
        reduction="mean",
    )


def trained(loss, steps=150):
    optimizer = optax.adam(0.03)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    params, state, values = student, optimizer.init(student), []
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    return params, values


forward, forward_values = trained(lambda params: loss(params, "forward_kl"))
print(f"divergence {forward_values[0]:.3f} nats at first, {forward_values[-1]:.3f} at the end")
assert forward_values[-1] < 0.7 * forward_values[0]

# %% [markdown]
# ## From the top k of the teacher
#
# A teacher that runs elsewhere sends its k most probable classes only. They come from one pass
# over its head, at the temperature of the loss. The rest of its mass counts as one more class, so
# that nothing is dropped: a student that puts all of its mass on the k classes pays for it.

# %%
best = softjax.linear_cross_entropy_outputs(inputs, teacher_kernel, temperature=2.0, top_k=32)
probabilities = jnp.exp(best.top_log_probabilities)
sent = softjax.TopKLabels(best.top_classes, probabilities)
print(f"the 32 best classes have {probabilities.sum(-1).mean():.0%} of the mass on average")


def top_k_loss(student):
    hidden = inputs @ student["features"]
    return softjax.linear_distillation_loss(
        hidden, student["kernel"], sent, temperature=2.0, reduction="mean"
    )


from_top_k, top_k_values = trained(top_k_loss)
whole = loss(from_top_k, "forward_kl")
print(f"divergence from the whole teacher, for the student of the top 32: {whole:.3f} nats")
assert whole < 0.9 * forward_values[0]

# %% alt="Two falling curves: the divergence from the whole teacher and from its 32 best classes."
plt.plot(forward_values, label="whole distribution")
plt.plot(top_k_values, label="32 best classes and the rest")
plt.xlabel("step")
plt.ylabel("divergence, nats")
plt.legend()

# %% [markdown]
# The second curve lies lower because it compares less: merging classes never makes a divergence
# larger.
#
# ## Which divergence?
#
# Forward KL covers the teacher, reverse KL picks what it can do well, and the Jensen-Shannon
# divergence is between the two. All three are 0 for equal distributions only, and exactly 0
# there:

# %%
for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
    itself = softjax.linear_distillation_loss(
        inputs, teacher_kernel, teacher, divergence=divergence
    )
    print(
        f"{divergence}: student {loss(forward, divergence):.4f}, teacher itself {itself.max():.1f}"
    )
    assert bool(jnp.all(itself == 0))

# %% [markdown]
# ## With labels, where there are some
#
# The usual recipe adds the cross-entropy of the labels, which are known for some tokens only.
# `weights` says which.

# %%
labels = jnp.argmax(inputs @ teacher_kernel, axis=-1)
known = jnp.arange(TOKENS) % 4 == 0


def mixed(student):
    hidden = inputs @ student["features"]
    supervised = softjax.linear_cross_entropy(
        hidden, student["kernel"], labels, weights=known, reduction="mean"
    )
    return 0.5 * supervised + 0.5 * loss(student, "forward_kl")


print(f"mixed loss of the trained student {mixed(forward):.3f}, untrained {mixed(student):.3f}")
assert mixed(forward) < mixed(student)

# %% [markdown]
# # Log-probabilities and entropy for reinforcement learning
#
# Policy gradients need, for each action or token that was taken, its log-probability under the
# policy, and often the entropy of the policy. With a large vocabulary both come from logits that
# nobody wants to keep. This notebook gets them in one pass, and trains a small policy with them.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import softjax

# %% [markdown]
# ## One pass for everything
#
# `linear_cross_entropy_outputs` takes the hidden vectors, the kernel of the head and the tokens
# that were taken. It returns their log-probabilities, the entropies, and the most probable
# tokens.

# %%
rng = np.random.default_rng(0)
hidden = jnp.asarray(rng.normal(size=(5, 32)), jnp.float32)
kernel = jnp.asarray(rng.normal(size=(32, 2000)) / 4, jnp.float32)
taken = jnp.array([3, 1999, 42, 0, 7])
outputs = softjax.linear_cross_entropy_outputs(hidden, kernel, taken, temperature=0.8, top_k=2)
print("log-probabilities", outputs.log_probability)
print("entropies", outputs.entropy)

logits = hidden @ kernel / 0.8  # what the pass avoids
expected = softjax.log_softmax(logits)[jnp.arange(5), taken]
assert np.allclose(outputs.log_probability, expected, atol=1e-5)
assert np.allclose(outputs.entropy, softjax.information.entropy(logits), atol=1e-5)

# %% [markdown]
# Several candidates for each position, such as the samples of a group or the answers of a list,
# share the pass too: give labels of the shape [..., k].

# %%
candidates = jnp.stack([taken, outputs.top_classes[:, 0]], axis=-1)
of_candidates = softjax.linear_cross_entropy_outputs(hidden, kernel, candidates, temperature=0.8)
print(of_candidates.log_probability.shape)
assert bool(jnp.all(of_candidates.log_probability[:, 0] <= of_candidates.log_probability[:, 1]))

# %% [markdown]
# ## Why the digits matter
#
# A policy that is nearly sure has a log-probability near 0, and a small entropy. The usual
# formulas lose digits of both: here the log-probability is 0, and the entropy is 5 % too small.
# An action that is not allowed makes the entropy NaN.

# %%
sure = jnp.array([20.0, 0.0, 0.0])


def usual_entropy(logits):
    logs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(logs) * logs)


usual, ours = jax.nn.log_softmax(sure)[0], softjax.log_softmax(sure)[0]
print(f"log-probability: usual {usual:.3g}, softjax {ours:.3g}")
usual, ours = usual_entropy(sure), softjax.information.entropy(sure)
print(f"entropy: usual {usual:.5g}, softjax {ours:.5g}")
masked = jnp.array([1.0, 0.0, -jnp.inf])  # an action that is not allowed
usual, ours = usual_entropy(masked), softjax.information.entropy(masked)
print(f"entropy with a masked action: usual {usual}, softjax {ours:.4f}")
assert np.isfinite(ours)

# %% [markdown]
# ## A policy that learns
#
# There are 16 states and 100 actions; in each state one action has the reward 1, and all others
# 0. The policy is a table of hidden vectors with a linear head. Its gradient is the mean of
# (reward - baseline) times the gradient of the log-probability of the action that was taken. An
# entropy bonus keeps it from being sure too early.

# %%
STATES, ACTIONS, BATCH = 16, 100, 256
best_action = jnp.asarray(rng.integers(ACTIONS, size=STATES))
params = {
    "hidden": jnp.asarray(rng.normal(size=(STATES, 24)), jnp.float32),
    "kernel": jnp.zeros((24, ACTIONS)),
}


def loss(params, states, actions, advantages):
    of_states = params["hidden"][states]
    outputs = softjax.linear_cross_entropy_outputs(of_states, params["kernel"], actions)
    gain = jnp.mean(advantages * outputs.log_probability)
    return -gain - 0.002 * jnp.mean(outputs.entropy), jnp.mean(outputs.entropy)


optimizer = optax.adam(0.03)


@jax.jit
def step(params, state, key):
    of_states, of_actions = jax.random.split(key)
    states = jax.random.randint(of_states, (BATCH,), 0, STATES)
    logits = params["hidden"][states] @ params["kernel"]
    actions = jax.random.categorical(of_actions, logits)
    rewards = (actions == best_action[states]).astype(jnp.float32)
    advantages = rewards - jnp.mean(rewards)
    (_, entropy), gradient = jax.value_and_grad(loss, has_aux=True)(
        params, states, actions, advantages
    )
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, (jnp.mean(rewards), entropy)


state, history = optimizer.init(params), []
for key in jax.random.split(jax.random.key(0), 400):
    params, state, report = step(params, state, key)
    history.append(report)
rewards, entropies = np.array(history).T
print(f"mean reward {rewards[:10].mean():.2f} at first, {rewards[-10:].mean():.2f} at the end")
print(f"entropy {entropies[0]:.2f} nats at first, {entropies[-1]:.2f} at the end")
assert rewards[-10:].mean() > 0.8

# %% alt="The mean reward rises from 0 to 1, and the entropy falls from 4.6 nats to 0."
figure, (left, right) = plt.subplots(1, 2)
left.plot(rewards)
left.set(xlabel="step", ylabel="mean reward")
right.plot(entropies)
right.set(xlabel="step", ylabel="entropy, nats")

# %% [markdown]
# ## The ratio of two policies
#
# PPO and GRPO weight actions by the ratio of the new policy to the old one, $e^{\log p_{new} -
# \log p_{old}}$. The same parameters give the same bits, so that the ratio of a policy to itself
# is exactly 1, and its gradient is that of the log-probability.

# %%
states = jnp.arange(STATES)


def log_probability(params):
    outputs = softjax.linear_cross_entropy_outputs(params["hidden"], params["kernel"], best_action)
    return outputs.log_probability


old = log_probability(params)
ratio = jnp.exp(log_probability(params) - old)
assert bool(jnp.all(ratio == 1))
print("smallest and largest ratio", ratio.min(), ratio.max())

# %% [markdown]
# # Softmax regression: from scratch to softjax
#
# Softmax regression is the simplest classifier: one matrix, one vector, and the softmax. Here it
# learns to read handwritten digits three times: written out by hand, with the losses of softjax,
# and by one call that finds the exact optimum.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import softjax

digits = softjax.datasets.load_digits()
digits.train_features.shape, digits.test_features.shape

# %% [markdown]
# Each picture has 8 x 8 pixels, flattened to 64 features between 0 and 1. The label says which of
# the ten digits it is.

# %% alt="Ten small grey pictures, one of each handwritten digit from 0 to 9."
figure, axes = plt.subplots(1, 10, figsize=(6.4, 0.9))
for digit, axis in enumerate(axes):
    example = np.flatnonzero(digits.train_labels == digit)[0]
    axis.imshow(digits.train_features[example].reshape(8, 8), cmap="gray_r")
    axis.set_axis_off()

# %% [markdown]
# ## From scratch
#
# A picture $x$ gets one score for each class, the logits $o = x W + b$. The softmax turns scores
# into probabilities:
#
# $$ p_k = \frac{e^{o_k}}{\sum_j e^{o_j}}. $$
#
# The loss of an example is $-\log p_y$, where $y$ is the right class. Its gradient with respect
# to the logits is $p - y$, the predicted probabilities minus the label as a one-hot vector. So
# everything fits into a few lines of NumPy.


# %%
def softmax_by_hand(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


features, labels = digits.train_features, digits.train_labels
one_hot = np.eye(10)[labels]
kernel, bias = np.zeros((64, 10)), np.zeros(10)
for _ in range(200):
    difference = (softmax_by_hand(features @ kernel + bias) - one_hot) / len(labels)
    kernel -= features.T @ difference
    bias -= difference.sum(axis=0)
accuracy = np.mean(np.argmax(digits.test_features @ kernel + bias, axis=-1) == digits.test_labels)
print(f"accuracy on pictures that it has not seen: {accuracy:.3f}")
assert accuracy > 0.9

# %% [markdown]
# ## With softjax and optax
#
# `softjax.cross_entropy` takes the logits, not the probabilities. So it never takes the logarithm
# of a number that was rounded to 0, and JAX finds the gradient.


# %%
def loss(params, features, labels):
    logits = features @ params["kernel"] + params["bias"]
    return jnp.mean(softjax.cross_entropy(logits, labels))


@jax.jit
def step(params, state):
    value, gradient = jax.value_and_grad(loss)(params, features, labels)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


optimizer = optax.adam(0.05)
params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
state, losses = optimizer.init(params), []
for _ in range(200):
    params, state, value = step(params, state)
    losses.append(float(value))
print(f"loss in nats: {losses[0]:.4f} at first, {losses[-1]:.4f} after 200 steps")
assert abs(losses[0] - np.log(10)) < 1e-5

# %% [markdown]
# At first all probabilities are 1/10, so the loss is $\log 10 = 2.3026$ nats. That is a useful
# check of any classifier before it is trained.

# %% alt="The loss falls from 2.3 nats to below 0.1 in 200 steps of Adam."
plt.plot(losses)
plt.xlabel("step")
plt.ylabel("loss, nats")

# %% [markdown]
# ## To the optimum, in one call
#
# The loss is a convex function of the parameters: it has one minimum, and Newton's method finds
# it in a few steps. The small penalty `l2` keeps the parameters finite, because without it some
# classes of these pictures can be separated perfectly.

# %%
result = softjax.regression.fit(features, labels, l2=1e-4)
predicted = softjax.regression.predict(result.params, digits.test_features)
accuracy = float(np.mean(predicted == digits.test_labels))
print(f"{result.stop_reason} after {result.steps} steps, accuracy {accuracy:.3f}")
assert result.stop_reason == "converged"
assert accuracy > 0.96

# %% [markdown]
# Each column of the kernel is a picture too: red pixels speak for the digit, blue pixels against
# it.

# %% alt="Ten pictures of weights. For the digit 0 the middle is blue and the ring around it red."
figure, axes = plt.subplots(1, 10, figsize=(6.4, 0.9))
limit = float(jnp.abs(result.params.kernel).max())
for digit, axis in enumerate(axes):
    weights = np.asarray(result.params.kernel[:, digit]).reshape(8, 8)
    axis.imshow(weights, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set_axis_off()

# %% [markdown]
# ## What to take away
#
# - The gradient of the loss is $p - y$; all three versions follow it.
# - Give logits to the loss, and not probabilities.
# - A convex problem deserves a solver that knows it: the optimum in a few steps, with a reason
#   why it stopped.

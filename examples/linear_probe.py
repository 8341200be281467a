# %% [markdown]
# # A linear probe
#
# How much does a layer of a network know about the labels? A linear probe answers: it freezes the
# network, and fits a softmax regression to the features of that layer. The probe must not depend
# on luck, so it should be the exact optimum, with a penalty that is chosen on data that the fit
# has not seen.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import softjax

digits = softjax.datasets.load_digits()
images, labels = digits.train_features[:600], digits.train_labels[:600]

# %% [markdown]
# ## The frozen network
#
# Any function from inputs to features will do. Here it is a network with random weights that was
# never trained. Its layers are known to keep much of what is in the images.


# %%
def network(images):
    first, second = jax.random.split(jax.random.key(0))
    layer_1 = jax.nn.relu(images @ jax.random.normal(first, (64, 64)) / 4)
    layer_2 = jax.nn.relu(layer_1 @ jax.random.normal(second, (64, 64)) / 6)
    return {"pixels": jnp.asarray(images), "layer 1": layer_1, "layer 2": layer_2}


train, test = network(images), network(digits.test_features)
{name: layer.shape for name, layer in train.items()}

# %% [markdown]
# ## One probe for each layer
#
# `fit_path` fits the whole grid of penalties and all folds of the cross-validation. It also says
# which penalty was best on the folds that were left out.

# %%
penalties = jnp.array([1e-2, 1e-3, 1e-4, 1e-5])
paths = {
    name: softjax.regression.fit_path(layer, labels, l2=penalties, folds=3)
    for name, layer in train.items()
}
for name, path in paths.items():
    logits = softjax.regression.logits(path.params_at(path.best), test[name])
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == digits.test_labels)
    loss = jnp.mean(softjax.cross_entropy(logits, digits.test_labels))
    print(f"{name}: l2 {path.l2[path.best]:g}, accuracy {accuracy:.3f}, loss {loss:.3f} nats")
    assert accuracy > 0.85

# %% alt="Loss on the folds left out against the penalty, one curve for each layer."
for name, path in paths.items():
    plt.errorbar(
        penalties,
        path.cross_validation.mean_loss,
        path.cross_validation.standard_error,
        label=name,
        capsize=3,
    )
plt.xscale("log")
plt.xlabel("penalty l2")
plt.ylabel("loss on folds left out, nats")
plt.legend()

# %% [markdown]
# The bars are one standard error long. A difference between layers that is smaller than the bars
# says nothing about the network.
#
# ## Are the probabilities right?
#
# Accuracy does not tell whether the probabilities are right. One temperature for all logits,
# fitted to held-out examples, corrects the probabilities and changes no prediction.

# %%
path = paths["layer 1"]
logits = softjax.regression.logits(path.params_at(path.best), test["layer 1"])
held_out, rest = slice(0, 180), slice(180, None)
temperature = softjax.calibration.calibrate_temperature(
    logits[held_out], digits.test_labels[held_out]
)
for name, scaled in (("as fitted", logits), ("calibrated", logits / temperature)):
    error = softjax.calibration.expected_calibration_error(
        softjax.softmax(scaled[rest]), digits.test_labels[rest]
    )
    print(f"{name}: expected calibration error {error:.3f}")
print(f"temperature {temperature:.2f}")
assert 0.3 < temperature < 3

# %% [markdown]
# # The statistics of a fit
#
# A fit gives numbers. How precise are they, and what do they mean? This notebook uses a survey of
# 600 travellers to find out how income and age change the choice of bus, train or car. The data
# are simulated, so that the truth is known.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from softjax import regression
from softjax.regression import inference

rng = np.random.default_rng(3)
features = rng.normal(size=(600, 2))  # income and age, each standardised
truth = np.array([[0.0, 0.5, 1.0], [0.0, 0.0, -0.5]])
choice = np.argmax(features @ truth + rng.gumbel(size=(600, 3)), axis=-1)
names = {"feature_names": ["income", "age"], "class_names": ["bus", "train", "car"]}

# %% [markdown]
# Adding Gumbel noise to the scores and taking the largest is a draw from the softmax: that is how
# a traveller chooses in this model.
#
# ## The table

# %%
result = regression.fit(features, choice)
print(inference.summary(result.params, features, choice, **names))

# %% [markdown]
# A coefficient is a difference of log odds. The coefficient of income for the car is about 1.0: one
# standard deviation more income multiplies the odds of car against bus by $e^{1.0} = 2.7$. The
# true coefficient is 1, and the interval covers it.

# %%
covariance = inference.covariance(result.params, features, choice)
against_bus = inference.coefficients(result.params, covariance, reference=0)
inside = (against_bus.lower[:2] <= truth[:, 1:]) & (truth[:, 1:] <= against_bus.upper[:2])
print("odds ratios:", np.array_str(np.exp(against_bus.value[:2]), precision=2))
print("the interval covers the truth:", inside.tolist())

# %% [markdown]
# ## Does age matter at all?
#
# One test for all classes together: fit without age, and compare the log-likelihoods.

# %%
smaller = regression.fit(features[:, :1], choice)
restricted = inference.log_likelihood(smaller.params, features[:, :1], choice)
full = inference.log_likelihood(result.params, features, choice)
test = inference.likelihood_ratio_test(restricted, full, 2)
print(f"statistic {test.statistic:.1f} on {test.degrees_of_freedom:.0f}, p {test.p_value:.2g}")
assert test.p_value < 0.01

# %% [markdown]
# ## What it means for probabilities
#
# The average marginal effect says how many percentage points a unit of a feature adds. The
# effects of a feature sum to 0 over the classes: what one class gains, the others lose.

# %%
effects = inference.average_marginal_effects(result.params, covariance, features)
for name, row, errors in zip(
    names["feature_names"], effects.value, effects.standard_error, strict=True
):
    cells = [
        f"{c} {100 * v:+.1f} ± {100 * e:.1f}"
        for c, v, e in zip(names["class_names"], row, errors, strict=True)
    ]
    print(f"{name}, percentage points:", ", ".join(cells))
assert np.allclose(effects.value.sum(axis=-1), 0, atol=1e-5)

# %% alt="Probability of bus, train and car against income, with bands. Car rises from 0.1 to 0.7."
income = np.linspace(-2, 2, 41)
grid = np.stack([income, np.zeros(41)], axis=-1)
predicted = inference.predictions(result.params, covariance, grid)
for k, name in enumerate(names["class_names"]):
    (line,) = plt.plot(income, predicted.probability[:, k], label=name)
    plt.fill_between(
        income, predicted.lower[:, k], predicted.upper[:, k], color=line.get_color(), alpha=0.2
    )
plt.xlabel("income, standard deviations from the mean")
plt.ylabel("probability")
plt.legend()

# %% [markdown]
# ## The same without the formula
#
# The bootstrap draws the travellers again, with replacement, and fits each resample. Its standard
# errors agree with those of the formula, as they should in a model that is right.

# %%
resampled = regression.bootstrap(features, choice, resamples=100, seed=0)
centred = inference.coefficients(result.params, covariance)
ratio = resampled.standard_errors().kernel / centred.standard_error[:2]
print("bootstrap over formula:", np.array_str(np.asarray(ratio), precision=2))
assert np.all(jnp.abs(ratio - 1) < 0.35)

# %% [markdown]
# # Separation, and what to do about it
#
# Sometimes a line separates the classes perfectly. That sounds good, but then the likelihood has
# no maximum: the larger the parameters, the better the fit, without end. Many programs return
# large numbers without a warning. softjax says what it found.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import softjax
from softjax import regression

dose = np.array([1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0])[:, None]
died = np.array([0, 0, 0, 0, 1, 1, 1, 1])

# %% [markdown]
# Every dose below 5 has one outcome, and every dose above 5 the other.
#
# ## What happens
#
# With the boundary at 5, take the logit $c \, (x - 5)$ and let $c$ grow. The loss of every
# example falls, and it never reaches 0.

# %%
slopes = np.array([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
losses = []
for slope in slopes:
    second = slope * (dose[:, 0] - 5)
    logits = jnp.stack([jnp.zeros(8), second], axis=-1)
    losses.append(float(jnp.mean(softjax.cross_entropy(logits, died))))
    print(f"slope {slope:4}: mean loss {losses[-1]:.3g} nats")
assert np.all(np.diff(losses) < 0)

# %% alt="On a logarithmic axis the loss falls along a straight line, without a minimum."
plt.semilogy(slopes, losses, "o-")
plt.xlabel("slope c")
plt.ylabel("mean loss, nats")

# %% [markdown]
# ## What softjax says
#
# The fit stops as soon as the parameters put each example's own class strictly on top, for that
# is a proof that no optimum exists. A standard error would describe where the fit stopped, and
# not the data, so that it is refused.

# %%
result = regression.fit(dose, died)
print(result.stop_reason, result.separated)
assert result.stop_reason == "separated"

# %%
try:
    regression.inference.covariance(result.params, dose, died)
except ValueError as error:
    print(error)

# %% [markdown]
# ## What to do
#
# **A penalty** makes the optimum finite. It pulls the parameters towards 0, and it has a strength
# that you must choose, by cross-validation for example.
#
# **Firth's method** adds the logarithm of the determinant of the information. It has nothing to
# choose, takes away the first-order bias of small samples, and is always finite.

# %%
ridge = regression.fit(dose, died, l2=0.1)
firth = regression.fit(dose, died, solver="firth")
for name, fitted in (("ridge", ridge), ("firth", firth)):
    slope = fitted.params.kernel[0, 1] - fitted.params.kernel[0, 0]
    print(f"{name}: {fitted.stop_reason}, slope {slope:.3f}")
    assert fitted.stop_reason == "converged"

# %% alt="Probability against dose. Both curves rise from 0 to 1 and cross one half at dose 5."
grid = np.linspace(0, 10, 101)[:, None]
for name, fitted in (("ridge, l2 = 0.1", ridge), ("Firth", firth)):
    plt.plot(grid, regression.predict_proba(fitted.params, grid)[:, 1], label=name)
plt.plot(dose, died, "ko", label="data")
plt.xlabel("dose")
plt.ylabel("probability")
plt.legend()

# %% [markdown]
# ## Almost separated
#
# If one example lies on the boundary itself, the classes are *quasi-separated*: the loss no
# longer falls to 0, but the parameters still grow without end.

# %%
on_the_boundary = np.concatenate([dose, [[5.0], [5.0]]])
outcome = np.concatenate([died, [0, 1]])
result = regression.fit(on_the_boundary, outcome)
print(result.stop_reason, f"objective {result.objective:.4f}")
assert result.stop_reason == "quasi-separated"

# %% [markdown]
# One example on the wrong side, and there is an optimum again:

# %%
overlapping = regression.fit(np.concatenate([dose, [[5.5], [4.5]]]), np.concatenate([died, [0, 1]]))
print(overlapping.stop_reason)
assert overlapping.stop_reason == "converged"

# %% [markdown]
# ## What to take away
#
# - Look at `stop_reason` before you look at the parameters.
# - Separation is a property of the data. More steps or a smaller tolerance do not help.
# - Where you only need predictions, use a small `l2`. Where you need estimates and tests, use
#   `solver="firth"`.

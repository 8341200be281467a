"""Rows with weights, an offset and penalty factors, and plain gradient descent."""

import numpy as np
import optax

N, D, K = 40, 3, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D))
Y = RNG.integers(K, size=N)
SHARES = RNG.dirichlet(np.ones(K), size=N)
WEIGHTS = RNG.uniform(size=N)
CLASS_WEIGHTS = np.array([1.0, 2.0, 0.5, 0.0])
OFFSET = RNG.normal(size=(N, K))
FACTORS = np.array([1.0, 0.0, 2.0])
SGD, RATE, STEPS = optax.sgd(0.5), 0.5, 3

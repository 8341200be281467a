"""Flowers of three kinds, and classifiers that are fitted to them."""

import numpy as np
import pytest

pytest.importorskip("sklearn")
import pandas as pd

from softjax.sklearn import SoftmaxClassifier

RNG = np.random.default_rng(0)
N, D = 90, 4
X = RNG.normal(size=(N, D)) * [1.0, 2.0, 0.5, 1.0] + [0.0, 3.0, 0.0, 0.0]
X[:, 3] = np.where(X[:, 3] > 0, X[:, 3], 0)
LOGITS = X @ RNG.normal(size=(D, 3)) + RNG.gumbel(size=(N, 3))
NAMES = np.array(["rose", "lily", "tulip"])
Y = NAMES[LOGITS.argmax(1)]
TWO = np.where(LOGITS[:, 0] > LOGITS[:, 1], "yes", "no")
WEIGHTS = RNG.uniform(0, 2, N)


def fitted(y=Y, sample_weight=None, offset=None, **options):
    return SoftmaxClassifier(**options).fit(X, y, sample_weight, offset)


def frame(columns=("a", "b", "c", "d")):
    return pd.DataFrame(X, columns=list(columns))

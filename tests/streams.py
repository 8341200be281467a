"""Data for the tests of streams."""

import numpy as np

from softjax import streaming

K = 4


def data(n=257, d=5, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(dtype) * np.arange(1, d + 1, dtype=dtype)
    return x, (np.argmax(x[:, :K] + rng.gumbel(size=(n, K)), 1)).astype(np.int32)


def batches_of(x, y, size=32, **options):
    return streaming.Batches(streaming.ArrayRows(x, y), size, **options)

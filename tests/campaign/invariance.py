"""A row has the same bits in any batch: some of 70 rows in any order, and all 70 rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import softjax
from tests.campaign import Failure, Outcome

NAME = "invariance"
FIGURE = "the largest difference in units of the last digit"

ROWS, FEATURES = 70, 48
CLASSES = (2, 10, 63, 131, 1000, 1037)
FUNCTIONS = {
    "softmax": lambda x, labels: softjax.softmax(x),
    "log_softmax": lambda x, labels: softjax.log_softmax(x),
    "logsumexp": lambda x, labels: softjax.logsumexp(x, -1),
    "cross_entropy": softjax.cross_entropy,
    "label smoothing": partial(softjax.cross_entropy, label_smoothing=0.1),
    "distribution": lambda x, labels: softjax.cross_entropy(x, softjax.softmax(x[:, ::-1])),
}
OF_HEADS = {
    "linear_logsumexp": lambda h, w, labels, **options: softjax.linear_logsumexp(h, w, **options),
    "linear_cross_entropy": softjax.linear_cross_entropy,
    "linear_cross_entropy_outputs": softjax.linear_cross_entropy_outputs,
}


def run(rng: np.random.Generator) -> Outcome:
    name = str(rng.choice([*FUNCTIONS, *OF_HEADS]))
    dtype = str(rng.choice(["float32", "float64", "bfloat16"]))
    classes, count = int(rng.choice(CLASSES)), int(rng.integers(1, ROWS + 1))
    rows, labels = 3 * rng.standard_normal((ROWS, classes)), rng.integers(classes, size=ROWS)
    if name in FUNCTIONS:
        function = FUNCTIONS[name]
    else:
        rows = rng.standard_normal((ROWS, FEATURES))
        transposed = bool(rng.integers(2))
        shape = (classes, FEATURES) if transposed else (FEATURES, classes)
        kernel = jnp.asarray(rng.standard_normal(shape), dtype)

        def function(rows, labels):
            options = {"transpose_kernel": transposed, "batch_invariant": True}
            return OF_HEADS[name](rows, kernel, labels, **options)

    compiled, order = jax.jit(function), rng.permutation(ROWS)[:count]
    rows = jnp.asarray(rows, dtype)
    some, every = compiled(rows[order], labels[order]), compiled(rows, labels)
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(every), strict=True):
        difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)[order]
        if np.any(difference):
            off = np.max(np.abs(difference))
            raise Failure(f"{name} {dtype} of {count} rows, {classes} classes is off by {off:.3g}")
    return Outcome(0.0, name)

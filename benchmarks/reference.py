"""The inputs of the suite `core`, and the expected results, in float64 and NumPy."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from benchmarks.core import Case, Shape


def inputs(
    shape: "Shape", dtype: str, seed: int = 0, operation: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits with a standard deviation of 3, as in training; labels; a tangent.

    Labels are class indices; for the loss of distributions they are smoothed to distributions.
    """
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((shape.examples, shape.classes), np.float32)
    labels = rng.integers(shape.classes, size=shape.examples, dtype=np.int32)
    tangent = rng.standard_normal(logits.shape, np.float32)
    if operation == "distribution_cross_entropy":
        one_hot = np.eye(shape.classes, dtype=np.float32)[labels]
        labels = np.float32(0.9) * one_hot + np.float32(0.1 / shape.classes)
    return logits.astype(dtype), labels, tangent.astype(dtype)


def reference(
    case: "Case", logits: np.ndarray, labels: np.ndarray, tangent: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The expected results of a case: the value, the derivative or both; p is the softmax.

    logsumexp:      value y = log sum exp x     gradient p softmax:        value p
    gradient p (t - <p, t>) log_softmax:    value x - y                 gradient t - p sum(t)
    cross_entropy:  value y - x[label]          gradient p - one-hot(label)
    distribution_cross_entropy:  value Q y - <q, x>, q the label of sum Q

    jvp: the value and its change along t; hvp: p (t - <p, t>); hessian: diag(p) - p p^T.
    """
    x, t = logits.astype(np.float64), tangent.astype(np.float64)
    rows = np.arange(len(labels)), labels if labels.ndim == 1 else 0
    top = x.max(axis=-1, keepdims=True)
    p = np.exp(x - top)
    total = p.sum(axis=-1, keepdims=True)
    y = (top + np.log(total))[:, 0]
    p /= total
    along = np.sum(p * t, axis=-1)

    def centred() -> np.ndarray:
        return p * (t - along[:, None])

    def less_label() -> np.ndarray:
        difference = p.copy()
        difference[rows] -= 1
        return difference

    def of_distribution() -> np.ndarray:
        q = labels.astype(np.float64)
        return q.sum(axis=-1) * y - np.sum(q * x, axis=-1)

    # The value, the gradient and the change along t; for losses of distributions only the value.
    value, gradient, change = {
        "logsumexp": (lambda: y, lambda: p, lambda: along),
        "softmax": (lambda: p, centred, centred),
        "log_softmax": (
            lambda: x - y[:, None],
            lambda: t - p * t.sum(axis=-1, keepdims=True),
            lambda: t - along[:, None],
        ),
        "cross_entropy": (lambda: y - x[rows], less_label, lambda: along - t[rows]),
        "distribution_cross_entropy": (of_distribution, less_label, centred),
    }[case.operation]
    return {
        "value": lambda: (value(),),
        "eager": lambda: (value(),),
        "gradient": lambda: (gradient(),),
        "value_and_gradient": lambda: (value().mean(), gradient() / len(labels)),
        "jvp": lambda: (value(), change()),
        "hvp": lambda: (centred(),),
        "hessian": lambda: (p[:, :, None] * (np.eye(p.shape[-1]) - p[:, None, :]),),
    }[case.mode]()

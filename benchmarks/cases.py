"""What is measured, as data: shapes named after where they come from, and operations.

A case is an operation in a mode (value, gradient, ...) at a shape and a dtype. Who implements it is
in `peers.py`, how it is timed in `measure.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import fit, fused, scale


@dataclass(frozen=True)
class Shape:
    """A batch of logits [examples, classes] and the model that it comes from."""

    name: str
    examples: int
    classes: int
    origin: str


@dataclass(frozen=True)
class Case:
    """One operation in one mode at one shape; `bound` is the asked ratio to the peer's time."""

    operation: str
    mode: str
    shape: Shape
    bound: float
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The case in one word, such as `logsumexp/gradient/mnist/float32`."""
        return f"{self.operation}/{self.mode}/{self.shape.name}/{self.dtype}"


SHAPES = (
    Shape("mnist", 65536, 10, "ten digits, all of MNIST in one batch"),
    Shape("imagenet-1k", 4096, 1000, "the thousand classes of ImageNet-1k"),
    Shape("mistral-7b", 512, 32768, "the vocabulary of Mistral 7B v0.3"),
    Shape("gemma-3", 64, 262144, "the vocabulary of Gemma 3"),
)

# (operation, mode, bound): the time of softjax over that of the peer, at most.
CORE = (
    ("logsumexp", "value", 1.3),
    ("logsumexp", "gradient", 1.2),
    ("softmax", "value", 1.15),
    ("log_softmax", "value", 1.15),
    ("cross_entropy", "value", 1.3),
    ("cross_entropy", "value_and_gradient", 1.15),
)


def core(shapes: tuple[Shape, ...] = SHAPES) -> list[Case]:
    """The normalizers and the loss on integer labels."""
    return [
        Case(operation, mode, shape, bound) for shape in shapes for operation, mode, bound in CORE
    ]


# The cases of a suite; `run_case` knows how each type of case is measured.
SUITES: dict[str, Sequence[Any]] = {
    "core": core(),
    "fused": fused.CASES,
    "fit": fit.CASES,
    "scale": scale.CASES,
}


def inputs(shape: Shape, dtype: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits with a standard deviation of 3, as of a model in training, and integer labels."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((shape.examples, shape.classes), np.float32)
    labels = rng.integers(shape.classes, size=shape.examples, dtype=np.int32)
    return logits.astype(dtype), labels


def reference(case: Case, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """What a case must return, in float64 NumPy: the value, the gradient or both."""
    shifted = logits.astype(np.float64)
    top = shifted.max(axis=-1, keepdims=True)
    shifted -= top
    if case.operation == "log_softmax":
        return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)),)
    target = (np.arange(len(labels)), labels)
    label_logits = shifted[target]
    probabilities = np.exp(shifted, out=shifted)
    total = probabilities.sum(axis=-1, keepdims=True)
    probabilities /= total
    if case.operation == "softmax":
        return (probabilities,)
    if case.operation == "logsumexp":
        return ((top + np.log(total))[:, 0] if case.mode == "value" else probabilities,)
    losses = np.log(total)[:, 0] - label_logits
    if case.mode == "value":
        return (losses,)
    probabilities[target] -= 1
    probabilities /= len(labels)
    return losses.mean(), probabilities

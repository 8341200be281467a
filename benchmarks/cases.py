"""What is measured, as data: shapes named after where they come from, and operations.

A case is an operation in a mode (value, gradient, ...) at a shape and a dtype. Who implements it is
in `peers.py`, how it is timed in `measure.py`, what it must return in `reference.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import accuracy, cold, fit, fused, imports, inference, many, scale


@dataclass(frozen=True)
class Shape:
    """A batch of logits [examples, classes] and the model that it comes from."""

    name: str
    examples: int
    classes: int
    origin: str


@dataclass(frozen=True)
class Case:
    """One operation in one mode at one shape.

    `bound` is the asked ratio to the time of `jax.nn` or optax, None where none is asked. With
    `donated` the result may overwrite the logits. Only cases with `quick` are in a quick run.
    """

    operation: str
    mode: str
    shape: Shape
    bound: float | None = None
    dtype: str = "float32"
    donated: bool = False
    quick: bool = True

    @property
    def name(self) -> str:
        """The case in one word, such as `logsumexp/gradient/mnist/float32`."""
        buffers = "/donated" if self.donated else ""
        return f"{self.operation}/{self.mode}/{self.shape.name}/{self.dtype}{buffers}"


MNIST = Shape("mnist", 65536, 10, "ten digits, all of MNIST in one batch")
IMAGENET = Shape("imagenet-1k", 4096, 1000, "the thousand classes of ImageNet-1k")
IMAGENET_ROWS = Shape("imagenet-1k-rows", 16, 1000, "sixteen images of ImageNet-1k")
MISTRAL = Shape("mistral-7b", 512, 32768, "the vocabulary of Mistral 7B v0.3")
GEMMA_3 = Shape("gemma-3", 64, 262144, "the vocabulary of Gemma 3")
GPT_2 = Shape("gpt-2", 256, 50257, "the vocabulary of GPT-2, an odd number")
LLAMA_3 = Shape("llama-3", 128, 128256, "the vocabulary of Llama 3")
GEMMA_2 = Shape("gemma-2", 64, 256000, "the vocabulary of Gemma and Gemma 2")

SMALL = Shape("small", 32, 10, "a batch that takes no time: what is measured is the call")

ASKED_SHAPES = (MNIST, IMAGENET, MISTRAL, GEMMA_3)
SHAPES = (*ASKED_SHAPES, GPT_2, LLAMA_3, GEMMA_2, IMAGENET_ROWS, SMALL)

# (operation, mode, bound): the time of softjax over that of the peer, at most.
CORE = (
    ("logsumexp", "value", 1.3),
    ("logsumexp", "gradient", 1.2),
    ("softmax", "value", 1.15),
    ("log_softmax", "value", 1.15),
    ("cross_entropy", "value", 1.3),
    ("cross_entropy", "value_and_gradient", 1.15),
)

# Calls outside of `jit`, with all that happens before a program runs.
EAGER = (
    ("logsumexp", None),
    ("softmax", None),
    ("log_softmax", 1.0),
    ("cross_entropy", None),
    ("distribution_cross_entropy", 1.0),
)

# What training and inference call, at the vocabularies of language models.
OF_VOCABULARIES = (
    ("logsumexp", "value"),
    ("softmax", "value"),
    ("cross_entropy", "value"),
    ("cross_entropy", "value_and_gradient"),
)

# The derivatives that no bound is asked for.
DERIVATIVES = (
    ("logsumexp", "jvp", IMAGENET),
    ("logsumexp", "hvp", IMAGENET),
    ("logsumexp", "hessian", MNIST),
    ("logsumexp", "hessian", IMAGENET_ROWS),
    ("softmax", "gradient", IMAGENET),
    ("softmax", "jvp", IMAGENET),
    ("log_softmax", "gradient", IMAGENET),
    ("cross_entropy", "jvp", IMAGENET),
    ("cross_entropy", "hvp", IMAGENET),
)


def core() -> list[Case]:
    """The normalizers and the loss, on integer labels but for the calls that say otherwise."""
    asked = [
        Case(operation, mode, shape, bound)
        for shape in ASKED_SHAPES
        for operation, mode, bound in CORE
    ]
    derivatives = [Case(operation, mode, shape) for operation, mode, shape in DERIVATIVES]
    vocabularies = [
        Case(operation, mode, shape, dtype=dtype, quick=shape == GPT_2 and dtype == "bfloat16")
        for shape in (GPT_2, LLAMA_3, GEMMA_2)
        for dtype in ("float32", "bfloat16")
        for operation, mode in OF_VOCABULARIES
    ]
    half = [Case("softmax", "value", IMAGENET, dtype="float16")]
    donated = [
        Case(operation, "value", shape, donated=True, quick=shape == IMAGENET)
        for shape in (IMAGENET, GPT_2)
        for operation in ("softmax", "log_softmax")
    ]
    eager = [Case(operation, "eager", SMALL, bound) for operation, bound in EAGER]
    return [*asked, *derivatives, *vocabularies, *half, *donated, *eager]


# The cases of a suite; `run_case` knows how each type of case is measured.
SUITES: dict[str, Sequence[Any]] = {
    "core": [*core(), imports.Case()],
    "accuracy": accuracy.CASES,
    "fused": fused.CASES,
    "fit": fit.CASES,
    "many": many.CASES,
    "cold": cold.CASES,
    "inference": inference.CASES,
    "scale": scale.CASES,
}

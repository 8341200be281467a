"""The suite `core`: the normalizers, the loss on logits and the import, compared with the peers.

A case is an operation in a mode (value, gradient, ...) at a shape and a dtype. `peers.py` lists the
implementations, `measure.py` times them, and `reference.py` computes the expected results.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from benchmarks import measure, roofline
from benchmarks.environment import version
from benchmarks.peers import JAX_NN, OPTAX, SOFTJAX, Implementation, compiled_by_jax, peers_of
from benchmarks.reference import inputs, reference
from benchmarks.results import Row


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

    `bound` is the largest allowed ratio to the time of `jax.nn` or optax, or None. With `donated`
    the result may overwrite the logits. A quick run measures only cases with `quick`.
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

    def run(self, pairs: int) -> Iterator[Row]:
        """Measures softjax and each peer that supports the operation and the mode of the case.

        Both results are first compared with the float64 reference. An implementation with a wrong
        result is recorded as wrong, and its pair is not timed; one that raises is recorded with its
        error.
        """
        host = inputs(self.shape, self.dtype, operation=self.operation)
        expected = reference(self, *host)
        arguments = tuple(map(jax.device_put, host))
        head = self.head() | {"logits_bytes": host[0].nbytes}
        if self.mode != "eager":  # its time is the time of the call
            sizes = self.shape.examples, self.shape.classes, host[0].itemsize
            head |= roofline.of_logits(self.operation, self.mode, *sizes)

        def prepare(who: Implementation) -> measure.Side:
            operation = who.operations[self.operation]
            compiled = who.prepare(operation, self.mode, arguments, self.donated)
            error = measure.error(compiled.results(), expected)
            return measure.Side(
                who.name, compiled, error, measure.TOLERANCES[self.dtype], who.version
            )

        ours, seen = prepare(SOFTJAX), False
        quick = pairs < measure.PAIRS
        for peer in peers_of(self.operation, self.mode, self.dtype, quick):
            if self.donated and peer.prepare is not compiled_by_jax:
                continue
            try:
                first, second = measure.beside(head, ours, prepare(peer), pairs)
            except Exception as error:
                yield measure.failure("core", f"{self.name} {peer.name}", error)
                continue
            if not seen:
                yield first | {"device_peak_bytes": measure.device_peak_bytes()}
            seen = True
            if self.bound is not None and peer in (JAX_NN, OPTAX):
                second["checks"] = {"time": [second.get("ratio"), self.bound]}
            yield second
        if not seen:
            yield head | ours.row()

    def head(self) -> Row:
        """The fields that all rows of the case share."""
        return {
            "operation": self.operation,
            "mode": self.mode,
            "shape": self.shape.name,
            "examples": self.shape.examples,
            "classes": self.shape.classes,
            "dtype": self.dtype,
            "donated": self.donated,
        }


# The imports of a process with softjax and without it; each process takes a second.
PEER = "import jax, optax"
OURS = f"{PEER}, softjax"
MOST_PAIRS = 15


@dataclass(frozen=True)
class Import:
    """The CPU seconds that `import softjax` adds to `import jax, optax`, in pairs of processes.

    The bound is a tenth more than JAX and optax take alone.
    """

    name: str = "import/process"
    bound: float = 1.1
    quick: bool = True

    def run(self, pairs: int) -> Iterator[Row]:
        """The CPU time of processes that only import, alternately with softjax and without."""
        none = Case("import", "process", Shape("process", 0, 0, "no logits"))
        head = none.head() | {"logits_bytes": 0}

        def cpu(program: str) -> float:
            return measure.process_times([sys.executable, "-c", program])[0]

        cpu(OURS)
        samples = [(cpu(OURS), cpu(PEER)) for _ in range(min(pairs, MOST_PAIRS))]
        ours, theirs = measure.paired(*zip(*samples, strict=True))
        named = {"side": "softjax", "version": version("softjax-regression"), "wrong": False}
        yield head | named | ours
        named = {"side": "jax and optax", "version": version("jax"), "wrong": False}
        yield head | named | theirs | {"checks": {"time": [theirs["ratio"], self.bound]}}


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

# (operation, mode, bound), where bound is the largest ratio of softjax's time to the peer's.
CORE = (
    ("logsumexp", "value", 1.3),
    ("logsumexp", "gradient", 1.2),
    ("softmax", "value", 1.15),
    ("log_softmax", "value", 1.15),
    ("cross_entropy", "value", 1.3),
    ("cross_entropy", "value_and_gradient", 1.15),
)

# Calls outside of `jit`, including everything that happens before a program runs.
EAGER = (
    ("logsumexp", None),
    ("softmax", None),
    ("log_softmax", 1.0),
    ("cross_entropy", None),
    ("distribution_cross_entropy", 1.0),
)

# The functions of training and inference, at the vocabularies of language models.
OF_VOCABULARIES = (
    ("logsumexp", "value"),
    ("softmax", "value"),
    ("cross_entropy", "value"),
    ("cross_entropy", "value_and_gradient"),
)

# Derivatives without a bound.
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
    """The cases of the normalizers and the loss; most calls have integer labels."""
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


CASES = (*core(), Import())

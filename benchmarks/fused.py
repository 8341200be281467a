"""The suite `fused`: linear_cross_entropy, the plain loss, and a map over chunks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import softjax
from benchmarks import measure, roofline
from benchmarks.peers import PEERS as PACKAGES
from benchmarks.peers import compiled_by_jax
from benchmarks.results import Row

# The number of rows in a chunk of the map: a quarter of the batch.
CHUNK = 256

# The largest error, relative to the largest entry, of a correct result: the logits are sums of 512
# products in float32, and the sides sum them in different orders.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """The shape of the head of a language model, and its source."""

    name: str
    rows: int
    features: int
    classes: int
    dtype: str
    origin: str


@dataclass(frozen=True)
class Case:
    """One mode with one peer, and the bounds on time and temporaries; None for no bound.

    Without a peer it is only compiled, and its temporaries have a bound in bytes.
    """

    mode: str
    shape: Shape
    peer: str | None
    time: float | None = None
    temporaries: float | None = None
    budget: int | None = None
    quick: bool = True

    @property
    def name(self) -> str:
        """The name of the case, such as `value/gpt-2-head/float32`, with the budget if any."""
        return f"{self.case} {self.peer or 'alone'}"

    @property
    def case(self) -> str:
        """Without the peer."""
        budget = f"/budget {self.budget // 10**6} MB" if self.budget else ""
        return f"{self.mode}/{self.shape.name}/{self.shape.dtype}{budget}"

    def run(self, pairs: int) -> Iterator[Row]:
        """Measures a case; if the results of both sides differ, the pair is not timed.

        If the peer's package is absent, nothing is measured.
        """
        ours, shape = in_mode(partial(fused, budget=self.budget), self.mode), self.shape
        sizes = shape.rows, shape.features, shape.classes
        head = {
            "case": self.case,
            "mode": self.mode,
            "shape": shape.name,
            **dict(zip(("rows", "features", "classes"), sizes, strict=True)),
            "dtype": shape.dtype,
            "budget": self.budget,
            **roofline.of_head(self.mode, *sizes, jnp.dtype(shape.dtype).itemsize),
        }
        if self.peer is None:
            costs = measure.compile_ahead(ours, *structures(shape)).costs()
            checks = {"temporaries": [costs["temporary_bytes"], self.temporaries]}
            yield {**head, "side": "softjax", **costs, "checks": checks}
            return
        package = next((peer for peer in PACKAGES if peer.name == self.peer), None)
        if package is not None and package.absence:
            return
        arguments = inputs(shape)
        compiled = measure.compile_ahead(ours, *arguments)
        operation = package.operations["linear_cross_entropy"] if package else PEERS[self.peer]
        prepare = package.prepare if package else compiled_by_jax
        if prepare is compiled_by_jax:
            theirs = measure.compile_ahead(in_mode(operation, self.mode), *arguments)
        else:
            theirs = prepare(operation, self.mode, arguments, False)
        error = measure.error(compiled.results(), jax.tree.leaves(theirs.results()))
        tolerance = max(TOLERANCE, measure.TOLERANCES[shape.dtype])
        mine, other = (
            measure.Side(name, own, error, tolerance)
            for name, own in (("softjax", compiled), (self.peer, theirs))
        )
        first, second = measure.beside(head, mine, other, pairs)
        # softjax has one row per case, with the first of its peers.
        if self.first:
            yield first
        yield second | {"checks": self._checks(first, second)}

    @property
    def first(self) -> bool:
        """Whether no earlier case is the same with another peer."""
        return next((c for c in CASES if c.case == self.case), self).peer == self.peer

    def _checks(self, ours: Row, theirs: Row) -> dict[str, list]:
        mine, other = ours.get("temporary_bytes"), theirs.get("temporary_bytes")
        share = mine / other if mine is not None and other else None
        asked = {"time": (theirs.get("ratio"), self.time), "temporaries": (share, self.temporaries)}
        return {name: [got, most] for name, (got, most) in asked.items() if most is not None}


HEAD = Shape("gpt-2-head", 1024, 512, 50257, "float32", "the vocabulary of GPT-2, a small width")
GEMMA = Shape("gemma-2-2b", 8192, 2304, 256000, "bfloat16", "Gemma 2 2B, two sequences of 4096")

CASES = [
    Case("value", HEAD, "plain", time=1.05, temporaries=0.1),
    Case("value_and_gradient", HEAD, "plain", time=1.0, temporaries=0.3),
    Case("value_and_gradient", HEAD, "map", time=0.85, quick=False),
    Case("hessian_product", HEAD, "plain", temporaries=0.35, quick=False),
    Case("value_and_gradient", GEMMA, None, temporaries=2.6e9),
    Case("value_and_gradient", GEMMA, None, temporaries=0.5e9, budget=200_000_000),
    *(
        Case("value_and_gradient", replace(HEAD, dtype=peer.dtypes[0]), peer.name, quick=False)
        for peer in PACKAGES
        if "linear_cross_entropy" in peer.operations
    ),
]


def inputs(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
    """hidden, kernel and labels; logits with a standard deviation of 3."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((shape.rows, shape.features), np.float32)
    kernel = rng.standard_normal((shape.features, shape.classes), np.float32)
    kernel *= 3 / np.sqrt(shape.features, dtype=np.float32)
    labels = rng.integers(shape.classes, size=shape.rows, dtype=np.int32)
    return tuple(map(jnp.asarray, (hidden.astype(shape.dtype), kernel.astype(shape.dtype), labels)))


def structures(shape: Shape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes and dtypes of `inputs`."""
    return (
        jax.ShapeDtypeStruct((shape.rows, shape.features), shape.dtype),
        jax.ShapeDtypeStruct((shape.features, shape.classes), shape.dtype),
        jax.ShapeDtypeStruct((shape.rows,), "int32"),
    )


def fused(hidden, kernel, labels, budget: int | None = None) -> jax.Array:
    """The mean loss of softjax."""
    return softjax.linear_cross_entropy(
        hidden, kernel, labels, reduction="mean", max_temp_bytes=budget
    )


def plain(hidden, kernel, labels) -> jax.Array:
    """The mean loss of optax on all logits."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
    return losses.mean()


def mapped(hidden, kernel, labels) -> jax.Array:
    """The mean loss of optax over chunks of rows, which the backward pass recomputes."""
    chunks = hidden.reshape(-1, CHUNK, hidden.shape[-1]), labels.reshape(-1, CHUNK)
    return lax.map(jax.checkpoint(lambda c: plain(c[0], kernel, c[1])), chunks).mean()


PEERS: dict[str, Callable] = {"plain": plain, "map": mapped}


def in_mode(loss: Callable, mode: str) -> Callable:
    """The function of (hidden, kernel, labels) that a case measures."""
    match mode:
        case "value":
            return loss
        case "value_and_gradient":
            return jax.value_and_grad(loss, (0, 1))
        case "hessian_product":

            def product(hidden, kernel, labels):
                gradient = jax.grad(lambda h, w: loss(h, w, labels), (0, 1))
                return jax.jvp(gradient, (hidden, kernel), (hidden, kernel))[1]

            return product
    raise ValueError(f"benchmarks: unknown mode {mode!r}.")

"""The suite `fused`: linear_cross_entropy beside the plain loss, and beside a map over chunks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich import box
from rich.table import Table

import softjax
from benchmarks import measure, roofline
from benchmarks.peers import PEERS as PACKAGES
from benchmarks.peers import compiled_by_jax

# Rows of a chunk of the map: a quarter of the batch.
CHUNK = 256

# The largest error, over the largest entry, that counts as the same result: the logits are sums of
# 512 products in float32, and both sides sum them in another order.
TOLERANCE = 1e-4

Record = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """The head of a language model, and where its shape comes from."""

    name: str
    rows: int
    features: int
    classes: int
    dtype: str
    origin: str


@dataclass(frozen=True)
class Case:
    """One mode beside one peer; the asked ratios of time and of temporaries, None for no bound.

    Without a peer it is compiled only, and its temporaries have a bound in bytes.
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
        """The case in one word, such as `fused/value/gpt-2-head/float32/plain`."""
        against = self.peer or f"budget-{self.budget}"
        return f"fused/{self.mode}/{self.shape.name}/{self.shape.dtype}/{against}"


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


def run(case: Case, pairs: int) -> Iterator[Record]:
    """Measure a case. Both sides must first return the same; if not, the pair is not timed.

    Beside a package that is absent there is nothing to measure.
    """
    ours = in_mode(partial(fused, budget=case.budget), case.mode)
    shape = case.shape
    sizes = shape.rows, shape.features, shape.classes, jnp.dtype(shape.dtype).itemsize
    record = {"record": "result", "suite": "fused", "case": case.name, **asdict(case)}
    record["work"] = asdict(roofline.of_head(case.mode, *sizes))
    if case.peer is None:
        compiled = measure.compile_ahead(ours, *structures(shape))
        record["softjax"] = _side("softjax", compiled)
        record["wrong"] = False
        record["met"] = _within(compiled.temporary_bytes, case.temporaries)
        yield record
        return
    package = next((peer for peer in PACKAGES if peer.name == case.peer), None)
    if package is not None and package.absence:
        return
    arguments = inputs(shape)
    compiled = measure.compile_ahead(ours, *arguments)
    if package is None or package.prepare is compiled_by_jax:
        loss = PEERS[case.peer] if package is None else package.operations["linear_cross_entropy"]
        theirs = measure.compile_ahead(in_mode(loss, case.mode), *arguments)
    else:
        loss = package.operations["linear_cross_entropy"]
        theirs = package.prepare(loss, case.mode, arguments, False)
    error = measure.error(compiled.results(), jax.tree.leaves(theirs.results()))
    record |= {"softjax": _side("softjax", compiled), "other": _side(case.peer, theirs)}
    tolerance = max(TOLERANCE, measure.TOLERANCES[shape.dtype])
    record |= {"error": error, "wrong": not error <= tolerance}
    if not record["wrong"]:
        timed = measure.time_in_pairs(compiled, theirs, pairs)
        record["softjax"]["seconds"] = asdict(timed.first)
        record["other"]["seconds"] = asdict(timed.second)
        record |= {"pairs": timed.count, "ratio": asdict(timed.ratio)}
        record["temporary_ratio"] = _ratio(compiled.temporary_bytes, theirs.temporary_bytes)
        record["met"] = _within(timed.ratio.median, case.time) and _within(
            record["temporary_ratio"], case.temporaries
        )
    yield record


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
    """The same over chunks of rows, each computed again in the backward pass."""
    chunks = hidden.reshape(-1, CHUNK, hidden.shape[-1]), labels.reshape(-1, CHUNK)
    return lax.map(jax.checkpoint(lambda c: plain(c[0], kernel, c[1])), chunks).mean()


PEERS: dict[str, Callable] = {"plain": plain, "map": mapped}


def in_mode(loss: Callable, mode: str) -> Callable:
    """A loss as the function of (hidden, kernel, labels) that a case measures."""
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


def results_tables(records: Sequence[Record]) -> list[Table]:
    """One table a shape."""
    tables: dict[str, Table] = {}
    for record in records:
        shape = record["shape"]
        sizes = shape["rows"], shape["features"], shape["classes"]
        title = f"{shape['name']} {sizes} {shape['dtype']}"
        if title not in tables:
            tables[title] = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
            for column in COLUMNS:
                tables[title].add_column(column, no_wrap=True)
        tables[title].add_row(*cells(record))
    return list(tables.values())


def summary(records: Sequence[Record]) -> str:
    """One line: how many bounds are met, and what is wrong."""
    met = sum(record.get("met", False) for record in records)
    wrong = sum(record["wrong"] for record in records)
    return f"fused: {met} of {len(records)} within the asked bounds, {wrong} wrong results"


COLUMNS = ("mode", "beside", "time, ms", "ratio (95 %)", "temp., MB", "ratio", "asked")


def cells(record: Record) -> tuple[str, ...]:
    """A record as the cells of a row."""
    mode, ours = record["mode"].replace("_", " "), record["softjax"]
    temporaries = f"{ours['temporary_bytes'] / 1e6:.1f}"
    if record["peer"] is None:
        budget = "" if record["budget"] is None else f"budget {record['budget'] / 1e6:.0f} MB"
        asked = f"{record['temporaries'] / 1e6:.0f} MB"
        return mode, budget or "compiled only", "", "", temporaries, "", asked
    other = record["other"]
    if record["wrong"]:
        return mode, record["peer"], "wrong", f"error {record['error']:.1e}", "", "", ""
    times = " / ".join(f"{1e3 * side['seconds']['median']:.0f}" for side in (ours, other))
    ratio = "{median:.2f} ({low:.2f}, {high:.2f})".format(**record["ratio"])
    asked = ", ".join(
        f"{what} {bound:g}"
        for what, bound in (("time", record["time"]), ("temp.", record["temporaries"]))
        if bound is not None
    )
    if record["temporary_ratio"] is None:
        return mode, record["peer"], times, ratio, temporaries, "", asked
    temporaries += f" / {other['temporary_bytes'] / 1e6:.1f}"
    return (
        mode,
        record["peer"],
        times,
        ratio,
        temporaries,
        f"{record['temporary_ratio']:.2f}",
        asked,
    )


def markdown(records: Sequence[Record]) -> str:
    """The records as one Markdown table."""
    rows = [("shape", *COLUMNS), tuple("---" for _ in range(len(COLUMNS) + 1))]
    rows += [(record["shape"]["name"], *cells(record)) for record in records]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _side(name: str, compiled: measure.Compiled) -> Record:
    return {"name": name, **compiled.costs()}


def _ratio(ours: int | None, theirs: int | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def _within(value: float | None, bound: float | None) -> bool:
    return bound is None or (value is not None and value <= bound)

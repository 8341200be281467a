"""The programs that `python -m benchmarks aot` compiles, for softjax and its peers, as data.

Arguments are given by shape and dtype only, so that a case may be larger than any memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import softjax
from benchmarks import fused, peers
from benchmarks.targets import Target, mesh_devices
from softjax import derivatives, regression

Array = jax.ShapeDtypeStruct
CORE_SHAPES = ((65536, 10), (4096, 1000), (512, 32768), (8192, 128256))
# Rows, features and classes: Gemma 2 2B, Llama 3 8B, and two shapes of published measurements.
HEADS = ((8192, 2304, 256000), (16384, 4096, 128256))
PUBLISHED_HEADS = ((32768, 2560, 128256), (32768, 4096, 131072))
SMALL_BUDGET = 500_000_000
# Examples, features and classes: the digits of scikit-learn, and the forest covers.
FITS = {"digits": (1797, 64, 10), "covtype": (200_000, 54, 7)}
SOLVERS = ("newton-cg", "newton", "lbfgs")
# A linear probe of the images of ImageNet.
PROBE = (1_280_000, 768, 1000)
SHARDED_HEAD = (16384, 4096, 128256)
SHARDED_LOGITS = (8192, 128256)


@dataclass(frozen=True)
class Case:
    """A program of softjax and a program of its peer, for the same arguments."""

    suite: str  # one of SUITES
    name: str  # its operation, shape and dtype
    kind: str  # a key of the bounds of `benchmarks.aot`, or "" for no bound
    ours: Callable[..., Any]  # a function, or the result of `jax.jit`
    peer: Callable[..., Any] | None  # the peer's function; None without a peer
    peer_name: str  # the package of the peer
    arguments: tuple[Any, ...]  # shapes, dtypes and, over a mesh, shardings
    rows: int  # the number of examples; the bound on temporaries allows some numbers for each
    quick: bool = False  # whether the gate compiles this case

    @property
    def full_name(self) -> str:
        """The full name, such as `core/softmax/4096x1000/float32`."""
        return f"{self.suite}/{self.name}"


def cases(target: Target, suites: Sequence[str]) -> Iterator[Case]:
    """The cases of some suites; the cases of a suite are built when they are reached."""
    for suite in suites:
        yield from SUITES[suite](target)


def pulled_back(function: Callable) -> Callable:
    """The value of a function, and the product of a cotangent and its Jacobian."""

    def value_and_pullback(x, cotangent):
        value, pullback = jax.vjp(function, x)
        return value, pullback(cotangent)[0]

    return value_and_pullback


def mean_and_gradient(loss: Callable) -> Callable:
    """The mean of the losses and its gradient with respect to the logits."""

    def mean(x, labels):
        return jnp.mean(loss(x, labels))

    return jax.value_and_grad(mean)


def gradient(loss: Callable) -> Callable:
    """The gradient of the sum of the losses, which is the gradient of each example's loss.

    Like the closed form, this gradient and the two functions below are in float32.
    """
    of_sum = jax.grad(lambda x, labels: jnp.sum(loss(x, labels)))
    return lambda x, labels: of_sum(x.astype(jnp.float32), labels)


def hvp(loss: Callable) -> Callable:
    """The Hessian of each loss times a vector, by autodiff."""

    def product(x, labels, v):
        point, direction = x.astype(jnp.float32), v.astype(jnp.float32)
        return jax.jvp(lambda x: gradient(loss)(x, labels), (point,), (direction,))[1]

    return product


def hessian(loss: Callable) -> Callable:
    """The Hessian of each loss, by autodiff."""
    return lambda x, labels: jax.vmap(jax.hessian(loss))(x.astype(jnp.float32), labels)


def optax_index(x, labels) -> jax.Array:
    """The loss of optax in float32, the dtype in which softjax computes it."""
    return peers.OPTAX_LOSS(x.astype(jnp.float32), labels)


def optax_distribution(x, labels) -> jax.Array:
    """The loss of optax for distributions, in float32."""
    return optax.losses.softmax_cross_entropy(x.astype(jnp.float32), labels)


def logsumexp(x) -> jax.Array:
    """The log-sum-exp of softjax over the last axis."""
    return softjax.logsumexp(x, -1)


def nn_logsumexp(x) -> jax.Array:
    """The log-sum-exp of `jax.nn` over the last axis."""
    return jax.nn.logsumexp(x, -1)


# Name, kind, softjax's function, the peer's function, its package, and further arguments by name.
OPERATIONS: tuple[tuple[str, str, Callable, Callable, str, tuple[str, ...]], ...] = (
    ("logsumexp", "value", logsumexp, nn_logsumexp, "jax.nn", ()),
    ("softmax", "value", softjax.softmax, jax.nn.softmax, "jax.nn", ()),
    ("log_softmax", "value", softjax.log_softmax, jax.nn.log_softmax, "jax.nn", ()),
    ("loss", "value", softjax.cross_entropy, optax_index, "optax", ("labels",)),
    ("loss of a distribution", "value", softjax.cross_entropy, optax_distribution, "optax",
     ("distribution",)),
    ("logsumexp vjp", "derivative", pulled_back(logsumexp), pulled_back(nn_logsumexp), "jax.nn",
     ("row",)),
    ("softmax vjp", "derivative", pulled_back(softjax.softmax), pulled_back(jax.nn.softmax),
     "jax.nn", ("logits",)),
    ("log_softmax vjp", "derivative", pulled_back(softjax.log_softmax),
     pulled_back(jax.nn.log_softmax), "jax.nn", ("logits",)),
    ("loss value and gradient", "loss and gradient", mean_and_gradient(softjax.cross_entropy),
     mean_and_gradient(optax_index), "optax", ("labels",)),
    ("loss of a distribution value and gradient", "derivative",
     mean_and_gradient(softjax.cross_entropy), mean_and_gradient(optax_distribution), "optax",
     ("distribution",)),
    ("closed-form gradient", "derivative", derivatives.cross_entropy_gradient,
     gradient(optax_index), "optax", ("labels",)),
    ("closed-form HVP", "derivative", derivatives.cross_entropy_hvp, hvp(optax_index), "optax",
     ("labels", "logits")),
)  # fmt: skip
HESSIAN = ("closed-form Hessian", "derivative", derivatives.cross_entropy_hessian,
           hessian(optax_index), "optax", ("labels",))  # fmt: skip
# The functions of a training step, at one shape in two dtypes.
GATED = ("logsumexp", "softmax", "log_softmax", "loss value and gradient", "log_softmax vjp",
         "closed-form HVP")  # fmt: skip


def core(target: Target) -> Iterator[Case]:
    """The normalizers and the loss on logits."""
    for rows, classes in CORE_SHAPES:
        for dtype in ("float32", "bfloat16"):
            for operation in OPERATIONS:
                yield of_logits(operation, rows, classes, dtype)
            if classes <= 1000:
                yield of_logits(HESSIAN, max(rows // classes, 1), classes, dtype)


def of_logits(operation: tuple, rows: int, classes: int, dtype: str) -> Case:
    """An operation on logits [rows, classes]."""
    name, kind, ours, peer, peer_name, others = operation
    shapes = {
        "logits": Array((rows, classes), dtype),
        "row": Array((rows,), dtype),
        "labels": Array((rows,), "int32"),
        "distribution": Array((rows, classes), "float32"),
    }
    arguments = tuple(shapes[key] for key in ("logits", *others))
    gated = name in GATED and (rows, classes) == (4096, 1000)
    full = f"{name}/{rows}x{classes}/{dtype}"
    return Case("core", full, kind, ours, peer, peer_name, arguments, rows, gated)


def plain_bfloat16(hidden, kernel, labels) -> jax.Array:
    """The mean loss of optax on all logits, which are rounded to the dtype of the arguments."""
    return jnp.mean(peers.OPTAX_LOSS((hidden @ kernel).astype(jnp.float32), labels))


def plain_float32(hidden, kernel, labels) -> jax.Array:
    """The mean loss of optax on all logits, in float32."""
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return jnp.mean(peers.OPTAX_LOSS(logits, labels))


def with_gradients(loss: Callable) -> Callable:
    """Value and gradients with respect to hidden and kernel."""
    return jax.value_and_grad(loss, (0, 1))


def each(hidden, kernel, labels) -> jax.Array:
    """The mean of softjax's losses, which are computed without a reduction."""
    return jnp.mean(softjax.linear_cross_entropy(hidden, kernel, labels))


def with_metrics(hidden, kernel, labels) -> Any:
    """The mean loss of softjax, together with all other outputs."""
    found = softjax.linear_cross_entropy_outputs(hidden, kernel, labels, reduction="mean")
    return found.loss, found._replace(loss=None)


def packed(hidden, kernel, labels) -> jax.Array:
    """The mean loss over a quarter of the examples; all others have the ignored label."""
    labels = jnp.where(jnp.arange(len(labels)) % 4 == 0, labels, -100)
    options = {"ignore_index": -100, "max_active": len(labels) // 4, "reduction": "mean"}
    return softjax.linear_cross_entropy(hidden, kernel, labels, **options)


def distilled(hidden, kernel, teacher) -> jax.Array:
    """The mean divergence of a student from a teacher, computed by softjax."""
    head = softjax.LinearHead(*teacher)
    return softjax.linear_distillation_loss(hidden, kernel, head, reduction="mean")


def plain_distilled(hidden, kernel, teacher) -> jax.Array:
    """The mean divergence, computed from all logits of both heads, rounded to bfloat16."""
    pairs = ((hidden, kernel), teacher)
    log_q, log_p = (jax.nn.log_softmax((h @ w).astype(jnp.float32)) for h, w in pairs)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))


def outputs(top_k: int, hidden, kernel, labels) -> Any:
    """The log-probability of the label, logsumexp, entropy, and the top k."""
    return softjax.linear_cross_entropy_outputs(hidden, kernel, labels, top_k=top_k)


def fused_head(target: Target) -> Iterator[Case]:
    """The loss of hidden @ kernel, compared with the loss of optax on all logits."""
    bounded = partial(fused.fused, budget=SMALL_BUDGET)
    plain, ours = with_gradients(plain_bfloat16), with_gradients(fused.fused)
    asked = (
        ("value and gradient", "bfloat16", "head", ours, plain),
        ("value and gradient in 0.5 GB", "bfloat16", "head, small", with_gradients(bounded), plain),
        ("value and gradient", "float32", "head", ours, plain),
    )
    others = (
        ("value and gradient one by one", "bfloat16", "head, each", with_gradients(each), plain),
        ("value", "bfloat16", "", fused.fused, plain_bfloat16),
        ("outputs", "bfloat16", "", partial(outputs, 1), None),
        ("outputs with the 8 best", "bfloat16", "", partial(outputs, 8), None),
    )
    metrics = jax.value_and_grad(with_metrics, (0, 1), has_aux=True)
    others += (
        ("value and gradient with metrics", "bfloat16", "head", metrics, plain),
        ("value and gradient of a quarter", "bfloat16", "", with_gradients(packed), plain),
    )
    programs = [(head, asked + others) for head in HEADS]
    programs += [(head, asked) for head in PUBLISHED_HEADS]
    for (rows, features, classes), of_head in programs:
        for name, dtype, kind, ours, peer in of_head:
            shape = fused.Shape("", rows, features, classes, dtype, "")
            full = f"{name}/{rows}x{features}x{classes}/{dtype}"
            arguments = fused.structures(shape)
            yield Case("fused", full, kind, ours, peer, "optax", arguments, rows)
    for n, d, v in HEADS:
        # The teacher's head has the same shape as the student's, and is not differentiated.
        hidden, kernel, _ = fused.structures(fused.Shape("", n, d, v, "bfloat16", ""))
        full = f"distillation value and gradient/{n}x{d}x{v}/bfloat16"
        ours, peer = with_gradients(distilled), with_gradients(plain_distilled)
        arguments = hidden, kernel, (hidden, kernel)
        yield Case("fused", full, "", ours, peer, "jax.nn", arguments, n)


def fit(target: Target) -> Iterator[Case]:
    """Whole fits of softmax regression; a loop is counted up to its limit."""
    for data, (rows, features, classes) in FITS.items():
        arguments = Array((rows, features), "float32"), Array((rows,), "int32")
        for solver in SOLVERS:
            ours = partial(fitted, solver, classes)
            full = f"{solver}/{data} {rows}x{features}x{classes}/float32"
            yield Case("fit", full, "", ours, None, "", arguments, rows)
    yield probe(target.devices)


def probe(devices: Sequence[Any]) -> Case:
    """A linear probe whose examples are divided among all devices."""
    rows, features, classes = PROBE
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    x = _placed(mesh, (rows, features), "float32", ("data",), ())
    arguments = x, _placed(mesh, (rows,), "int32", ("data",))
    on = f"{len(devices)} device{'s'[: len(devices) != 1]}"
    name = f"newton-cg/probe {rows}x{features}x{classes}/{on}/float32"
    ours = partial(fitted, "newton-cg", classes)
    return Case("fit", name, "", ours, None, "", arguments, rows)


def fitted(solver: str, classes: int, x, y) -> Any:
    """The parameters of a fit."""
    return regression.fit(x, y, num_classes=classes, l2=1e-4, solver=solver).params


# The mesh axes of the examples, of the features of the kernel and of its classes.
LAYOUTS = {
    "data": (("data", "model"), (), ()),
    "classes": (("data",), (), ("model",)),
    "classes and features": (("data",), ("data",), ("model",)),
    "features": (("data", "model"), ("data", "model"), ()),
}


def scale(target: Target) -> Iterator[Case]:
    """Losses over a mesh of two axes, both with Auto and with Explicit axes."""
    devices = sorted(mesh_devices(target), key=lambda device: device.id)
    if len(devices) < 4:
        return
    side = max(n for n in range(1, math.isqrt(len(devices)) + 1) if len(devices) % n == 0)
    grid = np.array(devices).reshape(side, -1)
    on = " x ".join(map(str, grid.shape))
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = Mesh(grid, ("data", "model"), axis_types=(axis_type,) * 2)
        kind = f"{axis_type.name} {on}"
        for layout in LAYOUTS:
            yield _sharded_head(mesh, layout, kind)
        yield from _sharded_logits(mesh, kind)


def _placed(mesh: Mesh, shape: tuple[int, ...], dtype: str, *spec: Any) -> Array:
    return Array(shape, dtype, sharding=NamedSharding(mesh, P(*(axes or None for axes in spec))))


def _sharded_head(mesh: Mesh, layout: str, kind: str) -> Case:
    examples, features, classes = LAYOUTS[layout]
    n, d, v = SHARDED_HEAD
    arguments = (
        _placed(mesh, (n, d), "bfloat16", examples, ()),
        _placed(mesh, (d, v), "bfloat16", features, classes),
        _placed(mesh, (n,), "int32", examples),
    )
    explicit = AxisType.Explicit in mesh.axis_types
    # On Auto axes a trace does not see the shardings, so they are passed as arguments.
    said = {} if explicit else {"class_axis": classes, "feature_axis": features or None}

    def loss(hidden, kernel, labels):
        return softjax.linear_cross_entropy(hidden, kernel, labels, reduction="mean", **said)

    placed = None if explicit else (None, tuple(a.sharding for a in arguments[:2]))
    ours, peer = (jax.jit(with_gradients(f), out_shardings=placed) for f in (loss, plain_float32))
    name = f"head value and gradient/{layout}/{kind}/bfloat16"
    return Case("scale", name, "", ours, None if explicit else peer, "optax", arguments, n)


def _sharded_logits(mesh: Mesh, kind: str) -> Iterator[Case]:
    x = _placed(mesh, SHARDED_LOGITS, "bfloat16", ("data",), ("model",))
    labels = _placed(mesh, SHARDED_LOGITS[:1], "int32", ("data",))
    programs = (
        ("logsumexp", logsumexp, nn_logsumexp, (x,)),
        ("softmax", softjax.softmax, jax.nn.softmax, (x,)),
        ("loss", softjax.cross_entropy, optax_index, (x, labels)),
        ("loss value and gradient", mean_and_gradient(softjax.cross_entropy),
         mean_and_gradient(optax_index), (x, labels)),
    )  # fmt: skip
    for name, ours, peer, arguments in programs:
        # The peers cannot be traced with classes on Explicit axes.
        other = None if AxisType.Explicit in mesh.axis_types else jax.jit(peer)
        full = f"{name}/classes/{kind}/bfloat16"
        yield Case("scale", full, "", jax.jit(ours), other, "peer", arguments, SHARDED_LOGITS[0])


SUITES: dict[str, Callable[[Target], Iterator[Case]]] = {
    "core": core,
    "fused": fused_head,
    "fit": fit,
    "scale": scale,
}


def largest(arguments: Sequence[Any]) -> float:
    """The bytes of the largest argument on one device."""
    return max(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(arguments)
    )

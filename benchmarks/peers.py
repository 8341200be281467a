"""The implementations that are measured: softjax and its peers, with one small interface.

An implementation maps the name of an operation to a function of its arguments, (logits, labels) or
(hidden, kernel, labels), and prepares it for a mode: compiled if possible, with the arguments
bound. `list` shows which peers are not installed.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import softjax
from benchmarks import measure, torch_peers
from benchmarks.environment import version

Operation = Callable[..., Any]
MODES = ("value", "gradient", "value_and_gradient", "jvp", "hvp", "hessian", "eager")


def in_mode(operation: Operation, mode: str) -> Operation:
    """The function of (logits, labels, tangent) that a case measures.

    The gradient of a function of rows is the gradient of its sum, which keeps the rows separate.
    For `softmax` and `log_softmax` the tangent serves as the cotangent. A loss is averaged over the
    examples, as in training; there is one Hessian for each row.
    """

    def total(logits, labels, tangent):
        result = operation(logits, labels)
        return jnp.sum(tangent * result if result.ndim == logits.ndim else result)

    def mean(logits, labels):
        return jnp.mean(operation(logits, labels))

    def jvp(logits, labels, tangent):
        return jax.jvp(lambda x: operation(x, labels), (logits,), (tangent,))

    def hvp(logits, labels, tangent):
        loss = jax.grad(lambda x: total(x, labels, tangent))
        return jax.jvp(loss, (logits,), (tangent,))[1]

    functions = {
        "value": lambda logits, labels, tangent: operation(logits, labels),
        "gradient": jax.grad(total),
        "value_and_gradient": lambda logits, labels, _: jax.value_and_grad(mean)(logits, labels),
        "jvp": jvp,
        "hvp": hvp,
        "hessian": lambda logits, labels, _: jax.vmap(jax.hessian(operation))(logits, labels),
    }
    if mode not in functions:
        raise ValueError(f"benchmarks: unknown mode {mode!r}.")
    return functions[mode]


def compiled_by_jax(operation, mode, arguments, donate) -> measure.Compiled:
    """An operation in a mode, compiled ahead of time; not compiled in the mode "eager"."""
    if mode == "eager":
        logits, labels, _ = arguments
        return measure.Compiled(lambda: operation(logits, labels))
    return measure.compile_ahead(in_mode(operation, mode), *arguments, donate=donate)


def called_with_numpy(operation, mode, arguments, donate) -> measure.Compiled:
    """A function of NumPy arrays, which is not compiled."""
    logits, labels, _ = map(np.asarray, arguments)
    return measure.Compiled(lambda: operation(logits, labels))


@dataclass(frozen=True)
class Implementation:
    """The operations of one package over the last axis, and the modes that it supports."""

    name: str
    distribution: str
    operations: Mapping[str, Operation]
    prepare: Callable[..., measure.Compiled] = compiled_by_jax
    modes: tuple[str, ...] = MODES
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    in_quick_runs: bool = True

    @property
    def version(self) -> str | None:
        """The installed version; None if the package is absent."""
        return version(self.distribution)

    @property
    def absence(self) -> str | None:
        """Why it cannot be measured here; None if it can."""
        if not self.version:
            return "not installed"
        if jax.default_backend() not in self.platforms:
            return f"only on {', '.join(self.platforms)}"
        return None


def _scipy(name: str) -> Operation:
    def function(logits, labels):
        import scipy.special

        return getattr(scipy.special, name)(logits, axis=-1)

    return function


def _scikit_learn(logits, labels):
    from sklearn.utils.extmath import softmax

    return softmax(logits)


def _jaxopt(logits, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt is unmaintained
        from jaxopt.loss import multiclass_logistic_loss  # pyright: ignore[reportMissingImports]

    return jax.vmap(multiclass_logistic_loss)(labels, logits)


def _tokamax(hidden, kernel, labels):
    from absl import flags  # pyright: ignore
    from tokamax import linear_softmax_cross_entropy_loss as loss  # pyright: ignore

    flags.FLAGS.mark_as_parsed()  # otherwise it would parse our command line
    return loss(hidden, labels, kernel, reduction="mean")


def _of_rows(package: Any) -> dict[str, Operation]:
    """The normalizers of a package with the signatures of `jax.nn`."""
    return {
        "logsumexp": lambda logits, labels: package.logsumexp(logits, axis=-1),
        "softmax": lambda logits, labels: package.softmax(logits),
        "log_softmax": lambda logits, labels: package.log_softmax(logits),
    }


SOFTJAX = Implementation(
    "softjax",
    "softjax-regression",
    _of_rows(softjax)
    | {"cross_entropy": softjax.cross_entropy, "distribution_cross_entropy": softjax.cross_entropy},
)
OPTAX_LOSS = optax.losses.softmax_cross_entropy_with_integer_labels
IN_NUMPY: dict[str, Any] = {
    "prepare": called_with_numpy,
    "modes": ("value",),
    "platforms": ("cpu",),
    "dtypes": ("float32",),
    "in_quick_runs": False,
}
IN_TORCH = ("value", "gradient", "value_and_gradient")

JAX_NN = Implementation("jax.nn", "jax", _of_rows(jax.nn))
OPTAX = Implementation(
    "optax",
    "optax",
    {"cross_entropy": OPTAX_LOSS, "distribution_cross_entropy": optax.losses.softmax_cross_entropy},
)
STATSMODELS = Implementation("statsmodels", "statsmodels", {}, platforms=("cpu",))  # `inference`
IN_TRITON: dict[str, Any] = {
    "prepare": torch_peers.classes_first,
    "modes": IN_TORCH,
    "platforms": ("gpu",),
    "dtypes": ("bfloat16",),
}
OF_SCIPY = {name: _scipy(name) for name in ("logsumexp", "softmax", "log_softmax")}
CUT = {"linear_cross_entropy": torch_peers.cut_cross_entropy}
LIGER = {"linear_cross_entropy": torch_peers.liger}
TORCH = "torch", torch_peers.OPERATIONS
PEERS = (
    JAX_NN,
    OPTAX,
    Implementation("jaxopt", "jaxopt", {"cross_entropy": _jaxopt}),
    Implementation("tokamax", "tokamax", {"linear_cross_entropy": _tokamax}),
    Implementation("scipy", "scipy", OF_SCIPY, **IN_NUMPY),
    Implementation("scikit-learn", "scikit-learn", {"softmax": _scikit_learn}, **IN_NUMPY),
    STATSMODELS,
    Implementation("torch", *TORCH, torch_peers.eager, IN_TORCH),
    Implementation("torch compiled", *TORCH, torch_peers.compiled, IN_TORCH, in_quick_runs=False),
    Implementation("cut-cross-entropy", "cut-cross-entropy", CUT, **IN_TRITON),
    Implementation("Liger", "liger-kernel", LIGER, **IN_TRITON),
)


def peers_of(
    operation: str, mode: str = "value", dtype: str = "float32", quick: bool = False
) -> list[Implementation]:
    """The peers that can be measured here and have an operation in a mode and a dtype."""
    return [
        peer
        for peer in PEERS
        if operation in peer.operations
        and mode in peer.modes
        and dtype in peer.dtypes
        and not peer.absence
        and (peer.in_quick_runs or not quick)
    ]

"""The peers in PyTorch, which is imported only if one of them is measured.

Tensors are made from the same arrays, on the GPU if there is one, and every call is waited for.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks import measure


def _cross_entropy(logits, labels):
    from torch.nn import functional  # pyright: ignore[reportMissingImports]

    return functional.cross_entropy(logits, labels, reduction="none")


def _linear_cross_entropy(hidden, kernel, labels):
    return _cross_entropy(hidden @ kernel, labels).mean()


def cut_cross_entropy(hidden, classifier, labels):
    """The loss of Cut Cross-Entropy, with classifier [classes, features]."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return linear_cross_entropy(hidden, classifier, labels)


def liger(hidden, classifier, labels):
    """The loss of Liger, with classifier [classes, features]."""
    from liger_kernel.transformers import functional  # pyright: ignore[reportMissingImports]

    return functional.liger_fused_linear_cross_entropy(hidden, classifier, labels)


OPERATIONS: dict[str, Callable] = {
    "logsumexp": lambda logits, labels: logits.logsumexp(-1),
    "softmax": lambda logits, labels: logits.softmax(-1),
    "log_softmax": lambda logits, labels: logits.log_softmax(-1),
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}


def eager(operation, mode, arguments, donate) -> measure.Compiled:
    """An operation in a mode with its arguments bound, run by PyTorch without compilation."""
    return _bound(operation, mode, arguments)


def classes_first(operation, mode, arguments, donate) -> measure.Compiled:
    """A loss of (hidden, kernel, labels) by a package that needs the kernel transposed."""
    hidden, kernel, labels = arguments
    bound = _bound(operation, mode, (hidden, kernel.T, labels))

    def fetch(results: Any) -> list[np.ndarray]:
        *others, last = bound.fetch(results)
        return [*others, last.T]

    return replace(bound, fetch=fetch)


def compiled(operation, mode, arguments, donate) -> measure.Compiled:
    """An operation in a mode by `torch.compile`, which compiles in the first call."""
    import torch  # pyright: ignore[reportMissingImports]

    bound = _bound(torch.compile(operation, dynamic=False), mode, arguments)
    start = time.perf_counter()
    bound.call()
    return replace(bound, compile_seconds=time.perf_counter() - start)


def _bound(function: Callable, mode: str, arguments: Sequence[jax.Array]) -> measure.Compiled:
    """The function with its arguments, (logits, labels, tangent) or (hidden, kernel, labels)."""
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [_tensor(torch, argument).to(device) for argument in arguments]
    of_logits = tensors[1].ndim == 1
    tangent = tensors.pop() if of_logits else None
    *leaves, labels = tensors
    for leaf in leaves:
        leaf.requires_grad_(mode != "value")

    def call() -> Any:
        result = function(*leaves, labels)
        if mode == "value":
            results = [result]
        else:
            if mode == "gradient":
                loss = (result if result.ndim == 1 else tangent * result).sum()
            else:
                loss = result.mean()
            gradients = torch.autograd.grad(loss, leaves)
            results = [*gradients] if mode == "gradient" else [loss.detach(), *gradients]
        if device == "cuda":
            torch.cuda.synchronize()
        return results

    return measure.Compiled(
        call, fetch=lambda results: [tensor.float().cpu().numpy() for tensor in results]
    )


def _tensor(torch, array: jax.Array) -> Any:
    """The tensor of an array; of half precision, NumPy and torch share only float16."""
    if array.dtype == "bfloat16":
        return torch.tensor(np.asarray(array, np.float32)).bfloat16()
    return torch.tensor(np.array(array, np.int64 if array.dtype == "int32" else None))

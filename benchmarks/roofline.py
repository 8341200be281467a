"""The limits of a device, and the least work that a formula needs.

The least work of a case: each input is read once, each result is written once, and an addition, a
product, a comparison and an exponential are one operation each. No implementation can do with less,
so that

    max(bytes / bandwidth, operations / throughput) / time

is the share of the roofline that it reaches; the fields of a row are `work_bytes` and `flops`. The
compiler's own count is not used, since it counts the body of a loop once. If an array stays in the
cache between calls, as small arrays do, the share may exceed one.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp

REPEATS = 5
DTYPES = ("float32", "bfloat16")


def ceilings() -> dict[str, Any]:
    """The bandwidth of a large copy, and the throughput of a large matrix product in each dtype.

    The copy is made in place, since on a CPU new pages take longer than the copy itself.
    """
    on_cpu = jax.default_backend() == "cpu"
    size, width = (2**27, 2048) if on_cpu else (2**30, 8192)
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    buffer = [jnp.zeros(size // 4, jnp.float32)]

    def copy() -> jax.Array:
        buffer[0] = add_one(buffer[0])
        return buffer[0]

    products = {}
    for dtype in DTYPES:
        square = jnp.ones((width, width), dtype)
        products[dtype] = 2 * width**3 / _fastest(jax.jit(jnp.matmul), square, square)
    return {
        "record": "ceilings",
        "copy_bytes": size,
        "bytes_per_second": 2 * size / _fastest(copy),
        "product_width": width,
        "flops_per_second": products,
    }


def of_logits(
    operation: str, mode: str, examples: int, classes: int, itemsize: int
) -> dict[str, float]:
    """The work of a normalizer or the loss on logits [examples, classes].

    Per logit, the maximum, x - max, exp and the sum are four operations. A tangent t adds p t and
    its sum; each result of the size of the logits adds one or two operations per entry.
    """
    logits, rows = examples * classes, examples
    wide = operation in ("softmax", "log_softmax")
    result = logits if wide else rows
    flops, entries = {
        "value": (4 + wide, logits + result),
        "gradient": (7 if wide else 5, 3 * logits if wide else 2 * logits),
        "value_and_gradient": (6, 2 * logits + 1),
        "jvp": (7 + wide, 2 * logits + 2 * result),
        "hvp": (8, 3 * logits),
        "hessian": (5 + classes, logits + logits * classes),
    }[mode]
    return {"flops": flops * logits, "work_bytes": entries * itemsize}


def of_head(mode: str, rows: int, features: int, classes: int, itemsize: int) -> dict[str, float]:
    """The work of the loss on hidden [rows, features] @ kernel [features, classes].

    The number of products of rows x features x classes is one in the value, two more in the
    gradients, and seven in a Hessian times a vector, which has tangents of both factors.
    """
    products, reads, writes = {
        "value": (1, 1, 0),
        "value_and_gradient": (3, 1, 1),
        "hessian_product": (7, 2, 1),
    }[mode]
    parameters = (rows + classes) * features
    return {
        "flops": 2.0 * products * rows * features * classes,
        "work_bytes": (reads + writes) * parameters * itemsize,
    }


def ideal_seconds(row: dict[str, Any], ceilings: dict[str, Any]) -> float:
    """The shortest time in which a device with these ceilings can do the work of a row."""
    throughput = ceilings["flops_per_second"]
    flops = throughput.get(row["dtype"], throughput["float32"])
    return max(row["work_bytes"] / ceilings["bytes_per_second"], row["flops"] / flops)


def _fastest(function, *arguments: jax.Array) -> float:
    """The shortest of some times, since a ceiling is the best that can be reached."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times[1:])

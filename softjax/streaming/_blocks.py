"""The mean loss of a batch and its gradient, in an order of sums that no number of devices changes.

The rows are cut into blocks of one size. The sums over each block are products of one shape,
however many blocks a device has, and the blocks are added in pairs, the pairs in pairs, and so on:
a device adds its own, and the rest of this tree follows between the devices. Thus the result has
the same bits on any number of devices up to that of the blocks. A sum of JAX has not: its order
depends on the shape of what a device sums, and that of an all-reduce on the number of devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from softjax._cross_entropy import cross_entropy
from softjax.regression import SoftmaxRegression
from softjax.streaming._batches import BLOCKS as DRAWN
from softjax.streaming._batches import Batch

# Each of the rows of two of the blocks that `Batches` draws from. More are slower where a batch is
# small: 16 cost a quarter at 256 x 64 x 10.
BLOCKS = DRAWN // 2
ROWS = "rows"


class Layout(NamedTuple):
    """Which devices have which blocks.

    Attributes:
        mesh: all devices of all processes, along the axis ROWS.
        processes: how many there are.
        wanted: blocks, where there are no more devices.
    """

    mesh: Mesh
    processes: int
    wanted: int

    @property
    def blocks(self) -> int:
        """All of them, and at least one a device."""
        return max(self.wanted, self.mesh.size)

    @property
    def of_process(self) -> int:
        """The blocks of each process but the last ones, which may have fewer."""
        return -(-self.blocks // self.processes)

    @property
    def of_device(self) -> int:
        """The blocks of each device, some of them of no rows unless the numbers divide."""
        return -(-self.of_process * self.processes // self.mesh.size)

    @property
    def divides(self) -> bool:
        """Whether those of each device are a subtree."""
        return self.of_device * self.mesh.size == self.blocks

    @property
    def places(self) -> np.ndarray:
        """Where the blocks are among those of all devices."""
        process, block = np.divmod(np.arange(self.blocks), self.of_process)
        return process * (self.of_device * self.mesh.size // self.processes) + block


def blocks_wanted(rows: int, num_classes: int) -> int:
    """BLOCKS, but for a kernel with more numbers than the batch: its gradient a block costs more.

    One then, or one a device, and the bits are those of the number of devices.
    """
    return BLOCKS if num_classes <= rows else 1


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def mean_loss(
    layout: Layout, batch: Batch, class_weights: Array | None, params: SoftmaxRegression
) -> Array:
    """sum_i w_i loss_i / sum_i w_i, and 0 where all weights are 0; with a gradient in `params`.

    Args:
        layout: of the blocks.
        batch: of as many rows a device as its blocks have.
        class_weights: [K], or None.
        params: kernel [D, K] and bias [K].

    Returns:
        A scalar, nats, at least float32, the same on all devices.
    """
    loss, weight = _summed(layout, _losses, batch, class_weights, params)
    return loss / jnp.where(weight == 0, 1, weight)


@mean_loss.defjvp
def _mean_loss_jvp(layout: Layout, primals: Any, tangents: Any) -> tuple[Array, Array]:
    batch, class_weights, params = primals
    (loss, weight), (kernel, bias) = _summed(layout, _gradients, batch, class_weights, params)
    weight = jnp.where(weight == 0, 1, weight)
    loss_dot = jnp.zeros_like(loss)
    for g, p_dot in zip((kernel.T, bias), tangents[2], strict=True):
        loss_dot += jnp.sum(g / weight * p_dot.astype(g.dtype))
    return loss / weight, loss_dot


def _losses(batch: Batch, class_weights: Array | None, params: SoftmaxRegression) -> Any:
    """Of each block sum_i w_i loss_i and sum_i w_i, [B]."""
    loss = cross_entropy(_logits(batch, params), batch.labels, class_weights=class_weights)
    return _loss_and_weight(batch, loss)


def _gradients(batch: Batch, class_weights: Array | None, params: SoftmaxRegression) -> Any:
    """The same, and the gradients of the former, G^T diag(w) X [B, K, D] and w^T G [B, K]."""
    of_logits = partial(cross_entropy, labels=batch.labels, class_weights=class_weights)
    loss, pull_back = jax.vjp(of_logits, _logits(batch, params))
    (g,) = pull_back(jnp.ones_like(loss))
    weights = batch.weights[..., None].astype(g.dtype)
    g = jnp.where(weights != 0, g, 0)  # NaN, of a label out of range
    # G is turned by itself: a product along the rows of both factors takes twice the time on a
    # CPU, where moreover its bits depend on the number of threads.
    turned = lax.optimization_barrier(jnp.swapaxes(weights * g, 1, 2))
    kernel = _product("bkr,brd->bkd", turned, batch.features.astype(g.dtype))
    bias = _product("brk,brl->blk", g, weights)[:, 0]
    return _loss_and_weight(batch, loss), (kernel, bias)


def _logits(batch: Batch, params: SoftmaxRegression) -> Array:
    """[B, R, K]. Each block has a kernel: the bits of a product vary with the number of rows."""
    kernels = jnp.broadcast_to(params.kernel, (len(batch.labels), *params.kernel.shape))
    z = _product("brd,bdk->brk", batch.features.astype(kernels.dtype), kernels)
    return z + params.bias.astype(z.dtype)


def _loss_and_weight(batch: Batch, loss: Array) -> tuple[Array, Array]:
    weights = batch.weights.astype(loss.dtype)
    columns = jnp.stack([jnp.where(weights != 0, loss, 0), jnp.ones_like(loss)], -1)
    sums = _product("brk,brl->blk", columns, weights[..., None])[:, 0]
    return sums[:, 0], sums[:, 1]


def _product(indices: str, a: Array, b: Array) -> Array:
    # Accelerators round float32 factors to ten bits or fewer by default; see regression._model.
    return jnp.einsum(indices, a, b, precision=lax.Precision.HIGHEST)


def _summed(layout: Layout, function: Callable, batch: Batch, *arguments: Any) -> Any:
    """What `function` gives of each block, summed over the blocks of all devices."""

    def on_device(batch: Batch, *arguments: Any) -> Any:
        shape = layout.of_device, len(batch.labels) // layout.of_device
        blocks = jax.tree.map(lambda p: p.reshape(*shape, *p.shape[1:]), batch)
        sums = function(blocks, *arguments)
        if layout.divides:
            sums = jax.tree.map(lambda p: _tree(p)[None], sums)
        if layout.mesh.size > 1:
            return _over_devices(layout, sums)
        # Nothing that follows is fused with the sums, which it could not be on more devices.
        return lax.optimization_barrier(jax.tree.map(lambda p: p[0], sums))

    if layout.mesh.size == 1:
        return on_device(batch, *arguments)
    specs = (PartitionSpec(ROWS), *(PartitionSpec() for _ in arguments))
    return jax.shard_map(
        on_device, mesh=layout.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )(batch, *arguments)


def _over_devices(layout: Layout, sums: Any) -> Any:
    """The sums of all devices: each adds a part of all numbers, at the cost of an all-reduce."""
    leaves, structure = jax.tree.flatten(sums)
    flat = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)
    padded = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % layout.mesh.size)))
    parts = lax.all_to_all(padded, ROWS, 1, 0, tiled=True)
    part = _tree(parts if layout.divides else parts[layout.places])
    whole = lax.all_gather(part, ROWS, tiled=True)
    ends = np.cumsum([leaf[0].size for leaf in leaves])
    pieces = jnp.split(whole[: ends[-1]], ends[:-1])
    shapes = [leaf.shape[1:] for leaf in leaves]
    return structure.unflatten([p.reshape(s) for p, s in zip(pieces, shapes, strict=True)])


def _tree(x: Array) -> Array:
    """The sum over the first axis: of neighbours, then of neighbours among these, and so on."""
    while len(x) > 1:
        last = x[len(x) // 2 * 2 :]
        x = jnp.concatenate([x[0:-1:2] + x[1::2], last]) if len(last) else x[0::2] + x[1::2]
    return x[0]

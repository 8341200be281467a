"""The mean loss of a batch and its gradient, in an order of sums that no number of devices changes.

The rows are cut into blocks of one size. The sums over each block are products of one shape,
however many blocks a device has, and the blocks are added in pairs, the pairs in pairs, and so on:
a device adds its own, and the rest of this tree follows between the devices. Thus the result has
the same bits on any number of devices up to that of the blocks. A sum of JAX has not: its order
depends on the shape of what a device sums, and that of an all-reduce on the number of devices.

Where there are more classes than rows, a gradient a block would be more than all else that a step
holds, and the classes are cut instead: every device has all rows, and the products of its blocks of
classes, which are again of one shape. These are put side by side, and nothing is added.
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
        of_classes: whether these are cut for the products, and not the rows.
    """

    mesh: Mesh
    processes: int
    of_classes: bool

    @property
    def blocks(self) -> int:
        """All of them, and at least one a device."""
        return max(BLOCKS, self.mesh.size)

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


def _losses(layout: Layout, batch: Batch, class_weights: Array | None, params: Any) -> Any:
    """Of each block of rows sum_i w_i loss_i and sum_i w_i, [B]."""
    z = _logits(layout, batch.features, params)
    loss = cross_entropy(z, batch.labels, class_weights=class_weights)
    return _loss_and_weight(batch, loss)


def _gradients(layout: Layout, batch: Batch, class_weights: Array | None, params: Any) -> Any:
    """The same, and the gradients of the former, G^T diag(w) X [B, K, D] and w^T G [B, K]."""
    of_logits = partial(cross_entropy, labels=batch.labels, class_weights=class_weights)
    loss, pull_back = jax.vjp(of_logits, _logits(layout, batch.features, params))
    (g,) = pull_back(jnp.ones_like(loss))
    weights = batch.weights[..., None].astype(g.dtype)
    g = jnp.where(weights != 0, g, 0)  # NaN, of a label out of range
    bias = _product("brk,brl->blk", g, weights)[:, 0]
    return _loss_and_weight(batch, loss), (_pulled(layout, weights * g, batch.features), bias)


def _logits(layout: Layout, features: Array, params: SoftmaxRegression) -> Array:
    """[B, R, K]. Each block has products of its own: their bits vary with their shape."""
    kernel = params.kernel
    features = features.astype(kernel.dtype)
    if layout.of_classes:
        z = _by_classes(layout, features[0], kernel)[None]
    else:
        kernels = jnp.broadcast_to(kernel, (len(features), *kernel.shape))
        z = _product("brd,bdk->brk", features, kernels)
    return z + params.bias.astype(z.dtype)


def _pulled(layout: Layout, g: Array, features: Array) -> Array:
    """G^T X, [B, K, D]."""
    features = features.astype(g.dtype)
    # One factor is turned by itself: a product along the rows of both takes twice the time on a
    # CPU, where moreover its bits depend on the number of threads.
    if layout.of_classes:
        turned = lax.optimization_barrier(features[0].T)
        return _by_classes(layout, turned, g[0]).T[None]
    turned = lax.optimization_barrier(jnp.swapaxes(g, 1, 2))
    return _product("bkr,brd->bkd", turned, features)


def _by_classes(layout: Layout, a: Array, b: Array) -> Array:
    """a @ b [M, K] by blocks of classes, each device its own."""
    num_classes = b.shape[1]
    size = -(-num_classes // layout.blocks)
    num_own = layout.of_device * size
    own = jnp.pad(b, ((0, 0), (0, num_own * layout.mesh.size - num_classes)))
    if layout.mesh.size > 1:
        own = lax.dynamic_slice_in_dim(own, lax.axis_index(ROWS) * num_own, num_own, 1)

    def product(first):
        columns = lax.optimization_barrier(lax.dynamic_slice_in_dim(own, first, size, 1))
        return _product("mn,nk->mk", a, columns)

    blocks = _gathered(layout, lax.map(product, jnp.arange(0, num_own, size)))
    joined = jnp.swapaxes(blocks, 0, 1).reshape(len(a), -1)[:, :num_classes]
    return lax.optimization_barrier(joined)


def _gathered(layout: Layout, x: Array) -> Array:
    """The blocks of all devices."""
    return lax.all_gather(x, ROWS, tiled=True) if layout.mesh.size > 1 else x


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
        if layout.of_classes:
            rows = jax.tree.map(partial(_rows_of_all, layout), blocks)
            sums = function(layout, rows, *arguments)
            return lax.optimization_barrier(jax.tree.map(lambda p: p[0], sums))
        sums = function(layout, blocks, *arguments)
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


def _rows_of_all(layout: Layout, blocks: Array) -> Array:
    """[1, R, ...], of blocks [B, R / B, ...] on each device."""
    blocks = _gathered(layout, blocks)
    if not layout.divides:
        blocks = blocks[layout.places]
    return blocks.reshape(1, -1, *blocks.shape[2:])


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

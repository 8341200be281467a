"""The mean loss of a batch and its gradient, with the same bits on any number of devices.

The rows of a batch are divided into blocks of equal size. The sums over a block come from products
whose shape does not depend on the number of blocks on a device. The sums of the blocks are then
added as a binary tree: first neighbours, then neighbouring pairs, and so on. Each device adds its
own subtree, and the rest of the tree is added between the devices. The result therefore has the
same bits on any number of devices up to the number of blocks. Ordinary sums of XLA do not have this
property: their order depends on the shape of the operand on a device, and in an all-reduce on the
number of devices.

If there are more classes than rows, one gradient for each block of rows would be larger than all
other arrays of a step. The classes are then divided into blocks instead of the rows: every device
has all rows and computes the products with its own blocks of classes, which again have equal shape.
The results are concatenated, and nothing is added.
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
from softjax._custom_jvp import custom_jvp
from softjax.regression._model import SoftmaxRegression
from softjax.regression._steps import Batch
from softjax.streaming._batches import BLOCKS as DRAWN

# A block here has the rows of two of the blocks from which `Batches` draws. More blocks are slower
# for small batches: 16 blocks take a quarter more time at 256 x 64 x 10.
BLOCKS = DRAWN // 2
ROWS = "rows"


class ReproducibleSums(NamedTuple):
    """The layout of the blocks on the devices, and the mean loss that is summed by blocks."""

    mesh: Mesh  # all devices of all processes, along the axis ROWS
    processes: int  # the number of processes
    of_classes: bool  # whether the blocks divide the classes instead of the rows

    @property
    def blocks(self) -> int:
        """The number of blocks; every device has at least one."""
        return max(BLOCKS, self.mesh.size)

    @property
    def of_process(self) -> int:
        """The number of blocks of a process; the last processes may have fewer."""
        return -(-self.blocks // self.processes)

    @property
    def of_device(self) -> int:
        """The number of blocks of a device; some are empty if the division leaves a remainder."""
        return -(-self.of_process * self.processes // self.mesh.size)

    @property
    def divides(self) -> bool:
        """Whether the blocks of every device are a subtree of the sum."""
        return self.of_device * self.mesh.size == self.blocks

    @property
    def places(self) -> np.ndarray:
        """The places of the blocks in the list of the blocks of all devices, with empty blocks."""
        process, block = np.divmod(np.arange(self.blocks), self.of_process)
        return process * (self.of_device * self.mesh.size // self.processes) + block

    def __call__(
        self, batch: Batch, class_weights: Array | None, params: SoftmaxRegression
    ) -> Array:
        """sum_i w_i loss_i / sum_i c_i, at least float32; 0 if all counts c are 0.

        The batch holds the rows of the blocks of all devices. The result is the same on all
        devices, and differentiable in `params`.
        """
        return _mean_loss(self, batch, class_weights, params)


@partial(custom_jvp, nondiff_argnums=(0,))
def _mean_loss(
    sums: ReproducibleSums, batch: Batch, class_weights: Array | None, params: SoftmaxRegression
) -> Array:
    loss, count = _summed(sums, _losses, batch, class_weights, params)
    return loss / jnp.where(count == 0, 1, count)


@_mean_loss.defjvp
def _mean_loss_jvp(sums: ReproducibleSums, primals: Any, tangents: Any) -> tuple[Array, Array]:
    batch, class_weights, params = primals
    (loss, count), (kernel, bias) = _summed(sums, _gradients, batch, class_weights, params)
    count = jnp.where(count == 0, 1, count)
    loss_dot = jnp.zeros_like(loss)
    for g, p_dot in zip((kernel.T, bias), tangents[2], strict=True):
        loss_dot += jnp.sum(g / count * p_dot.astype(g.dtype))
    return loss / count, loss_dot


def _losses(
    sums: ReproducibleSums, batch: Batch, class_weights: Array | None, params: SoftmaxRegression
) -> Any:
    """For each block of rows sum_i w_i loss_i and sum_i c_i, both [B]."""
    z = _logits(sums, batch, params)
    loss = cross_entropy(z, batch.labels, class_weights=class_weights)
    return _loss_and_count(batch, loss)


def _gradients(
    sums: ReproducibleSums, batch: Batch, class_weights: Array | None, params: SoftmaxRegression
) -> Any:
    """`_losses`, and the gradients of the weighted loss: G^T diag(w) X [B, K, D], G^T w [B, K]."""
    of_logits = partial(cross_entropy, labels=batch.labels, class_weights=class_weights)
    loss, pull_back = jax.vjp(of_logits, _logits(sums, batch, params))
    (g,) = pull_back(jnp.ones_like(loss))
    weights = batch.weights[..., None].astype(g.dtype)
    g = jnp.where(weights != 0, g, 0)  # the gradient of a row with a bad label is NaN
    bias = _product("brk,brl->blk", g, weights)[:, 0]
    return _loss_and_count(batch, loss), (_pulled(sums, weights * g, batch.features), bias)


def _logits(sums: ReproducibleSums, batch: Batch, params: SoftmaxRegression) -> Array:
    """The logits [B, R, K], one product for each block: the bits depend on the shape."""
    kernel = params.kernel
    features = batch.features.astype(kernel.dtype)
    if sums.of_classes:
        z = _by_classes(sums, features[0], kernel)[None]
    else:
        kernels = jnp.broadcast_to(kernel, (len(features), *kernel.shape))
        z = _product("brd,bdk->brk", features, kernels)
    z = z + params.bias.astype(z.dtype)
    return z if batch.offset is None else z + batch.offset.astype(z.dtype)


def _pulled(sums: ReproducibleSums, g: Array, features: Array) -> Array:
    """G^T X for each block, [B, K, D]."""
    features = features.astype(g.dtype)
    # One factor is transposed first. On a CPU, a product that contracts the rows of both factors
    # takes twice the time, and its bits depend on the number of threads.
    if sums.of_classes:
        transposed = lax.optimization_barrier(features[0].T)
        return _by_classes(sums, transposed, g[0]).T[None]
    transposed = lax.optimization_barrier(jnp.swapaxes(g, 1, 2))
    return _product("bkr,brd->bkd", transposed, features)


def _by_classes(sums: ReproducibleSums, a: Array, b: Array) -> Array:
    """a @ b [M, K] by blocks of classes; each device computes its own blocks."""
    num_classes = b.shape[1]
    size = -(-num_classes // sums.blocks)
    num_own = sums.of_device * size
    own = jnp.pad(b, ((0, 0), (0, num_own * sums.mesh.size - num_classes)))
    if sums.mesh.size > 1:
        own = lax.dynamic_slice_in_dim(own, lax.axis_index(ROWS) * num_own, num_own, 1)

    def product(first: Array) -> Array:
        columns = lax.optimization_barrier(lax.dynamic_slice_in_dim(own, first, size, 1))
        return _product("mn,nk->mk", a, columns)

    blocks = _gathered(sums, lax.map(product, jnp.arange(0, num_own, size)))
    joined = jnp.swapaxes(blocks, 0, 1).reshape(len(a), -1)[:, :num_classes]
    return lax.optimization_barrier(joined)


def _gathered(sums: ReproducibleSums, x: Array) -> Array:
    """The blocks of all devices."""
    return lax.all_gather(x, ROWS, tiled=True) if sums.mesh.size > 1 else x


def _loss_and_count(batch: Batch, loss: Array) -> tuple[Array, Array]:
    weights = batch.weights.astype(loss.dtype)
    losses = jnp.stack([jnp.where(weights != 0, loss, 0), jnp.ones_like(loss)], -1)
    if batch.counts is None:
        sums = _product("brk,brl->blk", losses, weights[..., None])[:, 0]
        return sums[:, 0], sums[:, 1]
    both = jnp.stack([weights, batch.counts.astype(loss.dtype)], -1)
    sums = _product("brk,brl->blk", losses, both)
    return sums[:, 0, 0], sums[:, 1, 1]


def _product(indices: str, a: Array, b: Array) -> Array:
    # Accelerators round float32 factors to ten bits or fewer by default; see regression._model.
    return jnp.einsum(indices, a, b, precision=lax.Precision.HIGHEST)


def _summed(sums: ReproducibleSums, function: Callable, batch: Batch, *arguments: Any) -> Any:
    """The results of `function` for each block, summed over the blocks of all devices."""

    def on_device(batch: Batch, *arguments: Any) -> Any:
        shape = sums.of_device, len(batch.labels) // sums.of_device
        blocks = jax.tree.map(lambda p: p.reshape(*shape, *p.shape[1:]), batch)
        if sums.of_classes:
            rows = jax.tree.map(partial(_rows_of_all, sums), blocks)
            results = function(sums, rows, *arguments)
            return lax.optimization_barrier(jax.tree.map(lambda p: p[0], results))
        results = function(sums, blocks, *arguments)
        if sums.divides:
            results = jax.tree.map(lambda p: _tree(p)[None], results)
        if sums.mesh.size > 1:
            return _over_devices(sums, results)
        # The barrier prevents fusions with the sums, which several devices could not have.
        return lax.optimization_barrier(jax.tree.map(lambda p: p[0], results))

    if sums.mesh.size == 1:
        return on_device(batch, *arguments)
    specs = (PartitionSpec(ROWS), *(PartitionSpec() for _ in arguments))
    return jax.shard_map(
        on_device, mesh=sums.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )(batch, *arguments)


def _rows_of_all(sums: ReproducibleSums, blocks: Array) -> Array:
    """The rows of all devices, [1, R, ...], from this device's blocks [B, R / B, ...]."""
    blocks = _gathered(sums, blocks)
    if not sums.divides:
        blocks = blocks[sums.places]
    return blocks.reshape(1, -1, *blocks.shape[2:])


def _over_devices(sums: ReproducibleSums, results: Any) -> Any:
    """The sums over all devices. Each device sums a part of the entries, as in an all-reduce."""
    leaves, structure = jax.tree.flatten(results)
    flat = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)
    padded = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % sums.mesh.size)))
    parts = lax.all_to_all(padded, ROWS, 1, 0, tiled=True)
    part = _tree(parts if sums.divides else parts[sums.places])
    whole = lax.all_gather(part, ROWS, tiled=True)
    ends = np.cumsum([leaf[0].size for leaf in leaves])
    pieces = jnp.split(whole[: ends[-1]], ends[:-1])
    shapes = [leaf.shape[1:] for leaf in leaves]
    return structure.unflatten([p.reshape(s) for p, s in zip(pieces, shapes, strict=True)])


def _tree(x: Array) -> Array:
    """The sum over the first axis as a binary tree: of neighbours, then of neighbouring pairs."""
    while len(x) > 1:
        last = x[len(x) // 2 * 2 :]
        x = jnp.concatenate([x[0:-1:2] + x[1::2], last]) if len(last) else x[0::2] + x[1::2]
    return x[0]

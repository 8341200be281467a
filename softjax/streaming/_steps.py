"""The compiled steps: a batch, its gradient, the optimizer's update, a chunk of them at a time."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from softjax.regression import SoftmaxRegression
from softjax.regression._first_order import largest_entry, updated
from softjax.regression._model import penalty
from softjax.streaming._batches import Batch
from softjax.streaming._blocks import Layout, mean_loss


class State(NamedTuple):
    """All that a step needs of the steps before it; what a checkpoint holds.

    Attributes:
        params: kernel [D, K] and bias [K], finite.
        optimizer_state: of optax.
        step: how many steps were taken.
        total: the objectives of the batches since the last event, summed.
        taken: how many they are.
        norm: the largest entry of the last gradient.
    """

    params: SoftmaxRegression
    optimizer_state: optax.OptState
    step: Array
    total: Array
    taken: Array
    norm: Array


@partial(jax.jit, static_argnames="optimizer")
def start(optimizer: optax.GradientTransformation, params: SoftmaxRegression) -> State:
    """The state before the first step."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        optimizer_state = optimizer.init(params)
    zero = jnp.zeros((), params.kernel.dtype)
    none = jnp.zeros((), jnp.int32)
    return State(params, optimizer_state, none, zero, none, zero)


@partial(
    jax.jit,
    static_argnames=("layout", "optimizer", "transform", "skip_nonfinite"),
    donate_argnames="state",
)
def advance(
    layout: Layout,
    optimizer: optax.GradientTransformation,
    transform: Callable[[Array], Array] | None,
    skip_nonfinite: bool,
    fixed: tuple[Array, Array | None],
    state: State,
    batches: Batch,
    count: Array,
    flags: Array,
) -> tuple[State, Array]:
    """Takes the first `count` of the batches, up to one that is not finite.

    Returns:
        The state, whose step tells how many were good, and whether any process raised its flag:
        it travels with the gradients, so that all learn of it after the same step.
    """
    l2, class_weights = fixed
    last = state.step + count

    def objective(batch: Batch, params: SoftmaxRegression) -> Array:
        features, labels, weights = batch
        if transform is not None:
            features = transform(features)
        batch = Batch(features, labels, weights)
        return mean_loss(layout, batch, class_weights, params) + penalty(params, l2)

    def body(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, _ = carry
        place = state.step - (last - count)
        batch = Batch(*(lax.dynamic_index_in_dim(part, place, keepdims=False) for part in batches))
        if skip_nonfinite:
            batch = _without_bad_rows(batch, state.params.bias.size)
        value_fn = partial(objective, batch)
        value, grad = jax.value_and_grad(value_fn)(state.params)
        params, optimizer_state = updated(
            optimizer, state.optimizer_state, state.params, value, grad, value_fn
        )
        norm = largest_entry(grad)
        taken = State(
            params, optimizer_state, state.step + 1, state.total + value, state.taken + 1, norm
        )
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        for part in params:
            good &= jnp.all(jnp.isfinite(part))
        return jax.tree.map(partial(_choose, good), taken, state), good

    state, _ = lax.while_loop(
        lambda carry: carry[1] & (carry[0].step < last), body, (state, jnp.asarray(True))
    )
    return state, jnp.max(flags)


def _without_bad_rows(batch: Batch, num_classes: int) -> Batch:
    """Weight 0, and nothing that could count in spite of it, for rows that are not finite."""
    features, labels, weights = batch
    good = jnp.all(jnp.isfinite(features), 1) & (labels >= 0) & (labels < num_classes)
    features = jnp.where(good[:, None], features, 0)
    return Batch(features, jnp.where(good, labels, 0), jnp.where(good, weights, 0))


def _choose(good: Array, new: Array, old: Array) -> Array:
    """`new` where all is good, in the dtype of `old`: the next chunk is the same program."""
    return jnp.where(good, lax.convert_element_type(new, jnp.result_type(old)), old)

"""Batches of examples, and the compiled steps of every trainer on them.

A step takes its batch from data on the device, which have one of two types. `Held` holds all
examples and an order of them; `Stacked` holds the batches of the next steps, which were read from
elsewhere. Both have the method `batch(step, first)`, and the step is the same for both.

A step evaluates the objective and its gradient on its batch, at the parameters of the step before,
and applies the update of an optax optimizer. A chunk of steps is one program, whose loop ends early
if the gradient is small or a number is not finite. Such a step is not taken: the parameters of a
state are always finite, and so is the objective there, unless a row is not finite.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from softjax import _checks
from softjax._cross_entropy import cross_entropy
from softjax.regression._arguments import called
from softjax.regression._features import linear
from softjax.regression._model import SoftmaxRegression, penalty
from softjax.regression._result import Status

Transform = Callable[[Array], Array] | None
# A bound of the number of examples of a batch and of the number of features.
MOST = 2.0**30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A batch of examples, padded to a fixed size, or the part of a batch that one process reads.

    Iteration gives features, labels and weights, and the offset if there is one.

    Attributes:
        features: [B, D], at least float32.
        labels: class indices, int32 [B], or distributions over the classes, floating [B, K].
        weights: [B]; 0 for padding and for held-out examples. None for ones.
        offset: [B, K], nats, added to the logits; None for zeros.
        counts: [B], added to the divisor of the mean loss for each example; None for its weight.

    Example:
        >>> import numpy as np, softjax
        >>> rows = softjax.streaming.ArrayRows(np.arange(3.0)[:, None], np.arange(3))
        >>> batch = softjax.streaming.Batches(rows, 3).read(0)
        >>> sorted(batch.labels[batch.weights > 0].tolist()), float(batch.weights.sum())
        ([0, 1, 2], 3.0)
    """

    features: Any
    labels: Any
    weights: Any
    offset: Any = None
    counts: Any = None

    def __iter__(self) -> Iterator[Any]:
        parts = (self.features, self.labels, self.weights, self.offset)
        return iter(parts if self.offset is not None else parts[:3])


class Stacked(NamedTuple):
    """The batches of consecutive steps."""

    batches: Batch  # parts [S, B, ...]

    def batch(self, step: Array, first: Array) -> Batch:
        """The batch of `step`; the stack begins with the batch of the step `first`."""
        place = step - first
        pick = partial(lax.dynamic_index_in_dim, index=place, keepdims=False)
        return jax.tree.map(pick, self.batches)


class Held(NamedTuple):
    """All examples, and the indices of the examples that each step of an epoch takes."""

    rows: Batch  # parts [N, ...]
    # The indices of the examples, int32 [steps, B], -1 for none; None if every step takes all
    # examples.
    order: Array | None

    def batch(self, step: Array, first: Array) -> Batch:
        """The batch of `step`; `first` is not used."""
        if self.order is None:
            return self.rows
        places = self.order[step % len(self.order)]
        inside = places >= 0
        batch = jax.tree.map(lambda part: part[jnp.maximum(places, 0)], self.rows)
        weights = inside if batch.weights is None else jnp.where(inside, batch.weights, 0)
        return replace(batch, weights=weights, counts=inside)


@partial(jax.jit, static_argnames=("num_examples", "batch_size"))
def epoch_order(key: Array, epoch: Array, num_examples: int, batch_size: int) -> Array:
    """The examples of each batch of an epoch, [steps, batch_size]; (key, epoch) determine them.

    The batches cut a random permutation of the examples in order; -1 fills the last batch.
    """
    examples = jnp.arange(num_examples, dtype=jnp.int32)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), examples)
    order = jnp.pad(order, (0, -num_examples % batch_size), constant_values=-1)
    return order.reshape(-1, batch_size)


def mean_loss(batch: Batch, class_weights: Array | None, params: SoftmaxRegression) -> Array:
    """sum_i w_i loss_i / sum_i c_i, nats; 0 where the counts c are 0.

    It is one sum, which XLA adds up over all devices that hold examples.
    """
    z = linear(batch.features, *params)
    z = z if batch.offset is None else z + batch.offset
    losses = cross_entropy(z, batch.labels, class_weights=class_weights)
    if batch.weights is None:
        return jnp.mean(losses)
    weights = batch.weights.astype(losses.dtype)
    counts = batch.weights if batch.counts is None else batch.counts
    total = jnp.sum(counts.astype(losses.dtype))
    # Masked rows change neither the value nor the gradient.
    return jnp.sum(jnp.where(weights != 0, weights * losses, 0)) / jnp.where(total == 0, 1, total)


def without_bad_rows(batch: Batch, num_classes: int) -> Batch:
    """The batch with zeros, and weight 0, in rows that are not finite or have no valid class."""
    good = good_rows(jnp, batch, num_classes)

    def kept(part: Array) -> Array:
        shape = -1, *(1,) * (part.ndim - 1)
        return jnp.where(good.reshape(shape), part, jnp.zeros_like(part))

    return jax.tree.map(kept, batch)


def good_rows(xp: Any, batch: Batch, num_classes: int) -> Any:
    """Whether each row is finite and has a valid class or distribution, [B].

    `xp` is NumPy or `jax.numpy`.
    """
    labels = batch.labels
    good = xp.all(xp.isfinite(batch.features), 1) & xp.isfinite(batch.weights)
    if batch.offset is not None:
        good &= xp.all(xp.isfinite(batch.offset), 1)
    if labels.ndim == 1:
        return good & (labels >= 0) & (labels < num_classes)
    return good & xp.all(xp.isfinite(labels) & (labels >= 0), 1)


class Form(NamedTuple):
    """The static arguments of a program."""

    # `mean_loss`, or another function that adds up the same terms.
    sums: Callable[[Batch, Array | None, SoftmaxRegression], Array]
    optimizer: optax.GradientTransformation
    transform: Transform = None  # applied to the features of a batch
    # Whether rows that are not finite, or have no valid class, are left out.
    skip_nonfinite: bool = False


class Terms(NamedTuple):
    """The terms of the objective that do not depend on a batch, and scales of all examples."""

    l2: Array  # the strength of the squared penalty: a scalar, or [D], one for each feature
    class_weights: Array | None  # [K], or None
    constant: Any  # the factor of the bias: 1, or 0 without an intercept
    tol: Any  # the steps end once no entry of the gradient, relative to `bound`, is larger
    # The largest possible entries of the gradient, [D + 1]; None for ones.
    bound: Array | None = None
    largest: Array | None = None  # the largest absolute value of each feature, [D]; None for ones


class State(NamedTuple):
    """All that a step needs from earlier steps; the content of a checkpoint."""

    params: SoftmaxRegression  # kernel [D, K] and bias [K], finite
    optimizer_state: optax.OptState
    step: Array  # the number of steps taken
    total: Array  # the objectives of the batches since the last event, summed
    taken: Array  # the number of these batches
    norm: Array  # the largest entry of the last gradient, relative to `Terms.bound`


def refuse_other_optimizers(optimizer: object) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        expected = "an optax optimizer, as optax.adam(0.01)"
        raise TypeError(_checks.message(called(), "optimizer", expected, repr(optimizer)))


@partial(jax.jit, static_argnames="optimizer")
def start(optimizer: optax.GradientTransformation, params: SoftmaxRegression) -> State:
    """The state before the first step, in new arrays."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        optimizer_state = optimizer.init(params)
    zero = jnp.zeros((), params.kernel.dtype)
    none = jnp.zeros((), jnp.int32)
    return _with_dtypes(State(params, optimizer_state, none, zero, none, zero))


@partial(jax.jit, static_argnames="form", donate_argnames="state")
def advance(
    form: Form, terms: Terms, state: State, feed: Held | Stacked, count: Array, flags: Array
) -> tuple[State, Array, Array]:
    """Takes `count` steps, or fewer if one of them ends the loop.

    Args:
        form: the static arguments of the program.
        terms: the terms of the objective.
        state: donated: the result takes its memory.
        feed: the batches of these steps.
        count: the number of steps.
        flags: 0 or 1 of every process.

    Returns:
        The state; RUNNING, CONVERGED or NON_FINITE of `Status`; and whether any process raised its
        flag. The flags are part of the program, so that all processes see one after the same step.
    """
    first = state.step
    last = first + count

    def body(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, _ = carry
        objective = _objective(form, terms, feed.batch(state.step, first), state)
        value, grad = _value_and_grad(feed, objective, state)
        norm = largest_entry(terms.bound, grad)

        def update() -> tuple[SoftmaxRegression, optax.OptState]:
            with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
                updates, optimizer_state = optax.with_extra_args_support(form.optimizer).update(
                    grad,
                    state.optimizer_state,
                    state.params,
                    value=value,
                    grad=grad,
                    value_fn=objective,
                )
                stepped: Any = optax.apply_updates(state.params, updates)
            return _with_dtypes((stepped, optimizer_state), (state.params, state.optimizer_state))

        small = norm <= terms.tol
        if _is_cached(feed, state):  # an unneeded line search would evaluate all examples
            params, optimizer_state = lax.cond(small, lambda: state[:2], update)
        else:
            params, optimizer_state = update()
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & _is_safe(terms, params)
        taken = State(
            params, optimizer_state, state.step + 1, state.total + value, state.taken + 1, norm
        )
        status = jnp.where(small, Status.CONVERGED, Status.RUNNING)
        status = jnp.where(finite, status, Status.NON_FINITE).astype(jnp.int32)
        good = status == Status.RUNNING
        kept = state._replace(norm=jnp.where(finite, norm, state.norm))
        return jax.tree.map(partial(jnp.where, good), _with_dtypes(taken, kept), kept), status

    def running(carry: tuple[State, Array]) -> Array:
        return (carry[1] == Status.RUNNING) & (carry[0].step < last)

    status = jnp.asarray(Status.RUNNING, jnp.int32)
    state, status = lax.while_loop(running, body, (state, status))
    return state, status, jnp.max(flags)


@partial(jax.jit, static_argnames="form")
def objective_and_norm(
    form: Form, terms: Terms, state: State, feed: Held | Stacked
) -> tuple[Array, Array]:
    """The objective and its gradient at the parameters of a state, on the batch of its step.

    Returns:
        The objective, and the largest entry of the gradient, relative to `Terms.bound`.
    """
    objective = _objective(form, terms, feed.batch(state.step, state.step), state)
    value, grad = _value_and_grad(feed, objective, state)
    return value, largest_entry(terms.bound, grad)


def largest_entry(bound: Array | None, grad: SoftmaxRegression) -> Array:
    """max |g|, relative to `bound` [D + 1]."""
    if bound is not None:
        grad = SoftmaxRegression(grad.kernel / bound[:-1, None], grad.bias / bound[-1])
    norm = jnp.max(jnp.abs(grad.kernel), initial=0)  # there may be no features
    return jnp.maximum(norm, jnp.max(jnp.abs(grad.bias)))


def stores_gradient(optimizer_state: optax.OptState) -> bool:
    """Whether a line search stored the objective and the gradient at the new parameters."""
    try:
        found = [optax.tree.get(optimizer_state, name) for name in ("value", "grad")]
    except KeyError:  # more than one entry of a name
        return False
    return all(entry is not None for entry in found)


def _objective(
    form: Form, terms: Terms, batch: Batch, state: State
) -> Callable[[SoftmaxRegression], Array]:
    """The objective on a batch, as a function of the parameters."""
    if form.skip_nonfinite:
        batch = without_bad_rows(batch, state.params.bias.size)

    def objective(params: SoftmaxRegression) -> Array:
        features = batch.features if form.transform is None else form.transform(batch.features)
        inner = params._replace(bias=terms.constant * params.bias)
        loss = form.sums(replace(batch, features=features), terms.class_weights, inner)
        return loss + penalty(params, terms.l2)

    return objective


def _is_cached(feed: Held | Stacked, state: State) -> bool:
    """Whether the state holds the objective of the next step, which uses all examples too."""
    whole = isinstance(feed, Held) and feed.order is None
    return whole and stores_gradient(state.optimizer_state)


def _value_and_grad(
    feed: Held | Stacked, objective: Callable[[SoftmaxRegression], Array], state: State
) -> tuple[Array, SoftmaxRegression]:
    if _is_cached(feed, state):
        known: Any = optax.value_and_grad_from_state(objective)
        return known(state.params, state=state.optimizer_state)
    return jax.value_and_grad(objective)(state.params)


def _is_safe(terms: Terms, params: SoftmaxRegression) -> Array:
    """Whether the parameters are finite, and so small that neither loss nor penalty overflows."""
    kernel = jnp.abs(params.kernel)
    entry = reach = jnp.max(kernel, initial=0)
    if terms.largest is not None:
        reach = jnp.max(terms.largest[:, None] * kernel, initial=0)
    # A logit sums fewer than MOST such terms, and a mean loss sums fewer than MOST losses.
    loss = MOST * (MOST * (reach + jnp.max(jnp.abs(params.bias))))
    return jnp.isfinite(loss) & jnp.isfinite(MOST * (jnp.max(terms.l2) * entry * entry))


def _with_dtypes(new: Any, old: Any = None) -> Any:
    """`new` with the dtypes of `old` and no weak types, so that one program runs every chunk."""
    old = new if old is None else old
    return jax.tree.map(lambda x, y: lax.convert_element_type(x, jnp.result_type(y)), new, old)

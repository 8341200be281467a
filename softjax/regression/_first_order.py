"""First-order fits: any optax optimizer, compiled in chunks of steps.

The state carries the objective and its gradient at its own parameters, on the batch of the step to
come. So what a chunk reports belongs to the parameters it returns, and a step after which the
objective is not finite is never taken: the parameters of a state are always good ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from softjax._cross_entropy import cross_entropy
from softjax.regression import _ending, _frame
from softjax.regression._data import Data, normalised, problem_of
from softjax.regression._existence import is_loose, is_separated, status_where_separated
from softjax.regression._model import SoftmaxRegression, logits, penalty
from softjax.regression._objective import gradient_bound, logits_at, pack, ridge
from softjax.regression._result import FitResult, Progress, Status

# One object each, so that every fit finds the compiled program of the last.
_LBFGS = optax.lbfgs()
_ADAM = optax.adam(1e-2)

# A line search does not go up, so that as many steps without a new minimum are rounding.
PATIENCE = 30


class State(NamedTuple):
    """Where a fit stands.

    Attributes:
        params: kernel [D, K] and bias [K].
        optimizer_state: of optax.
        value: the objective at `params`.
        grad: its gradient.
        grad_norm: the gradient, relative to what it can be at most.
        step: how many steps were taken.
        bound: what each entry of a gradient can be at most, kernel [D, K] and bias [K].
        status: RUNNING, CONVERGED or NON_FINITE of `Status`; CONVERGED where the gradient is small.
    """

    params: SoftmaxRegression
    optimizer_state: optax.OptState
    value: Array
    grad: SoftmaxRegression
    grad_norm: Array
    step: Array
    bound: SoftmaxRegression
    status: Array


class Run:
    """A fit in chunks, for the loop of `fit`."""

    def __init__(
        self,
        data: Data,
        num_classes: int,
        params: SoftmaxRegression,
        tol: float,
        optimizer: optax.GradientTransformation | None,
        batch_size: int | None,
        epochs: int,
        seed: int,
    ):
        data, self.frame = _frame.framed(data, False)
        params = _frame.inside(self.frame, params)
        self.mass = 1.0
        if optimizer is None:
            optimizer = _LBFGS if batch_size is None else _ADAM
            if optimizer is _LBFGS and (data.labels.ndim == 2 or data.class_weights is not None):
                # Its line search has tolerances of its own, which know no scale of the objective.
                data, mass = _normalised(num_classes, data)
                self.mass = float(mass)
        self.epoch_steps = batches_per_epoch(len(data.features), batch_size)
        self.limit = epochs * self.epoch_steps
        self.chunk = 10 if batch_size is None else self.epoch_steps
        self.data, self.num_classes, self.batch_size = data, num_classes, batch_size
        tolerance = jnp.asarray(tol if batch_size is None else -1.0, data.features.dtype)
        self.problem = (optimizer, batch_size, num_classes, data, jax.random.key(seed), tolerance)
        self.tol = jnp.asarray(tol, data.features.dtype)
        self.state = start(*self.problem, params)
        self.first = self.state.value
        self.searches = batch_size is None and _stores_gradient(self.state.optimizer_state)
        self.best_step, self.best_value = 0, np.inf

    def advance(self, stop: int) -> Progress:
        """Steps until `stop`, or until there is nothing left to do."""
        self.state, mean = advance(*self.problem, self.state, jnp.asarray(stop, jnp.int32))
        state = self.state
        step, status = int(state.step), int(state.status)
        if status == Status.CONVERGED:
            status = self._status_at_end()
            if status == Status.RUNNING:
                self.state = state = state._replace(status=jnp.int32(status))
        value = self.mass * float(state.value if self.batch_size is None else mean)
        if value < self.best_value:
            self.best_step, self.best_value = step, value
        if status == Status.RUNNING and self.searches and step - self.best_step >= PATIENCE:
            status = Status.PRECISION_FLOOR
        params, moved = _frame.outside(self.frame.centre, state.params)
        if self.frame.centre is not None:
            over_mass, ended = float(state.value) / self._mass_of_data(), np.int32(status)
            status = int(_frame.status_outside(ended, moved, over_mass, self.tol))
        return Progress(params, value, float(state.grad_norm), step, status)

    def _status_at_end(self) -> int:
        """That of a small gradient: an optimizer has no model of the objective, Newton's has."""
        theta, first = pack(self.state.params), float(self.first) / self._mass_of_data()
        ending = _ending.look(self.num_classes, self.data, theta, first, self.tol)
        if ending.moving and is_loose(self.data):
            separated, _ = _separation(self.num_classes, self.data, self.state.params, np.int32(0))
            if separated:
                return Status.CONVERGED  # for `result`, which says what it means
            proven = _ending.is_proven(self.num_classes, self.data, theta)
            return Status.QUASI_SEPARATED if proven else Status.RUNNING
        return Status.CONVERGED if ending.converged else Status.RUNNING

    def _mass_of_data(self) -> float:
        return float(_normalised(self.num_classes, self.data)[1])

    def result(self, progress: Progress, status: int, history: list[dict[str, float]]) -> FitResult:
        params, value = self.state.params, progress.objective
        if self.batch_size is not None:
            value = self.mass * float(objective(self.data, params))
        ended = jnp.asarray(status, jnp.int32)
        separated, status = map(int, _separation(self.num_classes, self.data, params, ended))
        steps, norm = progress.step, progress.gradient_norm
        separated = bool(separated)
        return FitResult(progress.params, value, status, steps, None, norm, separated, history)


def batches_per_epoch(num_examples: int, batch_size: int | None) -> int:
    return 1 if batch_size is None else -(-num_examples // batch_size)


def epoch_order(key: Array, epoch: Array, num_examples: int) -> Array:
    """The order of the examples in an epoch: a permutation that (key, epoch) determines."""
    examples = jnp.arange(num_examples, dtype=jnp.int32)
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)


def batch_rows(order: Array, step: Array, batch_size: int) -> tuple[Array, Array]:
    """The rows of the batch of `step`, and which of them count: the last batch may be short."""
    batch = step % batches_per_epoch(order.size, batch_size)
    position = batch * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    return order[jnp.minimum(position, order.size - 1)], position < order.size


@partial(jax.jit, static_argnames=("optimizer", "batch_size", "num_classes"))
def start(
    optimizer: optax.GradientTransformation,
    batch_size: int | None,
    num_classes: int,
    data: Data,
    key: Array,
    tol: Array,
    params: SoftmaxRegression,
) -> State:
    """The state before the first step."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        optimizer_state = optimizer.init(params)
    step = jnp.zeros((), jnp.int32)
    order = _order(data, key, step, batch_size)
    batch_objective = partial(_objective, data, batch_size, order, step)
    value, grad = jax.value_and_grad(batch_objective)(params)
    whole, mass = normalised(data, num_classes)
    bound = mass * gradient_bound(problem_of(whole, num_classes))[:, None]
    bound = SoftmaxRegression(
        jnp.broadcast_to(bound[:-1], grad.kernel.shape),
        jnp.broadcast_to(bound[-1], grad.bias.shape),
    )
    norm, status = _judge(value, grad, bound, tol)
    state = State(params, optimizer_state, value, grad, norm, step, bound, status)
    return _with_dtypes(state, state)


@partial(jax.jit, static_argnames=("optimizer", "batch_size", "num_classes"))
def advance(
    optimizer: optax.GradientTransformation,
    batch_size: int | None,
    num_classes: int,
    data: Data,
    key: Array,
    tol: Array,
    state: State,
    stop: Array,
) -> tuple[State, Array]:
    """Runs until step `stop` or until the status says so: the state, and the mean objective."""
    epoch_steps = batches_per_epoch(len(data.features), batch_size)
    first = state.step

    def body(carry):
        state, order, total = carry
        batch_objective = partial(_objective, data, batch_size, order, state.step)
        params, optimizer_state = updated(
            optimizer, state.optimizer_state, state.params, state.value, state.grad, batch_objective
        )
        step = state.step + 1

        if batch_size is None:
            value_and_grad = _value_and_grad(batch_objective, optimizer_state)
        else:
            is_new = step % epoch_steps == 0
            order = lax.cond(is_new, lambda: _order(data, key, step, batch_size), lambda: order)
            batch_objective = partial(_objective, data, batch_size, order, step)
            value_and_grad = jax.value_and_grad(batch_objective)
        value, grad = value_and_grad(params)
        norm, status = _judge(value, grad, state.bound, tol)

        taken = State(params, optimizer_state, value, grad, norm, step, state.bound, status)
        refused = state._replace(optimizer_state=optimizer_state, status=status)
        good = status != Status.NON_FINITE
        state = jax.tree.map(
            partial(jnp.where, good), _with_dtypes(taken, state), _with_dtypes(refused, state)
        )
        return state, order, total + jnp.where(good, value, 0)

    def running(carry):
        return (carry[0].status == Status.RUNNING) & (carry[0].step < stop)

    order = _order(data, key, state.step, batch_size)
    state, _, total = lax.while_loop(running, body, (state, order, jnp.zeros_like(state.value)))
    taken = state.step - first
    mean = jnp.where(taken == 0, state.value, total / jnp.maximum(taken, 1).astype(total.dtype))
    return state, mean


def updated(
    optimizer: optax.GradientTransformation,
    optimizer_state: optax.OptState,
    params: SoftmaxRegression,
    value: Array,
    grad: SoftmaxRegression,
    value_fn: Callable,
) -> tuple[SoftmaxRegression, optax.OptState]:
    """The parameters after a step of the optimizer, and its state."""
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer_state = optax.with_extra_args_support(optimizer).update(
            grad, optimizer_state, params, value=value, grad=grad, value_fn=value_fn
        )
    stepped: Any = optax.apply_updates(params, updates)
    return stepped, optimizer_state


def largest_entry(grad: SoftmaxRegression) -> Array:
    """max |g|."""
    norm = jnp.max(jnp.abs(grad.kernel), initial=0)  # there may be no features
    return jnp.maximum(norm, jnp.max(jnp.abs(grad.bias)))


@jax.jit
def objective(data: Data, params: SoftmaxRegression) -> Array:
    """The objective on all examples."""
    return _objective(data, None, None, jnp.zeros((), jnp.int32), params)


@partial(jax.jit, static_argnames="num_classes")
def _normalised(num_classes: int, data: Data) -> tuple[Data, Array]:
    return normalised(data, num_classes)


@partial(jax.jit, static_argnames="num_classes")
def _separation(
    num_classes: int, data: Data, params: SoftmaxRegression, status: Array
) -> tuple[Array, Array]:
    """Whether `params` separate the classes, and the status with what that means for it."""
    problem = problem_of(data, num_classes)
    theta = pack(params)
    separated = is_separated(problem, logits_at(problem, theta))
    return separated, status_where_separated(problem, theta, status, separated)


def _stores_gradient(optimizer_state: optax.OptState) -> bool:
    """Whether a line search left the objective and the gradient at the new parameters there."""
    try:
        found = [optax.tree.get(optimizer_state, name) for name in ("value", "grad")]
    except KeyError:  # more than one of a name
        return False
    return all(entry is not None for entry in found)


def _objective(
    data: Data, batch_size: int | None, order: Array | None, step: Array, params: SoftmaxRegression
) -> Array:
    """The objective on the batch of `step`; their mean over full batches is the whole objective.

    Each batch divides by its number of examples, not by their weights: a ratio of two random sums
    would be biased.
    """
    features, labels, weights, offset = data.features, data.labels, data.weights, data.offset
    count = jnp.asarray(len(features), params.kernel.dtype)
    if order is not None and batch_size is not None:
        rows, inside = batch_rows(order, step, batch_size)
        features, labels = features[rows], labels[rows]
        offset = None if offset is None else offset[:, rows]
        inside = inside.astype(params.kernel.dtype)
        weights = inside if weights is None else inside * weights[rows]
        count = jnp.sum(inside)
    if data.constant is not None:
        params = params._replace(bias=data.constant * params.bias)  # 0 for ever without intercept
    z = logits(params, features, offset=None if offset is None else offset.T)
    losses = cross_entropy(z, labels, class_weights=data.class_weights)
    if weights is not None:
        losses *= weights
    return jnp.sum(losses) / count + penalty(params, ridge(data))


def _order(data: Data, key: Array, step: Array, batch_size: int | None) -> Array | None:
    if batch_size is None:
        return None
    num_examples = len(data.features)
    return epoch_order(key, step // batches_per_epoch(num_examples, batch_size), num_examples)


def _value_and_grad(objective: Callable, optimizer_state: optax.OptState) -> Callable:
    if _stores_gradient(optimizer_state):
        return partial(optax.value_and_grad_from_state(objective), state=optimizer_state)
    return jax.value_and_grad(objective)


def _judge(
    value: Array, grad: SoftmaxRegression, bound: SoftmaxRegression, tol: Array
) -> tuple[Array, Array]:
    """The gradient, relative to `bound`, and the status."""
    norm = largest_entry(jax.tree.map(jnp.divide, grad, bound))
    status = jnp.where(norm <= tol, Status.CONVERGED, Status.RUNNING)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    return norm, jnp.where(finite, status, Status.NON_FINITE).astype(jnp.int32)


def _with_dtypes(new, old):
    """`new` with the dtypes of `old`, and no weak types: the next chunk is the same program."""
    return jax.tree.map(lambda x, y: lax.convert_element_type(x, jnp.result_type(y)), new, old)

"""The optimum by any optax optimizer: the steps of a trainer in the loop of `fit`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from softjax.regression import _ending, _frame
from softjax.regression._arguments import at_least
from softjax.regression._groups import random_key
from softjax.regression._loop import is_separated, status_where_separated
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import pack
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, Status
from softjax.regression._steps import (
    Batch,
    Form,
    Held,
    Terms,
    advance,
    epoch_order,
    mean_loss,
    objective_and_norm,
    start,
    stores_gradient,
)

# Every fit uses these same two objects, so that it reuses the compiled program of an earlier fit.
_LBFGS = optax.lbfgs()
_ADAM = optax.adam(1e-2)

# A line search never goes up, so that after this many steps without a new minimum rounding hides
# all progress.
PATIENCE = 30
NO_FLAG = np.zeros(1, np.int32)
_normalised = jax.jit(Data.normalised)


class Run:
    """A fit in chunks of steps, for the loop of `fit`."""

    def __init__(
        self,
        data: Data,
        params: SoftmaxRegression,
        tol: float,
        optimizer: optax.GradientTransformation | None,
        batch_size: int | None,
        epochs: int | None,
        seed: int,
    ):
        epochs = 1000 if epochs is None else at_least("epochs", epochs, 0)
        data, self.frame = _frame.framed(data, False)
        params = _frame.inside(self.frame, params)
        self.scale = 1.0
        if optimizer is None:
            optimizer = _LBFGS if batch_size is None else _ADAM
            if optimizer is _LBFGS and (data.labels.ndim == 2 or data.class_weights is not None):
                # The tolerances of its line search are absolute, so the objective is scaled.
                data, scale = _normalised(data)
                self.scale = float(scale)
        self.examples = Examples(data, batch_size, seed)
        self.epoch_steps, self.takes_all = self.examples.epoch_steps, self.examples.takes_all
        self.limit = epochs * self.epoch_steps
        self.data, self.tol = data, jnp.asarray(tol, data.features.dtype)
        self.form = Form(mean_loss, optimizer)
        bound, largest = scales(data)
        tolerance = self.tol if self.takes_all else -jnp.ones_like(self.tol)
        constants = (data.ridge, data.class_weights, data.constant)
        self.terms = Terms(*constants, tolerance, bound, largest)
        self.mass = float(_normalised(data)[1])
        self.state = start(optimizer, params)
        self.searches = self.takes_all and stores_gradient(self.state.optimizer_state)
        # A line search knows the objective at the end of a chunk, so that chunks may be shorter.
        self.chunk = 10 if self.searches else 25 if self.takes_all else self.epoch_steps
        self.best_step, self.best_value, self.goes_on = 0, np.inf, False
        self.first = np.nan  # the objective of the first call of `advance`

    def advance(self, stop: int) -> FitResult:
        """The result of the steps until `stop` or the end, but for what `ended` computes."""
        step, status = int(self.state.step), Status.RUNNING
        nothing = np.zeros((), self.state.total.dtype)
        self.state = self.state._replace(total=nothing, taken=np.int32(0))
        while step < stop and status == Status.RUNNING:
            end, terms = stop, self.terms
            if not self.takes_all:
                end = min(stop, step - step % self.epoch_steps + self.epoch_steps)
            if self.goes_on:  # the gradient is small, but the fit has not ended
                end, terms = step + 1, terms._replace(tol=-jnp.ones_like(terms.tol))
            count = np.int32(end - step)
            self.state, reached, _ = advance(
                self.form, terms, self.state, self.examples.held(step), count, NO_FLAG
            )
            step, status, self.goes_on = int(self.state.step), int(reached), False
        value, norm = self._value_and_norm(step)
        self.first = value if np.isnan(self.first) else self.first
        if status == Status.RUNNING and not (np.isfinite(value) and np.isfinite(norm)):
            status = Status.NON_FINITE
        if status == Status.RUNNING and norm <= float(self.terms.tol):
            status = Status.CONVERGED
        if status == Status.CONVERGED:
            status = self._status_at_end()
            self.goes_on = status == Status.RUNNING
        if value < self.best_value:
            self.best_step, self.best_value = step, value
        if status == Status.RUNNING and self.searches and step - self.best_step >= PATIENCE:
            status = Status.PRECISION_FLOOR
        params, moved = _frame.outside(self.frame.centre, self.state.params)
        if self.frame.centre is not None:
            ended = np.int32(status)
            status = int(_frame.status_outside(ended, moved, value / self.mass, self.tol))
        params = jax.tree.map(jnp.copy, params)  # the next chunk overwrites those of the state
        return FitResult(params, self.scale * value, status, step, None, norm, False, [])

    def ended(self, result: FitResult) -> FitResult:
        """The result, completed by values that need another pass over the examples."""
        if not self.takes_all:
            of_all = Held(self.examples.rows, None)
            value, _ = objective_and_norm(self.form, self.terms, self.state, of_all)
            result = result._replace(objective=self.scale * float(value))
        status = jnp.asarray(result.status, jnp.int32)
        separated, status = map(int, separation(self.data, self.state.params, status))
        return result._replace(separated=bool(separated), status=status)

    def _value_and_norm(self, step: int) -> tuple[float, float]:
        """The objective and gradient norm at the parameters, or over the chunk's minibatches."""
        state = self.state
        if self.takes_all or not int(state.taken):
            held = self.examples.held(step)
            value, norm = objective_and_norm(self.form, self.terms, state, held)
            return float(value), float(norm)
        return float(state.total) / int(state.taken), float(state.norm)

    def _status_at_end(self) -> int:
        """The status once the gradient is small, by Newton's model, which optimizers lack."""
        theta, first = pack(self.state.params), self.first / self.mass
        ending = _ending.in_float64(_ending.check, self.data, theta, first, self.tol)
        if ending.moving and self.data.is_loose:
            params, running = self.state.params, np.int32(Status.RUNNING)
            separated, _ = separation(self.data, params, running)
            if separated:
                return Status.CONVERGED  # `ended` replaces it by SEPARATED
            proven = _ending.in_float64(_ending.quasi_separated, self.data, theta, np.True_)
            return Status.QUASI_SEPARATED if proven else Status.RUNNING
        return Status.CONVERGED if ending.converged else Status.RUNNING


class Examples:
    """Examples in memory, and their order in each epoch; without `batch_size` a step takes all."""

    def __init__(self, data: Data, batch_size: int | None, seed: int):
        count, offset = len(data.labels), None if data.offset is None else data.offset.T
        self.rows = Batch(data.features, data.labels, data.weights, offset)
        self.batch_size = count
        if batch_size is not None:
            self.batch_size = min(at_least("batch_size", batch_size, 1), count)
        self.takes_all = batch_size is None
        self.epoch_steps = -(-count // self.batch_size)
        self.key = random_key(seed)

    def held(self, step: int) -> Held:
        """The examples in the order of the epoch of `step`."""
        if self.takes_all:
            return Held(self.rows, None)
        epoch = np.int32(step // self.epoch_steps)
        return Held(self.rows, epoch_order(self.key, epoch, len(self.rows.labels), self.batch_size))


@jax.jit
def separation(data: Data, params: SoftmaxRegression, status: Array) -> tuple[Array, Array]:
    """Whether `params` separate the classes, and the status that follows from it."""
    problem = data.problem()
    theta = pack(params)
    separated = is_separated(problem.targets, problem.scores(theta))
    return separated, status_where_separated(problem, theta, status, separated)


@jax.jit
def scales(data: Data) -> tuple[Array, Array]:
    """The largest possible entries of the gradient, [D + 1], and the largest features, [D]."""
    problem, mass = data.normalised_problem()
    return mass * problem.gradient_bound(), jnp.max(jnp.abs(data.features), 0)

"""fit: the arguments, the choice of a solver, and the loop around its compiled chunks."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax.regression import _host_lbfgs, _host_newton, _host_path, _solve, _traced
from softjax.regression._arguments import (
    FIT,
    at_least,
    checked_data,
    error,
    errors_name,
    initial_params,
    is_traced,
    limits,
    penalty,
)
from softjax.regression._features import Features, Matrix, in_full_precision, is_sparse
from softjax.regression._frame import without_hidden
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data
from softjax.regression._result import Event, FitResult, Status, checked_validation, recorded
from softjax.regression._solve import SOLVERS
from softjax.regression._steps import refuse_other_optimizers

if TYPE_CHECKING:
    import optax

    from softjax.regression import _first_order

OPTAX = "optax"


@on_auto_axes
@in_full_precision
@errors_name(FIT)
def fit(
    features: Features,
    labels: ArrayLike,
    *,
    solver: str = "auto",
    l2: ArrayLike = 0.0,
    l1: ArrayLike = 0.0,
    grouped: bool = False,
    penalty_factors: ArrayLike | None = None,
    fit_intercept: bool = True,
    tol: float = 1e-6,
    max_steps: int | None = None,
    num_classes: int | None = None,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    init: SoftmaxRegression | None = None,
    validation: tuple[ArrayLike, ...] | None = None,
    callback: Callable[[Event], bool | None] | None = None,
    steps_per_chunk: int | None = None,
    optimizer: "optax.GradientTransformation | None" = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
) -> FitResult:
    """Fits a softmax regression: the kernel and bias that minimise its objective.

        argmin sum_i w_i loss_i / sum_i w_i + sum_j f_j (l2 / 2 |kernel_j|^2 + l1 |kernel_j|_1)

    Here loss_i is the loss of the logits x_i @ kernel + bias + offset_i, kernel_j is the row of
    feature j, and f_j its penalty factor.

    The solvers:

    - "newton-cg": Newton's steps by preconditioned conjugate gradients.
    - "newton": Newton's steps by a dense factor of the Hessian.
    - "lbfgs": L-BFGS with the preconditioner of "newton-cg".
    - "proximal": accelerated proximal steps, for l1.
    - "firth": Firth's method, which subtracts log det(information) divided by twice the sum of the
      weights from the objective, so that any data have a finite optimum.
    - "optax": the steps of `optimizer`, on minibatches if `batch_size` is given.
    - "auto": "optax" if one of its options is given, "proximal" with l1, else "newton-cg"; but
      "lbfgs", in NumPy, for large dense tables of 32 classes or more with l2 on a CPU.

    Derivative: of the optimum, by the implicit function theorem, with respect to l2, l1, features,
        weights, and labels that are a distribution; both modes. With l1, entries of the kernel that
        are 0 stay 0. "optax" is a loop on the host and not differentiable. Under a trace, values
        are not checked, and a label out of range gives NaN.
    Edge cases: if the classes are separable, l2 = 0 has no optimum: the fit stops with "separated",
        or with "quasi-separated" if some examples are on the boundary, so that only some parameters
        grow. With a penalty or "firth" there is an optimum. A class without examples has no optimum
        even with a penalty, since the bias is not penalised: its bias decreases for ever, and the
        fit stops with "quasi-separated". A feature whose largest square is less than 2^-80 of its
        l2 penalty changes no logit: its coefficients are 0.

    Args:
        features: real [N, D], finite, dense, or BCOO or BCSR for "newton-cg", "lbfgs", "proximal".
            float64 features are fitted in float64 if JAX allows it, all others in float32, where
            the largest entry of a column must be 0 or in [1e-18, 1e18]. On a mesh the examples, and
            the classes of a distribution, may be sharded; the parameters are not.
        labels: class indices, integer [N] or whole numbers in floating point, or a distribution
            over the classes or counts of them, floating [N, K].
        solver: one of the solvers above.
        l2: scalar >= 0, the strength of the squared penalty on the kernel.
        l1: scalar >= 0, the strength of the absolute penalty; "proximal" only. With l2 it is the
            elastic net.
        grouped: whether l1 penalises |kernel_j|_2 instead of |kernel_j|_1, so that a feature is in
            the model for all classes or for none.
        penalty_factors: real [D], >= 0, f; None for ones. Features of factor 0 are not penalised.
            The factors are not rescaled; pass l2 f as `l2` to the statistics of such a fit.
        fit_intercept: whether there is a bias. Without one it stays 0, and the features are not
            centred.
        tol: the fit ends once the gradient, relative to its largest possible value, and the
            predicted decrease of the last step, relative to the objective, are at most `tol`.
            Minibatches ignore it.
        max_steps: the limit of steps; None for 200 steps of Newton or Firth, 5000 of "lbfgs", 20000
            of "proximal". For "optax" use `epochs`.
        num_classes: K; None to take it from the labels, which must then be 0, ..., K - 1 with class
            0 among them and K <= N.
        sample_weights: real [N], >= 0; their sum matters only for "firth".
        class_weights: real [K], >= 0.
        offset: real [N, K], finite, nats: a known part of the logits that is not fitted, such as
            the logarithm of an exposure or of other class shares, or a fixed part of the model.
        init: the initial parameters, unless zeros have a smaller objective; None for zeros.
        validation: features and labels, and their offset if there is one, to evaluate after every
            chunk.
        callback: called with an `Event` before the first step and after every chunk; True stops.
        steps_per_chunk: the number of steps between two events; None for one step of Newton, more
            of other solvers, one epoch of minibatches, and for all steps without `callback` and
            `validation`.
        optimizer: an optax optimizer; None for `optax.lbfgs()`, or `optax.adam(1e-2)` with
            minibatches.
        batch_size: the number of examples per step of `optimizer`; None for all examples.
        epochs: the largest number of passes over the data with `optimizer`, each of which is one
            step if `batch_size` is None; None for 1000.
        seed: determines the order of the examples in minibatches.

    Returns:
        `FitResult`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, NaN or infinity, a label
            out of range, only one class, too many classes for the memory of the devices, or an
            option that the solver does not take.

    Example:
        >>> import numpy as np, softjax
        >>> features = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> result = softjax.regression.fit(features, np.array([0, 1, 0, 1]), l2=0.01)
        >>> result.stop_reason, round(result.objective, 4)
        ('converged', 0.5889)

    Source: J. Nocedal and S. J. Wright, "Numerical Optimization" (2006), algorithms 7.1 and 7.5.
    """
    begin = time.perf_counter()
    known = (sample_weights, class_weights, fit_intercept, offset, penalty_factors)
    data = checked_data(features, labels, num_classes, *known)
    data, has_corners = _with_penalties(data, l2, l1, grouped)
    first_order = (optimizer, batch_size, epochs) != (None, None, None)
    name = _solver_name(solver, data, l2, has_corners, first_order)
    params = initial_params(init, data.features, data.num_classes, data.constant)
    if optimizer is not None:
        refuse_other_optimizers(optimizer)
    _checks.refuse_uncallable(FIT, "callback", callback)
    tol, max_steps = limits(tol, max_steps)
    held_out = checked_validation(validation, params.kernel.shape, data.offset is not None)
    seed = at_least("seed", seed, 0)

    watched = callback is not None or validation is not None
    if is_traced((data, params)):
        return _traced.traced(name, data, params, tol, max_steps, watched or name == OPTAX)
    if not watched and steps_per_chunk is None:
        start = None if init is None else params
        by_lbfgs = name == "lbfgs" or (solver == "auto" and name == "newton-cg")
        result = _in_numpy(name, by_lbfgs, data, has_corners, tol, max_steps, start)
        if result is not None:
            recorded(_event(result, 1, begin), None, result.history)
            return result
    if name == OPTAX:
        if max_steps is not None:
            raise error("max_steps", "None for 'optax', which has `epochs`", max_steps)
        from softjax.regression import _first_order  # optax takes a tenth of the import

        run = _first_order.Run(data, params, tol, optimizer, batch_size, epochs, seed)
    else:
        run = _solve.Run(name, data, params, tol, max_steps)
    in_one = name != OPTAX and not watched
    return _in_chunks(run, steps_per_chunk, in_one, callback, held_out, begin)


def _in_numpy(
    name: str,
    by_lbfgs: bool,
    data: Data,
    has_corners: bool,
    tol: Any,
    max_steps: int | None,
    start: SoftmaxRegression | None,
) -> FitResult | None:
    """A fit by NumPy, without compilation; None if it takes no such fit or its end is not clear."""
    if has_corners:
        takes = start is None and _host_path.takes(data)
        return _host_path.optimum(data, tol, max_steps) if takes else None
    if by_lbfgs and start is None and _host_lbfgs.takes(data):
        result = _host_lbfgs.optimum(data, tol)
    else:
        result = _host_newton.optimum(data, tol, start) if _host_newton.takes(name, data) else None
    in_time = result is not None and (max_steps is None or result.steps <= max_steps)
    return result if in_time else None


def _in_chunks(
    run: "_solve.Run | _first_order.Run",
    steps_per_chunk: int | None,
    in_one: bool,
    callback: Callable[[Event], bool | None] | None,
    held_out: tuple[Matrix, Array, Array | None] | None,
    begin: float,
) -> FitResult:
    """Runs a fit in chunks of steps with events between them, or by default `in_one` chunk."""
    chunk, stop = run.chunk, run.limit if in_one and steps_per_chunk is None else 0
    if steps_per_chunk is not None:
        chunk = at_least("steps_per_chunk", steps_per_chunk, 1)
    history: list[dict[str, float]] = []
    while True:
        result = run.advance(stop)
        event = _event(result, run.epoch_steps, begin)
        event = recorded(event, held_out, history)
        interrupted = callback is not None and bool(callback(event))
        if result.status != Status.RUNNING or interrupted or result.steps >= run.limit:
            break
        stop = min(result.steps + chunk, run.limit)
    if result.status == Status.RUNNING and interrupted:
        result = result._replace(status=Status.CALLBACK)
    result = result._replace(history=history)
    return result if isinstance(run, _solve.Run) else run.ended(result)


def _event(result: FitResult, epoch_steps: int, begin: float) -> Event:
    params, value, _, steps, _, norm, *_ = result
    return Event(steps, steps / epoch_steps, value, norm, time.perf_counter() - begin, params)


def _with_penalties(data: Data, l2: ArrayLike, l1: ArrayLike, grouped: bool) -> tuple[Data, bool]:
    """The data with their penalties, without hidden features; and whether there is l1."""
    dtype = data.features.dtype
    data = replace(data, l2=penalty("l2", l2, dtype), l1=penalty("l1", l1, dtype))
    has_corners = isinstance(l1, Tracer) or bool(l1 != 0)
    grouped = _checks.flag(FIT, "grouped", grouped) and has_corners
    return without_hidden(replace(data, grouped=grouped)), has_corners


def _solver_name(
    solver: str, data: Data, l2: ArrayLike, has_corners: bool, first_order: bool
) -> str:
    """The solver for "auto" or another name; refuses options that the solver does not take."""
    names = ("auto", *SOLVERS, OPTAX)
    if solver not in names:
        raise error("solver", f"one of {', '.join(names)}", repr(solver))
    if solver == "auto":
        solver = OPTAX if first_order else "proximal" if has_corners else "newton-cg"
    if first_order and solver != OPTAX:
        raise error("solver", "'optax' with `optimizer`, `batch_size` or `epochs`", repr(solver))
    if has_corners and first_order:
        raise error("l1", "0 with `optimizer`, `batch_size` or `epochs`", "a penalty")
    if has_corners and solver != "proximal":
        raise error("solver", "'proximal' with `l1`", repr(solver))
    sparse = solver != OPTAX and SOLVERS[solver].takes_sparse
    if solver == "firth" and (isinstance(l2, Tracer) or l2 != 0):
        raise error("l2", "0 for 'firth', which has a penalty of its own", l2)
    if is_sparse(data.features) and not sparse:
        raise error("features", f"dense for the solver {solver!r}", "sparse ones")
    return solver

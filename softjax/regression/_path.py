"""Fits along a grid of penalties, with the cross-validation that chooses among them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.tree_util import Partial
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax.regression import _host_path, _l1_path
from softjax.regression._arguments import (
    called,
    checked_data,
    error,
    errors_name,
    is_traced,
    limits,
    not_negative,
    penalties,
)
from softjax.regression._cross_validation import (
    CrossValidation,
    cross_validated,
    folds_array,
    held_out,
)
from softjax.regression._features import Features
from softjax.regression._groups import Watch, no_report, stacked
from softjax.regression._host_arrays import placed
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, ManyEvent


class PathResult(NamedTuple):
    """Fits at a grid of penalties, to all examples and to all folds but one.

    Attributes:
        l2: the squared penalties, [P].
        fits: the fits to all examples, stacked [P, ...].
        cross_validation: arrays [P, F]; None without folds.
        l1: the absolute penalties, [P]; None without `l1`.
        deviance_explained: by each fit, [P]: 1 - loss / loss of the model without the penalised
            features, where the smallest loss of any model is subtracted from both losses; None
            without `l1`.
        best, best_within_one_standard_error: places in the grid, chosen by the cross-validation.
        entry: [D], the number of penalties, from the largest on, that exclude each feature.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.arange(8.0)[:, None], np.array([0, 1, 0, 0, 1, 0, 1, 1])
        >>> path = softjax.regression.fit_path(x, y, l2=np.array([1e-3, 0.1, 10.0]), folds=4)
        >>> bool(path.l2[path.best] <= path.l2[path.best_within_one_standard_error])
        True
        >>> path.params_at(path.best).kernel.shape
        (1, 2)
    """

    l2: Array
    fits: FitResult
    cross_validation: Any
    l1: Array | None = None
    deviance_explained: Array | None = None

    def _validated(self, name: str) -> CrossValidation:
        if self.cross_validation is None:
            function = f"regression.PathResult.{name}"
            expected = "a number of folds or an array of folds in `fit_path`"
            raise ValueError(_checks.message(function, "folds", expected, None))
        return self.cross_validation

    @property
    def best(self) -> Array:
        """The index in the grid of the smallest mean held-out loss."""
        return jnp.argmin(self._validated("best").mean_loss)

    @property
    def best_within_one_standard_error(self) -> Array:
        """The index of the largest penalty whose loss is at most the best plus its standard error.

        The largest penalty is the largest l1, or without `l1` the largest l2.
        """
        validated = self._validated("best_within_one_standard_error")
        loss, error = validated.mean_loss, validated.standard_error
        bound = loss[self.best] + jnp.nan_to_num(error[self.best])  # the error of one fold is NaN
        strength = self.l2 if self.l1 is None else self.l1
        return jnp.argmax(jnp.where(loss <= bound, strength, -1))

    @property
    def entry(self) -> Array:
        """[D]: for each feature, the number of penalties, from the largest on, that exclude it.

        The count ends at the first penalty with a nonzero entry of the feature for some class; for
        a feature that never enters it is P.
        """
        strength = self.l2 if self.l1 is None else self.l1
        inside = jnp.any(self.fits.params.kernel[jnp.argsort(-strength)] != 0, -1)
        return jnp.where(jnp.any(inside, 0), jnp.argmax(inside, 0), len(inside))

    def params_at(self, index: ArrayLike) -> SoftmaxRegression:
        """The fit to all examples at one penalty of the grid, by its index; -1 is the last."""
        if not isinstance(index, Tracer):
            function, count = "regression.PathResult.params_at", len(self.l2)
            index = _checks.integer(function, "index", index)
            if not -count <= index < count:
                expected = f"in [{-count}, {count}), the places of the grid"
                raise IndexError(_checks.message(function, "index", expected, index))
        return jax.tree.map(lambda leaf: leaf[index], self.fits.params)


@on_auto_axes
@errors_name("regression.fit_path")
def fit_path(
    features: Features,
    labels: ArrayLike,
    *,
    l2: ArrayLike = 0.0,
    l1: ArrayLike | None = None,
    grouped: bool = False,
    folds: int | ArrayLike | None = 5,
    seed: ArrayLike = 0,
    penalty_factors: ArrayLike | None = None,
    fit_intercept: bool = True,
    tol: float = 1e-6,
    max_steps: int | None = None,
    num_classes: int | None = None,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    callback: Callable[[ManyEvent], bool | None] | None = None,
) -> PathResult:
    """Fits at a grid of penalties, with the cross-validation that chooses among them.

        p_best = argmin_p mean_f loss_pf,  loss_pf as in `cross_validate`
        p_1se = the largest penalty with mean_f loss_pf <= the minimum + its standard error

    The fits to all examples go from the largest penalty to the smallest, and each starts at the one
    before. Without `l1`, the folds of a penalty start at its fit to all examples, and are all
    fitted at once. With `l1`, a fit uses only the features that may be in the model at its penalty,
    and then checks all others: so each is the fit to all features. A grid of l1 can begin at
    `largest_l1`.

    Derivative: not differentiable.
    Edge cases: as in `cross_validate`. If the array `folds` has only fold 0 and negative numbers,
        this one fold has no standard error, and both rules choose the same penalty. (`folds=1` is
        refused.) Once the callback has stopped, the remaining fits take no step.

    Args:
        features: real [N, D], finite, dense, BCOO or BCSR.
        labels: class indices, integer [N], or a distribution over the classes, floating [N, K].
        l2: [P], >= 0, the squared penalties, in any order; with `l1` it may be a scalar.
        l1: [P], >= 0, the absolute penalties, in any order; with l2 it is the elastic net. The data
            must then be known, not traced.
        grouped: as in `fit`.
        folds: as in `cross_validate`; with `l1` it may be None for fits to all examples only.
        seed: as in `cross_validate`.
        penalty_factors: as in `fit`.
        fit_intercept: as in `fit`.
        tol: as in `cross_validate`.
        max_steps: the limit of each fit; None for 200, or 20000 with `l1`.
        num_classes: K; as in `fit`.
        sample_weights: as in `cross_validate`.
        class_weights: as in `cross_validate`.
        offset: as in `cross_validate`.
        callback: called with a `ManyEvent` at the start and after every step, or with `l1` after
            every fit; True stops.

    Returns:
        `PathResult`.

    Raises:
        TypeError, ValueError: as in `cross_validate`.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.arange(8.0)[:, None], np.array([0, 1, 0, 0, 1, 0, 1, 1])
        >>> path = softjax.regression.fit_path(x, y, l2=np.array([1e-3, 0.1, 10.0]), folds=4)
        >>> path.cross_validation.loss.shape, path.fits.params.kernel.shape
        ((3, 4), (3, 1, 2))

    Source: T. Hastie, R. Tibshirani and J. Friedman, "The Elements of Statistical Learning" (2009),
        section 7.10; J. Friedman, T. Hastie and R. Tibshirani, "Regularization paths for
        generalized linear models via coordinate descent" (2010).
    """
    options = (sample_weights, class_weights, fit_intercept, offset, penalty_factors)
    data = checked_data(features, labels, num_classes, *options)
    data = replace(data, l2=penalties(l2, data.features.dtype))
    grouped = _checks.flag(called(), "grouped", grouped)
    if l1 is not None:
        grid = penalties(l1, data.features.dtype, "l1")
        return _with_corners(data, grid, grouped, folds, seed, tol, max_steps, callback)
    if data.l2.ndim != 1:
        raise error("l2", "an array of penalties (`fit` takes a single one)", "a scalar")
    if grouped:
        raise error("grouped", "False without `l1`", True)
    if folds is None:
        raise error("folds", "a number or an array [N] (only with `l1` may it be None)", None)
    folds, outcomes = cross_validated(data, folds, seed, tol, max_steps, callback)
    whole, fits, (loss, accuracy) = stacked(outcomes)
    return PathResult(data.l2, whole, CrossValidation(fits, loss, accuracy, folds))


@on_auto_axes
@errors_name("regression.largest_l1")
def largest_l1(
    features: Features,
    labels: ArrayLike,
    *,
    grouped: bool = False,
    penalty_factors: ArrayLike | None = None,
    fit_intercept: bool = True,
    tol: float = 1e-6,
    num_classes: int | None = None,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> float:
    """The smallest l1 that leaves every penalised feature out of the model.

        max_j |g_j| / f_j,  g_j [K] the gradient of the loss at the fit without penalised features

    where |g_j| is the largest absolute entry, or with `grouped` the Euclidean norm. A grid of
    penalties can begin there: `numpy.geomspace(largest_l1(x, y), 1e-3 * largest_l1(x, y), 50)`.

    Derivative: not differentiable.
    Edge cases: 0 if no feature is penalised.

    Args:
        features: real [N, D], finite, dense, BCOO or BCSR.
        labels: as in `fit`.
        grouped: as in `fit`.
        penalty_factors: as in `fit`.
        fit_intercept: as in `fit`.
        tol: as in `fit`.
        num_classes: K; as in `fit`.
        sample_weights: as in `fit`.
        class_weights: as in `fit`.
        offset: as in `fit`.

    Returns:
        A number, nats per unit of the features.

    Raises:
        TypeError, ValueError: as in `fit`; traced data.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1, 0, 1])
        >>> softjax.regression.largest_l1(x, y)
        0.25

    Source: J. Friedman, T. Hastie and R. Tibshirani (2010), section 2.5.
    """
    options = (sample_weights, class_weights, fit_intercept, offset, penalty_factors)
    data = checked_data(features, labels, num_classes, *options)
    _refuse_tracers(data)
    data = replace(data, grouped=_checks.flag(called(), "grouped", grouped))
    options = (Partial(no_report), not_negative("tol", tol), None, lambda: False)
    path = _host_path.path_of(data, *options)
    return path.largest(path.null().evaluation)


def _with_corners(
    data: Data,
    l1: Array,
    grouped: bool,
    folds: int | ArrayLike | None,
    seed: ArrayLike,
    tol: float,
    max_steps: int | None,
    callback: Callable[[ManyEvent], bool | None] | None,
) -> PathResult:
    """The path of fits to all examples, and then the paths of fits to all folds but one."""
    _refuse_tracers((data, l1))
    if l1.ndim != 1:
        raise error("l1", "an array of penalties (`fit` takes a single one)", "a scalar")
    if data.l2.ndim and data.l2.shape != l1.shape:
        got = f"shapes {l1.shape} and {data.l2.shape} of `l2`"
        raise error("l1", "of the shape of `l2`, or `l2` a scalar", got)
    tol, max_steps = limits(tol, max_steps)
    strengths = np.asarray(l1)
    ridges = np.broadcast_to(np.asarray(data.l2), strengths.shape)
    order = np.lexsort((-ridges, -strengths))
    folds, num_folds = (None, 0) if folds is None else folds_array(folds, seed, data)
    data = replace(data, grouped=grouped)
    ones = np.ones(data.features.shape[0], data.features.dtype)
    weights = ones if data.weights is None else np.asarray(data.weights)
    watch = Watch(callback, len(order) * (1 + num_folds))

    def path(own: Data, report: Partial) -> list[_l1_path.Step]:
        options = (report, tol, max_steps, lambda: watch.stopped)
        walk = _l1_path.steps(_host_path.path_of(own, *options), strengths[order], ridges[order])
        return [next(walk), *watch.counted(walk)]  # the first has no penalised feature

    def without(fold: int) -> list[_l1_path.Step]:
        kept = np.where(np.asarray(folds) == fold, 0, weights).astype(weights.dtype)
        report = Partial(held_out, folds, data.labels, placed(weights), np.int32(fold))
        return path(replace(data, weights=placed(kept / kept.mean())), report)[1:]

    whole = path(replace(data, weights=placed(weights)), Partial(no_report))
    null = float(whole[0].evaluation.loss)
    losses = np.array([step.evaluation.loss for step in whole[1:]], np.float64)
    explained = 1 - losses / null if null > 0 else np.full_like(losses, np.nan)
    back = np.argsort(order)
    result = PathResult(
        placed(ridges.copy()),
        placed(_in_order(back, [step.fit for step in whole[1:]])),
        None,
        l1,
        placed(explained.astype(strengths.dtype)[back]),
    )
    if folds is None:
        return result
    of_folds = [
        _in_order(back, [(step.fit, step.evaluation.report) for step in without(fold)])
        for fold in range(num_folds)
    ]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves, 1), *of_folds)
    fits, (loss, accuracy) = placed(stacked)
    return result._replace(cross_validation=CrossValidation(fits, loss, accuracy, folds))


def _in_order(places: np.ndarray, parts: list[Any]) -> Any:
    """The parts in the order of the grid, stacked by NumPy."""
    return jax.tree.map(lambda *leaves: np.stack(leaves)[places], *parts)


def _refuse_tracers(tree: Any) -> None:
    if is_traced(tree):
        raise error("features", "known where `l1` is a grid", "a tracer among the data")

"""Cross-validation: how fits do on examples they have not seen, and which penalty does best."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from softjax import _checks
from softjax._cross_entropy import cross_entropy
from softjax.regression import _arguments, _many
from softjax.regression._lanes import Lane
from softjax.regression._many import ManyEvent
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data
from softjax.regression._result import FitResult

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO


class CrossValidation(NamedTuple):
    """Fits to all folds but one, and how they do on that one: arrays [F], or [P, F] of penalties.

    Attributes:
        fits: to the other folds, stacked.
        loss: the mean loss on the fold, with the sample weights, without penalty, nats.
        accuracy: the share of right predictions on the fold, with the sample weights.
        folds: which fold each example is in, integer [N].

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.arange(8.0)[:, None], np.array([0, 1, 0, 0, 1, 0, 1, 1])
        >>> result = softjax.regression.cross_validate(x, y, l2=0.1, folds=4)
        >>> result.loss.shape, result.mean_loss.shape
        ((4,), ())
    """

    fits: FitResult
    loss: Array
    accuracy: Array
    folds: Array

    @property
    def mean_loss(self) -> Array:
        """Over the folds."""
        return jnp.mean(self.loss, -1)

    @property
    def mean_accuracy(self) -> Array:
        """Over the folds."""
        return jnp.mean(self.accuracy, -1)

    @property
    def standard_error(self) -> Array:
        """Of `mean_loss`: the standard deviation over the folds / sqrt(F); NaN of one fold."""
        folds = self.loss.shape[-1]
        return jnp.std(self.loss, -1, ddof=1) / folds**0.5


class PathResult(NamedTuple):
    """Fits at a grid of penalties, to all examples and to all folds but one.

    Attributes:
        l2: the penalties, [P].
        fits: to all examples, stacked [P, ...].
        cross_validation: [P, F].

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
    cross_validation: CrossValidation

    @property
    def best(self) -> Array:
        """Where in the grid the mean held-out loss is smallest."""
        return jnp.argmin(self.cross_validation.mean_loss)

    @property
    def best_within_one_standard_error(self) -> Array:
        """Where the largest penalty is whose loss is the best one but for its standard error."""
        loss, error = self.cross_validation.mean_loss, self.cross_validation.standard_error
        bound = loss[self.best] + jnp.nan_to_num(error[self.best])  # of one fold there is none
        return jnp.argmax(jnp.where(loss <= bound, self.l2, -1))

    def params_at(self, index: ArrayLike) -> SoftmaxRegression:
        """The fit to all examples at one penalty of the grid."""
        return jax.tree.map(lambda leaf: leaf[index], self.fits.params)


def cross_validate(
    features: "ArrayLike | BCOO",
    labels: ArrayLike,
    *,
    l2: ArrayLike = 0.0,
    folds: int | ArrayLike = 5,
    seed: ArrayLike = 0,
    tol: float = 1e-6,
    max_steps: int | None = None,
    num_classes: int | None = None,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    callback: Callable[[ManyEvent], bool | None] | None = None,
) -> CrossValidation:
    """Fits to all folds of the examples but one, and their loss and accuracy on that one.

        argmin sum_{i not in f} w_i loss_i / sum_{i not in f} w_i + l2 / 2 |kernel|^2
        loss_f = sum_{i in f} w_i (-sum_k y_ik log p_ik) / sum_{i in f} w_i

    All folds and penalties are fitted at once; see `fit_many`. The folds of a penalty start at the
    fit to all examples.

    Derivative: not the purpose.
    Edge cases: a class that a fold has alone is unknown to its fit, and has a loss as large as the
        bias, which nothing holds, has come; the number stays finite.

    Args:
        features: real [N, D], finite, dense or BCOO.
        labels: class indices, integer [N], or a distribution over the classes, floating [N, K].
        l2: >= 0, the strength of the penalty, a scalar or a grid [P].
        folds: their number, from 2 to N, drawn so that every class is spread over them evenly; or
            which fold each example is in, integer [N], of 0, 1, ..., and negative where it is
            always fitted to.
        seed: an integer or a key of `jax.random`, which determines the folds that are drawn.
        tol: as of `fit`; the gradient is relative to what it can be on all the examples.
        max_steps: of each fit; None for more than enough.
        num_classes: K; None for what the labels show.
        sample_weights: real [N], >= 0, of the fits and of what is held out.
        class_weights: real [K], >= 0, of the fits alone.
        callback: called with a `ManyEvent` at the start and after every step; True stops.

    Returns:
        `CrossValidation`.

    Raises:
        TypeError, ValueError: as `fit`; folds of the wrong dtype or shape, or one that leaves
            nothing to fit to, or holds nothing out.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.arange(8.0)[:, None], np.array([0, 1, 0, 0, 1, 0, 1, 1])
        >>> result = softjax.regression.cross_validate(x, y, l2=0.1, folds=4)
        >>> np.bincount(result.folds).tolist()
        [2, 2, 2, 2]

    Source: M. Stone, "Cross-validatory choice and assessment of statistical predictions" (1974).
    """
    data, num_classes = _many.arguments(
        features, labels, l2, num_classes, sample_weights, class_weights
    )
    folds, outcomes = _cross_validated(data, num_classes, folds, seed, tol, max_steps, callback)
    _, fits, (loss, accuracy) = _many.stacked(outcomes) if data.l2.ndim else outcomes[0]
    return CrossValidation(fits, loss, accuracy, folds)


def fit_path(
    features: "ArrayLike | BCOO",
    labels: ArrayLike,
    *,
    l2: ArrayLike,
    folds: int | ArrayLike = 5,
    seed: ArrayLike = 0,
    tol: float = 1e-6,
    max_steps: int | None = None,
    num_classes: int | None = None,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    callback: Callable[[ManyEvent], bool | None] | None = None,
) -> PathResult:
    """Fits at a grid of penalties, with the cross-validation that chooses among them.

        l2_best = argmin_p mean_f loss_pf,  loss_pf as of `cross_validate`
        l2_1se = max {l2_p : mean_f loss_pf <= its minimum + its standard error there}

    The fits to all examples go from the largest penalty to the smallest, each from the one before;
    the folds of a penalty start there, and are all fitted at once.

    Derivative: not the purpose.
    Edge cases: those of `cross_validate`; with one fold, which has no standard error, the second
        rule chooses as the first.

    Args:
        features: real [N, D], finite, dense or BCOO.
        labels: class indices, integer [N], or a distribution over the classes, floating [N, K].
        l2: [P], >= 0, the penalties, in any order.
        folds: as of `cross_validate`.
        seed: as of `cross_validate`.
        tol: as of `cross_validate`.
        max_steps: of each fit; None for more than enough.
        num_classes: K; None for what the labels show.
        sample_weights: as of `cross_validate`.
        class_weights: as of `cross_validate`.
        callback: called with a `ManyEvent` at the start and after every step; True stops.

    Returns:
        `PathResult`.

    Raises:
        TypeError, ValueError: as `cross_validate`.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.arange(8.0)[:, None], np.array([0, 1, 0, 0, 1, 0, 1, 1])
        >>> path = softjax.regression.fit_path(x, y, l2=np.array([1e-3, 0.1, 10.0]), folds=4)
        >>> path.cross_validation.loss.shape, path.fits.params.kernel.shape
        ((3, 4), (3, 1, 2))

    Source: T. Hastie, R. Tibshirani and J. Friedman, "The Elements of Statistical Learning" (2009),
        section 7.10.
    """
    data, num_classes = _many.arguments(
        features, labels, l2, num_classes, sample_weights, class_weights
    )
    if data.l2.ndim != 1:
        raise _arguments.error("l2", "of shape (penalties,)", f"shape {data.l2.shape}")
    folds, outcomes = _cross_validated(data, num_classes, folds, seed, tol, max_steps, callback)
    whole, fits, (loss, accuracy) = _many.stacked(outcomes)
    return PathResult(data.l2, whole, CrossValidation(fits, loss, accuracy, folds))


def _cross_validated(
    data: Data,
    num_classes: int,
    folds: int | ArrayLike,
    seed: ArrayLike,
    tol: float,
    max_steps: int | None,
    callback: Callable[[ManyEvent], bool | None] | None,
) -> tuple[Array, list[_many.Outcome]]:
    """The folds, and the fits at each penalty to all examples and to all folds but one."""
    folds, num_folds = _folds(folds, seed, data)
    ones = jnp.ones(data.features.shape[0], data.features.dtype)
    weights = ones if data.weights is None else data.weights
    outcomes = _many.run(
        data._replace(l2=jnp.atleast_1d(data.l2)),
        num_classes,
        Partial(_all_but_a_fold, folds, data.labels, weights),
        Partial(_held_out, folds, data.labels, weights),
        num_folds,
        tol=tol,
        max_steps=max_steps,
        callback=callback,
    )
    return folds, outcomes


def _all_but_a_fold(folds: Array, labels: Array, weights: Array, l2: Array, fold: Array) -> Lane:
    return Lane(labels, _many.mean_one(jnp.where(folds == fold, 0, weights)), l2)


def _held_out(
    folds: Array, labels: Array, weights: Array, fold: Array, logits: Array
) -> tuple[Array, Array]:
    """Mean loss and accuracy on a fold."""
    share = jnp.where(folds == fold, weights, 0)
    share = share / jnp.sum(share)
    losses = cross_entropy(logits.T, labels)
    right = labels if labels.ndim == 1 else jnp.argmax(labels, -1).astype(jnp.int32)
    hits = jnp.argmax(logits, 0).astype(jnp.int32) == right
    return jnp.vdot(share, losses), jnp.vdot(share, hits.astype(share.dtype))


def _folds(folds: int | ArrayLike, seed: ArrayLike, data: Data) -> tuple[Array, int]:
    """Which fold each example is in, and the number of the folds."""
    examples = data.features.shape[0]
    if jnp.ndim(folds) == 0:
        count = _checks.at_least(_arguments.FIT, "folds", folds, 2)
        if count > examples:
            raise _arguments.error("folds", f"at most the {examples} examples", count)
        drawn = _stratified(_many.random_key(seed), data.labels, count)
    else:
        known = _checks.known(folds)
        if known is None or not np.issubdtype(known.dtype, np.integer):
            got = "a tracer" if known is None else f"dtype {known.dtype}"
            expected = "an integer, or known integers, one for each example"
            raise TypeError(_checks.message(_arguments.FIT, "folds", expected, got))
        _checks.same_shape(_arguments.FIT, "folds", known, (examples,))
        count = max(int(known.max()) + 1, 1)
        drawn = jnp.asarray(np.maximum(known, -1), jnp.int32)
    _refuse_empty_folds(drawn, count, data.weights)
    return drawn, count


@partial(jax.jit, static_argnames="num_folds")
def _stratified(key: Array, labels: Array, num_folds: int) -> Array:
    """Dealt in turn, one class after the other, each shuffled."""
    classes = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    shuffled = jax.random.permutation(key, len(classes))
    order = shuffled[jnp.argsort(classes[shuffled], stable=True)]
    dealt = jnp.arange(len(classes), dtype=jnp.int32) % num_folds
    return jnp.zeros_like(dealt).at[order].set(dealt)


def _refuse_empty_folds(folds: Array, num_folds: int, weights: Array | None) -> None:
    place, mass = _checks.known(folds), _checks.known(weights)
    if place is None or mass is None:
        return
    mass = np.ones(len(place)) if weights is None else mass
    held_out = np.bincount(place[place >= 0], mass[place >= 0], num_folds)
    empty = (held_out <= 0) | (held_out >= mass.sum())
    if empty.any():
        fold = int(np.argmax(empty))
        got = f"fold {fold} with {held_out[fold]:g} of {mass.sum():g}"
        expected = "such that each fold holds out a part of the weight, and not all"
        raise _arguments.error("folds", expected, got)

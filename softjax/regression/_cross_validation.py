"""Cross-validation: fits to all folds of the examples but one.

They are fits to the same examples with different weights, and run at once like those of `fit_many`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax.regression import _host_folds
from softjax.regression._arguments import (
    called,
    checked_data,
    error,
    errors_name,
    limits,
    penalties,
)
from softjax.regression._batched import Lane
from softjax.regression._features import Features
from softjax.regression._frame import in_bucket, next_power_of_two, without_hidden
from softjax.regression._groups import Outcome, mean_one, random_key, run, stacked
from softjax.regression._host_arrays import placed
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, ManyEvent, losses_and_hits


class CrossValidation(NamedTuple):
    """Fits to all folds but one, and their loss and accuracy on that fold.

    The arrays are [F], or [P, F] with a grid of penalties.

    Attributes:
        fits: the fits without each fold, stacked.
        loss: the mean loss on the fold, with the sample weights, without penalty, nats.
        accuracy: the share of correct predictions on the fold, with the sample weights.
        folds: the fold of each example, integer [N].

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
        """The mean of the loss over the folds."""
        return jnp.mean(self.loss, -1)

    @property
    def mean_accuracy(self) -> Array:
        """The mean of the accuracy over the folds."""
        return jnp.mean(self.accuracy, -1)

    @property
    def standard_error(self) -> Array:
        """The standard error of `mean_loss`: std over the folds / sqrt(F); NaN for one fold."""
        folds = self.loss.shape[-1]
        return jnp.std(self.loss, -1, ddof=1) / folds**0.5


@on_auto_axes
@errors_name("regression.cross_validate")
def cross_validate(
    features: Features,
    labels: ArrayLike,
    *,
    l2: ArrayLike = 0.0,
    folds: int | ArrayLike = 5,
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
) -> CrossValidation:
    """Fits to all folds of the examples but one, and their loss and accuracy on that fold.

        argmin sum_{i not in f} w_i loss_i / sum_{i not in f} w_i + l2 / 2 |kernel|^2
        loss_f = sum_{i in f} w_i (-sum_k y_ik log p_ik) / sum_{i in f} w_i

    All folds and penalties are fitted at once, as in `fit_many`. The folds of a penalty start at
    the fit to all examples.

    Derivative: not differentiable.
    Edge cases: if all examples of a class are in one fold, the fit without this fold does not know
        the class: it is "quasi-separated", and its held-out loss is large but finite, since the
        bias of the class decreases until the fit stops.

    Args:
        features: real [N, D], finite, dense, BCOO or BCSR.
        labels: class indices, integer [N], or a distribution over the classes, floating [N, K].
        l2: >= 0, the strength of the penalty, a scalar or a grid [P].
        folds: the number of folds, from 2 to N, drawn so that every class is spread over them
            evenly; or the fold of each example, integer [N], 0, 1, ..., or negative for an example
            that is in every fit and never held out.
        seed: an integer or a key of `jax.random`, which determines the folds that are drawn.
        penalty_factors: as in `fit`.
        fit_intercept: as in `fit`.
        tol: as in `fit`; the gradient is relative to its largest possible value on all examples.
        max_steps: the limit of each fit; None for 200.
        num_classes: K; as in `fit`.
        sample_weights: real [N], >= 0, for the fits and the held-out examples.
        class_weights: real [K], >= 0, only for the fits.
        offset: real [N, K], nats, for the fits and the held-out examples; as in `fit`.
        callback: called with a `ManyEvent` at the start and after every step; True stops.

    Returns:
        `CrossValidation`.

    Raises:
        TypeError, ValueError: as in `fit`; folds of the wrong dtype or shape, or a fold that holds
            out all of the weight or none of it.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.arange(8.0)[:, None], np.array([0, 1, 0, 0, 1, 0, 1, 1])
        >>> result = softjax.regression.cross_validate(x, y, l2=0.1, folds=4)
        >>> np.bincount(result.folds).tolist()
        [2, 2, 2, 2]

    Source: M. Stone, "Cross-validatory choice and assessment of statistical predictions" (1974).
    """
    options = (sample_weights, class_weights, fit_intercept, offset, penalty_factors)
    data = checked_data(features, labels, num_classes, *options)
    data = replace(data, l2=penalties(l2, data.features.dtype))
    folds, outcomes = cross_validated(data, folds, seed, tol, max_steps, callback)
    _, fits, (loss, accuracy) = stacked(outcomes) if data.l2.ndim else outcomes[0]
    return CrossValidation(fits, loss, accuracy, folds)


def cross_validated(
    data: Data,
    folds: int | ArrayLike,
    seed: ArrayLike,
    tol: float,
    max_steps: int | None,
    callback: Callable[[ManyEvent], bool | None] | None,
) -> tuple[Array, list[Outcome]]:
    """The folds, and for each penalty the fits to all examples and to all folds but one."""
    folds, num_folds = folds_array(folds, seed, data)
    data = without_hidden(data if data.l2.ndim else replace(data, l2=data.l2[None]))
    found: list[Any] = [None] * len(data.l2)
    tol, limit = limits(tol, max_steps)
    start = None
    if callback is None and _host_folds.takes(data, num_folds):
        found, start = _host_folds.outcomes(data, np.asarray(folds), num_folds, tol, limit)
    left = [place for place, outcome in enumerate(found) if outcome is None]
    if left:
        rest = data if len(left) == len(found) else replace(data, l2=data.l2[np.array(left)])
        outcomes = _compiled(rest, folds, num_folds, tol, limit, callback, start)
        for place, outcome in zip(left, outcomes, strict=True):
            found[place] = outcome
    return folds, found


def _compiled(
    data: Data,
    folds: Array,
    num_folds: int,
    tol: float,
    max_steps: int | None,
    callback: Callable[[ManyEvent], bool | None] | None,
    start: SoftmaxRegression | None,
) -> list[Outcome]:
    """The fits of the folds of each penalty, all at once."""
    examples = data.features.shape[0]
    data = in_bucket(data, 1 + num_folds)
    added = data.features.shape[0] - examples
    weights = data.weights
    if weights is None:
        weights = placed(np.ones(examples, data.features.dtype))
    if added:  # rows of weight 0, which are in no fold
        folds = placed(np.pad(np.asarray(folds), (0, added), constant_values=-1))
    return run(
        data,
        Partial(_all_but_a_fold, folds, data.labels, weights),
        Partial(held_out, folds, data.labels, weights),
        num_folds,
        tol=tol,
        max_steps=max_steps,
        callback=callback,
        init=start,
    )


def _all_but_a_fold(folds: Array, labels: Array, weights: Array, l2: Array, fold: Array) -> Lane:
    return Lane(labels, mean_one(jnp.where(folds == fold, 0, weights)), l2)


def held_out(
    folds: Array, labels: Array, weights: Array, fold: Array, logits: Array
) -> tuple[Array, Array]:
    """The weighted mean loss and accuracy on a fold."""
    share = jnp.where(folds == fold, weights, 0)
    share = share / jnp.sum(share)
    losses, hits = losses_and_hits(logits.T, labels)
    return jnp.sum(share * losses), jnp.sum(jnp.where(hits, share, 0))


def folds_array(folds: int | ArrayLike, seed: ArrayLike, data: Data) -> tuple[Array, int]:
    """The fold of each example, and the number of folds."""
    examples = data.features.shape[0]
    expected = "an integer, or known integers, the fold of each example"
    if np.ndim(folds) == 0:
        try:
            count = _checks.at_least(called(), "folds", folds, 2)
        except TypeError as wrong:  # such as a KFold of scikit-learn
            got = repr(folds)
            raise TypeError(_checks.message(called(), "folds", expected, got)) from wrong
        if count > examples:
            raise error("folds", f"at most the {examples} examples", count)
        drawn = _stratified(random_key(seed), data.labels, count)
    else:
        known = _checks.known(folds)
        if known is None or not np.issubdtype(known.dtype, np.integer):
            got = "a tracer" if known is None else f"dtype {known.dtype}"
            raise TypeError(_checks.message(called(), "folds", expected, got))
        _checks.same_shape(called(), "folds", known, (examples,))
        count = max(int(known.max()) + 1, 1)
        drawn = placed(np.maximum(known, -1).astype(np.int32))
    _refuse_empty_folds(drawn, count, data.weights)
    return drawn, count


def _stratified(key: Array, labels: Array, num_folds: int) -> Array:
    """The fold of each example: shuffled examples are dealt in turn, one class after another."""
    classes = labels if labels.ndim == 1 else jnp.argmax(labels, -1)
    count = len(classes)
    dealt = np.arange(count, dtype=np.int32) % num_folds
    # One program draws the bits of any number up to a power of two.
    bits = _bits(key, max(next_power_of_two(count), 1024))
    known: list[Any] = [_checks.known(a) for a in (bits, classes)]
    if any(a is None for a in known):
        return jnp.zeros_like(dealt).at[jnp.lexsort((bits[:count], classes))].set(dealt)
    drawn = np.empty_like(dealt)  # NumPy needs no compilation
    drawn[np.lexsort((known[0][:count], known[1]))] = dealt
    return placed(drawn)


@partial(jax.jit, static_argnums=1)
def _bits(key: Array, count: int) -> Array:
    return jax.random.bits(key, (count,))


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
        raise error("folds", expected, got)

"""Models of choice: Bradley-Terry (one of two, or neither) and Plackett-Luce (rankings).

Each choice is a softmax over the items that can be chosen, so that each loss is a cross-entropy or
a sum of cross-entropies.
"""

import operator
from contextlib import nullcontext
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._cross_entropy import cross_entropy
from softjax._losses import spoiled
from softjax._sharding import with_whole_axis
from softjax._softmax import softmax

__all__ = ["bradley_terry_loss", "bradley_terry_probability", "plackett_luce_loss"]


def bradley_terry_probability(
    score_i: ArrayLike, score_j: ArrayLike, neither: ArrayLike | None = None
) -> Array:
    """Probabilities of the outcomes of a comparison of i and j.

        softmax(s_i, s_j)  or, if neither may win,  softmax(s_i, s_j, s_0)

    Without `neither`, P(i beats j) = sigmoid(s_i - s_j). With `neither`, the odds of i against j
    are still exp(s_i - s_j), because the third outcome reduces both probabilities by the same
    factor.

    Derivative: as for `softmax`.
    Edge cases: as for `softmax`; an item with score -inf never wins.

    Args:
        score_i: real, nats: score of i.
        score_j: real, nats: score of j; it broadcasts with `score_i`.
        neither: real, nats: score of the outcome "neither"; it broadcasts with the others. None if
            one of the two always wins.

    Returns:
        [..., 2] or, with `neither`, [..., 3]: probabilities of i, of j and of neither, in the
        dtype of the scores.

    Raises:
        TypeError, ValueError: not real arrays, or shapes that do not broadcast.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.choice.bradley_terry_probability(jnp.log(3.0), 0.0)
        Array([0.75000006, 0.25      ], dtype=float32)

    Source: R. A. Bradley, M. E. Terry, "Rank Analysis of Incomplete Block Designs" (1952);
        Zhang et al., "Dive into Deep Learning", section 4.1, exercise 4.
    """
    return softmax(_outcomes("choice.bradley_terry_probability", score_i, score_j, neither))


def bradley_terry_loss(
    score_i: ArrayLike,
    score_j: ArrayLike,
    outcome: ArrayLike,
    neither: ArrayLike | None = None,
) -> Array:
    """Negative log-likelihood of the outcome of a comparison of i and j.

        l = -log softmax(s_i, s_j[, s_0])_outcome

    Derivative: p - [outcome]. Both modes, any order.
    Edge cases: as for `cross_entropy`; under a trace, an outcome out of range gives NaN in loss and
    gradient.

    Args:
        score_i: real, nats: score of i.
        score_j: real, nats: score of j; it broadcasts with `score_i`.
        outcome: integers, the shape that the scores broadcast to: 0 if i won, 1 if j won and, with
            `neither`, 2 if neither won.
        neither: real, nats: score of the outcome "neither"; it broadcasts with the others. None if
            one of the two always wins.

    Returns:
        Losses in nats, shape of `outcome`, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a known outcome out of
            range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.choice.bradley_terry_loss(jnp.array([20.0, 0.0]), 0.0, jnp.array([0, 1]))
        Array([2.0611537e-09, 6.9314718e-01], dtype=float32)

    Source: Bradley and Terry (1952); R. R. Davidson, "On Extending the Bradley-Terry Model to
        Accommodate Ties" (1970), for other models in which neither may win.
    """
    function = "choice.bradley_terry_loss"
    logits = _outcomes(function, score_i, score_j, neither)
    outcome = _integers(function, "outcome", outcome)
    _checks.same_shape(function, "outcome", outcome, logits.shape[:-1])
    k = logits.shape[-1]
    with jax.ensure_compile_time_eval():
        bad = (outcome < 0) | (outcome >= k)
    _refuse(function, "outcome", f"in [0, {k})", outcome, bad)
    return cross_entropy(logits, outcome)


def plackett_luce_loss(
    scores: ArrayLike, ranking: ArrayLike, where: ArrayLike | None = None
) -> Array:
    """Negative log-likelihood of rankings: repeated softmax choices from the remaining items.

        l = sum_t (logsumexp(s_i, i not yet chosen before t) - s_(i_t)),  i_1, ..., i_k = ranking

    A ranking may be partial: items that it does not name come after those that it names. With k = 1
    this is the cross-entropy, with two items the Bradley-Terry loss.

    Derivative: sum_t (p_t - [i_t]), where p_t is the softmax over the items left at t. Both modes,
    any order.
    Edge cases: an entry of -1 is padding and adds nothing. An index out of range, an item named
    twice and an item that `where` leaves out raise ValueError if their values are known; otherwise
    they give NaN in loss and gradient. An item with score -inf before others gives +inf.

    Args:
        scores: real [..., n], nats: one score per item.
        ranking: signed integers [..., k], k <= n, best item first; -1 for padding.
        where: booleans of the rank of `scores`, which broadcast to it: the items that take part.

    Returns:
        Losses [...] in nats, at least float32. Time and memory are O(k n).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a ranking that is known
            to be invalid.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.choice.plackett_luce_loss(jnp.zeros(3), jnp.array([2, 0, 1]))  # log 3!
        Array(1.7917595, dtype=float32)

    Source: R. L. Plackett, "The Analysis of Permutations" (1975); D. R. Hunter, "MM algorithms
        for generalized Bradley-Terry models" (2004).
    """
    function = "choice.plackett_luce_loss"
    x = _checks.real_array(function, "scores", scores)
    if x.ndim == 0:
        raise ValueError(_checks.message(function, "scores", "of rank >= 1", "rank 0"))
    ranking = _integers(function, "ranking", ranking, signed=True)
    same_rows = ranking.ndim == x.ndim and ranking.shape[:-1] == x.shape[:-1]
    if not (same_rows and ranking.shape[-1] <= x.shape[-1]):
        expected = f"of shape {x.shape[:-1]} + (k,) with k <= {x.shape[-1]}"
        raise ValueError(_checks.message(function, "ranking", expected, f"shape {ranking.shape}"))
    x, ranking = with_whole_axis(x, x.ndim - 1), with_whole_axis(ranking, ranking.ndim - 1)
    # Known values are checked even within a trace. Traced arrays may have symbolic shapes.
    is_known = _checks.is_concrete(ranking) and _checks.is_concrete(where)
    with jax.ensure_compile_time_eval() if is_known else nullcontext():
        where = True if where is None else where
        stages = _stages(ranking, _checks.mask_of_classes(function, where, x.shape))
    expected = f"-1 or an item in [0, {x.shape[-1]}) that takes part, and named once"
    _refuse(function, "ranking", expected, ranking, stages.bad)
    return _plackett_luce_loss(x, stages)


class _Stages(NamedTuple):
    """The sequence of choices in a ranking."""

    chosen: Array  # [..., k], the item chosen; -1 for none
    left: Array  # [..., k, n], the items that can still be chosen
    bad: Array  # [..., k], whether this entry of the ranking is invalid


@jax.jit
def _stages(ranking: Array, where: Array) -> _Stages:
    n = where.shape[-1]
    items = jnp.arange(n, dtype=ranking.dtype)
    is_chosen = ranking[..., None] == jnp.expand_dims(items, range(ranking.ndim))
    count = jnp.cumsum(is_chosen, -2, dtype=jnp.int32)
    left = where[..., None, :] & (count - is_chosen.astype(jnp.int32) == 0)
    bad = (ranking != -1) & ~jnp.any(is_chosen & left, -1)
    return _Stages(jnp.where(bad, -1, ranking), left, bad)


@jax.jit
def _plackett_luce_loss(scores: Array, stages: _Stages) -> Array:
    logits = jnp.broadcast_to(scores[..., None, :], stages.left.shape)
    losses = cross_entropy(logits, stages.chosen, where=stages.left, ignore_index=-1)
    return spoiled(jnp.sum(losses, -1), jnp.any(stages.bad, -1))


def _outcomes(function: str, score_i, score_j, neither) -> Array:
    """The scores of the outcomes, stacked on a new last axis."""
    given = {"score_i": score_i, "score_j": score_j}
    if neither is not None:
        given["neither"] = neither
    given = {name: _checks.not_bool(function, name, score) for name, score in given.items()}
    scores = [_checks.real_array(function, name, score) for name, score in given.items()]
    shapes = [score.shape for score in scores]
    try:
        shape = jnp.broadcast_shapes(*shapes)
    except ValueError as error:
        expected = "of shapes that broadcast"
        got = ", ".join(str(shape) for shape in shapes)
        raise ValueError(_checks.message(function, "`, `".join(given), expected, got)) from error
    # Python numbers and integers take the dtype of the floating arrays.
    arrays = [jnp.asarray(_checks.native(function, name, s)) for name, s in given.items()]
    dtypes = [a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.floating) and not a.weak_type]
    dtype = reduce(jnp.promote_types, dtypes or [scores[0].dtype])
    return jnp.stack([jnp.broadcast_to(score, shape).astype(dtype) for score in scores], -1)


def _integers(function: str, argument: str, x: ArrayLike, *, signed: bool = False) -> Array:
    """`x` as integers of at least 32 bits; known values stay known inside a trace."""
    with jax.ensure_compile_time_eval():
        expected = f"an array of {'signed ' if signed else ''}integers"
        x = _checks.array(function, argument, expected, x)
        if not jnp.issubdtype(x.dtype, jnp.signedinteger if signed else jnp.integer):
            raise TypeError(_checks.message(function, argument, expected, f"dtype {x.dtype}"))
        return x.astype(jnp.int32) if jnp.iinfo(x.dtype).bits < 32 else x


def _refuse(function: str, argument: str, expected: str, x: Array, bad: Array) -> None:
    """Raises ValueError if an entry of `x` is known to be bad, and names the first one."""
    if _checks.checks_values(x) and not _checks.holds(operator.invert, bad):
        _checks.refuse_first(function, argument, expected, np.asarray(x), np.asarray(bad))

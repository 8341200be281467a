"""The problem that a solver solves: the data of a fit, and the targets that they become.

Labels and weights of every kind are combined into targets, from the sample weights w, the class
weights c and the labels y as a distribution over the classes:

    q_ik = w_i c_k y_ik / sum_i w_i

The parameters that are sought, and the objective that they make small, are in `_objective`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softjax._checks import nan_where

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Data:
    """The data of a fit, a pytree of arrays.

    Attributes:
        num_classes: K.
        features: [N, D].
        labels: integer [N] or floating [N, K].
        weights: [N], of mean 1; None for ones.
        class_weights: [K]; None for ones.
        l2: scalar.
        l1: scalar.
        count: the sum of the original sample weights; None for N.
        constant: 1, or 0 without an intercept; None for 1.
        offset: [K, N], the known part of the logits; None for zeros.
        factors: [D], multiply the penalties of each feature; None for ones.
        l1_rows: scalar, multiplies the Euclidean norms over the classes; None for 0.
    """

    num_classes: int = field(metadata={"static": True})
    features: Any
    labels: Any
    weights: Array | None
    class_weights: Array | None
    l2: Array
    l1: Array
    count: Array | None = None
    constant: Array | None = None
    offset: Array | None = None
    factors: Array | None = None
    l1_rows: Array | None = None


class Problem(NamedTuple):
    """The problem that a solver solves: the minimum of the objective above.

    Attributes:
        features: [N, D], dense or BCOO.
        targets: q [K, N], >= 0; their sum over the classes is the weight of an example.
        l2: scalar >= 0.
        l1: scalar >= 0.
        count: the number of examples, or sum of weights, by which the targets are divided.
        constant: c, 1 or 0.
        offset: [K, N], or None.
        factors: [D], or None.
        l1_rows: scalar >= 0, or None.
    """

    features: "Array | BCOO"
    targets: Array
    l2: Array
    l1: Array
    count: Array
    constant: Array
    offset: Array | None
    factors: Array | None
    l1_rows: Array | None

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.targets)


def problem_of(data: Data) -> Problem:
    """The problem of `data`, with labels and weights as targets; NaN if a class is out of range."""
    return with_targets(data, _weighted_labels(data) / len(data.labels))


def with_targets(data: Data, targets: Array) -> Problem:
    """The problem of `data` with the given targets in place of its labels and weights."""
    constant = jnp.asarray(1 if data.constant is None else data.constant, targets.dtype)
    return Problem(
        data.features,
        targets,
        data.l2,
        data.l1,
        _count(data),
        constant,
        data.offset,
        data.factors,
        data.l1_rows,
    )


def normalised(data: Data) -> tuple[Data, Array]:
    """The data with labels or class weights divided by the mass of the targets, and this mass.

    The optimum is the same, the targets sum to 1, and the objective is divided by the mass: so the
    tolerances of a solver do not depend on the scale of labels or class weights.
    """
    mass = jnp.ones((), data.features.dtype)
    if data.labels.ndim == 1 and data.class_weights is None:
        return data, mass  # the sample weights have a mean of 1

    def over(data, name, factor):
        scaled = {name: getattr(data, name).astype(mass.dtype) / factor}
        return with_penalties(replace(data, **scaled), lambda penalty: penalty / factor)

    # Divide by the largest entries first: products of small factors may underflow to 0.
    names = ["class_weights"] if data.class_weights is not None else []
    names += ["labels"] if data.labels.ndim == 2 else []
    for name in names:
        largest = jnp.max(getattr(data, name)).astype(mass.dtype)
        data, mass = over(data, name, largest), mass * largest
    rest = jnp.sum(_weighted_labels(data)) / len(data.labels)
    data, mass = over(data, names[0], rest), mass * rest
    # An infinite penalty makes the kernel 0, and so does one near the largest number of the dtype.
    limit = jnp.finfo(mass.dtype).max / 8
    data = with_penalties(data, lambda penalty: jnp.minimum(penalty, limit))
    return replace(data, count=_count(data) * mass), mass


def normalised_problem(data: Data) -> tuple[Problem, Array]:
    """The problem of the normalised data, which a solver sees, and the mass."""
    data, mass = normalised(data)
    return problem_of(data), mass


def with_penalties(data: Data, function: Callable[[Array], Array]) -> Data:
    """The data with `function` applied to each penalty."""
    rows = None if data.l1_rows is None else function(data.l1_rows)
    return replace(data, l2=function(data.l2), l1=function(data.l1), l1_rows=rows)


def _weighted_labels(data: Data) -> Array:
    """w_i c_k y_ik, [K, N]; NaN at a class index out of range."""
    labels, dtype = data.labels, data.features.dtype
    if labels.ndim == 1:
        classes = jnp.arange(data.num_classes, dtype=labels.dtype)[:, None]
        bad = (labels < 0) | (labels >= data.num_classes)
        targets = nan_where(bad, (labels[None] == classes).astype(dtype))
    else:
        targets = labels.T.astype(dtype)
    if data.class_weights is not None:
        targets = data.class_weights[:, None] * targets
    if data.weights is not None:
        targets = data.weights[None] * targets
    return targets


def _count(data: Data) -> Array:
    if data.count is None:
        return jnp.asarray(data.features.shape[0], data.features.dtype)
    return jnp.asarray(data.count, data.features.dtype)

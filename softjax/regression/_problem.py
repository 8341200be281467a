"""The data of a fit, and the problem that they become: to minimise the objective.

    f(theta) = sum_ik q_ik (-log p_ik) + sum_j f_j (l2 / 2 |kernel_j|^2 + l1 |kernel_j|_1)
    p_i = softmax(z_i),  z_i = theta x~_i + o_i

kernel_j [K] is the row of feature j in the kernel, and f_j its penalty factor, 1 unless the caller
gives another one. With a grouped penalty l1 multiplies |kernel_j|_2 instead. theta [K, D + 1] holds
the transposed kernel and, in its last column, the bias: the parameters of the features x~ = (x, c)
with the constant c = 1. A model without an intercept has c = 0: all formulas hold, the gradient of
the bias is 0, and the bias stays at its initial 0. The offset o_i is a known part of the logits.

Labels and weights of every kind are combined into the targets q, from the sample weights w, the
class weights c and the labels y as a distribution over the classes:

    q_ik = w_i c_k y_ik / sum_i w_i
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from softjax._checks import nan_where
from softjax._log_softmax_core import log_softmax_core
from softjax.regression._features import by_columns, by_examples, is_sparse, product, with_data
from softjax.regression._objective import (
    Point,
    below_largest,
    row_norms,
    softmax_hvp,
    sum_of_small,
    uncertainty,
    without_bias,
)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the data of a fit have in common with their problem."""

    features: Any  # [N, D], dense or BCOO
    l2: Any  # scalar >= 0
    l1: Any  # scalar >= 0
    # Whether l1 multiplies the Euclidean norms over the classes.
    grouped: bool = field(default=False, metadata={"static": True})
    factors: Any = None  # f [D], multiply the penalties of each feature; None for ones
    count: Any = None  # N, or the sum of the original sample weights; for "firth"
    constant: Any = 1  # c, 1 or 0
    offset: Any = None  # o [K, N], the known part of the logits; None for zeros

    @property
    def ridge(self) -> Any:
        """The strength of the squared penalty, a scalar or one for each feature, [D]."""
        return self.l2 if self.factors is None else self.l2 * self.factors

    @property
    def is_penalised(self) -> Any:
        """Whether there is a penalty, on the features whose penalty factor is not 0."""
        return (self.l2 > 0) | (self.l1 > 0)

    @property
    def is_loose(self) -> Any:
        """Whether the parameters of some features are not penalised: there may be no optimum."""
        loose = ~self.is_penalised
        return loose if self.factors is None else loose | jnp.any(self.factors == 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Problem(Shared):
    """The problem that a solver solves."""

    targets: Array  # q [K, N], >= 0

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.targets)

    @property
    def weights(self) -> Array:
        """The weights of the examples in the objective, [N]: the sums of the targets."""
        return jnp.sum(self.targets, 0)

    @property
    def free(self) -> Array:
        """1 for each feature that is not penalised, and for the bias; else 0; [1, D + 1]."""
        dtype, width = self.targets.dtype, self.features.shape[1] + 1
        has_factor = self.penalised(jnp.ones((1, width), dtype)) > 0
        return jnp.where(has_factor & self.is_penalised, 0, 1).astype(dtype)

    @property
    def lacks_examples(self) -> Array:
        """Whether a class has no examples: its bias, which is not penalised, decreases for ever."""
        return jnp.any(jnp.sum(self.targets, 1) == 0) & (self.constant > 0)

    @property
    def has_bounded_optimum(self) -> Array:
        """Whether the whole kernel is penalised and every class has examples."""
        return ~self.is_loose & ~self.lacks_examples

    def scores(self, theta: Array) -> Array:
        """theta x~_i, [K, N], linear in theta: one product with the features."""
        bias = self.constant * theta[:, -1:]
        return product(self.features, theta[:, :-1].T).T + bias

    def logits(self, theta: Array) -> Array:
        """The logits [K, N] of the parameters: one product with the features."""
        return self.with_offset(self.scores(theta))

    def with_offset(self, scores: Array) -> Array:
        """The logits of scores."""
        return scores if self.offset is None else scores + self.offset

    def without_offset(self, logits: Array) -> Array:
        """The scores of logits: the part that is linear in the parameters."""
        return logits if self.offset is None else logits - self.offset

    def pull_back(self, residual: Array) -> Array:
        """The transpose of `scores`: [K, N] to [K, D + 1], one product with the features."""
        features: Any = self.features
        bias = self.constant * jnp.sum(residual, 1, keepdims=True)
        if not is_sparse(features) and features.shape[1] == 1:
            # XLA:CPU adds the rows of a product with a vector one by one, but a sum as a tree.
            kernel = jnp.sum(residual * features[:, 0], 1, keepdims=True)
        else:
            kernel = product(residual, features)
        return jnp.concatenate([kernel, bias], 1)

    def penalised(self, theta: Array) -> Array:
        """`theta` times the penalty factors, with 0 for the bias, which is not penalised."""
        if self.factors is None:
            return without_bias(theta)
        return theta * jnp.append(self.factors, 0)[None]

    def penalty(self, theta: Array) -> Array:
        """The penalties of the objective."""
        kernel = self.penalised(theta)
        sizes = row_norms(kernel) if self.grouped else jnp.abs(kernel)
        return self.l2 / 2 * jnp.vdot(theta, kernel) + self.l1 * jnp.sum(sizes)

    def value(self, theta: Array, logits: Array) -> Array:
        """The objective at parameters with known logits.

        The sum is not `jnp.vdot`, which flattens its arguments: this would gather examples that are
        sharded over a mesh.
        """
        return -jnp.sum(self.targets * log_softmax_core(logits, (0,))) + self.penalty(theta)

    def objective(self, theta: Array) -> Array:
        """The objective at any parameters: one product with the features."""
        return self.value(theta, self.logits(theta))

    def residual(self, p: Array) -> Array:
        """w p - q, [K, N]; its product with the features is the gradient of the loss.

        For a nearly certain class it is (w - q) - w (1 - p), with 1 - p from `complements`.
        """
        q, weights = self.targets, self.weights[None]
        return jnp.where(p > 0.5, (weights - q) - weights * sum_of_small(p), weights * p - q)

    def point(self, theta: Array, logits: Array) -> Point:
        """The `Point` of parameters with known logits, from one pass over the examples."""

        def sums(q: Array, features: Any, logits: Array) -> tuple[Array, Array, Array]:
            own = replace(self, features=features, targets=q)
            below, p = below_largest(logits)
            gradient = own.pull_back(own.residual(p))
            # The log of a largest p near 1 is log1p of minus the sum of the others.
            rest = sum_of_small(p)[0]
            by_rest = jnp.log1p(-jnp.minimum(rest, 0.5))
            largest = jnp.where(rest < 0.5, by_rest, jnp.log(jnp.max(p, 0)))
            loss = -jnp.sum(q * below) - jnp.sum(own.weights * largest)
            return gradient, loss, jnp.sum(uncertainty(own.weights, p))

        gradient, loss, uncertain = by_examples(sums, self.targets, self.features, logits)
        gradient += self.l2 * self.penalised(theta)
        return Point(theta, logits, gradient, loss + self.penalty(theta), uncertain)

    def gradient(self, theta: Array, p: Array) -> Array:
        """The gradient of the smooth part at probabilities p: one product with the features."""
        return self.pull_back(self.residual(p)) + self.l2 * self.penalised(theta)

    def hessian_times(self, p: Array, v: Array) -> Array:
        """The Hessian of the smooth part at probabilities p, times v [K, D + 1]."""
        moved = softmax_hvp(self.weights, p, self.scores(v))
        return self.pull_back(moved) + self.l2 * self.penalised(v)

    def gradient_bound(self) -> Array:
        """(sum_i w_i x_ij^2)^(1/2), [D + 1], a bound of |sum_i w_i (p_ik - y_ik) x_ij|.

        A gradient relative to it does not depend on the units of the features. 1 for a feature of
        zeros.
        """
        features, weights = self.features, self.weights
        if is_sparse(features):
            squares = product(weights, with_data(features, jnp.square(features.data)))
        else:
            squares = by_columns(lambda x: jnp.sum(weights[:, None] * x * x, 0), features)
        squares = jnp.append(squares, self.constant * jnp.sum(weights))
        return jnp.sqrt(jnp.where(squares > 0, squares, 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Data(Shared):
    """The data of a fit."""

    num_classes: int = field(metadata={"static": True})  # K
    labels: Any  # integer [N] or floating [N, K]
    weights: Any = None  # [N], of mean 1; None for ones
    class_weights: Any = None  # [K]; None for ones

    def problem(self) -> Problem:
        """The problem, with labels and weights as targets; NaN if a class is out of range."""
        return self.with_targets(self._weighted_labels() / len(self.labels))

    def with_targets(self, targets: Array) -> Problem:
        """The problem with the given targets in place of the labels and weights."""
        shared: dict[str, Any] = {part.name: getattr(self, part.name) for part in fields(Shared)}
        shared["constant"] = jnp.asarray(self.constant, targets.dtype)
        return Problem(**shared, targets=targets)

    def normalised_problem(self) -> tuple[Problem, Array]:
        """The problem of the normalised data, which a solver sees, and the mass."""
        data, mass = self.normalised()
        return data.problem(), mass

    def normalised(self) -> tuple["Data", Array]:
        """The data with labels or class weights divided by the mass of the targets, and this mass.

        The optimum is the same, the targets sum to 1, and the objective is divided by the mass: so
        the tolerances of a solver do not depend on the scale of labels or class weights.
        """
        data, mass = self, jnp.ones((), self.features.dtype)
        if data.labels.ndim == 1 and data.class_weights is None:
            return data, mass  # the sample weights have a mean of 1

        def over(data: Data, name: str, factor: Array) -> Data:
            scaled = {name: getattr(data, name).astype(mass.dtype) / factor}
            return replace(data, **scaled, l2=data.l2 / factor, l1=data.l1 / factor)

        # Divide by the largest entries first: products of small factors may underflow to 0.
        names = ["class_weights"] if data.class_weights is not None else []
        names += ["labels"] if data.labels.ndim == 2 else []
        for name in names:
            largest = jnp.max(getattr(data, name)).astype(mass.dtype)
            data, mass = over(data, name, largest), mass * largest
        rest = jnp.sum(data._weighted_labels()) / len(data.labels)
        data, mass = over(data, names[0], rest), mass * rest
        # An infinite penalty makes the kernel 0, and so does one near the largest number.
        limit = jnp.finfo(mass.dtype).max / 8
        l2, l1 = (jnp.minimum(penalty, limit) for penalty in (data.l2, data.l1))
        count = None if data.count is None else data.count * mass
        return replace(data, l2=l2, l1=l1, count=count), mass

    def _weighted_labels(self) -> Array:
        """w_i c_k y_ik, [K, N]; NaN at a class index out of range."""
        labels, dtype = self.labels, self.features.dtype
        if labels.ndim == 1:
            classes = jnp.arange(self.num_classes, dtype=labels.dtype)[:, None]
            bad = (labels < 0) | (labels >= self.num_classes)
            targets = nan_where(bad, (labels[None] == classes).astype(dtype))
        else:
            targets = labels.T.astype(dtype)
        if self.class_weights is not None:
            targets = self.class_weights[:, None] * targets
        return targets if self.weights is None else self.weights[None] * targets

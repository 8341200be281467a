"""The metric in which a step is steepest: the Hessian as a product of classes and features.

    H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T  ~  G kron A + ridge
    u_i = w_i sum_k p_ik (1 - p_ik),  A = sum_i u_i x_i x_i^T

where G, of trace 1, has the diagonal of sum_i w_i (diag p_i - p_i p_i^T) / sum_i u_i and the form
of one example's,

    G = diag(m) - m m^T / sum(m),  G^+ = C diag(1 / m) C,  C = I - 11^T/K,

so that nothing of K x K numbers is needed. One D x D factor serves all the classes and any penalty
of the features: A and the ridge are diagonalised together. Rows that are decided weigh nothing, as
in the Hessian. It is built in float32 from standardised features, which the gradient, in full
precision, makes good, unless some features are so nearly collinear that float32 does not see how
they differ.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from softjax._sharding import while_loop
from softjax.regression._problem import (
    Problem,
    by_columns,
    centred,
    complements,
    example_weights,
    product,
    ridge,
)
from softjax.regression._sparse import column_of, is_sparse, stored_mass, with_data

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# Beyond, the D^3 of a factor costs more than the steps that it saves.
LARGEST_FACTOR = 1024
# The compiler of a TPU takes 272 s for the eigenvectors of a matrix of 785 rows.
LARGEST_EIGH_OF_TPU = 256
# More than a factor is off by, in roundings; the diagonal is held to a part of its mean.
JITTER, LEAST = 100, 1e-5
# Where more than this part of a curvature is jitter, conjugate gradients do not make it good.
BLURRED = 0.1
ROUNDING = 1e-10
FLOOR = 1e-4
MEDIAN_ROWS = 32
LARGEST_RIDGE = 1e30
# A curvature below this part of the diagonal's is 0 but for rounding, in float64.
LEAST_CURVATURE = JITTER * float(np.finfo(np.float64).eps)
# The least curvature of the features is looked for to a residual of this size, in so many steps;
# the Hessian, whose weights are others in each class, has this part of it.
RESIDUAL, LEAST_STEPS, SHARED = 1e-2, 250, 0.25


class Standardised(NamedTuple):
    """Features of mean 0 and standard deviation 1, and 1 for the bias: for directions alone.

        x_ij = base_j + size_j r_ij = mean_j + scale_j s_ij
        s_ij = (r_ij - offset_j) / unit_j,  s_iD = c

    Without an intercept, c = 0, the means are 0 and the scales are root mean squares: a mean taken
    from a feature would have to go to a bias.

    Float32 features are r as they are, since s would be a copy of them: what it takes to make s
    of them is done to parameters and gradients. Of others r is made, in float32; of sparse ones in
    the same places, so that what is 0 stays 0.

    Attributes:
        features: r [N, D], float32, dense or BCOO.
        base: [D].
        size: [D].
        offset: [D].
        unit: [D].
        mean: [D].
        scale: [D].
        l2: the penalty, a scalar or [D].
        ridge: [D + 1], the penalty on the scaled parameters; 0 for the bias.
        rounding: [D + 1], that of s as it is made of r, which is as much larger.
        constant: c, 1 or 0.
    """

    features: Any
    base: Array
    size: Array
    offset: Array
    unit: Array
    mean: Array
    scale: Array
    l2: Array
    ridge: Array
    rounding: Array
    constant: Array


class Kronecker(NamedTuple):
    """C (diag(m) kron A + ridge)^-1 C = C (I kron T) diag(inverse) (I kron T)^T C.

    Attributes:
        offset, unit: [D], of the standardised features that it is for.
        features: T [D + 1, D + 1].
        inverse: [K, D + 1].
        blur: [D + 1], how much of A and the ridge is jitter along each column of T.
    """

    offset: Any
    unit: Any
    features: Any
    inverse: Any
    blur: Any


class Diagonal(NamedTuple):
    """The inverse of the diagonal of the Hessian.

    Attributes:
        offset, unit: [D], of the standardised features that it is for.
        inverse: [K, D + 1].
    """

    offset: Any
    unit: Any
    inverse: Any


Metric = Kronecker | Diagonal


def standardise(problem: Problem, bound: Array, dtype: DTypeLike = jnp.float32) -> Standardised:
    """`bound` is that of the gradient: the root mean squares of the features."""
    return scaled(problem, *moments(problem, bound), _middle(problem.features), dtype)


def scaled(
    problem: Problem, mean: Array, scale: Array, base: Array, dtype: DTypeLike = jnp.float32
) -> Standardised:
    """The features less `mean`, over `scale`; around `base` they are rounded to `dtype`."""
    x, size = problem.features, scale
    if x.dtype == dtype:
        r, base, size = x, jnp.zeros_like(mean), jnp.ones_like(scale)
    elif is_sparse(x):
        r, base = with_data(x, (x.data / column_of(x, size)).astype(dtype)), mean * 0
    else:
        r = ((x - base[None]) / size[None]).astype(dtype)
    offset, unit = ((mean - base) / size).astype(r.dtype), (scale / size).astype(r.dtype)
    return _around(r, base, size, offset, unit, ridge(problem), problem.constant)


def within(s: Standardised, metric: Metric) -> Standardised:
    """`s` with the means and scales of a metric."""
    return _around(s.features, s.base, s.size, metric.offset, metric.unit, s.l2, s.constant)


def reweighted(s: Standardised, weights: Array) -> Standardised:
    """`s` with the means and scales that its examples have with `weights`, [N].

    With those of the Hessian, u: an example that is decided, as one with an enormous entry soon is,
    counts no more, and what the others differ in is of order 1 and not lost in rounding.
    """
    total = jnp.sum(weights)
    shares = weights / jnp.where(total > 0, total, 1)
    mean, variance = _moments(s.features, shares, s.constant, s.offset)
    # What does not vary among these examples, but for rounding, keeps its scale.
    least = 64 * jnp.finfo(variance.dtype).eps
    varies = variance > least * least * (variance + mean * mean)
    # One example alone, as where all are decided and this one the least, says nothing.
    known = varies & (total > 0) & (jnp.max(weights) <= 0.6 * total)
    offset = jnp.where(known, mean, s.offset)
    unit = jnp.where(known, jnp.sqrt(jnp.where(known, variance, 1)), s.unit)
    return _around(s.features, s.base, s.size, offset, unit, s.l2, s.constant)


def _around(
    r: Any, base: Array, size: Array, offset: Array, unit: Array, l2: Array, constant: Array
) -> Standardised:
    dtype = size.dtype
    # Without an intercept the mean is 0 exactly, and not what rounding leaves of the offset.
    mean, scale = constant * (base + size * offset.astype(dtype)), size * unit.astype(dtype)
    rounding = jnp.finfo(r.dtype).eps * jnp.append(jnp.maximum(jnp.abs(offset) / unit, 1), 1)
    ridge = scaled_ridge(l2, scale, r.dtype)
    return Standardised(r, base, size, offset, unit, mean, scale, l2, ridge, rounding, constant)


def scores(s: Standardised, v: Array) -> Array:
    """The logits [K, N] of the parameters v [K, D + 1] of s: one product with the features."""
    kernel = v[:, :-1] / s.unit[None]
    bias = s.constant.astype(v.dtype) * v[:, -1:] - product(kernel, s.offset[:, None])
    return product(s.features, kernel.T).T + bias


def pulled(s: Standardised, residual: Array) -> Array:
    """The transpose of `scores`: [K, N] to [K, D + 1], one product with the features."""
    total = jnp.sum(residual, 1, keepdims=True)
    kernel = (product(residual, s.features) - total * s.offset[None]) / s.unit[None]
    return jnp.concatenate([kernel, s.constant.astype(total.dtype) * total], 1)


def squared(s: Standardised, weights: Array) -> Array:
    """sum_j w_j s_ij^2, [N]."""
    if is_sparse(s.features):
        own = weights[:-1] / s.unit / s.unit
        squares = product(_beyond_zero(s), own) + jnp.vdot(own, s.offset * s.offset)
        squares = jnp.maximum(squares, 0)
    else:
        standard = (s.features - s.offset[None]) / s.unit[None]
        squares = jnp.sum(weights[None, :-1] * jnp.square(standard), 1)
    return squares + s.constant.astype(weights.dtype) * weights[-1]


def gram(s: Standardised, weights: Array) -> Array:
    """sum_i w_i s_i s_i^T, [D + 1, D + 1], of dense features."""

    def rows(columns, offset, unit):
        own = weights[:, None] * ((columns - offset[None]) / unit[None])
        total = jnp.sum(own, 0)[:, None]
        others = (product(own.T, s.features) - total * s.offset[None]) / s.unit[None]
        return jnp.concatenate([others, constant * total], 1)

    constant = s.constant.astype(weights.dtype)
    above = by_columns(rows, s.features, s.offset, s.unit)
    # Row j is made of the s of feature j and the r of the others: of two features, the s of the one
    # whose rounding is larger, so that that of the other is all that their product has.
    inner, rounding = above[:, :-1], s.rounding[:-1]
    inner = jnp.where(rounding[:, None] >= rounding[None], inner, inner.T)
    above = jnp.concatenate([inner, above[:, -1:]], 1)
    return jnp.concatenate([above, jnp.append(above[:, -1], constant * jnp.sum(weights))[None]])


def scaled_ridge(l2: Array, scale: Array, dtype: DTypeLike) -> Array:
    """The penalty on the scaled parameters, [D + 1]."""
    return jnp.append(jnp.minimum(l2 / scale / scale, LARGEST_RIDGE), 0).astype(dtype)


def moments(problem: Problem, bound: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each feature; its root mean square where it is constant.

    Without an intercept 0 and the root mean square.
    """
    x, root_mean_square = problem.features, bound[:-1]
    weights = example_weights(problem.targets)
    total = jnp.sum(weights)
    mean, variance = _moments(x, weights / total, problem.constant, jnp.zeros_like(bound[:-1]))
    variance *= total
    # The mean of a constant feature is off by some roundings, which leave no variance.
    least = 64 * jnp.finfo(x.dtype).eps * root_mean_square
    return mean, jnp.where(variance > least * least, jnp.sqrt(variance), root_mean_square)


def _moments(x: Any, shares: Array, constant: Array, origin: Array) -> tuple[Array, Array]:
    """Mean and variance of each feature, [D], for shares [N] of the examples that sum to 1.

    Without an intercept (`constant` is 0) `origin` [D] and the mean square of the distances to it.
    The variance is not a difference, which cancels: it takes one more pass over the features.
    """
    if is_sparse(x):
        mean = jnp.where(constant > 0, product(shares, x), origin)
        stored = product(shares, with_data(x, jnp.square(x.data - column_of(x, mean))))
        absent = jnp.maximum(1 - stored_mass(x, shares), 0)
        return mean, stored + absent * mean * mean

    def mean_and_variance(columns, origin):
        # A sum, for XLA:CPU adds one example after the other in a product with a vector.
        mean = jnp.where(constant > 0, jnp.sum(shares[:, None] * columns, 0), origin)
        return jnp.stack([mean, jnp.sum(shares[:, None] * jnp.square(columns - mean[None]), 0)], 1)

    mean, variance = by_columns(mean_and_variance, x, origin).T
    return mean, variance


def _middle(x: Any) -> Array:
    """[D]: numbers in the midst of each feature, however far off a few examples are; 0 if sparse.

    The medians of some examples: in float32 only what is near to them keeps its differences.
    """
    if is_sparse(x) or x.dtype == jnp.float32:
        return jnp.zeros(x.shape[1], x.dtype)
    rows = x[:: max(len(x) // MEDIAN_ROWS, 1)]
    return jnp.sort(rows, 0)[len(rows) // 2]


def _beyond_zero(s: Standardised) -> Any:
    """(r - offset)^2 - offset^2 of sparse features, which is 0 where they are."""
    r = s.features
    return with_data(r, r.data * (r.data - 2 * column_of(r, s.offset)))


def to_standard(mean: Array, scale: Array, gradient: Array) -> Array:
    """The gradient with respect to the parameters of the standardised features."""
    bias = gradient[:, -1:]
    return jnp.concatenate([(gradient[:, :-1] - bias * mean[None]) / scale[None], bias], 1)


def of_standard(mean: Array, scale: Array, theta: Array) -> Array:
    """The parameters of the standardised features: the inverse of `from_standard`."""
    bias = theta[:, -1:] + theta[:, :-1] @ mean[:, None]
    return jnp.concatenate([theta[:, :-1] * scale[None], bias], 1)


def from_standard(mean: Array, scale: Array, direction: Array) -> Array:
    """The parameters of the features as they are: the transpose of `to_standard`."""
    kernel = direction[:, :-1] / scale[None]
    return jnp.concatenate([kernel, direction[:, -1:] - kernel @ mean[:, None]], 1)


def empty(features: "Array | BCOO", num_classes: int, dtype: DTypeLike = np.float32) -> Metric:
    """A metric of the shapes that `build` gives."""
    width = features.shape[1] + 1
    inverse = np.ones((num_classes, width), dtype)
    offset, unit = np.zeros(width - 1, dtype), np.ones(width - 1, dtype)
    if is_diagonal(features):
        return Diagonal(offset, unit, inverse)
    columns, blur = np.zeros((width, width), dtype), np.zeros(width, dtype)
    return Kronecker(offset, unit, columns, inverse, blur)


def is_diagonal(features: "Array | BCOO") -> bool:
    """Whether the metric is diagonal: where features are sparse or many."""
    return is_sparse(features) or features.shape[1] + 1 > LARGEST_FACTOR


def build(metric: Metric, s: Standardised, weights: Array, p: Array) -> Metric:
    """The metric at probabilities p [K, N], of the kind of `metric`."""
    weights, p = weights.astype(s.ridge.dtype), p.astype(s.ridge.dtype)
    spread = weights[None] * p * complements(p)
    s = reweighted(s, jnp.sum(spread, 0))
    if isinstance(metric, Kronecker):
        return _kronecker(s, spread)
    diagonal = _squares(s, spread) + s.ridge[None]
    inverse = 1 / jnp.maximum(diagonal, LEAST * jnp.mean(diagonal))
    inverse = inverse.at[:, -1].multiply(s.constant.astype(inverse.dtype))
    return Diagonal(s.offset, s.unit, inverse)


def _squares(s: Standardised, spread: Array) -> Array:
    """sum_i spread_ki s_ij^2, [K, D + 1]."""
    if is_sparse(s.features):
        squares = product(spread, _beyond_zero(s))
        squares += jnp.sum(spread, 1, keepdims=True) * jnp.square(s.offset)[None]
        squares = jnp.maximum(squares, 0) / jnp.square(s.unit)[None]
    else:

        def rows(columns, offset, unit):
            return product(spread, jnp.square((columns - offset[None]) / unit[None])).T

        squares = by_columns(rows, s.features, s.offset, s.unit).T
    return jnp.concatenate([squares, jnp.sum(spread, 1, keepdims=True)], 1)


def least_curvature(s: Standardised, weights: Array) -> Array:
    """About the least eigenvalue of sum_i w_i s_i s_i^T, relative to its diagonal.

    Rayleigh's quotient of one step of inverse iteration, by conjugate gradients from random
    numbers: a direction in which features hardly differ is the most of what they come to.
    """
    s = reweighted(s, weights)
    diagonal = _squares(s, weights[None]).at[:, -1].multiply(s.constant.astype(weights.dtype))
    unit = jnp.where(diagonal > 0, lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)

    def image(v):
        return unit * pulled(s, weights[None] * scores(s, unit * v))

    def unsolved(carry):
        _, r, _, step = carry
        return (jnp.vdot(r, r) > bound) & (step < LEAST_STEPS)

    def body(carry):
        y, r, direction, step = carry
        moved, before = image(direction), jnp.vdot(r, r)
        length = before / jnp.vdot(direction, moved)
        y, r = y + length * direction, r - length * moved
        return y, r, r + jnp.vdot(r, r) / before * direction, step + 1

    b = jnp.asarray(np.random.default_rng(0).normal(size=diagonal.shape), diagonal.dtype)
    b = jnp.where(unit > 0, b, 0)
    bound = RESIDUAL**2 * jnp.vdot(b, b)
    y, *_ = while_loop(unsolved, body, (jnp.zeros_like(b), b, b, jnp.zeros((), jnp.int32)))
    y = y / jnp.max(jnp.abs(y))
    quotient = jnp.vdot(y, image(y)) / jnp.vdot(y, y)
    return jnp.where(quotient > 0, quotient, 0)  # NaN where there was nothing to divide by


def known_curvature(least: Array) -> Array:
    """What Hessians have along all features of this `least_curvature`; 0 where it is rounding."""
    told = least > JITTER * jnp.finfo(least.dtype).eps / BLURRED
    return jnp.where(told, SHARED * least, 0)


def _kronecker(s: Standardised, spread: Array) -> Kronecker:
    """Diagonalises A and the ridge together, for spread_ki = w_i p_ik (1 - p_ik).

    With the mean eigenvalue g of G, A g + ridge = L L^T and L^-1 A g L^-T = Q E Q^T,

        A m + ridge = L Q (1 + (m / g - 1) E) Q^T L^T    for every m.
    """
    u, of_class = jnp.sum(spread, 0), jnp.sum(spread, 1)
    share = of_class / jnp.maximum(jnp.sum(u), jnp.finfo(u.dtype).tiny)
    # The diagonal of G is m (1 - m / sum(m)), and no class has more than half of it.
    m = share / (1 - jnp.minimum(share, 0.5))
    mean_eigenvalue = 1 / max(len(spread) - 1, 1)
    a = mean_eigenvalue * gram(s, u)

    spreads = jnp.diag(a)
    size = spreads + s.ridge
    # What varies no more than by rounding is no direction, whatever the ridge of others.
    unit = jnp.where(size > ROUNDING * jnp.mean(spreads), lax.rsqrt(size), 0)
    a = unit[:, None] * a * unit[None]
    jitter = JITTER * s.rounding
    ridge = s.ridge * unit * unit + jitter
    lower = lax.linalg.cholesky(a + jnp.diag(ridge), symmetrize_input=False)

    columns, eigenvalues = _diagonalised(lower, a)
    blur = jitter @ jnp.square(columns)
    columns = unit[:, None] * columns
    relative = m / mean_eigenvalue - 1
    scale = 1 + relative[:, None] * eigenvalues[None]
    return Kronecker(s.offset, s.unit, columns, 1 / jnp.maximum(scale, FLOOR), blur)


def _diagonalised(lower: Array, a: Array) -> tuple[Array, Array]:
    """L^-T Q and E of L^-1 a L^-T = Q E Q^T.

    The compiler of a TPU takes minutes for the eigenvectors of a large matrix. Its diagonal does
    there for E, and the identity for Q: they are exact where there is no ridge, since the matrix is
    the identity then, and where the ridge is all, since it is 0.
    """

    def solved(b: Array, **where: bool) -> Array:
        return lax.linalg.triangular_solve(lower, b, lower=True, **where)

    def by_eigenvectors() -> tuple[Array, Array]:
        whitened = solved(solved(a, left_side=True), left_side=False, transpose_a=True)
        q, eigenvalues = lax.linalg.eigh(whitened, symmetrize_input=False, sort_eigenvalues=False)
        return solved(q, left_side=True, transpose_a=True), eigenvalues

    def by_diagonal() -> tuple[Array, Array]:
        inverse = solved(jnp.eye(len(a), dtype=a.dtype), left_side=True)
        return inverse.T, jnp.sum(product(inverse, a) * inverse, 1)

    on_tpu = by_diagonal if len(a) > LARGEST_EIGH_OF_TPU else by_eigenvectors
    exact = by_eigenvectors
    return lax.platform_dependent(cpu=exact, cuda=exact, rocm=exact, default=on_tpu)


def steepest(s: Standardised, metric: Metric, gradient: Array, size: Array) -> Array:
    """metric^-1 gradient, of features as they are; `size` scales to what float32 can hold."""
    s = within(s, metric)
    g = (to_standard(s.mean, s.scale, gradient) / size).astype(s.ridge.dtype)
    return from_standard(s.mean, s.scale, apply(metric, g).astype(gradient.dtype) * size)


def unseen(
    s: Standardised, metric: Metric | None, gradient: Array, least: Array | float = 0.0
) -> Array:
    """What Newton's model may promise, at most, where features are nearly collinear.

    Along a direction whose curvature is lost in the jitter, g^2 / 2 over the least curvature that
    float64 can tell from 0. A gradient that vanishes there, as it does where features are collinear
    altogether, leaves nothing. A diagonal metric knows no such direction: any may be one, unless
    the penalty, or what is known of the features, `least`, is a curvature of all.
    """
    if metric is None:
        return jnp.zeros((), gradient.dtype)
    s = within(s, metric)
    g = centred(to_standard(s.mean, s.scale, gradient).astype(metric.inverse.dtype))
    if isinstance(metric, Diagonal):
        held = jnp.min(s.ridge[None, :-1] * metric.inverse[:, :-1], initial=1) / 2
        curvature = jnp.maximum(jnp.maximum(held, least), LEAST_CURVATURE)
        return (jnp.vdot(g, metric.inverse * g) / 2 / curvature).astype(gradient.dtype)
    squares = jnp.square(g @ metric.features) * metric.inverse
    blurred = jnp.sum(jnp.where(metric.blur[None] > BLURRED, squares, 0)).astype(gradient.dtype)
    ratio = float(jnp.finfo(metric.inverse.dtype).eps / jnp.finfo(np.float64).eps)
    return JITTER * ratio / 2 * blurred


def descent(s: Standardised, gradient: Array) -> Array:
    """A direction down where no curvature is known: the gradient of standardised features."""
    g = to_standard(s.mean, s.scale, gradient) / (1 + s.ridge.astype(gradient.dtype))[None]
    return -centred(from_standard(s.mean, s.scale, g))


def apply(metric: Metric, gradient: Array) -> Array:
    """The steepest direction, up: metric^-1 gradient, of the features `within` the metric."""
    if isinstance(metric, Diagonal):
        return centred(metric.inverse * gradient)
    t, inverse = metric.features, metric.inverse
    return centred(((centred(gradient) @ t) * inverse) @ t.T)

"""The preconditioner: an inverse of the Hessian as a product of classes and features.

    H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T  ~  G kron A + ridge
    u_i = w_i sum_k p_ik (1 - p_ik),  A = sum_i u_i x_i x_i^T

where G, of trace 1, has the diagonal of sum_i w_i (diag p_i - p_i p_i^T) / sum_i u_i and the form
of one example's,

    G = diag(m) - m m^T / sum(m),  G^+ = C diag(1 / m) C,  C = I - 11^T/K,

so that no K x K matrix is needed. One D x D factor serves all the classes and any penalty of the
features: A and the ridge are diagonalised together. As in the Hessian, examples whose class is
certain weigh nothing. The preconditioner is built in float32 from standardised features. The
gradient, in full precision, corrects what float32 misses, unless some features are so nearly
collinear that float32 does not see how they differ.

The examples that weigh in the block of a class lie around a mean of their own,

    mu_k = sum_i u_ik x_i / sum_i u_ik,  u_ik = w_i p_ik (1 - p_ik),

which the bias of the class can take: theta_k x = kernel_k (x - mu_k) + (bias_k + kernel_k mu_k). In
these parameters a kernel does not feel its bias, and A is the scatter around the means of the
classes. One mean for all classes would leave an eigenvalue beyond all others to each class.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from softjax._platforms import platform_dependent
from softjax.regression._features import by_columns, is_sparse, product
from softjax.regression._linear_solves import JITTER, conjugate_gradients
from softjax.regression._objective import centred, complements
from softjax.regression._standardised import (
    Standardised,
    from_standard,
    gram,
    pull_back,
    rescaled,
    reweighted,
    scores,
    squares_of_classes,
    to_standard,
)

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# For more features, the D^3 operations of a factor cost more than the steps that it saves.
LARGEST_FACTOR = 1024
# The compiler of a TPU takes 272 s for the eigenvectors of a matrix of 785 rows.
LARGEST_EIGH_OF_TPU = 256
# The diagonal is held above this part of its mean.
LEAST = 1e-5
# Conjugate gradients do not correct a curvature of which more than this part is jitter.
BLURRED = 0.1
# A feature whose curvature is below this part of the mean is constant.
ROUNDING = 1e-10
# The relative curvatures of the preconditioner are held above this.
FLOOR = 1e-4
# What is left in A of the scatter of the means of the classes: so it is never much smaller than the
# scatter around one mean, of which rounding is a part.
BETWEEN = 1 / 64
# A mean below this part of the root mean square is 0 but for rounding.
CENTRED = 1e-2
# An example with more than this part of the squares of a feature hides what the others differ in.
DOMINANT = 0.25
# A curvature below this part of the diagonal's is 0 but for rounding, in float64.
LEAST_CURVATURE = JITTER * float(np.finfo(np.float64).eps)
# The search for the least curvature of the features ends at a residual of this size or after so
# many steps. The Hessian, whose weights differ between the classes, has at least this part of it.
RESIDUAL, LEAST_STEPS, SHARED = 1e-2, 250, 0.25


class Kronecker(NamedTuple):
    """C S (diag(m) kron A + ridge)^-1 S^T C = C S (I kron T) diag(inverse) (I kron T)^T S^T C.

    S takes kernel mu from the bias of each class.

    Attributes:
        offset, unit: [D], of the standardised features that it is for.
        means: mu_k [K, D + 1], of these features; 0 for the bias, and without an intercept.
        features: T [D + 1, D + 1].
        inverse: [K, D + 1].
        blur: [D + 1], how much of A and the ridge is jitter along each column of T.
    """

    offset: Any
    unit: Any
    means: Any
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


Preconditioner = Kronecker | Diagonal


def within(s: Standardised, preconditioner: Preconditioner) -> Standardised:
    """`s` with the means and scales that the preconditioner was built with."""
    return rescaled(s, preconditioner.offset, preconditioner.unit)


def empty(
    features: "Array | BCOO", num_classes: int, dtype: DTypeLike = np.float32
) -> Preconditioner:
    """A preconditioner with the shapes that `build` gives, before the first step."""
    width = features.shape[1] + 1
    inverse = np.ones((num_classes, width), dtype)
    offset, unit = np.zeros(width - 1, dtype), np.ones(width - 1, dtype)
    if is_diagonal(features):
        return Diagonal(offset, unit, inverse)
    columns, blur = np.zeros((width, width), dtype), np.zeros(width, dtype)
    return Kronecker(offset, unit, np.zeros_like(inverse), columns, inverse, blur)


def is_diagonal(features: "Array | BCOO") -> bool:
    """Whether the preconditioner is diagonal: where features are sparse or many."""
    return is_sparse(features) or features.shape[1] + 1 > LARGEST_FACTOR


def build(kind: Preconditioner, s: Standardised, weights: Array, p: Array) -> Preconditioner:
    """The preconditioner at probabilities p [K, N], of the same kind as `kind`."""
    weights, p = weights.astype(s.ridge.dtype), p.astype(s.ridge.dtype)
    uncertainty = weights[None] * p * complements(p)
    s = reweighted(s, jnp.sum(uncertainty, 0))
    if isinstance(kind, Kronecker):
        return _kronecker(s, uncertainty)
    diagonal = squares_of_classes(s, uncertainty) + s.ridge[None]
    inverse = 1 / jnp.maximum(diagonal, LEAST * jnp.mean(diagonal))
    inverse = inverse.at[:, -1].multiply(s.constant.astype(inverse.dtype))
    return Diagonal(s.offset, s.unit, inverse)


def least_curvature(s: Standardised, weights: Array) -> Array:
    """About the least eigenvalue of sum_i w_i s_i s_i^T, relative to its diagonal.

    Rayleigh's quotient of one step of inverse iteration, by conjugate gradients from random
    numbers: a direction in which features hardly differ is the most of what they come to.
    """
    s = reweighted(s, weights)
    diagonal = (
        squares_of_classes(s, weights[None]).at[:, -1].multiply(s.constant.astype(weights.dtype))
    )
    unit = jnp.where(diagonal > 0, lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)

    def image(v):
        return unit * pull_back(s, weights[None] * scores(s, unit * v))

    b = jnp.asarray(np.random.default_rng(0).normal(size=diagonal.shape), diagonal.dtype)
    b = jnp.where(unit > 0, b, 0)
    y, _ = conjugate_gradients(image, lambda r: r, b, RESIDUAL, LEAST_STEPS)
    y = y / jnp.max(jnp.abs(y))
    quotient = jnp.vdot(y, image(y)) / jnp.vdot(y, y)
    return jnp.where(quotient > 0, quotient, 0)  # NaN where there was nothing to divide by


def known_curvature(least: Array) -> Array:
    """A curvature that every Hessian has along all features; 0 where `least` is only rounding.

    `least` is the `least_curvature` of the features.
    """
    told = least > JITTER * jnp.finfo(least.dtype).eps / BLURRED
    return jnp.where(told, SHARED * least, 0)


def _kronecker(s: Standardised, uncertainty: Array) -> Kronecker:
    """Diagonalises A and the ridge together, for u_ki = w_i p_ik (1 - p_ik).

    With the mean eigenvalue g of G, A g + ridge = L L^T and L^-1 A g L^-T = Q E Q^T,

        A m + ridge = L Q (1 + (m / g - 1) E) Q^T L^T    for every m.
    """
    u, of_class = jnp.sum(uncertainty, 0), jnp.sum(uncertainty, 1)
    share = of_class / jnp.maximum(jnp.sum(u), jnp.finfo(u.dtype).tiny)
    # The diagonal of G is m (1 - m / sum(m)), and no class has more than half of it.
    m = share / (1 - jnp.minimum(share, 0.5))
    mean_eigenvalue = 1 / max(len(uncertainty) - 1, 1)
    scatter = gram(s, u)
    means, between = _means_of_classes(s, uncertainty, scatter)
    a = mean_eigenvalue * (scatter - between)

    diagonal_of_a = jnp.diag(a)
    size = diagonal_of_a + s.ridge
    # A feature that varies no more than by rounding is no direction, however large the ridge is.
    unit = jnp.where(size > ROUNDING * jnp.mean(diagonal_of_a), lax.rsqrt(size), 0)
    a = unit[:, None] * a * unit[None]
    jitter = JITTER * s.rounding
    ridge = s.ridge * unit * unit + jitter
    lower = lax.linalg.cholesky(a + jnp.diag(ridge), symmetrize_input=False)

    columns, eigenvalues = _diagonalised(lower, a)
    blur = jitter @ jnp.square(columns)
    columns = unit[:, None] * columns
    relative = m / mean_eigenvalue - 1
    scale = 1 + relative[:, None] * eigenvalues[None]
    return Kronecker(s.offset, s.unit, means, columns, 1 / jnp.maximum(scale, FLOOR), blur)


def _means_of_classes(s: Standardised, uncertainty: Array, scatter: Array) -> tuple[Array, Array]:
    """mu_k [K, D + 1], and most of the scatter of these means, [D + 1, D + 1].

    They are 0 unless all features have the mean 0 among the examples that weigh, which one that is
    constant there has not: its products with the bias stay in A, and so its squares have to. Nor
    are they used where one example has most of the squares of a feature.
    """
    of_class = jnp.sum(uncertainty, 1, keepdims=True)
    sums = pull_back(s, uncertainty).at[:, -1].set(0)
    means = sums / jnp.where(of_class > 0, of_class, 1)
    squares = jnp.diag(scatter)
    size = jnp.sqrt(squares * jnp.sum(of_class))  # no sum over the examples is larger
    are_centred = jnp.all(jnp.abs(jnp.sum(sums, 0)) <= CENTRED * size)
    are_centred &= jnp.all(_largest_squares(s, jnp.sum(uncertainty, 0)) <= DOMINANT * squares)
    means = jnp.where(are_centred, s.constant.astype(sums.dtype) * means, 0)
    return means, (1 - BETWEEN) * product(means.T, of_class * means)


def _largest_squares(s: Standardised, weights: Array) -> Array:
    """max_i w_i s_ij^2, [D + 1], of dense features; 0 for the bias."""

    def largest(columns: Array, offset: Array, unit: Array) -> Array:
        squares = jnp.square((columns - offset[None]) / unit[None])
        return jnp.max(weights[:, None] * squares, 0, initial=0)

    return jnp.append(by_columns(largest, s.features, s.offset, s.unit), 0)


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
    return platform_dependent(cpu=exact, cuda=exact, rocm=exact, default=on_tpu)


def precondition(
    s: Standardised, preconditioner: Preconditioner, gradient: Array, size: Array
) -> Array:
    """M^-1 gradient in the coordinates of the features; `size` scales it to what float32 holds."""
    s = within(s, preconditioner)
    g = (to_standard(s.mean, s.scale, gradient) / size).astype(s.ridge.dtype)
    return from_standard(s.mean, s.scale, apply(preconditioner, g).astype(gradient.dtype) * size)


def unseen(
    s: Standardised,
    preconditioner: Preconditioner | None,
    gradient: Array,
    least: Array | float = 0.0,
) -> Array:
    """The most that Newton's model may promise where features are nearly collinear.

    Along a direction whose curvature is lost in the jitter, g^2 / 2 over the least curvature that
    float64 can tell from 0. A gradient that vanishes there, as it does where features are collinear
    altogether, leaves nothing. A diagonal preconditioner knows no such direction: any direction may
    be one, unless the penalty, or the known curvature `least`, gives every direction a curvature.
    """
    if preconditioner is None:
        return jnp.zeros((), gradient.dtype)
    s = within(s, preconditioner)
    g = centred(to_standard(s.mean, s.scale, gradient).astype(preconditioner.inverse.dtype))
    if isinstance(preconditioner, Diagonal):
        held = jnp.min(s.ridge[None, :-1] * preconditioner.inverse[:, :-1], initial=1) / 2
        curvature = jnp.maximum(jnp.maximum(held, least), LEAST_CURVATURE)
        return (jnp.vdot(g, preconditioner.inverse * g) / 2 / curvature).astype(gradient.dtype)
    squares = jnp.square(_around_means(preconditioner, g) @ preconditioner.features)
    squares *= preconditioner.inverse
    blurred = jnp.sum(jnp.where(preconditioner.blur[None] > BLURRED, squares, 0)).astype(
        gradient.dtype
    )
    ratio = float(jnp.finfo(preconditioner.inverse.dtype).eps / jnp.finfo(np.float64).eps)
    return JITTER * ratio / 2 * blurred


def apply(preconditioner: Preconditioner, gradient: Array) -> Array:
    """M^-1 gradient in the coordinates of `within(s, preconditioner)`."""
    if isinstance(preconditioner, Diagonal):
        return centred(preconditioner.inverse * gradient)
    t, inverse, means = preconditioner.features, preconditioner.inverse, preconditioner.means
    v = ((_around_means(preconditioner, centred(gradient)) @ t) * inverse) @ t.T
    return centred(v.at[:, -1].add(-jnp.sum(means * v, 1)))


def _around_means(preconditioner: Kronecker, gradient: Array) -> Array:
    """S^T gradient: with respect to the parameters of the features around their means."""
    return gradient - preconditioner.means * gradient[:, -1:]

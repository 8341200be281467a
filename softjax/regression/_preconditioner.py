"""The preconditioner: an approximate inverse Hessian, as a Kronecker product.

    H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T  ~  G kron A + ridge
    u_i = w_i sum_k p_ik (1 - p_ik),  A = sum_i u_i x_i x_i^T

where G, of trace 1, has the diagonal of sum_i w_i (diag p_i - p_i p_i^T) / sum_i u_i and the form
of the matrix of one example,

    G = diag(m) - m m^T / sum(m),  G^+ = C diag(1 / m) C,  C = I - 11^T/K,

so that no K x K matrix is needed. One D x D factor serves all classes and any penalty of the
features: A and the ridge are diagonalised together. As in the Hessian, examples whose class is
certain have no weight. The preconditioner is built in float32 from standardised features. The
gradient, in full precision, corrects the rounding error of float32, unless some features are so
nearly collinear that float32 cannot resolve their difference.

The examples with weight in the block of a class have their own mean,

    mu_k = sum_i u_ik x_i / sum_i u_ik,  u_ik = w_i p_ik (1 - p_ik),

which the bias of the class can absorb: theta_k x = kernel_k (x - mu_k) + (bias_k + kernel_k mu_k).
In these parameters the Hessian does not couple a kernel and its bias, and A is the scatter around
the means of the classes. With one mean for all classes, each class would have one eigenvalue far
above all others.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from softjax._platforms import platform_dependent
from softjax.regression._features import Matrix, by_columns, is_sparse, product
from softjax.regression._linear_solves import JITTER, conjugate_gradients
from softjax.regression._objective import centred, complements
from softjax.regression._standardised import Scales, Standardised, from_standard, to_standard

# With more features, the D^3 operations of a factor cost more than the steps that it saves.
LARGEST_FACTOR = 1024
# The compiler of a TPU takes 272 s for the eigenvectors of a matrix of 785 rows.
LARGEST_EIGH_OF_TPU = 256
# Entries of the diagonal below this part of its mean are raised to it.
LEAST = 1e-5
# Conjugate gradients cannot correct a curvature if more than this part of it is jitter.
BLURRED = 0.1
# A feature whose curvature is below this part of the mean counts as constant.
ROUNDING = 1e-10
# Relative curvatures of the preconditioner below this are raised to it.
FLOOR = 1e-4
# A keeps this part of the scatter of the means of the classes: so it is never much smaller than the
# scatter around one mean, whose rounding error it has.
BETWEEN = 1 / 64
# A mean below this part of the root mean square counts as 0.
CENTRED = 1e-2
# The means of the classes are not used if one example has more than this part of the sum of squares
# of a feature: it hides the differences of the others.
DOMINANT = 0.25
# In float64, a curvature below this part of the diagonal's is only rounding.
LEAST_CURVATURE = JITTER * float(np.finfo(np.float64).eps)
# The search for the least curvature of the features ends at the relative residual RESIDUAL or after
# LEAST_STEPS steps. The weights of the Hessian differ between the classes; it has at least the part
# SHARED of this curvature.
RESIDUAL, LEAST_STEPS, SHARED = 1e-2, 250, 0.25


class Kronecker(NamedTuple):
    """C S (diag(m) kron A + ridge)^-1 S^T C = C S (I kron T) diag(inverse) (I kron T)^T S^T C.

    S subtracts kernel mu from the bias of each class.
    """

    scales: Any  # of the standardised features for which it was built
    means: Any  # mu_k [K, D + 1], of these features; 0 for the bias, and without an intercept
    features: Any  # T [D + 1, D + 1]
    inverse: Any  # [K, D + 1]
    blur: Any  # [D + 1], the part of A and the ridge that is jitter, along each column of T

    def apply(self, gradient: Array) -> Array:
        """M^-1 gradient in the coordinates for which it was built."""
        v = (self._around_means(centred(gradient)) @ self.features) * self.inverse
        v = v @ self.features.T
        return centred(v.at[:, -1].add(-jnp.sum(self.means * v, 1)))

    def beyond_sight(self, g: Array, least: Any, dtype: Any) -> Array:
        """`unseen` for a centred gradient in the coordinates for which it was built."""
        squares = jnp.square(self._around_means(g) @ self.features) * self.inverse
        blurred = jnp.sum(jnp.where(self.blur[None] > BLURRED, squares, 0)).astype(dtype)
        ratio = float(jnp.finfo(self.inverse.dtype).eps / jnp.finfo(np.float64).eps)
        return JITTER * ratio / 2 * blurred

    def _around_means(self, gradient: Array) -> Array:
        """S^T gradient: with respect to the parameters of the features minus the class means."""
        return gradient - self.means * gradient[:, -1:]


class Diagonal(NamedTuple):
    """The inverse of the diagonal of the Hessian."""

    scales: Any  # of the standardised features for which it was built
    inverse: Any  # [K, D + 1]

    def apply(self, gradient: Array) -> Array:
        """M^-1 gradient in the coordinates for which it was built."""
        return centred(self.inverse * gradient)

    def beyond_sight(self, g: Array, least: Any, dtype: Any) -> Array:
        """`unseen` for a centred gradient in the coordinates for which it was built."""
        held = jnp.min(self.scales.ridge[None, :-1] * self.inverse[:, :-1], initial=1) / 2
        curvature = jnp.maximum(jnp.maximum(held, least), LEAST_CURVATURE)
        return (jnp.vdot(g, self.inverse * g) / 2 / curvature).astype(dtype)


Preconditioner = Kronecker | Diagonal


def precondition(preconditioner: Preconditioner, gradient: Array, size: Array) -> Array:
    """M^-1 gradient in the coordinates of the features; divided by `size`, float32 can hold it."""
    s = preconditioner.scales
    g = (to_standard(s.mean, s.scale, gradient) / size).astype(s.ridge.dtype)
    return from_standard(s.mean, s.scale, preconditioner.apply(g).astype(gradient.dtype) * size)


def unseen(preconditioner: Preconditioner, gradient: Array, least: Any = 0.0) -> Array:
    """The largest decrease that Newton's model may predict if features are nearly collinear.

    Along a direction whose curvature is lost in the jitter it is g^2 / 2 divided by the least
    curvature that float64 can distinguish from 0. It is 0 if the gradient vanishes there, as it
    does if features are exactly collinear. A diagonal preconditioner does not show these
    directions: any direction may be one, unless the penalty or the known curvature `least` bounds
    the curvature from below.
    """
    s = preconditioner.scales
    g = centred(to_standard(s.mean, s.scale, gradient).astype(preconditioner.inverse.dtype))
    return preconditioner.beyond_sight(g, least, gradient.dtype)


def empty(features: Matrix, num_classes: int, dtype: DTypeLike = np.float32) -> Preconditioner:
    """A placeholder for the first step, with the shapes of a preconditioner of `build`."""
    width = features.shape[1] + 1
    inverse, zeros = np.ones((num_classes, width), dtype), np.zeros(width, dtype)
    mean, unit = np.zeros(width - 1, features.dtype), np.ones(width - 1, dtype)
    scales = Scales(zeros[1:], unit, mean, np.ones_like(mean), zeros, zeros)
    if is_diagonal(features):
        return Diagonal(scales, inverse)
    return Kronecker(
        scales, np.zeros_like(inverse), np.zeros((width, width), dtype), inverse, zeros
    )


def is_diagonal(features: Matrix) -> bool:
    """Whether the preconditioner is diagonal: if the features are sparse or many."""
    return is_sparse(features) or features.shape[1] + 1 > LARGEST_FACTOR


def build(s: Standardised, weights: Array, p: Array) -> Preconditioner:
    """The preconditioner at probabilities p [K, N]."""
    weights, p = weights.astype(s.ridge.dtype), p.astype(s.ridge.dtype)
    uncertainty = weights[None] * p * complements(p)
    s = s.reweighted(jnp.sum(uncertainty, 0))
    if not is_diagonal(s.features):
        return _kronecker(s, uncertainty)
    diagonal = s.squares_of_classes(uncertainty) + s.ridge[None]
    inverse = 1 / jnp.maximum(diagonal, LEAST * jnp.mean(diagonal))
    inverse = inverse.at[:, -1].multiply(s.constant.astype(inverse.dtype))
    return Diagonal(s.scales, inverse)


def least_curvature(s: Standardised, weights: Array) -> Array:
    """An estimate of the least eigenvalue of sum_i w_i s_i s_i^T, relative to its diagonal.

    It is the Rayleigh quotient after one step of inverse iteration from a random vector, solved by
    conjugate gradients: the solution is mostly a direction of small curvature.
    """
    s = s.reweighted(weights)
    diagonal = (
        s.squares_of_classes(weights[None]).at[:, -1].multiply(s.constant.astype(weights.dtype))
    )
    unit = jnp.where(diagonal > 0, lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)

    def image(v):
        return unit * s.pull_back(weights[None] * s.scores(unit * v))

    b = jnp.asarray(np.random.default_rng(0).normal(size=diagonal.shape), diagonal.dtype)
    b = jnp.where(unit > 0, b, 0)
    y, _ = conjugate_gradients(image, lambda r: r, b, RESIDUAL, LEAST_STEPS)
    y = y / jnp.max(jnp.abs(y))
    quotient = jnp.vdot(y, image(y)) / jnp.vdot(y, y)
    return jnp.where(quotient > 0, quotient, 0)  # also 0 if the quotient is 0 / 0


def known_curvature(least: Array) -> Array:
    """A lower bound of the curvature of every Hessian; 0 if `least` is only rounding.

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
    scatter = s.gram(u)
    means, between = _means_of_classes(s, uncertainty, scatter)
    a = mean_eigenvalue * (scatter - between)

    diagonal_of_a = jnp.diag(a)
    size = diagonal_of_a + s.ridge
    # A feature whose variation is only rounding is left out, however large the ridge is.
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
    return Kronecker(s.scales, means, columns, 1 / jnp.maximum(scale, FLOOR), blur)


def _means_of_classes(s: Standardised, uncertainty: Array, scatter: Array) -> tuple[Array, Array]:
    """mu_k [K, D + 1], and most of the scatter of these means, [D + 1, D + 1].

    The means are 0 unless all features have the mean 0 under the weights of the examples. A feature
    that is constant among these examples has another mean: its products with the bias stay in A,
    and so its squares have to stay too. The means are also 0 if one example has most of the sum of
    squares of a feature.
    """
    of_class = jnp.sum(uncertainty, 1, keepdims=True)
    sums = s.pull_back(uncertainty).at[:, -1].set(0)
    means = sums / jnp.where(of_class > 0, of_class, 1)
    squares = jnp.diag(scatter)
    size = jnp.sqrt(squares * jnp.sum(of_class))  # no sum over the examples is larger
    are_centred = jnp.all(jnp.abs(jnp.sum(sums, 0)) <= CENTRED * size)
    weights = jnp.sum(uncertainty, 0)

    def largest(columns: Array, offset: Array, unit: Array) -> Array:
        standard = (columns - offset[None]) / unit[None]
        return jnp.max(weights[:, None] * jnp.square(standard), 0, initial=0)

    most = by_columns(largest, s.features, s.offset, s.unit)
    are_centred &= jnp.all(most <= DOMINANT * squares[:-1])
    means = jnp.where(are_centred, s.constant.astype(sums.dtype) * means, 0)
    return means, (1 - BETWEEN) * product(means.T, of_class * means)


def _diagonalised(lower: Array, a: Array) -> tuple[Array, Array]:
    """L^-T Q and E of L^-1 a L^-T = Q E Q^T.

    The compiler of a TPU takes minutes for the eigenvectors of a large matrix. There E is only the
    diagonal of the matrix, and Q the identity. This is exact without a ridge, for which the matrix
    is the identity, and in the limit of a large ridge, for which it is 0.
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

"""The derivatives of the objective in closed form: what statistics are made of.

Every Hessian of softmax regression is a sum of Kronecker products,

    I = sum_i a_i (diag(p_i) - p_i p_i^T) kron x~_i x~_i^T,  x~ = (x, 1)

    diag(p) - p p^T = sum_{k < l} p_k p_l (e_k - e_l)(e_k - e_l)^T

so that with B_kl = X~^T diag(a p_k p_l) X~ the block of the classes k and l is -B_kl, and that of
class k is sum_{l != k} B_kl. Nothing is subtracted, 1 - p included: every block is accurate
relative to itself, and I is positive semidefinite.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import ClassIndices, Labels, class_indices, distribution, is_class_indices
from softjax._losses import expected_loss_gradient, index_loss_gradient
from softjax._numerics import compute_dtype
from softjax._sharding import fori_loop
from softjax._softmax import softmax_core, softmax_tangent
from softjax._weights import is_zero, shares
from softjax.regression._model import SoftmaxRegression
from softjax.regression._sparse import is_sparse, is_sparse_matrix, sparse_array, with_data

if TYPE_CHECKING:
    from softjax.regression._sparse import Features

EXACT = lax.Precision.HIGHEST  # accelerators round float32 factors otherwise
# A chunk of rows holds this many numbers, 2 MiB of float64, which stay in the cache; but it has
# rows enough to pay for passing over the blocks once a chunk.
CHUNK_SIZE, CHUNK_ROWS = 2**18, 512


def gradient(
    params: SoftmaxRegression,
    features: "Features",
    labels: Labels,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> SoftmaxRegression:
    """Gradient of the objective.

        kernel: X^T G + l2 kernel;  bias: sum_i G_i
        G_i = w_i / sum(w) (p_i sum_k c_k y_ik - c y_i), at a label minus the sum of the others

    Derivative: `hvp`; both modes.
    Edge cases: a row of weight 0 takes no part, NaN included; all weights 0: that of the penalty;
    a label that is out of range under a trace: NaN.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], a distribution, floating [N, K], or TopKLabels.
        l2: >= 0, the strength of the penalty, a scalar or [D], as of `objective`.
        sample_weights: real [N], >= 0; None for equal weights.
        class_weights: real [K], >= 0; None for equal weights.
        offset: real [N, K], nats; None for zeros.

    Returns:
        Shapes and dtypes of `params`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(1, 2)
        >>> softjax.regression.gradient(params, jnp.ones((4, 1)), jnp.array([0, 0, 0, 1])).bias
        Array([-0.25,  0.25], dtype=float32)

    Source: Zhang et al., "Dive into Deep Learning", eq. (4.1.10).
    """
    function = "regression.gradient"
    rows = checked_rows(
        function,
        params,
        features,
        labels,
        sample_weights,
        class_weights,
        offset=offset,
        takes_sparse=True,
    )
    return _gradient(params, rows, l2)


def hessian(
    params: SoftmaxRegression,
    features: "Features",
    labels: Labels,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Array:
    """Hessian of the objective, P = (D + 1) K rows and columns.

        H = sum_i a_i (diag(p_i) - p_i p_i^T) kron x~_i x~_i^T + l2 diag(1 on the kernel)
        a_i = w_i / sum(w) sum_k c_k y_ik,  x~ = (x, 1)

    Rows and columns are in the order of `jax.flatten_util.ravel_pytree(params)`: the kernel row by
    row, then the bias. Half of N P^2 multiplications, in chunks of rows: beside the logits, and a
    copy of the features where there are weights, the memory does not grow with N.

    Derivative: not the purpose; differentiable.
    Edge cases: those of `gradient`. H is positive semidefinite; it is singular along a vector that
    is the same for every class, in the bias always and in the kernel where l2 = 0.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D], dense, BCOO or BCSR.
        labels: as `gradient`; only their mass counts, 1 for a class index.
        l2: >= 0, the strength of the penalty, a scalar or [D], as of `objective`.
        sample_weights: real [N], >= 0; None for equal weights.
        class_weights: real [K], >= 0; None for equal weights.
        offset: real [N, K], nats; None for zeros.

    Returns:
        [P, P], exactly symmetric, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(0, 2)  # a bias alone
        >>> softjax.regression.hessian(params, jnp.ones((4, 0)), jnp.array([0, 0, 0, 1]))
        Array([[ 0.25, -0.25],
               [-0.25,  0.25]], dtype=float32)

    Source: D. Böhning, "Multinomial logistic regression algorithm" (1992), eq. (2.3).
    """
    function = "regression.hessian"
    rows = checked_rows(
        function, params, features, labels, sample_weights, class_weights, offset=offset
    )
    return _hessian(params, rows, l2)


def hvp(
    params: SoftmaxRegression,
    tangent: SoftmaxRegression,
    features: "Features",
    labels: Labels,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> SoftmaxRegression:
    """Hessian of the objective times a vector, in two products with the features.

        Z, U = X~ (params, tangent);  kernel: X^T V + l2 tangent;  bias: sum_i V_i
        V_i = a_i p_i (u_i - <p_i, u_i>),  a_i as in `hessian`

    Derivative: linear in `tangent`, so it transposes; differentiable in `params`.
    Edge cases: those of `gradient`.

    Args:
        params: kernel [D, K] and bias [K].
        tangent: the vector, shapes of `params`.
        features: real [N, D], dense, BCOO or BCSR.
        labels: as `gradient`; only their mass counts, 1 for a class index.
        l2: >= 0, the strength of the penalty, a scalar or [D], as of `objective`.
        sample_weights: real [N], >= 0; None for equal weights.
        class_weights: real [K], >= 0; None for equal weights.
        offset: real [N, K], nats; None for zeros.

    Returns:
        Shapes and dtypes of `params`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(0, 2)
        >>> v = softjax.regression.SoftmaxRegression(jnp.zeros((0, 2)), jnp.array([1.0, 0.0]))
        >>> softjax.regression.hvp(params, v, jnp.ones((4, 0)), jnp.array([0, 0, 0, 1])).bias
        Array([ 0.25, -0.25], dtype=float32)

    Source: B. A. Pearlmutter, "Fast exact multiplication by the Hessian" (1994).
    """
    function = "regression.hvp"
    rows = checked_rows(
        function,
        params,
        features,
        labels,
        sample_weights,
        class_weights,
        offset=offset,
        takes_sparse=True,
    )
    _checks.same_shape(function, "tangent.kernel", tangent.kernel, jnp.shape(params.kernel))
    _checks.same_shape(function, "tangent.bias", tangent.bias, jnp.shape(params.bias))
    return _hvp(params, tangent, rows, l2)


def fisher_information(
    params: SoftmaxRegression,
    features: "Features",
    *,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Array:
    """Fisher information of all examples together: the covariance of the score of labels ~ p.

        I = sum_i w_i (diag(p_i) - p_i p_i^T) kron x~_i x~_i^T,  x~ = (x, 1)

    A sum, not a mean: N times the Hessian of the plain mean loss, whatever the labels. Order, cost
    and memory are those of `hessian`.

    Derivative: not the purpose; differentiable.
    Edge cases: a row of weight 0 takes no part, NaN included. I is positive semidefinite; it is
    singular along a vector that is the same for every class.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D], dense, BCOO or BCSR.
        sample_weights: real [N], >= 0, how often each row counts; None for once.
        offset: real [N, K], nats; None for zeros.

    Returns:
        [P, P], P = (D + 1) K, exactly symmetric, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(0, 2)
        >>> softjax.regression.fisher_information(params, jnp.ones((4, 0)))
        Array([[ 1., -1.],
               [-1.,  1.]], dtype=float32)

    Source: P. McCullagh and J. A. Nelder, "Generalized Linear Models" (1989), section 5.4.
    """
    function = "regression.fisher_information"
    x = features_array(function, params, features)
    w = weights_array(function, "sample_weights", sample_weights, x.shape[:1], x.dtype)
    o = offset_array(function, params, x, offset)
    return _fisher_information(params, Rows(x, None, w, None, o))


def lipschitz_constant(
    features: "Features",
    labels: Labels,
    num_classes: int,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
) -> Array:
    """A Lipschitz constant of the gradient: no Hessian, at any parameters, has a larger eigenvalue.

        L = lambda_max(1/2 sum_i a_i x~_i x~_i^T + l2 diag(1 on the features)),  a_i as in `hessian`

    from diag(p) - p p^T <= (I - 1 1^T / K) / 2, whose eigenvalue 1/2 is that of p = (1/2, 1/2, 0,
    ...). Gradient descent with the step 1 / L never goes up. The cost is that of D + 1 features'
    Gram matrix and its eigenvalues.

    Derivative: not the purpose.
    Edge cases: a row of weight 0 takes no part, NaN included; one class: l2, or 0 without features.

    Args:
        features: real [N, D], dense, BCOO or BCSR.
        labels: as `gradient`; only their mass counts, 1 for a class index.
        num_classes: K.
        l2: >= 0, the strength of the penalty, a scalar or [D], as of `objective`.
        sample_weights: real [N], >= 0; None for equal weights.
        class_weights: real [K], >= 0; None for equal weights.

    Returns:
        A scalar, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.regression.lipschitz_constant(jnp.ones((3, 1)), jnp.array([0, 1, 1]), 2)
        Array(1., dtype=float32)

    Source: D. Böhning and B. G. Lindsay, "Monotonicity of quadratic-approximation algorithms"
        (1988), section 4; Böhning (1992), theorem 1.
    """
    function = "regression.lipschitz_constant"
    x = _dense_or_sparse(function, features)
    x = x.todense() if is_sparse(x) else x
    _checks.same_rank(function, "features", x, 2)
    x = x.astype(compute_dtype(x.dtype))
    shape = (x.shape[0], num_classes)
    targets = _targets_array(function, labels, shape, x.dtype)
    w = weights_array(function, "sample_weights", sample_weights, shape[:1], x.dtype)
    c = weights_array(function, "class_weights", class_weights, shape[1:], x.dtype)
    return _lipschitz_constant(Rows(x, targets, w, c), l2, num_classes)


class Rows(NamedTuple):
    """The arguments of a derivative, checked: features, targets, weights and what is known.

    Attributes:
        x: features [N, D], dense or BCOO.
        targets: ClassIndices or a distribution; None where they do not matter.
        w: sample weights [N]; None for ones.
        c: class weights [K]; None for ones.
        offset: [N, K]; None for zeros.
        constant: 1, or 0 where the model has no intercept.
    """

    x: Any
    targets: Any
    w: Array | None
    c: Array | None
    offset: Array | None = None
    constant: Any = 1


@jax.jit
def _gradient(params: SoftmaxRegression, rows: Rows, l2: ArrayLike) -> SoftmaxRegression:
    x, share = counted(rows.x, rows.w)
    g = residuals(logits_of(rows, x, params), rows.targets, rows.c)
    return _pulled_back(params, x, times(share[:, None], g), params, l2)


@jax.jit
def _hessian(params: SoftmaxRegression, rows: Rows, l2: ArrayLike) -> Array:
    x, share = counted(rows.x, rows.w)
    a = times(share, masses(rows.targets, rows.c, x.dtype))
    h = information(x, logits_of(rows, x, params), a)
    strength = jnp.broadcast_to(feature_column(l2, h.dtype), params.kernel.shape).ravel()
    return h + jnp.diag(jnp.pad(strength, (0, len(h) - len(strength))))


@jax.jit
def _hvp(
    params: SoftmaxRegression, tangent: SoftmaxRegression, rows: Rows, l2: ArrayLike
) -> SoftmaxRegression:
    x, share = counted(rows.x, rows.w)
    a = times(share, masses(rows.targets, rows.c, x.dtype))
    both = jax.tree.map(
        lambda p, t: jnp.concatenate([p.astype(x.dtype), t.astype(x.dtype)], -1), params, tangent
    )
    z, u = jnp.split(product(x, both), 2, -1)
    z = with_offset(rows, z)
    v = a[:, None] * softmax_tangent(softmax_core(z, (1,)), u, (1,))
    return _pulled_back(params, x, v, tangent, l2)


@jax.jit
def _fisher_information(params: SoftmaxRegression, rows: Rows) -> Array:
    x, _ = counted(rows.x, rows.w)
    weights = jnp.ones(x.shape[:1], x.dtype) if rows.w is None else rows.w
    return information(x, logits_of(rows, x, params), weights)


@partial(jax.jit, static_argnames="num_classes")
def _lipschitz_constant(rows: Rows, l2: ArrayLike, num_classes: int) -> Array:
    x, share = counted(rows.x, rows.w)
    a = times(share, masses(rows.targets, rows.c, x.dtype))
    x = augmented(x)

    def add_products(total, x, a):
        return total + jnp.matmul(x.T, a[:, None] * x, precision=EXACT)

    # In chunks, for XLA:CPU may add one row after the other, and in float32 fall short of a bound.
    size = x.shape[1]
    gram = sum_of_chunks(add_products, jnp.zeros((size, size), x.dtype), size, a, x)
    strength = jnp.broadcast_to(feature_column(l2, x.dtype), (size - 1, 1))[:, 0]
    penalty = jnp.diag(jnp.append(strength, 0))
    half = 0.5 if num_classes > 1 else 0.0
    return jnp.linalg.eigvalsh(half * gram + penalty)[-1]


def feature_column(l2: ArrayLike, dtype) -> Array:
    """A penalty that is a scalar, or of each feature [D], as what multiplies a kernel [D, K]."""
    return jnp.asarray(l2, dtype).reshape(-1, 1)


def _pulled_back(
    params: SoftmaxRegression, x: Any, g: Array, penalised: SoftmaxRegression, l2: ArrayLike
) -> SoftmaxRegression:
    """X~^T g, and what the penalty adds, in the dtypes of `params`."""
    transposed: Any = x.T
    if is_sparse(x):
        kernel = transposed @ g
    elif x.shape[1] == 1 or x.shape[1] * g.shape[1] <= 9:
        # Such a product XLA:CPU makes in a loop, one row after the other; a sum is a tree.
        kernel = jnp.sum(x[:, :, None] * g[:, None, :], 0)
    else:
        kernel = jnp.matmul(transposed, g, precision=EXACT)
    kernel += feature_column(l2, x.dtype) * penalised.kernel.astype(x.dtype)
    return SoftmaxRegression(
        kernel.astype(params.kernel.dtype), jnp.sum(g, 0).astype(params.bias.dtype)
    )


def checked_rows(
    function: str,
    params: SoftmaxRegression,
    features: "Features",
    labels: Labels,
    sample_weights: ArrayLike | None,
    class_weights: ArrayLike | None = None,
    *,
    offset: ArrayLike | None = None,
    fit_intercept: bool = True,
    takes_sparse: bool = False,
) -> Rows:
    x = features_array(function, params, features, takes_sparse)
    shape = (x.shape[0], jnp.shape(params.kernel)[1])
    targets = _targets_array(function, labels, shape, x.dtype)
    w = weights_array(function, "sample_weights", sample_weights, shape[:1], x.dtype)
    c = weights_array(function, "class_weights", class_weights, shape[1:], x.dtype)
    constant = np.asarray(_checks.flag(function, "fit_intercept", fit_intercept), x.dtype)
    return Rows(x, targets, w, c, offset_array(function, params, x, offset), constant)


def features_array(
    function: str, params: SoftmaxRegression, features: "Features", takes_sparse: bool = False
) -> Any:
    """Features [N, D] in the dtype of the parameters, at least float32.

    Sparse ones are made dense, but where a function `takes_sparse`: matrices over all parameters
    take more memory than the rows.
    """
    x = _dense_or_sparse(function, features)
    _checks.same_shape(function, "features", x, (x.shape[0] if x.ndim else 0, len(params.kernel)))
    x = x.astype(compute_dtype(jnp.result_type(params.kernel)))
    return x.todense() if is_sparse(x) and not takes_sparse else x


def _dense_or_sparse(function: str, features: Any) -> Any:
    read = sparse_array if is_sparse_matrix(features) else _checks.real_array
    return read(function, "features", features)


def _targets_array(
    function: str, labels: Labels, shape: tuple[int, int], dtype
) -> ClassIndices | Array:
    if not is_class_indices(labels, function):
        return distribution(function, labels, shape, dtype)
    _checks.same_shape(function, "labels", labels, shape[:1])
    return class_indices(function, labels, shape[1])


def offset_array(
    function: str, params: SoftmaxRegression, x: Any, offset: ArrayLike | None
) -> Array | None:
    """An offset [N, K] in the dtype of the features."""
    if offset is None:
        return None
    array = _checks.real_array(function, "offset", offset)
    _checks.same_shape(function, "offset", array, (x.shape[0], len(params.bias)))
    return array.astype(x.dtype)


def weights_array(
    function: str, argument: str, weights: ArrayLike | None, shape: tuple[int, ...], dtype
) -> Array | None:
    if weights is None:
        return None
    w = _checks.real_array(function, argument, weights)
    _checks.same_shape(function, argument, w, shape)
    _checks.not_negative(function, argument, weights)
    return w.astype(dtype)


def counted(x: Any, w: Array | None) -> tuple[Any, Array]:
    """The features, 0 in a row of weight 0, and the share w_i / sum(w) of each row."""
    if w is None:
        examples = jnp.asarray(x.shape[0], x.dtype)  # which may be symbolic
        return x, jnp.broadcast_to(1 / jnp.maximum(examples, 1), x.shape[:1])
    absent = is_zero(w)
    if is_sparse(x):
        absent = absent.at[x.indices[:, 0]].get(mode="fill", fill_value=True)
        x = with_data(x, jnp.where(absent, 0, x.data))
    else:
        x = jnp.where(absent[:, None], 0, x)
    return x, shares(w)


def residuals(z: Array, targets: ClassIndices | Array, c: Array | None) -> Array:
    """dl_i / dz_i, NaN at a bad label."""
    if isinstance(targets, ClassIndices):
        return masses(targets, c, z.dtype)[:, None] * index_loss_gradient(z, targets.index, None)
    return expected_loss_gradient(z, targets if c is None else c[None] * targets)


def masses(targets: ClassIndices | Array, c: Array | None, dtype) -> Array:
    """sum_k c_k y_ik of each row, NaN at a bad label."""
    if not isinstance(targets, ClassIndices):
        return jnp.sum(targets if c is None else c[None] * targets, -1)
    masses = jnp.ones(targets.index.shape, dtype) if c is None else c[targets.index]
    return _checks.nan_where(targets.bad, masses)


def times(share: Array, x: Array) -> Array:
    """share x, and 0 where the share is 0 even if x is NaN."""
    return jnp.where(share == 0, 0, share * x)


def product(x: Any, params: SoftmaxRegression) -> Array:
    """The logits, in the dtype of x."""
    kernel, bias = (leaf.astype(x.dtype) for leaf in params)
    if is_sparse(x):
        return x @ kernel + bias[None]
    return jnp.matmul(x, kernel, precision=EXACT) + bias[None]


def logits_of(rows: Rows, x: Any, params: SoftmaxRegression) -> Array:
    """The logits with the offset of the rows, of their features `x` as they are counted."""
    return with_offset(rows, product(x, params))


def with_offset(rows: Rows, z: Array) -> Array:
    """z + offset, which is not read in a row of weight 0."""
    if rows.offset is None:
        return z
    if rows.w is None:
        return z + rows.offset
    return z + jnp.where(is_zero(rows.w)[:, None], 0, rows.offset)


def augmented(x: Array) -> Array:
    """x~ = (x, 1)."""
    return jnp.concatenate([x, jnp.ones((x.shape[0], 1), x.dtype)], 1)


def information(x: Array, z: Array, a: Array) -> Array:
    """I [P, P], exactly symmetric; rows and columns have the features first, then the classes.

    Args:
        x: features [N, D].
        z: logits [N, K].
        a: the weights of the rows, [N], >= 0.
    """
    size = (x.shape[1] + 1) * z.shape[1]
    if z.shape[1] < 2:  # one class comes as no surprise
        return jnp.zeros((size, size), x.dtype)
    blocks = _pair_blocks(x, softmax_core(z, (1,)), a)
    matrix = _assembled(blocks).reshape(size, size)
    return (matrix + matrix.T) / 2


def _pair_blocks(x: Array, p: Array, a: Array) -> Array:
    """B[s, :, k, :] = B_kl for l = k + s + 1 mod K: [K // 2, D + 1, K, D + 1].

    Going round the circle of the classes by 1 to K / 2 meets every pair once (twice where the
    step is K / 2), so that each step is one product X~^T (W kron X~) of the same shape.
    """
    d, k = x.shape[1] + 1, p.shape[1]

    def add_chunk(blocks, x, p, a):
        x, a_p = augmented(x), a[:, None] * p

        def add_step(s, blocks):
            w = a_p * jnp.roll(p, -1 - s, 1)
            weighted = (w[:, :, None] * x[:, None, :]).reshape(len(x), k * d)
            return blocks.at[s].add(jnp.matmul(x.T, weighted, precision=EXACT).reshape(d, k, d))

        return fori_loop(0, k // 2, add_step, blocks)

    return sum_of_chunks(add_chunk, jnp.zeros((k // 2, d, k, d), x.dtype), d * k, a, x, p)


def sum_of_chunks(add_chunk: Callable, total: Any, row_size: int, a: Array, *arrays: Array) -> Any:
    """add_chunk(total, *rows of the arrays, rows of a) for one chunk of rows after the other.

    The last chunk reaches back, with a = 0 in the rows that were there before: no row is copied
    to fill it.

    Args:
        add_chunk: returns the total with what the rows add, which must be 0 where a is.
        total: to begin with.
        row_size: how many numbers a row takes for a while.
        a: the weights of the rows, [N].
        arrays: [N, ...].
    """
    n = len(a)
    if not n:
        return total
    rows = min(n, max(CHUNK_ROWS, CHUNK_SIZE // row_size))

    def step(chunk, total):
        first = jnp.minimum(chunk * rows, n - rows)
        a_rows, *parts = (lax.dynamic_slice_in_dim(v, first, rows) for v in (a, *arrays))
        is_new = first + jnp.arange(rows, dtype=jnp.int32) >= chunk * rows
        return add_chunk(total, *parts, jnp.where(is_new, a_rows, 0))

    return fori_loop(0, -(-n // rows), step, total)


def _assembled(blocks: Array) -> Array:
    """The blocks in their places, [D + 1, K, D + 1, K]."""
    k = blocks.shape[2]
    row, column = np.indices((k, k))
    ahead = (column - row) % k
    forward = ahead <= k // 2
    step = np.where(forward, ahead, k - ahead) - 1  # -1 on the diagonal, replaced below
    pairs = blocks[step, :, np.where(forward, row, column)]  # [K, K, D + 1, D + 1]
    is_diagonal = jnp.eye(k, dtype=bool)[:, :, None, None]
    pairs = jnp.where(is_diagonal, 0, pairs)
    full = jnp.where(is_diagonal, jnp.sum(pairs, 1)[:, None], -pairs)
    return full.transpose(2, 0, 3, 1)

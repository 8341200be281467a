"""Weights and factors of any magnitude, and sums by class over any number of examples.

XLA:CPU reads a subnormal number (in float32: below 1.2e-38) as 0, also in comparisons. Weights can
be subnormal, so the functions here work with the bits of such numbers.
"""

import jax.numpy as jnp
from jax import Array, lax

# 2^LIFT times a subnormal number of float32 or float64 is a normal one.
LIFT = 64


def is_zero(x: Array) -> Array:
    """Whether x is 0; subnormal numbers are not 0."""
    return _bits_of_size(x) == 0


def shares(weights: Array, counted: Array | bool = True, costs: Array | None = None) -> Array:
    """w / sum(w c) over the counted entries, with c = `costs` or 1; 0 for all other entries.

    If the sum is 0, all results are 0. The weights are >= 0 and may have any magnitude: their sum
    may overflow, and all of them may be subnormal.
    """
    w = in_unit(weights, counted)
    total = jnp.sum(w if costs is None else jnp.where(counted, w * costs, 0))
    return jnp.where(total == 0, 0, w / jnp.where(total == 0, 1, total))


def in_unit(weights: Array, counted: Array | bool = True) -> Array:
    """Counted weights >= 0, divided by a power of two such that the largest is in [2, 4) or is 0.

    `where` selects among bits and among quotients, because XLA:CPU turns a subnormal number that it
    selects into 0.
    """
    largest = jnp.max(jnp.where(counted, _bits_of_size(weights), 0), initial=0)
    is_small = (largest > 0) & (largest >> jnp.finfo(weights.dtype).nmant < LIFT)
    w = jnp.where(is_small, _lifted(weights), weights)
    # Half of the largest power of two, since XLA may multiply by 1 / unit, and 2^-127 is 0 there.
    unit = _power_of_two_below(jnp.max(jnp.where(counted, w, 0), initial=0)) / 2
    w = w / lax.stop_gradient(jnp.where(unit == 0, 1, unit))
    return jnp.where(counted, w, 0)


def significand_and_exponent(x: Array) -> tuple[Array, Array]:
    """x = f 2^k with 1 <= |f| < 2, both in the dtype of x; f = x and k = 0 for 0, inf and NaN."""
    info = jnp.finfo(x.dtype)
    is_small = _bits_of_size(x) >> info.nmant == 0
    normal = jnp.where(is_small, _lifted(x), x)
    exponent = (_bits_of_size(normal) >> info.nmant).astype(x.dtype) - (info.maxexp - 1)
    exponent -= jnp.where(is_small, LIFT, 0).astype(x.dtype)
    usual = jnp.isfinite(x) & ~is_zero(x)
    f = normal / _power_of_two_below(jnp.where(usual, normal, 1))
    return f, jnp.where(usual, exponent, 0)


def power_of_two(exponent: Array) -> Array:
    """2^k for whole numbers k; 0 if that is subnormal. 2^k must not overflow."""
    info = jnp.finfo(exponent.dtype)
    biased = jnp.maximum(exponent + (info.maxexp - 1), 0).astype(_integer(exponent.dtype))
    return lax.bitcast_convert_type(biased << info.nmant, exponent.dtype)


def sums_by_class(classes: Array, x: Array, num_classes: int) -> Array:
    """The sums of x [N] over the examples of each class, [num_classes]; integers stay exact.

    A scatter adds one number after the other, so that a float32 sum of ones never exceeds 2^24.
    The scatter therefore sums blocks of examples only, and a tree of sums adds the blocks.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.zeros(num_classes, x.dtype).at[classes].add(x)
    size = max(32, num_classes)  # then there are no more sums of blocks than examples
    (rows,) = x.shape  # a symbol, not a number, if the program is exported
    count = -(-rows // size)
    block = jnp.arange(rows, dtype=jnp.int32) // size
    return jnp.sum(jnp.zeros((count, num_classes), x.dtype).at[block, classes].add(x), 0)


def _lifted(x: Array) -> Array:
    """2^LIFT x, if it does not overflow, also for subnormal x; autodiff sees a linear function."""
    info = jnp.finfo(x.dtype)
    bits = _bits_of_size(x)
    of_subnormal = jnp.copysign(bits.astype(x.dtype) * 2.0 ** (LIFT + info.minexp - info.nmant), x)
    value = jnp.where(bits >> info.nmant == 0, of_subnormal, x * 2.0**LIFT)
    return lax.stop_gradient(value - x * 2.0**LIFT) + x * 2.0**LIFT


def _power_of_two_below(x: Array) -> Array:
    """The largest power of two <= |x|; 0 if x is 0 or subnormal."""
    nmant = jnp.finfo(x.dtype).nmant
    return lax.bitcast_convert_type(_bits_of_size(x) >> nmant << nmant, x.dtype)


def _bits_of_size(x: Array) -> Array:
    """The bits of |x|, an integer that grows with |x|."""
    integer = _integer(x.dtype)
    return lax.bitcast_convert_type(x, integer) & jnp.iinfo(integer).max


def _integer(dtype: jnp.dtype) -> type:
    return jnp.int64 if dtype == jnp.float64 else jnp.int32

"""Linear maps of rows that know their transpose.

JAX transposes a linear map operation by operation. The result may be inaccurate even if the map is
accurate, and it passes over the memory again for each sum. Maps here are defined together with
their transpose:

    forward(v, *coefficients, axes)  ->  A v       transposed(v, *coefficients, axes)  ->  A^T v

Both are elementwise over all axes but `axes`, and differentiable in the coefficients. Forward and
reverse mode then have the same cost and the same rounding, at every order.
`jax.custom_derivatives.linear_call` has the same purpose, but cannot be batched (jax 0.12).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from softjax._sharding import varying_alike

Map = Callable[..., Array]


def row_map(
    forward: Map, transposed: Map, v: Array, coefficients: tuple[Array, ...], axes: tuple[int, ...]
) -> Array:
    """A v, an array like v; the transpose with respect to v is `transposed`.

    The coefficients have the rank of v, and on each axis its size or 1.
    """
    operands = varying_alike((v, *coefficients))
    return _row_map_p.bind(*operands, forward=forward, transposed=transposed, axes=axes)


_row_map_p = Primitive("row_map")


def _apply(*operands: Array, forward: Map, transposed: Map, axes: tuple[int, ...]) -> Array:
    return forward(*operands, axes=axes)


_row_map_p.def_impl(_apply)
mlir.register_lowering(_row_map_p, mlir.lower_fun(_apply, multiple_results=False))


@_row_map_p.def_abstract_eval
def _type_of_result(v, *coefficients, **_):
    return v


def _jvp(primals, tangents, *, forward, transposed, axes):
    v, *coefficients = primals
    v_dot, *dots = tangents
    maps = {"forward": forward, "transposed": transposed, "axes": axes}
    value = _row_map_p.bind(*primals, **maps)
    moved = [
        n
        for n, (c, dot) in enumerate(zip(coefficients, dots, strict=True))
        if not isinstance(dot, ad.Zero) and jnp.issubdtype(c.dtype, jnp.floating)
    ]
    parts = []
    if not isinstance(v_dot, ad.Zero):
        parts.append(_row_map_p.bind(v_dot, *coefficients, **maps))
    if moved:

        def of_moved(*values):
            all_of_them = list(coefficients)
            for n, value in zip(moved, values, strict=True):
                all_of_them[n] = value
            return forward(v, *all_of_them, axes=axes)

        points, directions = [coefficients[n] for n in moved], [dots[n] for n in moved]
        parts.append(jax.jvp(of_moved, points, directions)[1])
    if not parts:
        return value, ad.Zero(jax.typeof(value))
    return value, sum(parts[1:], parts[0])


def _transpose(cotangent, v, *coefficients, forward, transposed, axes):
    if isinstance(cotangent, ad.Zero):
        return (ad.Zero(v.aval), *(None for _ in coefficients))
    maps = {"forward": transposed, "transposed": forward, "axes": axes}
    return (_row_map_p.bind(cotangent, *coefficients, **maps), *(None for _ in coefficients))


def _batched(operands, batch_axes, *, forward, transposed, axes):
    size = next(
        a.shape[axis] for a, axis in zip(operands, batch_axes, strict=True) if axis is not None
    )
    v, *coefficients = (
        a[None] if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(operands, batch_axes, strict=True)
    )
    v = jnp.broadcast_to(v, (size, *v.shape[1:]))
    axes = tuple(axis + 1 for axis in axes)
    return row_map(forward, transposed, v, tuple(coefficients), axes), 0


ad.primitive_jvps[_row_map_p] = _jvp
ad.primitive_transposes[_row_map_p] = _transpose
batching.primitive_batchers[_row_map_p] = _batched

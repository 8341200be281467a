"""Linear maps that know their transpose.

JAX transposes a linear map operation by operation. The result may be inaccurate even if the map is
accurate, it passes over the memory again for each sum, and the order of operands and the rounding
of its products are arbitrary. Maps here are defined together with their transpose:

    forward(v, *coefficients)  ->  A v        transposed(u, *coefficients)  ->  A^T u

Both are differentiable in the coefficients. Forward and reverse mode then have the same cost and
the same rounding, at every order. `jax.custom_derivatives.linear_call` has the same purpose, but
cannot be batched (jax 0.12).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching

from softjax._custom_jvp import custom_jvp
from softjax._platforms import Primitive, lower_by_platform, replaced
from softjax._sharding import axes_of, repeated, varying

Map = Callable[..., Array]


class Form(NamedTuple):
    """A map or its transpose.

    Attributes:
        function: a function of v and the coefficients.
        like: the index of the argument that has the shape and dtype of the result.
    """

    function: Map
    like: int


@dataclass(frozen=True)
class WithOptions:
    """A function with its options by name; instances of equal functions and options are equal.

    JAX lowers equal maps once.
    """

    function: Map
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *operands: Any) -> Array:
        return self.function(*operands, **dict(self.options))


def row_map(
    forward: Map,
    transposed: Map,
    v: Array,
    coefficients: tuple[Array, ...],
    axes: tuple[int, ...],
    **options: Any,
) -> Array:
    """A v, an array like v, with the transpose `transposed` with respect to v.

    Both functions take the axes and the options by name, and are elementwise over all other axes.
    The coefficients have the rank of v, and on each axis its size or 1.
    """
    named = (("axes", axes), *options.items())
    there, back = (Form(WithOptions(f, named), 0) for f in (forward, transposed))
    return linear_map(there, back, v, *coefficients)


def linear_map(forward: Form, transposed: Form, v: Array, *coefficients: Array) -> Array:
    """A v; the transpose with respect to v is `transposed`."""
    operands = v, *coefficients
    operands = varying(operands, axes_of(operands))
    return _linear_map_p.bind(*operands, forward=forward, transposed=transposed)


def of_operands(function: Map, *operands: Any) -> Array:
    """function(*operands), whose backward pass keeps the operands and no other array of their size.

    JAX keeps what the derivative rules within the function name, such as the probabilities, in the
    dtype in which they were computed. For operands in half precision this is twice their size.
    Here the derivative of the function at its operands is one linear map, which computes such
    arrays again. If forward and backward pass are parts of one program, XLA finds that the
    operations are the same, and computes them once. All derivatives have the values that they have
    without this function.
    """
    leaves, tree = jax.tree.flatten(operands)
    return _of_leaves(function, tree, False, *leaves)


@partial(custom_jvp, nondiff_argnums=(0, 1, 2))
def _of_leaves(function: Map, tree: Any, is_differentiated: bool, *leaves: Array) -> Array:
    """The value; if it `is_differentiated`, by the same operations as its derivative.

    XLA then computes the operations of both once.
    """
    if not is_differentiated:
        return function(*jax.tree.unflatten(tree, leaves))
    reals = [n for n, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.floating)]

    def of_reals(*values: Array) -> Array:
        return function(*jax.tree.unflatten(tree, replaced(leaves, reals, values)))

    return jax.vjp(of_reals, *(leaves[n] for n in reals))[0]


@partial(_of_leaves.defjvp, symbolic_zeros=True)
def _of_leaves_jvp(function: Map, tree: Any, is_differentiated: bool, primals, tangents):
    value = _of_leaves(function, tree, True, *primals)
    # The value is an operand, and kept, only if no other operand has its type.
    types, parts = [jax.typeof(a) for a in (*primals, value)], []
    kept = types.index(types[-1])
    operands = (*primals, value)[: max(kept + 1, len(primals))]
    for place, tangent in enumerate(tangents):
        if not isinstance(tangent, SymbolicZero):  # the tangents of integers are symbolic zeros
            options = (("function", function), ("tree", tree), ("place", place))
            there = Form(WithOptions(_tangent, options), 1 + kept)
            back = Form(WithOptions(_cotangent, options), 1 + place)
            parts.append(linear_map(there, back, tangent, *operands))
    return value, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(value)


def _tangent(x_dot: Array, *leaves: Array, **of_place: Any) -> Array:
    of_variable, x = _at_place(leaves, **of_place)
    return jax.jvp(of_variable, (x,), (x_dot,))[1]


def _cotangent(cotangent: Array, *leaves: Array, **of_place: Any) -> Array:
    of_variable, x = _at_place(leaves, **of_place)
    return jax.vjp(of_variable, x)[1](cotangent)[0]


def _at_place(
    leaves: tuple[Array, ...], function: Map, tree: Any, place: int
) -> tuple[Callable[[Array], Array], Array]:
    """The function of the leaf at `place` alone, and this leaf."""
    point = leaves[: tree.num_leaves]

    def of_variable(x: Array) -> Array:
        return function(*jax.tree.unflatten(tree, replaced(point, [place], [x])))

    return of_variable, leaves[place]


_linear_map_p = Primitive("linear_map")


def _apply(*operands: Array, forward: Form, transposed: Form) -> Array:
    return forward.function(*operands)


_linear_map_p.def_impl(_apply)
lower_by_platform(_linear_map_p, lambda platform: _apply)


@_linear_map_p.def_abstract_eval
def _type_of_result(*operands, forward: Form, **_):
    return operands[forward.like]


def _jvp(primals, tangents, **forms: Any):
    v, *coefficients = primals
    v_dot, *dots = tangents
    value = _linear_map_p.bind(*primals, **forms)
    moved = [
        n
        for n, (c, dot) in enumerate(zip(coefficients, dots, strict=True))
        if not isinstance(dot, ad.Zero) and jnp.issubdtype(c.dtype, jnp.floating)
    ]
    parts = []
    if not isinstance(v_dot, ad.Zero):
        parts.append(_linear_map_p.bind(v_dot, *coefficients, **forms))
    if moved:

        def of_moved(*values):
            return forms["forward"].function(v, *replaced(coefficients, moved, values))

        points, directions = [coefficients[n] for n in moved], [dots[n] for n in moved]
        parts.append(jax.jvp(of_moved, points, directions)[1])
    if not parts:
        return value, ad.Zero(jax.typeof(value))
    return value, sum(parts[1:], parts[0])


def _transpose(cotangent, v, *coefficients, forward: Form, transposed: Form):
    if isinstance(cotangent, ad.Zero):
        return (ad.Zero(v.aval), *(None for _ in coefficients))
    forms = {"forward": transposed, "transposed": forward}
    return (_linear_map_p.bind(cotangent, *coefficients, **forms), *(None for _ in coefficients))


def _batched(operands, batch_axes, *, forward: Form, transposed: Form):
    some = next(
        jnp.moveaxis(a, axis, 0)
        for a, axis in zip(operands, batch_axes, strict=True)
        if axis is not None
    )
    # Each result has a batch axis, and so must the operand whose shape it has.
    with_batch, moved = {0, forward.like, transposed.like}, []
    for n, (a, axis) in enumerate(zip(operands, batch_axes, strict=True)):
        if axis is not None:
            moved.append(jnp.moveaxis(a, axis, 0))
        else:
            moved.append(repeated(a, some) if n in with_batch else a)
    in_axes = tuple(
        None if axis is None and n not in with_batch else 0 for n, axis in enumerate(batch_axes)
    )
    there, back = (
        Form(WithOptions(_each, (("function", form.function), ("in_axes", in_axes))), form.like)
        for form in (forward, transposed)
    )
    return linear_map(there, back, moved[0], *moved[1:]), 0


def _each(*operands: Array, function: Map, in_axes: tuple[int | None, ...]) -> Array:
    return jax.vmap(function, in_axes)(*operands)


ad.primitive_jvps[_linear_map_p] = _jvp
ad.primitive_transposes[_linear_map_p] = _transpose
batching.primitive_batchers[_linear_map_p] = _batched

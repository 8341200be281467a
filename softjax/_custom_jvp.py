"""Functions with a derivative rule of their own that every transformation keeps.

`jax.custom_jvp` loses its rule where JAX evaluates a program partially. That happens in the reverse
mode of a loop: the second derivative of `lax.scan` over such a function is the derivative of the
operations below the rule (jax 0.10 to 0.12). For the functions of this package, that derivative is
inaccurate, wrong where entries are tied, or not defined at all. Here such a function is a
primitive, which a partial evaluation keeps whole.
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial, reduce, update_wrapper
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray, Tracer, eval_jaxpr
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0
from jax.interpreters import ad, batching, mlir

from softjax._platforms import Primitive, replaced


class custom_jvp:
    """`jax.custom_jvp`, whose rule also holds in every derivative of a loop.

    The rule is defined as with `jax.custom_jvp`. The arguments at `nondiff_argnums` are hashable:
    JAX traces equal calls once.
    """

    def __init__(self, function: Callable, nondiff_argnums: Sequence[int] = ()):
        update_wrapper(self, function)
        self.function = function
        self.nondiff_argnums = tuple(nondiff_argnums)

    def defjvp(self, rule: Callable, symbolic_zeros: bool = False) -> Callable:
        self.rule, self.symbolic_zeros = rule, symbolic_zeros
        return rule

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.function)

    def __call__(self, *given: Any, **by_name: Any) -> Any:
        bound = self.signature.bind(*given, **by_name)
        bound.apply_defaults()
        arguments = bound.args
        options = tuple(arguments[n] for n in self.nondiff_argnums)
        places = [n for n in range(len(arguments)) if n not in self.nondiff_argnums]
        leaves, tree = jax.tree.flatten([arguments[n] for n in places])
        if not any(isinstance(a, Tracer) for a in leaves):
            return self.function(*arguments)  # there is nothing to differentiate
        called = Called(self, options, tree)
        results, tree = _bound(called, leaves)
        return jax.tree.unflatten(tree, results)


@dataclass(frozen=True)
class Called:
    """A function of arrays: a `custom_jvp` with its options.

    Attributes:
        owner: the function with its rule.
        options: the arguments at `nondiff_argnums`.
        tree: the tree of the other arguments, whose leaves are the arrays.
    """

    owner: custom_jvp
    options: tuple[Any, ...]
    tree: Any

    def __call__(self, *leaves: Any) -> Any:
        every = list(jax.tree.unflatten(self.tree, leaves))
        for place, option in sorted(zip(self.owner.nondiff_argnums, self.options, strict=True)):
            every.insert(place, option)
        return self.owner.function(*every)

    def differentiated(self, primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        """The results and their tangents as lists, with `SymbolicZero` among both tangents."""
        if not self.owner.symbolic_zeros:
            tangents = [_instantiated(dot) for dot in tangents]
        point, direction = (tuple(jax.tree.unflatten(self.tree, a)) for a in (primals, tangents))
        value, value_dot = self.owner.rule(*self.options, point, direction)
        values, tree = jax.tree.flatten(value)
        return values, tree.flatten_up_to(value_dot)


@dataclass(frozen=True)
class Each:
    """A function of arrays for every entry of a batch, as `jax.vmap` makes it.

    Attributes:
        called: the function of one entry.
        axes: for each array the axis of the batch; None if the array has none.
        names: the name of that axis, and those of the axes of a mesh that divide it.
    """

    called: "Called | Each"
    axes: tuple[int | None, ...]
    names: tuple[Any, Any]

    def __call__(self, *leaves: Any) -> Any:
        return self._mapped(self.called, self.axes)(*leaves)

    def differentiated(self, primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        """As for `Called`; the tangent of an argument without a batch axis has none either."""
        moved = [n for n, dot in enumerate(tangents) if not isinstance(dot, SymbolicZero)]
        zeros: list[bool] = []

        def of_one(primals: Sequence[Any], directions: Sequence[Any]) -> Any:
            nothing = [SymbolicZero(jax.typeof(a).to_tangent_aval()) for a in primals]
            dots = replaced(nothing, moved, directions)
            values, dots = self.called.differentiated(primals, dots)
            zeros[:] = [_is_zero(dot) for dot in dots]
            return values, [dot for dot in dots if not _is_zero(dot)]

        axes = list(self.axes), [self.axes[n] for n in moved]
        values, dots = self._mapped(of_one, axes)(list(primals), [tangents[n] for n in moved])
        nothing = [SymbolicZero(jax.typeof(a).to_tangent_aval()) for a in values]
        return values, replaced(nothing, [n for n, zero in enumerate(zeros) if not zero], dots)

    def _mapped(self, function: Callable, axes: Any) -> Callable:
        axis_name, spmd_axis_name = self.names
        return jax.vmap(function, axes, axis_name=axis_name, spmd_axis_name=spmd_axis_name)


@partial(jax.jit, static_argnums=0)
def _applied(called: Called | Each, *leaves: Any) -> Any:
    return called(*leaves)


def _bound(called: Called | Each, leaves: Sequence[Any]) -> tuple[Sequence[Array], Any]:
    """The results of the primitive, and the tree whose leaves they are."""
    _known_to_interpreters()
    traced = _applied.trace(called, *leaves)
    results = _custom_jvp_p.bind(*leaves, called=called, jaxpr=traced.jaxpr)
    return results, jax.tree.structure(traced.out_info)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero) or tangent.dtype == float0


def _instantiated(tangent: Any) -> Any:
    if not isinstance(tangent, SymbolicZero):
        return tangent
    return ad.instantiate_zeros(ad.Zero(tangent.aval))


_custom_jvp_p = Primitive("custom_jvp")
_custom_jvp_p.multiple_results = True


def _evaluated(*leaves: Any, called: Called | Each, jaxpr: Any) -> Sequence[Array]:
    return eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *leaves)


_custom_jvp_p.def_impl(_evaluated)
mlir.register_lowering(_custom_jvp_p, mlir.lower_fun(_evaluated, multiple_results=True))


@_custom_jvp_p.def_abstract_eval
def _types_of_results(*_, called: Called | Each, jaxpr: Any) -> Sequence[ShapedArray]:
    return jaxpr.out_avals


def _jvp(primals, tangents, *, called: Called | Each, jaxpr: Any):
    given = [SymbolicZero(dot.aval) if isinstance(dot, ad.Zero) else dot for dot in tangents]
    values, dots = called.differentiated(primals, given)
    nothing = [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in values]
    moved = [n for n, dot in enumerate(dots) if not _is_zero(dot)]
    return values, replaced(nothing, moved, [dots[n] for n in moved])


def _transpose(cotangents, *operands, called: Called | Each, jaxpr: Any):
    """The transpose of a function that is linear in some operands."""
    linear = [n for n, a in enumerate(operands) if ad.is_undefined_primal(a)]

    def of_linear(*values: Any) -> Sequence[Array]:
        return _evaluated(*replaced(operands, linear, values), called=called, jaxpr=jaxpr)

    types = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (operands[n].aval for n in linear)]
    given = [ad.instantiate_zeros(a) for a in cotangents]
    results = jax.linear_transpose(of_linear, *types)(given)
    return replaced([None] * len(operands), linear, results)


def _batched(axis_data, operands, axes, *, called: Called | Each, jaxpr: Any):
    if all(axis is None for axis in axes):
        results = _custom_jvp_p.bind(*operands, called=called, jaxpr=jaxpr)
        return results, [None] * len(results)
    moved = [
        a if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(operands, axes, strict=True)
    ]
    every = tuple(None if axis is None else 0 for axis in axes)
    each = Each(called, every, (axis_data.name, axis_data.spmd_name))
    results, _ = _bound(each, moved)
    return results, [0] * len(results)


def _jet(primals, series, *, called: Called | Each, jaxpr: Any):
    """The Taylor coefficients of the results at t = 0, along curves with these coefficients."""

    def curve(t: Array, a: Array, coefficients: Sequence[Array]) -> Array:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        t = t.astype(a.dtype)
        return reduce(lambda total, c: c + t * total, reversed([a, *coefficients]))

    def results(t: Array) -> Sequence[Array]:
        points = map(partial(curve, t), primals, series)
        return _custom_jvp_p.bind(*points, called=called, jaxpr=jaxpr)

    def slope(function: Callable, t: Array) -> Sequence[Array]:
        return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]

    derivatives = accumulate(
        series[0], lambda function, _: partial(slope, function), initial=results
    )
    found = [derivative(jnp.zeros(())) for derivative in derivatives]
    of_each = zip(*found, strict=True)
    scaled = [[y / math.factorial(n) for n, y in enumerate(dots)] for dots in of_each]
    return found[0], [dots[1:] for dots in scaled]


ad.primitive_jvps[_custom_jvp_p] = _jvp
ad.primitive_transposes[_custom_jvp_p] = _transpose
batching.fancy_primitive_batchers[_custom_jvp_p] = _batched


# Interpreters of programs whose tables of rules have no public name: the module that a user has
# imported, the module that holds the table, and the name of the table. Pallas loads its tables when
# it lowers the first kernel, which is too late. checkify is known before a user imports it, since a
# function that is already traced is not traced again for it.
TABLES = (
    ("jax", "jax._src.checkify", "error_checks"),
    ("jax.experimental.pallas", "jax._src.pallas.mosaic.lowering", "lowering_rules"),
    ("jax.experimental.pallas", "jax._src.pallas.triton.lowering", "triton_lowering_rules"),
)


def _known_to_interpreters() -> None:
    _add_to_jet()
    for imported, module, table in TABLES:
        if imported in sys.modules:
            _add_to_table(module, table)


@cache
def _add_to_jet() -> None:
    with suppress(ImportError, AttributeError):
        importlib.import_module("jax.experimental.jet").jet_rules[_custom_jvp_p] = _jet


@cache
def _add_to_table(module: str, table: str) -> None:
    """Lets an interpreter read the primitive as a call of `jax.jit`."""
    with suppress(ImportError, AttributeError, StopIteration):
        found = getattr(importlib.import_module(module), table)
        # Mosaic has a table for each kind of core.
        for rules in found.values() if "mosaic" in module else [found]:
            of_jit = next(rule for primitive, rule in rules.items() if primitive.name == "jit")
            rules[_custom_jvp_p] = partial(_as_jit, of_jit)


def _as_jit(of_jit: Callable, *given: Any, jaxpr: Any, **_: Any) -> Any:
    program = jax.jit(partial(eval_jaxpr, jaxpr.jaxpr, jaxpr.consts))
    (call,) = jax.make_jaxpr(program)(*jaxpr.in_avals).eqns
    return of_jit(*given, **call.params | {"jaxpr": jaxpr})

"""Forms of a computation for each platform.

`jax.lax.platform_dependent` traces, differentiates and batches the forms for all platforms, and the
lowering keeps one of them. `lowered_for_platform` is traced when the program is lowered, in the one
form that is kept; within that form, `platform_dependent` traces one form too.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from softjax._sharding import mesh_of

# The class of all primitives. `jax.extend.core` offers it too, but it loads Pallas, which takes as
# long as the import of softjax.
Primitive = type(lax.neg_p)


class Choice(NamedTuple):
    """A choice for each platform, such as a number of rows or a plan."""

    cpu: Any
    gpu: Any
    tpu: Any

    def of(self, platform: str) -> Any:
        """The choice for a platform with this name in JAX."""
        return {"cpu": self.cpu, "cuda": self.gpu, "rocm": self.gpu}.get(platform, self.tpu)


# The platform for which JAX traces now; None for all platforms, ACCELERATOR for all but a CPU. JAX
# caches each trace together with the value of this context.
tracing_for = jax.make_user_context(None)
ACCELERATOR = "accelerator"

# A user may change these settings for a part of a trace; when the program is lowered, the change is
# over.
SETTINGS = {
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_enable_x64": jax.enable_x64,
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_numpy_rank_promotion": jax.numpy_rank_promotion,
}


def platform_dependent(*operands: Any, default: Callable, **forms: Callable) -> Any:
    """`jax.lax.platform_dependent`, or only the form for the platform for which JAX traces now.

    Within the form for one platform, the forms for other platforms are not traced.
    """
    platform = tracing_for.value
    if platform not in (None, ACCELERATOR):
        return forms.get(platform, default)(*operands)
    hidden = "cpu" if platform == ACCELERATOR else None
    forms = {name: f for name, f in forms.items() if f is not default and name != hidden}
    if not forms:
        return default(*operands)
    rest = ACCELERATOR if platform == ACCELERATOR or "cpu" in forms else None
    # JAX traces a form only once if it is the same function for several platforms.
    once = cache(_within)
    forms = {name: once("cuda" if name == "rocm" else name, f) for name, f in forms.items()}
    return lax.platform_dependent(*operands, default=_within(rest, default), **forms)


def _within(platform: str | None, form: Callable) -> Callable:
    """`form`, in which only the forms for `platform` are traced."""

    def apply(*operands: Any, **parameters: Any) -> Any:
        with tracing_for(platform):
            return form(*operands, **parameters)

    return apply


def run_where_data_are(program: Callable, *arguments: Any) -> Any:
    """program(*arguments), traced only in the form for the platform that holds all of the arrays.

    Arrays of NumPy go to the default device. `program` runs at once: a trace that becomes a part of
    another program may be lowered for any platform. If the arrays are on several platforms, all
    forms are traced.
    """
    arrays = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, Array)]
    devices = (a.sharding.device_set for a in arrays or [jax.device_put(0)])
    platforms = {device.platform for some in devices for device in some}
    with tracing_for(_named(*platforms)) if len(platforms) == 1 else nullcontext():
        return program(*arguments)


def _named(platform: str) -> str:
    """The name that JAX's lowering uses for the platform of a device."""
    return {"gpu": "cuda"}.get(platform, platform)


@cache
def quickly_compiled(function: Callable, **options: Any) -> Callable:
    """jax.jit(function, **options), which a CPU compiles in less time.

    Only a program that is not part of another one can choose its options.
    """
    return jax.jit(function, compiler_options=_quick_options(), **options)


@cache
def _quick_options() -> dict[str, Any]:
    """Options with which a CPU compiles a program of many small kernels in a third of the time.

    They are LLVM's first level of optimization, and the older of the two code generators of jaxlib
    0.10. Later versions lack it, which compiling an empty program finds out.
    """
    first_level = {"xla_backend_optimization_level": 1}
    if jax.default_backend() == "cpu":
        for options in (first_level | {"xla_cpu_use_fusion_emitters": False}, first_level):
            with suppress(jax.errors.JaxRuntimeError):
                jax.jit(lambda: (), compiler_options=options).lower().compile()
                return options
    return {}


def lowered_for_platform(function: Callable, choice: Choice, like: Any, *operands: Any) -> Any:
    """function(choice for the platform, *operands), traced when the program is lowered.

    The results have the shapes and dtypes of `like`. The function must not depend on traced values
    other than the operands.
    """
    platform = tracing_for.value
    if platform == ACCELERATOR:
        platform = None
    if platform is None and choice.cpu == choice.gpu == choice.tpu:
        platform = "cpu"
    if platform is not None:
        return function(choice.of(platform), *operands)
    if not mesh_of(operands).empty:
        # The axes of a mesh are known only while the surrounding program is traced.
        forms = {of: lambda *operands, of=of: function(of, *operands) for of in choice}
        cpu, gpu, tpu = (forms[of] for of in choice)
        return lax.platform_dependent(*operands, cpu=cpu, cuda=gpu, rocm=gpu, default=tpu)
    leaves, tree = jax.tree.flatten(operands)

    def form(platform: str, *leaves: Array) -> Sequence[Array]:
        return jax.tree.leaves(function(choice.of(platform), *jax.tree.unflatten(tree, leaves)))

    shapes, tree_of_results = jax.tree.flatten(like)
    return jax.tree.unflatten(tree_of_results, _bound(form, shapes, leaves))


def _bound(form: Callable, shapes: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    like = tuple(ShapedArray(a.shape, a.dtype) for a in shapes)
    return _form_p.bind(*operands, form=_as_set_now(form), like=like)


def _as_set_now(form: Callable) -> Callable:
    """The form, which will be traced with the current settings."""
    values = {name: getattr(jax.config, name) for name in SETTINGS}

    def apply(platform: str, *operands: Array) -> Sequence[Array]:
        with ExitStack() as stack:
            for name, value in values.items():
                stack.enter_context(SETTINGS[name](value))
            return form(platform, *operands)

    return apply


_form_p = Primitive("form_of_platform")
_form_p.multiple_results = True


def lower_by_platform(primitive: Any, apply_on: Callable[[str], Callable]) -> None:
    """Registers apply_on(platform) as the lowering of a primitive for each platform.

    Within it, only the forms for this platform are traced.
    """
    for name in ("cpu", "cuda", "rocm", ""):
        platform = name or "tpu"
        rule = mlir.lower_fun(_within(platform, apply_on(platform)), primitive.multiple_results)
        mlir.register_lowering(primitive, rule, platform=name or None)


def _form_on(platform: str) -> Callable[..., Sequence[Array]]:
    def apply(*operands: Array, form: Callable, like: Any) -> Sequence[Array]:
        return form(platform, *operands)

    return apply


lower_by_platform(_form_p, _form_on)


@_form_p.def_impl
def _evaluated(*operands: Array, form: Callable, like: Any) -> Sequence[Array]:
    platform = _named(jax.default_backend())
    return _within(platform, _form_on(platform))(*operands, form=form, like=like)


@_form_p.def_abstract_eval
def _types_of_results(*_, form: Callable, like: Any):
    return like


def _jvp(primals, tangents, *, form: Callable, like: Any):
    """The results, and their tangents as the results of a second form.

    The second form computes the intermediate values again, so that none of them is kept.
    """
    moved = [n for n, dot in enumerate(tangents) if not isinstance(dot, ad.Zero)]
    reals = [n for n, a in enumerate(like) if jnp.issubdtype(a.dtype, jnp.inexact)]
    count = len(primals)

    def tangent(platform: str, *operands: Array) -> Sequence[Array]:
        point, directions = operands[:count], operands[count:]

        def of_moved(*values: Array) -> Sequence[Array]:
            results = form(platform, *replaced(point, moved, values))
            return [results[n] for n in reals]

        return jax.jvp(of_moved, [point[n] for n in moved], list(directions))[1]

    values = _bound(form, like, primals)
    operands = (*primals, *(tangents[n] for n in moved))
    dots = _bound(tangent, [like[n] for n in reals], operands)
    nothing = [ad.Zero(a.to_tangent_aval()) for a in like]
    return values, replaced(nothing, reals, dots)


def _transpose(cotangents, *operands, form: Callable, like: Any):
    linear = [n for n, a in enumerate(operands) if ad.is_undefined_primal(a)]
    known = [n for n, _ in enumerate(operands) if n not in linear]
    types = [operands[n].aval for n in linear]
    count, length = len(known), len(operands)  # a form may keep no traced value

    def transposed(platform: str, *values: Array) -> Sequence[Array]:
        point = replaced([None] * length, known, values[:count])

        def of_linear(*values: Array) -> Sequence[Array]:
            return form(platform, *replaced(point, linear, values))

        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in types]
        return jax.linear_transpose(of_linear, *shapes)(list(values[count:]))

    given = [ad.instantiate_zeros(a) for a in cotangents]
    results = _bound(transposed, types, [*(operands[n] for n in known), *given])
    return replaced([None] * length, linear, results)


def _batched(operands, axes, *, form: Callable, like: Any):
    size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)

    def of_batch(platform: str, *operands: Array) -> Sequence[Array]:
        return jax.vmap(lambda *one: form(platform, *one), tuple(axes))(*operands)

    shapes = [jax.ShapeDtypeStruct((size, *a.shape), a.dtype) for a in like]
    return _bound(of_batch, shapes, operands), [0] * len(like)


def replaced(values: Sequence[Any], places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """The values, with those at `places` replaced by new ones."""
    every = list(values)
    for n, value in zip(places, new, strict=True):
        every[n] = value
    return every


ad.primitive_jvps[_form_p] = _jvp
ad.primitive_transposes[_form_p] = _transpose
batching.primitive_batchers[_form_p] = _batched

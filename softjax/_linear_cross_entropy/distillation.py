"""Distillation: the divergence of a student's predictions from a teacher's, without all logits.

This module has the public function, its arguments, reductions and meshes. pairs.py processes two
heads some rows at a time, and divergences.py has the terms of the divergences.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import TopKLabels, sparse_distribution
from softjax._linear_cross_entropy.blocks import Rows, Scalars
from softjax._linear_cross_entropy.comparison import Comparison, Rounding
from softjax._linear_cross_entropy.divergences import DIVERGENCES, Divergence
from softjax._linear_cross_entropy.examples import (
    checked_room,
    reduced,
    refuse_too_many,
    scale_of,
    with_active_rows,
    with_zeroed_rows,
)
from softjax._linear_cross_entropy.heads import (
    Head,
    checked_head,
    checked_scalars,
    checked_weights,
)
from softjax._linear_cross_entropy.layout import Call, Layout, alike, all_classes, call_of
from softjax._linear_cross_entropy.pairs import Pair, each_pair, total_pair
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.sharded import cast, mapped, padded, specs_of
from softjax._numerics import compute_dtype
from softjax._sharding import varying

NAME = "linear_distillation_loss"


class LinearHead(NamedTuple):
    """The last layer of a model with its inputs, as the teacher of `linear_distillation_loss`.

    Attributes:
        hidden: real [..., D].
        kernel: real [D, V].
        bias: real [V], or None.
        softcap: scalar > 0, or None.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> teacher = softjax.LinearHead(jnp.ones((1, 1)), jnp.array([[1.0, 0.0]]))
        >>> softjax.linear_distillation_loss(*teacher[:2], teacher)
        Array([0.], dtype=float32)
    """

    hidden: ArrayLike
    kernel: ArrayLike
    bias: ArrayLike | None = None
    softcap: ArrayLike | None = None


def linear_distillation_loss(
    hidden: ArrayLike,
    kernel: ArrayLike,
    teacher: LinearHead | TopKLabels,
    bias: ArrayLike | None = None,
    *,
    transpose_kernel: bool = False,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: str = "none",
    weights: ArrayLike | None = None,
    class_axis: str | tuple[str, ...] | None = None,
    feature_axis: str | tuple[str, ...] | None = None,
    max_temp_bytes: int | None = None,
    max_active: int | None = None,
) -> Array:
    """Divergence of a linear student from its teacher, without the logits of either.

        q = softmax((h W + b) / T) of the student, p of the teacher in the same way
        forward_kl: T^2 sum_k p_k log(p_k / q_k)        reverse_kl: T^2 sum_k q_k log(q_k / p_k)
        jensen_shannon: T^2 (b KL(p, m) + (1 - b) KL(q, m)),  m = b p + (1 - b) q,  b: beta

    If only the k most probable classes of a teacher are known, all other classes are treated as one
    class, the tail, which has the remaining probability. No mass of the teacher or of the student
    is dropped. A tail of the teacher within the rounding of its probabilities does not count as
    mass where the student has none; in the reverse KL, a tail below their unit roundoff counts as
    one unit roundoff, or as the student's tail if that is less.

    Derivative: both modes work at any order for every real argument, and never hold all logits. A
    sum or mean and its gradients by the student take four matrix products, one of them for the
    teacher; the reduction "none" takes six. The gradients by a teacher take two more, and none if
    it has no tangent: if jax.grad differentiates by arguments that contain both heads, stop the
    gradient of the teacher with jax.lax.stop_gradient(teacher).
    Over a mesh: as for linear_cross_entropy; the devices exchange five numbers per example.
    Edge cases: the divergence of equal students and teachers is exactly 0, with zero gradient. It
    is +inf if one head has mass on a class that the other removes by a bias of -inf. An example
    with weight 0 has no effect. A class that occurs twice among the k, or probabilities that sum
    to more than 1 (or to less, if k = V), give NaN under a trace.

    Args:
        hidden: real [..., D], of the student.
        kernel: real [D, V].
        teacher: LinearHead, which may have another number of features; or TopKLabels [..., k] with
            the probabilities at the temperature T, which sum to at most 1, or to 1 if k = V.
        bias: real [V].
        transpose_kernel: whether the kernels, also the teacher's, are [V, D].
        divergence: "forward_kl", "reverse_kl" or "jensen_shannon".
        beta: a number in (0, 1), only for "jensen_shannon". As beta tends to 0, the divergence
            divided by beta tends to the forward KL; as beta tends to 1, divided by 1 - beta, to the
            reverse KL.
        softcap: scalar > 0, of the student, as in linear_cross_entropy.
        temperature: scalar T > 0, of both heads. The factor T^2 keeps the size of the gradients.
        reduction: "none", "sum" or "mean".
        weights: real or boolean [...], >= 0: the weights of the examples. For an `ignore_index`,
            pass labels != ignore_index.
        class_axis: as in linear_cross_entropy, for both kernels.
        feature_axis: as in linear_cross_entropy, for both kernels.
        max_temp_bytes: as in linear_cross_entropy.
        max_active: as in linear_cross_entropy: the largest number of examples with a weight.

    Returns:
        Divergences [...] in nats, or one number, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a bad option, known
            probabilities that sum to more than 1, a known class twice, or more than `max_active`
            known weights.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> hidden, kernel = jnp.ones((1, 1)), jnp.zeros((1, 4))
        >>> teacher = softjax.TopKLabels(jnp.array([[2]]), jnp.array([[0.5]]))
        >>> softjax.linear_distillation_loss(hidden, kernel, teacher)  # log(4 / 3) / 2
        Array([0.14384104], dtype=float32)

    Source: G. Hinton et al., "Distilling the knowledge in a neural network" (2015); R. Agarwal et
        al., "On-policy distillation of language models" (2024), eq. (1) for beta.
    """
    for argument, value, allowed in (
        ("divergence", divergence, DIVERGENCES),
        ("reduction", reduction, ("none", "sum", "mean")),
    ):
        if value not in allowed:
            raise ValueError(_checks.message(NAME, argument, f"one of {allowed}", repr(value)))
    beta = _checks.not_negative_number(NAME, "beta", beta)
    if not 0 < beta < 1:
        raise ValueError(_checks.message(NAME, "beta", "in (0, 1)", beta))
    if beta != 0.5 and divergence != "jensen_shannon":
        expected = 'left out unless `divergence` is "jensen_shannon"'
        raise ValueError(_checks.message(NAME, "beta", expected, beta))
    head = checked_head(NAME, hidden, kernel, bias, transpose_kernel)
    scalars = checked_scalars(NAME, head, softcap, temperature)
    num_classes = all_classes(head.classes, class_axis)
    pair, rounding = _checked(head, scalars, teacher, temperature, num_classes)
    of_teacher = pair.teacher
    w = checked_weights(NAME, weights, head)
    max_active = checked_room(NAME, max_active, head.lead)
    of_examples = pair.student.rows, of_teacher and of_teacher.rows, w
    how = {"reduction": reduction, "budget": max_temp_bytes, "max_active": max_active}
    call = call_of(NAME, head.classes, of_examples, pair, class_axis, feature_axis, **how)
    refuse_too_many(NAME, call, None, w)
    axis, features = head.classes.axis, call.layout.size(call.layout.features)
    if of_teacher is not None and of_teacher.classes.kernel.shape[1 - axis] % features:
        expected = f"of features that {features} devices share"
        got = f"shape {of_teacher.classes.kernel.shape}"
        raise ValueError(_checks.message(NAME, "teacher.kernel", expected, got))
    return _reduced(call, Comparison((), divergence, beta, rounding), pair, w)


def _checked(
    head: Head, scalars: Scalars, teacher, temperature, num_classes: int
) -> tuple[Pair, Rounding | None]:
    """The two heads, or the student with the probabilities of the teacher and their rounding."""
    classes, dtype = head.classes, compute_dtype(head.hidden.dtype)
    if isinstance(teacher, TopKLabels):
        index, mass = sparse_distribution(NAME, teacher, (*head.lead, num_classes), "teacher")
        rounding, lists_all = _rounding_of(mass, dtype), mass.shape[-1] == num_classes
        is_sum = partial(_is_sum, rounding.room, lists_all)
        which = "1, since all classes are listed" if lists_all else "at most 1"
        for array, good, argument, expected in (
            (index, _is_set, "teacher.indices", "classes that are all different"),
            (mass, is_sum, "teacher.probabilities", f"numbers that sum to {which}"),
        ):
            with jax.ensure_compile_time_eval():  # also within a trace, if the teacher is known
                refused = _checks.checks_values(array) and not bool(jnp.all(good(array)))
            if refused:
                raise ValueError(_checks.message(NAME, argument, expected, "others"))
        bad = ~(is_sum(mass) & _is_set(index))
        mass = _checks.nan_where(bad[..., None], mass.astype(dtype))
        rows = Rows(head.hidden, index, mass)
        return Pair(Arguments(rows, classes, scalars), None), rounding
    if not isinstance(teacher, tuple) or not 2 <= len(teacher) <= 4:
        expected, got = "a LinearHead or TopKLabels", type(teacher).__name__
        raise TypeError(_checks.message(NAME, "teacher", expected, got))
    given = LinearHead(*teacher)
    other = checked_head(NAME, *given[:3], classes.axis == 0, prefix="teacher.")
    if other.lead != head.lead or other.classes.length != classes.length:
        got = f"hidden {other.hidden.shape} and kernel {other.classes.kernel.shape}"
        expected = f"a head of examples {head.lead} and {classes.length} classes"
        raise ValueError(_checks.message(NAME, "teacher", expected, got))
    of_teacher = checked_scalars(NAME, other, given.softcap, temperature)
    rows = [Rows(h.hidden) for h in (head, other)]
    student = Arguments(rows[0], classes, scalars)
    return Pair(student, Arguments(rows[1], other.classes, of_teacher)), None


def _rounding_of(mass: Array, dtype: jnp.dtype) -> Rounding:
    """The rounding of k probabilities that are computed in `dtype`.

    Each is rounded once to its own dtype. A sum of k terms, by which they were divided, is computed
    at least in float32.
    """
    wide = compute_dtype(mass.dtype)
    own, of_sum = (max(float(jnp.finfo(a).eps) for a in (a, dtype)) for a in (mass.dtype, wide))
    return Rounding(own / 2, min(4 * (own + mass.shape[-1] * of_sum), 0.1))


def _is_sum(room: float, lists_all: bool, mass: Array) -> Array:
    """Whether probabilities sum to at most 1, or to 1 if all classes are listed."""
    total = jnp.sum(mass.astype(compute_dtype(mass.dtype)), -1)
    return (total <= 1 + room) & (total >= 1 - room) if lists_all else total <= 1 + room


def _is_set(index: Array) -> Array:
    """Whether all indices of a row are different."""
    ordered = jnp.sort(index, -1)
    return jnp.all(ordered[..., 1:] != ordered[..., :-1], -1)


@partial(jax.jit, static_argnums=(0, 1))
def _reduced(call: Call, comparison: Comparison, pair: Pair, weights: Array | None) -> Array:
    pair, weights = alike(call.layout, (pair, weights))
    weights = jax.tree.map(call.lead.flat, weights)

    def flat(head: Arguments) -> Arguments:
        rows = with_active_rows(jax.tree.map(call.lead.flat, head.rows), weights)
        return head._replace(rows=with_zeroed_rows(call, rows))

    heads = tuple(flat(head) for head in pair if head is not None)
    scale = scale_of(heads[0].rows, weights, None, call.reduction)
    wide = jnp.result_type(*(compute_dtype(head.rows.hidden.dtype) for head in heads))
    losses = partial(_on_mesh, call.layout, comparison, call.budget)
    return reduced(call, heads, weights, scale.astype(wide), losses)


def _on_mesh(
    layout: Layout,
    comparison: Comparison,
    budget: int | None,
    heads: tuple[Arguments, ...],
    scale: Array | None,
) -> Array:
    """The losses of all rows on their devices; with a `scale`, the scaled sum of the losses."""
    axes = layout.classes
    comparison = comparison._replace(axes=axes)

    def local(student: Arguments, teacher: Arguments | None, scale: Array | None) -> Array:
        pair = Pair(student, None if teacher is None else cast(layout, teacher))
        pair, scale = varying((pair, scale), axes)
        if scale is None:
            return lax.psum(each_pair(comparison, budget, pair), axes)
        return lax.psum(total_pair(comparison, budget, pair, scale), layout.rows + axes)

    student, teacher = heads if len(heads) == 2 else (*heads, None)
    count, of_rows, of_teacher = student.rows.hidden.shape[0], P(layout.rows), None
    if teacher is not None and not layout.is_local:
        teacher = padded(layout, teacher)
        of_teacher = specs_of(layout, teacher)
    specs = of_teacher, None if scale is None else of_rows
    out_specs = of_rows if scale is None else P()
    values = mapped(layout, local, student, (teacher, scale), specs, out_specs)
    return layout.rows_of(values, count) if scale is None else values

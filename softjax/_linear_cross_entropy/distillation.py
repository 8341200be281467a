"""Distillation: the divergence of a student's predictions from a teacher's, without all logits.

The public function, its arguments, reductions and meshes. pairs.py has the two heads, some rows at
a time, and divergences.py the terms.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from softjax import _checks
from softjax._cross_entropy import weighted_mean
from softjax._labels import TopKLabels, sparse_distribution
from softjax._linear_cross_entropy.blocks import Rows, Scalars
from softjax._linear_cross_entropy.divergences import DIVERGENCES, Divergence
from softjax._linear_cross_entropy.heads import (
    Head,
    checked_budget,
    checked_head,
    checked_scalars,
    checked_weights,
)
from softjax._linear_cross_entropy.layout import Layout, alike, all_classes, layout_of
from softjax._linear_cross_entropy.pairs import Pair, divergences, each_pair
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.sharded import cast, mapped, padded, specs_of
from softjax._numerics import compute_dtype
from softjax._sharding import Lead, mesh_of, varying
from softjax._weights import is_zero

NAME = "linear_distillation_loss"


class LinearHead(NamedTuple):
    """The last layer of a model on its inputs, as the teacher of `linear_distillation_loss`.

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
) -> Array:
    """Divergence of a linear student from its teacher, without the logits of either.

        q = softmax((h W + b) / T) of the student, p of the teacher in the same way
        forward_kl: T^2 sum_k p_k log(p_k / q_k)        reverse_kl: T^2 sum_k q_k log(q_k / p_k)
        jensen_shannon: T^2 (b KL(p, m) + (1 - b) KL(q, m)),  m = b p + (1 - b) q,  b: beta

    From a teacher's k most probable classes, all other classes are one, with the probability that
    is left of 1: no mass is dropped, and none of that of the student.

    Derivative: both modes, any order, by every array of real numbers among the arguments, without
    all logits either. The teacher costs nothing where it has no tangent; for jax.grad by arguments
    that hold both, stop the gradient: jax.lax.stop_gradient(teacher).
    Over a mesh: as linear_cross_entropy; five numbers an example go over the wire.
    Edge cases: equal students and teachers: exactly 0, with zero gradient; mass on a class that the
    other takes out by a bias of -inf: +inf. An example of weight 0 takes no part. A class twice
    among the k, or more than 1 in all: NaN under a trace.

    Args:
        hidden: real [..., D], of the student.
        kernel: real [D, V].
        teacher: LinearHead, with features of its own number; or TopKLabels [..., k] with
            probabilities that are those at the temperature T, and sum to at most 1.
        bias: real [V].
        transpose_kernel: whether the kernels, that of a teacher too, are [V, D].
        divergence: "forward_kl", "reverse_kl" or "jensen_shannon".
        beta: a number in (0, 1), for "jensen_shannon". Over beta, or over 1 - beta, it tends to
            the forward or to the reverse KL where that tends to 0.
        softcap: scalar > 0, of the student, as in linear_cross_entropy.
        temperature: scalar T > 0, of both. The factor T^2 keeps the size of the gradients.
        reduction: "none", "sum" or "mean".
        weights: real or boolean [...], >= 0: the weights of the examples.
        class_axis: as in linear_cross_entropy; the kernel of the teacher has its classes there too.
        feature_axis: as in linear_cross_entropy, for both kernels.
        max_temp_bytes: as in linear_cross_entropy.

    Returns:
        Divergences [...] in nats, or one number, at least float32.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit, known probabilities that
            sum to more than 1, or a known class twice.

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
    checked_budget(NAME, max_temp_bytes)
    head = checked_head(NAME, hidden, kernel, bias, transpose_kernel)
    dtype = compute_dtype(head.hidden.dtype)
    scalars = checked_scalars(NAME, dtype, softcap, temperature)
    num_classes = all_classes(head.classes, class_axis)
    student, of_teacher = _checked(head, scalars, teacher, temperature, num_classes)
    pair = Pair(student, of_teacher)
    w = checked_weights(NAME, weights, head)
    of_examples = jax.tree.leaves((pair.student.rows, of_teacher and of_teacher.rows, w))
    kernel, axis = head.classes.kernel, head.classes.axis
    lead = Lead.of(mesh_of((pair, w)), len(head.lead), kernel, axis, *of_examples)
    layout = layout_of(NAME, lead, head.classes, class_axis, feature_axis)
    features = 1 if layout is None else layout.size(layout.features)
    if of_teacher is not None and of_teacher.classes.kernel.shape[1 - axis] % features:
        expected = f"of features that {features} devices share"
        got = f"shape {of_teacher.classes.kernel.shape}"
        raise ValueError(_checks.message(NAME, "teacher.kernel", expected, got))
    kind = divergence, beta
    return _reduced(pair, w, kind, reduction, lead, layout, max_temp_bytes)


def _checked(head: Head, scalars: Scalars, teacher, temperature, num_classes: int) -> Pair:
    """The two heads, or the student with the probabilities that the teacher gives."""
    classes, dtype = head.classes, compute_dtype(head.hidden.dtype)
    if isinstance(teacher, TopKLabels):
        index, mass = sparse_distribution(NAME, teacher, (*head.lead, num_classes))
        for array, good, argument, expected in (
            (mass, _is_part, "teacher.probabilities", "numbers that sum to at most 1"),
            (index, _is_set, "teacher.indices", "classes that are all different"),
        ):
            with jax.ensure_compile_time_eval():  # within a trace too, where the teacher is known
                refused = _checks.checks_values(array) and not bool(jnp.all(good(array)))
            if refused:
                raise ValueError(_checks.message(NAME, argument, expected, "others"))
        bad = ~(_is_part(mass) & _is_set(index))
        mass = _checks.nan_where(bad[..., None], mass.astype(dtype))
        rows = Rows(head.hidden, index, mass, None, None)
        return Pair(Arguments(rows, classes, scalars), None)
    if not isinstance(teacher, tuple) or not 2 <= len(teacher) <= 4:
        expected, got = "a LinearHead or TopKLabels", type(teacher).__name__
        raise TypeError(_checks.message(NAME, "teacher", expected, got))
    given = LinearHead(*teacher)
    other = checked_head(NAME, *given[:3], classes.axis == 0, prefix="teacher.")
    if other.lead != head.lead or other.classes.length != classes.length:
        got = f"hidden {other.hidden.shape} and kernel {other.classes.kernel.shape}"
        expected = f"a head of examples {head.lead} and {classes.length} classes"
        raise ValueError(_checks.message(NAME, "teacher", expected, got))
    wide = compute_dtype(other.hidden.dtype)
    of_teacher = checked_scalars(NAME, wide, given.softcap, temperature)
    rows = [Rows(h.hidden, None, None, None, None) for h in (head, other)]
    student = Arguments(rows[0], classes, scalars)
    return Pair(student, Arguments(rows[1], other.classes, of_teacher))


def _is_part(mass: Array) -> Array:
    """Whether probabilities sum to at most 1, to the precision of their dtype."""
    room = 4 * float(jnp.finfo(mass.dtype).eps) * max(mass.shape[-1], 1)
    return jnp.sum(mass.astype(compute_dtype(mass.dtype)), -1) <= 1 + room


def _is_set(index: Array) -> Array:
    """Whether no index stands twice."""
    ordered = jnp.sort(index, -1)
    return jnp.all(ordered[..., 1:] != ordered[..., :-1], -1)


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _reduced(
    pair: Pair,
    weights: Array | None,
    kind: tuple[Divergence, float],
    reduction: str,
    lead: Lead,
    layout: Layout | None,
    budget: int | None,
) -> Array:
    pair, weights = alike(layout, (pair, weights))
    weights = jax.tree.map(lead.flat, weights)
    counted = None if weights is None else ~is_zero(weights)

    def flat(head: Arguments) -> Arguments:
        rows = jax.tree.map(lead.flat, head.rows)
        if counted is not None:
            # What an example brings that takes no part may be anything, and 0 * inf is not 0.
            rows = rows._replace(hidden=jnp.where(counted[:, None], rows.hidden, 0))
        return head._replace(rows=rows)

    pair = Pair(flat(pair.student), None if pair.teacher is None else flat(pair.teacher))
    losses = _on_mesh(layout, kind, budget, pair)
    if counted is not None:
        losses = jnp.where(counted, losses, 0)
    if reduction == "mean":
        return weighted_mean(losses, weights)
    losses = losses if weights is None else losses * weights.astype(losses.dtype)
    return lead.back(losses) if reduction == "none" else jnp.sum(losses)


def _on_mesh(layout: Layout | None, kind, budget: int | None, pair: Pair) -> Array:
    """The losses of all rows, where they are."""
    if layout is None:
        return each_pair(partial(divergences, (), *kind), budget, pair)
    axes = layout.classes

    def local(student: Arguments, teacher: Arguments | None) -> Array:
        pair = Pair(cast(layout, student), None if teacher is None else cast(layout, teacher))
        values = each_pair(partial(divergences, axes, *kind), budget, varying(pair, axes))
        return lax.psum(values, axes) if axes else values

    if layout.is_manual:
        return local(*pair)
    count = pair.student.rows.hidden.shape[0]
    student = padded(layout, pair.student)
    teacher = None if pair.teacher is None else padded(layout, pair.teacher)
    specs = (None if teacher is None else specs_of(layout, teacher),)
    values = mapped(layout, local, student, (teacher,), specs, P(layout.rows))
    return layout.as_rows(values[:count])

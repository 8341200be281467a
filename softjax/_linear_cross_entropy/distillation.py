"""Distillation: the divergence of a student's predictions from a teacher's, without all logits.

The public function and its arguments come first, then the losses of some rows with their
derivative, and then the same on a mesh. The divergences themselves are in divergences.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from softjax import _checks
from softjax._cross_entropy import weighted_mean
from softjax._labels import TopKLabels, sparse_distribution
from softjax._linear_cross_entropy.blocks import (
    Block,
    Rows,
    Scalars,
    Statistics,
    block_of,
    class_logits,
    distance,
    log_total,
    top_and_excess,
)
from softjax._linear_cross_entropy.divergences import (
    DIVERGENCES,
    Divergence,
    divergence_terms,
)
from softjax._linear_cross_entropy.entry import (
    Head,
    checked_budget,
    checked_head,
    checked_scalars,
    checked_weights,
)
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    block_dots,
    dots_of,
    jvp_along,
    put,
    shapes_of,
    some_rows,
    sweep,
    times_classes,
)
from softjax._linear_cross_entropy.plans import rows_of_pairs
from softjax._linear_cross_entropy.sharded import (
    Layout,
    alike,
    all_classes,
    cast,
    first_class,
    joined,
    layout_of,
    mapped,
    padded,
    specs_of,
)
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


class Pair(NamedTuple):
    """The student and the teacher; or the student alone, with the top k of the teacher as rows."""

    student: Arguments
    teacher: Arguments | None


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
        return _each(partial(_losses, (), *kind), budget, pair)
    axes = layout.classes

    def local(student: Arguments, teacher: Arguments | None) -> Array:
        pair = Pair(cast(layout, student), None if teacher is None else cast(layout, teacher))
        values = _each(partial(_losses, axes, *kind), budget, varying(pair, axes))
        return lax.psum(values, axes) if axes else values

    if layout.is_manual:
        return local(*pair)
    count = pair.student.rows.hidden.shape[0]
    student = padded(layout, pair.student)
    teacher = None if pair.teacher is None else padded(layout, pair.teacher)
    specs = (None if teacher is None else specs_of(layout, teacher),)
    values = mapped(layout, local, student, (teacher,), specs, P(layout.rows))
    return layout.as_rows(values[:count])


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _each(losses: Callable, budget: int | None, pair: Pair) -> Array:
    """The losses of the blocks of some rows at a time."""

    def step(values, pair, start, size):
        part = _some(pair, start, size)
        return put(values, losses(part, _blocks(part)), start, 0)

    shape = jax.eval_shape(lambda pair: losses(pair, _blocks(pair)), pair)
    zeros = jnp.zeros(shape.shape, shape.dtype)
    size = rows_of_pairs(shapes_of(pair.student), budget)
    return sweep(step, zeros, pair, shape.shape[0], size)


@partial(_each.defjvp, symbolic_zeros=True)
def _each_jvp(losses, budget, primals, tangents):
    """sum_k g_k (h W)_dot_k as <h_dot, g W^T> + <h, g W_dot^T> for each head, and the rest.

    Every product has g as a factor, in the dtype of the inputs, and so has its transpose.
    """
    (pair,), (dots,) = primals, dots_of(tangents)
    values = _each(losses, budget, pair)
    # In reverse their cotangents add up over the steps in this dtype, and are rounded once.
    dots = jax.tree.map(lambda dot: dot.astype(values.dtype), dots)

    def step(values_dot, operands, start, size):
        part, part_dots = (_some(a, start, size) for a in operands)
        blocks, of_part = _blocks(part), partial(losses, part)
        beside = [None if dots is None else block_dots(None, dots) for dots in part_dots]
        beside = jax.tree.map(
            lambda a, dot: None if dot is None else dot.astype(a.dtype),
            blocks,
            beside,
            is_leaf=lambda a: a is None,
        )
        new = jnp.zeros(size, values.dtype)
        if jax.tree.leaves(beside):
            new += jvp_along(of_part, (blocks,), (beside,))
        for n, (head, head_dots) in enumerate(zip(part, part_dots, strict=True)):
            if head_dots is not None:
                new += _through_product(of_part, n, head, head_dots, blocks)
        return put(values_dot, new, start, 0)

    zeros, size = jnp.zeros_like(values), rows_of_pairs(shapes_of(pair.student), budget)
    return values, sweep(step, zeros, (pair, dots), values.shape[0], size)


def _through_product(
    losses: Callable, n: int, head: Arguments, dots: Arguments, blocks: list[Block | None]
) -> Array | float:
    """The tangent of the losses by the product of a head."""
    hidden_dot, kernel_dot = dots.rows.hidden, dots.classes.kernel
    if hidden_dot is None and kernel_dot is None:
        return 0

    def of_product(product: Array) -> Array:
        block = blocks[n]
        assert block is not None
        return losses([*blocks[:n], block._replace(product=product), *blocks[n + 1 :]])

    value, pull = jax.vjp(of_product, blocks[n].product)
    (g,) = pull(jnp.ones_like(value))
    hidden, kernel, axis = head.rows.hidden, head.classes.kernel, head.classes.axis
    g = g.astype(hidden.dtype)
    l_dot = jnp.zeros_like(value)
    if hidden_dot is not None:
        l_dot += jnp.sum(hidden_dot * times_classes(g, kernel, axis, value.dtype), -1)
    if kernel_dot is not None:
        back = times_classes(g, kernel_dot.astype(g.dtype), axis, g.dtype)
        l_dot += jnp.sum((hidden * back).astype(l_dot.dtype), -1)
    return l_dot


def _some(pair: Any, start: Array | int, size: int) -> Pair:
    return Pair(*(None if head is None else some_rows(head, start, size) for head in pair))


def _blocks(pair: Pair) -> list[Block | None]:
    return [None if head is None else block_of(*head) for head in pair]


def _losses(
    axes: tuple[str, ...],
    divergence: Divergence,
    beta: float,
    part: Pair,
    blocks: list[Block | None],
) -> Array:
    """What the classes of a device, which are all where there are no axes, add to the losses."""
    student, teacher = blocks
    assert student is not None
    x, s, log_q = _log_probabilities(axes, student)
    if teacher is None:
        log_p, log_q = _with_tail(axes, part.student, student, x, s, log_q)
    else:
        _, _, log_p = _log_probabilities(axes, teacher)
    dtype = jnp.promote_types(log_p.dtype, log_q.dtype)
    terms = divergence_terms(log_p.astype(dtype), log_q.astype(dtype), divergence, beta)
    loss, temperature = jnp.sum(terms, -1), student.scalars.temperature
    return loss if temperature is None else temperature.astype(dtype) ** 2 * loss


def _log_probabilities(axes: tuple[str, ...], block: Block) -> tuple[Array, Statistics, Array]:
    """Logits before T divides them, their statistics over all classes, and log softmax."""
    temperature = block.scalars.temperature
    x = class_logits(block.product, block.bias, block.scalars.softcap)
    s = _statistics(axes, x, temperature)
    return x, s, distance(x, s.top[:, None], temperature) - log_total(s)[:, None]


def _statistics(axes: tuple[str, ...], x: Array, temperature: Array | None) -> Statistics:
    s = Statistics(*top_and_excess(x, temperature), None, None, None)
    return joined(s, axes, temperature) if axes else s


def _with_tail(
    axes: tuple[str, ...], part: Arguments, block: Block, x: Array, s: Statistics, log_q: Array
) -> tuple[Array, Array]:
    """log p and log q of the k classes of the teacher and, last, of all others as one class.

    The student's tail is a sum over the others, and the teacher's an exact difference: no 1 - P
    that has been rounded is left. What other devices have is without probability here.
    """
    index, mass, temperature = part.rows.index, block.mass, block.scalars.temperature
    assert index is not None
    assert mass is not None
    index = index - first_class(axes, part) if axes else index
    inside = (index >= 0) & (index < x.shape[-1])
    place = jnp.where(inside, index, x.shape[-1])
    row = jnp.arange(x.shape[0])[:, None]
    is_listed = jnp.zeros_like(x, bool).at[row, place].set(True, mode="drop")
    others = _statistics(axes, jnp.where(is_listed, -jnp.inf, x), temperature)
    tail_q = distance(others.top, s.top, temperature) + (log_total(others) - log_total(s))
    tail_q = jnp.where(others.excess < 0, -jnp.inf, tail_q)
    is_here = jnp.ones_like(tail_q, bool) if not axes else lax.axis_index(axes) == 0

    at = jnp.where(inside, index, 0)
    listed_q = jnp.take_along_axis(log_q, at, -1, mode="promise_in_bounds")
    log_p = jnp.concatenate((_log(mass), _log(_rest(mass))[:, None]), -1)
    log_q = jnp.concatenate((listed_q, tail_q[:, None]), -1)
    here = jnp.concatenate((inside, jnp.broadcast_to(is_here, tail_q.shape)[:, None]), -1)
    return jnp.where(here, log_p, -jnp.inf), jnp.where(here, log_q, -jnp.inf)


def _log(p: Array) -> Array:
    """log p, with the slope 0 where p is 0."""
    return jnp.where(p == 0, -jnp.inf, jnp.log(jnp.where(p == 0, 1, p)))


def _rest(mass: Array) -> Array:
    """1 - sum of the masses, at least 0, as if rounded once: every sum keeps what it rounds off.

    Source: D. E. Knuth, "The art of computer programming", volume 2, section 4.2.2, theorem B.
    """
    a = jnp.concatenate((jnp.ones_like(mass[:, :1]), -mass), -1)
    lost = jnp.zeros_like(a)
    while a.shape[-1] > 1:
        if a.shape[-1] % 2:
            a, lost = (jnp.pad(x, ((0, 0), (0, 1))) for x in (a, lost))
        b, a = a[:, 1::2], a[:, ::2]
        total = a + b
        part = total - a
        lost = lost[:, ::2] + lost[:, 1::2] + ((a - (total - part)) + (b - part))
        a = total
    rest = (a + lost)[:, 0]
    return jnp.where(rest < 0, 0, rest)

"""The comparison of two heads on the same rows: the losses of their blocks, and their tangents.

With p of the teacher, q of the student and f_k the derivative of a divergence by log q_k,

    dl / d(x_k / T) = T^2 (f_k - q_k sum_i f_i)

for the logits x of the student, and likewise for the logits of the teacher. If only the top k of a
teacher are known, all other classes form one class, the tail, with q_tail = the sum of their q_k.
Then

    f_k = f_tail q_k / q_tail    for a class that is not listed
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._linear_cross_entropy.blocks import (
    Block,
    Statistics,
    class_logits,
    indexed,
    log_total,
    scaled_logit_tangent,
)
from softjax._linear_cross_entropy.divergences import (
    ADD_UP_TO_0,
    Compared,
    Divergence,
    compared,
    compared_softmaxes,
    divergence_slopes,
    divergence_terms,
)
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.shards import first_class, joined, joined_gap
from softjax._linear_cross_entropy.tops import distance, top_and_excess, tops_and_gap
from softjax._numerics import not_negative
from softjax._sharding import taken_along

# The blocks of the student and of the teacher (None for top k labels); and tangents of both.
Blocks = tuple[Block, Block | None]
Dots = Sequence[Block | None]


class Side(NamedTuple):
    """A head: its logits x before they are divided by T, d, and the statistics of all classes."""

    x: Array
    d: Array
    s: Statistics


class Rounding(NamedTuple):
    """How exactly the probabilities that a teacher lists are known."""

    # The unit roundoff of the probabilities: no smaller tail can be told from none.
    unit: float
    # The largest difference from 1 that the sum of all probabilities has by rounding.
    room: float


class Tail(NamedTuple):
    """The k classes that a teacher lists, if this device has them, and all other classes."""

    index: Array  # [n, k], relative to the first class of this device
    inside: Array  # [n, k]
    is_listed: Array  # [n, v]
    others: Statistics
    log_q: Array  # [n], of the student
    is_here: Array  # [n], whether this device counts the tail


class Contrast(NamedTuple):
    """Two heads on the same rows; the teacher is a side, or the classes that it lists."""

    blocks: Blocks
    student: Side
    teacher: Side | None
    tail: Tail | None
    sizes: Compared


class Comparison(NamedTuple):
    """A divergence of two heads, whose classes are sharded over the axes."""

    axes: tuple[str, ...]
    divergence: Divergence
    beta: float
    rounding: Rounding | None  # of a teacher that lists probabilities

    def contrast(self, part: Arguments, blocks: Blocks) -> Contrast:
        """The two heads on the rows of the student."""
        teacher = tail = None
        if blocks[1] is not None:
            student, teacher, gap = self._sides(blocks[0], blocks[1])
            sides = teacher.d, teacher.s.excess, student.d, student.s.excess
            sizes = compared_softmaxes(*sides, gap)
        else:
            x, temperature = _logits(blocks[0]), blocks[0].scalars.temperature
            student = _side(x, self._statistics(x, temperature), temperature)
            tail = self._tail(part, student, temperature)
            sizes = self._compared_with_tail(blocks[0], student, tail)
        if (active := part.rows.active) is not None:
            # An inactive row is compared with itself: its loss and gradient are 0.
            delta = jnp.where(active[:, None], sizes.delta, 0)
            sizes = sizes._replace(delta=delta)
        return Contrast(blocks, student, teacher, tail, sizes)

    def losses(self, contrast: Contrast) -> Array:
        """The losses of the rows; on a mesh, the contribution of this device."""
        terms = divergence_terms(contrast.sizes, self.divergence, self.beta)
        loss, temperature = jnp.sum(terms, -1), contrast.blocks[0].scalars.temperature
        return loss if temperature is None else temperature.astype(loss.dtype) ** 2 * loss

    def tangent(self, contrast: Contrast, dots: Dots) -> Array:
        """The tangent of the losses along `dots`, in which None is a zero tangent."""
        blocks, student, teacher, tail, sizes = contrast
        by_p, by_q = divergence_slopes(sizes, self.divergence, self.beta)
        l_dot = jnp.zeros(by_p.shape[:1], by_p.dtype)
        mass, of_student = blocks[0].mass, dots[0]
        if tail is not None:
            by_q = self._slopes_of_classes(by_q, blocks[0], student, tail)
            if mass is not None and of_student is not None and of_student.mass is not None:
                log_p = partial(self._log_probabilities, log_q_tail=tail.log_q)
                log_p_dot = jax.jvp(log_p, (mass,), (of_student.mass,))[1]
                l_dot += jnp.sum(by_p * jnp.where(_here(tail), log_p_dot, 0), -1)
        add_up = ADD_UP_TO_0.get(self.divergence, (False, False))
        sides = (teacher, blocks[1], dots[1], by_p), (student, blocks[0], dots[0], by_q)
        for (side, block, dot, slope), adds_up in zip(sides, add_up, strict=True):
            if side is None or block is None or dot is None:
                continue
            d = side.d.astype(jnp.result_type(block.product))
            z_dot = scaled_logit_tangent(block, d, dot)
            if z_dot is not None:
                g = slope if adds_up else slope - _probabilities(side) * self._over_classes(slope)
                l_dot += jnp.sum(g * z_dot.astype(g.dtype), -1)
        temperature = blocks[0].scalars.temperature
        if temperature is None:
            return l_dot
        l_dot *= temperature.astype(l_dot.dtype) ** 2
        if of_student is not None and of_student.scalars.temperature is not None:
            # The relative change of the factor T^2 is 2 T_dot / T.
            ratio_dot = of_student.scalars.temperature / temperature
            l_dot += 2 * ratio_dot.astype(l_dot.dtype) * self.losses(contrast)
        return l_dot

    def _sides(self, block: Block, of_teacher: Block) -> tuple[Side, Side, Array]:
        """The student, the teacher, and the excess of the teacher minus that of the student."""
        p, q = _logits(of_teacher), _logits(block)
        dtype, temperature = jnp.result_type(p, q), block.scalars.temperature
        p, q, temperature = jax.tree.map(lambda a: a.astype(dtype), (p, q, temperature))
        of_p, of_q, gap = tops_and_gap(p, q, temperature)
        s = Statistics(*of_p), Statistics(*of_q)
        if self.axes:
            gap, s = joined_gap(gap, s, self.axes, temperature)
        return _side(q, s[1], temperature), _side(p, s[0], temperature), gap

    def _statistics(self, x: Array, temperature: Array | None) -> Statistics:
        s = Statistics(*top_and_excess(x, temperature))
        return joined(s, self.axes, temperature) if self.axes else s

    def _tail(self, part: Arguments, student: Side, temperature: Array | None) -> Tail:
        index, width = part.rows.index, student.x.shape[-1]
        assert index is not None
        index = index - first_class(self.axes, part)
        inside = (index >= 0) & (index < width)
        row, place = jnp.arange(index.shape[0])[:, None], jnp.where(inside, index, width)
        is_listed = jnp.zeros_like(student.x, bool).at[row, place].set(True, mode="drop")
        others = self._statistics(jnp.where(is_listed, -jnp.inf, student.x), temperature)
        log_q = distance(others.top, student.s.top, temperature)
        log_q += log_total(others) - log_total(student.s)
        log_q = jnp.where(others.excess < 0, -jnp.inf, log_q)
        is_here = jnp.ones_like(others.top, bool)
        if self.axes:
            is_here &= lax.axis_index(self.axes) == 0
        return Tail(index, inside, is_listed, others, log_q, is_here)

    def _compared_with_tail(self, block: Block, student: Side, tail: Tail) -> Compared:
        """The classes that the teacher lists and, last, the tail.

        The student's tail is a sum over the other classes, and the teacher's an exact difference,
        so that no rounded 1 - P is used. Classes of other devices have probability 0 here.
        """
        assert block.mass is not None
        at = jnp.where(tail.inside, tail.index, 0)
        listed = taken_along(student.x, at, -1, "promise_in_bounds")
        listed = distance(listed, student.s.top[:, None], block.scalars.temperature)
        log_q = jnp.concatenate((listed - log_total(student.s)[:, None], tail.log_q[:, None]), -1)
        log_p = self._log_probabilities(block.mass, tail.log_q)
        dtype, here = jnp.result_type(log_p, log_q), _here(tail)
        return compared(*(jnp.where(here, a.astype(dtype), -jnp.inf) for a in (log_p, log_q)))

    def _log_probabilities(self, mass: Array, log_q_tail: Array) -> Array:
        """log p of the classes that the teacher lists and, last, of the tail.

        A tail below the unit roundoff is not known, not even its sign. The same holds below the
        error of a whole sum where the student has no tail, as when all classes are listed. There
        the tail is at most the student's, which adds nothing to the divergence, and the listed
        probabilities are divided by their sum. The reverse KL tends to +inf as the teacher's tail
        tends to 0; an unknown tail counts there as one unit roundoff, or as the student's.
        """
        assert self.rounding is not None
        unit, room = self.rounding
        rest = _rest(mass)
        has_tail = log_q_tail >= math.log(jnp.finfo(log_q_tail.dtype).tiny)
        unknown = rest < jnp.where(has_tail, unit, room).astype(rest.dtype)
        most = jnp.full_like(rest, unit) if self.divergence == "reverse_kl" else rest
        unknown_tail = jnp.minimum(_log(jnp.maximum(most, 0)), log_q_tail.astype(rest.dtype))
        of_tail = jnp.where(unknown, unknown_tail, _log(jnp.where(unknown, 1, rest)))
        log_sum = jnp.log1p(-jnp.where(unknown, rest, 0))
        return jnp.concatenate((_log(mass) - log_sum[:, None], of_tail[:, None]), -1)

    def _slopes_of_classes(self, by_q: Array, block: Block, student: Side, tail: Tail) -> Array:
        """The slopes by log q of all classes, from the slopes of the listed ones and the tail."""
        others, by_tail = tail.others, by_q[:, -1]
        by_tail = lax.psum(by_tail, self.axes) if self.axes else by_tail
        d = distance(student.x, others.top[:, None], block.scalars.temperature)
        share = jnp.exp(d) / (1 + not_negative(others.excess))[:, None]
        listed = indexed(tail.index, by_q[:, :-1], student.x.shape[-1])
        return jnp.where(tail.is_listed, listed, by_tail[:, None] * share)

    def _over_classes(self, slope: Array) -> Array:
        whole = jnp.sum(slope, -1, keepdims=True)
        return lax.psum(whole, self.axes) if self.axes else whole


def _logits(block: Block) -> Array:
    return class_logits(block.product, block.bias, block.scalars.softcap)


def _side(x: Array, s: Statistics, temperature: Array | None) -> Side:
    return Side(x, distance(x, s.top[:, None], temperature), s)


def _probabilities(side: Side) -> Array:
    return jnp.exp(side.d) / (1 + not_negative(side.s.excess))[:, None]


def _here(tail: Tail) -> Array:
    return jnp.concatenate((tail.inside, tail.is_here[:, None]), -1)


def _log(p: Array) -> Array:
    """log p, with the derivative 0 if p is 0."""
    return jnp.where(p == 0, -jnp.inf, jnp.log(jnp.where(p == 0, 1, p)))


def _rest(mass: Array) -> Array:
    """1 - sum of the masses, rounded only once: each addition keeps its rounding error.

    Source: D. E. Knuth, "The art of computer programming", volume 2, section 4.2.2, theorem B.
    """
    a = jnp.pad(-mass, ((0, 0), (1, 0)), constant_values=1)
    lost = jnp.zeros_like(a)
    while a.shape[-1] > 1:
        if a.shape[-1] % 2:
            a, lost = (jnp.pad(x, ((0, 0), (0, 1))) for x in (a, lost))
        b, a = a[:, 1::2], a[:, ::2]
        total = a + b
        part = total - a
        lost = lost[:, ::2] + lost[:, 1::2] + ((a - (total - part)) + (b - part))
        a = total
    return (a + lost)[:, 0]

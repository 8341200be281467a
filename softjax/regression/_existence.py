"""Whether there is an optimum, as far as the data and the penalties say.

The objective is convex. It has an optimum where a penalty holds the kernel and every class has
examples, which hold the biases; without a penalty it has one unless the classes are separated,
which `_separation` proves.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from softjax.regression._objective import (
    Data,
    Problem,
    class_scores,
    penalised,
    with_offset,
    without_offset,
)
from softjax.regression._result import Status


def is_penalised(problem: Problem | Data) -> Any:
    """Whether a penalty holds those features whose factor is not 0."""
    penalised = (problem.l2 > 0) | (problem.l1 > 0)
    return penalised if problem.l1_rows is None else penalised | (problem.l1_rows > 0)


def is_loose(problem: Problem | Data) -> Any:
    """Whether no penalty holds the parameters of some features, which may have no optimum then."""
    loose = ~is_penalised(problem)
    return loose if problem.factors is None else loose | jnp.any(problem.factors == 0)


def free(problem: Problem) -> Array:
    """Which features no penalty holds, [1, D + 1], as 0 or 1; the bias is among them."""
    dtype, width = problem.targets.dtype, problem.features.shape[1] + 1
    held = penalised(problem, jnp.ones((1, width), dtype)) > 0
    return jnp.where(held & is_penalised(problem), 0, 1).astype(dtype)


def lacks_examples(problem: Problem) -> Array:
    """Whether a class has no examples: its bias, which no penalty holds, falls for ever."""
    return jnp.any(jnp.sum(problem.targets, 1) == 0) & (problem.constant > 0)


def has_bounded_optimum(problem: Problem) -> Array:
    """Whether a penalty holds the kernel and examples hold the bias."""
    held = is_penalised(problem)
    if problem.factors is not None:
        held &= jnp.all(problem.factors > 0)
    return held & ~lacks_examples(problem)


def is_separated(problem: Problem, logits: Array) -> Array:
    """Whether every example of a hard label has its own class strictly on top, offset or not.

    Then the loss along s * theta falls to 0 as s grows: without a penalty there is no optimum.
    """
    own, scores = problem.targets > 0, without_offset(problem, logits)
    lowest = jnp.min(jnp.where(own, scores, jnp.inf), 0)
    highest = jnp.max(jnp.where(own, -jnp.inf, scores), 0)
    return jnp.all((jnp.sum(own, 0) <= 1) & (lowest > highest))


def status_where_separated(
    problem: Problem, theta: Array, status: Array, separated: Array
) -> Array:
    """SEPARATED or QUASI_SEPARATED in place of the end of a fit that has no optimum.

    The first where parameters that no penalty holds separate the classes, which `theta` does where
    it is `separated`; the second where a class has no examples.
    """
    unbounded = separated & ~is_penalised(problem)
    if problem.factors is not None:
        alone = class_scores(problem, theta * free(problem))
        unbounded |= is_separated(problem, with_offset(problem, alone))
    done = (status == Status.CONVERGED) | (status == Status.PRECISION_FLOOR)
    status = jnp.where(done & lacks_examples(problem), Status.QUASI_SEPARATED, status)
    return jnp.where(unbounded & done, Status.SEPARATED, status).astype(jnp.int32)

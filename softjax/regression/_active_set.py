"""Newton's method among the parameters that are not 0, in NumPy, for the l1 penalties.

    f(theta) = loss(theta) + 1/2 sum_jk r_j theta_jk^2 + sum_j s_j |theta_j|

|theta_j| is sum_k |theta_jk|, or with a grouped penalty the Euclidean norm over the classes. Below,
a part is an entry theta_jk, or with a grouped penalty a row theta_j. Near a part that is not 0 the
penalty is smooth, with the gradient s u for the unit vector u of the part (a sign, or
theta_j / |theta_j|). A part that is 0 stays 0 while the gradient g of the loss is no larger than
s_j, and else leaves 0 along u = -g / |g|. So at every point some parts are free, and among these
Newton's step solves

    H d = -v,    v = the gradient of the loss + r theta + s u,    H = Hessian of f, free parts only

A part that would cross 0 is set to 0, and the system is solved again for the others. If no fraction
of the step decreases f, a growing multiple of Boehning's bound of the diagonal is added to H until
one does (the method of Levenberg and Marquardt): examples whose predicted class is certain but
wrong have nearly no curvature. Near the optimum the free parts no longer change, and the
convergence is that of Newton's method. The part that all classes have in common changes no
probability; it is chosen after every step to minimise the penalties, as in `_proximal`.

As in `_host_newton`, only a clear end is accepted; all other fits are left to the compiled solver.
If some features are not penalised, their curvature has to be known, and the last step has to be
small, since these features may separate the classes.

Source: M. Schmidt, G. Fung and R. Rosales, "Optimization methods for l1-regularization" (2009), on
two-metric projection; D. Bertsekas, "Projected Newton methods for optimization problems with simple
constraints" (1982).
"""

from dataclasses import replace
from typing import Any

import numpy as np

from softjax.regression._active_solves import Corners, Faces, Hessian, by_products
from softjax.regression._linear_solves import FINE, ROUGH
from softjax.regression._loop import NEAR, STILL, converged, rounding_of
from softjax.regression._table import End, Table, probabilities

# The limit of the steps, and of the rounds of a step in which parts are set to 0.
MOST_STEPS, ROUNDS = 100, 4
# The fractions of a step that are tried, since Newton's step may be too long where a class is
# nearly certain. One is taken if f decreases by at least SUFFICIENT times its predicted decrease.
SHARES, SUFFICIENT = tuple(0.25**power for power in range(8)), 1e-4
# Building H for m free parameters takes N m^2 operations, and conjugate gradients take about
# PRODUCTS products, 4 N K D operations each. They solve for many parameters, unless a step of
# theirs leads up. For more than LARGEST parameters, or MOST_ENTRIES of their columns, H is never
# built.
PRODUCTS, LARGEST, MOST_ENTRIES = 60, 2048, 2**26
# The Hessian is built again if the predicted decrease is more than this share of the last one.
SLOW = 0.1
# The relative rounding of a penalty in float32: at the largest penalty of a path no part leaves 0.
BLURRED = 1e-6
# The damping, a multiple of the bound of the diagonal: its first value, the factor by which it
# grows after a step that leads up, and its limit. Only steps without damping predict what is left.
RAISED, FACTOR, HIGHEST = 1e-6, 10.0, 1e6


def optimum(table: Table, corners: Corners, theta: np.ndarray, tol: float) -> End | None:
    """The end of the steps from `theta` [K, D + 1]; None if it is not clear.

    No entry of the gradient exceeds 1, since the mean squares of the features do not.
    """
    theta = _with_best_common_part(table, corners, theta)
    is_loose = _is_loose(table, corners)
    z, move, near = table.logits(theta), np.inf, False
    value = first = table.value(theta, z) + corners.value(theta)
    decrement: Any = np.inf
    before, passes, damping, model = np.inf, 2, 0.0, None
    for step in range(MOST_STEPS):
        p = probabilities(z)
        faces = _faces(corners, theta, table.slope(theta, p))
        norm = np.max(np.abs(faces.slope), initial=0)
        at_rest = move < STILL or norm == 0
        if not np.isfinite(norm) or (is_loose and near and not at_rest):
            return None
        if is_loose and not _has_matrix(table, faces):
            return None
        if converged(value, first, norm, decrement, tol) and at_rest:
            return End(theta, first, decrement, step, passes)
        near = near or norm < NEAR
        if model is None or decrement > SLOW * before:
            model = Hessian(table, p)
        found = None
        while found is None:
            d, left, products = _direction(table, corners, model, faces, theta, p, norm, damping)
            found, passes = _stepped(table, corners, faces, theta, value, d), passes + products + 2
            if found is None:
                predicted = np.abs(np.vdot(faces.slope, d)) / 2 + left
                ended = (at_rest or not is_loose) and not damping
                if ended and converged(value, first, norm, predicted, tol):
                    return End(theta, first, predicted, step, passes)  # rounding hides the rest
                damping = max(FACTOR * damping, RAISED)
                if damping > HIGHEST:
                    return None
        before, decrement = decrement, np.abs(np.vdot(faces.slope, d)) / 2 + left
        decrement = np.inf if damping else decrement
        start = z
        (theta, z, value), damping = found, damping / FACTOR if damping > RAISED else 0.0
        # Without a penalty the whole step counts, however short the part that was taken.
        move = np.max(np.ptp(table.scores(d) if is_loose else z - start, axis=0))
    return None


def smallest_subgradient(corners: Corners, theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The smallest subgradient at `theta`, given the gradient of the smooth part."""
    length, size = corners.length(theta), corners.length(gradient)
    outside = np.maximum(1 - corners.strength / np.where(size > 0, size, np.inf), 0)
    inside = gradient + corners.strength * corners.unit(theta)
    return np.where(length > 0, inside, gradient * outside)


def _faces(corners: Corners, theta: np.ndarray, gradient: np.ndarray) -> Faces:
    """The free parts and the penalty at `theta`, given the gradient of the smooth part."""
    strength, length = corners.strength[None], corners.length(theta)
    inside = length > 0
    entering = ~inside & (corners.length(gradient) > (1 + BLURRED) * strength)
    unit = np.where(inside, corners.unit(theta), np.where(entering, -corners.unit(gradient), 0))
    held = strength > 0
    free = np.broadcast_to(inside | entering | ~held, theta.shape)
    slope = np.where(free, gradient + strength * unit, 0)
    if corners.grouped:
        bend = np.where(inside, strength / np.where(inside, length, 1), 0)[0]
        return Faces(free, unit, (entering & held)[0], held[0], bend, slope, True)
    # The loss has no curvature along the common part of all classes, which is chosen separately. So
    # if all classes of a column are free, one class that is at 0 stays there.
    whole = free.all(0) & held[0]
    least = np.where(inside, np.inf, np.abs(slope)).argmin(0)
    rests = whole & (np.arange(len(theta))[:, None] == least) & ~inside
    # In a column without a penalty, such as the biases, one class is not free.
    rests[0, ~held[0]] = True
    none = np.zeros(theta.shape[1])
    return Faces(free & ~rests, unit, none > 0, held[0], none, slope, False)


def _direction(
    table: Table,
    corners: Corners,
    model: Hessian,
    faces: Faces,
    theta: np.ndarray,
    p: np.ndarray,
    norm: float,
    damping: float,
) -> tuple[np.ndarray, float, int]:
    """Newton's step among the free parts, a bound of the decrease beyond it, and the products."""
    d, left, products = np.zeros_like(theta), 0.0, 0
    count, width = int(faces.free.sum()), theta.shape[1]
    small = count**2 <= 4 * PRODUCTS * len(theta) * width
    small |= damping > 0 or _is_loose(table, corners)
    small &= _has_matrix(table, faces)
    tolerance = np.clip(3 * np.sqrt(norm), FINE, ROUGH)
    for _ in range(ROUNDS):
        if small:
            d, left = model.solved(faces, d, damping)
        else:
            d, used = by_products(table, corners, faces, p, d, damping, tolerance)
            products += used
        crossing = ~(corners.along(theta + d, faces.unit) > 0) & (corners.strength > 0)
        crossing = faces.free & crossing
        if not crossing.any():
            break
        # These parts are set to 0, and the step of the others is computed again.
        d, free = np.where(crossing, -theta, d), faces.free & ~crossing
        faces = replace(faces, free=free, entering=faces.entering & free.any(0))
    return d, left, products


def _is_loose(table: Table, corners: Corners) -> bool:
    return bool(np.any(corners.strength[: table.width] == 0))


def _has_matrix(table: Table, faces: Faces) -> bool:
    count = int(faces.free.sum())
    return count <= LARGEST and count * len(table.features) <= MOST_ENTRIES


def _stepped(
    table: Table, corners: Corners, faces: Faces, theta: np.ndarray, value: float, d: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """The point after the step or a fraction of it, its logits and its objective.

    None if no fraction decreases the objective.
    """
    slope = np.vdot(faces.slope, d)
    for t in SHARES if slope <= 0 else ():
        new = theta + t * d
        stays = (corners.along(new, faces.unit) > 0) | (corners.strength == 0)
        new = _with_best_common_part(table, corners, np.where(stays, new, 0))
        z = table.logits(new)
        reached = table.value(new, z) + corners.value(new)
        if reached <= value + SUFFICIENT * t * slope + rounding_of(value):
            return new, z, reached
    return None


def _with_best_common_part(table: Table, corners: Corners, theta: np.ndarray) -> np.ndarray:
    """`theta` minus the part, common to all classes, that minimises the penalties.

    Norms and squares are smallest if the mean is 0, and sums of absolute values if the median is 0.
    For both together the formula is that of `_proximal`. For an even number of classes the lower
    median is taken, so that one class is at 0.
    """
    if corners.grouped:
        return theta - theta.mean(0)
    count, ridge, strength = len(theta), table.ridge, corners.strength
    mean, held = theta.mean(0), strength > 0
    middle = np.sort(theta, 0)[(count - 1) // 2]
    both = held & (ridge > 0)
    if both.any():
        side = (count - 2 * np.arange(count + 1)[:, None]) / count
        shifts = mean + side * np.where(both, strength / np.where(both, ridge, 1), 0)
        median = np.sort(np.concatenate([theta, shifts]), 0)[count]
        middle = np.where(both, median, middle)
    return theta - np.where(held, middle, mean)

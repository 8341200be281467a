"""Divergences of two distributions, term by term, from their log-probabilities.

With delta = log p - log q and phi(t) = e^-t - 1 + t, which is >= 0,

    forward KL       sum p log(p / q)  =  sum p phi(delta)           if both sum to 1
    reverse KL       sum q log(q / p)  =  sum q phi(-delta)
    Jensen-Shannon   b KL(p, m) + (1 - b) KL(q, m),                  m = b p + (1 - b) q

No term is negative, so that the sums do not cancel: the divergence of two close distributions has
all its digits, and for two equal distributions it is 0, as is its gradient.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from softjax._numerics import not_negative

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")
# The number of terms with which the series of phi is exact for |t| < 1/2, by bytes per number.
TERMS_OF = {4: 10, 8: 15}


class Compared(NamedTuple):
    """Two distributions: the larger of p and q, and delta = log p - log q, or 0 if both are 0.

    The smaller of p and q and their difference follow from these with all digits. Since only two
    exponentials are needed, XLA:GPU computes them in place and stores neither.
    """

    larger: Array
    delta: Array

    @property
    def p(self) -> Array:
        return jnp.where(self.delta > 0, self.larger, self._smaller)

    @property
    def q(self) -> Array:
        return jnp.where(self.delta > 0, self._smaller, self.larger)

    @property
    def _smaller(self) -> Array:
        return self.larger * jnp.exp(_below(self.delta))


def compared(log_p: Array, log_q: Array) -> Compared:
    delta = _difference_of_logs(log_p, log_q)
    return Compared(jnp.exp(jnp.where(delta > 0, log_p, log_q)), delta)


def compared_softmaxes(d_p: Array, r_p: Array, d_q: Array, r_q: Array, gap: Array) -> Compared:
    """Two distributions p = e^d / (1 + r), from the distances to their tops and their excesses.

    The gap r_p - r_q gives the ratio of the normalizers, of two close distributions with as many
    digits as the differences of their logits have.
    """
    r_p, r_q = (not_negative(r)[:, None] for r in (r_p, r_q))
    part = gap[:, None] / (1 + r_q)
    near = jnp.abs(part) < 0.5
    log_ratio = jnp.log1p(jnp.where(near, part, 0))
    log_ratio = jnp.where(near, log_ratio, jnp.log1p(r_p) - jnp.log1p(r_q))
    delta = _difference_of_logs(d_p, d_q)
    delta = jnp.where(jnp.isneginf(d_p) & jnp.isneginf(d_q), 0, delta - log_ratio)
    of_p = delta > 0
    larger = jnp.exp(jnp.where(of_p, d_p, d_q)) / jnp.where(of_p, 1 + r_p, 1 + r_q)
    return Compared(larger, delta)


def divergence_terms(c: Compared, divergence: Divergence, beta: float) -> Array:
    """The terms of a divergence of q from p; 0 log 0 = 0, and +inf if only q is 0."""
    if divergence == "forward_kl":
        return _kl_terms(*c)
    if divergence == "reverse_kl":
        return _kl_terms(c.larger, -c.delta)
    p, q, (over_m, under_m) = c.p, c.q, _beside_mixture(c.delta, beta)
    near = jnp.abs(c.delta) < 1
    close = beta * p * _phi(jnp.where(near, over_m, 0))
    close += (1 - beta) * q * _phi(jnp.where(near, under_m, 0))
    return jnp.where(near, close, beta * _times(p, over_m) + (1 - beta) * _times(q, under_m))


def divergence_slopes(c: Compared, divergence: Divergence, beta: float) -> tuple[Array, Array]:
    """The derivatives of the terms with respect to log p and log q.

    In b p log(p / m) + (1 - b) q log(q / m), the derivative with respect to m is 0.
    """
    if divergence == "forward_kl":
        return _times(c.p, c.delta), _difference(*c)
    if divergence == "reverse_kl":
        return _difference(c.larger, -c.delta), _times(c.q, -c.delta)
    over_m, under_m = _beside_mixture(c.delta, beta)
    return beta * _times(c.p, over_m), (1 - beta) * _times(c.q, under_m)


# Whether the slopes by log p, and the slopes by log q, sum to 0 over all classes.
ADD_UP_TO_0 = {"forward_kl": (False, True), "reverse_kl": (True, False)}


def _difference_of_logs(log_p: Array, log_q: Array) -> Array:
    both = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    return jnp.where(both, 0, jnp.where(both, 0, log_p) - jnp.where(both, 0, log_q))


def _below(delta: Array) -> Array:
    """-|delta|, with derivative 1 at 0, where q counts as the larger."""
    return jnp.where(delta > 0, -delta, delta)


def _kl_terms(larger: Array, delta: Array) -> Array:
    """p phi(delta): larger (e^t - 1 - t), or larger (1 - e^t + t e^t) if q is larger.

    Here t is -|delta|.
    """
    t, of_p = _below(delta), delta > 0
    lost, near = jnp.expm1(t), t > -0.5
    close = _phi(jnp.where(near, delta, 0)) * jnp.where(of_p, 1, 1 + lost)
    of_q = jnp.where(jnp.isneginf(t), 0, t) * (1 + lost) - lost
    return _times(larger, jnp.where(near, close, jnp.where(of_p, lost - t, of_q)))


def _difference(larger: Array, delta: Array) -> Array:
    """q - p, with all its digits."""
    lost = jnp.expm1(_below(delta))
    return larger * jnp.where(delta > 0, lost, -lost)


def _beside_mixture(delta: Array, beta: float) -> tuple[Array, Array]:
    """log(p / m) and log(q / m), without an exponential that overflows."""
    p_is_less, p_is_more = delta <= -1, delta >= 1
    over_m = -jnp.log1p((1 - beta) * jnp.expm1(-jnp.where(p_is_less, 0, delta)))
    under_m = -jnp.log1p(beta * jnp.expm1(jnp.where(p_is_more, 0, delta)))
    return (
        jnp.where(p_is_less, delta + under_m, over_m),
        jnp.where(p_is_more, over_m - delta, under_m),
    )


def _phi(t: Array) -> Array:
    """e^-t - 1 + t for |t| < 1: t^2 / 2 (1 - t / 3 (1 - t / 4 (...)))."""
    small = jnp.abs(t) < 0.5
    s = jnp.where(small, t, 0)
    series = jnp.ones_like(s)
    for n in range(TERMS_OF[t.dtype.itemsize], 2, -1):
        series = 1 - s / n * series
    return jnp.where(small, s * s / 2 * series, jnp.expm1(-t) + t)


def _times(p: Array, log_ratio: Array) -> Array:
    """p log(...) with 0 log 0 = 0."""
    return jnp.where(p == 0, 0, p * jnp.where(p == 0, 0, log_ratio))

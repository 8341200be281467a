"""Divergences of two distributions, term by term, from their log-probabilities.

With delta = log p - log q and phi(t) = e^-t - 1 + t, which is >= 0,

    forward KL       sum p log(p / q)  =  sum p phi(delta)           for both sum to 1
    reverse KL       sum q log(q / p)  =  sum q phi(-delta)
    Jensen-Shannon   b KL(p, m) + (1 - b) KL(q, m),                  m = b p + (1 - b) q

No term is negative, so that nothing cancels in the sums: of two distributions that are close, the
divergence has all its digits, and of two that are equal it is 0, and so is its gradient.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")
# So many terms of the series of phi are exact in float64 for |t| < 1/2.
TERMS = 15


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def divergence_terms(log_p: Array, log_q: Array, divergence: Divergence, beta: float) -> Array:
    """The terms of a divergence of q from p; 0 log 0 = 0, and +inf where only q is 0."""
    p, q, delta = _sizes(log_p, log_q)
    if divergence == "forward_kl":
        return _kl_terms(p, q, delta)
    if divergence == "reverse_kl":
        return _kl_terms(q, p, -delta)
    over_m, under_m = _beside_mixture(delta, beta)
    near = jnp.abs(delta) < 1
    close = beta * p * _phi(jnp.where(near, over_m, 0))
    close += (1 - beta) * q * _phi(jnp.where(near, under_m, 0))
    return jnp.where(near, close, beta * _times(p, over_m) + (1 - beta) * _times(q, under_m))


@divergence_terms.defjvp
def _divergence_terms_jvp(divergence, beta, primals, tangents):
    """With m the terms are b p log(p / m) + (1 - b) q log(q / m): their sum has no slope in m."""
    (log_p, log_q), (p_dot, q_dot) = primals, tangents
    p, q, delta = _sizes(log_p, log_q)
    if divergence == "forward_kl":
        by_p, by_q = _times(p, delta), _difference(p, q, delta)
    elif divergence == "reverse_kl":
        by_p, by_q = _difference(q, p, -delta), _times(q, -delta)
    else:
        over_m, under_m = _beside_mixture(delta, beta)
        by_p, by_q = beta * _times(p, over_m), (1 - beta) * _times(q, under_m)
    terms = divergence_terms(log_p, log_q, divergence, beta)
    return terms, by_p * p_dot + by_q * q_dot


def _sizes(log_p: Array, log_q: Array) -> tuple[Array, Array, Array]:
    """p, q and delta; 0 where both are 0."""
    both = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    delta = jnp.where(both, 0, jnp.where(both, 0, log_p) - jnp.where(both, 0, log_q))
    return jnp.exp(log_p), jnp.exp(log_q), delta


def _kl_terms(p: Array, q: Array, delta: Array) -> Array:
    """p phi(delta) = q - p + p delta: from p alone where p and q are close, and q where p is 0."""
    near = jnp.abs(delta) < 1
    return jnp.where(near, p * _phi(jnp.where(near, delta, 0)), q - p + _times(p, delta))


def _difference(p: Array, q: Array, delta: Array) -> Array:
    """q - p, with the digits of delta where they are close."""
    near = jnp.abs(delta) < 1
    return jnp.where(near, p * jnp.expm1(-jnp.where(near, delta, 0)), q - p)


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
    for n in range(TERMS, 2, -1):
        series = 1 - s / n * series
    return jnp.where(small, s * s / 2 * series, jnp.expm1(-t) + t)


def _times(p: Array, log_ratio: Array) -> Array:
    """p log(...) with 0 log 0 = 0."""
    return jnp.where(p == 0, 0, p * jnp.where(p == 0, 0, log_ratio))

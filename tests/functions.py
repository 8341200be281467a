"""The functions of the laws, in float32 or float64, and logits to try them on."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax


class Function(NamedTuple):
    """A function of logits, over one axis; a loss has the label 0 in every row."""

    name: str
    call: Callable[..., jax.Array]  # (x, axis=-1, where=None)
    oracle: Callable[..., np.ndarray]  # (x, where=None)
    reduces: bool  # the class axis
    shift: float | None  # what it gains where every logit gains 1; None: no such law

    @property
    def is_loss(self) -> bool:
        return self.name.startswith("cross_entropy")


def normalizer(name: str, reduces: bool, shift: float, **options) -> Function:
    function, oracle = getattr(softjax, name), getattr(oracles, name)
    return Function(
        "-".join([name, *options]),
        lambda x, axis=-1, where=None: function(x, axis=axis, where=where, **options),
        lambda x, where=None: oracle(x, where, **options),
        reduces,
        shift,
    )


def loss(**options) -> Function:
    def call(x, axis=-1, where=None):
        labels = jnp.zeros(np.delete(x.shape, axis), jnp.int32)
        return softjax.cross_entropy(x, labels, axis, where, **options)

    def oracle(x, where=None):
        return oracles.cross_entropy(x, np.zeros(np.shape(x)[:-1], int), where, **options)

    shift = None if "z_loss" in options else 0.0
    return Function("-".join(["cross_entropy", *options]), call, oracle, True, shift)


FUNCTIONS = (
    normalizer("logsumexp", True, 1.0),
    normalizer("logmeanexp", True, 1.0),
    normalizer("smooth_max", True, 1.0, temperature=0.5),
    normalizer("smooth_min", True, 1.0, temperature=2.0),
    normalizer("softmax", False, 0.0),
    normalizer("softmax", False, 0.0, temperature=0.5),
    normalizer("log_softmax", False, 0.0),
    normalizer("log_softmax", False, 0.0, temperature=2.0),
    normalizer("softmin", False, 0.0),
    loss(),
    loss(label_smoothing=0.125),
    loss(z_loss=0.25),
)


def over(functions):
    return pytest.mark.parametrize("f", functions, ids=lambda f: f.name)


CORE = [f for f in FUNCTIONS if "-" not in f.name]


like_jax = over([f for f in FUNCTIONS if hasattr(jax.nn, f.name)])


def in_one_program(functions, call=lambda f, x: f.call(x)):
    """Of arrays, each function with its result; one program compiles in half the time of many.

    Each function has arguments of its own, so that the program shares nothing between them.
    """

    @jax.jit
    def every(arguments):
        return [call(f, *own) for f, own in zip(functions, arguments, strict=True)]

    return lambda *arrays: list(zip(functions, every([arrays] * len(functions)), strict=True))


def logits(dtype, *shape, scale=3.0, seed=0) -> np.ndarray:
    """Multiples of 1/256, which are exact in float32, and so are their shifts."""
    x = scale * np.random.default_rng(seed).standard_normal(shape)
    return (np.round(x * 256) / 256).astype(dtype)


def close(actual, desired, dtype, ulps=12.0, name="") -> None:
    """Within a few roundings of numbers of size one, or of the result where it is larger.

    Each unit of the gap between a logit and the maximum costs half a rounding in its exponential;
    beyond some ten units the exponential no longer counts in a sum.
    """
    tolerance = ulps * float(jnp.finfo(dtype).eps)
    desired = oracles.rounded(desired)
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual, desired, tolerance, tolerance, err_msg=name)

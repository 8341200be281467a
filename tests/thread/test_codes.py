"""Code lengths, and the entropy that bounds them."""

import heapq
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from softjax.information import entropy, joint_entropy, nats_to_bits

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def mean_huffman_length(p) -> float:
    """The mean length of the best prefix code: each merge adds a bit to all that it merges."""
    heap = list(p)
    heapq.heapify(heap)
    total = 0.0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def test_what_is_the_problem_with_a_binary_code_for_three_equally_likely_classes(dtype):
    bits = float(nats_to_bits(entropy(jnp.zeros(3, dtype))))
    assert bits == pytest.approx(math.log2(3), rel=1e-6)
    assert math.ceil(bits) == 2
    assert mean_huffman_length([1 / 3] * 3) == pytest.approx(5 / 3)
    assert bits < 5 / 3 < 2


def test_is_there_a_better_code(dtype):
    bits = math.log2(3)
    for n in (1, 2, 3, 5, 10, 100, 1000):
        bound = float(nats_to_bits(joint_entropy(jnp.zeros(3, dtype), n)))
        assert bound == pytest.approx(n * bits, rel=1e-6)
        length = (3**n - 1).bit_length()  # enough for the numbers 0 to 3^n - 1, and not one less
        assert 2 ** (length - 1) < 3**n <= 2**length
        assert length == math.ceil(bound)
        assert 0 <= length / n - bits < 1 / n
    assert [(3**n - 1).bit_length() / n for n in (1, 2, 5)] == [2, 2, 1.6]


def test_what_if_two_draws_are_encoded_together(dtype):
    pairs = [1 / 9] * 9
    assert mean_huffman_length(pairs) == pytest.approx(29 / 9)
    # Kraft's equality: seven words of 3 bits and two of 4 fill the tree, and no shorter ones do.
    assert 7 / 2**3 + 2 / 2**4 == 1
    assert 8 / 2**3 + 1 / 2**4 > 1
    per_draw = [mean_huffman_length([3.0**-n] * 3**n) / n for n in (1, 2, 3, 5)]
    assert per_draw == sorted(per_draw, reverse=True)
    assert per_draw[:2] == pytest.approx([5 / 3, 29 / 18])
    assert per_draw[-1] > float(nats_to_bits(entropy(jnp.zeros(3, dtype))))
    blocks = [(3**n - 1).bit_length() / n for n in (1, 2, 3, 5)]
    assert all(huffman < block for huffman, block in zip(per_draw, blocks, strict=True))


def test_is_one_hot_a_good_code(dtype):
    for k in (3, 8, 100):
        bits = float(nats_to_bits(entropy(jnp.zeros(k, dtype))))
        # A word of k bits, where the best code has less than one bit more than the entropy.
        assert k > mean_huffman_length([1 / k] * k) >= bits - 1e-6
        assert mean_huffman_length([1 / k] * k) < bits + 1


@pytest.mark.parametrize("seed", range(3))
def test_a_joint_code_of_any_distribution_is_within_one_bit_of_the_joint_entropy(seed, dtype):
    x = np.random.default_rng(seed).normal(size=3).astype(dtype)
    p = np.exp(x.astype(np.float64))
    p /= p.sum()
    for n in (1, 2, 4):
        bound = float(nats_to_bits(joint_entropy(x, n)))
        words = [math.prod(draws) for draws in itertools.product(p, repeat=n)]
        assert bound <= mean_huffman_length(words) + 1e-5
        assert mean_huffman_length(words) < bound + 1


def test_how_many_ternary_units_does_an_integer_from_0_to_7_take(dtype):
    units = float(entropy(jnp.zeros(8, dtype)) / entropy(jnp.zeros(3, dtype)))
    assert units == pytest.approx(math.log(8, 3), rel=1e-6)
    assert math.ceil(units) == 2
    assert 3**1 < 8 <= 3**2
    words = list(itertools.product((-1, 0, 1), repeat=2))[:8]
    assert len(set(words)) == 8

"""Peers in other frameworks, if they are installed, agree with the reference."""

import jax.numpy as jnp
import pytest

from benchmarks import fused, measure, peers, torch_peers
from benchmarks.core import Case, Shape
from benchmarks.reference import inputs, reference

pytestmark = pytest.mark.x64_once

TINY = Shape("tiny", 8, 5, "no model")
# jax.nn and optax are in every run of the other tests; `torch compiled` compiles for long.
ELSEWHERE = ("jax.nn", "optax", "torch compiled", "statsmodels")
OTHERS = [peer for peer in peers.PEERS if peer.name not in ELSEWHERE]
CASES = [
    Case(operation, mode, TINY, dtype=dtype)
    for operation, mode in (
        ("logsumexp", "gradient"),
        ("softmax", "value"),
        ("softmax", "gradient"),
        ("log_softmax", "value"),
        ("cross_entropy", "value_and_gradient"),
    )
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("peer", OTHERS, ids=lambda peer: peer.name)
def test_a_peer_returns_the_reference(peer):
    if peer.absence:
        pytest.skip(peer.absence)
    for case in CASES:
        if peer in peers.peers_of(case.operation, case.mode, case.dtype):
            arrays = inputs(TINY, case.dtype)
            arguments = tuple(map(jnp.asarray, arrays))
            operation = peer.operations[case.operation]
            bound = peer.prepare(operation, case.mode, arguments, False)
            error = measure.error(bound.results(), reference(case, *arrays))
            assert error <= measure.TOLERANCES[case.dtype], case.name
    if "linear_cross_entropy" in peer.operations:
        shape = fused.Shape("tiny", 8, 3, 5, "float32", "no model")
        both = list(fused.Case("value_and_gradient", shape, peer.name).run(pairs=1))
        assert not any(row["wrong"] for row in both)


def test_a_peer_with_its_classes_first_gets_the_kernel_transposed():
    torch = pytest.importorskip("torch")

    def loss(hidden, classifier, labels):
        return torch.nn.functional.cross_entropy(hidden @ classifier.T, labels)

    arguments = fused.inputs(fused.Shape("tiny", 8, 3, 5, "float32", "no model"))
    bound = torch_peers.classes_first(loss, "value_and_gradient", arguments, False)
    value, (hidden_bar, kernel_bar) = fused.in_mode(fused.plain, "value_and_gradient")(*arguments)
    assert measure.error(bound.results(), [value, hidden_bar, kernel_bar]) <= 1e-6

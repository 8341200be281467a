"""The tests of optax's classification losses, as installed, run on the losses of softjax."""

import unittest

import jax
import numpy as np
import optax.losses._classification_test as peer
import pytest

import softjax

CASES = (
    peer.SoftmaxCrossEntropyTest,
    peer.SafeSoftmaxCrossEntropyTest,
    peer.SoftmaxCrossEntropyWithIntegerLabelsTest,
)
NEGATIVE = "perturbs the labels: a known negative probability is refused"
OF_EXAMPLES = "`where` has the shape of the batch: here it picks classes, and weights pick examples"
MASKED_TARGET = "the labels put mass on masked classes: infinite, where optax drops the mass"
SEVERAL_AXES = "the classes are on one axis: reshape several to one"
DIFFERENT_ON_PURPOSE = {
    "SoftmaxCrossEntropyTest-test_gradient": f"{NEGATIVE}; {OF_EXAMPLES}",
    "SafeSoftmaxCrossEntropyTest-test_gradient": NEGATIVE,
    "SoftmaxCrossEntropyWithIntegerLabelsTest-test_gradient": OF_EXAMPLES,
    **{f"SoftmaxCrossEntropyTest-test_mask{n}": MASKED_TARGET for n in range(2)},
    **{f"SoftmaxCrossEntropyWithIntegerLabelsTest-test_axes{n}": SEVERAL_AXES for n in range(8)},
}
REPLACED = (
    "softmax_cross_entropy",
    "safe_softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
)


def parameters():
    for case in CASES:
        for name in unittest.TestLoader().getTestCaseNames(case):
            title = f"{case.__name__}-{name}"
            reason = DIFFERENT_ON_PURPOSE.get(title)
            # Strict: a test that begins to pass fails here, and leaves the list.
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
            yield pytest.param(case, name, id=title, marks=marks)


pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


@pytest.mark.parametrize(("case", "name"), list(parameters()))
def test_optax(case, name, monkeypatch):
    np.random.seed(0)  # noqa: NPY002 - optax's tests draw from the global generator
    for function in REPLACED:
        monkeypatch.setattr(peer._classification, function, softjax.cross_entropy)
    with jax.numpy_dtype_promotion("standard"):
        case(name).debug()

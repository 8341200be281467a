"""scipy's own tests of logsumexp, softmax and log_softmax, run on the functions of softjax.

scipy's functions take and return NumPy arrays of float64, and their default is `axis=None`. For
complex numbers, conftest.py expects the opposite of scipy's tests, because softjax refuses them.
"""

from collections.abc import Iterator

import jax
import numpy as np
import pytest
import scipy.special.tests.test_logsumexp as peer
from scipy._lib._array_api import array_namespace
from scipy.special.tests.test_logsumexp import TestLogSoftmax, TestLogSumExp, TestSoftmax

import softjax

__all__ = ["TestLogSoftmax", "TestLogSumExp", "TestSoftmax"]

NUMPY_PROMOTION = "float32 beside integers stays float32, as in jax; NumPy makes it float64"
DIFFERENT_ON_PURPOSE = {
    "test_dtypes_ab[x64-float32-int32]": NUMPY_PROMOTION,
    "test_dtypes_ab[x64-float32-int64]": NUMPY_PROMOTION,
    "test_dtypes_ab[x64-int32-float32]": NUMPY_PROMOTION,
    "test_dtypes_ab[x64-int64-float32]": NUMPY_PROMOTION,
}

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]


def on_numpy(function):
    """`function` with the conventions of scipy: NumPy arrays and scalars, all axes by default."""

    def call(x, axis=None, **options):
        result = jax.tree.map(np.asarray, function(np.asarray(x), axis=axis, **options))
        return jax.tree.map(lambda a: a[()], result)

    return call


@pytest.fixture(autouse=True)
def softjax_in_place(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    reason = DIFFERENT_ON_PURPOSE.get(request.node.name)
    if reason is not None:
        # Strict: a test that begins to pass fails here, and leaves the list.
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    for name in ("logsumexp", "softmax", "log_softmax"):
        monkeypatch.setattr(peer, name, on_numpy(getattr(softjax, name)))
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def xp():
    return array_namespace(np.empty(0))


@pytest.fixture
def devices() -> list[str]:
    return ["cpu"]

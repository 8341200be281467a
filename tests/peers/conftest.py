"""The tests of scipy, optax and scikit-learn, as installed, run against softjax."""

from collections.abc import Iterator

import pytest

COMPLEX_TESTS = (  # beside those with a complex parameter
    "test_logsumexp_complex_sign",
    "test_gh21709_small_imaginary",
)
MARKERS_OF_SCIPY = (
    "array_api_backends",
    "skip_xp_backends",
    "thread_unsafe",
    "uses_xp_capabilities",
    "xfail_xp_backends",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS_OF_SCIPY:
        config.addinivalue_line("markers", f"{name}: of scipy's tests")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test of complex numbers must end in the refusal by softjax, and then passes.

    A class probability is real. scipy has some 370 such tests: too many to list as failures.
    """
    given = pyfuncitem.callspec.params.values() if hasattr(pyfuncitem, "callspec") else ()
    is_complex = any(isinstance(v, complex) or str(v).startswith("complex") for v in given)
    if not is_complex and pyfuncitem.originalname not in COMPLEX_TESTS:
        return (yield)
    with pytest.raises(TypeError, match="must be an array of real numbers, got dtype complex"):
        yield
    return True

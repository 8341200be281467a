"""A classifier that is fitted once for each module."""

import pytest


@pytest.fixture(scope="module")
def classifier():
    from flowers import fitted  # which needs scikit-learn

    return fitted()

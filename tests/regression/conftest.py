"""Fits to small tables take less time than those of users, by as few programs."""

from collections.abc import Iterator

import pytest

from softjax.regression import _frame


@pytest.fixture(scope="module", autouse=True)
def _few_added_rows() -> Iterator[None]:
    """Tables of up to 256 rows share a program, not of up to 2,048, which take eight times as long.

    Without the optimisations of the compiler a row costs most of the time of a fit.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_frame, "FEWEST_ROWS", 2**8)
        patch.setattr(_frame, "FEWEST_ENTRIES", 2**10)
        yield

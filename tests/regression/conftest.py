"""Fits to small tables take less time than those of users, by as few programs."""

import pytest

from softjax.regression import _frame


@pytest.fixture(autouse=True)
def _few_added_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of up to 256 rows share a program, not of up to 2,048, which take eight times as long.

    Without the optimisations of the compiler a row costs most of the time of a fit.
    """
    monkeypatch.setattr(_frame, "FEWEST_ROWS", 2**8)
    monkeypatch.setattr(_frame, "FEWEST_ENTRIES", 2**10)

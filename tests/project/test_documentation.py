"""The example in every docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil
import re

import numpy as np
import pytest

import softjax
from softjax import accuracy

NUMBER = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")


class FloatChecker(doctest.OutputChecker):
    """Lets the last digits of a float32 differ, which depend on the machine."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        want, got = "".join(want.split()), "".join(got.split())
        if NUMBER.sub("#", want) != NUMBER.sub("#", got):
            return False
        numbers = [np.array(NUMBER.findall(text), np.float64) for text in (want, got)]
        return np.allclose(*numbers, rtol=1e-6, atol=0)


pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def modules() -> list[str]:
    names = ["softjax"]
    names += [m.name for m in pkgutil.walk_packages(softjax.__path__, "softjax.")]
    return [name for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_docstrings_run(name, monkeypatch):
    monkeypatch.setattr(accuracy, "QUICK_SIZES", (2,))  # test_accuracy.py measures all
    runner = doctest.DocTestRunner(FloatChecker())
    for test in doctest.DocTestFinder().find(importlib.import_module(name)):
        runner.run(test)
    assert runner.summarize().failed == 0


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder()
    tests = [t for name in modules() for t in finder.find(importlib.import_module(name))]
    assert sum(bool(test.examples) for test in tests) >= 30

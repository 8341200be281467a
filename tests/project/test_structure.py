"""The table of `tools/structure.py`, on a small package whose figures are counted by hand."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
structure = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "structure.py")))

pytestmark = pytest.mark.x64_once

MODULE = '''\
"""A module."""

import functools


class Model:
    """A class, whose body is no function."""

    def value(self, a):
        """A docstring of

        three lines is not counted.
        """
        total = sum(x for x in (1, 2))
        return inner(a) + total


def inner(a, b=0, *c, **d):
    return functools.reduce(lambda x, y: x + y, [a, b])


def nine(a, b, c, d, e, f, g, /, h, *, i): pass


def exported_nine(a, b, c, d, e, f, g, h, i): pass


class Exported:
    def __init__(self, a, b, c, d, e, f, g, h, i): pass
'''


@pytest.fixture
def tree(tmp_path):
    package = tmp_path / "softjax" / "part"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "from softjax.part._core import exported_nine as exported_nine\n"
        "if TYPE_CHECKING:\n"
        "    from softjax.part._core import Exported as Exported\n"
    )
    (package / "__init__.py").write_text("")
    (package / "_core.py").write_text(MODULE)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_long.py").write_text("x = 1\n" * 401)
    return tmp_path


def test_sizes_and_shape_of_a_tree(tree):
    rows = dict([*structure.sizes(tree), *structure.shape(tree)])
    count = len(MODULE.splitlines())
    assert rows["softjax"] == f"{count + 4} in 3"
    assert rows["  softjax/part/"] == f"{count} in 2"
    assert rows["tests"] == "401 in 1"
    assert rows["docs"] == "0 in 0"
    assert rows["longest function"] == "3 lines, value in softjax/part/_core.py"
    assert rows["functions above 60 lines"] == "0"
    assert rows["not public, more than 8 arguments"] == "1"
    assert rows["files of softjax above 400 lines"] == "0"
    assert rows["files of tests above 400 lines"] == "1"


def test_the_functions_that_a_call_enters_have_names(tree):
    seen = structure.entered(tree, "Model().value(1)", "from softjax.part._core import Model")
    assert {name for _, name in seen} == {"Model.value", "inner"}
    with pytest.raises(RuntimeError, match="no_such_name"):
        structure.entered(tree, "no_such_name()", "")


def test_the_table_keeps_the_rows_that_only_one_revision_has():
    columns = {"old": {"a": "1", "b": "2"}, "new": {"a": "3", "c": "4"}}
    cells = [[c.strip() for c in line.split("|")] for line in structure.table(columns).splitlines()]
    assert cells[0] == ["", "", "old", "new", ""]
    assert cells[2:] == [["", "a", "1", "3", ""], ["", "c", "-", "4", ""], ["", "b", "2", "-", ""]]

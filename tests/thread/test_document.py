"""The page of answers: its examples run, and each of its questions has a test here."""

import ast
import doctest
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "thread.md").read_text()

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def test_the_examples_run_as_they_stand():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "thread.md", None, 0)
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert result.attempted > 50
    assert result.failed == 0


def test_every_question_has_an_executed_answer_and_a_test_of_its_name():
    tests = {
        node.name
        for path in HERE.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    sections = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    assert len(sections) >= 24
    for section in sections:
        question, _, answer = section.partition("\n")
        assert question.endswith("?")
        assert ">>> " in answer, question
        assert "test_" + re.sub(r"\W+", "_", question.lower()).strip("_") in tests, question

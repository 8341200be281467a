"""Every figure in the documentation comes from a committed result file."""

import re
import shutil
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command_line
from benchmarks import docs, results

pytestmark = pytest.mark.x64_once


def test_the_figures_of_the_documentation_are_those_of_the_result_files():
    assert docs.stale() == [], "`python -m benchmarks docs` writes them anew"


def test_every_named_result_file_is_in_a_marked_place_and_exists():
    for path in docs.PAGES:
        text = path.read_text()
        unmarked = docs.MARK.sub("", text)
        assert "benchmarks/results/20" not in unmarked, path
        for name in re.findall(r"benchmarks/results/20[\w.-]*jsonl", text):
            assert (docs.ROOT / name).exists()


def test_a_wrong_figure_is_found_and_written_anew(tmp_path, monkeypatch, capsys):
    page = tmp_path / "accuracy.md"
    shutil.copy(docs.ROOT / "docs" / "accuracy.md", page)
    monkeypatch.setattr(docs, "PAGES", (page,))
    right = page.read_text()
    assert command_line.main(["docs", "--check"]) == 0
    page.write_text(right.replace("| logsumexp | 1.3 | ", "| logsumexp | 1.3 | 0.1 | "))
    assert page.read_text() != right
    assert command_line.main(["docs", "--check"]) == 1
    assert "Stale" in capsys.readouterr().out
    monkeypatch.setattr(docs, "PICTURE", tmp_path / "scaling.svg")
    assert command_line.main(["docs"]) == 0
    ElementTree.parse(docs.PICTURE)
    assert page.read_text() == right


def test_the_newest_full_run_counts(tmp_path):
    def run(date, **head):
        environment = {"date": date, "platform": "cpu"} | head
        return results.Run(tmp_path, environment, [{"record": "result", "suite": "core"}])

    first, quick, part = run("1"), run("2", quick=True), run("3", only="softmax")
    assert results.newest([first, quick, part], "core", "cpu") is first
    later = run("4", quick=False, only="")
    assert results.newest([first, quick, part, later], "core", "cpu") is later
    with pytest.raises(ValueError, match="a full run of core on tpu"):
        results.newest([first], "core", "tpu")


def test_an_unknown_place_is_an_error():
    with pytest.raises(ValueError, match="must be one of core-file"):
        docs.updated("<!-- benchmarks: core-speed cpu -->1<!-- end -->", [])

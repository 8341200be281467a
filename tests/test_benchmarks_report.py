"""The report of made-up runs and of the committed ones: complete, self-contained, well-formed."""

import json
import re
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command_line
from benchmarks import figures, report, results

pytestmark = pytest.mark.x64_once

CEILINGS = {
    "record": "ceilings",
    "bytes_per_second": 1e10,
    "flops_per_second": {"float32": 1e11, "bfloat16": 1e11},
}


def environment(device, date, platform="gpu"):
    versions = {"jax": "0.10.2", "jaxlib": "0.10.2"}
    head = {"record": "environment", "date": date, "platform": platform, "device": device}
    return head | {"commit": "0" * 40, "clean": True, "versions": versions}


def side(name, seconds=None, **fields):
    times = {"seconds": {"median": seconds, "low": seconds, "high": seconds}} if seconds else {}
    return {"name": name, "temporary_bytes": 1000, "compile_seconds": 0.1} | times | fields


def core_record(classes, seconds, correct=True):
    timed = {"ratio": {"median": 0.5, "low": 0.4, "high": 0.6}} if correct else {}
    return {
        "record": "result",
        "suite": "core",
        "case": f"softmax/value/shape-{classes}/float32",
        "operation": "softmax",
        "mode": "value",
        "shape": {"name": f"shape-{classes}", "examples": 8, "classes": classes},
        "dtype": "float32",
        "logits_bytes": 32 * classes,
        "work": {"flops": 40.0 * classes, "bytes": 64.0 * classes},
        "softjax": side("softjax", seconds, correct=True),
        "peer": side("jax.nn", 2 * seconds if correct else None, correct=correct),
    } | timed


def accuracy_record(error):
    sides = {"softjax": side("softjax", error=1.5), "peer": side("jax.nn", error=error)}
    named = {"case": "accuracy/softmax/float32", "operation": "softmax", "dtype": "float32"}
    about = {"unit": "ulp", "goal": "5 + gap", "wrong": False}
    return {"record": "result", "suite": "accuracy"} | named | about | sides


def scale_record(implementation, sent):
    case = {"case": f"scale/loss/both/{implementation}/2", "program": "loss", "form": "both"}
    about = {"implementation": implementation, "devices": 2, "wire_bytes": sent, "error": 0.0}
    return {"record": "result", "suite": "scale"} | case | about


FAILURE = {
    "record": "failure",
    "suite": "core",
    "case": "softmax/value/huge/float32",
    "kind": "out of memory",
    "bytes": 2**40,
    "error": "MemoryError: <too large>",
}


@pytest.fixture
def files(tmp_path):
    runs = {
        "a": [environment("Card A", "2026-01-01"), CEILINGS, core_record(10, 1e-3), FAILURE],
        "b": [environment("Card A", "2026-01-02"), CEILINGS, core_record(10, 2e-3)],
        "c": [
            environment("Card B", "2026-01-03"),
            CEILINGS,
            core_record(10, 4e-3),
            core_record(100, 4e-3, correct=False),
            accuracy_record(None),
            {"record": "result", "suite": "many", "case": "many/new/x", "softjax": side("softjax")},
            scale_record("softjax", 8e6),
            scale_record("plain", 9e6),
        ],
    }
    for name, lines in runs.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def test_devices_stand_side_by_side_with_their_last_figures(files):
    devices = report.by_device(results.read_all([files]))
    assert [device.label for device in devices] == ["Card A", "Card B"]
    (record,) = devices[0].runs["core"].results()
    assert record["softjax"]["seconds"]["median"] == 2e-3
    parts = {part.title: part for part in report.sections(results.read_all([files]))}
    core, scale = parts["core"], parts["scale"]
    assert "Card A: time, ms" in core.table.header
    first, second = core.table.rows
    assert first[2:4] == ["2 / 4", "0.50 (0.40, 0.60)"]
    assert second[2] == ""  # the first card has no second case
    assert "wrong: jax.nn" in second
    assert scale.table.rows == [
        ["loss · both · 2 devices", "", "8"],
        ["loss · both · 2 devices", "plain", "9"],
    ]


def test_the_page_is_one_file_that_loads_nothing(files, tmp_path):
    out, tables, github = (tmp_path / name for name in ("page.html", "page.md", "page.json"))
    arguments = ["report", str(files), "--out", str(out), "--markdown", str(tables)]
    assert command_line.main([*arguments, "--github", str(github)]) == 0
    text = out.read_text()
    pictures = re.findall("<svg.*?</svg>", text, re.DOTALL)
    # Time and memory by classes, ratios and rooflines; errors; bytes sent; temporaries.
    assert len(pictures) == 7
    for picture in pictures:
        ElementTree.fromstring(picture.replace("xlink:", ""))
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", text, flags=re.S)
    assert "http" not in without_names
    assert "#010203" not in text  # every ink is the page's
    assert "not finite" in text
    assert "&lt;too large&gt;" in text
    # Runs, core, accuracy, scale, many, what failed.
    assert tables.read_text().count("## ") == 6

    entries = json.loads(github.read_text())
    assert {entry["unit"] for entry in entries} == {"ms", "bytes"}
    assert all(entry.keys() >= {"name", "unit", "value"} for entry in entries)
    names = [(entry["name"], entry["extra"]) for entry in entries]
    assert len(set(names)) == len(names)


def test_a_peer_looks_the_same_in_every_picture():
    solvers = ["scikit-learn lbfgs", "scikit-learn newton-cg"]
    both, one = figures._looks(["softjax auto", *solvers]), figures._looks(["unknown", solvers[1]])
    assert both[solvers[1]] == one[solvers[1]]
    assert len({*both.values()}) == 3
    assert one["unknown"] != one[solvers[1]]


def test_the_committed_results_make_a_report():
    runs = results.read_all()
    assert len(runs) >= 3
    titles = [section.title for section in report.sections(runs)]
    assert {"core", "fused", "fit"} <= set(titles)


HEAD = json.dumps(environment("H200", "2026-01-01"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"record": "result"}\n', "must begin with the environment"),
        ('{"record": "environment"}\n', "must begin with the environment"),
        (b"a,b\n1,2\n", "must begin with the environment"),
        (b"1\n", "line 1 is not a record"),
        (b"[]\n{}\n", "line 1 is not a record"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"[" * 100_000, "must begin with the environment"),
        (f'{HEAD}\n{{"record": "result"}}\n', "line 2 is not a result"),
        (f'{HEAD}\n{{"record": "result", "case": "c", "ratio": 0}}\n', "line 2 is not a result"),
        (f'{HEAD}\n{{"record": "result", "case": "c", "ratio": {{}}}}\n', "line 2 is not a result"),
        (None, "No such file"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_file_that_is_no_result_is_one_line(tmp_path, capsys, command, content, words):
    path = tmp_path / "other.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "page.html"
    options = [path, path] if command == "compare" else [path, "--out", out]
    assert command_line.main([command, *map(str, options)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks: {path}: ")
    assert words in line
    assert not out.exists()


def test_a_page_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "absent" / "page.html"):
        assert command_line.main(["report", "--out", str(place)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"benchmarks: {place}: ")
    assert command_line.main(["report", str(tmp_path)]) == 2
    assert "holds no result file" in capsys.readouterr().err

"""The report of simulated and committed runs is complete, self-contained and well-formed."""

import json
import math
import random
import re
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command_line
from benchmarks import compare, report, results

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


def row(suite, case, side, **fields):
    named = {"record": "result", "suite": suite, "case": case, "side": side}
    return named | {"temporary_bytes": 1000, "wrong": False} | fields


def core_rows(classes, seconds, correct=True):
    about = {
        "operation": "softmax",
        "mode": "value",
        "examples": 8,
        "classes": classes,
        "dtype": "float32",
        "logits_bytes": 32 * classes,
        "flops": 40.0 * classes,
        "work_bytes": 64.0 * classes,
    }
    case = "core", f"softmax/value/shape-{classes}/float32"
    times = {"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6, "seconds": 2 * seconds}
    peer = times | {"checks": {"time": [0.5, 0.45]}} if correct else {"wrong": True}
    ours = row(*case, "softjax", **about, seconds=seconds, low=seconds, high=seconds)
    return [ours, row(*case, "jax.nn", **about | peer)]


def accuracy_rows(error):
    about = {"unit": "ulp", "goal": "5 + gap"}
    case = "accuracy", "softmax/float32"
    return [row(*case, "softjax", error=1.5, **about), row(*case, "jax.nn", error=error, **about)]


def scale_row(side, sent):
    about = {"program": "loss", "form": "both", "devices": 2, "wire_bytes": sent, "error": 0.0}
    return row("scale", "loss/both/2 devices", side, **about)


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
    fast = CEILINGS | {"bytes_per_second": 4e10}
    runs = {
        "a": [environment("Card A", "2026-01-01"), CEILINGS, *core_rows(10, 1e-3), FAILURE],
        "b": [environment("Card A", "2026-01-02"), fast, *core_rows(10, 2e-3)],
        "c": [
            environment("Card B", "2026-01-03"),
            CEILINGS,
            *core_rows(10, 4e-3),
            *core_rows(100, 4e-3, correct=False),
            *accuracy_rows(None),
            row("many", "new/x", "softjax"),
            scale_row("softjax", 8e6),
            scale_row("plain", 9e6),
        ],
        # Without ceilings of its own it is no part of any roofline.
        "d": [environment("Card B", "2026-01-04"), *core_rows(100, 1e-9)],
    }
    for name, lines in runs.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def test_devices_stand_together_with_their_last_figures(files):
    rows = report.last_rows(results.read_all([files]))
    of_cards = [key for key in rows if key[:2] == ("core", "softmax/value/shape-10/float32")]
    assert [key[2:] for key in of_cards] == [
        (side, card) for card in ("Card A", "Card B") for side in ("softjax", "jax.nn")
    ]
    assert rows[of_cards[0]]["seconds"] == 2e-3
    parts = {part.title: part for part in report.sections(results.read_all([files]))}
    core, scale = parts["core"], parts["scale"]
    assert core.header[:4] == ["case", "by", "device", "time, ms"]
    (line,) = [line for line in core.rows if line[1:3] == ["jax.nn", "Card B"] and "10/" in line[0]]
    assert "0.50 (0.40, 0.60)" in line
    assert "time 0.5 > 0.45" in line
    assert core.verdict.startswith(
        "0 of 3 bounds met, no wrong result, 1 failed; softjax takes 0.50"
    )
    assert [line[1:] for line in scale.rows] == [
        ["softjax", "0.001", "8", "0"],
        ["plain", "0.001", "9", "0"],
    ]


def test_the_roofline_of_a_time_is_that_of_its_own_run(files):
    rows = report.last_rows(results.read_all([files]))
    share = {key[1:]: row["roofline"] for key, row in rows.items() if key[2] == "softjax"}
    first = "softmax/value/shape-10/float32", "softjax"
    # 640 bytes at 40 GB/s in 2 ms, though an earlier run of the card had 10 GB/s.
    assert share[(*first, "Card A")] == pytest.approx(640 / 4e10 / 2e-3)
    assert share[(*first, "Card B")] == pytest.approx(640 / 1e10 / 4e-3)
    assert share["softmax/value/shape-100/float32", "softjax", "Card B"] is None


def test_the_page_is_one_file_that_loads_nothing_and_opens_with_the_verdicts(files, tmp_path):
    out, tables, github = (tmp_path / name for name in ("page.html", "page.md", "page.json"))
    arguments = ["report", str(files), "--out", str(out), "--markdown", str(tables)]
    assert command_line.main([*arguments, "--github", str(github)]) == 0
    text = out.read_text()
    pictures = re.findall("<svg.*?</svg>", text, re.DOTALL)
    # Ratios, time and temporaries by classes for two devices, and rooflines; errors;
    # temporaries of the unknown suite; what devices send and hold.
    assert len(pictures) == 9
    for picture in pictures:
        root = ElementTree.fromstring(picture.replace("xlink:", ""))
        # No wider than a telephone, or else the page scrolls that picture alone.
        assert float(root.attrib["width"]) <= 400
        assert "currentColor" in picture
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http" not in without_names
    assert "not finite" in text
    assert "&lt;too large&gt;" in text
    # Core, accuracy, many, scale, what failed, runs.
    assert tables.read_text().count("\n## ") == 6
    contents = text[text.index("<nav>") : text.index("</nav>")]
    assert re.findall('href="#([^"]*)"', contents) == re.findall('<section id="([^"]*)"', text)
    assert "0 of 3 bounds met" in contents

    entries = json.loads(github.read_text())
    assert {entry["unit"] for entry in entries} == {"ms", "bytes"}
    assert all(entry.keys() >= {"name", "unit", "value"} for entry in entries)
    names = [(entry["name"], entry["extra"]) for entry in entries]
    assert len(set(names)) == len(names)


def test_the_committed_results_make_a_report():
    runs = results.read_all()
    assert len(runs) >= 3
    titles = [section.title for section in report.sections(runs)]
    assert {"core", "fused", "fit", "many", "cold", "stream", "kills", "aot"} <= set(titles)


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
        (f"{HEAD}\n{json.dumps(row('core', 'c', 'p', ratio=0))}\n", "line 2 is not a result"),
        (f"{HEAD}\n{json.dumps(row('core', 'c', 'p', ratio={}))}\n", "line 2 is not a result"),
        (f"{HEAD}\n{json.dumps(row('core', 'c', 'p', checks=[1]))}\n", "line 2 is not a result"),
        (f'{HEAD}\n{{"record": "ceilings"}}\n', "line 2 is not a ceilings"),
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


@pytest.mark.filterwarnings("ignore")  # pandas and Altair on odd numbers
def test_a_field_that_is_missing_or_of_another_type_is_refused_or_left_out(tmp_path):
    """Whatever one field of a committed run holds: `read` refuses it, or the report is made."""
    rng = random.Random(0)
    path, refused = tmp_path / "odd.jsonl", 0
    for run in results.read_all():
        for _ in range(4):
            lines = [dict(line) for line in (run.environment, *run.records[:5])]
            line = rng.choice(lines)
            line[rng.choice(list(line))] = rng.choice([None, "x", [], {}, -1, 0, True, math.inf])
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            try:
                odd = results.read(path)
            except results.ResultError:
                refused += 1
                continue
            report.markdown(report.sections([odd]))
            rows = list(report.last_rows([odd]).values())
            for row in rows[:1]:  # none, where the only row of a run is spoilt
                assert all(chart for _, chart in report._charts(row["suite"], rows))
            compare.compare(run, odd)
    assert 10 < refused < 50


def test_a_page_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "absent" / "page.html"):
        assert command_line.main(["report", "--out", str(place)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"benchmarks: {place}: ")
    assert command_line.main(["report", str(tmp_path)]) == 2
    assert "holds no result file" in capsys.readouterr().err

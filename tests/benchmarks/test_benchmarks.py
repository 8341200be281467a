"""The benchmarks from end to end on tiny shapes. No time is asserted."""

import json
import math
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

from benchmarks import __main__ as command_line
from benchmarks import core, measure, peers, results, roofline
from benchmarks.core import Case, Shape
from benchmarks.environment import ROOT
from benchmarks.reference import inputs, reference
from benchmarks.suites import SUITES

pytestmark = pytest.mark.x64_once

TINY = Shape("tiny", 8, 5, "no model")
CEILINGS = {
    "record": "ceilings",
    "bytes_per_second": 1e10,
    "flops_per_second": {"float32": 1e11, "bfloat16": 1e11},
}
TINY_CASES = [
    Case("logsumexp", "value", TINY, bound=1e9),
    Case("cross_entropy", "value_and_gradient", TINY),
    Case("softmax", "value", TINY, donated=True),
]


@pytest.fixture(autouse=True)
def no_measured_ceilings(monkeypatch):
    monkeypatch.setattr(roofline, "ceilings", lambda: CEILINGS)


@pytest.fixture
def tiny_core(monkeypatch):
    monkeypatch.setitem(SUITES, "core", TINY_CASES)


def test_a_run_writes_its_environment_its_ceilings_and_its_rows(tiny_core, tmp_path, capsys):
    out = tmp_path / "results" / "run.jsonl"
    assert command_line.main(["run", "core", "--quick", "--out", str(out)]) == 0
    run = results.read(out)
    assert {"date", "commit", "device", "driver", "cores", "flags"} <= run.environment.keys()
    assert run.environment["quick"]
    assert run.ceilings == CEILINGS
    ours = [row for row in run.rows("core") if results.is_softjax(row)]
    assert [row["case"] for row in ours] == [case.name for case in TINY_CASES]
    for case, row in zip(TINY_CASES, ours, strict=True):
        peer = next(r for r in run.rows() if r["case"] == case.name and not results.is_softjax(r))
        assert ("checks" in peer) == (case.bound is not None)
        assert row["temporary_bytes"] >= 0
        assert (row["wrong"], peer["wrong"]) == (False, False)
        for one, keys in ((row, results.INTERVAL), (peer, ("ratio", "ratio_low", "ratio_high"))):
            value, low, high = map(one.get, keys)
            assert 0 < low <= value <= high
        ideal = roofline.ideal_seconds(row, run.ceilings)
        assert ideal == pytest.approx(row["work_bytes"] / 1e10)
    printed = capsys.readouterr().out
    assert "core: 1 of 1 bounds met, no wrong result" in printed


def test_a_wrong_peer_is_reported_and_not_timed(monkeypatch, capsys, tmp_path):
    def off_by_one(logits, labels):
        return peers.OPTAX_LOSS(logits, (labels + 1) % 5)

    def raising(logits, labels):
        raise MemoryError("RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes.")

    wrong = peers.Implementation("wrong", "jax", {"cross_entropy": off_by_one})
    out_of_memory = peers.Implementation("too large", "jax", {"cross_entropy": raising})
    monkeypatch.setattr(peers, "PEERS", (wrong, out_of_memory))
    monkeypatch.setitem(SUITES, "core", [TINY_CASES[1]])
    out = tmp_path / "run.jsonl"
    # A peer that raises fails the run, one that is wrong does not.
    assert command_line.main(["run", "core", "--quick", "--out", str(out)]) == 1
    run = results.read(out)
    ours, peer = run.rows()
    assert (ours["wrong"], peer["wrong"]) == (False, True)
    assert "seconds" not in ours
    assert "ratio" not in peer
    (failure,) = run.failures()
    assert (failure["kind"], failure["bytes"]) == ("out of memory", 1024)
    printed = capsys.readouterr().out
    assert "1 wrong results (wrong), 1 failed" in printed
    assert "out of memory, 1024 bytes asked: cross_entropy" in printed


def test_a_case_that_raises_is_recorded_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SUITES, "core", [Case("cross_entropy", "curl", TINY), TINY_CASES[0]])
    out = tmp_path / "run.jsonl"
    assert command_line.main(["run", "core", "--quick", "--out", str(out)]) == 1
    run = results.read(out)
    assert len(run.failures()) == 1
    assert len(run.rows()) >= 1
    assert "error: cross_entropy/curl/tiny/float32: " in capsys.readouterr().out


def test_softjax_out_of_memory_is_recorded_with_the_bytes_and_the_run_goes_on(
    monkeypatch, tmp_path, capsys
):
    def outer(logits, labels):  # [40] to [40] * 9: 2^50 bytes
        x = total = jnp.ravel(logits)
        for _ in range(8):
            total = total[..., None] + x
        return total

    def exhausted(logits, labels):  # as XLA says it of an accelerator
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: trying to allocate 1.50GiB")

    monkeypatch.setitem(peers.SOFTJAX.operations, "log_softmax", outer)
    monkeypatch.setitem(peers.SOFTJAX.operations, "cross_entropy", exhausted)
    huge = Shape("huge", 2**46, 5, "not even the logits fit")
    failing = [
        Case("log_softmax", "value", TINY),
        Case("cross_entropy", "value", TINY),
        Case("softmax", "value", huge),
    ]
    monkeypatch.setitem(SUITES, "core", [*failing, TINY_CASES[0]])
    out = tmp_path / "run.jsonl"
    assert command_line.main(["run", "core", "--quick", "--out", str(out)]) == 1
    run = results.read(out)
    assert [failure["case"] for failure in run.failures()] == [case.name for case in failing]
    assert {failure["kind"] for failure in run.failures()} == {"out of memory"}
    asked = [failure["bytes"] for failure in run.failures()]
    assert asked[:2] == [4 * 40**9, 3 * 2**29]
    assert asked[2] == 5 * 2**48
    assert len(run.rows()) >= 1
    printed = capsys.readouterr().out
    assert f"out of memory, {asked[0]} bytes asked: log_softmax/value/tiny/float32" in printed


def test_what_was_measured_before_an_interrupt_is_kept(tiny_core, monkeypatch, tmp_path, capsys):
    def interrupted(suite, case, pairs):
        if case is TINY_CASES[1]:
            raise KeyboardInterrupt
        failed = {"suite": "core", "case": "first", "kind": "error", "bytes": None, "error": "no"}
        yield {"record": "failure"} | failed

    monkeypatch.setattr(command_line, "measured", interrupted)
    out = tmp_path / "run.jsonl"
    assert command_line.main(["run", "core", "--quick", "--out", str(out)]) == 130
    with out.open("a") as file:
        file.write('{"record": "res')  # as a crash leaves it
    assert len(results.read(out).failures()) == 1
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "cores"], "unknown suite cores; there is core"),
        (["aot", "cores", "--target", "gpu:h100"], "unknown suite cores; there is core"),
        (["run", "--only", "sigmoid"], "no case's name holds 'sigmoid'"),
        (["run", "core", "--out", __file__ + "/run.jsonl"], "name another place by --out FILE"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_anything_is_measured(
    arguments, message, capsys
):
    assert command_line.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: ")
    assert message in line


def test_list_names_suites_shapes_and_absent_peers(monkeypatch, capsys):
    operations = peers.JAX_NN.operations
    absent = peers.Implementation("absent", "no-such-distribution", operations)
    elsewhere = peers.Implementation("elsewhere", "jax", operations, platforms=("tpu",))
    monkeypatch.setattr(command_line, "PEERS", (*peers.PEERS, absent, elsewhere))
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, absent, elsewhere))
    assert command_line.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("gemma-3" in line and "(64, 262144)" in line for line in lines)
    assert any("absent" in line and "not installed" in line for line in lines)
    assert any("elsewhere" in line and "only on tpu" in line for line in lines)
    assert not {"absent", "elsewhere"} & {peer.name for peer in peers.peers_of("softmax")}


def test_every_case_has_its_own_name():
    for suite, own in SUITES.items():
        names = [case.name for case in own]
        assert len(set(names)) == len(names), suite


def test_the_asked_cases_stay():
    asked = [case for case in core.core() if case.bound is not None]
    assert [case.mode == "eager" for case in asked] == [False] * 24 + [True] * 2
    assert all(case.quick and case.dtype == "float32" and not case.donated for case in asked)


PAIRS_OF_MODES = [
    ("logsumexp", ("value", "gradient", "jvp", "hvp", "hessian")),
    ("softmax", ("value", "gradient", "jvp")),
    ("log_softmax", ("value", "gradient", "jvp")),
    ("cross_entropy", ("value", "gradient", "value_and_gradient", "jvp", "hvp")),
]


def normalizer(operation, labels):
    """The function of float64 logits, written out."""

    def function(x):
        y = np.log(np.exp(x).sum(axis=-1, keepdims=True))
        return {
            "logsumexp": lambda: y[:, 0],
            "softmax": lambda: np.exp(x - y),
            "log_softmax": lambda: x - y,
            "cross_entropy": lambda: y[:, 0] - x[np.arange(len(labels)), labels],
        }[operation]()

    return function


@pytest.mark.parametrize(("operation", "modes"), PAIRS_OF_MODES)
def test_the_reference_is_the_difference_quotient(operation, modes):
    logits, labels, tangent = inputs(TINY, "float64")
    function, h = normalizer(operation, labels), 1e-5

    def along(g, direction):
        return (g(logits + h * direction) - g(logits - h * direction)) / (2 * h)

    def total(x):
        y = function(x)
        return np.sum(tangent * y if y.ndim > 1 else y)

    units = np.eye(logits.size).reshape(-1, *logits.shape)
    gradient = np.array([along(total, unit) for unit in units]).reshape(logits.shape)
    for mode in modes:
        case = Case(operation, mode, TINY)
        got = reference(case, logits, labels, tangent)
        match mode:
            case "value":
                expected = [function(logits)]
            case "gradient":
                expected = [gradient]
            case "value_and_gradient":
                expected = [function(logits).mean(), gradient / TINY.examples]
            case "jvp":
                expected = [function(logits), along(function, tangent)]
            case "hvp" | "hessian":
                change = [
                    reference(Case(operation, "gradient", TINY), x, labels, tangent)[0]
                    for x in (logits + h * tangent, logits - h * tangent)
                ]
                expected = [(change[0] - change[1]) / (2 * h)]
                if mode == "hessian":
                    got = [np.einsum("nij,nj->ni", got[0], tangent)]
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)  # h^2 and rounding over h


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        ("softmax", "gradient"),
        ("log_softmax", "jvp"),
        ("cross_entropy", "hvp"),
        ("logsumexp", "hessian"),
    ],
)
def test_softjax_returns_the_reference_in_every_mode(operation, mode):
    arrays = inputs(TINY, "float32")
    expected = reference(Case(operation, mode, TINY), *arrays)
    function = jax.jit(peers.in_mode(peers.SOFTJAX.operations[operation], mode))
    assert measure.error(function(*arrays), expected) <= measure.TOLERANCES["float32"]


@pytest.mark.parametrize("n", [6, 9, 20, 41])
def test_the_interval_of_the_median_covers_95_percent(n):
    # The ranks (k, n + 1 - k) cover the median with probability 1 - 2 P(Binomial(n, 1/2) < k).
    interval = measure.estimate(range(1, n + 1))
    k = int(interval.low)
    assert interval.high == n + 1 - k
    assert 2 * binom.cdf(k - 1, n, 0.5) <= 0.05 < 2 * binom.cdf(k, n, 0.5)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (ValueError("no"), None),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 40 bytes."), 40),
        (RuntimeError("RESOURCE_EXHAUSTED: trying to allocate 1.50GiB"), 3 * 2**29),
        (MemoryError("Unable to allocate 2.0 MiB for an array"), 2**21),
        (MemoryError(), 0),
    ],
)
def test_the_bytes_that_were_asked_are_read_from_the_error(error, asked):
    assert measure.bytes_asked(error) == asked


def test_a_call_that_does_not_fit_the_memory_is_not_made():
    argument = jnp.zeros((2**20, 1))
    outer = lambda x: jnp.exp(x - x.T)  # noqa: E731  4 TiB
    with pytest.raises(measure.OutOfMemory) as caught:
        measure.compile_ahead(outer, argument)
    assert measure.bytes_asked(caught.value) >= 2**42


FAULTS = """
import resource
from benchmarks import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        bytearray(2**24)[:: 2**12] = bytes(2**12)  # writes to each page of 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
memory.keep_memory()
faults()
print(default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_a_process_that_keeps_its_memory_takes_no_new_pages():
    command = [sys.executable, "-c", FAULTS]
    process = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    default, kept = map(int, process.stdout.split())
    assert kept < 20 < default


def test_the_work_of_a_case_is_what_its_formula_reads_and_writes():
    work = roofline.of_logits("softmax", "value", 4, 10, itemsize=2)
    assert work == {"flops": 5 * 40, "work_bytes": 2 * 40 * 2}
    work = roofline.of_head("value_and_gradient", 2, 3, 5, itemsize=4)
    assert work == {"flops": 3 * 2 * 30, "work_bytes": 2 * (2 + 5) * 3 * 4}
    for case in core.core():
        shape = case.shape
        if case.mode == "eager":
            continue
        work = roofline.of_logits(case.operation, case.mode, shape.examples, shape.classes, 4)
        assert work["work_bytes"] >= 4 * shape.examples * shape.classes


def test_json_knows_no_infinity(tmp_path):
    path = tmp_path / "run.jsonl"
    with path.open("w") as file:
        results.write({"record": "environment", "error": math.inf, "range": (1, math.nan)}, file)
    assert json.loads(path.read_text()) == {
        "record": "environment",
        "error": None,
        "range": [1, None],
    }

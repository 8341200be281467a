"""Programs compiled for absent devices: the parser of their text, their costs, the command."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from benchmarks import __main__ as command_line
from benchmarks import aot, aot_cases, hlo, report, results, targets, traffic

pytestmark = pytest.mark.x64_once

TEXTS = Path(__file__).parent / "hlo"
CHIP = traffic.Chip(bandwidth=1e9, peak=1e12, slowed_float32=2, slowed_highest=6)


def program(*lines, others=""):
    """A module whose entry has these lines, the last of them the root."""
    body = "\n".join(f"  {'ROOT ' if line is lines[-1] else ''}{line}" for line in lines)
    entry = f"ENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}"
    return f"HloModule m, num_partitions=4\n\n{others}\n\n{entry}\n"


def costs(*lines, others=""):
    return traffic.of_program(hlo.read(program(*lines, others=others)), CHIP)


# --- types ---


@pytest.mark.parametrize(
    ("text", "size", "padded", "space"),
    [
        ("f32[4096,1000]{1,0}", 4 * 4096 * 1000, 4 * 4096 * 1000, 0),
        # The fastest dimension, the last one, is filled up to 128, the next to 8.
        ("f32[10,1000]{1,0:T(8,128)}", 4 * 10 * 1000, 4 * 16 * 1024, 0),
        # Here the first dimension is the fastest.
        ("f32[10,1000]{0,1:T(8,128)S(1)}", 4 * 10 * 1000, 4 * 128 * 1000, 1),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30, 2 * 8 * 128, 0),
        ("f32[100]{0:T(1024)}", 400, 4096, 0),
        ("pred[7]{0}", 7, 7, 0),
        ("s4[7]{0}", 4, 4, 0),
        ("f8e4m3fn[8]{0}", 8, 8, 0),
        ("f64[]", 8, 8, 0),
        ("f32[2]{0:T(8,128)}", 8, 4 * 128, 0),
        ("u32[]{:S(2)}", 4, 4, 2),
        ("token[]", 0, 0, 0),
    ],
)
def test_the_bytes_of_an_array(text, size, padded, space):
    (array,) = hlo.arrays(text)
    assert (array.size, array.padded_size, array.space) == (size, padded, space)


def test_a_tuple_is_its_arrays():
    first, second = hlo.arrays("(f32[4,8]{1,0:T(8,128)}, /*index=1*/(s32[2]{0}))")
    assert (first.shape, second.shape, second.dtype) == ((4, 8), (2,), "s32")


def test_a_line_has_a_type_an_operation_operands_and_attributes():
    read = hlo.read(
        program(
            "%x = f32[8]{0} parameter(0)",
            '%y = (f32[8]{0}, f32[]) custom-call(%x), custom_call_target="f(x)", calls=%none',
        )
    )
    root = read.computations[read.entry].root
    assert (root.name, root.operation, root.operands) == ("y", "custom-call", ("x",))
    assert (root.called("calls"), read.partitions, len(root.arrays)) == ("none", 4, 2)
    assert read.computations[read.entry].parameter(0) == "x"


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="must have an ENTRY computation, got 'no program'"):
        hlo.read("no program")


# --- costs ---

MATRIX = "%x = f32[1000,1000]{1,0} parameter(0)"
MB = 1_000_000


def test_a_kernel_reads_its_operands_and_writes_its_results():
    found = costs(MATRIX, "%y = f32[1000]{0} reduce(%x), dimensions={1}")
    (kernel,) = found.kernels
    assert (kernel.read, kernel.written, found.launches) == (4 * MB, 4000, 1)
    assert found.seconds == (4 * MB + 4000) / CHIP.bandwidth


def test_what_is_in_fast_memory_or_is_no_kernel_costs_nothing():
    found = costs(
        MATRIX,
        "%b = f32[1000000]{0} bitcast(%x)",
        "%f = f32[1000000]{0:S(1)} negate(%b)",
        "%t = (f32[1000000]{0}, f32[1000000]{0:S(1)}) tuple(%b, %f)",
        "%g = f32[1000000]{0:S(1)} get-tuple-element(%t), index=1",
    )
    assert [(k.read, k.written) for k in found.kernels] == [(4 * MB, 0)]


FUSED_SLICE = """%fused (p: f32[1000,1000]) -> f32[10,1000] {
  %p = f32[1000,1000]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %b = f32[1000,1000]{1,0} bitcast(%p)
  %s = f32[10,1000]{1,0} dynamic-slice(%b, %q, %q), dynamic_slice_sizes={10,1000}
  ROOT %e = f32[10,1000]{1,0} exponential(%s)
}
"""
FUSED_UPDATE = """%fused (p: f32[1000,1000]) -> f32[1000,1000] {
  %p = f32[1000,1000]{1,0} parameter(0)
  %u = f32[10,1000]{1,0} parameter(1)
  %i = s32[] constant(0)
  %w = f32[1000,1000]{1,0} dynamic-update-slice(%p, %u, %i, %i)
  ROOT %r = f32[1000,1000]{1,0} bitcast(%w)
}
"""


def test_an_asynchronous_slice_reads_the_slice_alone():
    (_, kernel) = costs(
        "%x = f32[1000,256]{1,0} parameter(0)",
        "%c = (f32[1000,256]{1,0:S(1)}, f32[1000,256]{1,0}, u32[]{:S(2)}) copy-start(%x)",
        "%s = ((f32[1000,256]{1,0}), f32[250,256]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)",
    ).kernels
    assert (kernel.read, kernel.written) == (4 * 250 * 256, 0)


def test_a_fusion_reads_the_slice_that_it_takes():
    index = "%i = s32[] constant(3)"
    call = "%f = f32[10,1000]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused"
    (kernel,) = costs(MATRIX, index, call, others=FUSED_SLICE).kernels
    assert (kernel.read, kernel.written) == (40_000 + 4, 40_000)
    # It converts no more than the slice, but if the result is converted whole, it reads all of it.
    converted = FUSED_SLICE.replace("bitcast(%p)", "convert(%p)")
    assert costs(MATRIX, index, call, others=converted).kernels == [kernel]
    whole = FUSED_SLICE.replace("exponential(%s)", "convert(%p)")
    (other,) = costs(MATRIX, index, call, others=whole).kernels
    assert other.read == 4 * MB + 4
    # With another use it reads all of it.
    more = FUSED_SLICE.replace("exponential(%s)", "add(%s, %m)").replace(
        "  ROOT", "  %m = f32[] reduce(%p), dimensions={0,1}\n  ROOT"
    )
    (kernel,) = costs(MATRIX, index, call, others=more).kernels
    assert kernel.read == 4 * MB + 4


def test_an_update_in_place_writes_the_update():
    update = "%u = f32[10,1000]{1,0} parameter(1)"
    call = "%f = f32[1000,1000]{1,0} fusion(%x, %u), kind=kLoop, calls=%fused"
    (kernel,) = costs(MATRIX, update, call, others=FUSED_UPDATE).kernels
    assert (kernel.read, kernel.written) == (40_000, 40_000)


LOOP = """%body (s: (s32[], f32[1000,1000])) -> (s32[], f32[1000,1000]) {
  %s = (s32[], f32[1000,1000]{1,0}) parameter(0)
  %v = f32[1000,1000]{1,0} get-tuple-element(%s), index=1
  %n = f32[1000,1000]{1,0} negate(%v)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %r = (s32[], f32[1000,1000]{1,0}) tuple(%i, %n)
}

%condition (s: (s32[], f32[1000,1000])) -> pred[] {
  %s.1 = (s32[], f32[1000,1000]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] constant(7)
  ROOT %c = pred[] compare(%i.1, %limit), direction=LT
}
"""


@pytest.mark.parametrize(
    ("config", "times"), [("", 7), (', backend_config={"known_trip_count":{"n":"12"}}', 12)]
)
def test_a_loop_counts_as_often_as_it_goes_round(config, times):
    start = "%t = (s32[], f32[1000,1000]{1,0}) tuple(%x, %x)"
    loop = "%w = (s32[], f32[1000,1000]{1,0}) while(%t), condition=%condition, body=%body"
    found = costs(MATRIX, start, loop + config, others=LOOP)
    assert (len(found.kernels), found.launches, found.bytes) == (1, times, times * 8 * MB)


def test_products_are_counted_by_their_types_and_slowed_by_their_precision():
    left, right = "%a = {}[100,2000]{{1,0}} parameter(0)", "%b = {}[2000,500]{{1,0}} parameter(1)"
    form = "%p = f32[100,500]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    flops = 2 * 100 * 500 * 2000
    half = costs(left.format("bf16"), right.format("bf16"), form)
    assert dict(half.products) == {"bf16xbf16>f32": 1}
    assert half.flops == flops
    single = costs(left.format("f32"), right.format("f32"), form)
    highest = costs(
        left.format("f32"), right.format("f32"), form + ", operand_precision={highest,highest}"
    )
    assert dict(highest.products) == {"f32xf32>f32:highest": 1}
    chip = traffic.Chip(1e20, 1e12, 2, 6)
    for lines, slowed in ((single, 2), (highest, 6)):
        assert lines.flops == flops
        text = form if lines is single else form + ", operand_precision={highest,highest}"
        read = hlo.read(program(left.format("f32"), right.format("f32"), text))
        assert traffic.of_program(read, chip).seconds == pytest.approx(slowed * flops / 1e12)
    # Batched products, and a library's call with a workspace beside its result.
    batched = costs(
        "%a = f32[8,100,20]{2,1,0} parameter(0)",
        "%b = f32[8,20,50]{2,1,0} parameter(1)",
        "%p = f32[8,100,50]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}",
    )
    assert batched.flops == 2 * 8 * 100 * 50 * 20
    library = costs(
        left.format("f32"),
        right.format("f32"),
        "%p = (f32[100,500]{1,0}, s8[4194304]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$lt$matmul"',
    )
    assert library.flops == flops
    assert library.kernels[0].written == 4 * 100 * 500


GROUPS = "replica_groups={{0,1,2,3}}, to_apply=%add"


@pytest.mark.parametrize(
    ("kind", "result", "sent"),
    [
        ("all-reduce", "f32[1000,1000]{1,0}", 2 * 3 / 4 * 4 * MB),
        ("all-gather", "f32[4000,1000]{1,0}", 3 * 4 * MB),
        ("reduce-scatter", "f32[250,1000]{1,0}", 3 / 4 * 4 * MB),
        ("collective-permute", "f32[1000,1000]{1,0}", 4 * MB),
    ],
)
def test_collectives_are_counted_in_bytes_that_a_device_sends(kind, result, sent):
    plain = costs(MATRIX, f"%c = {result} {kind}(%x), {GROUPS}")
    assert dict(plain.collectives) == {kind: sent}
    assert not plain.asynchronous
    assert not plain.kernels
    named = f'{GROUPS}, frontend_attributes={{async_collective_name="{kind}-start"}}'
    assert costs(MATRIX, f"%c = {result} {kind}(%x), {named}").asynchronous == {kind: sent}
    types = f"(f32[1000,1000]{{1,0}}, {result})"
    started = costs(
        MATRIX,
        f"%c = {types} {kind}-start(%x), {GROUPS}",
        f"%d = {result} {kind}-done(%c)",
    )
    assert started.collectives == started.asynchronous == {kind: sent}
    inside = "%wrapped (p: f32[]) -> f32[] {\n  %p = f32[1000,1000]{1,0} parameter(0)\n"
    inside += f"  ROOT %r = {result} {kind}(%p), {GROUPS}\n}}\n"
    wrapped = costs(
        MATRIX,
        f"%c = ((f32[1000,1000]{{1,0}}), {result}) async-start(%x), calls=%wrapped",
        f"%d = {result} async-done(%c)",
        others=inside,
    )
    assert wrapped.collectives == wrapped.asynchronous == {kind: sent}


def test_a_fusion_of_a_reduce_scatter_is_one():
    inside = f"""%all-reduce-scatter.1 (p: f32[]) -> f32[] {{
  %p = f32[1000,1000]{{1,0}} parameter(0)
  %r = f32[1000,1000]{{1,0}} all-reduce(%p), {GROUPS}
  ROOT %s = f32[250,1000]{{1,0}} slice(%r), slice={{[0:250], [0:1000]}}
}}
"""
    call = "%f = f32[250,1000]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    found = costs(MATRIX, call, others=inside)
    assert dict(found.collectives) == {"reduce-scatter": 3 * MB}
    assert not found.kernels


@pytest.mark.parametrize(
    ("name", "passes", "kernels"),
    # Optax's loss on (4096, 1000) and its gradient: one copy to fast memory, the maximum, and the
    # gradient. Softjax's logsumexp on an H100 in tiles: two passes, and what the tiles hold.
    [("loss_tpu", 3.002, 14), ("logsumexp_gpu", 2.416, 8)],
)
def test_programs_of_real_compilers_are_read(name, passes, kernels):
    found = traffic.of_program(hlo.read((TEXTS / f"{name}.txt").read_text()), CHIP)
    assert found.bytes / (4 * 4096 * 1000) == pytest.approx(passes, abs=1e-3)
    assert (found.launches, len(found.kernels)) == (kernels, kernels)


# --- verdicts ---


def rounded(checks):
    return {name: [round(got, 2), most] for name, (got, most) in checks.items()}


def side(**changed):
    counts = {"passes": 2.0, "temporary_bytes": 0, "moved_bytes": 1, "kernels": 3, "launches": 3}
    times = {"estimated_seconds": 1e-3, "lower_seconds": 0.1, "compile_seconds": 1.0}
    times["compile_cpu_seconds"] = 1.0
    return counts | times | {"flops": 0.0, "products": {}, "collectives": {}} | changed


@pytest.mark.parametrize(
    ("kind", "ours", "platform", "missed"),
    [
        ("value", {}, "tpu", []),
        ("value", {"passes": 2.001, "temporary_bytes": 3200, "launches": 4}, "gpu", []),
        ("value", {"passes": 2.1}, "gpu", ["ratio of passes"]),
        ("derivative", {"passes": 2.1}, "gpu", []),
        ("derivative", {"passes": 2.3, "launches": 5}, "gpu", ["ratio of passes", "kernels"]),
        ("value", {"temporary_bytes": 3300}, "gpu", ["temporaries"]),
        ("value", {"compile_cpu_seconds": 1.3}, "tpu", ["compile"]),
        ("value", {"compile_cpu_seconds": 1.3}, "gpu", []),
        ("loss and gradient", {"passes": 4.2}, "gpu", ["ratio of passes", "passes"]),
        ("", {"passes": 9.0}, "tpu", []),
    ],
)
def test_a_case_is_held_to_its_bounds(kind, ours, platform, missed):
    case = aot_cases.Case("core", "loss/8192x128256/float32", kind, abs, abs, "peer", (), 100)
    found = {"checks": rounded(aot.checks(case, side(**ours), side(), platform))}
    assert results.missed(found) == missed


@pytest.mark.parametrize(
    ("kind", "ours", "missed"),
    [
        # The float32 sum of the gradients of a bfloat16 kernel, 80 bytes, is no part of it.
        ("head", {"temporary_bytes": 80 + 500, "launches": 250}, []),
        ("head", {"temporary_bytes": 80 + 600, "launches": 251}, ["kernels", "temporaries"]),
        ("head", {"passes": 2.7, "flops": 4.0}, ["products", "ratio of passes"]),
        ("head", {"estimated_seconds": 1.1}, ["time"]),
        ("head, each", {"flops": 4.0, "passes": 9.0}, []),
        ("head, each", {"flops": 4.1}, ["products"]),
        ("head, small", {"temporary_bytes": 500_000_000, "flops": 4.0}, []),
        ("head, small", {"temporary_bytes": 500_000_100}, ["temporaries"]),
    ],
)
def test_a_head_is_held_to_its_bounds(kind, ours, missed):
    arguments = tuple(jax.ShapeDtypeStruct(s, "bfloat16") for s in ((3, 4), (4, 5)))
    case = aot_cases.Case("fused", "loss", kind, abs, abs, "peer", arguments, 3)
    here, theirs = (
        side(**({"flops": 3.0, "estimated_seconds": 1.0} | changed))
        for changed in (ours, {"temporary_bytes": 3000})
    )
    found = {"checks": rounded(aot.checks(case, here, theirs, "gpu"))}
    assert results.missed(found) == missed


def test_every_case_of_the_core_has_its_own_name_and_a_bound():
    cases = list(aot_cases.core(targets.Target("none", "tpu", [])))
    assert len({case.full_name for case in cases}) == len(cases)
    assert all(case.kind for case in cases)
    assert 8 <= sum(case.quick for case in cases) <= 16


# --- the command ---


def test_without_the_extra_one_line_names_it(monkeypatch, capsys):
    monkeypatch.setattr(targets, "version", lambda package: None)
    for target, extra in (("tpu:v5e:2x2", "aot-tpu"), ("gpu:h100", "aot-gpu")):
        assert command_line.main(["aot", "--target", target]) == 2
        said = capsys.readouterr().err
        assert f"{target} needs the extra {extra}: pip install '.[{extra}]'" in said
    assert command_line.main(["aot", "--target", "h100"]) == 2
    assert "a target is tpu:GENERATION:SHAPE or gpu:NAME, got 'h100'" in capsys.readouterr().err


def test_a_device_without_a_description_is_refused(monkeypatch):
    monkeypatch.setattr(targets, "version", lambda package: "1")
    with pytest.raises(targets.UnknownTarget, match="no description of gpu:k80; there is gpu:h100"):
        targets.target("gpu:k80")


def test_a_run_writes_its_rows_and_the_report_says_that_nothing_was_run(
    monkeypatch, tmp_path, capsys
):
    device = type("Device", (), {"device_kind": "TPU v5 lite"})()
    target = targets.Target("tpu:v5e:2x2", "tpu", [device])

    def cases(target, suites):
        case = aot_cases.Case("core", "softmax", "value", len, max, "jax.nn", (), 8)
        yield case
        yield dataclasses.replace(case, name="loss", peer=print)
        yield dataclasses.replace(case, name="outputs", peer=None)
        yield dataclasses.replace(case, suite="fit", name="newton", ours=print)

    def program(function, arguments, target):
        if function is print:
            raise ValueError("no\nmore")
        return side(passes=1.0 if function is max else 2.0, collectives={"all-reduce": 2e6})

    monkeypatch.setattr(targets, "target", lambda name: target)
    monkeypatch.setattr(aot, "cases", cases)
    monkeypatch.setattr(aot, "program", program)
    out = tmp_path / "aot.jsonl"
    arguments = ["aot", "core", "fused", "--target", "tpu:v5e:2x2", "--out", str(out)]
    assert command_line.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "aot: 3 of 4 bounds met, 1 failed" in printed
    assert "error: fit/newton: ValueError: no" in printed
    run = results.read(out)
    assert run.label == "TPU v5 lite, compiled, not run"
    assert [row.get("failure") for row in run.rows()] == [
        None,
        None,
        None,
        "ValueError: no\nmore",
        None,
    ]
    section = next(part for part in report.sections([run]) if part.title == "aot")
    assert "compiled, not run" in section.text.lower()
    assert list(section.draw()) == []
    by = section.header.index("by")
    (line,) = [line for line in section.rows if line[by] == "jax.nn" and "softmax" in line[0]]
    assert "ratio of passes 2 > 1" in line[section.header.index("asked")]
    assert len(section.rows) == 5


def test_the_gate_names_what_grew_and_compares_no_other_version(monkeypatch, tmp_path):
    target = targets.Target("tpu:v5e:2x2", "tpu", [])
    figures = dict.fromkeys(aot.GATED, 10)
    monkeypatch.setattr(aot, "FILE", tmp_path / "figures.json")
    monkeypatch.setattr(aot, "program", lambda *_: dict(figures))
    lines, compared = aot.gate(target)
    assert not lines
    assert "nothing compared" in compared
    aot.gate(target, write=True)
    assert aot.gate(target)[0] == []
    figures["launches"] = 11
    lines, compared = aot.gate(target)
    assert len(lines) == sum(case.quick for case in aot_cases.core(target))
    assert "core/softmax/4096x1000/float32: launches 10 -> 11" in lines
    committed = json.loads(aot.FILE.read_text())
    committed["tpu:v5e:2x2"]["versions"]["jax"] = "0.1"
    aot.FILE.write_text(json.dumps(committed))
    assert aot.gate(target)[0] == []

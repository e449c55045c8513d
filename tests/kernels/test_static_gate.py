"""The static gate: the machine code of every kernel, compiled here for GPUs that are not here."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the static gate is Triton's compiler; pip install triton")

from fastgpt_kernels import static
from fastgpt_kernels._attention_blocks import multiply, multiply_subtract
from fastgpt_kernels._common import AotCase, aot_case, tl, triton

RESULTS = Path(__file__).parents[2] / "bench" / "results"
CASES = static.kernel_cases()
ATTENTION = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkv")


def failures(cases: list[AotCase], arch: str) -> list[str]:
    accepted = static.accepted_rows(RESULTS, arch)
    return [
        f"{case.name}: {problem}"
        for case, _, found in static.check(cases, arch, accepted)
        for problem in found
    ]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_main_cases(arch):
    cases = static.select(CASES, arch, main=True)
    assert {case.name.split("/")[0] for case in cases} >= set(ATTENTION)
    assert not failures(cases, arch)


@pytest.mark.full
@pytest.mark.parametrize("arch", static.ARCHITECTURES)
def test_all_cases(arch):
    assert not failures(static.select(CASES, arch), arch)


def attention_case(name: str, arch: str) -> AotCase:
    return next(case for case in static.select(CASES, arch, name))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", ATTENTION)
def test_attention_uses_this_generation_and_wide_access(kernel, arch):
    """Of the main cases nothing falls back to an older instruction, which small tiles may."""
    report = static.analyse(attention_case(f"{kernel}/d64-bf16", arch), arch)
    assert report.tensor
    assert all(name.startswith(static.CHIPS[arch].tensor) for name in report.tensor)
    assert (report.load_bits, report.store_bits) == (128, 128)


def test_the_gate_sees_a_spilling_tile():
    """The forward with twice the keys at once in half the warps: known not to fit in registers."""
    case = attention_case("attention_fwd/d128-bf16-g1-causal", "sm_80")
    tile = {**case.constexprs, "BLOCK_M": 128, "BLOCK_N": 64}
    planted = dataclasses.replace(case, constexprs=tile, num_warps=4, num_stages=3)
    report = static.analyse(planted, "sm_80")
    found = static.problems(report, "sm_80")
    assert report.spill_stores > 100
    assert any("spills" in problem for problem in found)
    assert any("in loops" in problem for problem in found)


CLEAN = static.Report(
    dots=2,
    wide_dots=2,
    registers=128,
    spill_stores=0,
    spill_loads=0,
    local_in_loops=0,
    shared=65_536,
    warps=8,
    tensor={"HGMMA": 8},
    loop_instructions=500,
    float64=0,
    load_bits=128,
    store_bits=128,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_stores": 4}, "spills 4 B"),
        ({"local_in_loops": 1}, "local memory"),
        ({"shared": 240_000}, "shared memory"),
        ({"warps": 0}, "no block fits"),
        ({"float64": 1}, "float64"),
        ({"tensor": {"HMMA": 8}}, "HMMA, not HGMMA"),
        ({"tensor": {"HMMA": 4, "HGMMA": 4}}, "not HGMMA"),
        ({"tensor": {}}, "no tensor core"),
    ],
)
def test_every_rule_can_fail(change, message):
    assert not static.problems(CLEAN, "sm_90")
    (found,) = static.problems(dataclasses.replace(CLEAN, **change), "sm_90")
    assert message in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop_instructions": 501}, "loop_instructions 501, accepted 500"),
        ({"load_bits": 64}, "load_bits"),
        ({"warps": 4}, "warps"),
        ({"spill_loads": 8}, "spill_loads"),
    ],
)
def test_accepted_numbers_only_improve(change, message, tmp_path):
    configuration = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}
    row = {"configuration": configuration, **dataclasses.asdict(CLEAN)}
    static.accept(tmp_path, "sm_90", {"kernel/case": row})
    accepted = static.accepted_rows(tmp_path, "sm_90")["kernel/case"]
    assert not static.regressions(row, accepted)
    assert not static.regressions({**row, "loop_instructions": 400, "warps": 16}, accepted)
    (found,) = static.regressions({**row, **change}, accepted)
    assert message in found


def test_accepting_into_no_directory_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        static.main(["--match", "gae", "--accept", "--results", str(tmp_path / "none")])
    assert "none: no such directory; give that of the tables" in capsys.readouterr().err


def test_retuning_frees_only_the_numbers_that_depend_on_the_tile():
    row = {"configuration": {"BLOCK_M": 64}, **dataclasses.asdict(CLEAN)}
    retuned = {**row, "configuration": {"BLOCK_M": 128}, "loop_instructions": 900, "warps": 4}
    assert not static.regressions(retuned, row)
    assert static.regressions({**retuned, "spill_stores": 4}, row)


def test_accepted_tables_are_clean():
    """What is committed must itself pass the rules."""
    tables = sorted(RESULTS.glob("static_*.json"))
    assert tables
    for path in tables:
        arch = path.stem.removeprefix("static_")
        for name, row in json.loads(path.read_text())["cases"].items():
            numbers = {key: value for key, value in row.items() if key != "configuration"}
            assert not static.problems(static.Report(**numbers), arch), name


SASS = """
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL.64 [R1], R2 ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R4.64] ;
        /*0030*/              @!P0 LDL R5, [R1+0x8] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR12], RZ, !UPT ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   DADD R2, R2, R4 ;
        /*0070*/                   STG.E.U16 desc[UR4][R4.64], R5 ;
        /*0080*/                   EXIT ;
.L_x_1:
        /*0090*/                   BRA `(.L_x_1);
"""


def test_reading_machine_code():
    report = static.analyse_sass(
        SASS, "tt.dot %a : tensor<64x16xbf16> * tensor<16x64xbf16>", 128, 0, 4, "sm_90"
    )
    assert (report.spill_stores, report.spill_loads, report.local_in_loops) == (8, 4, 1)
    assert report.tensor == {"HGMMA": 1}
    assert report.loop_instructions == 4
    assert (report.float64, report.load_bits, report.store_bits) == (1, 128, 16)


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "arch", "warps"),
    [
        (255, 49_152, 4, "sm_80", 8),  # registers: 2 warps per scheduler
        (32, 0, 4, "sm_90", 64),  # the limit of the chip
        (32, 0, 4, "sm_86", 48),
        (64, 100_000, 8, "sm_90", 16),  # shared memory: 2 blocks
        (168, 0, 8, "sm_90", 8),  # 3 warps per scheduler: one block of 8, the rest too few
    ],
)
def test_resident_warps(registers, shared, num_warps, arch, warps):
    assert static.resident_warps(registers, shared, num_warps, arch) == warps


@triton.jit
def pairs_kernel(x, y, z, difference, product):
    at = tl.arange(0, 64)
    a, b, c = tl.load(x + at), tl.load(y + at), tl.load(z + at)
    tl.store(difference + at, multiply_subtract(a, b, c, True))
    tl.store(product + at, multiply(a, b, True))


def test_pairs_of_floats_keep_their_order():
    """No interpreter runs inline PTX, but its machine code shows where the halves go.

    A thread loads, multiplies and stores pairs; nothing may exchange the halves between.
    """
    types = dict.fromkeys(("x", "y", "z", "difference", "product"), "*fp32")
    config = {"num_warps": 1, "num_stages": 1}
    case = aot_case("pairs", pairs_kernel, types, {}, config)
    text, _ = static.disassemble(static.compile_case(case, "sm_100").asm["cubin"])
    wanted = ("LDG", "STG", "FADD", "FFMA", "FMUL", "MOV", "PRMT", "SEL", "IMAD.MOV")
    code = [i for i in static.parse_sass(text) if i.mnemonic.startswith(wanted)]
    held: dict[int, str] = {}  # register -> which half of what
    stored = set()
    for instruction in code:
        kind = instruction.mnemonic.split(".")[0]
        registers = [int(r) for r in re.findall(r"\bR(\d+)", instruction.operands)]
        if kind == "LDG":
            assert instruction.mnemonic == "LDG.E.64"
            held[registers[0]], held[registers[0] + 1] = "low", "high"
        elif kind == "FADD":  # z negated
            assert "RZ, -R" in instruction.operands
            held[registers[0]] = held[registers[1]]
        elif kind in ("FFMA2", "FMUL2"):
            assert instruction.operands.count("F32x2.HI_LO") == len(registers) - 1
            assert all((held[r], held[r + 1]) == ("low", "high") for r in registers[1:])
            held[registers[0]], held[registers[0] + 1] = "low", "high"
            stored.add(kind)
        elif kind == "STG":
            assert instruction.mnemonic == "STG.E.64"
            assert (held[registers[-1]], held[registers[-1] + 1]) == ("low", "high")
        else:
            held.pop(registers[0], None)
    assert stored == {"FFMA2", "FMUL2"}


def test_a_name_that_no_case_has_is_no_success(capsys):
    with pytest.raises(SystemExit, match="2"):
        static.main(["--match", "no_such_kernel"])
    assert "--match no_such_kernel: no case" in capsys.readouterr().err

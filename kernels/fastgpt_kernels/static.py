"""The static gate: compile every kernel for any GPU without owning one, and judge the machine code.

    python -m fastgpt_kernels.static [--arch sm_90 ...] [--match attention] [--main] [--accept]

Triton compiles ahead of time for a target that is only named; its wheel carries ``ptxas`` and
``nvdisasm``. For each ``AotCase`` of each kernel module the table shows what predicts slowness
without a run: registers, local memory traffic (spills), in total and inside loops, shared memory
against the chip's limit, resident warps, which generation of tensor cores does the work, float64
instructions and the widest global access. ``bench/results/static_<arch>.json`` keeps the accepted
numbers, which may only improve: ``--accept`` writes those of the cases that pass; a worse number
is accepted by deleting its line first. Exit status 1 if a case fails.

This must run in a process without ``TRITON_INTERPRET``, which would replace the compiler.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgpt_kernels._common import ARCHITECTURES, HAS_TRITON, INTERPRETED, AotCase

MAIN_CASES_PER_KERNEL = 2
"""The quick gate compiles this many cases of each kernel and chip: the first ones it lists."""


@dataclass(frozen=True)
class Chip:
    """Limits of one architecture (CUDA programming guide, "Compute Capabilities"; CDNA3 ISA guide).

    Attributes:
        shared_limit: bytes of shared memory one block may use.
        shared_total: bytes of shared memory of one multiprocessor.
        max_warps: resident warps of one multiprocessor.
        max_blocks: resident blocks of one multiprocessor.
        tensor: how the mnemonics of this generation's tensor-core instructions begin.
    """

    shared_limit: int
    shared_total: int
    max_warps: int
    max_blocks: int
    tensor: str


CHIPS = {
    "sm_80": Chip(166_912, 167_936, 64, 32, "HMMA"),
    "sm_86": Chip(101_376, 102_400, 48, 16, "HMMA"),
    "sm_89": Chip(101_376, 102_400, 48, 24, "HMMA"),
    "sm_90": Chip(232_448, 233_472, 64, 32, "HGMMA"),
    "sm_100": Chip(232_448, 233_472, 64, 32, "UTC"),
    "sm_120": Chip(101_376, 102_400, 48, 24, "HMMA"),
    "gfx942": Chip(65_536, 65_536, 32, 32, "v_mfma"),
}
_REGISTERS_PER_SM = 65_536
_SHARED_RESERVED = 1024  # the driver keeps this much per block from sm_80 on


@dataclass(frozen=True)
class Report:
    """What the machine code of one case shows; byte counts are per thread, shared memory per block.

    Attributes:
        dots: matrix products in the program that tensor cores can do.
        wide_dots: those of 16-bit operands with at least 64 rows, which every generation's
            instruction can do (wgmma and tcgen05 do no fewer).
        registers: allocated per thread.
        spill_stores: bytes of local memory stores in the code, each instruction counted once.
        spill_loads: the same for loads.
        local_in_loops: local memory instructions between a backward branch and its target.
        shared: bytes of shared memory.
        warps: resident warps of one multiprocessor, from registers, shared memory and limits.
        tensor: tensor-core mnemonic -> number of instructions.
        loop_instructions: instructions inside loops, the ratchet's measure of work.
        float64: float64 arithmetic instructions.
        load_bits: widest global load.
        store_bits: widest global store.
    """

    dots: int
    wide_dots: int
    registers: int
    spill_stores: int
    spill_loads: int
    local_in_loops: int
    shared: int
    warps: int
    tensor: dict[str, int]
    loop_instructions: int
    float64: int
    load_bits: int
    store_bits: int


def target_of(arch: str) -> Any:
    """Triton's ``GPUTarget`` for ``sm_90``, ``gfx942`` ..."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def compile_case(case: AotCase, arch: str) -> Any:
    """Compile ``case`` for ``arch``; Triton's cache makes a repetition cheap.

    Raises:
        RuntimeError: the process interprets kernels (TRITON_INTERPRET is set).
    """
    if INTERPRETED:
        raise RuntimeError("static: TRITON_INTERPRET is set; unset it, the compiler is needed here")
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(case.fn, case.signature, case.constexprs, case.attrs)
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=target_of(arch), options=options)


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly: ``mnemonic`` with its modifiers, and the rest of the line."""

    mnemonic: str
    operands: str
    in_loop: bool


_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_LABEL = re.compile(r"^(\.L\w+):")
_SASS_BRANCH = re.compile(r"^(?:BRA|BRX|JMP)\b")
_SASS_TARGET = re.compile(r"`\((\.L\w+)\)")
_AMD_LABEL = re.compile(r"^(\.L\w+):")
_AMD_LINE = re.compile(r"^\s+([a-z]\w+)\s*(.*)$")


def _mark_loops(
    code: list[tuple[str, str]], labels: dict[str, int], target: Any
) -> list[Instruction]:
    """``target`` names the label a branch goes to, or is None; a backward branch makes a loop."""
    in_loop = [False] * len(code)
    for position, line in enumerate(code):
        start = labels.get(target(*line) or "", position + 1)
        if start < position:  # a branch to itself is the trap after the exit, not a loop
            in_loop[start : position + 1] = [True] * (position + 1 - start)
    return [Instruction(*line, inside) for line, inside in zip(code, in_loop, strict=True)]


def parse_sass(text: str) -> list[Instruction]:
    """Instructions of ``nvdisasm -c`` output."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _SASS_LINE.match(line):
            code.append((found[1], found[2]))

    def target(mnemonic: str, operands: str) -> str | None:
        found = _SASS_BRANCH.match(mnemonic) and _SASS_TARGET.search(operands)
        return found[1] if found else None

    return _mark_loops(code, labels, target)


def parse_amdgcn(text: str) -> list[Instruction]:
    """Instructions of the AMD assembly Triton emits."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.split(".section", 1)[0].splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _AMD_LINE.match(line):
            code.append((found[1], found[2]))

    def target(mnemonic: str, operands: str) -> str | None:
        return operands.split()[0] if mnemonic.startswith(("s_branch", "s_cbranch")) else None

    return _mark_loops(code, labels, target)


def disassemble(cubin: bytes) -> tuple[str, int]:
    """``nvdisasm -c`` text and registers per thread of a cubin, by the tools in Triton's wheel."""
    from triton import knobs

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        text = output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    return text, max(int(count) for count in re.findall(r"REG:(\d+)", usage))


_DOT = re.compile(r"\btt\.dot .*: tensor<(\d+)x\d+x(\w+)>")


def count_dots(ttir: str) -> dict[str, int]:
    """The ``dots`` and ``wide_dots`` of a ``Report``.

    Products of float32 at full precision, which no tensor core computes, are left out; those that
    may be computed in three passes name an ``inputPrecision``.
    """
    found = [_DOT.search(line) for line in ttir.splitlines() if " tt.dot " in line]
    found = [dot for dot in found if not (dot and dot[2] == "f32" and "inputP" not in dot[0])]
    wide = [dot for dot in found if dot and dot[2] in ("f16", "bf16") and int(dot[1]) >= 64]
    return {"dots": len(found), "wide_dots": len(wide)}


def access_bits(mnemonic: str) -> int:
    """Width of a SASS memory access: LDG.E.128, STG.E.U16, LDGSTS.E.BYPASS.LTC128B.128 ..."""
    for part in reversed(mnemonic.split(".")):
        if part in ("256", "128", "64"):
            return int(part)
        if re.fullmatch(r"[US](8|16)", part):
            return int(part[1:])
    return 32


def _widest(code: list[Instruction], prefixes: tuple[str, ...], bits: Any) -> int:
    return max((bits(i.mnemonic) for i in code if i.mnemonic.startswith(prefixes)), default=0)


def analyse_sass(
    text: str, ttir: str, registers: int, shared: int, num_warps: int, arch: str
) -> Report:
    """Read one kernel's ``nvdisasm -c`` output."""
    code = parse_sass(text)
    local = [i for i in code if i.mnemonic.startswith(("LDL", "STL"))]
    tensor: dict[str, int] = {}
    for instruction in code:
        name = instruction.mnemonic.split(".")[0]
        if name.endswith("MMA"):
            tensor[name] = tensor.get(name, 0) + 1
    return Report(
        **count_dots(ttir),
        registers=registers,
        spill_stores=sum(
            access_bits(i.mnemonic) // 8 for i in local if i.mnemonic.startswith("STL")
        ),
        spill_loads=sum(
            access_bits(i.mnemonic) // 8 for i in local if i.mnemonic.startswith("LDL")
        ),
        local_in_loops=sum(i.in_loop for i in local),
        shared=shared,
        warps=resident_warps(registers, shared, num_warps, arch),
        tensor=tensor,
        loop_instructions=sum(i.in_loop for i in code),
        float64=sum(
            bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w+64", i.mnemonic)) for i in code
        ),
        load_bits=_widest(code, ("LDG",), access_bits),  # LDGSTS too
        store_bits=_widest(code, ("STG",), access_bits),
    )


def resident_warps(registers: int, shared: int, num_warps: int, arch: str) -> int:
    """Warps of one multiprocessor that registers, shared memory and the block limits admit."""
    chip = CHIPS[arch]
    registers_per_warp = -(-max(registers, 16) * 32 // 256) * 256
    # Registers belong to one of the four schedulers; a block takes warps from each in turn.
    warps_per_scheduler = _REGISTERS_PER_SM // 4 // registers_per_warp
    by_registers = warps_per_scheduler * 4 // num_warps
    by_shared = chip.shared_total // (shared + _SHARED_RESERVED)
    blocks = min(by_registers, by_shared, chip.max_warps // num_warps, chip.max_blocks)
    return blocks * num_warps


def analyse_amdgcn(text: str, ttir: str, shared: int, num_warps: int, arch: str) -> Report:
    """Read the AMD assembly of one kernel; wavefronts take the place of warps."""
    code = parse_amdgcn(text)

    def note(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    def bits(mnemonic: str) -> int:
        found = re.search(r"dwordx(\d)", mnemonic)
        return 32 * int(found[1]) if found else 16 if "short" in mnemonic else 32

    scratch = [i for i in code if i.mnemonic.startswith("scratch_")]
    spilled = note("vgpr_spill_count") * 4
    tensor: dict[str, int] = {}
    for instruction in code:
        if instruction.mnemonic.startswith("v_mfma"):
            tensor["v_mfma"] = tensor.get("v_mfma", 0) + 1
    registers = note("vgpr_count")
    per_simd = min(512 // max(-(-registers // 8) * 8, 8), CHIPS[arch].max_warps // 4)
    by_shared = CHIPS[arch].shared_total // max(shared, 1) * num_warps
    memory = ("global_", "buffer_")
    return Report(
        **count_dots(ttir),
        registers=registers,
        spill_stores=max(spilled, sum(4 for i in scratch if "store" in i.mnemonic)),
        spill_loads=max(spilled, sum(4 for i in scratch if "load" in i.mnemonic)),
        local_in_loops=sum(i.in_loop for i in scratch),
        shared=shared,
        warps=min(per_simd * 4 // num_warps * num_warps, by_shared),
        tensor=tensor,
        loop_instructions=sum(i.in_loop for i in code),
        float64=sum("_f64" in i.mnemonic for i in code),
        load_bits=_widest(code, tuple(m + "load" for m in memory), bits),
        store_bits=_widest(code, tuple(m + "store" for m in memory), bits),
    )


def analyse_kernel(kernel: Any, arch: str) -> Report:
    """Read the machine code of what ``triton.compile`` returned."""
    shared, num_warps = kernel.metadata.shared, kernel.metadata.num_warps
    ttir = kernel.asm["ttir"]
    if arch.startswith("gfx"):
        return analyse_amdgcn(kernel.asm["amdgcn"], ttir, shared, num_warps, arch)
    text, registers = disassemble(kernel.asm["cubin"])
    return analyse_sass(text, ttir, registers, shared, num_warps, arch)


def analyse(case: AotCase, arch: str) -> Report:
    """Compile one case for one chip and read its machine code."""
    return analyse_kernel(compile_case(case, arch), arch)


def problems(report: Report, arch: str) -> list[str]:
    """What no case may show; empty if the report is clean."""
    chip, found = CHIPS[arch], []
    if report.spill_stores or report.spill_loads:
        found.append(f"spills {report.spill_stores} B stored, {report.spill_loads} B loaded")
    if report.local_in_loops:
        found.append(f"{report.local_in_loops} local memory instructions in loops")
    if report.shared > chip.shared_limit:
        found.append(f"needs {report.shared} B of shared memory, the chip has {chip.shared_limit}")
    elif report.warps == 0:
        found.append("no block fits on a multiprocessor")
    if report.float64:
        found.append(f"{report.float64} float64 instructions")
    current = [name for name in report.tensor if name.startswith(chip.tensor)]
    all_wide = report.dots == report.wide_dots
    if report.dots and not report.tensor:
        found.append("matrix products use no tensor core")
    elif report.wide_dots and (not current or (all_wide and len(current) < len(report.tensor))):
        found.append(f"matrix products use {', '.join(report.tensor)}, not {chip.tensor}")
    return found


def configuration(case: AotCase) -> dict[str, Any]:
    """What must be equal for instruction counts to be comparable."""
    blocks = {name: value for name, value in case.constexprs.items() if name.startswith("BLOCK")}
    return {**blocks, "num_warps": case.num_warps, "num_stages": case.num_stages}


_LESS_IS_BETTER = (
    "spill_stores",
    "spill_loads",
    "local_in_loops",
    "float64",
    "loop_instructions",
)
_MORE_IS_BETTER = ("load_bits", "store_bits", "warps")
_PER_CONFIGURATION = ("loop_instructions", "warps")


def regressions(row: dict[str, Any], accepted: dict[str, Any]) -> list[str]:
    """Numbers of ``row`` that are worse than the accepted ones of the same case."""
    retuned = row["configuration"] != accepted["configuration"]
    found = []
    for name in (*_LESS_IS_BETTER, *_MORE_IS_BETTER):
        if retuned and name in _PER_CONFIGURATION:
            continue
        change = row[name] - accepted[name]
        if change > 0 if name in _LESS_IS_BETTER else change < 0:
            found.append(f"{name} {row[name]}, accepted {accepted[name]}")
    return found


def kernel_cases() -> list[AotCase]:
    """The ``aot_cases()`` of every module of this package that has them."""
    import fastgpt_kernels

    names = sorted(module.name for module in pkgutil.iter_modules(fastgpt_kernels.__path__))
    modules = [importlib.import_module(f"fastgpt_kernels.{name}") for name in names]
    return [
        case for module in modules if hasattr(module, "aot_cases") for case in module.aot_cases()
    ]


def select(cases: list[AotCase], arch: str, match: str = "", main: bool = False) -> list[AotCase]:
    """Cases for one chip whose name contains ``match``; with ``main`` the first of each kernel."""
    chosen, seen = [], Counter()
    for case in cases:
        if arch not in case.architectures or match not in case.name:
            continue
        kernel = case.name.split("/")[0]
        seen[kernel] += 1
        if not main or seen[kernel] <= MAIN_CASES_PER_KERNEL:
            chosen.append(case)
    return chosen


def results_file(directory: Path, arch: str) -> Path:
    """Where the accepted numbers of a chip are kept."""
    return directory / f"static_{arch}.json"


def accepted_rows(directory: Path, arch: str) -> dict[str, Any]:
    """Case -> accepted numbers; empty if none were recorded with the running Triton version."""
    import triton

    path = results_file(directory, arch)
    table = json.loads(path.read_text()) if path.exists() else {}
    return table["cases"] if table.get("triton") == triton.__version__ else {}


def accept(directory: Path, arch: str, rows: dict[str, Any]) -> None:
    """Record ``rows`` as the numbers to keep, one line a case."""
    import triton

    lines = [f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows)]
    head = f'{{\n "triton": {json.dumps(triton.__version__)},\n "cases": {{\n'
    results_file(directory, arch).write_text(head + ",\n".join(lines) + "\n }\n}\n")


def check(
    cases: list[AotCase], arch: str, accepted: dict[str, Any]
) -> Iterator[tuple[AotCase, dict[str, Any] | None, list[str]]]:
    """Each case with its row of numbers (None if it does not compile) and what is wrong with it."""
    for case in cases:
        try:
            report = analyse(case, arch)
        except RuntimeError as error:
            yield case, None, [f"does not compile: {str(error).splitlines()[0]}"]
            continue
        row = {"configuration": configuration(case), **asdict(report)}
        found = problems(report, arch)
        if case.name in accepted:
            found += regressions(row, accepted[case.name])
        yield case, row, found


HEADER = (
    f"{'case':52} {'regs':>4} {'spill':>9} {'loop':>4} {'shared':>7} {'warps':>5} {'tensor':>12} "
    f"{'instr':>6} {'f64':>3} {'ld/st':>7}"
)


def format_row(name: str, row: dict[str, Any]) -> str:
    """One line of the table whose columns ``HEADER`` names."""
    spill = f"{row['spill_stores']}/{row['spill_loads']}"
    tensor = "+".join(f"{count} {kind}" for kind, count in row["tensor"].items()) or "-"
    return (
        f"{name:52} {row['registers']:4} {spill:>9} {row['local_in_loops']:4} {row['shared']:7} "
        f"{row['warps']:5} {tensor:>12} {row['loop_instructions']:6} {row['float64']:3} "
        f"{row['load_bits']:>3}/{row['store_bits']:<3}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table of each chip; 1 if a case fails, else 0."""
    parser = argparse.ArgumentParser("fastgpt_kernels.static", description="The static gate.")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=["sm_80", "sm_90"])
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--main", action="store_true", help="only the first cases of each kernel")
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--accept", action="store_true", help="record the numbers of clean cases")
    options = parser.parse_args(arguments)
    if options.accept and not options.results.is_dir():
        parser.error(f"--results {options.results}: no such directory; give that of the tables")
    if not HAS_TRITON:
        parser.error("this is Triton's compiler at work: pip install triton")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET replaces the compiler: unset it")
    every = kernel_cases()
    if not any(options.match in case.name for case in every):
        parser.error(f"--match {options.match}: no case has that in its name")
    failed = False
    for arch in options.arch:
        cases = select(every, arch, options.match, options.main)
        accepted = accepted_rows(options.results, arch)
        rows = dict(accepted) if options.match or options.main else {}
        print(f"{arch}\n{HEADER}")
        for case, row, found in check(cases, arch, accepted):
            print(format_row(case.name, row) if row else case.name, flush=True)
            for problem in found:
                print(f"    FAIL {problem}")
            failed = failed or bool(found)
            if row and not found:
                rows[case.name] = row
            elif case.name in accepted:
                rows[case.name] = accepted[case.name]
        if options.accept:
            accept(options.results, arch, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

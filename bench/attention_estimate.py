"""How busy attention's forward loop can keep the tensor cores: a bound from the machine code.

    python -m bench.attention_estimate [--arch sm_90 ...]

One trip of the loop needs T clocks of a multiprocessor's tensor cores (4 BLOCK_M BLOCK_N D floating
point operations at the chip's dense rate) and S clocks for all the rest, the longest of what the
special function units, the FMA units, the integer units and the instruction issue need for the
instructions counted in the loop. Perfect overlap would reach T / max(T, S) of the tensor cores'
peak, none at all T / (T + S). These are BOUNDS FROM COUNTED INSTRUCTIONS, NOT MEASUREMENTS: memory,
latency and synchronisation are not in them. They rank tiles of one kernel on one chip.

Anchors: the forward of Triton's fused attention tutorial, best of its tiles without spills, counted
in the same way (triton 3.7.1; on sm_90 3.9 gives the same).
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from fastgpt_kernels import static
from fastgpt_kernels._common import AotCase


@dataclass(frozen=True)
class Rates:
    """Operations of one multiprocessor a clock: bf16 tensor-core flops (dense), FMA lanes."""

    tensor: int
    fma: int


# Peak rates of NVIDIA's data sheets divided by multiprocessors and boost clock.
RATES = {"sm_80": Rates(2048, 64), "sm_90": Rates(4096, 128), "sm_100": Rates(8192, 128)}
SPECIAL_LANES, INTEGER_LANES, ISSUE = 16, 64, 4

TUTORIAL = {
    ("sm_80", 64): (0.594, 1.0),
    ("sm_80", 128): (0.663, 1.0),
    ("sm_90", 64): (480 / 989, 931 / 989),
    ("sm_90", 128): (653 / 989, 1.0),
    ("sm_100", 64): (0.330, 0.492),
    ("sm_100", 128): (0.496, 0.985),
}
"""(no overlap, perfect overlap) by chip and head size."""

_LABEL = re.compile(r"^(\.L\w+):")
_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_FMA = ("FFMA", "FMUL", "FADD", "HFMA", "HADD", "HMUL", "IMAD")
_ELSEWHERE = ("LD", "ST", "BAR", "SYNC", "BRA", "BSSY", "BSYNC", "WARP", "DEP", "UTC", "NOP")


@dataclass(frozen=True)
class Estimate:
    """Clocks of one multiprocessor for one block of keys and one block of queries."""

    case: AotCase
    tensor: float
    rest: dict[str, float]

    @property
    def bound(self) -> str:
        """The unit, besides the tensor cores, that takes longest."""
        return max(self.rest, key=lambda unit: self.rest[unit])

    @property
    def serial(self) -> float:
        """Part of the tensor cores' peak without any overlap."""
        return self.tensor / (self.tensor + self.rest[self.bound])

    @property
    def overlapped(self) -> float:
        """Part of the tensor cores' peak with perfect overlap."""
        return self.tensor / max(self.tensor, self.rest[self.bound])


def loops(sass: str) -> list[list[str]]:
    """The mnemonics of every innermost loop of a disassembly."""
    code: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _LINE.match(line):
            code.append(found[1])
            target = re.search(r"`\((\.L\w+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                spans.append((labels[target[1]], len(code)))
    spans = [(a, b) for a, b in spans if b - a > 1]
    inner = [s for s in spans if not any(t != s and t[0] >= s[0] and t[1] <= s[1] for t in spans)]
    return [code[a:b] for a, b in inner]


def estimate(case: AotCase, arch: str) -> Estimate:
    """Count the cheapest loop of ``case`` that has tensor-core and exponential instructions.

    Raises:
        ValueError: there is no such loop.
    """
    rates, threads = RATES[arch], 32 * case.num_warps
    scores = case.constexprs["BLOCK_M"] * case.constexprs["BLOCK_N"]
    text, _ = static.disassemble(static.compile_case(case, arch).asm["cubin"])
    candidates = []
    for body in loops(text):
        exponentials = sum(name.startswith("MUFU.EX2") for name in body)
        if not exponentials or not any(name.split(".")[0].endswith("MMA") for name in body):
            continue
        trips = max(1, round(exponentials * threads / scores))  # the compiler may unroll
        special = sum(name.startswith("MUFU") for name in body)
        fma = sum(name.startswith(_FMA) for name in body)
        tensor = sum(name.split(".")[0].endswith("MMA") for name in body)
        apart = sum(name.startswith(_ELSEWHERE) for name in body)
        rest = {
            "special": special * threads / SPECIAL_LANES,
            "fma": fma * threads / rates.fma,
            "integer": (len(body) - special - fma - tensor - apart) * threads / INTEGER_LANES,
            "issue": len(body) * case.num_warps / ISSUE,
        }
        candidates.append({unit: clocks / trips for unit, clocks in rest.items()})
    if not candidates:
        raise ValueError(f"{case.name} on {arch}: no loop with matrix products and exponentials")
    cheapest = min(candidates, key=lambda rest: max(rest.values()))
    return Estimate(case, 4 * scores * case.constexprs["HEAD_DIM"] / rates.tensor, cheapest)


def forward_cases(arch: str) -> list[AotCase]:
    """The forward without a mask at its two usual head sizes, in the checked-in tiles."""
    import torch

    from fastgpt_kernels.attention import aot_kernels

    mask = {"causal": False, "windowed": False, "softcap": False}
    cases = [case for D in (64, 128) for case in aot_kernels(D, 1, torch.bfloat16, mask)]
    return [c for c in cases if c.name.startswith("attention_fwd/") and arch in c.architectures]


def table(arch: str) -> list[str]:
    """Lines that say for each head size what the loop allows, beside the anchor."""
    lines = [
        f"{arch}: bounds from counted instructions, not measurements",
        f"{'D':>4} {'tile':>10} {'warps':>5} {'T':>6} {'S':>6} {'by':>8} {'none':>6} {'full':>6}"
        "   tutorial none/full",
    ]
    for case in forward_cases(arch):
        found = estimate(case, arch)
        D, M, N = (case.constexprs[name] for name in ("HEAD_DIM", "BLOCK_M", "BLOCK_N"))
        anchor = TUTORIAL.get((arch, D))
        beside = f"{anchor[0]:.2f}/{anchor[1]:.2f}" if anchor else "not known"
        lines.append(
            f"{D:4} {f'{M}x{N}':>10} {case.num_warps:5} {found.tensor:6.0f} "
            f"{found.rest[found.bound]:6.0f} {found.bound:>8} {found.serial:6.2f} "
            f"{found.overlapped:6.2f}   {beside}"
        )
    return lines


def main() -> None:
    """Print the table of each chip."""
    parser = argparse.ArgumentParser("bench.attention_estimate")
    parser.add_argument("--arch", nargs="+", choices=RATES, default=list(RATES))
    for arch in parser.parse_args().arch:
        print("\n".join(table(arch)))


if __name__ == "__main__":
    main()

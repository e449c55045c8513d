"""How many machine instructions the loss loops take for each logit, on sm_90."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the static gate is Triton's compiler; pip install triton")

from fastgpt_kernels import static
from fastgpt_kernels.cross_entropy import aot_cases
from fastgpt_kernels.linear_log_probs import aot_cases as log_prob_cases

CASES = {case.name: case for case in [*aot_cases(), *log_prob_cases()]}


def per_logit(name: str) -> float:
    """Instructions of the longest loop over those logits a thread handles in one turn."""
    case = CASES[name]
    text, _ = static.disassemble(static.compile_case(case, "sm_90").asm["cubin"])
    longest = length = 0
    for instruction in static.parse_sass(text):
        length = length + 1 if instruction.in_loop else 0
        longest = max(longest, length)
    return longest / (case.constexprs["BLOCK"] / (32 * case.num_warps))


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("gradient/50257_bf16", 6.7),
        ("gradient/50257_bf16_options", 15.0),
        ("gradient/50257_fp32_options", 27.0),
        ("log_prob_gradient/50257_bf16_entropy", 8.4),
        ("log_prob_gradient/50257_bf16_entropy_softcap", 16.8),
    ],
)
def test_gradient_loops(name, most):
    assert per_logit(name) <= most

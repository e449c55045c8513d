"""The static table: what the compiled kernels look like on a chip that need not be here.

``pytest bench/bench_static.py -s`` prints it and times the compilation of each kernel's main cases;
``python -m fastgpt_kernels.static`` prints all cases and compares them with the accepted numbers,
``python -m bench.attention_estimate`` what attention's loop leaves to the tensor cores.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the static table is made by Triton's compiler")

from bench import attention_estimate
from fastgpt_kernels import static

CASES = static.kernel_cases()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_static(benchmark, arch, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # time the compiler, not its cache
    cases = static.select(CASES, arch, main=True)
    checked = benchmark.pedantic(lambda: list(static.check(cases, arch, {})), rounds=1)
    print(f"\n{arch}\n{static.HEADER}")
    for case, row, found in checked:
        print(static.format_row(case.name, row) if row else case.name)
        assert not found, f"{case.name}: {found}"


def test_attention_estimate():
    """Bounds, not measurements: no worse than the best tile of Triton's tutorial."""
    for arch in attention_estimate.RATES:
        print("\n" + "\n".join(attention_estimate.table(arch)))
        for case in attention_estimate.forward_cases(arch):
            found = attention_estimate.estimate(case, arch)
            serial, overlapped = attention_estimate.TUTORIAL[arch, case.constexprs["HEAD_DIM"]]
            assert found.serial >= serial - 0.006
            assert found.overlapped >= overlapped - 0.005

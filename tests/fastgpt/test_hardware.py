"""What the machine can do, and memory that stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.errors import UsageError
from fastgpt.hardware import compute_dtype, has_bfloat16, peak_flops

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16", True),
        ("fpu amx_bf16 amx_tile", True),
        ("fpu avx2 avx512f avx512bw", False),
        ("fpu not_amx_bf16_really", False),
    ],
)
def test_bfloat16_is_read_from_the_cpu_flags(flags, expected, monkeypatch):
    text = f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: amx_bf16\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert has_bfloat16(CPU) is expected
    assert compute_dtype("auto", CPU) is (torch.bfloat16 if expected else torch.float32)
    assert compute_dtype("float32", CPU) is torch.float32
    assert compute_dtype("bfloat16", CPU) is torch.bfloat16


def test_no_cpuinfo_means_no_bfloat16(monkeypatch):
    def read_text(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert not has_bfloat16(CPU)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("AMD Instinct MI300X", 1307e12),
    ],
)
def test_known_gpus_have_the_peak_of_their_data_sheet(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(GPU, torch.bfloat16) == peak


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA L40"])
def test_other_gpus_are_measured(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        peak_flops(GPU, torch.bfloat16)


def test_other_devices_are_refused():
    with pytest.raises(UsageError, match="--device mps: only cpu and cuda"):
        peak_flops(torch.device("mps"), torch.float32)


FAULTS = """
import resource
from fastgpt.memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory(256 << 20)

def touch():
    [bytearray(64 << 20) for _ in range(5)]  # more than the padding that a trim leaves

touch()
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc")
def test_freed_memory_costs_no_page_faults():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    faults = {}
    for keep in (False, True):
        result = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keep=keep)],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        faults[keep] = int(result.stdout)
    # 2 x 5 x 64 MB in pages of 4 kB are 163840; with transparent huge pages it may be 320.
    assert faults[False] >= 100
    assert faults[True] <= faults[False] / 20

"""What this machine can do: compute dtype and peak FLOP/s, for the precision policy and for MFU."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch

from fastgpt.errors import UsageError

# Dense bfloat16 FLOP/s from the vendors' data sheets, by a part of the device's name.
_GPU_PEAK = {
    "A100": 312e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "5090": 210e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "MI250": 181e12,  # of one of its two dies, each a device
    "MI300": 1307e12,
}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations; "auto" is bfloat16 where the hardware multiplies it."""
    if name == "float32" or (name == "auto" and not has_bfloat16(device)):
        return torch.float32
    return torch.bfloat16


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: of the data sheet for known GPUs in bfloat16, else the best of a few products.

    Raises UsageError for other devices.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _GPU_PEAK.items():
            if re.search(rf"\b{part}(?!\d)", name):  # A100, but not RTX A1000
                return peak
    elif device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: only cpu and cuda (ROCm included) are supported")
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6 if device.type == "cuda" else 30):  # a busy machine gives few good ones
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best

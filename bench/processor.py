"""Which processor the figures of a bench are of."""

from __future__ import annotations

import platform
from pathlib import Path

# Those that decide which scanner, or which matrix product of PyTorch, runs.
VECTORS = ("avx2", "bmi2", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def processor() -> str:
    """Model and vector features of this machine's processor, as far as it tells them."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="ascii", errors="replace") if info.exists() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    model = fields.get("model name", platform.machine())
    if family := fields.get("cpu family"):  # cloud machines often name the maker only
        model += f" family {family}"
    flags = fields.get("flags", fields.get("Features", "")).split()
    vectors = " ".join(feature for feature in VECTORS if feature in flags)
    return f"{model} ({vectors or 'features unknown'})"

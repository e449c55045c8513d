"""Interpreter tests: collected only in a process started with TRITON_INTERPRET=1.

``@triton.jit`` decides at import whether a kernel is interpreted, so these tests cannot share a
process with the compiler. Run them with ``TRITON_INTERPRET=1 pytest tests/kernels/interpret``.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from interpreter_repair import repair_interpreter

    repair_interpreter()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` and relatives come filled with NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)

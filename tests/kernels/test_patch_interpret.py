"""Patched models on the Triton kernels themselves, in the interpreter: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="pip install transformers")
pytest.importorskip("triton", reason="the interpreter is Triton's")


@pytest.mark.full
@pytest.mark.parametrize(
    "which",
    [
        "outputs_and_gradients and (eager or checkpoint)",
        "eager-left or packed or sliding",
        "cache",
        "fused",
    ],
)
def test_patched_models_in_the_interpreter(which):
    tests = Path(__file__).with_name("test_patch_transformers.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(tests),
        "-k",
        which,
    ]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout

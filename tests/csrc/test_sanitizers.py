"""The C++ core under sanitizers, compared with naive training and encoding on random input."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("clang++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("sanitizer", "seconds"),
    [
        ("address,undefined", 3),
        pytest.param("address,undefined", 600, marks=pytest.mark.full),
        pytest.param("thread", 60, marks=pytest.mark.full),
    ],
)
def test_random_input_under(sanitizer, seconds, tmp_path):
    assert COMPILER is not None
    core = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "bindings.cpp"]
    program = tmp_path / "fuzz_core"
    command = [COMPILER, "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread"]
    command += ["-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", "-o", str(program)]
    subprocess.run([*command, str(Path(__file__).with_name("fuzz_core.cpp")), *core], check=True)
    result = subprocess.run([program, "1", str(seconds)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 10

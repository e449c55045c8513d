"""The C++ core under sanitizers, compared with naive training and encoding on random input."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("clang++") or shutil.which("g++")


@pytest.mark.full
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("name", ["fuzz_core", "fuzz_options"])
def test_random_input_under(sanitizer, name, tmp_path):
    assert COMPILER is not None
    core = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "bindings.cpp"]
    program = tmp_path / name
    command = [COMPILER, "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread"]
    command += ["-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", "-o", str(program)]
    subprocess.run([*command, str(Path(__file__).with_name(f"{name}.cpp")), *core], check=True)
    result = subprocess.run([program, "1", "60"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 10

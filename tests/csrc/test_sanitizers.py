"""The C++ core under sanitizers, compared with naive implementations on random input."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["fuzz_core", "fuzz_options", "fuzz_caches", "fuzz_threads"]
COMPILER = shutil.which("clang++") or shutil.which("g++")


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """The flags for a sanitizer and the core built with them; each is built once."""
    built: dict[str, tuple[list[str], list[str]]] = {}

    def build(sanitizer: str) -> tuple[list[str], list[str]]:
        if sanitizer not in built:
            assert COMPILER is not None
            flags = [COMPILER, "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread"]
            flags += ["-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
            folder = tmp_path_factory.mktemp("core")
            sources = sorted({*(ROOT / "csrc").glob("*.cpp")} - {ROOT / "csrc/bindings.cpp"})
            subprocess.run([*flags, "-c", *map(str, sources)], cwd=folder, check=True)
            built[sanitizer] = flags, [str(path) for path in sorted(folder.glob("*.o"))]
        return built[sanitizer]

    return build


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("name", "sanitizer", "seconds"),
    [
        *[(name, "address,undefined", 3) for name in NAMES],
        ("fuzz_threads", "thread", 3),
        *[pytest.param(name, "address,undefined", 600, marks=pytest.mark.full) for name in NAMES],
        *[pytest.param(name, "thread", 60, marks=pytest.mark.full) for name in NAMES],
    ],
)
def test_random_input_under(core, name, sanitizer, seconds, tmp_path):
    flags, objects = core(sanitizer)
    source = Path(__file__).with_name(f"{name}.cpp")
    program = tmp_path / name
    subprocess.run([*flags, "-o", str(program), str(source), *objects], check=True)
    result = subprocess.run([program, "1", str(seconds)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 10

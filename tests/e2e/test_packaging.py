"""What others install: the wheel's content, and that it works away from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from commands import ROOT, TINY

NOT_SOURCE = (
    *(".git", ".venv", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__"),
    *(".pytest_cache", ".ruff_cache", ".hypothesis", ".benchmarks"),
)
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command without the source tree on its path; its output, stopping at an error."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean copy of the source tree."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    return Path(shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE)))


def build_wheel(tree: Path, out: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", out, tree, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An interpreter with the wheel installed, and our dependencies from this environment."""
    return install(wheel, tmp_path_factory.mktemp("venv"))


def install(what: Path, venv: Path, *options: str) -> Path:
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE]
    # A line of a .pth file adds a directory without reading the .pth files in there, so the
    # source tree, which is installed beside our dependencies, stays out of reach.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv)
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, *options, what, cwd=venv)
    return python


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_both_packages_and_nothing_else(wheel, source):
    found = names(wheel)
    tops = {name.split("/")[0] for name in found}
    assert tops == {"fastgpt", "fastgpt_kernels", "fastgpt_trainer-0.1.0.dist-info"}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for extension in ("_bpe", "_attend"):
        assert {f"fastgpt/{extension}{suffix}", f"fastgpt/{extension}.pyi"} <= found
    assert {"fastgpt/py.typed", "fastgpt_kernels/py.typed"} <= found
    for package, folder in (("fastgpt", "fastgpt"), ("fastgpt_kernels", "kernels/fastgpt_kernels")):
        for path in (source / folder).rglob("*"):
            relative = path.relative_to(source / folder)
            if path.is_file() and path.name != "README.md":
                assert f"{package}/{relative}" in found


def test_no_top_level_kernels_package(source):
    """It would replace the package of that name, which transformers imports."""
    assert not (source / "kernels" / "__init__.py").exists()


def test_metadata_holds_ranges(wheel):
    """Other projects install our kernels beside their own torch."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = message_from_bytes(archive.read(name))
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in needed if "==" in line.replace("sys_platform ==", "")]
    assert [line for line in needed if line.startswith("torch>=")]
    assert metadata["Name"] == "fastgpt-trainer"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload().strip(), "the README is the description"


def test_an_installed_wheel_trains_and_generates(python, corpus, tmp_path):
    arguments = ["--data", corpus / "my.txt", "--out", "run", "--steps", 2, *TINY]
    out = run(python, "-P", "-m", "fastgpt.pretrain", *arguments, cwd=tmp_path)
    assert "bits/byte" in out
    script = "import fastgpt, fastgpt_kernels; print(fastgpt.__file__, fastgpt_kernels.__file__)"
    for path in run(python, "-P", "-c", script, cwd=tmp_path).split():
        assert Path(path).is_relative_to(python.parents[1])


def test_an_installed_wheel_passes_tests_of_ours(python, tmp_path):
    """As somebody who packages us runs them: no source tree on the path."""
    for folder in ("fastgpt", "kernels"):
        shutil.copytree(ROOT / "tests" / folder, tmp_path / folder)
    chosen = ["fastgpt/test_tokenizer_json.py", "fastgpt/test_rundir.py", "kernels/test_norm.py"]
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning"]
    out = run(python, "-P", "-m", "pytest", *options, *chosen, cwd=tmp_path)
    assert " passed" in out
    assert "skipped" not in out


def test_transformers_imports_beside_us(python, tmp_path):
    pytest.importorskip("transformers")
    script = (
        "import importlib.metadata as m, importlib.util, fastgpt, fastgpt_kernels\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9))\n"
        "print('kernels' in {f.parts[0] for f in m.files('fastgpt-trainer')})\n"
    )
    assert run(python, "-P", "-c", script, cwd=tmp_path).split()[-1] == "False"


def test_a_missing_extension_says_how_to_build_it(source, tmp_path):
    """As in a fresh clone, before anything is built."""
    script = (
        "from fastgpt.tokenizer import Tokenizer\n"
        "try:\n"
        "    Tokenizer.train(['a text'], 300)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    paths = os.pathsep.join([str(source), sysconfig.get_path("purelib")])
    out = run(sys.executable, "-S", "-c", script, cwd=tmp_path, PYTHONPATH=paths)
    assert "pip install -e ." in out
    assert "C++17 compiler" in out


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run(sys.executable, "-c", script, cwd=source)
    (archive,) = out.glob("*.tar.gz")
    return archive


def test_the_sdist_holds_the_sources(sdist, source):
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "fastgpt", "kernels", "tests"):
        for path in (source / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(source)) in found
    assert {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"} <= found
    assert not [name for name in found if name.endswith((".so", ".pyc"))]


@pytest.mark.full
def test_the_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (tree,) = (tmp_path / "sdist").iterdir()
    assert names(build_wheel(tree, tmp_path)) == names(wheel)


@pytest.mark.full
def test_an_editable_installation_follows_the_source(source, tmp_path):
    python = install(source, tmp_path, "--editable")
    script = (
        "import fastgpt, fastgpt_kernels, fastgpt._bpe as b; print(fastgpt.__file__, b.__file__)"
    )
    for path in run(python, "-P", "-c", script, cwd=tmp_path).split():
        assert Path(path).is_relative_to(source)

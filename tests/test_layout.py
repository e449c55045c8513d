"""The shape of the project: who may import whom, how long things are, what never appears."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports its own part and the parts named behind it; a stage no other stage. A package is
# named in place of its modules.
ARROWS = """
    errors      errors                                  <-
    config      config presets cli                      <- errors
    tokenizer   _bpe bpe tokenizer tiktoken_encoding chat <- errors
    data        data                                    <- errors
    output      progress rundir chart page report       <- errors config
    commands    bpe.commands                            <- errors config data output tokenizer
    machine     memory hardware distributed             <- errors
    model       model compiled optim lora decoder cached_attention _attend      <- errors config
    checkpoint  tensorfile manifest checkpoint          <- errors
    trainer     trainer evaluation loss                 <- errors config data output machine model checkpoint
    run         run launch plan generate answers export convert modeling_fastgpt                <- errors config data output machine model checkpoint trainer tokenizer
    post        preference rl                           <- errors config data output machine model checkpoint trainer tokenizer run
    assess      assess                                  <- errors config data output machine model checkpoint trainer tokenizer run post
    stage       pretrain sft evaluate reward dpo pipeline ppo <- errors config data output machine model checkpoint trainer tokenizer run post assess
"""  # noqa: E501
PART: dict[str, str] = {}
MAY_IMPORT: dict[str, set[str]] = {}
for line in ARROWS.strip().splitlines():
    left, _, right = line.partition("<-")
    part, *modules = left.split()
    PART |= dict.fromkeys(modules, part)
    MAY_IMPORT[part] = set(right.split()) | ({part} if part != "stage" else set())

TRAINER = sorted((ROOT / "fastgpt").glob("**/*.py"))
KERNELS = sorted((ROOT / "kernels").glob("**/*.py"))
CORE = sorted(p for pattern in ("*.cpp", "*.h") for p in (ROOT / "csrc").rglob(pattern))
GENERATED = {"unicode_ranges.h"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module in ("fastgpt", "fastgpt_kernels"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(str(node.module))
    return found


def module_of(path: Path) -> str:
    """``bpe.files`` for fastgpt/bpe/files.py."""
    return ".".join(path.relative_to(ROOT / "fastgpt").with_suffix("").parts)


MODULES = {module_of(path) for path in TRAINER} | {"_bpe", "_attend"}


def siblings(path: Path) -> set[str]:
    """Modules of fastgpt that a file imports, ``bpe.files`` for example."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {
        name.removeprefix("fastgpt.") for name in found if name.startswith("fastgpt.")
    } & MODULES


def part_of(module: str) -> str:
    found = PART.get(module) or PART.get(module.partition(".")[0])
    assert found is not None, f"{module} needs a place in the table"
    return found


@pytest.mark.parametrize("path", TRAINER, ids=module_of)
def test_arrows_point_one_way(path):
    if path.stem == "__init__":
        assert not imports(path)
        return
    part = part_of(module_of(path))
    for module in siblings(path):
        assert part_of(module) in MAY_IMPORT[part], f"{module_of(path)} imports {module}"


def test_no_module_imports_itself_through_others():
    """Inside a part, too: neither at import time nor within a function."""
    graph = {module_of(path): siblings(path) for path in TRAINER}

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    assert [module for module in graph if module in reached(module)] == []


def test_one_module_uses_each_extension():
    users = {
        name: [module_of(path) for path in TRAINER if name in siblings(path)]
        for name in ("_bpe", "_attend")
    }
    assert users == {"_bpe": ["bpe.byte_pair"], "_attend": ["cached_attention"]}
    python = [path.name for path in CORE if re.search(r"pybind11|Python\.h", path.read_text())]
    assert set(python) == {"bindings.cpp", "python_ids.h", "python_text.h"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_depend_on_torch_and_triton_only(path):
    allowed = {"torch", "triton", "fastgpt_kernels"} | sys.stdlib_module_names
    assert {name.partition(".")[0] for name in imports(path)} <= allowed


def test_kernels_is_a_source_root_not_a_package():
    assert not (ROOT / "kernels/__init__.py").exists()


LIGHT = "config presets cli errors progress rundir memory plan"
DATA = "documents shards corpus order batches"


def test_modules_without_tensors_load_no_torch():
    names = [*LIGHT.split(), *(f"data.{name}" for name in DATA.split()), "pretrain", "generate"]
    modules = [f"fastgpt.{name}" for name in names]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def functions() -> list[tuple[str, int, bool]]:
    """Name, lines with decorators, and whether Triton compiles it."""
    found = []
    for path in TRAINER + KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                jit = any("jit" in ast.unparse(d) for d in node.decorator_list)
                lines = (node.end_lineno or first) - first + 1
                found.append((f"{name_of(path)}:{first} {node.name}", lines, jit))
    return found


def test_functions_are_short():
    found = functions()
    assert [f for f in found if f[1] > (150 if f[2] else 100)] == []
    lengths = sorted(lines for _, lines, _ in found)
    assert lengths[int(0.9 * len(lengths))] <= 47


def test_files_are_short():
    sources = [path for path in TRAINER + KERNELS + CORE if path.name not in GENERATED]
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in sources}
    assert {name: lines for name, lines in lengths.items() if lines > 600} == {}


def forbidden(tree: ast.AST) -> set[str]:
    """Ways to run what a file says, or to read a file that can."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            found |= {"pickle", "dill", "marshal", "shelve", "joblib"} & set(names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found |= {"eval", "exec", "torch.load", "torch.save", "yaml.load"} & {called}
            found |= {"allow_pickle"} & {keyword.arg for keyword in node.keywords}
    return found


@pytest.mark.parametrize("path", TRAINER + KERNELS, ids=name_of)
def test_no_file_can_run_code(path):
    assert forbidden(ast.parse(path.read_text())) == set()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import pickle", "pickle"),
        ("from pickle import load", "pickle"),
        ("torch.load(path, weights_only=True)", "torch.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("model.eval()", None),
    ],
)
def test_what_runs_code_is_found(code, found):
    assert forbidden(ast.parse(code)) == ({found} if found else set())


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_use_nothing_that_triton_removed(path):
    assert not re.search(r"make_block_ptr|tl\.advance|libdevice", path.read_text())

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

# A module imports its own part and the parts named behind it; a stage no other stage.
ARROWS = """
    errors      errors                                  <-
    config      config presets cli                      <- errors
    tokenizer   _bpe tokenizer_text tokenizer_json tokenizer_bpe tokenizer_sentencepiece tokenizer_files tokenizer tiktoken_encoding chat <- errors
    data        order documents shards corpus data examples packing rankings encode_files <- errors
    output      progress rundir chart page report       <- errors config
    commands    tokenizer_commands                      <- errors config data output tokenizer
    machine     memory hardware distributed             <- errors
    model       model optim lora decoder                <- errors config
    checkpoint  tensorfile manifest checkpoint          <- errors
    trainer     trainer evaluation loss                 <- errors config data output machine model checkpoint
    run         run launch plan generate export convert modeling_fastgpt                <- errors config data output machine model checkpoint trainer tokenizer
    post        reward_model preferences pair_metrics pair_report rl rl_config rollout actor_critic experience                <- errors config data output machine model checkpoint trainer tokenizer run
    assess      ratings tasks judges                    <- errors config data output machine model checkpoint trainer tokenizer run post
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
CORE = sorted(p for pattern in ("*.cpp", "*.h") for p in (ROOT / "csrc").glob(pattern))
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


def siblings(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("fastgpt.")}


@pytest.mark.parametrize("path", TRAINER, ids=lambda path: path.stem)
def test_arrows_point_one_way(path):
    if path.stem == "__init__":
        assert not imports(path)
        return
    assert path.stem in PART, "a new module needs a place in the table"
    for module in siblings(path) - {path.stem}:
        if module not in PART:  # a name of fastgpt/__init__.py
            assert re.search(rf"^{module}\b", (ROOT / "fastgpt/__init__.py").read_text(), re.M)
            continue
        assert PART[module] in MAY_IMPORT[PART[path.stem]], f"{path.stem} imports {module}"


def test_no_module_imports_itself_through_others():
    """Inside a part, too: neither at import time nor within a function."""
    graph = {path.stem: siblings(path) for path in TRAINER}

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    assert [module for module in graph if module in reached(module)] == []


def test_only_the_tokenizer_uses_the_extension():
    assert [path.stem for path in TRAINER if "_bpe" in siblings(path)] == ["tokenizer_bpe"]
    python = [path.name for path in CORE if re.search(r"pybind11|Python\.h", path.read_text())]
    assert python == ["bindings.cpp"]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_depend_on_torch_and_triton_only(path):
    allowed = {"torch", "triton", "fastgpt_kernels"} | sys.stdlib_module_names
    assert {name.partition(".")[0] for name in imports(path)} <= allowed


def test_kernels_is_a_source_root_not_a_package():
    assert not (ROOT / "kernels/__init__.py").exists()


LIGHT = "config presets cli errors progress rundir documents shards corpus order data memory plan"


def test_modules_without_tensors_load_no_torch():
    modules = [f"fastgpt.{name}" for name in [*LIGHT.split(), "pretrain", "generate"]]
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

"""The Hugging Face hub layout: whole, loadable beside the package, and used by ``kernelize``."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgpt_kernels import cpu, hub

LAYERS = ("LayerNorm", "RMSNorm", "MLP", "NewGELU", "GeluTanh")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "out"
    hub.write(out, "someone/fastgpt-kernels")
    return out


def load(folder: Path):
    """As ``kernels`` does: a package under a name of its own."""
    spec = importlib.util.spec_from_file_location("loaded_from_hub", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["loaded_from_hub"] = module
    spec.loader.exec_module(module)
    return module


def test_layout(repository):
    build = tomllib.loads((repository / "build.toml").read_text())
    assert build["general"]["name"] == "fastgpt-kernels"
    assert build["general"]["hub"]["repo-id"] == "someone/fastgpt-kernels"
    assert "torch-noarch" in build
    sources = repository / "torch-ext" / "fastgpt_kernels"
    names = {path.name for path in sources.iterdir()}
    assert {"__init__.py", "layers.py", "attention.py", "launch_configs.json"} <= names
    assert not names & {"patch.py", "static.py", "hub.py"}
    for path in sources.glob("*.py"):
        assert not re.search(r"^\s*(from|import) fastgpt_kernels", path.read_text(), re.M), path
        assert not re.search(r"[\"']fastgpt_kernels::", path.read_text()), path
    for backend in build["general"]["backends"]:
        built = {path.name for path in (repository / "build" / f"torch-{backend}").iterdir()}
        assert built == names | {"metadata.json"}


def test_it_loads_beside_the_package(repository):
    """Operators of the same names must not meet."""
    module = load(repository / "build" / "torch-cpu")
    import fastgpt_kernels

    assert module.attention is not fastgpt_kernels.attention
    q = torch.randn(3, 1, 2, 5, 8).unbind(0)
    torch.testing.assert_close(module.attention(*q), fastgpt_kernels.attention(*q))
    x = torch.randn(3, 4, requires_grad=True)
    activation = getattr(torch.ops, module._common.NAMESPACE).activation_fwd
    torch.testing.assert_close(activation(x, None, "silu"), nn.functional.silu(x))
    assert module._common.NAMESPACE != "fastgpt_kernels"
    for name in LAYERS:
        assert getattr(module.layers, name).__init__ is nn.Module.__init__


def test_command(tmp_path):
    command = [sys.executable, "-m", "fastgpt_kernels.hub", str(tmp_path)]
    (tmp_path / "mine.txt").write_text("")
    path = str(Path(hub.__file__).parents[1])
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": path})
    assert result.returncode == 2
    assert "is not an empty folder" in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture
def kernels():
    pytest.importorskip("transformers", reason="pip install transformers")
    module = pytest.importorskip("kernels")
    if not hasattr(module, "kernelize"):
        pytest.skip("pip install kernels (the folder of that name here is no package)")
    return module


def name_layer(monkeypatch, kind, name):
    """What ``use_kernel_forward_from_hub`` does, undone after."""
    monkeypatch.setattr(kind, "kernel_layer_name", name, raising=False)
    monkeypatch.setattr(kind, "kernel_condition", staticmethod(lambda module: True), raising=False)


@pytest.mark.usefixtures("kernels")
def test_the_example(repository, monkeypatch):
    """That of kernels/README.md, on a CPU."""
    from patch_models import llama
    from transformers.models.llama import modeling_llama

    name_layer(monkeypatch, modeling_llama.LlamaRMSNorm, "RMSNorm")
    readme = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    example = re.findall(r"<!-- test: hub -->\n```python\n(.*?)```", readme, re.DOTALL)[0]
    model = llama()
    exec(example.replace('"OUT"', repr(str(repository))).replace("cuda", "cpu"), {"model": model})
    replaced = [type(m).__name__ for m in model.modules() if "forward" in vars(m)]
    assert set(replaced) == {"LlamaRMSNorm"}


def test_kernelize(repository, kernels, monkeypatch):
    from patch_models import assert_equal_models, batch, gpt2, llama, reference_results, results
    from transformers import activations
    from transformers.models.llama import modeling_llama

    named = {
        nn.LayerNorm: "LayerNorm",
        modeling_llama.LlamaRMSNorm: "RMSNorm",
        modeling_llama.LlamaMLP: "MLP",
        activations.NewGELUActivation: "NewGELU",
    }
    for kind, name in named.items():
        name_layer(monkeypatch, kind, name)
    mapping = {
        name: {"cpu": kernels.LocalLayerRepository(repository, layer_name=name)} for name in LAYERS
    }
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    for build, kinds in (
        (llama, {"LlamaRMSNorm", "LlamaMLP"}),
        (lambda: llama(hidden_act="gelu"), {"LlamaRMSNorm", "LlamaMLP"}),
        (gpt2, {"LayerNorm", "NewGELUActivation"}),
    ):
        model = build()
        native, exact = reference_results(model, batch())
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            kernels.kernelize(model, mode=mode, device="cpu")
        replaced = [m for m in model.modules() if "forward" in vars(m)]
        assert {type(m).__name__ for m in replaced} == kinds
        assert all("fastgpt_kernels" in m.forward.__func__.__module__ for m in replaced)
        assert_equal_models(results(model, batch()), native, exact)

"""The swap-in examples of kernels/README.md, run as they stand.

The first three are in ``test_modules.py``, the last in ``test_hub.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastgpt_kernels import __all__ as public
from fastgpt_kernels import cpu

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


def run(example: str) -> dict:
    names: dict = {}
    exec(compile(EXAMPLES[example], f"kernels/README.md, {example}", "exec"), names)
    return names


def test_every_function_and_example_is_there():
    missing = [name for name in public if f"`{name}`" not in README]
    assert missing == []
    assert list(EXAMPLES) == [
        *("functions", "modules", "head", "patch", "transformers", "interface", "hub")
    ]


def test_patch(capsys):
    names = run("patch")
    torch.testing.assert_close(names["after"], names["before"])
    printed = capsys.readouterr().out
    replaced = re.findall(r"^  (\w+): ", printed.partition("skipped")[0], re.M)
    assert sorted(replaced) == ["activation", "norm1", "norm2", "self_attn"]
    assert "skipped 0" in printed
    assert type(names["layer"].norm1) is torch.nn.LayerNorm


def test_transformers():
    pytest.importorskip("transformers", reason="pip install transformers")
    names = run("transformers")
    torch.testing.assert_close(names["after"].loss, names["before"].loss)
    torch.testing.assert_close(names["after"].logits, names["before"].logits)
    assert all(p.grad is not None for p in names["model"].parameters())


def test_interface():
    pytest.importorskip("transformers", reason="pip install transformers")
    model = run("interface")["model"].eval()
    assert model.config._attn_implementation == "fastgpt"
    ids = torch.randint(1000, (2, 40))
    ours = model(ids).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, model(ids).logits)

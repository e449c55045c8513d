"""Modules against their torch.nn counterparts, and the examples of kernels/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgpt_kernels import cpu, modules

PAIRS = [
    (modules.LayerNorm(12), nn.LayerNorm(12)),
    (modules.LayerNorm((3, 4), bias=False), nn.LayerNorm((3, 4), bias=False)),
    (modules.LayerNorm(12, elementwise_affine=False), nn.LayerNorm(12, elementwise_affine=False)),
    (modules.RMSNorm(12, eps=1e-6), nn.RMSNorm(12, eps=1e-6)),
]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_norms_load_and_compute_like_torch_nn(ours, theirs):
    assert isinstance(ours, type(theirs))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(5, 3, 4) if len(ours.normalized_shape) == 2 else torch.randn(5, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_cross_entropy_loss():
    x, t = torch.randn(6, 9), torch.tensor([1, 2, -1, 3, 4, 5])
    ours = modules.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1)
    theirs = nn.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1)
    torch.testing.assert_close(ours(x, t), theirs(x, t))
    assert not ours.state_dict()
    capped = modules.CrossEntropyLoss(softcap=2.0, z_loss=1e-2, reduction="none")
    assert capped(x, t.abs()).shape == (6,)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy(bias):
    x, t = torch.randn(6, 8), torch.arange(6)
    ours = modules.LinearCrossEntropy(8, 9, bias=bias)
    if hasattr(nn, "LinearCrossEntropyLoss"):
        theirs = nn.LinearCrossEntropyLoss(8, 9, bias=bias)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        torch.testing.assert_close(ours(x, t), theirs(x, t))
    assert list(ours.state_dict()) == ["linear.weight", "linear.bias"][: 1 + bias]
    expected = nn.functional.cross_entropy(ours.linear(x), t)
    torch.testing.assert_close(ours(x, t), expected)


README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


def test_readme_example_of_functions():
    names = _run("functions")
    expected = nn.functional.layer_norm(names["x"], (64,))
    torch.testing.assert_close(names["hidden"], expected)
    plain = nn.functional.cross_entropy(names["logits"], names["targets"], label_smoothing=0.1)
    z = torch.logsumexp(names["logits"], -1).square().mean() * 1e-4
    torch.testing.assert_close(names["loss"], plain + z)


def test_readme_example_of_modules():
    names = _run("modules")
    x = torch.randn(3, 32)
    torch.testing.assert_close(names["faster"](x), names["model"](x))


def test_readme_example_of_a_head():
    names = _run("head")
    logits = names["hidden"].flatten(0, 1) @ names["embedding"].weight.T
    expected = nn.functional.cross_entropy(logits, names["targets"].flatten())
    torch.testing.assert_close(names["loss"], expected)
    (gradient,) = torch.autograd.grad(expected, names["embedding"].weight)
    torch.testing.assert_close(names["embedding"].weight.grad, gradient)


def _run(example: str) -> dict:
    names: dict = {}
    exec(compile(EXAMPLES[example], f"kernels/README.md, {example}", "exec"), names)
    return names

"""Modules against their torch.nn counterparts, and the examples of kernels/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastgpt_kernels import cpu, modules, reference

PAIRS = [
    (modules.LayerNorm(12), nn.LayerNorm(12)),
    (modules.LayerNorm((3, 4), bias=False), nn.LayerNorm((3, 4), bias=False)),
    (modules.LayerNorm(12, elementwise_affine=False), nn.LayerNorm(12, elementwise_affine=False)),
    (modules.RMSNorm(12, eps=1e-6), nn.RMSNorm(12, eps=1e-6)),
    (modules.GELU(), nn.GELU()),
    (modules.GELU(approximate="tanh"), nn.GELU(approximate="tanh")),
]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_subclasses_load_and_compute_like_torch_nn(ours, theirs):
    assert isinstance(ours, type(theirs))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    two = len(getattr(ours, "normalized_shape", ())) == 2
    x = torch.randn(5, 3, 4) if two else torch.randn(5, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_cross_entropy_loss():
    x, t = torch.randn(6, 9), torch.tensor([1, 2, -1, 3, 4, 5])
    ours = modules.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1)
    theirs = nn.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1)
    torch.testing.assert_close(ours(x, t), theirs(x, t))
    assert not ours.state_dict()
    options = {"softcap": 2.0, "z_loss": 1e-2, "reduction": "none", "label_smoothing": 0.3}
    expected = reference.cross_entropy(x, t, ignore_index=-1, **options)
    ours = modules.CrossEntropyLoss(ignore_index=-1, **options)
    torch.testing.assert_close(ours(x, t), expected)
    head = modules.LinearCrossEntropy(9, 9, ignore_index=-1, **options)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(9))
    torch.testing.assert_close(head(x, t), expected)


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


@pytest.mark.parametrize(
    ("ours", "plain"),
    [(modules.AddLayerNorm(12), modules.LayerNorm(12)), (modules.AddRMSNorm(12), nn.RMSNorm(12))],
)
def test_add_norms(ours, plain):
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_()
    ours.load_state_dict(plain.state_dict(), strict=True)
    x, residual = torch.randn(2, 5, 12)
    y, total = ours(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, plain(total))


@pytest.mark.parametrize("bias", [False, True])
def test_attention_is_that_of_torch_nn(bias):
    """Same names, shapes and result; q, k and v lie in the order of MultiheadAttention."""
    theirs = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True)
    ours = modules.Attention(12, 3, bias=bias, causal=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    ours.causal = True
    expected = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(ours(x), expected)


def test_attention_with_groups_and_rotary():
    rope = modules.Rotary(4)
    ours = modules.Attention(16, 4, kv_heads=2, bias=False, window=5, rotary=rope)
    assert {n: tuple(p.shape) for n, p in ours.named_parameters()} == {
        "in_proj_weight": (32, 16),
        "out_proj.weight": (16, 16),
    }
    x = torch.randn(2, 9, 16)
    shifted = torch.arange(9) + torch.tensor([[3], [40]])
    torch.testing.assert_close(ours(x), ours(x, shifted))  # only distances count
    assert not torch.allclose(ours(x), ours(x, 2 * shifted))
    with pytest.raises(ValueError, match="must divide"):
        modules.Attention(16, 4, kv_heads=3)


def test_attention_passes_its_options_on():
    ours = modules.Attention(8, 1, bias=False, window=3, softcap=0.2)
    with torch.no_grad():
        ours.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        ours.out_proj.weight.copy_(torch.eye(8))
    x, doc_start = torch.randn(1, 7, 8), torch.tensor([[0, 0, 0, 0, 4, 4, 4]]).int()
    heads = x[:, None]
    for starts in (None, doc_start):
        expected = reference.attention(
            heads, heads, heads, window=3, softcap=0.2, doc_start_BT=starts
        )
        torch.testing.assert_close(ours(x, doc_start=starts), expected[:, 0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_holds_no_state(interleaved):
    rope = modules.Rotary(8, base=100.0, interleaved=interleaved)
    assert not rope.state_dict()
    assert not list(rope.buffers())
    x = torch.randn(2, 3, 5, 12)
    cos, sin = rope.angles(torch.arange(5))
    torch.testing.assert_close(cos[3, 1], torch.tensor(3 * 100.0**-0.25).cos())
    expected = reference.rotary(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(rope(x, torch.arange(5)), expected)


@pytest.mark.parametrize("ours", [modules.SwiGLU(8, 20), modules.GEGLU(8, 20)])
def test_gated_blocks(ours):
    """Parameter names of LLaMA's and Gemma's blocks."""
    assert list(ours.state_dict()) == [f"{name}_proj.weight" for name in ("gate", "up", "down")]
    x = torch.randn(3, 8)
    gate = ours.gate_proj(x)
    gelu = nn.functional.gelu(gate, approximate="tanh")
    gate = gelu if isinstance(ours, modules.GEGLU) else nn.functional.silu(gate)
    torch.testing.assert_close(ours(x), ours.down_proj(gate * ours.up_proj(x)))


def test_squared_relu():
    x = torch.randn(3, 8)
    torch.testing.assert_close(modules.ReLUSquared()(x), nn.functional.relu(x).square())


def test_a_block_of_modules_compiles_whole():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.add_norm = modules.LayerNorm(16), modules.AddRMSNorm(16)
            self.attention = modules.Attention(16, 2, rotary=modules.Rotary(8))
            self.mlp = nn.Sequential(modules.SwiGLU(16, 24), modules.GELU(), modules.ReLUSquared())
            self.geglu, self.loss = modules.GEGLU(16, 24), modules.LinearCrossEntropy(16, 11)

        def forward(self, x, t):
            h, x = self.add_norm(self.attention(self.norm(x)), x)
            return self.loss((x + self.geglu(self.mlp(h))).flatten(0, 1), t)

    block = Block()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for length in (5, 6, 9, 17, 30):
        x, t = torch.randn(2, length, 16), torch.randint(11, (2 * length,))
        parameters = list(block.parameters())
        ours = torch.autograd.grad(compiled(x, t), parameters)
        for a, b in zip(ours, torch.autograd.grad(block(x, t), parameters), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= 2  # the first length, then any


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

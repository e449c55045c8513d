"""Adapters: nothing at first, the same as the merged model always, and the base left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgpt.config import ModelConfig
from fastgpt.lora import LoRAGPT, LoRALinear
from fastgpt.model import GPT

SHAPES = {
    "modern": {"qk_norm": True, "embed_norm": True, "norm_weight": False, "init": "zero_proj"},
    "gpt2": {"norm": "layer_norm", "mlp": "gelu_tanh", "position": "learned", "bias": True},
    "llama": {"mlp": "swiglu", "tied": False, "n_kv_head": 1},
}
ADDED = 3


@pytest.fixture(params=SHAPES)
def pair(request, seeded, uncompiled) -> tuple[GPT, LoRAGPT]:
    """A model and its adapted copy, of which the last three rows are new."""
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=32, vocab_size=60, context=24, **SHAPES[request.param]
    )
    base = GPT(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted = LoRAGPT(config, torch.float32, rank=4, alpha=6.0, added=ADDED)
    adapted.load_base(base.state_dict())
    return base, adapted


def logits(model: GPT) -> torch.Tensor:
    ids = torch.arange(48).reshape(2, 24) % 60
    return model.logits(model(ids))


def some_steps(model: GPT) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(3):
        logits(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_at_first_it_is_the_base(pair):
    base, adapted = pair
    assert torch.equal(logits(adapted), logits(base))
    merged = adapted.merged_state()
    assert merged.keys() == base.state_dict().keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in base.state_dict().items())


def test_merged_computes_what_the_adapters_compute(pair):
    base, adapted = pair
    some_steps(adapted)
    moved = (logits(adapted) - logits(base)).abs().max()
    merged = adapted.merged()
    assert type(merged) is GPT
    difference = (logits(adapted) - logits(merged)).abs().max()
    assert difference < 1e-5 < 1e-2 < moved


def test_the_base_is_untouched(pair):
    base, adapted = pair
    some_steps(adapted)
    weights, before = adapted.state_dict(), base.state_dict()
    for name, tensor in before.items():
        if name in ("wte.weight", "head.weight"):
            owner = name.removesuffix(".weight")
            assert torch.equal(weights[f"{owner}.frozen"], tensor[:-ADDED])
            assert not torch.equal(weights[f"{owner}.added"], tensor[-ADDED:])
        else:
            assert torch.equal(weights[name], tensor), name


def test_every_linear_layer_of_the_blocks_has_an_adapter(pair):
    base, adapted = pair
    linear = {n for n, m in base.blocks.named_modules() if isinstance(m, nn.Linear)}
    assert {n for n, m in adapted.blocks.named_modules() if isinstance(m, LoRALinear)} == linear
    some_steps(adapted)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    expected = {f"blocks.{name}.{matrix}" for name in linear for matrix in "ab"}
    expected |= {"wte.added"} | ({"head.added"} if base.head is not None else set())
    assert trained == expected
    assert all(m.b.abs().min() > 0 for m in adapted.modules() if isinstance(m, LoRALinear))


def test_the_formula(seeded):
    base = nn.Linear(5, 7)
    layer = LoRALinear(base, rank=2, alpha=3.0)
    with torch.no_grad():
        layer.b.normal_()
    x = torch.randn(4, 5)
    expected = base(x) + 1.5 * x @ layer.a.T @ layer.b.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(x @ layer.merged().T + base.bias, expected)
    assert layer.a.std() > 0.1
    assert LoRALinear(base, 2, 3.0).b.abs().max() == 0


def test_without_new_rows_the_embedding_is_frozen(seeded):
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=60, context=24)
    adapted = LoRAGPT(config, torch.float32, rank=2, alpha=2.0, added=0)
    assert not adapted.wte.weight.requires_grad
    assert adapted.merged_state().keys() == GPT(config).state_dict().keys()


def test_the_parts_of_a_checkpoint_bring_everything_back(pair):
    _, adapted = pair
    some_steps(adapted)
    parts = {name: part.state_dict() for name, part in adapted.checkpoint_parts().items()}
    saved = {k: {n: t.clone() for n, t in part.items()} for k, part in parts.items()}
    plain = GPT(adapted.config)
    plain.load_state_dict(saved["model"])
    torch.testing.assert_close(logits(plain), logits(adapted), atol=1e-5, rtol=1e-4)
    again = LoRAGPT(adapted.config, torch.float32, rank=4, alpha=6.0, added=ADDED)
    for name, part in again.checkpoint_parts().items():
        part.load_state_dict(saved[name])
    assert torch.equal(logits(again), logits(adapted))

"""What is not attention or a loss compiles nothing new for other numbers of tokens."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="the variants are Triton's; pip install triton")

from variants import variant

from fastgpt_kernels import activations, normalization

# The package exports the function under the module's name.
rotary = importlib.import_module("fastgpt_kernels.rotary")
gae = importlib.import_module("fastgpt_kernels.gae")
head = importlib.import_module("fastgpt_kernels.linear_cross_entropy")
TOKENS = (1, 2, 17, 64, 100, 128, 1000, 1024, 2047)


@pytest.fixture
def launched(monkeypatch):
    """Keys of all launches; nothing runs."""
    keys: set[str] = set()

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert all(size > 0 for size in grid)
            return lambda *args, **options: keys.add(variant(self.kernel, *args, **options))

    for module, names in (
        (normalization, ("fwd_kernel", "bwd_fused_kernel", "bwd_wide_kernel")),
        (activations, ("fwd_kernel", "bwd_kernel")),
        (rotary, ("rotary_kernel",)),
        (gae, ("gae_kernel",)),
        (head, ("scale_kernel",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    return keys


@pytest.mark.parametrize("columns", [768, 16384])
def test_norms(launched, columns):
    weight = torch.empty(columns)
    for tokens in TOKENS:
        x = torch.empty(tokens, columns, dtype=torch.bfloat16)
        y, total, mean, rstd = normalization._launch_fwd(x, x, weight, weight, 1, 1e-5, False)
        normalization._launch_bwd(y, total, mean, rstd, weight, True, True, 1, False, total)
    assert len(launched) == 2, "\n".join(sorted(launched))


def test_activations(launched):
    for tokens in TOKENS:
        fused = torch.empty(tokens, 2 * 3072, dtype=torch.bfloat16)
        y = activations._launch_fwd(fused, None, "silu_gate")
        activations._launch_bwd(y, fused, None, "silu_gate")
    assert len(launched) == 2, "\n".join(sorted(launched))


def test_rotary(launched):
    """Training, and decoding with a position per row, from (B, T, H, D) memory."""
    cos = torch.empty(4096, 32)
    for batch in (1, 2, 3):
        for tokens in TOKENS:
            x = torch.empty(batch, tokens, 6, 64, dtype=torch.bfloat16).transpose(1, 2)
            rotary._launch(x, cos[:tokens], cos[:tokens], None, False, False)
            positions = torch.zeros(batch, 1, tokens, dtype=torch.int64)
            rotary._launch(x, cos, cos, positions, False, False)
    assert len(launched) == 2, "\n".join(sorted(launched))


def test_gae(launched):
    for tokens in TOKENS[1:]:  # a stride of 1, of one token, is a constant
        rewards, values = torch.empty(3, tokens), torch.empty(3, tokens)
        gae._launch(rewards, values, values > 0, 1.0, 0.95)
    assert len(launched) == 1, "\n".join(sorted(launched))


@pytest.mark.parametrize("columns", [72, 1000, 4096])
def test_scaling_of_gradients(launched, columns, monkeypatch):
    monkeypatch.setattr(head, "use_triton", lambda x: True)
    for tokens in TOKENS:
        x = torch.empty(tokens, columns, dtype=torch.bfloat16)
        head.linear_cross_entropy_scaled._init_fn(x, torch.tensor(1.0), torch.bfloat16)
    assert len(launched) == 1, "\n".join(sorted(launched))

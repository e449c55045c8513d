"""Attention against ``F.scaled_dot_product_attention``, forward and forward + backward.

``pytest bench/bench_attention.py``: on a GPU the Triton kernels at training shapes, else the CPU
path at small ones. A case is timed only after its output and gradients passed the error rule: at
most twice (gradients: three times) PyTorch's own error against float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import attention, reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16
# (B, H, HK, T, D)
SHAPES = (
    [(8, 16, 16, 1024, 64), (4, 16, 16, 4096, 64), (2, 16, 4, 4096, 128), (1, 16, 16, 16384, 128)]
    if GPU
    else [(4, 6, 6, 256, 64), (2, 8, 2, 512, 64)]
)
PROVIDERS = {
    "ours": attention,
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ),
}


def inputs(shape, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    B, H, HK, T, D = shape
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    return [
        torch.randn(B, T, heads, D, generator=generator, device=DEVICE, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (H, HK, HK)
    ]


def results(function, qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*qkv)
    return [out, *torch.autograd.grad(out, qkv, grad.to(out.dtype))]


def assert_correct(shape) -> None:
    """The error rule on at most 512 positions and 4 rows: float64 scores must fit in memory."""
    B, H, HK, T, D = shape
    qkv = inputs((min(B, 4), H, HK, min(T, 512), D))
    grad = torch.randn_like(qkv[0])
    doubles = [x.detach().double().requires_grad_() for x in qkv]
    exact = results(reference.attention, doubles, grad)
    ours, native = (results(PROVIDERS[name], qkv, grad) for name in ("ours", "sdpa"))
    for index, (a, b, c) in enumerate(zip(ours, native, exact, strict=True)):
        error, theirs = ((x.double() - c).abs().max().item() for x in (a, b))
        floor = 0.5 * torch.finfo(DTYPE).eps * c.abs().max().item()
        assert error <= (2 if index == 0 else 3) * theirs + floor, f"result {index}: {error:.2e}"


def timed(function, qkv: list[Tensor], backward: bool):
    grad = torch.ones_like(qkv[0])

    def run():
        out = function(*qkv)
        if backward:
            torch.autograd.grad(out, qkv, grad)
        if GPU:
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(benchmark, shape, direction, provider):
    assert_correct(shape)
    benchmark.group = f"attention {direction} {shape} {DTYPE} {DEVICE}"
    run = timed(PROVIDERS[provider], inputs(shape), direction == "both")
    benchmark.pedantic(run, warmup_rounds=3, rounds=20)
    B, H, _, T, D = shape
    products = 2 if direction == "forward" else 7  # backward recomputes the scores: 5 more
    flops = products * B * H * T * T * D  # 2 flops an element, half of them under the mask
    benchmark.extra_info["tflops"] = flops / benchmark.stats.stats.median / 1e12

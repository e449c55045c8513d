"""What ``bench_kernels`` measures: every public kernel, its inputs, its peers, its float64 truth.

Sizes are those of training on a GPU and small ones on a CPU. ``small`` ones, which serve the check,
have as many columns as the timed ones: those decide which kernel runs and how it is launched.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt_kernels as ours
from fastgpt_kernels import reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        name: of the public function, which ``ours`` calls.
        label: the size.
        inputs: makes them; floating ones that are not in ``constant`` get gradients.
        ours: called with the inputs.
        torch: PyTorch's way to the same numbers, the yardstick.
        exact: the same in float64.
        flops: of forward, and of backward; 0 where memory traffic is the bound.
        read: positions of inputs that a backward must read, or what it kept in place of them; all
            if None.
        written: positions of inputs whose gradients it must write; all that get one if None.
        constant: positions of inputs without gradient.
        compiles: whether PyTorch's way is worth compiling; loops over data are not.
        others: further peers, by name.
        liger: name of a function of liger-kernel, and how to call it.
    """

    name: str
    label: str
    inputs: Callable[[bool], list[Tensor]]
    ours: Function
    torch: Function
    exact: Function
    flops: tuple[int, int] = (0, 0)
    constant: tuple[int, ...] = ()
    backward: bool = True
    compiles: bool = True
    read: tuple[int, ...] | None = None
    written: tuple[int, ...] | None = None
    others: tuple[tuple[str, Function], ...] = ()
    liger: tuple[str, Function] | None = None

    @property
    def id(self) -> str:
        return f"{self.name}-{self.label}"

    def peers(self) -> dict[str, Function]:
        """Functions to time beside ours. Compiling is for GPUs: on a CPU ours is compiled too."""
        found = {"torch": self.torch, **dict(self.others)}
        if GPU and self.compiles:
            found["torch.compile"] = torch.compile(self.torch)
        if GPU and self.liger:
            name, call = self.liger
            try:
                liger = importlib.import_module("liger_kernel.transformers.functional")
            except ImportError:
                return found
            function = getattr(liger, name, None)
            if function is not None:
                found["liger"] = lambda *inputs: call(function, *inputs)
        return found


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def choose(small: bool, tiny: tuple, gpu: tuple, cpu: tuple) -> tuple:
    """Sizes; None in ``tiny`` is as in the timed ones."""
    timed = gpu if GPU else cpu
    pairs = zip(tiny, timed, strict=True)
    return tuple(b if a is None else a for a, b in pairs) if small else timed


def attention_cases() -> list[Case]:
    def causal(label: str, gpu: tuple, cpu: tuple) -> Case:
        """(B, H, HK, T, D) on a GPU and on a CPU."""
        B, H, HK, T, D = gpu if GPU else cpu

        def heads(small: bool) -> list[Tensor]:
            rows, heads, kv_heads, n = (2, 2 * H // HK, 2, 320) if small else (B, H, HK, T)
            return [normal(rows, n, h, D).transpose(1, 2) for h in (heads, kv_heads, kv_heads)]

        products = 2 * B * H * T * T * D  # 4 a pair and element, half of the pairs under the mask
        return Case("attention", label, heads, ours.attention, _sdpa, reference.attention,
                    flops=(products, products * 5 // 2))  # fmt: skip

    def packed(small: bool) -> list[Tensor]:
        T, H, D = choose(small, (90, 2, None), (16384, 16, 128), (1024, 4, 64))
        cuts = [0, T // 8, T // 2, T // 2, T]
        cu = torch.tensor(cuts, dtype=torch.int32, device=DEVICE)
        return [*(normal(T, H, D) for _ in range(3)), cu]

    def cached(small: bool) -> list[Tensor]:
        B, S, H, HK, D = choose(
            small, (2, 70, 4, 2, None), (32, 8192, 32, 8, 128), (4, 512, 8, 2, 64)
        )
        lengths = torch.full((B,), S, dtype=torch.int32, device=DEVICE)
        return [normal(B, 1, H, D), normal(B, S, HK, D), normal(B, S, HK, D), lengths]

    def sequences(q, k, v, cu):
        parts = [F.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)[0].transpose(0, 1)
            for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True) if b > a]  # fmt: skip
        return torch.cat(parts)

    def step(q, k, v, lengths):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    T, H, D = packed(False)[0].shape
    lengths = T // 8, T // 2 - T // 8, T - T // 2
    packed_products = 2 * H * D * sum(n * n for n in lengths)
    return [
        causal("causal_grouped", (4, 16, 4, 4096, 128), (2, 6, 2, 512, 64)),
        causal("heads_of_64", (8, 16, 16, 1024, 64), (4, 6, 6, 256, 64)),
        causal("long", (1, 16, 16, 16384, 128), (1, 4, 4, 1024, 64)),
        Case("attention_varlen", "4_sequences", packed, ours.attention_varlen, sequences,
             lambda q, k, v, cu: reference.attention_varlen(q, k, v, cu), constant=(3,),
             flops=(packed_products, packed_products * 5 // 2),
             compiles=False),
        Case("attention_decode", "1_token", cached, ours.attention_decode, step,
             lambda q, k, v, n: step(q, k, v, n), constant=(3,), backward=False),
    ]  # fmt: skip


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def loss_cases() -> list[Case]:
    def logits(small: bool) -> list[Tensor]:
        N, V = choose(small, (40, None), (8192, 50257), (256, 50257))
        return [normal(N, V), torch.randint(V, (N,), device=DEVICE)]

    def hidden(small: bool) -> list[Tensor]:
        N, D, V = choose(small, (40, None, None), (8192, 2048, 50257), (512, 256, 16384))
        weight = normal(V, D) * D**-0.5
        return [normal(N, D), weight, torch.randint(V, (N,), device=DEVICE)]

    def head_loss(x, w, t):
        return F.cross_entropy(F.linear(x, w), t)

    def log_probs(x, w, t):
        logs = F.log_softmax(F.linear(x, w).float(), -1)
        return logs.gather(-1, t[:, None])[:, 0], -(logs.exp() * logs).sum(-1)

    def chunked(x, w, t):
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, w, t, options=options)

    native = (("torch.chunked", chunked),) if hasattr(F, "linear_cross_entropy") else ()
    x, w, _ = hidden(False)
    gemm = 2 * x.shape[0] * x.shape[1] * w.shape[0]
    return [
        Case("cross_entropy", "v50257", logits, ours.cross_entropy, F.cross_entropy,
             reference.cross_entropy, constant=(1,),
             liger=("liger_cross_entropy", lambda f, x, t: f(x, t))),
        Case("linear_cross_entropy", "head", hidden, ours.linear_cross_entropy, head_loss,
             reference.linear_cross_entropy, (gemm, 2 * gemm), constant=(2,), others=native,
             liger=("liger_fused_linear_cross_entropy", lambda f, x, w, t: f(x, w, t))),
        Case("linear_log_probs", "head", hidden, ours.linear_log_probs, log_probs,
             reference.linear_log_probs, (gemm, 2 * gemm), constant=(2,)),
    ]  # fmt: skip


def norm_cases() -> list[Case]:
    def rows(parameters: int, residual: bool) -> Callable[[bool], list[Tensor]]:
        def make(small: bool) -> list[Tensor]:
            N, D = choose(small, (24, None), (16384, 4096), (2048, 768))
            return [normal(N, D) for _ in range(1 + residual)] + [
                1 + 0.1 * normal(D) for _ in range(parameters)
            ]

        return make

    def add_layer(x, r, w, b):
        return F.layer_norm(x + r, w.shape, w, b), x + r

    def add_rms(x, r, w):
        return F.rms_norm(x + r, w.shape, w, 1e-5), x + r

    def layer(f):
        return lambda x, w, b: f(x, w.shape, w, b)

    def rms(f):
        return lambda x, w: f(x, w.shape, w, 1e-5)

    return [
        Case("layer_norm", "rows", rows(2, False), layer(ours.layer_norm), layer(F.layer_norm),
             layer(F.layer_norm), liger=("liger_layer_norm", lambda f, x, w, b: f(x, w, b, 1e-5))),
        Case("rms_norm", "rows", rows(1, False), rms(ours.rms_norm), rms(F.rms_norm),
             rms(F.rms_norm), liger=("liger_rms_norm", lambda f, x, w: f(x, w, 1e-5))),
        Case("add_layer_norm", "rows", rows(2, True),
             lambda x, r, w, b: ours.add_layer_norm(x, r, w.shape, w, b), add_layer, add_layer,
             read=(0, 2), written=(0, 2, 3)),  # of x + r, whose gradient is that of both
        Case("add_rms_norm", "rows", rows(1, True),
             lambda x, r, w: ours.add_rms_norm(x, r, w.shape, w, 1e-5), add_rms, add_rms,
             read=(0, 2), written=(0, 2)),
    ]  # fmt: skip


def pointwise_cases() -> list[Case]:
    def halves(small: bool) -> list[Tensor]:
        N, D = choose(small, (24, None), (16384, 11008), (1024, 2048))
        return [normal(N, D), normal(N, D)]

    def one(small: bool) -> list[Tensor]:
        return halves(small)[:1]

    def heads(small: bool) -> list[Tensor]:
        B, H, T, D = choose(small, (2, 2, 24, None), (8, 32, 4096, 128), (2, 6, 512, 64))
        angles = torch.arange(T, device=DEVICE)[:, None] * 1e4 ** -(
            torch.arange(D // 2) / D * 2
        ).to(DEVICE)
        return [normal(B, H, T, D), angles.cos(), angles.sin()]

    def rotated(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        cos, sin = (angle.to(x.dtype) for angle in (cos, sin))
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def episodes(small: bool) -> list[Tensor]:
        B, T = choose(small, (4, None), (512, 2048), (64, 512))
        mask = torch.rand(B, T, device=DEVICE) > 0.1
        return [*(normal(B, T, dtype=torch.float32) for _ in range(2)), mask]

    def loop(rewards, values, mask):
        """As trainers write it: one step a position, from the end."""
        advantage, following = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
        found = []
        for t in reversed(range(values.shape[1])):
            delta = rewards[:, t] + following - values[:, t]
            counted = mask[:, t]
            advantage = torch.where(counted, delta + 0.95 * advantage, advantage)
            following = torch.where(counted, values[:, t], following)
            found.append(torch.where(counted, advantage, 0.0))
        advantages = torch.stack(found[::-1], 1)
        return advantages, advantages + torch.where(mask, values, 0.0)

    def gated(activation: Function) -> Function:
        return lambda gate, up: activation(gate) * up

    def squared(x):
        return F.relu(x).square()

    return [
        Case("rotary", "heads", heads, ours.rotary, rotated, rotated, constant=(1, 2), read=(1, 2)),
        Case("swiglu", "rows", halves, ours.swiglu, gated(F.silu), gated(F.silu),
             liger=("liger_swiglu", lambda f, a, b: f(a, b))),
        Case("geglu", "rows", halves, ours.geglu, gated(F.gelu), gated(F.gelu)),
        Case("gelu", "tanh", one, lambda x: ours.gelu(x, "tanh"),
             lambda x: F.gelu(x, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
        Case("relu_squared", "rows", one, ours.relu_squared, squared, squared),
        Case("gae", "rows", episodes, ours.gae, loop, loop, constant=(0, 1, 2), backward=False,
             compiles=False),
    ]  # fmt: skip


def all_cases() -> list[Case]:
    """At the sizes of a GPU if there is one, else at those of a CPU."""
    return [*attention_cases(), *loss_cases(), *norm_cases(), *pointwise_cases()]

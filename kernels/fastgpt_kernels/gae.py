"""Generalised advantage estimation over masked sequences (Schulman et al., arXiv:1506.02438).

Over the masked positions of a row, in order, with V = 0 after the last one (equations 11 and 16)::

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = delta_t + gamma lambda A_{t+1}        return_t = A_t + V_t

A position that is not masked is as if it had been cut out: its successor is the next masked one.
So padding may stand left or right, and a hole (say, the reply of a tool) neither ends an episode
nor discounts anything.

The kernel scans ``u_t = gamma (1 - lambda) V_t + gamma lambda (r_t + u_{t+1})``, which needs
nothing of its neighbours but u: then ``return_t = r_t + u_{t+1}``. Where a position is not masked u
passes through. u_{t+1} comes of scanning one position ahead of the outputs.

Shapes: rewards, values, mask (B, T) of any strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels._common import (
    AotCase,
    aot_variants,
    cdiv,
    check_devices,
    device_guard,
    launch_config,
    tl,
    triton,
    use_triton,
)

CPU_BLOCK = 64
"""Positions the CPU path does at once, by a product with a triangle of powers."""


@triton.jit
def _compose(later_factor, later_term, factor, term):
    """``u -> factor u + term`` after ``u -> later_factor u + later_term``."""
    return later_factor * factor, tl.fma(factor, later_term, term)


@triton.jit(do_not_specialize=["n_blocks", "length", "stride_rb", "stride_vb", "stride_mb"])
def gae_kernel(
    rewards, values, mask, advantages, returns, n_blocks, length,
    stride_rb, stride_rt, stride_vb, stride_vt, stride_mb, stride_mt, gamma, gae_lambda,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program, block by block from its end."""
    row = tl.program_id(0).to(tl.int64)
    rewards += row * stride_rb
    values += row * stride_vb
    mask += row * stride_mb
    lanes = tl.arange(0, BLOCK)
    u = 0.0 * gamma  # after the last masked position
    for block in range(0, n_blocks):
        t = (n_blocks - 1 - block) * BLOCK + lanes.to(tl.int64)
        ahead = t + 1 < length
        m = tl.load(mask + (t + 1) * stride_mt, mask=ahead, other=0) != 0
        r = tl.load(rewards + (t + 1) * stride_rt, mask=m, other=0.0).to(tl.float32)
        v = tl.load(values + (t + 1) * stride_vt, mask=m, other=0.0).to(tl.float32)
        factor = tl.where(m, gamma * gae_lambda, 1.0)
        term = gamma * (1.0 - gae_lambda) * v + gamma * gae_lambda * r
        factor, term = tl.associative_scan((factor, term), 0, _compose, reverse=True)
        u_next = tl.fma(factor, u, term)
        inside = t < length
        m = tl.load(mask + t * stride_mt, mask=inside, other=0) != 0
        r = tl.load(rewards + t * stride_rt, mask=m, other=0.0).to(tl.float32)
        v = tl.load(values + t * stride_vt, mask=m, other=0.0).to(tl.float32)
        total = tl.where(m, r + u_next, 0.0)
        at = row * length + t
        tl.store(returns + at, total, mask=inside)
        tl.store(advantages + at, total - v, mask=inside)
        u = tl.sum(tl.where(lanes == 0, u_next, 0.0), axis=0)


def _launch(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    B, T = values.shape
    advantages, returns = (values.new_empty((B, T), dtype=torch.float32) for _ in range(2))
    if advantages.numel() == 0:
        return advantages, returns
    mask = mask.bool()
    config = launch_config("gae", values.device, torch.float32, 512)
    with device_guard(values):
        gae_kernel[(B,)](
            rewards, values, mask, advantages, returns, cdiv(T, config["BLOCK"]), T,
            rewards.stride(0), rewards.stride(1), values.stride(0), values.stride(1),
            mask.stride(0), mask.stride(1), gamma, gae_lambda, **config,
        )  # fmt: skip
    return advantages, returns


def _cpu(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """The masked positions moved to the front, there the recurrence as products of blocks."""
    B, T = values.shape
    mask = mask.bool()
    # Position of each masked element among those of its row; the rest go to a column that is cut.
    at = torch.where(mask, mask.cumsum(1) - 1, T)
    r, v = (
        values.new_zeros((B, T + 1), dtype=torch.float32).scatter_(1, at, x.float())
        for x in (rewards, values)
    )
    v[:, T] = r[:, T] = 0.0
    delta = r[:, :T] + gamma * v[:, 1:] - v[:, :T]
    steps = torch.arange(CPU_BLOCK)
    decay = gamma * gae_lambda
    # triangle[s, t] = decay^(s - t): what delta_s is worth at t.
    gap = (steps[:, None] - steps).clamp_min(0)
    triangle = torch.tril(torch.tensor(decay, dtype=torch.float64) ** gap).float()
    powers = torch.tensor(decay, dtype=torch.float64).pow(CPU_BLOCK - steps).float()
    found = torch.zeros_like(r)
    for start in reversed(range(0, T, CPU_BLOCK)):
        block = delta[:, start : start + CPU_BLOCK]
        n = block.shape[1]
        carry = found[:, start + n, None] * powers[CPU_BLOCK - n :]
        found[:, start : start + n] = torch.addmm(carry, block, triangle[:n, :n])
    advantages = torch.where(mask, found.gather(1, at), 0.0)
    return advantages, torch.where(mask, advantages + values.float(), 0.0)


@torch.library.custom_op("fastgpt_kernels::gae", mutates_args=())
def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    run = _launch if use_triton(values) else _cpu
    return run(rewards, values, mask, gamma, gae_lambda)


@_gae.register_fake
def _(rewards, values, mask, gamma, gae_lambda):
    result = values.new_empty(values.shape, dtype=torch.float32)
    return result, torch.empty_like(result)


def aot_cases() -> list[AotCase]:
    """Instances for the static gate: contiguous rows of any length."""
    types = {
        **dict.fromkeys(("rewards", "values", "advantages", "returns"), "*fp32"),
        **dict.fromkeys(("n_blocks", "length", "stride_rb", "stride_vb", "stride_mb"), "i32"),
        **dict.fromkeys(("gamma", "gae_lambda"), "fp32"),
        "mask": "*i1",
    }
    ones: dict[str, Any] = dict.fromkeys(("stride_rt", "stride_vt", "stride_mt"), 1)
    return aot_variants("gae/rows", "gae", gae_kernel, torch.float32, 512, types, ones)


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of masked sequences; the value after the last masked position is 0.

    No gradient flows: the results are targets, and detached.

    Args:
        rewards_BT: reward of each position, any float dtype, any strides.
        values_BT: value estimates, likewise.
        mask_BT: true (or nonzero) where a position counts. Positions that do not count give 0,
            whatever they hold (NaN included), and are cut out of the sequence: of a hole's two
            neighbours, the right one is the left one's successor. So left and right padding give
            the same numbers.
        gamma: discount in [0, 1].
        gae_lambda: 0 gives one-step errors, 1 discounted returns minus values.

    Returns:
        advantages (B, T) and returns (B, T) = advantages + values, float32; not whitened.

    Raises:
        ValueError: shapes or devices differ, or a factor outside [0, 1].
    """
    if values_BT.dim() != 2 or not rewards_BT.shape == values_BT.shape == mask_BT.shape:
        raise ValueError(
            "gae: rewards, values and mask must have one shape (B, T), got "
            f"{tuple(rewards_BT.shape)}, {tuple(values_BT.shape)} and {tuple(mask_BT.shape)}"
        )
    check_devices("gae", values_BT, rewards_BT, mask_BT)
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"gae: {name} must lie in [0, 1], got {value}")
    return _gae(rewards_BT.detach(), values_BT.detach(), mask_BT, float(gamma), float(gae_lambda))

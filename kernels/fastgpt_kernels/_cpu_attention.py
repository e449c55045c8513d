"""CPU paths of attention over packed sequences and over a cache, and of the log-sum-exp.

Packed sequences are taken one by one, so that the work is the sum of their squares and not the
square of their sum; PyTorch's flash attention for CPUs does each, forward and backward. One new
token against a cache is PyTorch's attention with the query heads of a key head as its rows, which
spares copying the cache for each query head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import cpu

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention_with_lse(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    doc_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The contract of `fastgpt_kernels.attention_with_lse`, on a CPU; holds all the scores."""
    (T, S), groups = (q_BHTD.shape[2], k_BHSD.shape[2]), q_BHTD.shape[1] // k_BHSD.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_BHSD, v_BHSD))
    seen = cpu.visibility(
        T, S, causal=causal, window=window, doc_start_BT=doc_start, device=q_BHTD.device
    )
    x = (q_BHTD.float() @ k.float().transpose(-1, -2)) * scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if seen is None:
        lse = torch.logsumexp(x, -1)
        return (torch.exp(x - lse.unsqueeze(-1)) @ v.float()).to(q_BHTD.dtype), lse
    # Of rows that see nothing, -inf, even the gradient must not meet a NaN.
    empty = ~seen.any(-1, keepdim=True)
    x = x.masked_fill(~(seen | empty), -math.inf)
    lse = torch.logsumexp(x, -1, keepdim=True)
    out = (torch.exp(x - lse).masked_fill(empty, 0.0) @ v.float()).to(q_BHTD.dtype)
    return out, lse.masked_fill(empty, -math.inf).squeeze(-1)


Options = tuple[bool, float, int, float]
"""(causal, scale, window or 0, softcap or 0)."""


def _sequences(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries and of the keys of every sequence that has both."""
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        if b > a and d > c:
            yield slice(a, b), slice(c, d)


def _head_first(x_THD: Tensor, groups: int) -> Tensor:
    """(1, H, T, D) with the heads repeated and elements of a row adjacent, as flash needs them."""
    x = x_THD.transpose(0, 1).unsqueeze(0)
    x = x.repeat_interleave(groups, dim=1) if groups > 1 else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias(T: int, S: int, causal: bool, window: int, dtype: torch.dtype) -> tuple[bool, Any]:
    """(is_causal, mask to add or None) for PyTorch's attention."""
    if causal and not window and T == S:
        return True, None
    seen = cpu.visibility(
        T, S, causal=causal, window=window or None, doc_start_BT=None, device=torch.device("cpu")
    )
    if seen is None:
        return False, None
    return False, torch.zeros(T, S, dtype=dtype).masked_fill_(~seen, -math.inf)[None, None]


def _capped(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float, softcap: float):
    """Probabilities with a softcap, their logarithms' sum, and the slope of the cap; float32."""
    tanh = torch.tanh((q.float() @ k.float().transpose(-1, -2)) * (scale / softcap))
    x = softcap * tanh
    if causal:
        x = x.masked_fill(torch.ones_like(x, dtype=torch.bool).triu_(1), -math.inf)
    x = x if bias is None else x + bias
    lse = torch.logsumexp(x, -1)
    p = torch.exp(x - torch.where(lse == -math.inf, 0.0, lse).unsqueeze(-1))
    return p, lse, 1.0 - tanh * tanh


@torch.library.custom_op("fastgpt_kernels::cpu_attention_varlen", mutates_args=())
def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor,
    causal: bool, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (T, H, D), natural log-sum-exp (H, T)); an operator, since lengths are data."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf)
    groups = q.shape[1] // k.shape[1]
    for rows, keys in _sequences(cu_q, cu_k):
        q1, k1, v1 = (
            _head_first(x, n) for x, n in ((q[rows], 1), (k[keys], groups), (v[keys], groups))
        )
        is_causal, bias = _bias(q1.shape[2], k1.shape[2], causal, window, q.dtype)
        if softcap:
            p, lse1, _ = _capped(q1, k1, bias, is_causal, scale, softcap)
            out1 = p.to(q.dtype) @ v1
        else:
            out1, lse1 = _FLASH(q1, k1, v1, 0.0, is_causal, attn_mask=bias, scale=scale)
        out[rows] = out1[0].transpose(0, 1)
        lse[:, rows] = lse1[0]
    return out, lse


@torch.library.custom_op("fastgpt_kernels::cpu_attention_varlen_backward", mutates_args=())
def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    HK, groups = k.shape[1], q.shape[1] // k.shape[1]
    for rows, keys in _sequences(cu_q, cu_k):
        q1, g1, o1 = (_head_first(x[rows], 1) for x in (q, grad, out))
        k1, v1 = (_head_first(x[keys], groups) for x in (k, v))
        is_causal, bias = _bias(q1.shape[2], k1.shape[2], causal, window, q.dtype)
        if softcap:
            grads = _capped_gradients(g1, q1, k1, v1, bias, is_causal, scale, softcap)
        else:
            grads = _FLASH_BACKWARD(
                g1, q1, k1, v1, o1, lse[None, :, rows].contiguous(), 0.0, is_causal,
                attn_mask=bias, scale=scale,
            )  # fmt: skip
        dq[rows] = grads[0][0].transpose(0, 1)
        for total, part in ((dk, grads[1]), (dv, grads[2])):
            part = part[0].unflatten(0, (HK, groups))
            part = part.float().sum(1).to(q.dtype) if groups > 1 else part[:, 0]
            total[keys] = part.transpose(0, 1)
    return dq, dk, dv


def _capped_gradients(grad, q, k, v, bias, is_causal, scale, softcap):
    p, _, slope = _capped(q, k, bias, is_causal, scale, softcap)
    grad = grad.float()
    dp = grad @ v.float().transpose(-1, -2)
    dx = p * (dp - (p * dp).sum(-1, keepdim=True)) * slope * scale
    dk, dv = dx.transpose(-1, -2) @ q.float(), p.transpose(-1, -2) @ grad
    return (dx @ k.float()).to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


@_varlen.register_fake
def _(q, k, v, cu_q, cu_k, causal, scale, window, softcap):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_varlen_backward.register_fake
def _(grad, q, k, v, out, lse, cu_q, cu_k, causal, scale, window, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_varlen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _backward_varlen(ctx: Any, grad: Tensor, _grad_lse: Tensor | None):
    return *_varlen_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6


_varlen.register_autograd(_backward_varlen, setup_context=_setup_varlen)


def attention_varlen(
    q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, cu_q: Tensor, cu_k: Tensor, options: Options
) -> Tensor:
    """The contract of `fastgpt_kernels.attention_varlen`, on a CPU."""
    return _varlen(q_THD, k_SHD, v_SHD, cu_q, cu_k, *options)[0]


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor | None,
    scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    B, T, H, D = q.shape
    HK, row_lengths = k_cache.shape[2], lengths.tolist()
    S = min(max(row_lengths, default=0), k_cache.shape[1])
    if S <= 0 or not q.numel():
        return torch.zeros(q.shape, dtype=q.dtype)
    # Query heads of a key head become rows: (B, HK, G * T, D).
    packed = q.transpose(1, 2).reshape(B, HK, H // HK * T, D)
    k, v = (x[:, :S].transpose(1, 2) for x in (k_cache, v_cache))
    mask = None
    if T > 1 or window or starts is not None or min(row_lengths) < S:
        mask = _seen(T, S, lengths, starts, window).repeat(1, H // HK, 1).unsqueeze(1)
    if softcap:
        tanh = torch.tanh((packed.float() @ k.float().transpose(-1, -2)) * (scale / softcap))
        x = softcap * tanh if mask is None else (softcap * tanh).masked_fill(~mask, -math.inf)
        out = torch.softmax(x, -1).nan_to_num(0.0).to(q.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale)
    return out.reshape(B, H, T, D).transpose(1, 2).contiguous()


def _seen(T: int, S: int, lengths: Tensor, starts: Tensor | None, window: int) -> Tensor:
    """Which of the first S cached keys each new token sees, (B, T, S)."""
    position_BT1 = lengths[:, None, None] - T + torch.arange(T)[:, None]
    key_S = torch.arange(S)
    seen = key_S <= position_BT1
    if window:
        seen = seen & (key_S > position_BT1 - window)
    return seen if starts is None else seen & (key_S >= starts[:, None, None])


_decode_op = torch.library.custom_op("fastgpt_kernels::cpu_attention_decode", mutates_args=())(
    _decode
)


@_decode_op.register_fake
def _(q, k_cache, v_cache, lengths, starts, scale, window, softcap):
    return q.new_empty(q.shape)


def attention_decode(*arguments: Any) -> Tensor:
    """The contract of `fastgpt_kernels.attention_decode`, on a CPU; window and softcap 0: none.

    A compiler sees an operator, since lengths are data; without one that would cost a small model
    as much as the attention.
    """
    return _decode_op(*arguments) if torch.compiler.is_compiling() else _decode(*arguments)

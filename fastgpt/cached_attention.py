"""Attention of one new token a row over cached keys and values.

In C++ on a CPU, where PyTorch's own takes four times as long as reading the cache; by
`fastgpt_kernels.attention_decode` elsewhere, and for the few shapes that the C++ leaves out.

Shape suffixes: B rows, S positions so far, C n_embd, H query heads, K key/value heads, D head.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.model import GPT, Attention, KVCache, Norm, Rotary, rotate
from fastgpt_kernels import attention_decode


class CachedAttention(Protocol):
    """A model's attention during the decoding of a batch; made anew when rows are dropped."""

    def __init__(self, model: GPT, cache: KVCache): ...

    def __call__(self, attn: Attention, h_BC: Tensor) -> Tensor:
        """Append the keys and values of ``h_BC`` at ``cache.length``; return (B, H * D)."""
        ...


def cached_attention(model: GPT, cache: KVCache) -> CachedAttention:
    """The attention that suits the device, the dtype and the width of a head."""
    fits = model.config.attn_dim % 16 == 0 and model.config.attn_dim <= 512
    dtypes = (torch.bfloat16, torch.float32)
    if cache.keys.device.type == "cpu" and cache.keys.dtype in dtypes and fits and _extension():
        return CPUAttention(model, cache)
    return KernelAttention(model, cache)


def _extension() -> bool:
    return os.name == "posix" and find_spec("fastgpt._attend") is not None


class CPUAttention:
    """In C++ (csrc/attend): norm, rotation, appending and attention in one call."""

    def __init__(self, model: GPT, cache: KVCache):
        from fastgpt import _attend

        self.attend, self.cache = _attend.attend, cache
        self.keys = [_numpy(keys) for keys in cache.keys]
        self.values = [_numpy(values) for values in cache.values]
        starts = cache.start_B.numpy()
        self.starts = starts if starts.any() else None
        self.angles = (None, None)
        angles = model.rotary(torch.arange(cache.keys.shape[3]))
        if angles is not None:
            self.angles = angles[0].numpy(), angles[1].numpy()
        self.threads = torch.get_num_threads()

    def __call__(self, attn: Attention, h_BC: Tensor) -> Tensor:
        """See `CachedAttention`."""
        qkv = attn.qkv(h_BC)
        array = _numpy(qkv)
        n_q, n_k, _ = attn.sizes
        q, k, v = array[:, :n_q], array[:, n_q : n_q + n_k], array[:, n_q + n_k :]
        eps = -1.0
        if isinstance(attn.q_norm, Norm):
            if attn.q_norm.kind == "rms_norm" and attn.q_norm.weight is None:
                eps = attn.q_norm.eps
            else:
                q, k = _numpy_parts(_normed_heads(attn, qkv), n_q)
        out_BC = qkv.new_empty(len(h_BC), n_q)
        self.attend(
            q,
            k,
            v,
            self.keys[attn.layer],
            self.values[attn.layer],
            _numpy(out_BC),
            self.cache.length,
            self.starts,
            attn.window or 0,
            *self.angles,
            eps,
            attn.head_dim**-0.5,
            self.threads,
        )
        return out_BC


class KernelAttention:
    """By `fastgpt_kernels.attention_decode`, which splits a long cache over a GPU."""

    def __init__(self, model: GPT, cache: KVCache):
        self.cache = cache
        self.starts_B = cache.start_B.to(torch.int32) if cache.start_B.any() else None
        self.lengths_B = torch.zeros_like(cache.start_B, dtype=torch.int32)
        self.angles = model.rotary(torch.arange(cache.keys.shape[3], device=cache.keys.device))

    def __call__(self, attn: Attention, h_BC: Tensor) -> Tensor:
        """See `CachedAttention`."""
        cache, D = self.cache, attn.head_dim
        B, place = len(h_BC), cache.length
        n_q, n_k, _ = (size // D for size in attn.sizes)
        qkv = attn.qkv(h_BC)
        qk_BHD, v_BKD = qkv.view(B, -1, D).split((n_q + n_k, n_k), dim=1)
        if isinstance(attn.q_norm, Norm):
            qk_BHD = _normed_heads(attn, qkv)
        if self.angles is not None:
            qk_BHD = rotate(qk_BHD, self._angles_here(self.angles))
        keys, values = cache.keys[attn.layer], cache.values[attn.layer]
        keys[:, :, place] = qk_BHD[:, n_q:]
        values[:, :, place] = v_BKD
        if attn.layer == 0:  # once a token: the layers come in order, and each launch costs
            self.lengths_B.fill_(place + 1)
        out_B1HD = attention_decode(
            qk_BHD[:, None, :n_q],
            keys.transpose(1, 2),
            values.transpose(1, 2),
            self.lengths_B,
            cache_starts_B=self.starts_B,
            window=attn.window,
        )
        return out_B1HD.view(B, -1)

    def _angles_here(self, angles: Rotary) -> Rotary:
        """Cosine and sine of the new tokens, (D/2) or (B, 1, D/2)."""
        if self.starts_B is None:  # all rows are at one place
            return angles[0][self.cache.length], angles[1][self.cache.length]
        at_B1 = (self.cache.length - self.cache.start_B)[:, None]
        return angles[0][at_B1], angles[1][at_B1]


def light_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm`` with less around it, where there is no kernel of our own to launch."""
    if x.is_cuda or not isinstance(norm, Norm):
        return norm(x)
    if norm.kind == "layer_norm":
        return F.layer_norm(x, norm.shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x.float(), norm.shape, norm.weight, norm.eps).to(x.dtype)


def _normed_heads(attn: Attention, qkv: Tensor) -> Tensor:
    """Query and key heads of (B, all heads * D) after their norms: (B, H + K, D)."""
    B, D = len(qkv), attn.head_dim
    n_q, n_k, _ = (size // D for size in attn.sizes)
    q_BHD, k_BKD, _ = qkv.view(B, -1, D).split((n_q, n_k, n_k), dim=1)
    return torch.cat((light_norm(attn.q_norm, q_BHD), light_norm(attn.k_norm, k_BKD)), dim=1)


def _numpy(x: Tensor) -> np.ndarray:
    """The memory of a tensor; NumPy has no bfloat16, so its bits as int16."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def _numpy_parts(qk_BHD: Tensor, n_q: int) -> tuple[np.ndarray, np.ndarray]:
    array = _numpy(qk_BHD.flatten(1))
    return array[:, :n_q], array[:, n_q:]

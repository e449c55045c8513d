"""One decoder-only transformer for GPT-2, GPT-3, LLaMA, PaLM and our own recipe.

Shape suffixes: B sequences, T new tokens, S keys (cached and new), C n_embd, H query heads,
K key/value heads, D width of a head, V vocabulary, N chosen places.

Precision is explicit: parameters are float32, activations have ``GPT.compute_dtype``, and each
`Linear` casts its weight on use. Norm statistics, softmax and losses are float32 inside the
kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt_kernels import attention, gelu, layer_norm, relu_squared, rms_norm, rotary, swiglu

Rotary = tuple[Tensor, Tensor]


class Linear(nn.Linear):
    """A linear layer whose float32 weight is cast to the activations' dtype on use."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with or without learned gain and bias."""

    def __init__(self, width: int, config: ModelConfig):
        super().__init__()
        self.shape, self.kind, self.eps = (width,), config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(width)) if config.norm_weight else None
        with_bias = config.norm_weight and config.bias and config.norm == "layer_norm"
        self.bias = nn.Parameter(torch.zeros(width)) if with_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if self.kind == "layer_norm":
            return layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        return rms_norm(x, self.shape, self.weight, self.eps)


class KVCache:
    """Keys and values of the tokens so far, preallocated; each call of the model appends to it.

    ``start_B`` is the first real position of a row: prompts of different length are padded on the
    left.
    """

    def __init__(self, model: GPT, batch_size: int, capacity: int, start_B: Tensor):
        config, device = model.config, model.wte.weight.device
        shape = (config.n_layer, batch_size, config.kv_heads, capacity, config.attn_dim)
        # No place is read before it is written.
        self.keys = torch.empty(shape, dtype=model.compute_dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.start_B = start_B
        self.length = 0

    def append(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of ``layer``; return all of them, (B, K, S, D)."""
        end = self.length + k_BKTD.shape[2]
        self.keys[layer, :, :, self.length : end] = k_BKTD
        self.values[layer, :, :, self.length : end] = v_BKTD
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@dataclass
class Context:
    """What all blocks of one forward pass share."""

    rotary: Rotary | None
    doc_start_BT: Tensor | None
    cache: KVCache | None
    places_N: Tensor | None = None
    """Of the flattened (B, T): the only ones that a block is to go on with."""
    few: bool = False
    """Whether there are no more places than a row is long, so that they alone attend."""


def rotate(x_BHTD: Tensor, angles: Rotary) -> Tensor:
    """Rotary position embedding, half-split layout (Su et al. 2021, arXiv:2104.09864)."""
    cos, sin = angles
    if x_BHTD.is_cuda:
        return rotary(x_BHTD, cos, sin)
    # On a CPU a compiled block fuses it with its neighbours, and decoding must compile nothing.
    a, b = x_BHTD.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTD.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped-query heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.attn_dim
        self.sizes = [heads * config.attn_dim for heads in (config.n_head, *[config.kv_heads] * 2)]
        self.qkv = Linear(config.n_embd, sum(self.sizes), bias=config.bias)
        self.proj = Linear(self.sizes[0], config.n_embd, bias=config.bias)
        self.window = config.window if layer % 2 else None
        self.q_norm = Norm(config.attn_dim, config) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config.attn_dim, config) if config.qk_norm else nn.Identity()

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C), or (N, C) at the places of ``context``."""
        parts = self.qkv(x_BTC).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        # As they lie, (B, T, H, D): transposed first, the norms' kernels would copy them.
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        places_N = context.places_N
        if places_N is not None and context.few:
            out_NHD = attention_at(places_N, q, k, v, context.doc_start_BT, self.window)
            return self.proj(out_NHD.flatten(1))
        out_BHTD = attention(
            q, k, v, causal=True, window=self.window, doc_start=context.doc_start_BT
        )
        return self.proj(_at(places_N, out_BHTD.transpose(1, 2).flatten(2)))


def attention_at(
    places_N: Tensor,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    doc_start_BT: Tensor | None,
    window: int | None,
) -> Tensor:
    """Rows ``places_N`` of the flattened (B, T) of causal self-attention, (N, H, D).

    All rows are one sequence with a mask: N x BT scores, fewer than BT x T while N < T.
    """
    T, n_keys = q_BHTD.shape[2], q_BHTD.shape[0] * q_BHTD.shape[2]
    begin_N = places_N // T * T
    if doc_start_BT is not None:
        begin_N = begin_N + doc_start_BT.flatten()[places_N]
    if window is not None:
        begin_N = torch.maximum(begin_N, places_N - window + 1)
    keys_S = torch.arange(n_keys, device=places_N.device)
    seen_NS = (keys_S >= begin_N[:, None]) & (keys_S <= places_N[:, None])
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q_BHTD, k_BKTD, v_BKTD))
    grouped = k.shape[1] != q.shape[1]
    q = q.index_select(2, places_N)
    out_1HND = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_NS, enable_gqa=grouped)
    return out_1HND[0].transpose(0, 1)


class MLP(nn.Module):
    """Feed-forward network: GELU, squared ReLU (arXiv:2109.08668) or SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.mlp
        self.up = Linear(config.n_embd, config.ff_dim, bias=config.bias)
        self.down = Linear(config.ff_dim, config.n_embd, bias=config.bias)
        gated = self.kind == "swiglu"
        self.gate = Linear(config.n_embd, config.ff_dim, bias=config.bias) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        h = self.up(x)
        if self.gate is not None:
            # As in `rotate`: on a CPU it is the block that is compiled.
            h = swiglu(self.gate(x), h) if h.is_cuda else F.silu(self.gate(x)) * h
        elif self.kind == "relu_squared":
            h = relu_squared(h)
        else:
            h = gelu(h, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.down(h)


class Block(nn.Module):
    """Pre-norm transformer block; with ``parallel``, one norm feeds attention and MLP (PaLM)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = Norm(config.n_embd, config)
        self.attn = Attention(config, layer)
        self.mlp_norm = None if config.parallel else Norm(config.n_embd, config)
        self.mlp = MLP(config)
        self.run = self.compute
        """What `forward` calls, see `fastgpt.compiled`."""

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C), or (N, C) at the places of ``context``."""
        return self.run(x_BTC, context)

    def compute(self, x_BTC: Tensor, context: Context) -> Tensor:
        """`forward`, uncompiled."""
        h = self.attn_norm(x_BTC)
        update = self.attn(h, context)
        x, h = (_at(context.places_N, part) for part in (x_BTC, h))
        if self.mlp_norm is None:
            return x + update + self.mlp(h)
        x = x + update
        return x + self.mlp(self.mlp_norm(x))


def _at(places_N: Tensor | None, x_BTC: Tensor) -> Tensor:
    return x_BTC if places_N is None else x_BTC.flatten(0, 1).index_select(0, places_N)


class GPT(nn.Module):
    """Token ids (B, T) -> final hidden states (B, T, C).

    The loss functions multiply by `head_weight` themselves (`linear_cross_entropy`), so that logits
    of all positions never exist at once; `logits` is for generation.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        config.check()
        self.config, self.compute_dtype = config, compute_dtype
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.wpe = nn.Embedding(config.context, config.n_embd) if learned else None
        self.embed_norm = Norm(config.n_embd, config) if config.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config.n_embd, config)
        self.head = None if config.tied else Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output projection, (V, C), float32."""
        return self.wte.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02); residual projections N(0, 0.02 / sqrt(2 n_layer)) as GPT-2, or zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                if self.config.init == "zero_proj":
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions: Tensor | None = None,
        doc_start: Tensor | None = None,
        cache: KVCache | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states.

        Args:
            tokens_BT: int64 ids.
            positions: int64 (T) or (B, T), where each token stands in its text; None: 0 to T - 1.
            doc_start: int32 (B, T), the first position each token may attend to; None: 0.
            cache: appended to; the tokens then follow those in it.
            places: int64 (N,), of the flattened (B, T), where alone a hidden state is wanted: the
                last block computes little for the others. Not with a cache.

        Returns:
            (B, T, C) or (N, C) in the compute dtype.

        Raises ValueError for places with a cache.
        """
        if places is not None and cache is not None:
            raise ValueError("places are of tokens without a cache")
        B, T = tokens_BT.shape
        if positions is None:
            first = 0 if cache is None else cache.length
            positions = torch.arange(first, first + T, device=tokens_BT.device)
        if cache is not None:
            doc_start = cache.start_B[:, None].expand(B, T).to(torch.int32)
            positions = (positions - cache.start_B[:, None]).clamp_min(0)
        x_BTC = self.wte(tokens_BT)
        if self.wpe is not None:
            x_BTC = x_BTC + self.wpe(positions)
        x_BTC = self.embed_norm(x_BTC.to(self.compute_dtype))
        context = Context(self.rotary(positions), doc_start, cache)
        *blocks, last = self.blocks
        for block in blocks:
            x_BTC = block(x_BTC, context)
        few = places is not None and len(places) <= T
        x = last(x_BTC, replace(context, places_N=places, few=few))
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> float32 (..., V)."""
        logits = F.linear(hidden, self.head_weight.to(hidden.dtype)).float()
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def rotary(self, positions: Tensor) -> Rotary | None:
        """Cosine and sine at ``positions`` (T) or (B, T): (T, D/2) or (B, 1, T, D/2), float32."""
        if self.config.position != "rotary":
            return None
        D = self.config.attn_dim
        exponent = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D
        angles = positions[..., None].float() * self.config.rope_theta**-exponent
        if positions.dim() == 2:
            angles = angles[:, None]
        return angles.cos(), angles.sin()

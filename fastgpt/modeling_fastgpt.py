"""A model of fastgpt for Hugging Face transformers, on PyTorch and transformers alone.

``python -m fastgpt.export`` puts a copy of this file beside the weights of a model that no class of
transformers computes. Load it with ``AutoModelForCausalLM.from_pretrained(directory,
trust_remote_code=True)``.

Shape suffixes: B sequences, T new tokens, S keys (cached and new), C width, H heads, D width of a
head, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class FastGPTConfig(PretrainedConfig):
    """Shape of a decoder-only transformer; the names are those of a run's config.toml."""

    model_type = "fastgpt"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "context",
    }

    def __init__(
        self,
        n_layer: int = 1,
        n_head: int = 1,
        kv_heads: int = 1,
        n_embd: int = 8,
        attn_dim: int = 8,
        ff_dim: int = 32,
        vocab_size: int = 256,
        context: int = 8,
        norm: str = "rms_norm",
        norm_weight: bool = True,
        norm_eps: float = 1e-5,
        mlp: str = "relu_squared",
        position: str = "rotary",
        rope_theta: float = 10000.0,
        bias: bool = False,
        tied: bool = True,
        parallel: bool = False,
        qk_norm: bool = False,
        logit_softcap: float | None = None,
        window: int | None = None,
        embed_norm: bool = False,
        **kwargs: Any,
    ):
        self.n_layer, self.n_head, self.kv_heads = n_layer, n_head, kv_heads
        self.n_embd, self.attn_dim, self.ff_dim = n_embd, attn_dim, ff_dim
        self.vocab_size, self.context = vocab_size, context
        self.norm, self.norm_weight, self.norm_eps = norm, norm_weight, norm_eps
        self.mlp, self.position, self.rope_theta = mlp, position, rope_theta
        self.bias, self.tied, self.parallel, self.qk_norm = bias, tied, parallel, qk_norm
        self.logit_softcap, self.window, self.embed_norm = logit_softcap, window, embed_norm
        # The model ties its own head, see FastGPTForCausalLM.
        super().__init__(**{**kwargs, "tie_word_embeddings": tied})


class Norm(nn.Module):
    """LayerNorm or RMSNorm in float32, with or without gain and bias."""

    def __init__(self, width: int, config: FastGPTConfig):
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(width)) if config.norm_weight else None
        with_bias = config.norm_weight and config.bias and config.norm == "layer_norm"
        self.bias = nn.Parameter(torch.zeros(width)) if with_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        y = x.float()
        if self.kind == "layer_norm":
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight.float()
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split layout."""
    a, b = x_BHTD.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTD.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped-query heads."""

    def __init__(self, config: FastGPTConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.attn_dim
        self.groups = config.n_head // config.kv_heads
        self.sizes = [n * config.attn_dim for n in (config.n_head, *[config.kv_heads] * 2)]
        self.qkv = nn.Linear(config.n_embd, sum(self.sizes), bias=config.bias)
        self.proj = nn.Linear(self.sizes[0], config.n_embd, bias=config.bias)
        self.window = config.window if layer % 2 else None
        self.q_norm = Norm(config.attn_dim, config) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config.attn_dim, config) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BTC: Tensor, rotary: tuple[Tensor, Tensor] | None, seen: Tensor, cache: Any
    ) -> Tensor:
        """``seen``: bool (B, 1, T, S), the keys that a query may see apart from the window."""
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(x_BTC).split(self.sizes, dim=-1)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        if self.window is not None:
            T, S = seen.shape[-2:]
            query = torch.arange(S - T, S, device=seen.device)[:, None]
            seen = seen & (torch.arange(S, device=seen.device) > query - self.window)
        out_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.proj(out_BHTD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Feed-forward network: GELU, squared ReLU or SwiGLU."""

    def __init__(self, config: FastGPTConfig):
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.n_embd, config.ff_dim, bias=config.bias)
        self.down = nn.Linear(config.ff_dim, config.n_embd, bias=config.bias)
        if self.kind == "swiglu":
            self.gate = nn.Linear(config.n_embd, config.ff_dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        h = self.up(x)
        if self.kind == "swiglu":
            h = F.silu(self.gate(x)) * h
        elif self.kind == "relu_squared":
            h = F.relu(h).square()
        else:
            h = F.gelu(h, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.down(h)


class Block(nn.Module):
    """Pre-norm transformer block; with ``parallel``, one norm feeds attention and MLP."""

    def __init__(self, config: FastGPTConfig, layer: int):
        super().__init__()
        self.attn_norm = Norm(config.n_embd, config)
        self.attn = Attention(config, layer)
        self.mlp_norm = None if config.parallel else Norm(config.n_embd, config)
        self.mlp = MLP(config)

    def forward(
        self, x_BTC: Tensor, rotary: tuple[Tensor, Tensor] | None, seen: Tensor, cache: Any
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        h = self.attn_norm(x_BTC)
        if self.mlp_norm is None:
            return x_BTC + self.attn(h, rotary, seen, cache) + self.mlp(h)
        x_BTC = x_BTC + self.attn(h, rotary, seen, cache)
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


class FastGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: ids (B, T) -> logits (B, T, V), float32."""

    config_class = FastGPTConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"head.weight": "wte.weight"}  # noqa: RUF012

    def __init__(self, config: FastGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.context, config.n_embd)
        self.embed_norm = Norm(config.n_embd, config) if config.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config.n_embd, config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the file."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.wte = value

    def get_output_embeddings(self) -> nn.Module:
        """The output projection, whose weight may be that of the token embedding."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output projection."""
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the models of transformers.

        ``attention_mask`` is (B, S), 0 on padding; the cache goes by its new name or its old one.
        The loss is the mean over labels, or, as trainers that accumulate gradients ask, their sum
        over ``num_items_in_batch``.
        """
        x_BTC = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        B, T = x_BTC.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        places_T = torch.arange(past, past + T, device=x_BTC.device)
        seen = torch.arange(past + T, device=x_BTC.device) <= places_T[:, None]
        seen = seen.expand(B, 1, T, past + T)
        if attention_mask is not None:
            real_BS = attention_mask[:, : past + T].bool()
            if position_ids is None:
                position_ids = (real_BS.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
            itself = torch.eye(past + T, dtype=torch.bool, device=x_BTC.device)[past:]
            seen = (seen & real_BS[:, None, None, :]) | itself  # padding sees something, too
        if position_ids is None:
            position_ids = places_T.expand(B, T)
        if self.config.position == "learned":
            x_BTC = x_BTC + self.wpe(position_ids)
        x_BTC = self.embed_norm(x_BTC)
        rotary = self._rotary(position_ids)
        for block in self.blocks:
            x_BTC = block(x_BTC, rotary, seen, cache)
        logits = self._logits(self.norm(x_BTC)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            reduction = "mean" if items is None else "sum"
            pairs = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(*pairs, reduction=reduction)
            if items is not None:
                loss = loss / items
        name = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{name: cache})  # pyright: ignore

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden).float()
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _rotary(self, positions_BT: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine, (B, 1, T, D/2), float32."""
        if self.config.position != "rotary":
            return None
        D = self.config.attn_dim
        exponent = torch.arange(0, D, 2, device=positions_BT.device, dtype=torch.float32) / D
        angles = positions_BT[:, None, :, None].float() * self.config.rope_theta**-exponent
        return angles.cos(), angles.sin()

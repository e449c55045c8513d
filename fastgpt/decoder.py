"""Token-by-token continuation of a batch of prompts: what `generate` and rollouts sample with.

At one token a row a model is bound by reading its weights and by the number of operations, not by
arithmetic. So the weights are cast to the compute dtype once, keys and values have their place from
the start, and a step is few operations.

Shape suffixes: B rows, S positions so far, H query heads, K key/value heads, D head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.errors import UsageError
from fastgpt.model import GPT, Block, KVCache, Linear, rotate


class Decoder:
    """A model as it was when the decoder was made; `start` a batch, then `step` by step.

    Shorter prompts are padded on the left and the padding is never attended to, so a row does not
    depend on its neighbours (up to rounding).
    """

    cache: KVCache

    @torch.no_grad()
    def __init__(self, model: GPT):
        dtype = model.compute_dtype
        with torch.device("meta"):
            self.model = GPT(model.config, dtype)
        weights = dict(model.state_dict())
        self.head = _linear(model.head_weight.detach(), None, dtype)
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                parent, _, leaf = name.rpartition(".")
                bias = None if module.bias is None else module.bias.detach()
                packed = _linear(module.weight.detach(), bias, dtype)
                setattr(self.model.get_submodule(parent), leaf, packed)
                weights.pop(f"{name}.weight")
                weights.pop(f"{name}.bias", None)
        self.model.load_state_dict(weights, assign=True)
        self.model.requires_grad_(False).eval()
        self.blocks = [cast(Block, block) for block in self.model.blocks]
        self.bias: Tensor | None = None

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], n_new: int) -> Tensor:
        """Read ``prompts``, with room for ``n_new`` tokens more; float32 logits (B, V).

        Raises UsageError for an empty prompt, or one that leaves no room in the context.
        """
        longest = max(map(len, prompts), default=0)
        context, device = self.model.config.context, self.model.wte.weight.device
        if not prompts or min(map(len, prompts)) == 0:
            raise UsageError("nothing to continue: the prompt is empty")
        if longest + n_new > context or n_new < 1:
            raise UsageError(
                f"the prompt has {longest} tokens, the model's context is {context}; "
                "shorten the prompt"
            )
        padded = [[0] * (longest - len(p)) + list(p) for p in prompts]
        starts_B = torch.tensor([longest - len(p) for p in prompts], device=device)
        self.cache = KVCache(self.model, len(prompts), longest + n_new, starts_B)
        self.bias = None
        if longest > min(map(len, prompts)):
            places = torch.arange(longest + n_new, device=device)
            hidden = places < starts_B[:, None, None, None]
            self.bias = torch.zeros(hidden.shape, dtype=self.model.compute_dtype, device=device)
            self.bias.masked_fill_(hidden, float("-inf"))
        tokens_BT = torch.tensor(padded, dtype=torch.int64, device=device)
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            hidden_BTC = self.model(tokens_BT, cache=self.cache)
        return self._logits(hidden_BTC[:, -1:])

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Append a token to each row; float32 logits (B, V) of the next."""
        model, cache = self.model, self.cache
        positions_B1 = (cache.length - cache.start_B)[:, None]
        x_B1C = model.wte(tokens_B[:, None])
        if model.wpe is not None:
            x_B1C = x_B1C + model.wpe(positions_B1)
        x_B1C = model.embed_norm(x_B1C.to(model.compute_dtype))
        rotary = model.rotary(positions_B1)
        for block in self.blocks:
            h = block.attn_norm(x_B1C)
            attended = self._attend(block, h, rotary)
            if block.mlp_norm is None:
                x_B1C = x_B1C + attended + block.mlp(h)
            else:
                x_B1C = x_B1C + attended
                x_B1C = x_B1C + block.mlp(block.mlp_norm(x_B1C))
        cache.length += 1
        return self._logits(model.norm(x_B1C))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (int64 indices) alone."""
        cache = self.cache
        cache.keys, cache.values = cache.keys[:, rows], cache.values[:, rows]
        cache.start_B = cache.start_B[rows]
        self.bias = None if self.bias is None else self.bias[rows]

    def _attend(self, block: Block, h_B1C: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attention of one new token a row; query heads of a key head stand as queries of it."""
        attn, cache = block.attn, self.cache
        B, end = len(h_B1C), cache.length + 1
        q, k, v = (
            part.view(B, -1, 1, attn.head_dim) for part in attn.qkv(h_B1C).split(attn.sizes, dim=-1)
        )
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        keys, values = cache.keys[attn.layer], cache.values[attn.layer]
        keys[:, :, end - 1 : end] = k
        values[:, :, end - 1 : end] = v
        first = 0 if attn.window is None else max(0, end - attn.window)
        bias = None if self.bias is None else self.bias[..., first:end]
        out_BKGD = F.scaled_dot_product_attention(
            q.view(B, k.shape[1], -1, attn.head_dim),
            keys[:, :, first:end],
            values[:, :, first:end],
            attn_mask=bias,
        )
        return attn.proj(out_BKGD.reshape(B, 1, -1))

    def _logits(self, hidden_B1C: Tensor) -> Tensor:
        logits = self.head(hidden_B1C[:, -1]).float()
        cap = self.model.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class _Plain(nn.Module):
    """A linear layer whose weight is cast already."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.arguments = weight, bias  # no parameters: nobody trains or saves them

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.arguments)


class _Packed(nn.Module):
    """A linear layer in oneDNN's blocked layout: two thirds of the time at 16 rows in bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.arguments = packed, bias, "none", [], ""

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, *self.arguments)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    # The operators that Inductor lowers frozen linear layers to.
    packs = weight.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return (_Packed if packs else _Plain)(weight, bias)


def draw(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The id where the cumulative distribution of each row passes its number: int64 (B).

    Args:
        probs_BV: float32, at least 0, of any sum.
        uniforms_B: float64 in [0, 1). One draw of a generator a row costs a tenth of one for each
            id, which torch.multinomial takes.
    """
    # float64, so that the number times the total stays below the total: an id of probability 0
    # is never reached.
    cumulative_BV = probs_BV.double().cumsum(-1)
    places_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, places_B1, right=True)[:, 0]

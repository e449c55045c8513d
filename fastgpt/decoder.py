"""Token-by-token continuation of a batch of prompts: what `generate` and rollouts sample with.

At one token a row a model is bound by reading its weights and by the number of operations, not by
arithmetic. So the weights are cast to the compute dtype once, keys and values have their place from
the start, and a step is few operations.

Shape suffixes: B rows, C n_embd, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.cached_attention import CachedAttention, cached_attention, light_norm
from fastgpt.errors import UsageError
from fastgpt.model import GPT, MLP, Block, KVCache, Linear

DRAW_GROUP = 128
"""Ids whose probabilities `draw` adds up first."""


class Decoder:
    """A model as it was when the decoder was made; `start` a batch, then `step` by step.

    Shorter prompts are padded on the left and the padding is never attended to, so a row does not
    depend on its neighbours (up to rounding).
    """

    cache: KVCache
    attend: CachedAttention

    @torch.no_grad()
    def __init__(self, model: GPT):
        dtype = model.compute_dtype
        self.head = _linear(model.head_weight.detach(), None, dtype)
        # A copy that shares embeddings and norms, and has other linear layers.
        memo: dict[int, object] = {id(p): p.detach() for p in model.parameters()}
        for module in model.modules():
            if isinstance(module, Linear):
                bias = None if module.bias is None else module.bias.detach()
                memo[id(module)] = _linear(module.weight.detach(), bias, dtype)
        if model.head is not None:
            memo[id(model.head)] = self.head
        self.model = copy.deepcopy(model, memo).eval()
        self.blocks = [cast(Block, block) for block in self.model.blocks]

    @torch.inference_mode()
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
        self.attend = cached_attention(self.model, self.cache)
        self.padded = longest > min(map(len, prompts))
        tokens_BT = torch.tensor(padded, dtype=torch.int64, device=device)
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            hidden_BTC = self.model(tokens_BT, cache=self.cache)
        return self._logits(hidden_BTC[:, -1])

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Append a token to each row; float32 logits (B, V) of the next."""
        model, cache = self.model, self.cache
        x_BC = F.embedding(tokens_B, model.wte.weight)
        if model.wpe is not None:
            at = cache.length - cache.start_B if self.padded else cache.length
            x_BC = x_BC + model.wpe.weight[at]
        x_BC = light_norm(model.embed_norm, x_BC.to(model.compute_dtype))
        for block in self.blocks:
            h = light_norm(block.attn_norm, x_BC)
            attended = self.attend(block.attn, h)
            proj = cast(_Linear, block.attn.proj)
            if block.mlp_norm is None:
                x_BC = _feed(block.mlp, h, proj.add(attended, x_BC))
            else:
                x_BC = proj.add(attended, x_BC)
                x_BC = _feed(block.mlp, light_norm(block.mlp_norm, x_BC), x_BC)
        cache.length += 1
        return self._logits(light_norm(model.norm, x_BC))

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (int64 indices) alone."""
        cache = self.cache
        cache.keys, cache.values = cache.keys[:, rows], cache.values[:, rows]
        cache.start_B = cache.start_B[rows]
        self.attend = cached_attention(self.model, cache)

    def _logits(self, hidden_BC: Tensor) -> Tensor:
        logits = self.head(hidden_BC).float()
        cap = self.model.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _feed(mlp: MLP, h_BC: Tensor, residual_BC: Tensor) -> Tensor:
    """``residual_BC`` + the feed-forward network at ``h_BC``."""
    up, down = cast(_Linear, mlp.up), cast(_Linear, mlp.down)
    if mlp.gate is not None:
        h = F.silu(mlp.gate(h_BC)) * up(h_BC)
    elif mlp.kind == "relu_squared":
        h = F.relu(up(h_BC)).square()
    else:
        h = up.gelu(h_BC, "tanh" if mlp.kind == "gelu_tanh" else "none")
    return down.add(h, residual_BC)


class _Plain(nn.Module):
    """A linear layer whose weight is cast already."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.arguments = weight, bias  # no parameters: nobody trains or saves them

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.arguments)

    def add(self, input: Tensor, residual: Tensor) -> Tensor:
        return residual + self(input)

    def gelu(self, input: Tensor, approximate: str) -> Tensor:
        return F.gelu(self(input), approximate=approximate)


class _Packed(nn.Module):
    """A linear layer in oneDNN's blocked layout, with what follows it in the same pass.

    At 16 rows in bfloat16 it takes two thirds of the time of a plain one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.arguments = torch.ops.mkldnn._reorder_linear_weight(weight, None), bias

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, *self.arguments, "none", [], "")

    def add(self, input: Tensor, residual: Tensor) -> Tensor:
        """``residual`` + the layer."""
        op = torch.ops.mkldnn._linear_pointwise.binary
        return op(input, residual, *self.arguments, "add")

    def gelu(self, input: Tensor, approximate: str) -> Tensor:
        op = torch.ops.mkldnn._linear_pointwise
        return op(input, *self.arguments, "gelu", [], approximate)


_Linear = _Plain | _Packed


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> _Linear:
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
    # First the group of ids, then the id within it: a running sum of all takes three times as long.
    # Groups are summed in float32, which is what the probabilities are exact to.
    B, V = probs_BV.shape
    padded = F.pad(probs_BV, (0, -V % DRAW_GROUP)) if V % DRAW_GROUP else probs_BV
    groups_BGN = padded.view(B, -1, DRAW_GROUP)
    # float64, so that the number times the total stays below the total: an id of probability 0
    # is never reached.
    ends_BG = groups_BGN.sum(-1).double().cumsum(-1)
    places_B1 = uniforms_B[:, None] * ends_BG[:, -1:]
    group_B1 = torch.searchsorted(ends_BG, places_B1, right=True)
    begin_B1 = F.pad(ends_BG, (1, 0)).gather(1, group_B1)
    rows = torch.arange(B, device=probs_BV.device)
    inner_BN = groups_BGN[rows, group_B1[:, 0]].double().cumsum(-1)
    # As far into the running sum as into the group's own, which was rounded otherwise.
    last_B1 = inner_BN[:, -1:]
    parts_B1 = (places_B1 - begin_B1) / (ends_BG.gather(1, group_B1) - begin_B1)
    places_B1 = torch.minimum(parts_B1 * last_B1, last_B1 * (1 - 2**-52))
    return (group_B1 * DRAW_GROUP + torch.searchsorted(inner_BN, places_B1, right=True))[:, 0]


def most_probable(logits_BV: Tensor) -> Tensor:
    """The id of the largest logit of each row, int64 (B)."""
    if logits_BV.device.type != "cpu":
        return logits_BV.argmax(-1)
    # PyTorch's takes six times as long on a CPU.
    return torch.from_numpy(logits_BV.detach().numpy().argmax(-1))

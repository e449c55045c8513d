"""Token-by-token continuation of a batch of prompts: what `generate` and rollouts sample with.

At one token a row a model is bound by reading its weights and by the number of operations, not by
arithmetic. So the weights are cast to the compute dtype once, keys and values have their place from
the start, and a step is few operations.

Shape suffixes: B rows, S positions so far, H query heads, K key/value heads, D head, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.errors import UsageError
from fastgpt.model import GPT, MLP, Attention, Block, KVCache, Linear, Norm, Rotary

DRAW_GROUP = 128
"""Ids whose probabilities `draw` adds up first."""


class Decoder:
    """A model as it was when the decoder was made; `start` a batch, then `step` by step.

    Shorter prompts are padded on the left and the padding is never attended to, so a row does not
    depend on its neighbours (up to rounding).
    """

    cache: KVCache

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
        self.bias: Tensor | None = None
        self.angles: Rotary | None = None

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
        self.bias = None
        if longest > min(map(len, prompts)):
            places = torch.arange(longest + n_new, device=device)
            hidden = places < starts_B[:, None, None, None]
            self.bias = torch.zeros(hidden.shape, dtype=self.model.compute_dtype, device=device)
            self.bias.masked_fill_(hidden, float("-inf"))
        angles = self.model.rotary(torch.arange(longest + n_new, device=device))
        if angles is not None:
            cos, sin = angles
            self.angles = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        tokens_BT = torch.tensor(padded, dtype=torch.int64, device=device)
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            hidden_BTC = self.model(tokens_BT, cache=self.cache)
        return self._logits(hidden_BTC[:, -1])

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Append a token to each row; float32 logits (B, V) of the next."""
        model, place = self.model, self.cache.length
        # Without padding all rows are at one place, and what depends on it is a row of a table.
        at: int | Tensor = place if self.bias is None else place - self.cache.start_B
        x_BC = F.embedding(tokens_B, model.wte.weight)
        if model.wpe is not None:
            x_BC = x_BC + model.wpe.weight[at]
        x_BC = _norm(model.embed_norm, x_BC.to(model.compute_dtype))
        angles = None
        if self.angles is not None:
            cos, sin = (table[at] for table in self.angles)
            angles = (cos, sin) if isinstance(at, int) else (cos[:, None], sin[:, None])
        for block in self.blocks:
            h = _norm(block.attn_norm, x_BC)
            attended = self._attend(block.attn, h, angles)
            proj = cast(_Linear, block.attn.proj)
            if block.mlp_norm is None:
                x_BC = _feed(block.mlp, h, proj.add(attended, x_BC))
            else:
                x_BC = proj.add(attended, x_BC)
                x_BC = _feed(block.mlp, _norm(block.mlp_norm, x_BC), x_BC)
        self.cache.length += 1
        return self._logits(_norm(model.norm, x_BC))

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (int64 indices) alone."""
        cache = self.cache
        cache.keys, cache.values = cache.keys[:, rows], cache.values[:, rows]
        cache.start_B = cache.start_B[rows]
        self.bias = None if self.bias is None else self.bias[rows]

    def _attend(self, attn: Attention, h_BC: Tensor, angles: Rotary | None) -> Tensor:
        """Attention of one new token a row; query heads of a key head stand as queries of it."""
        cache, D = self.cache, attn.head_dim
        B, end = len(h_BC), cache.length + 1
        n_q, n_k, _ = (size // D for size in attn.sizes)
        qk_BHD, v_BKD = attn.qkv(h_BC).view(B, -1, D).split((n_q + n_k, n_k), dim=1)
        if isinstance(attn.q_norm, Norm) and attn.q_norm.weight is None:
            qk_BHD = _norm(attn.q_norm, qk_BHD)
        elif isinstance(attn.q_norm, Norm):
            parts = (_norm(attn.q_norm, qk_BHD[:, :n_q]), _norm(attn.k_norm, qk_BHD[:, n_q:]))
            qk_BHD = torch.cat(parts, dim=1)
        if angles is not None:
            qk_BHD = _rotate(qk_BHD, angles)
        keys, values = cache.keys[attn.layer], cache.values[attn.layer]
        keys[:, :, end - 1] = qk_BHD[:, n_q:]
        values[:, :, end - 1] = v_BKD
        first = 0 if attn.window is None else max(0, end - attn.window)
        bias = None if self.bias is None else self.bias[..., first:end]
        out_BKGD = F.scaled_dot_product_attention(
            qk_BHD[:, :n_q].reshape(B, n_k, -1, D),
            keys[:, :, first:end],
            values[:, :, first:end],
            attn_mask=bias,
        )
        return out_BKGD.reshape(B, -1)

    def _logits(self, hidden_BC: Tensor) -> Tensor:
        logits = self.head(hidden_BC).float()
        cap = self.model.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm`` with less around it, where there is no kernel of our own to launch."""
    if x.is_cuda or not isinstance(norm, Norm):
        return norm(x)
    if norm.kind == "layer_norm":
        return F.layer_norm(x, norm.shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x.float(), norm.shape, norm.weight, norm.eps).to(x.dtype)


def _rotate(x_BHD: Tensor, angles: Rotary) -> Tensor:
    """As `fastgpt.model.rotate`, by cosines and signed sines of the full width."""
    cos, sin = angles
    half = x_BHD.shape[-1] // 2
    x = x_BHD.float()
    return torch.addcmul(x * cos, x.roll(half, -1), sin).to(x_BHD.dtype)


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

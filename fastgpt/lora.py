"""Low-rank adapters: W + (alpha / rank) B A, with W frozen (Hu et al. 2021, arXiv:2106.09685).

Every linear layer of the blocks gets one. B starts at zero, so that the model is at first what it
was. Rows that a vocabulary grew by are trained whole, for they mean nothing yet.

A checkpoint holds the merged model as "model", so that everything that opens runs opens this one,
and frozen weights and adapters as "lora", from which training goes on exactly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model import GPT, Linear


class LoRALinear(Linear):
    """A frozen `Linear` and its adapter: ``a`` (rank, in) and ``b`` (out, rank), float32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale = alpha / rank
        self.a = nn.Parameter(self.weight.new_empty(rank, base.in_features))
        self.b = nn.Parameter(self.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as in the paper's code

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        low = F.linear(input, self.a.to(input.dtype))
        return super().forward(input) + F.linear(low, (self.scale * self.b).to(input.dtype))

    def merged(self) -> Tensor:
        """The weight (out, in) that alone does what this layer does."""
        return self.weight + self.scale * (self.b @ self.a)


class GrownRows(nn.Module):
    """Frozen rows and, behind them, trained ones, in place of an embedding or an output head."""

    def __init__(self, weight: Tensor, added: int):
        super().__init__()
        rows = len(weight) - added
        self.frozen = nn.Parameter(weight[:rows].detach().clone(), requires_grad=False)
        self.added = nn.Parameter(weight[rows:].detach().clone())

    @property
    def weight(self) -> Tensor:
        """All rows, (V, C)."""
        return torch.cat((self.frozen, self.added))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the ids, (..., C)."""
        return F.embedding(ids, self.weight)


class LoRAGPT(GPT):
    """A GPT whose blocks are frozen but for their adapters.

    Args:
        config: shape of the model.
        compute_dtype: of activations.
        rank: width of the adapters.
        alpha: adapters count ``alpha / rank`` times.
        added: how many of the last rows of embedding and head are trained.
    """

    def __init__(
        self, config: ModelConfig, compute_dtype: torch.dtype, rank: int, alpha: float, added: int
    ):
        super().__init__(config, compute_dtype)
        self.requires_grad_(False)
        for module in list(self.blocks.modules()):
            for name, child in module.named_children():
                if isinstance(child, Linear):
                    setattr(module, name, LoRALinear(child, rank, alpha))
        if added:
            self.wte: Any = GrownRows(self.wte.weight, added)
            self.head: Any = self.head and GrownRows(self.head.weight, added)

    @torch.no_grad()
    def load_base(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of a plain GPT of the same shape."""
        rest = dict(weights)
        for name, module in self.named_modules():
            if isinstance(module, GrownRows):
                rows = rest.pop(f"{name}.weight")
                module.frozen.copy_(rows[: len(module.frozen)])
                module.added.copy_(rows[len(module.frozen) :])
        self.load_state_dict(rest, strict=False)

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """Weights of the plain GPT that computes the same."""
        state: dict[str, Tensor] = {}
        inner = {n: m for n, m in self.named_modules() if isinstance(m, LoRALinear | GrownRows)}
        for name, module in inner.items():
            merged = module.merged() if isinstance(module, LoRALinear) else module.weight
            state[f"{name}.weight"] = merged.detach()
        for name, tensor in self.state_dict().items():
            owner, _, key = name.rpartition(".")
            if owner not in inner or key == "bias":
                state[name] = tensor
        return state

    def merged(self) -> GPT:
        """The plain GPT that computes the same (up to rounding)."""
        model = GPT(self.config, self.compute_dtype).to(self.wte.weight.device)
        model.load_state_dict(self.merged_state())
        return model

    def checkpoint_parts(self) -> dict[str, nn.Module]:
        """See the file: the merged model, and what training goes on from."""
        return {"model": _Merged(self), "lora": self}


class _Merged(nn.Module):
    """The merged weights as a part of a checkpoint; nothing of them is needed to go on."""

    def __init__(self, model: LoRAGPT):
        super().__init__()
        self._source = [model]  # in a list: not a submodule

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Merged weights by the names of a GPT."""
        return self._source[0].merged_state()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Nothing: they follow from the other part."""

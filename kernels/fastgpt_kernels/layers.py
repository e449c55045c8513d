"""Layers for the Hugging Face hub: forwards that ``kernels.kernelize`` puts on modules of a model.

Each is named as the layer that it stands for in ``transformers``, takes what that one takes and
reads its attributes; it has no constructor and no state. ``python -m fastgpt_kernels.hub`` makes a
repository of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgpt_kernels.activations import gelu, swiglu
from fastgpt_kernels.normalization import layer_norm, rms_norm

SILU = ("SiLU", "SiLUActivation")
"""What modules of this activation are called."""


class LayerNorm(nn.Module):
    """For ``torch.nn.LayerNorm``."""

    can_torch_compile, has_backward = True, True
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dims of ``input``."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """For ``LlamaRMSNorm`` and those that are alike: ``weight`` and ``variance_epsilon``."""

    can_torch_compile, has_backward = True, True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dim of ``hidden_states``."""
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
        return rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class MLP(nn.Module):
    """For ``LlamaMLP`` and those that are alike; fused if the activation is SiLU."""

    can_torch_compile, has_backward = True, True
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        fused = type(self.act_fn).__name__ in SILU
        return self.down_proj(swiglu(gate, up) if fused else self.act_fn(gate) * up)


class NewGELU(nn.Module):
    """For ``NewGELUActivation``."""

    can_torch_compile, has_backward = True, True

    def forward(self, input: Tensor) -> Tensor:
        """GELU of each element by its tanh form."""
        return gelu(input, approximate="tanh")


class GeluTanh(nn.Module):
    """For ``GELUTanh``."""

    can_torch_compile, has_backward = True, True

    def forward(self, input: Tensor) -> Tensor:
        """GELU of each element by its tanh form."""
        return gelu(input, approximate="tanh")

"""CPU paths of ``activations`` and ``rotary``: one fused pass each way; only inputs are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels.cpu import fused

_LINEAR = 2.0 * (2.0 / 3.141592653589793) ** 0.5
_CUBIC = _LINEAR * 0.044715


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _value(x: Tensor, kind: str) -> Tensor:
    if kind == "relu_squared":
        return F.relu(x).square()
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _slope(x: Tensor, kind: str) -> Tensor:
    if kind == "relu_squared":
        return 2.0 * F.relu(x)
    if kind == "silu":
        s = torch.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    if kind == "gelu_tanh":
        s = torch.sigmoid(x * (_LINEAR + _CUBIC * x * x))
        return s + x * s * (1.0 - s) * (_LINEAR + 3.0 * _CUBIC * x * x)
    probability = 0.5 + 0.5 * torch.erf(x * 0.5**0.5)
    return probability + x * torch.exp(-0.5 * x * x) * 0.3989422804014327


def activation(x: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """The value of a kind of ``activations``, times ``up``."""
    y = _value(_wide(x), kind)
    return (y if up is None else y * _wide(up)).to(x.dtype)


def activation_gradients(
    grad: Tensor, x: Tensor, up: Tensor | None, kind: str
) -> tuple[Tensor, ...]:
    """Gradients of x and, if there is one, of up."""
    wide_grad, wide_x = _wide(grad), _wide(x)
    if up is None:
        return ((wide_grad * _slope(wide_x, kind)).to(x.dtype),)
    dx = wide_grad * _wide(up) * _slope(wide_x, kind)
    return dx.to(x.dtype), (wide_grad * _value(wide_x, kind)).to(x.dtype)


_fused_activation = fused(activation)
_fused_gradients = fused(activation_gradients)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _fused_activation(gate, up, kind)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_fused_gradients(grad, *ctx.saved_tensors, ctx.kind), None


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """``kind(gate) * up``, differentiable once."""
    return _Gated.apply(gate, up, kind)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotation of the first ``2 * cos.shape[-1]`` of the last dim; cos and sin broadcast."""
    width = 2 * cos.shape[-1]
    part, cos, sin = _wide(x[..., :width]), _wide(cos), _wide(sin)
    a, b = part.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else part.chunk(2, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    out = out.to(x.dtype)
    return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), dim=-1)


_fused_rotate = fused(rotate)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _fused_rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _fused_rotate(grad, cos, -sin, ctx.interleaved), None, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``rotate`` whose gradient is the rotation by the negative angle."""
    return _Rotary.apply(x, cos, sin, interleaved)

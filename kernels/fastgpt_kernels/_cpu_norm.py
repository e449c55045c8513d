"""CPU paths of ``normalization``: one fused pass forward, two backward; statistics in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgpt_kernels.cpu import differentiable_once, fused


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    n_dims: int,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x + residual (or empty), mean (or empty) and rstd of each row in float32."""
    total = x.new_empty(0)
    x32 = x.float()
    if residual is not None:
        total = (x32 + residual).to(residual.dtype).contiguous()
        x32 = total.float()
    x32 = x32.flatten(-n_dims)
    centred = x32 if rms else x32 - x32.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * weight.float().flatten()
    if bias is not None:
        y = y + bias.float().flatten()
    mean = x32.new_empty(0) if rms else x32.mean(-1).flatten()
    return y.to(x.dtype).reshape(x.shape).contiguous(), total, mean, rstd.flatten()


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    needs_dw: bool,
    needs_db: bool,
    n_dims: int,
    rms: bool,
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (+ dtotal) in the type of x, dw and db in float32 (empty if not asked for)."""
    n_cols = math.prod(x.shape[x.dim() - n_dims :])
    g, xhat = dy.float().reshape(-1, n_cols), x.float().reshape(-1, n_cols)
    xhat = (xhat if rms else xhat - mean[:, None]) * rstd[:, None]
    dw = (g * xhat).sum(0) if needs_dw else g.new_empty(0)
    db = g.sum(0) if needs_db else g.new_empty(0)
    if weight is not None:
        g = g * weight.float().flatten()
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if not rms:
        dx = dx - g.mean(-1, keepdim=True)
    dx = (dx * rstd[:, None]).reshape(x.shape)
    if dtotal is not None:
        dx = dx + dtotal
    return dx.to(x.dtype).contiguous(), dw, db


_fused_forward = fused(forward)
_fused_backward = fused(backward)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, n_dims, eps, rms):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, total, mean, rstd = _fused_forward(x, residual, weight, bias, n_dims, eps, rms)
        source = x if residual is None else total
        ctx.save_for_backward(source, weight, bias, mean, rstd)
        ctx.options = x.dtype, residual is not None, n_dims, rms
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @differentiable_once
    def backward(ctx, dy, dtotal):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dtype, added, n_dims, rms = ctx.options
        if dy is None:  # only the sum is used, if that
            return None if dtotal is None else dtotal.to(dtype), dtotal, *[None] * 5
        needs = ctx.needs_input_grad[2:4]
        dx, *sums = _fused_backward(dy, x, mean, rstd, weight, *needs, n_dims, rms, dtotal)
        dw, db = (
            total.to(parameter.dtype).view(parameter.shape) if needed else None
            for parameter, total, needed in zip((weight, bias), sums, needs, strict=True)
        )
        return dx.to(dtype), dx if added else None, dw, db, None, None, None


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    n_dims: int,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum (without a residual: x, and nothing)."""
    return _Norm.apply(x, residual, weight, bias, n_dims, eps, rms)

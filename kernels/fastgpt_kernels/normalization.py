"""LayerNorm and RMSNorm over the last dims, forward and backward, with float32 statistics.

Per row x of n elements, weight w and bias b (arXiv:1607.06450; RMSNorm, arXiv:1910.07467, is the
same with mean = 0 and no bias)::

    mean = sum(x) / n        rstd = 1 / sqrt(sum((x - mean)^2) / n + eps)
    xhat = (x - mean) rstd   y = xhat w + b

    g = dy w                 dx = rstd (g - sum(g) / n - xhat sum(g xhat) / n)
    dw = sum over rows of dy xhat            db = sum over rows of dy

The variance is taken from centred values (a second pass in registers, or block by block with Chan's
merge for rows that do not fit), so a mean far above the spread costs no digits. ``mean`` and
``rstd`` are kept in float32 whatever the input: rounded to bfloat16 they would dominate the error
of dw as soon as the mean exceeds the spread.

``dw`` and ``db`` come in two stages without atomics: every program sums its rows in float32
registers into one row of partials, and the partials are summed; so two runs give the same bits. Up
to 8,192 columns one kernel makes dx and the partials from one read of x and dy. Beyond that the
accumulators would spill: dx is one kernel, and the partials another that walks column blocks.

Shapes: input (..., n), rows of any strides (see ``_common.RowLayout``); outputs are contiguous.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels._common import (
    AOT_DTYPES,
    AotCase,
    aot_variants,
    cdiv,
    device_guard,
    launch_config,
    multiprocessor_count,
    next_power_of_2,
    row_layout,
    use_triton,
)
from fastgpt_kernels._norm_kernels import (
    bwd_dw_kernel,
    bwd_dx_kernel,
    bwd_fused_kernel,
    fwd_kernel,
)

FUSED_BACKWARD_MAX = 8192
"""Widest row whose dx, dw and db come from one kernel; beyond it the accumulators spill."""


def _launch_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n_dims: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    layout = row_layout(x, n_dims)
    y = x.new_empty(x.shape)
    rstd = x.new_empty(layout.n_rows, dtype=torch.float32)
    mean = x.new_empty(0 if rms else layout.n_rows, dtype=torch.float32)
    if x.numel() == 0:
        return y, mean, rstd
    flags: dict[str, Any] = {
        "RMS": rms, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None
    }  # fmt: skip
    w = y if weight is None else weight.contiguous()
    b = y if bias is None else bias.contiguous()
    config = launch_config("norm_fwd", x.device, x.dtype, next_power_of_2(layout.n_cols))
    with device_guard(x):
        fwd_kernel[(cdiv(layout.n_rows, config["BLOCK_M"]),)](
            layout.tensor, w, b, y, mean, rstd, layout.n_rows, layout.n_cols, eps, *layout.strides,
            **flags, **config,
        )  # fmt: skip
    return y, mean, rstd


def _launch_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    n_dims: int,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x_layout, dy_layout = row_layout(x, n_dims), row_layout(dy, n_dims)
    n_rows, n_cols = x_layout.n_rows, x_layout.n_cols
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx, x.new_zeros(n_cols * (weight is not None)), x.new_zeros(n_cols * has_bias)
    w = dx if weight is None else weight.contiguous()
    flags: dict[str, Any] = {"RMS": rms, "HAS_WEIGHT": weight is not None}
    with_bias: dict[str, Any] = {**flags, "HAS_BIAS": has_bias}
    strides = (*x_layout.strides, *dy_layout.strides)
    fused = n_cols <= FUSED_BACKWARD_MAX
    kernel = "norm_bwd_fused" if fused else "norm_bwd_dw"
    config = launch_config(kernel, x.device, x.dtype, next_power_of_2(n_cols))
    column_blocks = 1 if fused else cdiv(n_cols, config["BLOCK_N"])
    programs = multiprocessor_count(x) * max(1, min(8, 8192 // next_power_of_2(n_cols)))
    groups = min(
        cdiv(n_rows, config["BLOCK_M"]),
        programs if fused else max(1, 8 * programs // column_blocks),
    )
    rows_per_program = cdiv(cdiv(n_rows, groups), config["BLOCK_M"]) * config["BLOCK_M"]
    groups = cdiv(n_rows, rows_per_program)
    dw = x.new_empty(groups, n_cols if weight is not None else 0, dtype=torch.float32)
    db = x.new_empty(groups, n_cols if has_bias else 0, dtype=torch.float32)
    with device_guard(x):
        if fused:
            bwd_fused_kernel[(groups,)](
                dy_layout.tensor, x_layout.tensor, w, mean, rstd, dx, dw, db,
                n_rows, n_cols, rows_per_program, *strides, **with_bias, **config,
            )  # fmt: skip
        else:
            dx_config = launch_config("norm_bwd_dx", x.device, x.dtype, next_power_of_2(n_cols))
            bwd_dx_kernel[(n_rows,)](
                dy_layout.tensor, x_layout.tensor, w, mean, rstd, dx,
                n_rows, n_cols, *strides, **flags, **dx_config,
            )  # fmt: skip
            if weight is not None or has_bias:
                bwd_dw_kernel[(column_blocks, groups)](
                    dy_layout.tensor, x_layout.tensor, mean, rstd, dw, db,
                    n_rows, n_cols, rows_per_program, *strides, **with_bias, **config,
                )  # fmt: skip
    return dx, dw.sum(0), db.sum(0)


def _cpu_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n_dims: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x32 = x.float().flatten(-n_dims)
    centred = x32 if rms else x32 - x32.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * weight.float().flatten()
    if bias is not None:
        y = y + bias.float().flatten()
    mean = x32.new_empty(0) if rms else x32.mean(-1).flatten()
    return y.to(x.dtype).reshape(x.shape).contiguous(), mean, rstd.flatten()


def _cpu_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    n_dims: int,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n_cols = math.prod(x.shape[x.dim() - n_dims :])
    g, xhat = dy.float().reshape(-1, n_cols), x.float().reshape(-1, n_cols)
    xhat = (xhat if rms else xhat - mean[:, None]) * rstd[:, None]
    dw = g.new_empty(0) if weight is None else (g * xhat).sum(0)
    db = g.sum(0) if has_bias else g.new_empty(0)
    if weight is not None:
        g = g * weight.float().flatten()
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if not rms:
        dx = dx - g.mean(-1, keepdim=True)
    return (dx * rstd[:, None]).to(x.dtype).reshape(x.shape).contiguous(), dw, db


@torch.library.custom_op("fastgpt_kernels::norm_fwd", mutates_args=())
def norm_fwd(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, n_dims: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, float32 mean (empty for RMSNorm) and float32 rstd, one per row."""
    run = _launch_fwd if use_triton(input) else _cpu_fwd
    return run(input, weight, bias, n_dims, eps, rms)


@norm_fwd.register_fake
def _(input, weight, bias, n_dims, eps, rms):
    n_rows = math.prod(input.shape[: input.dim() - n_dims])
    statistics = input.new_empty(n_rows, dtype=torch.float32)
    mean = input.new_empty(0, dtype=torch.float32) if rms else torch.empty_like(statistics)
    return input.new_empty(input.shape), mean, statistics


@torch.library.custom_op("fastgpt_kernels::norm_bwd", mutates_args=())
def norm_bwd(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    n_dims: int,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the input's dtype; dw and db flat, in float32 (empty where not asked for)."""
    run = _launch_bwd if use_triton(input) else _cpu_bwd
    return run(grad, input, mean, rstd, weight, has_bias, n_dims, rms)


@norm_bwd.register_fake
def _(grad, input, mean, rstd, weight, has_bias, n_dims, rms):
    n_cols = math.prod(input.shape[input.dim() - n_dims :])
    dw = input.new_empty(0 if weight is None else n_cols, dtype=torch.float32)
    db = input.new_empty(n_cols if has_bias else 0, dtype=torch.float32)
    return input.new_empty(input.shape), dw, db


def _save(ctx, inputs, output):
    input, weight, bias, ctx.n_dims, _, ctx.rms = inputs
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
    ctx.save_for_backward(input, weight, output[1], output[2])


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    input, weight, mean, rstd = ctx.saved_tensors
    has_bias = ctx.bias_like is not None
    dx, dw, db = norm_bwd(grad, input, mean, rstd, weight, has_bias, ctx.n_dims, ctx.rms)
    dw = None if weight is None else dw.to(weight.dtype).view(weight.shape)
    db = db.to(ctx.bias_like[1]).view(ctx.bias_like[0]) if has_bias else None
    return dx, dw, db, None, None, None


norm_fwd.register_autograd(_backward, setup_context=_save)


_AOT_TYPES = {
    **dict.fromkeys(("mean_in", "rstd_in", "mean_out", "rstd_out"), "*fp32"),
    **dict.fromkeys(("dw_partial", "db_partial"), "*fp32"),
    **dict.fromkeys(("n_rows", "n_cols", "rows_per_program"), "i32"),
    **dict.fromkeys(("x_outer", "x_step", "dy_outer", "dy_step"), "i32"),
    "eps": "fp32",
}
_AOT_KERNELS = (
    ("norm_fwd", fwd_kernel, (16, 64, 256, 768, 2048, 4096, 8192, 16384, 65536)),
    ("norm_bwd_fused", bwd_fused_kernel, (16, 64, 256, 768, 2048, 4096, 8192)),
    ("norm_bwd_dx", bwd_dx_kernel, (32768,)),
    ("norm_bwd_dw", bwd_dw_kernel, (32768,)),
)


def aot_cases() -> list[AotCase]:
    """Instances for the static gate: contiguous input, weight and (LayerNorm) bias present."""
    cases = []
    for (kernel, fn, widths), rms in itertools.product(_AOT_KERNELS, (False, True)):
        for width, (name, dtype) in itertools.product(widths, AOT_DTYPES.items()):
            tensors = dict.fromkeys(("x", "y", "dy", "dx", "weight", "bias"), f"*{name}")
            constants = {
                **{"RMS": rms, "HAS_WEIGHT": True, "HAS_BIAS": not rms},
                **dict.fromkeys(("x_inner", "x_col", "dy_inner", "dy_col"), 1),
            }
            label = f"{kernel}/{'rms' if rms else 'layer'}_{width}_{name}"
            cases += aot_variants(
                label, kernel, fn, dtype, next_power_of_2(width),
                {**_AOT_TYPES, **tensors}, constants, ("n_cols", "x_outer", "dy_outer"),
            )  # fmt: skip
    return cases


def _checked_shape(
    name: str, input: Tensor, normalized_shape: int | Sequence[int], *parameters: Tensor | None
) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(input.shape[input.dim() - len(shape) :]) != shape:
        raise ValueError(
            f"{name}: normalized_shape {shape} must be the last dims of the input, whose shape is "
            f"{tuple(input.shape)}"
        )
    for parameter in parameters:
        if parameter is not None and tuple(parameter.shape) != shape:
            raise ValueError(
                f"{name}: weight and bias must have shape {shape}, got {tuple(parameter.shape)}"
            )
    return shape


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Drop-in for ``torch.nn.functional.layer_norm`` with float32 statistics in every dtype.

    Args:
        input: (..., *normalized_shape), any strides, float32, float16 or
            bfloat16 (on the CPU also float64).
        normalized_shape: the last dims, over which mean and variance are taken.
        weight: scale of shape ``normalized_shape``, any float dtype.
        bias: shift of shape ``normalized_shape``.
        eps: added to the variance.

    Returns:
        Tensor of the input's shape and dtype, contiguous. Weight and bias gradients are summed in
        float32.

    Raises:
        ValueError: ``normalized_shape``, ``weight`` or ``bias`` does not match the input.
    """
    shape = _checked_shape("layer_norm", input, normalized_shape, weight, bias)
    if use_triton(input):
        return norm_fwd(input, weight, bias, len(shape), eps, False)[0]
    wide = torch.promote_types(input.dtype, torch.float32)
    w, b = (None if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(input.to(wide), shape, w, b, eps).to(input.dtype)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Drop-in for ``torch.nn.functional.rms_norm`` with float32 statistics in every dtype.

    Args:
        input: (..., *normalized_shape), any strides, float32, float16 or
            bfloat16 (on the CPU also float64).
        normalized_shape: the last dims, over which the mean square is taken.
        weight: scale of shape ``normalized_shape``, any float dtype.
        eps: added to the mean square; the float32 machine epsilon if None, as in PyTorch.

    Returns:
        Tensor of the input's shape and dtype, contiguous. The weight gradient is summed in float32.

    Raises:
        ValueError: ``normalized_shape`` or ``weight`` does not match the input.
    """
    shape = _checked_shape("rms_norm", input, normalized_shape, weight)
    wide = torch.promote_types(input.dtype, torch.float32)
    eps = torch.finfo(wide).eps if eps is None else eps
    if use_triton(input):
        return norm_fwd(input, weight, None, len(shape), eps, True)[0]
    return F.rms_norm(input.to(wide), shape, None if weight is None else weight.to(wide), eps).to(
        input.dtype
    )

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

``dw`` and ``db`` come in two stages without atomic sums: every program sums its rows in float32
registers into one row of partials, and the partials are summed; so two runs give the same bits. Up
to 8,192 columns one block holds a row and makes dx and the partials from one read of x and dy.
Beyond that its accumulators would spill: the sums over a row and what follows from them are two
kinds of programs of one launch, and rows go in chunks that are still in the L2 cache when they are
read again. ``add_layer_norm`` and ``add_rms_norm`` normalise x + residual and return the sum too;
its gradient is added to dx in the same kernel.

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

from fastgpt_kernels import _cpu_norm, cpu
from fastgpt_kernels._common import (
    AOT_DTYPES,
    AotCase,
    aot_variants,
    cdiv,
    check_devices,
    check_dtype,
    device_guard,
    launch_config,
    multiprocessor_count,
    next_power_of_2,
    row_layout,
    use_triton,
)
from fastgpt_kernels._norm_kernels import bwd_fused_kernel, bwd_wide_kernel, fwd_kernel
from fastgpt_kernels._units import common_unit, row_unit

FUSED_BACKWARD_MAX = 8192
"""Widest row whose dx, dw and db come from one block; beyond it the accumulators spill."""
INTERPRETED_L2 = 1 << 20
"""Bytes of the L2 cache that the interpreter pretends to have."""


def _launch_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    n_dims: int,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = row_layout(x, n_dims)
    other = layout if residual is None else row_layout(residual, n_dims)
    y = x.new_empty(x.shape)
    total = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    rstd = x.new_empty(layout.n_rows, dtype=torch.float32)
    mean = x.new_empty(0 if rms else layout.n_rows, dtype=torch.float32)
    if x.numel() == 0:
        return y, total, mean, rstd
    flags: dict[str, Any] = {
        **{"RMS": rms, "HAS_RESIDUAL": residual is not None},
        **{"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None},
        "UNIT": row_unit(layout, other),
    }
    w = y if weight is None else weight.contiguous()
    b = y if bias is None else bias.contiguous()
    config = launch_config("norm_fwd", x.device, x.dtype, next_power_of_2(layout.n_cols))
    with device_guard(x):
        fwd_kernel[(cdiv(layout.n_rows, config["BLOCK_M"]),)](
            layout.tensor, other.tensor, w, b, y, total, mean, rstd,
            layout.n_rows, layout.n_cols, eps, *layout.strides, *other.strides, **flags, **config,
        )  # fmt: skip
    return y, total, mean, rstd


def _chunk_rows(x: Tensor, n_rows: int, n_cols: int, block_m: int) -> int:
    """Rows of a chunk of the wide backward: its x and dy fill a fifth of the L2 cache."""
    l2 = torch.cuda.get_device_properties(x.device).L2_cache_size if x.is_cuda else INTERPRETED_L2
    fitting = l2 // 5 // (2 * n_cols * x.element_size() * block_m)
    return max(1, min(fitting, cdiv(n_rows, block_m))) * block_m


def _launch_bwd(
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
    x_layout, dy_layout = row_layout(x, n_dims), row_layout(dy, n_dims)
    dt_layout = dy_layout if dtotal is None else row_layout(dtotal, n_dims)
    n_rows, n_cols = x_layout.n_rows, x_layout.n_cols
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        dw, db = (
            x.new_zeros(n_cols * needs, dtype=torch.float32) for needs in (needs_dw, needs_db)
        )
        return dx, dw, db
    w = dx if weight is None else weight.contiguous()
    flags: dict[str, Any] = {
        **{"RMS": rms, "HAS_TOTAL": dtotal is not None, "HAS_WEIGHT": weight is not None},
        **{"NEEDS_DW": needs_dw, "NEEDS_DB": needs_db},
        "UNIT": row_unit(x_layout, dy_layout, dt_layout),
    }
    fused = n_cols <= FUSED_BACKWARD_MAX
    config = launch_config(
        "norm_bwd_fused" if fused else "norm_bwd_wide", x.device, x.dtype, next_power_of_2(n_cols)
    )
    if fused:
        programs = multiprocessor_count(x) * max(1, min(4, 8192 // next_power_of_2(n_cols)))
        groups = min(cdiv(n_rows, config["BLOCK_M"]), programs)
        rows_each = cdiv(cdiv(n_rows, groups), config["BLOCK_M"]) * config["BLOCK_M"]
    else:
        rows_each = _chunk_rows(x, n_rows, n_cols, config["BLOCK_M"])
    groups = cdiv(n_rows, rows_each)
    dw = x.new_empty(groups, n_cols if needs_dw else 0, dtype=torch.float32)
    db = x.new_empty(groups, n_cols if needs_db else 0, dtype=torch.float32)
    tensors = dy_layout.tensor, x_layout.tensor, w, mean, rstd, dt_layout.tensor, dx, dw, db
    strides = (*x_layout.strides, *dy_layout.strides, *dt_layout.strides)
    with device_guard(x):
        if fused:
            bwd_fused_kernel[(groups,)](
                *tensors, n_rows, n_cols, rows_each, *strides, **flags, **config
            )
        else:
            segments = cdiv(n_cols, config["BLOCK_S"])
            sums = x.new_empty(2, n_rows, segments, dtype=torch.float32)
            counters = x.new_zeros(1 + groups, dtype=torch.int32)
            summing = rows_each * segments  # programs a chunk; see the kernel for the order
            grid = summing + groups * (summing + cdiv(n_cols, config["BLOCK_N"]))
            bwd_wide_kernel[(grid,)](
                *tensors, sums, counters, n_rows, n_cols, rows_each, *strides,
                **flags, **{**config, "SEGMENTS": next_power_of_2(segments)},
            )  # fmt: skip
    return dx, dw.sum(0), db.sum(0)


@torch.library.custom_op("fastgpt_kernels::norm_fwd", mutates_args=())
def norm_fwd(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, n_dims: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, float32 mean (empty for RMSNorm) and float32 rstd, one per row."""
    run = _launch_fwd if use_triton(input) else _cpu_norm.forward
    y, _, mean, rstd = run(input, None, weight, bias, n_dims, eps, rms)
    return y, mean, rstd


def _fake_statistics(input: Tensor, n_dims: int, rms: bool) -> tuple[Tensor, Tensor]:
    n_rows = math.prod(input.shape[: input.dim() - n_dims])
    rstd = input.new_empty(n_rows, dtype=torch.float32)
    return rstd.new_empty(0) if rms else torch.empty_like(rstd), rstd


@norm_fwd.register_fake
def _(input, weight, bias, n_dims, eps, rms):
    return input.new_empty(input.shape), *_fake_statistics(input, n_dims, rms)


@torch.library.custom_op("fastgpt_kernels::norm_bwd", mutates_args=())
def norm_bwd(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    needs_dw: bool,
    needs_db: bool,
    n_dims: int,
    rms: bool,
    grad_total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (+ grad_total) in the input's dtype; dw and db flat, float32 (empty if not asked for)."""
    run = _launch_bwd if use_triton(input) else _cpu_norm.backward
    return run(grad, input, mean, rstd, weight, needs_dw, needs_db, n_dims, rms, grad_total)


@norm_bwd.register_fake
def _(grad, input, mean, rstd, weight, needs_dw, needs_db, n_dims, rms, grad_total=None):
    n_cols = math.prod(input.shape[input.dim() - n_dims :])
    dw = input.new_empty(n_cols if needs_dw else 0, dtype=torch.float32)
    db = input.new_empty(n_cols if needs_db else 0, dtype=torch.float32)
    return input.new_empty(input.shape), dw, db


def _save(ctx, inputs, output):
    input, weight, bias, ctx.n_dims, _, ctx.rms = inputs
    ctx.set_materialize_grads(False)
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
    ctx.save_for_backward(input, weight, output[1], output[2])


def _gradients(ctx, grad, grad_total=None):
    x, weight, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad[-5:-3]  # of weight and bias; the last three are options
    dx, dw, db = norm_bwd(grad, x, mean, rstd, weight, *needs, ctx.n_dims, ctx.rms, grad_total)
    dw = dw.to(weight.dtype).view(weight.shape) if needs[0] else None
    db = db.to(ctx.bias_like[1]).view(ctx.bias_like[0]) if needs[1] else None
    return dx, dw, db, None, None, None


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    return (None,) * 6 if grad is None else _gradients(ctx, grad)


norm_fwd.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fastgpt_kernels::add_norm_fwd", mutates_args=())
def add_norm_fwd(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n_dims: int,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, input + residual in the residual's dtype, mean and rstd as ``norm_fwd``."""
    run = _launch_fwd if use_triton(input) else _cpu_norm.forward
    return run(input, residual, weight, bias, n_dims, eps, rms)


@add_norm_fwd.register_fake
def _(input, residual, weight, bias, n_dims, eps, rms):
    statistics = _fake_statistics(input, n_dims, rms)
    return input.new_empty(input.shape), residual.new_empty(input.shape), *statistics


def _save_add(ctx, inputs, output):
    input, _, weight, bias, ctx.n_dims, _, ctx.rms = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype = input.dtype
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
    ctx.save_for_backward(output[1], weight, output[2], output[3])


def _backward_add(ctx, grad, grad_total, _grad_mean, _grad_rstd):
    if grad is None:  # only the sum is used, if that
        dx = None if grad_total is None else grad_total.to(ctx.dtype)
        return dx, grad_total, *[None] * 5
    dx, *rest = _gradients(ctx, grad, grad_total)
    return dx.to(ctx.dtype), dx, *rest


add_norm_fwd.register_autograd(_backward_add, setup_context=_save_add)


_AOT_TYPES = {
    **dict.fromkeys(("mean_in", "rstd_in", "mean_out", "rstd_out"), "*fp32"),
    **dict.fromkeys(("dw_partial", "db_partial", "sums"), "*fp32"),
    **dict.fromkeys(("n_rows", "n_cols", "rows_per_program", "chunk_rows"), "i32"),
    **{f"{name}_{part}": "i32" for name in ("x", "dy", "res", "dt") for part in ("outer", "step")},
    **{"eps": "fp32", "counters": "*i32"},
}
_AOT_KERNELS = (
    ("norm_fwd", fwd_kernel, (16, 64, 256, 768, 1000, 2048, 4096, 8192, 16384, 65536)),
    ("norm_bwd_fused", bwd_fused_kernel, (16, 64, 256, 768, 1000, 2048, 4096, 8192)),
    ("norm_bwd_wide", bwd_wide_kernel, (16384, 32768, 65536)),
)
_ADD_WIDTHS = (768, 4096, 8192, 32768, 65536)


def aot_cases() -> list[AotCase]:
    """Instances for the static gate: contiguous input, weight and (LayerNorm) bias present."""
    cases = []
    for (kernel, fn, widths), rms, add in itertools.product(
        _AOT_KERNELS, (False, True), (False, True)
    ):
        types = [*AOT_DTYPES, *(["mixed"] if add else [])]
        for width, name in itertools.product(widths, types):
            if add and width not in _ADD_WIDTHS:
                continue
            x, pointers = _aot_pointers(kernel, name)
            inner = [f"{part}_inner" for part in ("x", "dy", "res", "dt")]
            cols = [f"{part}_col" for part in ("x", "dy", "res", "dt")]
            constants = {
                **{"RMS": rms, "HAS_RESIDUAL": add, "HAS_TOTAL": add},
                **{"HAS_WEIGHT": True, "HAS_BIAS": not rms, "NEEDS_DW": True, "NEEDS_DB": not rms},
                **{**dict.fromkeys((*inner, *cols), 1), "UNIT": common_unit(width)},
            }
            aligned = ("n_cols", "x_outer", "dy_outer", "res_outer", "dt_outer")
            kind = f"{'add_' if add else ''}{'rms' if rms else 'layer'}"
            cases += aot_variants(
                f"{kernel}/{kind}_{width}_{name}", kernel, fn, AOT_DTYPES[x],
                next_power_of_2(width), {**_AOT_TYPES, **pointers}, constants,
                aligned if common_unit(width) == 1 else (),
            )  # fmt: skip
    return cases


def _aot_pointers(kernel: str, name: str) -> tuple[str, dict[str, str]]:
    """Type of x, and of every pointer. Mixed: branch in bf16, residual and parameters in fp32.

    What the backward calls x is the sum, of the residual's type.
    """
    wide = "fp32" if name == "mixed" else name
    branch = "bf16" if name == "mixed" else name
    x = branch if kernel == "norm_fwd" else wide
    types = {"x": x, **dict.fromkeys(("y", "dy"), branch)}
    types |= dict.fromkeys(("residual", "total", "dtotal", "dx", "weight", "bias"), wide)
    return x, {pointer: f"*{kind}" for pointer, kind in types.items()}


def _checked_shape(
    name: str,
    input: Tensor,
    normalized_shape: int | Sequence[int],
    *parameters: Tensor | None,
    residual: Tensor | None = None,
) -> tuple[int, ...]:
    check_dtype(name, input)
    check_devices(name, input, residual, *parameters)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(input.shape[input.dim() - len(shape) :]) != shape:
        raise ValueError(
            f"{name}: normalized_shape {shape} must be the last dims of the input, whose shape is "
            f"{tuple(input.shape)}"
        )
    if residual is not None and residual.shape != input.shape:
        raise ValueError(
            f"{name}: residual must have the input's shape {tuple(input.shape)}, got "
            f"{tuple(residual.shape)}"
        )
    for parameter in parameters:
        if parameter is not None and tuple(parameter.shape) != shape:
            raise ValueError(
                f"{name}: weight and bias must have shape {shape}, got {tuple(parameter.shape)}"
            )
    return shape


def _fuse_layer_norm(input: Tensor) -> bool:
    """PyTorch's own LayerNorm for CPUs is fast, but in 16 bits its statistics are rounded."""
    return input.dtype != torch.float32 and cpu.worth_fusing(input)


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
        ValueError: ``normalized_shape``, ``weight`` or ``bias`` does not match the input, or the
            dtype is not one of these.
    """
    shape = _checked_shape("layer_norm", input, normalized_shape, weight, bias)
    if use_triton(input):
        return norm_fwd(input, weight, bias, len(shape), eps, False)[0]
    if _fuse_layer_norm(input):
        return _cpu_norm.add_norm(input, None, weight, bias, len(shape), eps, False)[0]
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
        ValueError: ``normalized_shape`` or ``weight`` does not match the input, or the dtype is not
            one of these.
    """
    shape = _checked_shape("rms_norm", input, normalized_shape, weight)
    wide = torch.promote_types(input.dtype, torch.float32)
    eps = torch.finfo(wide).eps if eps is None else eps
    if use_triton(input):
        return norm_fwd(input, weight, None, len(shape), eps, True)[0]
    if cpu.worth_fusing(input):
        return _cpu_norm.add_norm(input, None, weight, None, len(shape), eps, True)[0]
    return F.rms_norm(input.to(wide), shape, None if weight is None else weight.to(wide), eps).to(
        input.dtype
    )


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``layer_norm(input + residual, ...)`` and the sum, in one pass.

    Args:
        input: (..., *normalized_shape), as in ``layer_norm``: what a block adds to the stream.
        residual: the residual stream, of the input's shape; it may be wider (float32 beside a
            bfloat16 input).
        normalized_shape: see ``layer_norm``, as the rest.
        weight: see ``layer_norm``.
        bias: see ``layer_norm``.
        eps: added to the variance.

    Returns:
        The normalised sum in the input's dtype, and ``input + residual``, rounded once to the
        residual's dtype: the residual of the next block. Both contiguous.

    Raises:
        ValueError: a shape does not match the input, or a dtype is not supported.
    """
    name = "add_layer_norm"
    shape = _checked_shape(name, input, normalized_shape, weight, bias, residual=residual)
    if use_triton(input):
        return add_norm_fwd(input, residual, weight, bias, len(shape), eps, False)[:2]
    if _fuse_layer_norm(input):
        return _cpu_norm.add_norm(input, residual, weight, bias, len(shape), eps, False)
    total = (input + residual).to(residual.dtype)
    return layer_norm(total, shape, weight, bias, eps).to(input.dtype), total


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``rms_norm(input + residual, ...)`` and the sum, in one pass.

    Args:
        input: see ``add_layer_norm``.
        residual: see ``add_layer_norm``.
        normalized_shape: see ``rms_norm``, as the rest.
        weight: see ``rms_norm``.
        eps: added to the mean square; the float32 machine epsilon if None.

    Returns:
        See ``add_layer_norm``, also for what it raises.
    """
    shape = _checked_shape("add_rms_norm", input, normalized_shape, weight, residual=residual)
    eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps if eps is None else eps
    if use_triton(input):
        return add_norm_fwd(input, residual, weight, None, len(shape), eps, True)[:2]
    if cpu.worth_fusing(input):
        return _cpu_norm.add_norm(input, residual, weight, None, len(shape), eps, True)
    total = (input + residual).to(residual.dtype)
    return rms_norm(total, shape, weight, eps).to(input.dtype), total

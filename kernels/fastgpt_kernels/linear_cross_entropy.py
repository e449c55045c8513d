"""Cross-entropy of a linear layer's logits without ever holding them all.

``loss(input @ weight^T + bias, target)`` is computed a chunk of rows at a time: one GEMM makes the
logits of the chunk, one kernel turns them in place into losses and into d = d loss / d logits, and
two GEMMs make ``dinput = d @ weight`` and ``dweight += d^T @ input`` (accumulated in float32). Peak
memory beyond inputs and gradients is one chunk, whatever the number of rows (the idea of
Liger-Kernel, arXiv:2410.10989). The result is exact: no entry of d is filtered.

For the reductions "mean" and "sum" the gradients of the *summed* loss are made in the forward, only
if one is needed, and the backward scales them by its ``grad_output`` (over the count of rows). They
are kept unscaled until then so that float16 does not underflow: 1 / count and the loss scale meet
first. For "none" the forward makes losses alone and the backward recomputes each chunk, since every
row has its own ``grad_output``. A call without gradients does no gradient work.

Shapes: input (N, D), weight (V, D), bias (V,), target (N,).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import cpu
from fastgpt_kernels._common import (
    AOT_DTYPES,
    AotCase,
    aot_case,
    cast_under_autocast,
    cdiv,
    device_guard,
    launch_config,
    next_power_of_2,
    use_triton,
)
from fastgpt_kernels._linear import (
    accumulate,
    check_linear,
    chunk_rows,
    logits_buffer,
    logits_into,
)
from fastgpt_kernels._loss_kernels import loss_gradient_kernel, scale_kernel, whole_row_kernel
from fastgpt_kernels.cross_entropy import (
    as_indices,
    check_options,
    cross_entropy_bwd,
    cross_entropy_fwd,
    mean_of_kept,
    reduce_rows,
    soft_cap_arguments,
    soft_cap_mode,
    vector_width,
)

_SCALE = {"BLOCK": 2048, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
WHOLE_ROW = 16384
"""Logits that registers hold: rows no longer are read from memory once, others twice."""

# (ignore_index, label_smoothing, z_loss, softcap): how the loss is defined, as operators pass it.
_Options = tuple[int, float, float, float]


def _chunk_loss_and_dlogits(
    logits: Tensor, target: Tensor, grad: Tensor, options: _Options
) -> tuple[Tensor, Tensor]:
    """Losses of a chunk and d(sum(grad * loss)) / d(logits), on a GPU in the logits' memory."""
    if not use_triton(logits):
        loss, *statistics = cross_entropy_fwd(logits, target, *options)
        return loss, cross_entropy_bwd(grad, logits, target, *statistics, *options)
    ignore_index, label_smoothing, z_loss, softcap = options
    n_rows, n_cols = logits.shape
    loss = logits.new_empty(n_rows, dtype=torch.float32)
    cap, inverse_cap = soft_cap_arguments(softcap)
    bucket = next_power_of_2(n_cols)
    whole = bucket <= WHOLE_ROW
    fn = whole_row_kernel if whole else loss_gradient_kernel
    name = "whole_row" if whole else "loss_gradient"
    config = launch_config(name, logits.device, logits.dtype, bucket)
    flags: dict[str, Any] = {
        "SOFTCAP": soft_cap_mode(softcap, logits.dtype),
        "SMOOTHING": label_smoothing != 0,
        "VEC": vector_width(logits),
    }  # fmt: skip
    with device_guard(logits):
        fn[(n_rows,)](
            logits, target, grad, loss, n_cols, logits.stride(0), target.stride(0), grad.stride(0),
            ignore_index, label_smoothing, z_loss, cap, inverse_cap, **flags, **config,
        )  # fmt: skip
    return loss, logits


def _cpu_fused(input: Tensor, bias: Tensor | None, options: _Options) -> bool:
    """Whether the CPU path with one pass over the logits covers these options."""
    plain = bias is None and options[1] == 0.0
    return plain and not use_triton(input) and input.dtype in (torch.float32, torch.bfloat16)


def _losses(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: _Options
) -> Tensor:
    n_rows, n_cols = input.shape[0], weight.shape[0]
    weight = weight.to(input.dtype)
    loss = input.new_empty(n_rows, dtype=torch.float32)
    if n_rows == 0:
        return loss
    if _cpu_fused(input, bias, options):
        ignore_index, _, z_loss, softcap = options
        return cpu.linear_cross_entropy_losses(
            input, weight, target.long(),
            ignore_index=ignore_index, z_loss=z_loss, softcap=softcap or None,
        )  # fmt: skip
    step = chunk_rows(n_rows, n_cols)
    buffer = logits_buffer(input, weight, min(step, n_rows))
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        logits = logits_into(buffer, input[rows], weight, bias)
        loss[rows] = cross_entropy_fwd(logits, target[rows], *options)[0]
    return loss


def _gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: _Options,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, and the gradients of ``sum(grad * loss)``: dinput, and float32 dweight and dbias.

    Gradients of input, weight and bias that ``needs`` does not ask for are empty.
    """
    n_rows, n_cols = input.shape[0], weight.shape[0]
    weight = weight.to(input.dtype)
    if n_rows and needs[0] and needs[1] and _cpu_fused(input, bias, options):
        ignore_index, _, z_loss, softcap = options
        losses_and_gradients = cpu.linear_cross_entropy_gradients(
            grad, input, weight, target.long(),
            ignore_index=ignore_index, z_loss=z_loss, softcap=softcap or None,
        )  # fmt: skip
        return *losses_and_gradients, input.new_empty(0, dtype=torch.float32)
    loss = input.new_empty(n_rows, dtype=torch.float32)
    dinput = input.new_empty(input.shape if needs[0] else 0)
    dweight = input.new_zeros(weight.shape if needs[1] else 0, dtype=torch.float32)
    dbias = input.new_zeros(n_cols if needs[2] else 0, dtype=torch.float32)
    if n_rows == 0:
        return loss, dinput, dweight, dbias
    step = chunk_rows(n_rows, n_cols)
    buffer = logits_buffer(input, weight, min(step, n_rows))
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        logits = logits_into(buffer, input[rows], weight, bias)
        loss[rows], d = _chunk_loss_and_dlogits(logits, target[rows], grad[rows], options)
        if needs[0]:
            torch.mm(d, weight, out=dinput[rows])
        if needs[1]:
            accumulate(dweight, d.t(), input[rows])
        if needs[2]:
            dbias += d.sum(0, dtype=torch.float32)
    return loss, dinput, dweight, dbias


@torch.library.custom_op("fastgpt_kernels::linear_cross_entropy_fwd", mutates_args=())
def linear_cross_entropy_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """Loss of every row; the backward recomputes the logits."""
    options = ignore_index, label_smoothing, z_loss, softcap
    return _losses(input, weight, bias, target, options)


@linear_cross_entropy_fwd.register_fake
def _(input, weight, bias, target, ignore_index, label_smoothing, z_loss, softcap):
    return input.new_empty(input.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastgpt_kernels::linear_cross_entropy_bwd", mutates_args=())
def linear_cross_entropy_bwd(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(grad * loss)``, those not needed empty; dweight and dbias in float32."""
    options = ignore_index, label_smoothing, z_loss, softcap
    needs = needs_input, needs_weight, needs_bias
    return _gradients(grad, input, weight, bias, target, options, needs)[1:]


def _empty_gradients(input, weight, needs_input, needs_weight, needs_bias):
    dinput = input.new_empty(input.shape if needs_input else (0,))
    dweight = input.new_empty(weight.shape if needs_weight else (0,), dtype=torch.float32)
    dbias = input.new_empty(weight.shape[0] if needs_bias else 0, dtype=torch.float32)
    return dinput, dweight, dbias


@linear_cross_entropy_bwd.register_fake
def _(
    grad, input, weight, bias, target, ignore_index, label_smoothing, z_loss, softcap,
    needs_input, needs_weight, needs_bias,
):  # fmt: skip
    return _empty_gradients(input, weight, needs_input, needs_weight, needs_bias)


@torch.library.custom_op("fastgpt_kernels::linear_cross_entropy_sum", mutates_args=())
def linear_cross_entropy_sum(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the losses, and its gradients made on the way: dinput, dweight, dbias.

    The gradients have the dtypes of their parameters, except that float16 sums, which could
    overflow, stay in float32.
    """
    options = ignore_index, label_smoothing, z_loss, softcap
    needs = needs_input, needs_weight, needs_bias
    ones = input.new_ones((), dtype=torch.float32).expand(input.shape[0])
    loss, dinput, dweight, dbias = _gradients(ones, input, weight, bias, target, options, needs)
    return loss.sum(), dinput, dweight.to(_kept_dtype(weight)), dbias.to(_kept_dtype(weight))


def _kept_dtype(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


@linear_cross_entropy_sum.register_fake
def _(
    input, weight, bias, target, ignore_index, label_smoothing, z_loss, softcap,
    needs_input, needs_weight, needs_bias,
):  # fmt: skip
    gradients = _empty_gradients(input, weight, needs_input, needs_weight, needs_bias)
    kept = _kept_dtype(weight)
    loss = input.new_empty((), dtype=torch.float32)
    return loss, gradients[0], gradients[1].to(kept), gradients[2].to(kept)


def _save_rows(ctx, inputs, output):
    input, weight, bias, target, *ctx.options = inputs
    ctx.save_for_backward(input, weight, bias, target)


def _backward_rows(ctx, grad):
    input, weight, bias, target = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    dinput, dweight, dbias = linear_cross_entropy_bwd(
        grad, input, weight, bias, target, *ctx.options, *needs
    )
    return (
        dinput if needs[0] else None,
        dweight.to(weight.dtype) if needs[1] else None,
        dbias.to(bias.dtype) if needs[2] else None,
        *[None] * 5,
    )


@torch.library.custom_op("fastgpt_kernels::linear_cross_entropy_scaled", mutates_args=())
def linear_cross_entropy_scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * factor`` in ``dtype``, for a float32 scalar ``factor``.

    PyTorch would round a factor that lies on the GPU to the type of ``x`` first: 65,536, the loss
    scale that GradScaler begins with, is infinite in float16.
    """
    if not use_triton(x):
        return (x * factor).to(dtype)
    x, out = x.contiguous(), x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        flags: dict[str, Any] = {"UNIT": math.gcd(16, x.shape[-1]), **_SCALE}
        with device_guard(x):
            scale_kernel[(cdiv(x.numel(), _SCALE["BLOCK"]),)](x, factor, out, x.numel(), **flags)
    return out


@linear_cross_entropy_scaled.register_fake
def _(x, factor, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _save_sum(ctx, inputs, output):
    input, weight, bias = inputs[:3]
    ctx.set_materialize_grads(False)  # the gradients are outputs too: zeros would be as large
    ctx.dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(*output[1:])


def _backward_sum(ctx, grad, *_unused):
    if grad is None:
        return (None,) * 11
    scaled = [
        linear_cross_entropy_scaled(saved, grad, dtype) if needed else None
        for saved, dtype, needed in zip(
            ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True
        )
    ]
    return (*scaled, *[None] * 8)


linear_cross_entropy_fwd.register_autograd(_backward_rows, setup_context=_save_rows)
linear_cross_entropy_sum.register_autograd(_backward_sum, setup_context=_save_sum)


def aot_cases() -> list[AotCase]:
    """Instances for the static gate, but those of the losses, which ``cross_entropy`` lists."""
    return [
        aot_case(
            f"loss_scale/{name}", scale_kernel,
            {"x": f"*{name}", "factor": "*fp32", "out": f"*{name}", "n": "i32"}, {"UNIT": 16},
            _SCALE,
        )
        for name in AOT_DTYPES
    ]  # fmt: skip


def linear_cross_entropy(
    input_ND: Tensor,
    linear_weight_VD: Tensor,
    target_N: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of ``input @ linear_weight^T + linear_bias`` in memory independent of N x V.

    Follows ``torch.nn.functional.linear_cross_entropy``. Under autocast the operands are cast as
    ``torch.nn.functional.linear`` would.

    Args:
        input_ND: hidden states (N, D), float32, float16 or bfloat16.
        linear_weight_VD: weight of the output layer (V, D), same dtype, or float32: a master
            weight, which is cast to the input's dtype and gets a float32 gradient.
        target_N: class indices (N,), any integer dtype. On a GPU an index outside [0, V) other than
            ``ignore_index`` makes its row's loss NaN; on the CPU it raises.
        linear_bias: bias of the output layer (V,), in the dtype of the input.
        ignore_index: see ``cross_entropy``, as the rest.
        reduction: "mean", "sum" or "none".
        label_smoothing: weight of the uniform distribution in the target.
        z_loss: coefficient of the squared log-partition.
        softcap: logits are replaced by ``softcap * tanh(logits / softcap)``.

    Returns:
        float32 scalar, or (N,) for reduction "none".

    Raises:
        ValueError: wrong shapes or dtypes, or options out of range.
    """
    input, weight, bias = cast_under_autocast(input_ND, linear_weight_VD, linear_bias)
    name = "linear_cross_entropy"
    if input.dim() != 2:
        raise ValueError(
            f"{name}: input must be (N, D), got shape {tuple(input.shape)}; flatten it"
        )
    check_linear(name, input, weight, bias, target_N, ("input", "linear_weight", "linear_bias"))
    check_options(name, input.shape[0], target_N, reduction, label_smoothing, softcap)
    target_N = as_indices(target_N)
    options = ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0)
    needs = [
        torch.is_grad_enabled() and x is not None and x.requires_grad for x in (input, weight, bias)
    ]
    if reduction == "none" or not any(needs):
        loss_N = linear_cross_entropy_fwd(input, weight, bias, target_N, *options)
        return reduce_rows(loss_N, target_N, ignore_index, reduction)
    total = linear_cross_entropy_sum(input, weight, bias, target_N, *options, *needs)[0]
    return total if reduction == "sum" else mean_of_kept(total, target_N, ignore_index)

"""Cross-entropy of logits against class indices, forward and backward, with float32 loss.

Per row of logits x (capped to ``c tanh(x / c)`` if asked), target t, e = label_smoothing and
z = z_loss::

    lse  = log sum exp x
    loss = (1 - e) (lse - x_t) + e (lse - mean(x)) + z lse^2
    d loss / d x_v = (1 + 2 z lse) exp(x_v - lse) - e / V - [v = t] (1 - e)    (times 1 - tanh^2)

The forward reads the logits once (online softmax, arXiv:1805.02867) and keeps two floats a row; the
backward recomputes the probabilities from them and writes the gradient into new memory, or on
request over the logits. How the exponent stays exact and why an odd vocabulary keeps 128-bit
access: ``_loss_kernels``. The z-loss is PaLM's (arXiv:2204.02311, section 5), the cap Gemma 2's
(arXiv:2408.00118).

Shapes: input (N, V) of any strides; target (N,); everything per row is (N,) float32.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import cpu
from fastgpt_kernels._common import (
    AOT_DTYPES,
    AotCase,
    aot_variants,
    check_devices,
    check_dtype,
    device_guard,
    launch_config,
    next_power_of_2,
    use_triton,
)
from fastgpt_kernels._loss_kernels import (
    gradient_kernel,
    loss_gradient_kernel,
    loss_kernel,
    whole_row_kernel,
)

MIN_FUSED = 1 << 21
"""Logits from which on a CPU's fused passes are faster than PyTorch's unfused ones."""


def vector_width(x: Tensor) -> int:
    """Elements per 16-byte group, or 1 where the columns of ``x`` are not adjacent."""
    return 16 // x.element_size() if x.stride(-1) == 1 else 1


def soft_cap_arguments(softcap: float) -> tuple[float, float]:
    """The cap and its reciprocal as kernel arguments; a cap of 0 means none."""
    return (softcap, 1.0 / softcap) if softcap else (1.0, 1.0)


def soft_cap_mode(softcap: float, dtype: torch.dtype) -> int:
    """``SOFTCAP`` of the kernels: 0 without a cap, else 1 (FAST) or 2 (ACCURATE) by the logits."""
    return 0 if softcap == 0 else 2 if dtype == torch.float32 else 1


def _launch_fwd(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, n_cols = input.shape
    loss, top, total = (input.new_empty(n_rows, dtype=torch.float32) for _ in range(3))
    if n_rows == 0:
        return loss, top, total
    config = launch_config("loss", input.device, input.dtype, next_power_of_2(n_cols))
    flags: dict[str, Any] = {
        "SOFTCAP": soft_cap_mode(softcap, input.dtype),
        "SMOOTHING": label_smoothing != 0,
        "VEC": vector_width(input),
    }  # fmt: skip
    stride_row, stride_col = input.stride()
    cap, inverse_cap = soft_cap_arguments(softcap)
    with device_guard(input):
        loss_kernel[(n_rows,)](
            input, target, loss, top, total, n_cols, stride_row, stride_col, target.stride(0),
            ignore_index, label_smoothing, z_loss, cap, inverse_cap, **flags, **config,
        )  # fmt: skip
    return loss, top, total


def _gradient_like(input: Tensor) -> Tensor:
    """Memory for the gradient whose rows are aligned like the input's: with its row stride, or a
    shorter one where the input is a part of much longer rows.
    """
    (_, n_cols), (row, col) = input.shape, input.stride()
    if col != 1 or row < n_cols:
        return input.new_empty(input.shape)
    if row >= 2 * n_cols:
        row = n_cols + (row - n_cols) % vector_width(input)
    return input.new_empty_strided(input.shape, (row, 1))


def _launch_bwd(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    top: Tensor,
    total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    out: Tensor,
) -> Tensor:
    n_rows, n_cols = input.shape
    if n_rows == 0:
        return out
    vec = vector_width(input)
    if (out.stride(0) - input.stride(0)) % vec:
        vec = 1
    config = launch_config("loss_gradient", input.device, input.dtype, next_power_of_2(n_cols))
    flags: dict[str, Any] = {"SOFTCAP": soft_cap_mode(softcap, input.dtype), "VEC": vec}
    stride_row, stride_col = input.stride()
    cap, inverse_cap = soft_cap_arguments(softcap)
    with device_guard(input):
        gradient_kernel[(n_rows,)](
            input, target, top, total, grad, out, n_cols, stride_row, stride_col,
            target.stride(0), grad.stride(0), out.stride(0), ignore_index, label_smoothing, z_loss,
            cap, inverse_cap, **flags, **config,
        )  # fmt: skip
    return out


def _capped(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


@cpu.fused
def _row_sums(input: Tensor, softcap: float, smoothing: bool) -> tuple[Tensor, Tensor, Any]:
    x = _capped(input.float(), softcap)
    top = x.amax(-1)
    return top, cpu.exp_below(x - top[:, None]).sum(-1), x.mean(-1) if smoothing else 0.0


@cpu.fused
def _write_gradient(
    out: Tensor, input: Tensor, top: Tensor, scale: Tensor, floor: Tensor | None, softcap: float
) -> None:
    d = cpu.exp_below(_capped(input.float(), softcap) - top[:, None]) * scale[:, None]
    if floor is not None:
        d = d - floor[:, None]
    if softcap:
        d = d * (1.0 - torch.tanh(input.float() / softcap).square())
    out.copy_(d)


def _picked(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count, the class of each row (0 in others) and its logit, in float32."""
    kept = target != ignore_index
    ids = torch.where(kept, target, 0).long()
    return kept, ids, input.gather(1, ids[:, None])[:, 0].float()


def _cpu_fwd(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    top, total, mean = _row_sums(input, softcap, label_smoothing != 0)
    kept, _, picked = _picked(input, target, ignore_index)
    log_total = total.log()
    loss = log_total + (top - _capped(picked, softcap))
    if label_smoothing:
        loss = torch.lerp(loss, log_total + (top - mean), label_smoothing)
    if z_loss:
        loss = loss + z_loss * (top + log_total).square()
    return torch.where(kept, loss, 0.0), top, total


def _cpu_bwd(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    top: Tensor,
    total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    out: Tensor,
) -> Tensor:
    kept, ids, picked = _picked(input, target, ignore_index)
    log_total = total.log()
    growth = 1.0 + 2.0 * z_loss * (top + log_total)
    floor = label_smoothing / input.shape[1]
    # p - 1 by expm1, which keeps its digits where p is nearly 1
    p_less_1 = torch.expm1(_capped(picked, softcap) - top - log_total)
    at_target = grad * (growth * p_less_1 + (growth - 1.0) + (label_smoothing - floor))
    if softcap:
        at_target = at_target * (1.0 - torch.tanh(picked / softcap).square())
    scale = torch.where(kept, grad * growth / total, 0.0)
    floors = torch.where(kept, grad * floor, 0.0) if label_smoothing else None
    _write_gradient(out, input, top, scale, floors, softcap)
    out[torch.arange(len(ids)), ids] = torch.where(kept, at_target, 0.0).to(out.dtype)
    return out


@torch.library.custom_op("fastgpt_kernels::cross_entropy_fwd", mutates_args=())
def cross_entropy_fwd(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every row and the two floats its backward needs (their scale is the device's own)."""
    run = _launch_fwd if use_triton(input) else _cpu_fwd
    return run(input, target, ignore_index, label_smoothing, z_loss, softcap)


@cross_entropy_fwd.register_fake
def _(input, target, ignore_index, label_smoothing, z_loss, softcap, inplace_backward=False):
    rows = input.new_empty(input.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(rows), torch.empty_like(rows)


@torch.library.custom_op("fastgpt_kernels::cross_entropy_bwd", mutates_args=())
def cross_entropy_bwd(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    top: Tensor,
    total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """Gradient of ``sum(grad * loss)`` with respect to the logits, in their dtype."""
    run = _launch_bwd if use_triton(input) else _cpu_bwd
    options = ignore_index, label_smoothing, z_loss, softcap
    return run(grad, input, target, top, total, *options, _gradient_like(input))


@cross_entropy_bwd.register_fake
def _(grad, input, target, top, total, ignore_index, label_smoothing, z_loss, softcap):
    return _gradient_like(input)


@torch.library.custom_op("fastgpt_kernels::cross_entropy_bwd_inplace", mutates_args=("input",))
def cross_entropy_bwd_inplace(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    top: Tensor,
    total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """``cross_entropy_bwd`` in the memory of the logits, whose columns are adjacent."""
    run = _launch_bwd if use_triton(input) else _cpu_bwd
    options = ignore_index, label_smoothing, z_loss, softcap
    run(grad, input, target, top, total, *options, input)


@cross_entropy_bwd_inplace.register_fake
def _(grad, input, target, top, total, ignore_index, label_smoothing, z_loss, softcap):
    return None


def _save(ctx, inputs, output):
    input, target, *ctx.options, ctx.inplace = inputs
    ctx.save_for_backward(input, target, output[1], output[2])


def _backward(ctx, grad, _grad_top, _grad_total):
    saved, *rest = ctx.saved_tensors  # read once: checkpointing unpacks them once
    input = saved.detach()
    arguments = grad, input, *rest, *ctx.options
    if ctx.inplace and input.stride(1) == 1 and input.stride(0) >= input.shape[1]:
        # Counts as a change of the logits, so whoever still needs their values gets PyTorch's error
        cross_entropy_bwd_inplace(*arguments)
        return input, *[None] * 6
    return cross_entropy_bwd(*arguments), *[None] * 6


cross_entropy_fwd.register_autograd(_backward, setup_context=_save)

_AOT_TYPES = {
    **dict.fromkeys(("loss", "row_top", "row_total", "grad"), "*fp32"),
    **dict.fromkeys(("n_cols", "stride_row", "stride_out", "ignore_index"), "i32"),
    **dict.fromkeys(("label_smoothing", "z_loss", "softcap", "inv_softcap"), "fp32"),
    "target": "*i64",
}


def aot_cases() -> list[AotCase]:
    """Instances for the static gate: odd and aligned vocabularies, plain and with options."""
    cases = []
    kernels = (
        ("loss", loss_kernel),
        ("loss_gradient", gradient_kernel),
        ("loss_gradient", loss_gradient_kernel),
    )
    sizes = itertools.product((256, 50257, 50304, 128256), AOT_DTYPES.items(), (False, True))
    for (n_cols, (name, dtype), options), (kernel, fn) in itertools.product(sizes, kernels):
        constants = {
            "SOFTCAP": soft_cap_mode(float(options), dtype),
            "SMOOTHING": options,
            "VEC": 16 // dtype.itemsize,
            **dict.fromkeys(("stride_col", "stride_target", "stride_grad"), 1),
        }
        label = f"{fn.__name__.removesuffix('_kernel')}/{n_cols}_{name}{'_options' * options}"
        cases += aot_variants(
            label, kernel, fn, dtype, next_power_of_2(n_cols),
            {**_AOT_TYPES, "logits": f"*{name}", "out": f"*{name}"}, constants,
            ("n_cols", "stride_row", "stride_out") if n_cols % 16 == 0 else (),
        )  # fmt: skip
    for n_cols, (name, dtype), options in itertools.product(
        (8192, 1000, 16384), AOT_DTYPES.items(), (False, True)
    ):
        constants = {
            "SOFTCAP": soft_cap_mode(float(options), dtype),
            "SMOOTHING": options,
            "VEC": 16 // dtype.itemsize,
            **dict.fromkeys(("stride_target", "stride_grad"), 1),
        }
        cases += aot_variants(
            f"whole_row/{n_cols}_{name}{'_options' * options}", "whole_row", whole_row_kernel,
            dtype, next_power_of_2(n_cols), {**_AOT_TYPES, "logits": f"*{name}"}, constants,
            ("n_cols", "stride_row") if n_cols % 16 == 0 else ("stride_row",),
        )  # fmt: skip
    return cases


def check_options(
    name: str,
    rows: int,
    target: Tensor,
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
) -> None:
    """Raise ValueError for what both loss functions refuse."""
    if target.shape != (rows,) or target.is_floating_point():
        raise ValueError(
            f"{name}: target must hold one class index for each of {rows} rows, got shape "
            f"{tuple(target.shape)} and {target.dtype}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must lie in [0, 1], got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap must be positive (or None), got {softcap}")


def as_indices(target: Tensor) -> Tensor:
    """``target`` in at least 32 bits: compared in 8, an ``ignore_index`` becomes another class."""
    return target if target.dtype in (torch.int32, torch.int64) else target.long()


def mean_of_kept(total: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """``total`` over the number of rows that are not ignored; NaN if there is none.

    The gradient is 0 then, as PyTorch's is: that of the plain quotient, 1 / 0, meets gradients of 0
    and would turn every parameter into NaN.
    """
    count = (target != ignore_index).sum()
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan)


def reduce_rows(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Apply ``reduction``; see ``mean_of_kept`` for the mean."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return mean_of_kept(loss.sum(), target, ignore_index)


def _plain(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """Losses per row in ordinary operations, which Inductor fuses with their surroundings."""
    x = _capped(input.to(torch.promote_types(input.dtype, torch.float32)), softcap)
    loss = F.cross_entropy(
        x,
        target.long(),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if z_loss:
        lse_squared = torch.logsumexp(x, dim=-1).square()
        loss = loss + z_loss * torch.where(target != ignore_index, lse_squared, 0.0)
    return loss


def cross_entropy(
    input_NV: Tensor,
    target_N: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` on class indices, in float32, plus z-loss and soft cap.

    Args:
        input_NV: logits (N, V), any strides, float32, float16 or bfloat16; not written to unless
            ``inplace_backward`` says so.
        target_N: class indices (N,), any integer dtype. On a GPU an index outside [0, V) other than
            ``ignore_index`` makes its row's loss NaN; on the CPU it raises.
        ignore_index: rows with this target have loss 0, gradient exactly 0, no share in the mean.
        reduction: "mean" (over rows that are not ignored; NaN if there is none, as in PyTorch),
            "sum" or "none".
        label_smoothing: weight of the uniform distribution in the target.
        z_loss: coefficient of the squared log-partition.
        softcap: logits are replaced by ``softcap * tanh(logits / softcap)``.
        inplace_backward: let the backward write the gradient over the logits, which saves memory of
            their size. Whatever else saved them for its backward, and a second backward, raises
            RuntimeError. Logits with gaps between columns or shared rows are left alone.

    Returns:
        float32 scalar, or (N,) for reduction "none" (float64 for float64 logits on the CPU).

    Raises:
        ValueError: wrong shapes or dtypes, or options out of range.
    """
    if input_NV.dim() != 2:
        raise ValueError(
            f"cross_entropy: input must be (N, V), got shape {tuple(input_NV.shape)}; "
            "flatten the leading dims"
        )
    check_dtype("cross_entropy", input_NV)
    check_devices("cross_entropy", input_NV, target_N)
    check_options("cross_entropy", input_NV.shape[0], target_N, reduction, label_smoothing, softcap)
    target_N = as_indices(target_N)
    options = ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0)
    if use_triton(input_NV) or inplace_backward or cpu.worth_fusing(input_NV, MIN_FUSED):
        loss_N = cross_entropy_fwd(input_NV, target_N, *options, inplace_backward)[0]
    else:
        loss_N = _plain(input_NV, target_N, *options)
    return reduce_rows(loss_N, target_N, ignore_index, reduction)

"""What the losses behind a linear layer share: chunks of its logits, and the products around them.

A chunk is as many rows as fill the GEMMs of any current GPU; its logits live in one buffer that
every chunk reuses, so memory does not grow with the number of rows. The buffer's rows are padded to
128 bytes: GEMM and kernel see aligned rows for any vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels._common import cdiv, check_devices, check_dtype, use_triton

CHUNK_ELEMENTS = 1 << 26
"""Logits held at once: 128 MiB in bfloat16, enough rows to fill the GEMMs of any current GPU."""


def chunk_rows(n_rows: int, n_cols: int) -> int:
    """Rows per chunk: as many as ``CHUNK_ELEMENTS`` allow, evenly spread, a multiple of 128."""
    limit = max(128, CHUNK_ELEMENTS // n_cols // 128 * 128)
    return cdiv(cdiv(n_rows, cdiv(n_rows, limit)), 128) * 128


def logits_buffer(input: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Memory for the logits (rows, V) of a chunk, in the dtype of ``input``."""
    if not use_triton(input):
        return input.new_empty(rows, weight.shape[0])
    group = 128 // input.element_size()
    n_cols = weight.shape[0]
    buffer = input.new_empty(rows, cdiv(n_cols, group) * group)
    buffer[:, n_cols:] = 0  # a GEMM may multiply what lies past an odd row end by 0 (oneDNN does)
    return buffer[:, :n_cols]


def logits_into(buffer: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input @ weight^T + bias`` in the first rows of ``buffer``."""
    logits = buffer[: input.shape[0]]
    if bias is None:
        return torch.mm(input, weight.t(), out=logits)
    return torch.addmm(bias, input, weight.t(), out=logits)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` with ``total`` in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda and torch.version.hip is None:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:  # one rounding per chunk to the inputs' dtype
        total += a @ b


def check_linear(
    name: str, input: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor,
    names: tuple[str, str, str],
) -> None:  # fmt: skip
    """Raise ValueError unless input (..., D), weight (V, D) and bias (V,) fit, and ids are with
    them; ``names`` says how the function calls them.
    """
    if weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: {names[0]} must be (..., D) and {names[1]} (V, D), got shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{name}: {names[1]} has no row, so no class to predict")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: {names[2]} must be ({weight.shape[0]},), got shape {tuple(bias.shape)}"
        )
    check_dtype(name, input)
    check_devices(name, input, weight, bias, ids)
    same = weight.dtype in (input.dtype, torch.float32)
    if not same or (bias is not None and bias.dtype != input.dtype):
        raise ValueError(
            f"{name}: {names[1]} must have the dtype of {names[0]} or be float32, {names[2]} that "
            f"of {names[0]}; got "
            f"{input.dtype}, {weight.dtype}{'' if bias is None else f', {bias.dtype}'}"
        )

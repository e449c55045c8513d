"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), forward and backward by one kernel.

Pair i of a head's first R = ``rotary_dim`` elements is turned by the angle of its position::

    (a, b) -> (a cos_i - b sin_i, b cos_i + a sin_i)

The pair is (x[i], x[i + R/2]), the half-split convention of GPT-NeoX, LLaMA in ``transformers`` and
flash-attn's default, or (x[2i], x[2i + 1]), that of the paper, with ``interleaved``. Elements from
R on are copied. The backward turns by the negative angle. Computed in float32, rounded once.

q and k are rotated by a call each: their heads, strides and caches differ, the kernel is bound by
memory traffic that a joint one would not reduce, and where both lie in one projection one call on
the view of their heads does both.

Shapes: x (..., D) of up to four dims in any order (BTHD, BHTD, packed NHD); cos and sin (..., R/2)
broadcast against its leading dims, or are tables (L, R/2) that ``positions`` index.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import _cpu_pointwise
from fastgpt_kernels._common import (
    AOT_DTYPES,
    AotCase,
    aot_variants,
    cdiv,
    check_devices,
    check_dtype,
    device_guard,
    launch_config,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)
from fastgpt_kernels._units import common_unit, multiple

MAX_HALF = 256
"""Most pairs of one head."""


@triton.jit(do_not_specialize=["n_rows", "size_1", "size_2", "pos_0", "pos_1", "pos_2"])
def rotary_kernel(
    x, cos, sin, positions, y, n_rows, size_1, size_2, x_0, x_1, x_2, x_col, y_0, y_1, y_2, y_col,
    cs_0, cs_1, cs_2, pos_0, pos_1, pos_2,
    HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    HALF: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_REST: tl.constexpr, UNIT: tl.constexpr, ANGLE_UNIT: tl.constexpr,
):  # fmt: skip
    """Rows are the three leading dims, flattened; ``*_0``, ``*_1``, ``*_2`` are their strides.

    ``UNIT`` divides those of x and y, ``ANGLE_UNIT`` those of the cosines and sines.
    """
    x_0, x_1, x_2 = multiple(x_0, UNIT), multiple(x_1, UNIT), multiple(x_2, UNIT)
    y_0, y_1, y_2 = multiple(y_0, UNIT), multiple(y_1, UNIT), multiple(y_2, UNIT)
    cs_0, cs_1 = multiple(cs_0, ANGLE_UNIT), multiple(cs_1, ANGLE_UNIT)
    cs_2 = multiple(cs_2, ANGLE_UNIT)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < n_rows
    i_2 = (rows % size_2).to(tl.int64)
    i_1 = (rows // size_2 % size_1).to(tl.int64)
    i_0 = (rows // size_2 // size_1).to(tl.int64)
    x_rows = (x + i_0 * x_0 + i_1 * x_1 + i_2 * x_2)[:, None]
    y_rows = (y + i_0 * y_0 + i_1 * y_1 + i_2 * y_2)[:, None]
    if HAS_POSITIONS:
        at = positions + i_0 * pos_0 + i_1 * pos_1 + i_2 * pos_2
        angle_rows = tl.load(at, mask=row_mask, other=0).to(tl.int64) * cs_0
    else:
        angle_rows = i_0 * cs_0 + i_1 * cs_1 + i_2 * cs_2
    pairs = tl.arange(0, BLOCK_H)
    mask = row_mask[:, None] & (pairs < HALF)[None, :]
    angles = angle_rows[:, None] + pairs[None, :]
    c = tl.load(cos + angles, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + angles, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_H).to(tl.int64)[None, :]
        wide = row_mask[:, None] & (cols < 2 * HALF)
        both = tl.load(x_rows + cols * x_col, mask=wide, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [BLOCK_M, BLOCK_H, 2]))
        pair = tl.join(a * c - b * s, b * c + a * s)
        out = tl.reshape(pair, [BLOCK_M, 2 * BLOCK_H])
        tl.store(y_rows + cols * y_col, out.to(y.dtype.element_ty), mask=wide)
    else:
        left = pairs.to(tl.int64)[None, :]
        right = left + HALF
        a = tl.load(x_rows + left * x_col, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_rows + right * x_col, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_rows + left * y_col, (a * c - b * s).to(y.dtype.element_ty), mask=mask)
        tl.store(y_rows + right * y_col, (b * c + a * s).to(y.dtype.element_ty), mask=mask)
    if 2 * HALF < DIM:
        cols = 2 * HALF + tl.arange(0, BLOCK_REST).to(tl.int64)[None, :]
        rest = row_mask[:, None] & (cols < DIM)
        kept = tl.load(x_rows + cols * x_col, mask=rest, other=0.0)
        tl.store(y_rows + cols * y_col, kept, mask=rest)


def _three(lead: list[int], tensor: Tensor, inner: int) -> list[int]:
    """Strides of the leading dims ``lead`` of ``tensor`` (``inner`` dims follow), padded to 3; 0
    for a dim of one element, where PyTorch allows any.
    """
    shape = (*lead, *tensor.shape[tensor.dim() - inner :])
    strides = zip(lead, tensor.expand(shape).stride(), strict=False)
    return [0] * (3 - len(lead)) + [0 if size == 1 else stride for size, stride in strides]


def _launch(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    lead, dim, half = list(x.shape[:-1]), x.shape[-1], cos.shape[-1]
    sizes = [1] * (3 - len(lead)) + lead
    if positions is None:
        angle_strides, position_strides = _three(lead, cos, 1), [0, 0, 0]
    else:
        angle_strides, position_strides = [cos.stride(0), 0, 0], _three(lead, positions, 0)
    config = launch_config("rotary", x.device, x.dtype, next_power_of_2(half))
    flags: dict[str, Any] = {
        **{"HAS_POSITIONS": positions is not None, "INTERLEAVED": interleaved, "INVERSE": inverse},
        **{"HALF": half, "DIM": dim, "BLOCK_REST": next_power_of_2(max(dim - 2 * half, 1))},
    }
    n_rows = math.prod(lead)
    x_strides, y_strides = _three(lead, x, 1), _three(lead, y, 1)
    flags["UNIT"] = common_unit(*x_strides, *y_strides)
    flags["ANGLE_UNIT"] = common_unit(*angle_strides)
    strides: list[Any] = [*x_strides, x.stride(-1), *y_strides, y.stride(-1)]
    strides += [*angle_strides, *position_strides]
    with device_guard(x):
        rotary_kernel[(cdiv(n_rows, config["BLOCK_M"]),)](
            x, cos, sin, cos if positions is None else positions, y, n_rows, sizes[1], sizes[2],
            *strides, **flags, **config,
        )  # fmt: skip
    return y


def _cpu(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    out = _cpu_pointwise.rotate(x, cos, -sin if inverse else sin, interleaved)
    return torch.empty_like(x).copy_(out)


@torch.library.custom_op("fastgpt_kernels::rotary", mutates_args=())
def rotary_op(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    """``x`` rotated, backwards if ``inverse``; laid out like ``torch.empty_like(x)``."""
    return (_launch if use_triton(x) else _cpu)(x, cos, sin, positions, interleaved, inverse)


@rotary_op.register_fake
def _(x, cos, sin, positions, interleaved, inverse):
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    _, *tensors, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    dx = rotary_op(grad, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return dx, None, None, None, None, None


rotary_op.register_autograd(_backward, setup_context=_save)


def aot_cases() -> list[AotCase]:
    """Instances for the static gate: whole heads and half of one, both conventions."""
    cases = []
    integers = ("n_rows", "size_1", "size_2")
    strides = [f"{name}_{i}" for name in ("x", "y", "cs", "pos") for i in range(3)]
    types = {**dict.fromkeys((*integers, *strides), "i32"), "cos": "*fp32", "sin": "*fp32"}
    kinds = ((False, False), (False, True), (True, False))
    for (half, dim), (interleaved, positions), (name, dtype) in itertools.product(
        ((64, 128), (32, 64), (16, 64), (20, 40)), kinds, AOT_DTYPES.items()
    ):
        constants = {
            **{"HAS_POSITIONS": positions, "INTERLEAVED": interleaved, "INVERSE": False},
            **{"HALF": half, "DIM": dim, "BLOCK_REST": next_power_of_2(max(dim - 2 * half, 1))},
            **{"x_col": 1, "y_col": 1, "UNIT": common_unit(dim), "ANGLE_UNIT": common_unit(half)},
        }
        label = f"{half * 2}of{dim}{'_interleaved' * interleaved}{'_positions' * positions}"
        cases += aot_variants(
            f"rotary/{label}_{name}", "rotary", rotary_kernel, dtype, half,
            {**types, "x": f"*{name}", "y": f"*{name}", "positions": "*i64"}, constants,
            tuple(name for name in strides if not name.startswith("pos") and dim % 16 == 0),
        )  # fmt: skip
    return cases


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    check_dtype("rotary", x)
    check_devices("rotary", x, cos, sin, positions)
    if not 2 <= x.dim() <= 4:
        raise ValueError(f"rotary: x must have two to four dims, got shape {tuple(x.shape)}")
    half = cos.shape[-1] if cos.dim() else 0
    if cos.shape != sin.shape or not 0 < half <= min(x.shape[-1] // 2, MAX_HALF):
        raise ValueError(
            f"rotary: cos and sin must have one shape whose last dim is at most half the head dim "
            f"{x.shape[-1]} and at most {MAX_HALF}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    name, lead = ("cos and sin", cos.shape[:-1]) if positions is None else ("positions", ())
    if positions is not None:
        lead = positions.shape
        if cos.dim() != 2:
            raise ValueError(
                f"rotary: with positions cos and sin must be tables (L, rotary_dim / 2), got "
                f"{tuple(cos.shape)}"
            )
    dims = tuple(x.shape[:-1])
    fits = len(lead) <= len(dims) and all(
        a == 1 or a == b for a, b in zip(reversed(lead), reversed(dims), strict=False)
    )
    if not fits:
        raise ValueError(
            f"rotary: the leading dims of {name} {tuple(lead)} must broadcast to those of x {dims}"
        )


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Rotate the first ``rotary_dim`` elements of every head by the angles of its position.

    Args:
        x: (..., D), two to four dims in any order and with any strides, float32, float16 or
            bfloat16 (on the CPU also float64).
        cos: cosines (..., rotary_dim / 2) that broadcast to x (..., rotary_dim / 2): (T, R/2) for
            BHTD, (T, 1, R/2) for BTHD, (B, 1, T, R/2) where rows stand at different positions.
            With ``positions`` a table (L, R/2). At most D / 2 and 256 wide; no gradient.
        sin: sines, like ``cos``.
        positions: int32 or int64, broadcasting to x.shape[:-1], rows of the table to take:
            ``offsets[:, None, None] + arange(T)`` continues rows of BHTD at their offsets. Entries
            beyond the table are the caller's mistake; a GPU does not check them.
        interleaved: pairs are neighbours (2i, 2i + 1) instead of (i, i + rotary_dim / 2).

    Returns:
        Tensor like x; on a GPU laid out like ``torch.empty_like(x)``, on a CPU contiguous.

    Raises:
        ValueError: dims or shapes do not fit together, or the dtype is not one of these.
    """
    _check(x, cos, sin, positions)
    if use_triton(x):
        return rotary_op(x, cos, sin, positions, interleaved, False)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    return _cpu_pointwise.rotary(x, cos, sin, interleaved)

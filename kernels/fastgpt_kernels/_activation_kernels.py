"""Triton kernels of ``activations``; the formulas are in its docstring.

Inputs come as ``RowLayout``s of equal rows and columns; ``out_stride`` separates the rows of the
outputs, whose columns are adjacent.
"""
# pyright: reportGeneralTypeIssues=false
# (a device function seen from Python never returns; inside a kernel it gives a tuple)

from __future__ import annotations

from fastgpt_kernels._common import tl, triton
from fastgpt_kernels._norm_kernels import load_tile, row_offsets
from fastgpt_kernels._units import multiple

TANH_LINEAR = 1.5957691216057308  # 2 sqrt(2 / pi)
TANH_CUBIC = TANH_LINEAR * 0.044715

_LINEAR = tl.constexpr(TANH_LINEAR)
_CUBIC = tl.constexpr(TANH_CUBIC)
_INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _place(n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program; one axis for both, as the others end at 65,535."""
    pid = tl.program_id(0)
    across = tl.cdiv(n_cols, BLOCK_N)
    rows = pid // across * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, (pid % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _value(x, KIND: tl.constexpr):
    if KIND == "relu_squared":
        x = tl.maximum(x, 0.0)
        return x * x
    elif KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu_tanh":
        return x * tl.sigmoid(x * (_LINEAR + _CUBIC * x * x))
    else:
        return x * (0.5 + 0.5 * tl.erf(x * _INVERSE_SQRT_2))


@triton.jit
def _value_and_slope(x, KIND: tl.constexpr):
    if KIND == "relu_squared":
        x = tl.maximum(x, 0.0)
        return x * x, 2.0 * x
    elif KIND == "silu":
        s = tl.sigmoid(x)
        y = x * s
        return y, s + y * (1.0 - s)
    elif KIND == "gelu_tanh":
        square = x * x
        s = tl.sigmoid(x * (_LINEAR + _CUBIC * square))
        y = x * s
        return y, s + y * (1.0 - s) * (_LINEAR + 3.0 * _CUBIC * square)
    else:
        probability = 0.5 + 0.5 * tl.erf(x * _INVERSE_SQRT_2)
        return x * probability, probability + x * _INVERSE_SQRT_2_PI * tl.exp(-0.5 * x * x)


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["x_inner", "up_inner"])
def fwd_kernel(
    x, up, y, n_rows, n_cols, out_stride, x_inner, x_outer, x_step, x_col,
    up_inner, up_outer, up_step, up_col,
    KIND: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    n_cols = multiple(n_cols, UNIT)
    rows, cols = _place(n_cols, BLOCK_M, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    out = _value(
        load_tile(x + row_offsets(rows, x_inner, x_outer, x_step, UNIT), cols, x_col, mask), KIND
    )
    if GATED:
        out *= load_tile(
            up + row_offsets(rows, up_inner, up_outer, up_step, UNIT), cols, up_col, mask
        )
    y_rows = y + rows.to(tl.int64) * multiple(out_stride, UNIT)
    tl.store(y_rows[:, None] + cols[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["x_inner", "up_inner", "dy_inner"],
)
def bwd_kernel(
    dy, x, up, dx, dup, n_rows, n_cols, out_stride, dy_inner, dy_outer, dy_step, dy_col,
    x_inner, x_outer, x_step, x_col, up_inner, up_outer, up_step, up_col,
    KIND: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    n_cols = multiple(n_cols, UNIT)
    rows, cols = _place(n_cols, BLOCK_M, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    x_tile = load_tile(x + row_offsets(rows, x_inner, x_outer, x_step, UNIT), cols, x_col, mask)
    value, slope = _value_and_slope(x_tile, KIND)
    grad = load_tile(dy + row_offsets(rows, dy_inner, dy_outer, dy_step, UNIT), cols, dy_col, mask)
    at = (rows.to(tl.int64) * multiple(out_stride, UNIT))[:, None] + cols[None, :]
    if GATED:
        tl.store(dup + at, (grad * value).to(dup.dtype.element_ty), mask=mask)
        grad *= load_tile(
            up + row_offsets(rows, up_inner, up_outer, up_step, UNIT), cols, up_col, mask
        )
    tl.store(dx + at, (grad * slope).to(dx.dtype.element_ty), mask=mask)

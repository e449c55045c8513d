"""Triton kernels of ``normalization``; the formulas are in its docstring.

Rows come as a ``RowLayout`` (``x_inner``, ``x_outer``, ``x_step``, ``x_col``); outputs are
contiguous.
"""

from __future__ import annotations

from fastgpt_kernels._common import tl, triton


@triton.jit
def _row_offsets(rows, inner, stride_outer, stride_inner):
    """Element offset of each row of a ``RowLayout``, in 64 bits."""
    return (rows // inner).to(tl.int64) * stride_outer + (rows % inner).to(tl.int64) * stride_inner


@triton.jit
def _merged_statistics(
    x_rows, row_mask, n_cols, x_col, RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Mean and variance of rows read block by block (Chan, Golub and LeVeque 1979)."""
    mean = tl.zeros([BLOCK_M], tl.float32)
    m2 = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < n_cols)[None, :]
        block = tl.load(x_rows[:, None] + cols[None, :] * x_col, mask=mask, other=0.0).to(
            tl.float32
        )
        if RMS:
            m2 += tl.sum(block * block, axis=1)
        else:
            count = tl.minimum(n_cols - start, BLOCK_N).to(tl.float32)
            block_mean = tl.sum(block, axis=1) / count
            centred = tl.where(mask, block - block_mean[:, None], 0.0)
            delta = block_mean - mean
            share = count / (start + count)
            m2 += tl.sum(centred * centred, axis=1) + delta * delta * start * share
            mean += delta * share
    return mean, m2 / n_cols


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["x_inner"])
def fwd_kernel(
    x, weight, bias, y, mean_out, rstd_out, n_rows, n_cols, eps, x_inner, x_outer, x_step, x_col,
    RMS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, LOOPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < n_rows
    x_rows = x + _row_offsets(rows, x_inner, x_outer, x_step)
    y_rows = y + rows.to(tl.int64) * n_cols
    if LOOPED:
        mean, variance = _merged_statistics(x_rows, row_mask, n_cols, x_col, RMS, BLOCK_M, BLOCK_N)
    else:
        cols = tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < n_cols)[None, :]
        block = tl.load(x_rows[:, None] + cols[None, :] * x_col, mask=mask, other=0.0).to(
            tl.float32
        )
        if RMS:
            mean = tl.zeros([BLOCK_M], tl.float32)
            centred = block
        else:
            mean = tl.sum(block, axis=1) / n_cols
            centred = tl.where(mask, block - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / n_cols
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(rstd_out + rows, rstd, mask=row_mask)
    if not RMS:
        tl.store(mean_out + rows, mean, mask=row_mask)
    for start in range(0, n_cols if LOOPED else 1, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_mask = cols < n_cols
        mask = row_mask[:, None] & col_mask[None, :]
        if LOOPED:
            block = tl.load(x_rows[:, None] + cols[None, :] * x_col, mask=mask, other=0.0)
            centred = block.to(tl.float32) - mean[:, None]
        out = centred * rstd[:, None]
        if HAS_WEIGHT:
            out *= tl.load(weight + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            out += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(y_rows[:, None] + cols[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["n_rows", "rows_per_program"],
    do_not_specialize_on_alignment=["x_inner", "dy_inner"],
)
def bwd_fused_kernel(
    dy, x, weight, mean_in, rstd_in, dx, dw_partial, db_partial, n_rows, n_cols,
    rows_per_program, x_inner, x_outer, x_step, x_col, dy_inner, dy_outer, dy_step, dy_col,
    RMS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + cols, mask=col_mask, other=0.0)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_mask = rows < last
        mask = row_mask[:, None] & col_mask[None, :]
        x_rows = x + _row_offsets(rows, x_inner, x_outer, x_step)
        dy_rows = dy + _row_offsets(rows, dy_inner, dy_outer, dy_step)
        xhat = tl.load(x_rows[:, None] + cols[None, :] * x_col, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_rows[:, None] + cols[None, :] * dy_col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_in + rows, mask=row_mask, other=0.0)
        if not RMS:
            xhat -= tl.load(mean_in + rows, mask=row_mask, other=0.0)[:, None]
        xhat *= rstd[:, None]
        if HAS_WEIGHT:
            dw += g * xhat
        if HAS_BIAS:
            db += g
        if HAS_WEIGHT:
            g *= w.to(tl.float32)[None, :]
        out = g - xhat * (tl.sum(g * xhat, axis=1) / n_cols)[:, None]
        if not RMS:
            out -= (tl.sum(g, axis=1) / n_cols)[:, None]
        dx_rows = dx + rows.to(tl.int64) * n_cols
        out = (out * rstd[:, None]).to(dx.dtype.element_ty)
        tl.store(dx_rows[:, None] + cols[None, :], out, mask=mask)
    at = program.to(tl.int64) * n_cols + cols
    if HAS_WEIGHT:
        tl.store(dw_partial + at, tl.sum(dw, axis=0), mask=col_mask)
    if HAS_BIAS:
        tl.store(db_partial + at, tl.sum(db, axis=0), mask=col_mask)


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["x_inner", "dy_inner"])
def bwd_dx_kernel(
    dy, x, weight, mean_in, rstd_in, dx, n_rows, n_cols, x_inner, x_outer, x_step, x_col,
    dy_inner, dy_outer, dy_step, dy_col,
    RMS: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row per program, read twice block by block; the second read finds the row in L2."""
    row = tl.program_id(0)
    x_row = x + _row_offsets(row, x_inner, x_outer, x_step)
    dy_row = dy + _row_offsets(row, dy_inner, dy_outer, dy_step)
    dx_row = dx + row.to(tl.int64) * n_cols
    rstd = tl.load(rstd_in + row)
    mean = 0.0
    if not RMS:
        mean = tl.load(mean_in + row)
    sum_g = tl.zeros([BLOCK_N], tl.float32)
    sum_gx = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        xhat = (tl.load(x_row + cols * x_col, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        g = tl.load(dy_row + cols * dy_col, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += g * xhat
    mean_gx = tl.sum(sum_gx, axis=0) / n_cols
    mean_g = tl.sum(sum_g, axis=0) / n_cols
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        xhat = (tl.load(x_row + cols * x_col, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        g = tl.load(dy_row + cols * dy_col, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
        out = g - xhat * mean_gx
        if not RMS:
            out -= mean_g
        tl.store(dx_row + cols, (out * rstd).to(dx.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["n_rows", "rows_per_program"],
    do_not_specialize_on_alignment=["x_inner", "dy_inner"],
)
def bwd_dw_kernel(
    dy, x, mean_in, rstd_in, dw_partial, db_partial, n_rows, n_cols, rows_per_program, x_inner,
    x_outer, x_step, x_col, dy_inner, dy_outer, dy_step, dy_col,
    RMS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partials of one block of columns over one group of rows."""
    group = tl.program_id(1)
    first = group * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_mask = rows < last
        mask = row_mask[:, None] & col_mask[None, :]
        dy_rows = dy + _row_offsets(rows, dy_inner, dy_outer, dy_step)
        g = tl.load(dy_rows[:, None] + cols[None, :] * dy_col, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            x_rows = x + _row_offsets(rows, x_inner, x_outer, x_step)
            xhat = tl.load(x_rows[:, None] + cols[None, :] * x_col, mask=mask, other=0.0)
            xhat = xhat.to(tl.float32)
            if not RMS:
                xhat -= tl.load(mean_in + rows, mask=row_mask, other=0.0)[:, None]
            dw += g * xhat * tl.load(rstd_in + rows, mask=row_mask, other=0.0)[:, None]
        if HAS_BIAS:
            db += g
    at = group.to(tl.int64) * n_cols + cols
    if HAS_WEIGHT:
        tl.store(dw_partial + at, tl.sum(dw, axis=0), mask=col_mask)
    if HAS_BIAS:
        tl.store(db_partial + at, tl.sum(db, axis=0), mask=col_mask)

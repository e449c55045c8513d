"""Triton kernels of ``normalization``; the formulas are in its docstring.

Rows come as a ``RowLayout`` (``x_inner``, ``x_outer``, ``x_step``, ``x_col``); outputs are
contiguous. Column offsets are 64-bit too: those of a transposed input reach as far as its rows.
"""

from __future__ import annotations

from fastgpt_kernels._common import tl, triton
from fastgpt_kernels._units import multiple


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner, UNIT: tl.constexpr):
    """Element offset of each row of a ``RowLayout``, in 64 bits; ``UNIT`` divides its strides."""
    outer = (rows // inner).to(tl.int64) * multiple(stride_outer, UNIT)
    return outer + (rows % inner).to(tl.int64) * multiple(stride_inner, UNIT)


@triton.jit
def load_tile(rows, cols, stride_col, mask):
    """Tile of the pointers ``rows`` x the columns ``cols``, in float32, 0 where masked."""
    at = rows[:, None] + (cols.to(tl.int64) * stride_col)[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _input_tile(
    x_rows, x_col, residual_rows, residual_col, total, total_rows, cols, mask,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """What is normalised: x, or x + residual rounded to the type it is stored in."""
    block = load_tile(x_rows, cols, x_col, mask)
    if HAS_RESIDUAL:
        block += load_tile(residual_rows, cols, residual_col, mask)
        rounded = block.to(total.dtype.element_ty)
        tl.store(total_rows[:, None] + cols[None, :], rounded, mask=mask)
        block = rounded.to(tl.float32)
    return block


@triton.jit
def _merged_statistics(
    x_rows, x_col, residual_rows, residual_col, total, total_rows, row_mask, n_cols,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and variance of rows read block by block (Chan, Golub and LeVeque 1979)."""
    mean = tl.zeros([BLOCK_M], tl.float32)
    m2 = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < n_cols)[None, :]
        block = _input_tile(
            x_rows, x_col, residual_rows, residual_col, total, total_rows, cols, mask, HAS_RESIDUAL
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


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["x_inner", "res_inner"])
def fwd_kernel(
    x, residual, weight, bias, y, total, mean_out, rstd_out, n_rows, n_cols, eps,
    x_inner, x_outer, x_step, x_col, res_inner, res_outer, res_step, res_col,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, LOOPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """``total`` is x + residual, written if HAS_RESIDUAL."""
    n_cols = multiple(n_cols, UNIT)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < n_rows
    x_rows = x + row_offsets(rows, x_inner, x_outer, x_step, UNIT)
    res_rows = residual + row_offsets(rows, res_inner, res_outer, res_step, UNIT)
    y_rows = y + rows.to(tl.int64) * n_cols
    total_rows = total + rows.to(tl.int64) * n_cols
    if LOOPED:
        mean, variance = _merged_statistics(
            x_rows, x_col, res_rows, res_col, total, total_rows, row_mask, n_cols,
            RMS, HAS_RESIDUAL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        tl.debug_barrier()  # the second reading may be of what other threads wrote to total
    else:
        cols = tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < n_cols)[None, :]
        block = _input_tile(
            x_rows, x_col, res_rows, res_col, total, total_rows, cols, mask, HAS_RESIDUAL
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
            if HAS_RESIDUAL:
                centred = load_tile(total_rows, cols, 1, mask) - mean[:, None]
            else:
                centred = load_tile(x_rows, cols, x_col, mask) - mean[:, None]
        out = centred * rstd[:, None]
        if HAS_WEIGHT:
            out *= tl.load(weight + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            out += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(y_rows[:, None] + cols[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["n_rows", "rows_per_program"],
    do_not_specialize_on_alignment=["x_inner", "dy_inner", "dt_inner"],
)
def bwd_fused_kernel(
    dy, x, weight, mean_in, rstd_in, dtotal, dx, dw_partial, db_partial, n_rows, n_cols,
    rows_per_program, x_inner, x_outer, x_step, x_col, dy_inner, dy_outer, dy_step, dy_col,
    dt_inner, dt_outer, dt_step, dt_col,
    RMS: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEEDS_DW: tl.constexpr,
    NEEDS_DB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dx and the partials of a group of rows from one reading; dx += dtotal if HAS_TOTAL."""
    n_cols = multiple(n_cols, UNIT)
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
        xhat = load_tile(x + row_offsets(rows, x_inner, x_outer, x_step, UNIT), cols, x_col, mask)
        g = load_tile(dy + row_offsets(rows, dy_inner, dy_outer, dy_step, UNIT), cols, dy_col, mask)
        rstd = tl.load(rstd_in + rows, mask=row_mask, other=0.0)
        if not RMS:
            xhat -= tl.load(mean_in + rows, mask=row_mask, other=0.0)[:, None]
        xhat *= rstd[:, None]
        if NEEDS_DW:
            dw += g * xhat
        if NEEDS_DB:
            db += g
        if HAS_WEIGHT:
            g *= w.to(tl.float32)[None, :]
        slope = tl.sum(g * xhat, axis=1) / n_cols  # both sums come before any use: no spills
        if not RMS:
            g -= (tl.sum(g, axis=1) / n_cols)[:, None]
        out = (g - xhat * slope[:, None]) * rstd[:, None]
        if HAS_TOTAL:
            dt_rows = dtotal + row_offsets(rows, dt_inner, dt_outer, dt_step, UNIT)
            out += load_tile(dt_rows, cols, dt_col, mask)
        dx_rows = dx + rows.to(tl.int64) * n_cols
        tl.store(dx_rows[:, None] + cols[None, :], out.to(dx.dtype.element_ty), mask=mask)
    at = program.to(tl.int64) * n_cols + cols
    if NEEDS_DW:
        tl.store(dw_partial + at, tl.sum(dw, axis=0), mask=col_mask)
    if NEEDS_DB:
        tl.store(db_partial + at, tl.sum(db, axis=0), mask=col_mask)


@triton.jit
def _segment_sums(
    dy_row, dy_col, x_row, x_col, weight, mean, rstd, segment, n_cols,
    HAS_WEIGHT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g xhat over one segment of one row."""
    cols = segment * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = cols < n_cols
    far = cols.to(tl.int64)
    xhat = (tl.load(x_row + far * x_col, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
    g = tl.load(dy_row + far * dy_col, mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        g *= tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(g, axis=0), tl.sum(g * xhat, axis=0)


@triton.jit
def _row_means(sums, rows, row_mask, segments, n_cols, SEGMENTS: tl.constexpr):
    """The sums of the segments of each row, in their order, over n_cols."""
    piece = tl.arange(0, SEGMENTS)
    at = rows.to(tl.int64)[:, None] * segments + piece[None, :]
    mask = row_mask[:, None] & (piece < segments)[None, :]
    return tl.sum(tl.load(sums + at, mask=mask, other=0.0), axis=1) / n_cols


@triton.jit(
    do_not_specialize=["n_rows", "chunk_rows"],
    do_not_specialize_on_alignment=["x_inner", "dy_inner", "dt_inner"],
)
def bwd_wide_kernel(
    dy, x, weight, mean_in, rstd_in, dtotal, dx, dw_partial, db_partial, sums, counters,
    n_rows, n_cols, chunk_rows, x_inner, x_outer, x_step, x_col,
    dy_inner, dy_outer, dy_step, dy_col, dt_inner, dt_outer, dt_step, dt_col,
    RMS: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEEDS_DW: tl.constexpr,
    NEEDS_DB: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows too wide for one block: two readings, the second out of the L2 cache.

    Rows go in chunks that fit there. Programs of the first kind sum one segment of one row each;
    those of the second make dx and the partials of BLOCK_N columns of a chunk, once its sums are
    complete. The order of work is: sums of chunk 0, sums of 1, columns of 0, sums of 2, columns
    of 1 ... A program takes its place in it when it starts, so whatever it waits for is running
    already, on any number of multiprocessors, and is a chunk ahead.

    ``sums`` is (2, n_rows, segments), ``counters`` the next place, then the sums done per chunk.
    """
    n_cols = multiple(n_cols, UNIT)
    segments = tl.cdiv(n_cols, BLOCK_S)
    summing = chunk_rows * segments
    place = tl.atomic_add(counters, 1) - summing
    per_chunk = summing + tl.cdiv(n_cols, BLOCK_N)
    chunk = tl.where(place < 0, -1, place // per_chunk)
    job = tl.where(place < 0, place + summing, place % per_chunk)
    if job < summing:
        chunk += 1
        row = chunk * chunk_rows + job // segments
        if row < n_rows:
            mean = 0.0
            if not RMS:
                mean = tl.load(mean_in + row)
            x_row = x + row_offsets(row, x_inner, x_outer, x_step, UNIT)
            dy_row = dy + row_offsets(row, dy_inner, dy_outer, dy_step, UNIT)
            sum_g, sum_gx = _segment_sums(
                dy_row, dy_col, x_row, x_col, weight, mean, tl.load(rstd_in + row), job % segments,
                n_cols, HAS_WEIGHT, BLOCK_S,
            )  # fmt: skip
            at = row.to(tl.int64) * segments + job % segments
            tl.store(sums + at, sum_g)
            tl.store(sums + n_rows.to(tl.int64) * segments + at, sum_gx)
            tl.debug_barrier()
            tl.atomic_add(counters + 1 + chunk, 1, sem="release")
    else:
        first = chunk * chunk_rows
        last = tl.minimum(first + chunk_rows, n_rows)
        while tl.atomic_add(counters + 1 + chunk, 0, sem="acquire") < (last - first) * segments:
            pass
        cols = (job - summing) * BLOCK_N + tl.arange(0, BLOCK_N)
        col_mask = cols < n_cols
        dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if HAS_WEIGHT:
            w = tl.load(weight + cols, mask=col_mask, other=0.0)
        for start in range(first, last, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            row_mask = rows < last
            mask = row_mask[:, None] & col_mask[None, :]
            xhat = load_tile(
                x + row_offsets(rows, x_inner, x_outer, x_step, UNIT), cols, x_col, mask
            )
            g = load_tile(
                dy + row_offsets(rows, dy_inner, dy_outer, dy_step, UNIT), cols, dy_col, mask
            )
            rstd = tl.load(rstd_in + rows, mask=row_mask, other=0.0)
            if not RMS:
                xhat -= tl.load(mean_in + rows, mask=row_mask, other=0.0)[:, None]
            xhat *= rstd[:, None]
            if NEEDS_DW:
                dw += g * xhat
            if NEEDS_DB:
                db += g
            if HAS_WEIGHT:
                g *= w.to(tl.float32)[None, :]
            sums_gx = sums + n_rows.to(tl.int64) * segments
            out = (
                g - xhat * _row_means(sums_gx, rows, row_mask, segments, n_cols, SEGMENTS)[:, None]
            )
            if not RMS:
                out -= _row_means(sums, rows, row_mask, segments, n_cols, SEGMENTS)[:, None]
            out *= rstd[:, None]
            if HAS_TOTAL:
                dt_rows = dtotal + row_offsets(rows, dt_inner, dt_outer, dt_step, UNIT)
                out += load_tile(dt_rows, cols, dt_col, mask)
            dx_rows = dx + rows.to(tl.int64) * n_cols
            tl.store(dx_rows[:, None] + cols[None, :], out.to(dx.dtype.element_ty), mask=mask)
        at = chunk.to(tl.int64) * n_cols + cols
        if NEEDS_DW:
            tl.store(dw_partial + at, tl.sum(dw, axis=0), mask=col_mask)
        if NEEDS_DB:
            tl.store(db_partial + at, tl.sum(db, axis=0), mask=col_mask)

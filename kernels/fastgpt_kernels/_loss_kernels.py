"""Triton kernels of ``cross_entropy`` and ``linear_cross_entropy``; one program per row of logits.

**Base 2, fused.** With L = log2(e) a row keeps ``top = max(x) L`` (rounded) and
``total = sum 2^(x L - top)``. The exponent is one fused multiply-add, exact up to its last
rounding, so the rounding of ``top`` is a factor common to all terms that cancels in
p = 2^(x L - top) / total and in the loss: nothing is lost at logits of 1e4, where ``x - lse`` in
float32 would be off by 1e-3.

**Wide access for any vocabulary.** A row of 50,257 bfloat16 starts at an odd 2-byte offset, which
makes compilers fall back to 16-bit accesses. Here a row is split into up to VEC - 1 elements before
the first 16-byte boundary, whole 16-byte groups (masked group by group, so the compiler may
vectorise), and up to VEC - 1 elements after the last one. The two ends are one small access; VEC
= 1 turns all this off, for logits whose columns are not adjacent.
"""
# pyright: reportGeneralTypeIssues=false
# (a device function seen from Python never returns; inside a kernel it gives a tuple)

from __future__ import annotations

from fastgpt_kernels._common import tl, triton
from fastgpt_kernels._soft_cap import tanh
from fastgpt_kernels._units import multiple

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ACCURATE = tl.constexpr(2)
LOWEST = tl.constexpr(-1.0e30)  # below any scaled logit, and finite: -inf - -inf would be NaN


@triton.jit
def _capped(x, softcap, inv_softcap, SOFTCAP: tl.constexpr):
    """``softcap * tanh(x / softcap)`` in the mode that ``soft_cap_mode`` gives."""
    if SOFTCAP:
        x = softcap * tanh(x, inv_softcap, SOFTCAP == ACCURATE)
    return x


@triton.jit
def _cap_slope(x, inv_softcap, SOFTCAP: tl.constexpr):
    """Derivative of ``_capped``, 1 - tanh^2."""
    t = tanh(x, inv_softcap, SOFTCAP == ACCURATE)
    return 1.0 - t * t


@triton.jit
def _split_row(offset, n_cols, VEC: tl.constexpr):
    """Columns before the first 16-byte boundary, and how many whole groups hold after it."""
    first = ((VEC - offset % VEC) % VEC).to(tl.int32)
    first = tl.minimum(first, n_cols)
    return first, (n_cols - first) // VEC * VEC


@triton.jit
def _edge_columns(first, middle, n_cols, VEC: tl.constexpr):
    """Columns outside the whole groups, and which lanes hold one."""
    lanes = tl.arange(0, 2 * VEC)
    cols = tl.where(lanes < VEC, lanes, first + middle - VEC + lanes)
    return cols, tl.where(lanes < VEC, lanes < first, cols < n_cols)


@triton.jit
def _elements(cols, stride_col, VEC: tl.constexpr):
    """Where columns lie; those of a transposed tensor may be more than 2^31 elements apart."""
    if VEC == 1:
        cols = cols.to(tl.int64)
    return cols * stride_col


@triton.jit
def _statistics(
    logits, offset, n_cols, stride_col, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``top``, ``total`` (see the module) and, with SMOOTHING, the sum of the row."""
    first, middle = _split_row(offset, n_cols, VEC)
    cols, edge = _edge_columns(first, middle, n_cols, VEC)
    edge_at = logits + offset + _elements(cols, stride_col, VEC)
    edge_x = tl.load(edge_at, mask=edge, other=float("-inf"))
    edge_x = _capped(edge_x.to(tl.float32), softcap, inv_softcap, SOFTCAP)
    edge_sum = tl.sum(tl.where(edge, edge_x, 0.0), axis=0)
    edge_x = tl.where(edge, edge_x, float("-inf"))  # which a cap made finite
    top = tl.maximum(tl.max(edge_x, axis=0) * LOG2E, LOWEST)
    edge_total = tl.sum(tl.exp2(tl.fma(edge_x, LOG2E, -top)), axis=0)
    lanes = tl.arange(0, BLOCK)
    groups = lanes // VEC * VEC
    start_of_groups = logits + tl.multiple_of(offset + first * stride_col, VEC)
    total = tl.zeros([BLOCK], tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, middle, BLOCK):
        mask = start + groups < middle
        at = start_of_groups + _elements(start + lanes, stride_col, VEC)
        x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
        if SOFTCAP:
            x = tl.where(mask, _capped(x, softcap, inv_softcap, SOFTCAP), float("-inf"))
        new_top = tl.maximum(top, tl.max(x, axis=0) * LOG2E)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.exp2(tl.fma(x, LOG2E, -new_top))
        edge_total *= rescale
        top = new_top
        if SMOOTHING:
            row_sum += tl.where(mask, x, 0.0)
    return top, tl.sum(total, axis=0) + edge_total, tl.sum(row_sum, axis=0) + edge_sum


@triton.jit
def _row_loss(
    target_logit, top, total, row_sum, n_cols, label_smoothing, z_loss, SMOOTHING: tl.constexpr
):
    """Loss of one row from its statistics, every difference taken before it can cancel."""
    log_total = tl.log2(total)
    loss = (log_total - tl.fma(target_logit, LOG2E, -top)) * LN2
    if SMOOTHING:
        uniform = (log_total - tl.fma(row_sum / n_cols, LOG2E, -top)) * LN2
        loss += label_smoothing * (uniform - loss)
    lse = (top + log_total) * LN2
    return loss + z_loss * lse * lse


@triton.jit
def _element(x, top, a, b, softcap, inv_softcap, SOFTCAP: tl.constexpr):
    d = a * tl.exp2(tl.fma(_capped(x, softcap, inv_softcap, SOFTCAP), LOG2E, -top)) - b
    if SOFTCAP:
        d *= _cap_slope(x, inv_softcap, SOFTCAP)
    return d


@triton.jit
def _gradient(
    logits, offset, out, out_offset, target_col, target_logit, top, total, grad,
    n_cols, stride_col, label_smoothing, z_loss, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write d(grad * loss)/d(logits); ``out`` may be ``logits`` (same offset, stride_col 1).

    With a = grad (1 + 2 z_loss lse) / total and b = grad label_smoothing / V an element is
    ``a 2^(x L - top) - b``; the target's, ``grad (1 - label_smoothing)`` less, is rewritten last,
    which spares every other element a comparison.
    """
    lse = (top + tl.log2(total)) * LN2
    a = grad * (1.0 + 2.0 * z_loss * lse) / total
    b = grad * label_smoothing / n_cols
    first, middle = _split_row(offset, n_cols, VEC)
    cols, edge = _edge_columns(first, middle, n_cols, VEC)
    edge_at = logits + offset + _elements(cols, stride_col, VEC)
    edge_x = tl.load(edge_at, mask=edge, other=0.0).to(tl.float32)
    edge_d = _element(edge_x, top, a, b, softcap, inv_softcap, SOFTCAP)
    tl.store(out + out_offset + cols, edge_d.to(out.dtype.element_ty), mask=edge)
    lanes = tl.arange(0, BLOCK)
    groups = lanes // VEC * VEC
    start_of_groups = logits + tl.multiple_of(offset + first * stride_col, VEC)
    out_groups = out + tl.multiple_of(out_offset + first, VEC)
    for start in range(0, middle, BLOCK):
        mask = start + groups < middle
        at = start_of_groups + _elements(start + lanes, stride_col, VEC)
        x = tl.load(at, mask=mask, other=0.0)
        d = _element(x.to(tl.float32), top, a, b, softcap, inv_softcap, SOFTCAP)
        tl.store(out_groups + start + lanes, d.to(out.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # the target's element was just written by another thread
    b += grad * (1.0 - label_smoothing)
    target_d = _element(target_logit, top, a, b, softcap, inv_softcap, SOFTCAP)
    valid = (target_col >= 0) & (target_col < n_cols)
    tl.store(out + out_offset + target_col, target_d.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _zero_row(out, out_offset, n_cols, VEC: tl.constexpr, BLOCK: tl.constexpr):
    first, middle = _split_row(out_offset, n_cols, VEC)
    cols, mask = _edge_columns(first, middle, n_cols, VEC)
    tl.store(out + out_offset + cols, tl.zeros([2 * VEC], out.dtype.element_ty), mask=mask)
    lanes = tl.arange(0, BLOCK)
    groups = lanes // VEC * VEC
    out_groups = out + tl.multiple_of(out_offset + first, VEC)
    for start in range(0, middle, BLOCK):
        zeros = tl.zeros([BLOCK], out.dtype.element_ty)
        tl.store(out_groups + start + lanes, zeros, mask=start + groups < middle)


@triton.jit
def _target_logit(logits, offset, target_col, n_cols, stride_col):
    """The target's raw logit; NaN for an index outside the vocabulary, which thereby shows."""
    valid = (target_col >= 0) & (target_col < n_cols)
    at = logits + offset + target_col.to(tl.int64) * stride_col
    return tl.load(at, mask=valid, other=float("nan")).to(tl.float32)


@triton.jit
def loss_kernel(
    logits, target, loss, row_top, row_total, n_cols, stride_row, stride_col, stride_target,
    ignore_index, label_smoothing, z_loss, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of every row."""
    row = tl.program_id(0).to(tl.int64)
    target_col = tl.load(target + row * stride_target)
    if target_col == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(row_top + row, 0.0)
        tl.store(row_total + row, 1.0)
    else:
        offset = row * stride_row
        top, total, row_sum = _statistics(
            logits, offset, n_cols, stride_col, softcap, inv_softcap,
            SOFTCAP, SMOOTHING, VEC, BLOCK,
        )  # fmt: skip
        x = _target_logit(logits, offset, target_col, n_cols, stride_col)
        x = _capped(x, softcap, inv_softcap, SOFTCAP)
        value = _row_loss(x, top, total, row_sum, n_cols, label_smoothing, z_loss, SMOOTHING)
        tl.store(loss + row, value)
        tl.store(row_top + row, top)
        tl.store(row_total + row, total)


@triton.jit
def gradient_kernel(
    logits, target, row_top, row_total, grad, out, n_cols, stride_row, stride_col, stride_target,
    stride_grad, stride_out, ignore_index, label_smoothing, z_loss, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of every row from the statistics of ``loss_kernel``.

    ``out`` may be ``logits`` if their columns are adjacent.
    """
    row = tl.program_id(0).to(tl.int64)
    target_col = tl.load(target + row * stride_target)
    out_offset = row * stride_out
    if target_col == ignore_index:
        _zero_row(out, out_offset, n_cols, VEC, BLOCK)
    else:
        offset = row * stride_row
        x = _target_logit(logits, offset, target_col, n_cols, stride_col)
        top, total = tl.load(row_top + row), tl.load(row_total + row)
        tl.debug_barrier()  # in place: all have read the target's logit before any overwrites it
        _gradient(
            logits, offset, out, out_offset, target_col, x, top, total,
            tl.load(grad + row * stride_grad), n_cols, stride_col,
            label_smoothing, z_loss, softcap, inv_softcap, SOFTCAP, VEC, BLOCK,
        )  # fmt: skip


@triton.jit
def loss_gradient_kernel(
    logits, target, grad, loss, n_cols, stride_row, stride_target, stride_grad,
    ignore_index, label_smoothing, z_loss, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of every row, and its logits overwritten by their gradient (columns adjacent)."""
    row = tl.program_id(0).to(tl.int64)
    target_col = tl.load(target + row * stride_target)
    offset = row * stride_row
    if target_col == ignore_index:
        tl.store(loss + row, 0.0)
        _zero_row(logits, offset, n_cols, VEC, BLOCK)
    else:
        top, total, row_sum = _statistics(
            logits, offset, n_cols, 1, softcap, inv_softcap, SOFTCAP, SMOOTHING, VEC, BLOCK
        )
        x = _target_logit(logits, offset, target_col, n_cols, 1)
        capped = _capped(x, softcap, inv_softcap, SOFTCAP)
        value = _row_loss(capped, top, total, row_sum, n_cols, label_smoothing, z_loss, SMOOTHING)
        tl.store(loss + row, value)
        tl.debug_barrier()  # every thread has read the target's logit before any overwrites it
        _gradient(
            logits, offset, logits, offset, target_col, x, top, total,
            tl.load(grad + row * stride_grad), n_cols, 1,
            label_smoothing, z_loss, softcap, inv_softcap, SOFTCAP, VEC, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def scale_kernel(x, factor, out, n, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """``x * factor`` in float32, rounded once; all n elements adjacent, the factor in memory."""
    n = multiple(n, UNIT)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def whole_row_kernel(
    logits, target, grad, loss, n_cols, stride_row, stride_target, stride_grad,
    ignore_index, label_smoothing, z_loss, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``loss_gradient_kernel`` for rows of at most BLOCK logits: each is read once and kept.

    Rows start at 16-byte boundaries and end in padding up to the next one, which is set to 0.
    """
    row = tl.program_id(0).to(tl.int64)
    target_col = tl.load(target + row * stride_target)
    lanes = tl.arange(0, BLOCK)
    at = logits + tl.multiple_of(row * stride_row, VEC) + lanes
    mask = lanes // VEC * VEC < n_cols
    if target_col == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(at, tl.zeros([BLOCK], logits.dtype.element_ty), mask=mask)
    else:
        inside = lanes < n_cols
        raw = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(inside, _capped(raw, softcap, inv_softcap, SOFTCAP), float("-inf"))
        top = tl.maximum(tl.max(x, axis=0) * LOG2E, LOWEST)
        row_sum = top
        if SMOOTHING:
            row_sum = tl.sum(tl.where(inside, x, 0.0), axis=0)
        own = lanes == target_col
        target_logit = tl.sum(tl.where(own, x, 0.0), axis=0)
        e = tl.exp2(tl.fma(x, LOG2E, -top))  # last, when x is no longer needed: fewer registers
        total = tl.sum(e, axis=0)
        valid = (target_col >= 0) & (target_col < n_cols)
        target_logit = tl.where(valid, target_logit, float("nan"))
        value = _row_loss(
            target_logit, top, total, row_sum, n_cols, label_smoothing, z_loss, SMOOTHING
        )
        tl.store(loss + row, value)
        weight = tl.load(grad + row * stride_grad)
        lse = (top + tl.log2(total)) * LN2
        d = weight * (1.0 + 2.0 * z_loss * lse) / total * e - weight * label_smoothing / n_cols
        d = tl.where(own, d - weight * (1.0 - label_smoothing), d)
        if SOFTCAP:
            d *= _cap_slope(raw, inv_softcap, SOFTCAP)
        d = tl.where(inside, d, 0.0)
        tl.store(at, d.to(logits.dtype.element_ty), mask=mask)

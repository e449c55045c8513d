"""Triton kernels of ``linear_log_probs``; one program per row of logits.

Base 2 as in ``_loss_kernels``: with x the (capped) logits and scale = log2(e) / temperature a row
keeps ``top = max(x) scale``, and with q = x scale - top, one fused multiply-add,

    total = sum 2^q,  weighted = sum 2^q q
    log p = (q_id - log2(total)) ln 2,  entropy = (log2(total) - weighted / total) ln 2

Both terms of the entropy are >= 0: it keeps its accuracy where a distribution is all but certain.
"""
# pyright: reportGeneralTypeIssues=false
# (a device function seen from Python never returns; inside a kernel it gives a tuple)

from __future__ import annotations

from fastgpt_kernels._common import tl, triton
from fastgpt_kernels._loss_kernels import (
    LN2,
    LOWEST,
    _cap_slope,
    _capped,
    _edge_columns,
    _split_row,
    _target_logit,
    _zero_row,
)

NOTHING = tl.constexpr(-200.0)  # 2^NOTHING is 0; -inf would make 0 * -inf of a masked entry


@triton.jit
def _moments(
    logits, offset, n_cols, stride_col, scale, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``top``, ``total`` and ``weighted`` of one row."""
    first, middle = _split_row(offset, n_cols, VEC)
    cols, edge = _edge_columns(first, middle, n_cols, VEC)
    edge_x = tl.load(logits + offset + cols * stride_col, mask=edge, other=float("-inf"))
    edge_x = _capped(edge_x.to(tl.float32), softcap, inv_softcap, SOFTCAP)
    edge_x = tl.where(edge, edge_x, float("-inf"))  # which a cap made finite
    top = tl.maximum(tl.max(edge_x, axis=0) * scale, LOWEST)
    edge_q = tl.maximum(tl.fma(edge_x, scale, -top), NOTHING)
    edge_e = tl.exp2(edge_q)
    edge_total, edge_weighted = tl.sum(edge_e, axis=0), tl.sum(edge_e * edge_q, axis=0)
    lanes = tl.arange(0, BLOCK)
    groups = lanes // VEC * VEC
    start_of_groups = logits + tl.multiple_of(offset + first * stride_col, VEC)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, middle, BLOCK):
        mask = start + groups < middle
        at = start_of_groups + (start + lanes) * stride_col
        x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
        if SOFTCAP:
            x = tl.where(mask, _capped(x, softcap, inv_softcap, SOFTCAP), float("-inf"))
        new_top = tl.maximum(top, tl.max(x, axis=0) * scale)
        lower = tl.maximum(top - new_top, NOTHING)
        rescale = tl.exp2(lower)
        q = tl.maximum(tl.fma(x, scale, -new_top), NOTHING)
        e = tl.exp2(q)
        weighted = rescale * tl.fma(total, lower, weighted) + e * q
        total = total * rescale + e
        edge_weighted = rescale * tl.fma(edge_total, lower, edge_weighted)
        edge_total *= rescale
        top = new_top
    return top, tl.sum(total, axis=0) + edge_total, tl.sum(weighted, axis=0) + edge_weighted


@triton.jit
def log_prob_kernel(
    logits, ids, log_probs, entropy, row_top, row_total, n_cols, stride_row, stride_col, stride_ids,
    ignore_index, scale, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-probability of each row's id, entropy of the row, and the statistics of both."""
    row = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + row * stride_ids)
    if id == ignore_index:
        tl.store(log_probs + row, 0.0)
        tl.store(entropy + row, 0.0)
        tl.store(row_top + row, 0.0)
        tl.store(row_total + row, 1.0)
    else:
        offset = row * stride_row
        top, total, weighted = _moments(
            logits, offset, n_cols, stride_col, scale, softcap, inv_softcap, SOFTCAP, VEC, BLOCK
        )
        x = _target_logit(logits, offset, id, n_cols, stride_col)
        x = _capped(x, softcap, inv_softcap, SOFTCAP)
        log_total = tl.log2(total)
        tl.store(log_probs + row, (tl.fma(x, scale, -top) - log_total) * LN2)
        tl.store(entropy + row, (log_total - weighted / total) * LN2)
        tl.store(row_top + row, top)
        tl.store(row_total + row, total)


@triton.jit
def _element(
    x, top, a, b, scale, softcap, inv_softcap, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr
):
    q = tl.fma(_capped(x, softcap, inv_softcap, SOFTCAP), scale, -top)
    if ENTROPY:
        q = tl.maximum(q, NOTHING)
        d = tl.exp2(q) * tl.fma(b, q, a)
    else:
        d = tl.exp2(q) * a
    if SOFTCAP:
        d *= _cap_slope(x, inv_softcap, SOFTCAP)
    return d


@triton.jit
def log_prob_gradient_kernel(
    logits, ids, row_top, row_a, row_b, row_own, n_cols, stride_row, stride_ids,
    ignore_index, scale, softcap, inv_softcap,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits overwritten by their gradient, columns adjacent: ``2^q (a + b q)``, the id's ``own``.

    Without ENTROPY b is 0 and not read.
    """
    row = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + row * stride_ids)
    offset = row * stride_row
    if id == ignore_index:
        _zero_row(logits, offset, n_cols, VEC, BLOCK)
    else:
        top, a, own = tl.load(row_top + row), tl.load(row_a + row), tl.load(row_own + row)
        b = a
        if ENTROPY:
            b = tl.load(row_b + row)
        if SOFTCAP:
            own_x = _target_logit(logits, offset, id, n_cols, 1)
            own *= _cap_slope(own_x, inv_softcap, SOFTCAP)
            tl.debug_barrier()  # every thread has read the id's logit before any overwrites it
        first, middle = _split_row(offset, n_cols, VEC)
        cols, edge = _edge_columns(first, middle, n_cols, VEC)
        edge_x = tl.load(logits + offset + cols, mask=edge, other=0.0).to(tl.float32)
        edge_d = _element(edge_x, top, a, b, scale, softcap, inv_softcap, SOFTCAP, ENTROPY)
        tl.store(logits + offset + cols, edge_d.to(logits.dtype.element_ty), mask=edge)
        lanes = tl.arange(0, BLOCK)
        groups = lanes // VEC * VEC
        start_of_groups = logits + tl.multiple_of(offset + first, VEC)
        for start in range(0, middle, BLOCK):
            mask = start + groups < middle
            at = start_of_groups + start + lanes
            x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            d = _element(x, top, a, b, scale, softcap, inv_softcap, SOFTCAP, ENTROPY)
            tl.store(at, d.to(logits.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the id's element was just written by another thread
        valid = (id >= 0) & (id < n_cols)
        tl.store(logits + offset + id, own.to(logits.dtype.element_ty), mask=valid)

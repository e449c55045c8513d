"""Scaled dot-product attention in one pass over the keys (FlashAttention), forward and backward.

Row i (a query) sees the keys ``[lo_i, hi_i)`` and nothing else::

    hi_i = min(S, i + S - T + 1) when causal (bottom-right aligned), else S
    lo_i = max(0, i + S - T - window + 1, doc_start_i)
    x_ij = scale * q_i . k_j,  or with softcap  x_ij = cap * tanh(scale * q_i . k_j / cap)
    p_ij = exp(x_ij - lse_i),  lse_i = log sum_j exp(x_ij),  o_i = sum_j p_ij v_j

Both bounds grow with i, which is all the kernels need to know about masks: a block of queries meets
a run of key blocks of which only the two ends need a mask, and (looking from the keys) the same
holds for query blocks. The gradients, with delta_i = o_i . do_i::

    dv_j = sum_i p_ij do_i        dx_ij = p_ij (do_i . v_j - delta_i)
    dq_i = scale * sum_j dx_ij k_j        dk_j = scale * sum_i dx_ij q_i

(softcap: dx_ij also times ``1 - tanh^2``). dq is summed in a kernel over queries and dk, dv in a
kernel over keys, so there are no atomics and two runs give the same bits. A row that sees no key
gives output 0 and gradients 0.

Legend: B batch, H query heads, T queries, S keys, D head size. Softmax runs in base 2
(``exp(x) = exp2(x * log2 e)``) and in float32; the saved ``lse`` is therefore base 2, and +inf for
a row that sees no key, so that exp2(x - lse) is 0 there.

Sources: Dao, FlashAttention-2 (arXiv 2307.08691); Milakov and Gimelshein, Online normalizer
calculation for softmax (arXiv 1805.02867).
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

from fastgpt_kernels._attention_blocks import (
    COUNTS,
    key_block,
    key_plan,
    load_tile,
    multiply,
    multiply_subtract,
    query_block,
    query_plan,
    tile,
)
from fastgpt_kernels._common import tl, triton
from fastgpt_kernels._soft_cap import tanh
from fastgpt_kernels._units import multiple


@triton.jit
def fwd_loop(
    acc, total, peak, q, k_tile, v_tile, stride_ks, stride_vs, lo, hi, col_ok, S,
    first, n_head, skip, n_blocks, score_in, score_log2,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, MASK_COLS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    PIPELINED: tl.constexpr = True,  # pyright: ignore[reportArgumentType]
    PAIRWISE: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
):  # fmt: skip
    """Online softmax over n_blocks key blocks; after n_head of them jump ``skip`` keys ahead."""
    for i in tl.range(0, n_blocks, num_stages=None if PIPELINED else 1):
        start = first + i * BLOCK_N
        if MASKED:
            start += tl.where(i >= n_head, skip, 0)
        keys = start + tl.arange(0, BLOCK_N)
        k_pointers = k_tile + start.to(tl.int64) * stride_ks
        k = load_tile(k_pointers, keys < S, col_ok, MASKED, MASK_COLS)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            x = tanh(x, score_in, q.dtype == tl.float32)
        if MASKED:
            x = tl.where(
                (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), x, -float("inf")
            )
        new_peak = tl.maximum(peak, tl.max(x, 1) * score_log2)
        shift = new_peak
        if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
            shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        p = tl.exp2(multiply_subtract(x, score_log2, shift[:, None], PAIRWISE))
        rescale = tl.exp2(peak - shift)
        total = total * rescale + tl.sum(p, 1)
        v_pointers = v_tile + start.to(tl.int64) * stride_vs
        v = load_tile(v_pointers, keys < S, col_ok, MASKED, MASK_COLS)
        acc = multiply(acc, rescale[:, None], PAIRWISE)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=COUNTS)
def fwd_kernel(
    q_ptr, k_ptr, v_ptr, doc_ptr, cu_q_ptr, cu_k_ptr, tiles_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    n_heads, T, S, window, n_seqs, n_tiles, score_in, score_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    DOCS: tl.constexpr, VARLEN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    MASKED_LAST: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
    PAIRWISE: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
):  # fmt: skip
    """One block of queries of one head: out (B, T, H, D) and lse (B, H, T)."""
    stride_qh, stride_qt = multiple(stride_qh, UNIT), multiple(stride_qt, UNIT)
    stride_kh, stride_ks = multiple(stride_kh, UNIT), multiple(stride_ks, UNIT)
    stride_vh, stride_vs = multiple(stride_vh, UNIT), multiple(stride_vs, UNIT)
    start_m, head, at_q, at_k, row, stats, T, S = query_block(
        tiles_ptr, cu_q_ptr, cu_k_ptr, n_tiles, n_seqs, n_heads, T, S, VARLEN, BLOCK_M
    )
    rows = start_m + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    row_ok = rows < T
    col_ok = cols < HEAD_DIM
    MASK_COLS: tl.constexpr = BLOCK_D != HEAD_DIM

    lo, hi, first, n_head, full, n_full, n_edge = key_plan(
        rows, row_ok, start_m, doc_ptr, at_q, T, S, window,
        CAUSAL, WINDOWED, DOCS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    head_k = (head // GROUP).to(tl.int64)
    q_base = q_ptr + at_q * multiple(stride_qb, UNIT) + head.to(tl.int64) * stride_qh
    k_base = k_ptr + at_k * multiple(stride_kb, UNIT) + head_k * stride_kh
    v_base = v_ptr + at_k * multiple(stride_vb, UNIT) + head_k * stride_vh
    q_tile = tile(q_base, rows, stride_qt, cols, stride_qd)
    k_tile = tile(k_base, tl.arange(0, BLOCK_N), stride_ks, cols, stride_kd)
    v_tile = tile(v_base, tl.arange(0, BLOCK_N), stride_vs, cols, stride_vd)
    q = load_tile(q_tile, row_ok, col_ok, True, MASK_COLS)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    # Masked blocks first; or last and not pipelined, which keeps fewer addresses in registers.
    FIRST: tl.constexpr = 0 if MASKED_LAST else 1
    STEP: tl.constexpr = 1 - 2 * FIRST
    for masked in tl.static_range(FIRST, FIRST + 2 * STEP, STEP):
        acc, total, peak = fwd_loop(
            acc, total, peak, q, k_tile, v_tile, stride_ks, stride_vs, lo, hi, col_ok, S,
            first if masked else full, n_head, n_full * BLOCK_N, n_edge if masked else n_full,
            score_in, score_log2, masked, SOFTCAP, MASK_COLS, BLOCK_N, PRECISION,
            not (masked and MASKED_LAST), PAIRWISE,
        )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc *= (1.0 / total)[:, None]
    lse = tl.where(empty, float("inf"), peak + tl.log2(total))
    tl.store(lse_ptr + stats + rows, lse, mask=row_ok)
    out_base = out_ptr + (row * n_heads + head) * HEAD_DIM
    out_tile = tile(out_base, rows, n_heads * HEAD_DIM, cols, 1)
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def _dq_loop(
    acc, q, do, lse, delta, k_tile, v_tile, stride_ks, stride_vs, lo, hi, col_ok, S,
    first, n_head, skip, n_blocks, score_in, score_log2,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, MASK_COLS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dx @ k over n_blocks key blocks; after n_head of them jump ``skip`` keys ahead."""
    for i in range(n_blocks):
        start = first + i * BLOCK_N
        if MASKED:
            start += tl.where(i >= n_head, skip, 0)
        keys = start + tl.arange(0, BLOCK_N)
        k_pointers = k_tile + start.to(tl.int64) * stride_ks
        k = load_tile(k_pointers, keys < S, col_ok, MASKED, MASK_COLS)
        v_pointers = v_tile + start.to(tl.int64) * stride_vs
        v = load_tile(v_pointers, keys < S, col_ok, MASKED, MASK_COLS)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            x = tanh(x, score_in, q.dtype == tl.float32)
        p = tl.exp2(x * score_log2 - lse[:, None])
        if MASKED:
            p = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dx = p * (dp - delta[:, None])
        if SOFTCAP:
            dx *= 1.0 - x * x
        acc = tl.dot(dx.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, doc_ptr, cu_q_ptr, cu_k_ptr, tiles_ptr, out_ptr, do_ptr, dlse_ptr,
    lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_gb, stride_gh, stride_gt, stride_gd,
    n_heads, T, S, window, n_seqs, n_tiles, scale, score_in, score_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    DOCS: tl.constexpr, VARLEN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    MASKED_LAST: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
):  # fmt: skip
    """One block of queries of one head: dq (B, T, H, D), and delta (B, H, T) for dk."""
    stride_qh, stride_qt = multiple(stride_qh, UNIT), multiple(stride_qt, UNIT)
    stride_kh, stride_ks = multiple(stride_kh, UNIT), multiple(stride_ks, UNIT)
    stride_vh, stride_vs = multiple(stride_vh, UNIT), multiple(stride_vs, UNIT)
    stride_gh, stride_gt = multiple(stride_gh, UNIT), multiple(stride_gt, UNIT)
    start_m, head, at_q, at_k, row, stats, T, S = query_block(
        tiles_ptr, cu_q_ptr, cu_k_ptr, n_tiles, n_seqs, n_heads, T, S, VARLEN, BLOCK_M
    )
    rows = start_m + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    row_ok = rows < T
    col_ok = cols < HEAD_DIM
    MASK_COLS: tl.constexpr = BLOCK_D != HEAD_DIM

    lo, hi, first, n_head, full, n_full, n_edge = key_plan(
        rows, row_ok, start_m, doc_ptr, at_q, T, S, window,
        CAUSAL, WINDOWED, DOCS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    head_k = (head // GROUP).to(tl.int64)
    k_base = k_ptr + at_k * multiple(stride_kb, UNIT) + head_k * stride_kh
    v_base = v_ptr + at_k * multiple(stride_vb, UNIT) + head_k * stride_vh
    k_tile = tile(k_base, tl.arange(0, BLOCK_N), stride_ks, cols, stride_kd)
    v_tile = tile(v_base, tl.arange(0, BLOCK_N), stride_vs, cols, stride_vd)
    do_base = do_ptr + at_q * multiple(stride_gb, UNIT) + head.to(tl.int64) * stride_gh
    do_tile = tile(do_base, rows, stride_gt, cols, stride_gd)
    do = load_tile(do_tile, row_ok, col_ok, True, MASK_COLS)
    out_base = (row * n_heads + head) * HEAD_DIM
    out_tile = tile(out_ptr + out_base, rows, n_heads * HEAD_DIM, cols, 1)
    out = load_tile(out_tile, row_ok, col_ok, True, MASK_COLS)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + stats + rows, mask=row_ok, other=0.0)
    tl.store(delta_ptr + stats + rows, delta, mask=row_ok)
    lse = tl.load(lse_ptr + stats + rows, mask=row_ok, other=float("inf"))
    q_base = q_ptr + at_q * multiple(stride_qb, UNIT) + head.to(tl.int64) * stride_qh
    q_tile = tile(q_base, rows, stride_qt, cols, stride_qd)
    q = load_tile(q_tile, row_ok, col_ok, True, MASK_COLS)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # Which comes first decides what stays in registers meanwhile.
    FIRST: tl.constexpr = 0 if MASKED_LAST else 1
    STEP: tl.constexpr = 1 - 2 * FIRST
    for masked in tl.static_range(FIRST, FIRST + 2 * STEP, STEP):
        acc = _dq_loop(
            acc, q, do, lse, delta, k_tile, v_tile, stride_ks, stride_vs, lo, hi, col_ok, S,
            first if masked else full, n_head, n_full * BLOCK_N, n_edge if masked else n_full,
            score_in, score_log2,
            masked, SOFTCAP, MASK_COLS, BLOCK_N, PRECISION,
        )  # fmt: skip
    dq_tile = tile(dq_ptr + out_base, rows, n_heads * HEAD_DIM, cols, 1)
    dq = (acc * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_tile, dq, mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def _dkv_loop(
    dk, dv, k, v, q_tile, do_tile, lse_ptr, delta_ptr,
    stride_qh, stride_qt, stride_gh, stride_gt, stride_stats, lo, hi, col_ok, T,
    first, n_head, skip, n_blocks, score_in, score_log2,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, MASK_COLS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dx^T @ q and p^T @ do over n_blocks query blocks of each head, jumping like ``_dq_loop``.

    Scores are computed transposed (keys, queries): p^T and dx^T then are left operands, which the
    tensor cores can read from registers. Heads and blocks share one loop, since a loop around the
    pipelined one costs registers and drains the pipeline once a head.
    """
    for step in range(GROUP * n_blocks):
        i = step
        member = 0
        if GROUP > 1:
            member = step // n_blocks
            i = step % n_blocks
        start = first + i * BLOCK_M
        if MASKED:
            start += tl.where(i >= n_head, skip, 0)
        rows = start + tl.arange(0, BLOCK_M)
        q_pointers = q_tile + start.to(tl.int64) * stride_qt
        do_pointers = do_tile + start.to(tl.int64) * stride_gt
        stats = rows
        if GROUP > 1:
            q_pointers += member.to(tl.int64) * stride_qh
            do_pointers += member.to(tl.int64) * stride_gh
            stats += member * stride_stats
        q = load_tile(q_pointers, rows < T, col_ok, MASKED, MASK_COLS)
        do = load_tile(do_pointers, rows < T, col_ok, MASKED, MASK_COLS)
        if MASKED:
            lse = tl.load(lse_ptr + stats, mask=rows < T, other=float("inf"))
            delta = tl.load(delta_ptr + stats, mask=rows < T, other=0.0)
        else:
            lse = tl.load(lse_ptr + stats)
            delta = tl.load(delta_ptr + stats)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if SOFTCAP:
            x = tanh(x, score_in, q.dtype == tl.float32)
        p = tl.exp2(x * score_log2 - lse[None, :])
        if MASKED:
            p = tl.where((rows[None, :] >= lo[:, None]) & (rows[None, :] < hi[:, None]), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dx = p * (dp - delta[None, :])
        if SOFTCAP:
            dx *= 1.0 - x * x
        dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, doc_end_ptr, cu_q_ptr, cu_k_ptr, tiles_ptr, do_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_gb, stride_gh, stride_gt, stride_gd,
    n_heads, T, S, window, n_seqs, n_tiles, scale, score_in, score_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    DOCS: tl.constexpr, VARLEN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key head, over the query heads sharing it: dk, dv (B, S, HK, D)."""
    stride_qh, stride_qt = multiple(stride_qh, UNIT), multiple(stride_qt, UNIT)
    stride_kh, stride_ks = multiple(stride_kh, UNIT), multiple(stride_ks, UNIT)
    stride_vh, stride_vs = multiple(stride_vh, UNIT), multiple(stride_vs, UNIT)
    stride_gh, stride_gt = multiple(stride_gh, UNIT), multiple(stride_gt, UNIT)
    n_heads_k = n_heads // GROUP
    stride_stats = T
    start_n, head_k, at_q, at_k, row, stats, T, S = key_block(
        tiles_ptr, cu_q_ptr, cu_k_ptr, n_tiles, n_seqs, n_heads, T, S, VARLEN, GROUP, BLOCK_N
    )
    keys = start_n + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    key_ok = keys < S
    col_ok = cols < HEAD_DIM
    MASK_COLS: tl.constexpr = BLOCK_D != HEAD_DIM

    lo, hi, first, n_head, full, n_full, n_edge = query_plan(
        keys, key_ok, start_n, doc_end_ptr, at_k, T, S, window,
        CAUSAL, WINDOWED, DOCS, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    k_base = k_ptr + at_k * multiple(stride_kb, UNIT) + head_k.to(tl.int64) * stride_kh
    v_base = v_ptr + at_k * multiple(stride_vb, UNIT) + head_k.to(tl.int64) * stride_vh
    k_tile = tile(k_base, keys, stride_ks, cols, stride_kd)
    v_tile = tile(v_base, keys, stride_vs, cols, stride_vd)
    k = load_tile(k_tile, key_ok, col_ok, True, MASK_COLS)
    v = load_tile(v_tile, key_ok, col_ok, True, MASK_COLS)

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    head = (head_k * GROUP).to(tl.int64)
    q_base = q_ptr + at_q * multiple(stride_qb, UNIT) + head * stride_qh
    do_base = do_ptr + at_q * multiple(stride_gb, UNIT) + head * stride_gh
    q_tile = tile(q_base, tl.arange(0, BLOCK_M), stride_qt, cols, stride_qd)
    do_tile = tile(do_base, tl.arange(0, BLOCK_M), stride_gt, cols, stride_gd)
    dk, dv = _dkv_loop(
        dk, dv, k, v, q_tile, do_tile, lse_ptr + stats, delta_ptr + stats,
        stride_qh, stride_qt, stride_gh, stride_gt, stride_stats, lo, hi, col_ok, T,
        first, n_head, n_full * BLOCK_M, n_edge, score_in, score_log2,
        True, SOFTCAP, MASK_COLS, GROUP, BLOCK_M, PRECISION,
    )  # fmt: skip
    dk, dv = _dkv_loop(
        dk, dv, k, v, q_tile, do_tile, lse_ptr + stats, delta_ptr + stats,
        stride_qh, stride_qt, stride_gh, stride_gt, stride_stats, lo, hi, col_ok, T,
        full, 0, 0, n_full, score_in, score_log2,
        False, SOFTCAP, MASK_COLS, GROUP, BLOCK_M, PRECISION,
    )  # fmt: skip

    out_base = (row * n_heads_k + head_k) * HEAD_DIM
    store_ok = key_ok[:, None] & col_ok[None, :]
    dk_tile = tile(dk_ptr + out_base, keys, n_heads_k * HEAD_DIM, cols, 1)
    tl.store(dk_tile, (dk * scale).to(dk_ptr.dtype.element_ty), mask=store_ok)
    dv_tile = tile(dv_ptr + out_base, keys, n_heads_k * HEAD_DIM, cols, 1)
    tl.store(dv_tile, dv.to(dv_ptr.dtype.element_ty), mask=store_ok)

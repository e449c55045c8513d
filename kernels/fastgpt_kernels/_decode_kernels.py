"""A few new queries against a long cache, split over the keys (flash-decoding).

The T new tokens of a row are the last of its ``length`` cached ones, so that token t sees the keys
``[lo, length - T + t + 1)``, where lo is the row's first key or, with a window, the greater of
that and the upper bound - window. One program reads one run of keys, once, for all the queries
that share them: the rows of its tile are the pairs (token, query head of the key head). What any
token of the row sees is cut into n_splits runs of whole blocks; the lengths are read on the GPU, so
the runs of a row are equally long whatever its length. From run s a row gets

    o_s = sum_j exp(x_j - lse_s) v_j,   lse_s = log sum_j exp(x_j)

which the second kernel puts together in a fixed order: ``o = sum_s exp(lse_s - lse) o_s`` with
``lse = log sum_s exp(lse_s)``. Statistics are in base 2 and partial results in float32.

Legend: B batch, T new tokens, S capacity of the cache, H query heads, HK key heads, D head size.

Source: Dao, Haziza, Massa, Sizov, Flash-Decoding (2023); Milakov and Gimelshein (arXiv 1805.02867).
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

from fastgpt_kernels._attention_blocks import COUNTS, load_tile, tile
from fastgpt_kernels._attention_kernels import fwd_loop
from fastgpt_kernels._common import tl, triton
from fastgpt_kernels._units import multiple


@triton.jit(do_not_specialize=COUNTS)
def split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, starts_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    n_heads, T, S, window, n_splits, score_in, score_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One run of keys: out (B, T, H, n_splits, D) and, if SPLIT, lse (B, T, H, n_splits)."""
    stride_qh, stride_qt = multiple(stride_qh, UNIT), multiple(stride_qt, UNIT)
    stride_kh, stride_ks = multiple(stride_kh, UNIT), multiple(stride_ks, UNIT)
    stride_vh, stride_vs = multiple(stride_vh, UNIT), multiple(stride_vs, UNIT)
    pid = tl.program_id(0)
    split = pid % n_splits
    n_blocks_m = tl.cdiv(T * GROUP, BLOCK_M)
    n_heads_k = n_heads // GROUP
    rows = pid // n_splits % n_blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    head_k = pid // n_splits // n_blocks_m % n_heads_k
    batch = (pid // n_splits // n_blocks_m // n_heads_k).to(tl.int64)
    token = rows // GROUP
    head = head_k * GROUP + rows % GROUP
    row_ok = rows < T * GROUP
    cols = tl.arange(0, BLOCK_D)
    col_ok = cols < HEAD_DIM
    MASK_COLS: tl.constexpr = BLOCK_D != HEAD_DIM

    length = tl.minimum(tl.load(lengths_ptr + batch), S)
    first = 0
    if starts_ptr is not None:
        first = tl.maximum(tl.load(starts_ptr + batch), 0)
    hi = length - T + token + 1
    lo = rows * 0 + first
    if WINDOWED:
        lo = tl.maximum(lo, hi - window)
        first = tl.maximum(first, length - T + 1 - window)
    n_blocks = tl.cdiv(tl.maximum(length - first, 0), BLOCK_N)
    n_mine = tl.cdiv(n_blocks, n_splits)
    first += split * n_mine * BLOCK_N
    n_mine = tl.maximum(tl.minimum(n_mine, n_blocks - split * n_mine), 0)

    q_base = q_ptr + batch * multiple(stride_qb, UNIT)
    q_rows = token.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    q = load_tile(tile(q_base, q_rows, 1, cols, stride_qd), row_ok, col_ok, True, MASK_COLS)
    k_base = k_ptr + batch * multiple(stride_kb, UNIT) + head_k.to(tl.int64) * stride_kh
    v_base = v_ptr + batch * multiple(stride_vb, UNIT) + head_k.to(tl.int64) * stride_vh
    k_tile = tile(k_base, tl.arange(0, BLOCK_N), stride_ks, cols, stride_kd)
    v_tile = tile(v_base, tl.arange(0, BLOCK_N), stride_vs, cols, stride_vd)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    acc, total, peak = fwd_loop(
        acc, total, peak, q, k_tile, v_tile, stride_ks, stride_vs, lo, hi, col_ok, length,
        first, n_mine, 0, n_mine, score_in, score_log2,
        True, SOFTCAP, MASK_COLS, BLOCK_N, PRECISION,
    )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc *= (1.0 / total)[:, None]
    # The program's first row apart from the rest: less is kept, or spilled, while the loop runs.
    at = (batch * T * n_heads + head_k * GROUP) * n_splits + split
    out_rows = (token.to(tl.int64) * n_heads + rows % GROUP) * n_splits
    if SPLIT:
        lse = tl.where(empty, -float("inf"), peak + tl.log2(total))
        tl.store(lse_ptr + at + out_rows, lse, mask=row_ok)
    out_tile = tile(out_ptr + at * HEAD_DIM, out_rows, HEAD_DIM, cols, 1)
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit(do_not_specialize=["n_splits"])
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, n_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One row of out (rows, D) from part (rows, n_splits, D) and lse (rows, n_splits)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    col_ok = cols < HEAD_DIM
    splits = tl.arange(0, BLOCK_S)
    lse_ptr += row * n_splits
    part_ptr += row * n_splits * HEAD_DIM
    highest = tl.full([BLOCK_S], -float("inf"), dtype=tl.float32)
    for first in range(0, n_splits, BLOCK_S):
        s = first + splits
        lse = tl.load(lse_ptr + s, mask=s < n_splits, other=-float("inf"))
        highest = tl.maximum(highest, lse)
    peak = tl.max(highest, 0)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.zeros([BLOCK_S], dtype=tl.float32)
    acc = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for first in range(0, n_splits, BLOCK_S):
        s = first + splits
        lse = tl.load(lse_ptr + s, mask=s < n_splits, other=-float("inf"))
        weight = tl.exp2(lse - peak)
        total += weight
        part_tile = tile(part_ptr, s, HEAD_DIM, cols, 1)
        acc += weight[:, None] * load_tile(part_tile, s < n_splits, col_ok, True, True)
    sum_weight = tl.sum(total, 0)
    sum_weight = tl.where(sum_weight == 0.0, 1.0, sum_weight)
    out = tl.sum(acc, 0) * (1.0 / sum_weight)
    tl.store(out_ptr + row * HEAD_DIM + cols, out.to(out_ptr.dtype.element_ty), mask=col_ok)

"""Which block of an attention problem a program does, what it may see there, and tile addresses.

The masks are explained in ``_attention_kernels.py``, whose kernels share these helpers with those
of decoding.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

from fastgpt_kernels._common import tl, triton

COUNTS = ["n_heads", "T", "S", "window", "n_seqs", "n_tiles", "n_splits"]
"""Arguments of the kernels of attention that nothing new is compiled for."""


@triton.jit
def multiply(x, y, PAIRWISE: tl.constexpr):
    """x * y; with ``PAIRWISE`` two of them in one instruction, the same bits.

    Chips from sm_100 on have such instructions, and compilers do not choose them.
    """
    if PAIRWISE:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 a, b, c; mov.b64 a, {$2, $3}; mov.b64 b, {$4, $5};"
            " mul.rn.f32x2 c, a, b; mov.b64 {$0, $1}, c; }",
            "=r,=r,r,r,r,r", [x, y], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return x * y


@triton.jit
def multiply_subtract(x, y, z, PAIRWISE: tl.constexpr):
    """x * y - z; ``PAIRWISE`` as in ``multiply``, rounded once, as compilers do elsewhere."""
    if PAIRWISE:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 a, b, c, d; mov.b64 a, {$2, $3}; mov.b64 b, {$4, $5};"
            " mov.b64 c, {$6, $7}; fma.rn.f32x2 d, a, b, c; mov.b64 {$0, $1}, d; }",
            "=r,=r,r,r,r,r,r,r", [x, y, -z], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return x * y - z


@triton.jit
def tile(base, rows, stride_row, cols, stride_col):
    """Pointers to a (rows, cols) tile; the products are 64-bit because views may span > 2^31."""
    row_offsets = rows.to(tl.int64)[:, None] * stride_row
    return base + row_offsets + cols.to(tl.int64)[None, :] * stride_col


@triton.jit
def load_tile(pointers, row_ok, col_ok, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Load a tile; what lies outside is 0, so that it adds nothing to a dot product."""
    if MASK_ROWS and MASK_COLS:
        return tl.load(pointers, mask=row_ok[:, None] & col_ok[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=row_ok[:, None], other=0.0)
    if MASK_COLS:
        return tl.load(pointers, mask=col_ok[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _row(found, n_rows):
    """An entry of ``cu_seqlens`` that leads nowhere outside the tensors, whatever was found."""
    return tl.minimum(tl.maximum(found, 0), n_rows)


@triton.jit(do_not_specialize=["n_seqs", "n_rows", "n_tiles"])
def tiles_kernel(
    cu_ptr, tiles_ptr, n_seqs, n_rows, n_tiles, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Program s lists the blocks of rows of packed sequence s: its number, and their first rows.

    ``tiles`` is (2, n_tiles). Sequence ``n_seqs`` is what lies behind the last one, up to n_rows;
    it gets the tiles nobody needs, too. So the host knows how many programs to launch without
    knowing the lengths: rounding up costs each sequence less than one block.
    """
    seq = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    before = 0
    for first in range(0, seq, CHUNK):
        i = first + lane
        begin = _row(tl.load(cu_ptr + i, mask=i < seq, other=0), n_rows)
        end = _row(tl.load(cu_ptr + i + 1, mask=i < seq, other=0), n_rows)
        before += tl.sum(tl.cdiv(tl.maximum(end - begin, 0), BLOCK), 0)
    count = n_tiles - before
    if seq < n_seqs:
        begin, end = _row(tl.load(cu_ptr + seq), n_rows), _row(tl.load(cu_ptr + seq + 1), n_rows)
        count = tl.minimum(count, tl.cdiv(end - begin, BLOCK))
    for first in range(0, count, CHUNK):
        i = first + lane
        tl.store(tiles_ptr + before + i, seq + i * 0, mask=i < count)
        tl.store(tiles_ptr + n_tiles + before + i, i * BLOCK, mask=i < count)


@triton.jit
def _sequence_block(tiles_ptr, cu_own_ptr, cu_other_ptr, block, n_tiles, n_seqs, n_own, n_other):
    """Of a tile of ``tiles_kernel``: its first row within its sequence, and both sides' extents.

    Returns (start, own_first, own_length, other_first, other_length); "own" is the side the tiles
    cut up. Behind the last sequence there is nothing on the other side.
    """
    seq = tl.load(tiles_ptr + block)
    start = tl.load(tiles_ptr + n_tiles + block)
    own, other = _row(tl.load(cu_own_ptr + seq), n_own), _row(tl.load(cu_other_ptr + seq), n_other)
    behind = tl.minimum(seq + 1, n_seqs)
    own_end = tl.where(seq < n_seqs, _row(tl.load(cu_own_ptr + behind), n_own), n_own)
    other_end = tl.maximum(_row(tl.load(cu_other_ptr + behind), n_other), other)
    return start, own.to(tl.int64), own_end - own, other.to(tl.int64), other_end - other


@triton.jit
def query_block(
    tiles_ptr, cu_q_ptr, cu_k_ptr, n_tiles, n_seqs, n_heads, T, S,
    VARLEN: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The block of queries this program does: (start, head, at_q, at_k, row, stats, T, S).

    ``at_q`` and ``at_k`` meet the leading strides, of a batch or of packed rows; ``row`` counts the
    rows of the output before this batch or sequence, ``stats`` the row statistics before it.
    """
    pid = tl.program_id(0)
    if VARLEN:
        head = pid // n_tiles
        block = n_tiles - 1 - pid % n_tiles
        start, at_q, n_q, at_k, n_k = _sequence_block(
            tiles_ptr, cu_q_ptr, cu_k_ptr, block, n_tiles, n_seqs, T, S
        )
        return start, head, at_q, at_k, at_q, head.to(tl.int64) * T + at_q, n_q, n_k
    else:
        # Last queries first: under a causal mask they have the most keys, and a long block that
        # starts last leaves the other processors idle.
        n_blocks = tl.cdiv(T, BLOCK_M)
        start = (n_blocks - 1 - pid % n_blocks) * BLOCK_M
        batch = (pid // n_blocks // n_heads).to(tl.int64)
        head = pid // n_blocks % n_heads
        return start, head, batch, batch, batch * T, (batch * n_heads + head) * T, T, S


@triton.jit
def key_block(
    tiles_ptr, cu_q_ptr, cu_k_ptr, n_tiles, n_seqs, n_heads, T, S,
    VARLEN: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Like ``query_block`` for keys; ``row`` counts keys, ``stats`` is that of the first head."""
    pid = tl.program_id(0)
    if VARLEN:
        head_k = pid // n_tiles
        start, at_k, n_k, at_q, n_q = _sequence_block(
            tiles_ptr, cu_k_ptr, cu_q_ptr, pid % n_tiles, n_tiles, n_seqs, S, T
        )
        stats = (head_k * GROUP).to(tl.int64) * T + at_q
        return start, head_k, at_q, at_k, at_k, stats, n_q, n_k
    else:
        n_blocks = tl.cdiv(S, BLOCK_N)
        start = pid % n_blocks * BLOCK_N
        n_heads_k = n_heads // GROUP
        batch = (pid // n_blocks // n_heads_k).to(tl.int64)
        head_k = pid // n_blocks % n_heads_k
        stats = (batch * n_heads + (head_k * GROUP).to(tl.int64)) * T
        return start, head_k, batch, batch, batch * S, stats, T, S


@triton.jit
def key_bounds(rows, doc, T, S, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The keys [lo, hi) each query row sees; ``doc`` is its first key by document, or 0."""
    lo = tl.maximum(doc, 0)
    hi = rows * 0 + S
    if CAUSAL:
        hi = tl.minimum(tl.maximum(rows + (S - T) + 1, 0), S)
    if WINDOWED:
        lo = tl.maximum(lo, rows + (S - T) - window + 1)
    return lo, hi


@triton.jit
def query_bounds(keys, doc_end, T, S, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The queries [lo, hi) that see each key; ``doc_end`` ends them by document, or is T."""
    lo = keys * 0
    hi = tl.minimum(doc_end, T)
    if CAUSAL:
        lo = tl.maximum(keys - (S - T), 0)
    if WINDOWED:
        hi = tl.minimum(hi, tl.maximum(keys - (S - T) + window, 0))
    return lo, hi


@triton.jit
def split(lo_min, lo_max, hi_min, hi_max, BLOCK: tl.constexpr):
    """Split [lo_min, hi_max) into blocks of which [full, full + n_full * BLOCK) need no mask.

    lo_* and hi_* are the least and greatest bounds in the other dimension's block. Returns
    (first, n_head, full, n_full, n_edge): the masked blocks are n_head from ``first`` on and
    n_edge - n_head after the full ones, which one loop can walk.
    """
    first = lo_min // BLOCK * BLOCK
    full = tl.minimum(tl.cdiv(lo_max, BLOCK) * BLOCK, tl.maximum(hi_max, first))
    n_full = tl.maximum(hi_min // BLOCK * BLOCK - full, 0) // BLOCK
    n_head = tl.cdiv(full - first, BLOCK)
    n_tail = tl.cdiv(tl.maximum(hi_max - full - n_full * BLOCK, 0), BLOCK)
    return first, n_head, full, n_full, n_head + n_tail


@triton.jit
def key_plan(
    rows, row_ok, start_m, doc_ptr, batch, T, S, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, DOCS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Per row the keys [lo, hi) it sees, and the ``split`` of what a block of queries sees."""
    doc, doc_min, doc_max = rows * 0, 0, 0
    last = tl.minimum(start_m + BLOCK_M, T) - 1
    if DOCS:
        doc_ptr += batch * T
        doc = tl.load(doc_ptr + rows, mask=row_ok, other=0)
        doc_min = tl.load(doc_ptr + start_m)
        doc_max = tl.load(doc_ptr + last)
    lo, hi = key_bounds(rows, doc, T, S, window, CAUSAL, WINDOWED)
    lo_min, hi_min = key_bounds(start_m, doc_min, T, S, window, CAUSAL, WINDOWED)
    lo_max, hi_max = key_bounds(last, doc_max, T, S, window, CAUSAL, WINDOWED)
    first, n_head, full, n_full, n_edge = split(lo_min, lo_max, hi_min, hi_max, BLOCK_N)
    return lo, hi, first, n_head, full, n_full, n_edge


@triton.jit
def query_plan(
    keys, key_ok, start_n, doc_end_ptr, batch, T, S, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, DOCS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Per key the queries [lo, hi) that see it, and the ``split`` for a block of keys."""
    doc_end, end_min, end_max = keys * 0 + T, T, T
    last = tl.minimum(start_n + BLOCK_N, S) - 1
    if DOCS:
        doc_end_ptr += batch * S
        doc_end = tl.load(doc_end_ptr + keys, mask=key_ok, other=0)
        end_min = tl.load(doc_end_ptr + start_n)
        end_max = tl.load(doc_end_ptr + last)
    lo, hi = query_bounds(keys, doc_end, T, S, window, CAUSAL, WINDOWED)
    lo_min, hi_min = query_bounds(start_n, end_min, T, S, window, CAUSAL, WINDOWED)
    lo_max, hi_max = query_bounds(last, end_max, T, S, window, CAUSAL, WINDOWED)
    first, n_head, full, n_full, n_edge = split(lo_min, lo_max, hi_min, hi_max, BLOCK_M)
    return lo, hi, first, n_head, full, n_full, n_edge

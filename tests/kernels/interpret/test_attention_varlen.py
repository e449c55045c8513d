"""Attention over packed sequences in the interpreter, against one sequence at a time in float64."""

from __future__ import annotations

import importlib
import sys
from itertools import accumulate, pairwise
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.attention import attention
from fastgpt_kernels.attention_varlen import attention_varlen

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 20},
    {"softcap": 2.0},
    {"causal": False},
)
module = importlib.import_module("fastgpt_kernels.attention_varlen")


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def one_by_one(function, cu_q: Tensor, cu_k: Tensor):
    """``function`` on (1, H, t, D) of each sequence, zeros elsewhere."""

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            heads_first = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            parts.append(function(*heads_first)[0].transpose(0, 1))
        nothing = 0.0 * (k.sum() + v.sum())  # part of the graph even if there is no sequence
        return torch.cat([*parts, 0.0 * q[cu_q[-1] :] + nothing])

    return packed


def judge(
    lengths: list[int],
    lengths_k: list[int] | None = None,
    *,
    D: int = 32,
    heads: tuple[int, int] = (2, 1),
    dtype: torch.dtype = torch.float32,
    spare: int = 0,
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous"),
    grad: str = "random",
    **options,
) -> None:
    cu_q = cumulative(lengths)
    cu_k = cu_q if lengths_k is None else cumulative(lengths_k)
    H, HK = heads

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, **options)

    def native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = reference.attention_mask(
            q.shape[2], k.shape[2],
            causal=options.get("causal", True), window=options.get("window"),
        )  # fmt: skip
        if "softcap" in options or not seen.any(-1).all():
            return exact(q, k, v)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=options.get("scale"), enable_gqa=True
        )

    T, S = (int(cu[-1]) + spare for cu in (cu_q, cu_k))
    harness.compare(
        ours=lambda q, k, v: attention_varlen(
            q, k, v, cu_q, None if lengths_k is None else cu_k, **options
        ),
        native=one_by_one(native, cu_q, cu_k),
        exact=one_by_one(exact, cu_q, cu_k),
        inputs=[torch.randn(n, h, D).to(dtype) for n, h in ((T, H), (S, HK), (S, HK))],
        layouts=layouts,
        grad_output=grad,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths_around_blocks(dtype):
    judge([1, 64, 17, 65, 0, 2], dtype=dtype)


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([70], {"causal": False}),
        ([3, 66, 20], {"window": 16}),
        ([40, 30], {"window": 9, "causal": False}),
        ([40, 67], {"softcap": 2.0, "scale": 0.4}),
    ],
    ids=str,
)
def test_options(lengths, options):
    judge(lengths, **options)


@pytest.mark.parametrize(
    ("lengths", "lengths_k"),
    [
        ([5, 0, 70, 9, 1], [70, 8, 5, 0, 129]),  # queries or keys alone, fewer and more of either
        ([33, 64], [64, 33]),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_other_lengths_of_keys(lengths, lengths_k, causal):
    judge(lengths, lengths_k, causal=causal)


@pytest.mark.parametrize("lengths", [[0, 0, 10, 0], [0], [], [0, 64, 0, 0]], ids=str)
def test_empty_sequences(lengths):
    judge(lengths, spare=3, grad="random")


@pytest.mark.parametrize("spare", [1, 64, 150])
def test_rows_behind_the_last_sequence_give_and_get_zeros(spare):
    cu = cumulative([20, 50])
    q, k, v = (torch.randn(70 + spare, h, 32, requires_grad=True) for h in (2, 1, 1))
    out = attention_varlen(q, k, v, cu, window=30)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    for x in (out, *grads):
        assert (x[70:] == 0).all()
        assert x[:70].isfinite().all()
        assert (x[:70] != 0).any()
    if spare == 64:
        judge([20, 50], spare=spare)


@pytest.mark.parametrize(
    ("D", "heads", "dtype"),
    [
        (40, (4, 2), torch.bfloat16),
        (80, (1, 1), torch.float16),
        (96, (4, 1), torch.bfloat16),
        (128, (2, 2), torch.float32),
        (256, (2, 1), torch.bfloat16),
    ],
    ids=str,
)
def test_heads_and_head_sizes(D, heads, dtype):
    judge([33, 70], D=D, heads=heads, dtype=dtype, spare=2)


@pytest.mark.parametrize(
    "layouts",
    [("transposed", "padded", "offset"), ("padded", "offset", "transposed")],
    ids=str,
)
def test_layouts(layouts):
    judge([33, 40], D=40, dtype=torch.bfloat16, layouts=layouts, grad="expanded", heads=(2, 2))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [32, 40, 64, 80, 96, 128, 256])
def test_matrix(D, dtype):
    for heads in ((1, 1), (4, 2), (4, 1)):
        for options in VARIANTS:
            judge([1, 63, 0, 64, 65, 129], D=D, heads=heads, dtype=dtype, spare=5, **options)
            judge([17, 2, 128], [64, 0, 65], D=D, heads=heads, dtype=dtype, **options)


def test_equals_attention_under_a_document_mask():
    """Bit for bit would ask for the same blocks; float32 makes the difference rounding alone."""
    lengths = [13, 70, 1, 46]
    cu = cumulative(lengths)
    starts = torch.repeat_interleave(cu[:-1], torch.tensor(lengths))[None]
    q, k, v = (torch.randn(130, h, 32, requires_grad=True) for h in (2, 1, 1))
    packed = attention_varlen(q, k, v, cu)
    dense = attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), doc_start=starts)
    grad = torch.randn_like(packed)
    torch.testing.assert_close(packed, dense[0].transpose(0, 1))
    for a, b in zip(
        torch.autograd.grad(packed, (q, k, v), grad),
        torch.autograd.grad(dense, (q, k, v), grad.transpose(0, 1)[None]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("lengths", "n_rows", "block"),
    [([5, 0, 16, 17, 1], 50, 16), ([], 20, 16), ([3] * 300, 900, 16), ([1, 40], 41, 64)],
    ids=str,
)
def test_every_row_has_one_tile(lengths, n_rows, block):
    cu = cumulative(lengths)
    sequences, starts = module._tiles(cu, n_rows, block).tolist()
    covered = []
    for sequence, start in zip(sequences, starts, strict=True):
        end = cu[sequence + 1] if sequence < len(lengths) else n_rows
        first = int(cu[sequence]) + start
        covered += range(first, min(first + block, int(end)))
    assert sorted(covered) == list(range(n_rows))


def test_cu_seqlens_that_exceed_the_rows_stay_inside_memory():
    q, k, v = (harness.guard(torch.randn(30, 1, 32)) for _ in range(3))
    out = attention_varlen(q, k, v, torch.tensor([0, 20, 500, 90], dtype=torch.int32))
    assert out.isfinite().all()


def test_two_runs_give_the_same_bits():
    q, k, v = (torch.randn(80, h, 32, requires_grad=True) for h in (2, 1, 1))
    runs = []
    for _ in range(2):
        out = attention_varlen(q, k, v, cumulative([10, 66]), window=40)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_launch_depends_on_the_lengths(monkeypatch):
    """The same programs, whatever the lengths of as many sequences in as many rows."""
    seen: list[tuple] = []
    launch = module.launch

    def watched(kernel, n_programs, *args, **options):
        scalars = [x for x in args if not isinstance(x, Tensor)]
        seen.append((kernel.__name__, n_programs, *scalars, *options.values()))
        launch(kernel, n_programs, *args, **options)

    monkeypatch.setattr(module, "launch", watched)
    runs = []
    for lengths in ([30, 30, 9], [1, 0, 68], [0, 0, 0]):
        q = torch.randn(69, 1, 16, requires_grad=True)
        attention_varlen(q, q, q, cumulative(lengths)).sum().backward()
        runs.append(tuple(seen))
        seen.clear()
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) == 6


def test_operators_pass_opcheck():
    q, k, v = (torch.randn(20, h, 16, requires_grad=True) for h in (2, 1, 1))
    cu, options = cumulative([7, 0, 12]), (True, 0.3, 7, 2.0)
    torch.library.opcheck(module._attention, (q, k, v, cu, cu, *options))
    out, lse = module._attention(q, k, v, cu, cu, *options)
    saved = [x.detach() for x in (q, k, v, out, lse)]
    grads = torch.randn(2, 20, 16).transpose(0, 1), torch.randn_like(lse)
    torch.library.opcheck(module._attention_backward, (*grads, *saved, cu, cu, *options))


@pytest.mark.parametrize("window", [2**31 - 1, sys.maxsize])
def test_windows_that_hide_nothing(window):
    cu = cumulative((40, 0, 60))
    q, k, v = (torch.randn(100, 2, 16, requires_grad=True) for _ in range(3))
    grad = torch.randn(100, 2, 16)
    found, expected = [], []
    for results, options in ((found, {"window": window}), (expected, {})):
        out = attention_varlen(q, k, v, cu, **options)
        results += [out, *torch.autograd.grad(out, (q, k, v), grad)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("entries", [[60, 0], [0, 60, 0, 30], [-100, 30], [0, -5, 90, 60], [7, 7]])
def test_whatever_cu_seqlens_hold_the_kernels_stay_inside(entries):
    cu = torch.tensor(entries, dtype=torch.int32)
    n_tiles = (60 + len(entries) * 15) // 16
    memory = torch.full((3, 2 * n_tiles), -7, dtype=torch.int32)
    arguments = (cu, memory[1], len(entries) - 1, 60, n_tiles)
    module.launch(module.tiles_kernel, len(entries), *arguments, BLOCK=16, **module._TILES)
    assert (memory[::2] == -7).all()
    inputs = [harness.guard(torch.randn(60, 2, 16)) for _ in range(4)]
    q, k, v, grad = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    attention_varlen(*leaves, cu).backward(grad)
    harness.assert_unwritten(*inputs)

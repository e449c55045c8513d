"""Packed and cached attention, and the log-sum-exp, on the CPU path: numerics, tracing, errors."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastgpt_kernels import (
    _cpu_attention,
    attention,
    attention_decode,
    attention_varlen,
    attention_with_lse,
    reference,
)

DTYPES = (torch.float32, torch.bfloat16)


def cumulative(*lengths: int) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def peer_varlen(cu_q: Tensor, cu_k: Tensor | None, **options: Any):
    """PyTorch's attention of each sequence in the dtype it gets."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if "softcap" in options or cu_k is not None:
            return reference.attention_varlen(q, k, v, cu_q, cu_k, **options)
        parts = []
        for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
            q1, k1, v1 = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            seen = reference.attention_mask(
                end - start, end - start,
                causal=options.get("causal", True), window=options.get("window"),
            )  # fmt: skip
            out = F.scaled_dot_product_attention(
                q1, k1, v1, attn_mask=seen, scale=options.get("scale"), enable_gqa=True
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat([*parts, 0.0 * q[cu_q[-1] :]])

    return run


PACKED = [
    (cumulative(3, 0, 40, 1, 17), None, {}),
    (cumulative(30, 9), None, {"causal": False, "scale": 0.3}),
    (cumulative(50, 9), None, {"window": 8}),
    (cumulative(20, 9), None, {"softcap": 2.0}),
    (cumulative(20, 9), None, {"softcap": 2.0, "window": 5}),
    (cumulative(5, 0, 30, 9), cumulative(30, 4, 5, 0), {}),
    (cumulative(5, 30), cumulative(30, 5), {"softcap": 3.0}),
    (cumulative(5, 30), cumulative(30, 5), {"causal": False, "window": 4}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cu_q", "cu_k", "options"), PACKED, ids=str)
def test_varlen(cu_q, cu_k, options, dtype):
    T, S = int(cu_q[-1]) + 4, int((cu_q if cu_k is None else cu_k)[-1]) + 4
    harness.compare(
        ours=lambda q, k, v: attention_varlen(q, k, v, cu_q, cu_k, **options),
        native=peer_varlen(cu_q, cu_k, **options),
        exact=lambda q, k, v: reference.attention_varlen(q, k, v, cu_q, cu_k, **options),
        inputs=[torch.randn(n, h, 40).to(dtype) for n, h in ((T, 4), (S, 2), (S, 2))],
        layouts=("padded", "transposed", "contiguous"),
    )


def test_varlen_equals_attention_under_a_document_mask():
    cu = cumulative(13, 70, 1, 46)
    starts = torch.repeat_interleave(cu[:-1], cu.diff())[None]
    q, k, v = (torch.randn(130, h, 32, requires_grad=True) for h in (4, 2, 2))
    packed = attention_varlen(q, k, v, cu)
    dense = attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), doc_start=starts)
    torch.testing.assert_close(packed, dense[0].transpose(0, 1))
    for a, b in zip(
        torch.autograd.grad(packed.square().sum(), (q, k, v)),
        torch.autograd.grad(dense.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "options"),
    [
        (1, {}),
        (3, {"window": 30}),
        (2, {"softcap": 2.0, "scale": 0.4}),
        (1, {"cache_starts_B": ints(0, 50, 2, 0)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("row_lengths", [ints(60, 60, 60, 60), ints(70, 3, 0, 64)], ids=str)
def test_decode(T, options, row_lengths, dtype):
    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention_decode(q, k, v, row_lengths, **options)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return attention_decode(q, k, v, row_lengths, **options)

    harness.compare(
        ours=ours,
        native=exact,
        exact=exact,
        inputs=[torch.randn(4, n, h, 32).to(dtype) for n, h in ((T, 4), (70, 2), (70, 2))],
        layouts=("padded", "transposed", "contiguous"),
        grad_output=None,
    )


@pytest.mark.parametrize("S", [40, 70])
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 9, "softcap": 2.0, "scale": 0.4}], ids=str
)
def test_log_sum_exp(options, S):
    weights = torch.randn(2, 4, 70)

    def joined(function):
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = function(q, k, v, **options)
            kept = torch.where(lse == -torch.inf, 0.0, lse)
            return torch.cat([out.flatten(), (kept * weights).flatten()])

        return run

    inputs = [torch.randn(2, h, n, 32) for h, n in ((4, 70), (2, S), (2, S))]
    harness.compare(
        ours=joined(attention_with_lse),
        native=joined(reference.attention_with_lse),
        exact=joined(reference.attention_with_lse),
        inputs=inputs,
    )
    ours, exact = (
        function(*inputs, **options)[1]
        for function in (attention_with_lse, reference.attention_with_lse)
    )
    assert torch.equal(ours == -torch.inf, exact == -torch.inf)


def test_operators_pass_opcheck():
    q, k, v = (torch.randn(20, h, 16, requires_grad=True) for h in (2, 1, 1))
    cu = cumulative(7, 0, 12)
    for options in ((True, 0.3, 0, 0.0), (False, 0.3, 7, 2.0)):
        torch.library.opcheck(_cpu_attention._varlen, (q, k, v, cu, cu, *options))
        out, lse = _cpu_attention._varlen(q, k, v, cu, cu, *options)
        saved = [x.detach() for x in (out, q, k, v, out, lse)]
        torch.library.opcheck(_cpu_attention._varlen_backward, (*saved, cu, cu, *options))
    cache = torch.randn(2, 9, 1, 16)
    arguments = (torch.randn(2, 1, 2, 16), cache, cache, ints(9, 3), None, 0.3, 0, 0.0)
    torch.library.opcheck(_cpu_attention._decode_op, arguments)


def packed_loss(q: Tensor, k: Tensor, cu: Tensor) -> Tensor:
    return attention_varlen(q, k, k, cu, window=9).square().sum()


def cached(q: Tensor, k: Tensor, cu: Tensor) -> Tensor:
    with torch.no_grad():
        return attention_decode(q[None, :2], k[None], k[None], cu[1:2])


@pytest.mark.parametrize("function", [packed_loss, cached])
def test_compiles_without_a_break_or_a_recompile(function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for first, second in ((5, 3), (17, 0), (30, 33), (64, 1), (65, 7)):
        q = torch.randn(first + second, 2, 16, requires_grad=True)
        k, cu = torch.randn(first + second, 1, 16), cumulative(first, second)
        result, expected = compiled(q, k, cu), function(q, k, cu)
        torch.testing.assert_close(result, expected)
        if result.requires_grad:
            torch.testing.assert_close(
                torch.autograd.grad(result, q), torch.autograd.grad(expected, q)
            )
    assert counter.frame_count == 1


PACKED_SHAPES = {"q": (9, 4, 16), "k": (9, 2, 16), "v": (9, 2, 16)}
CU = cumulative(4, 5)


@pytest.mark.parametrize(
    ("shapes", "cu_q", "cu_k", "options", "message"),
    [
        ({"q": (1, 9, 4, 16)}, CU, None, {}, "should be"),
        ({"k": (9, 3, 16), "v": (9, 3, 16)}, CU, None, {}, "multiple"),
        ({"q": (9, 0, 16)}, CU, None, {}, "multiple"),
        ({"k": (9, 2, 8), "v": (9, 2, 8)}, CU, None, {}, "D must be"),
        ({}, CU.long(), None, {}, "cu_seqlens_q is .* torch.int64"),
        ({}, CU[:0], None, {}, "cu_seqlens_q is"),
        ({}, CU, CU[:2], {}, "2 and 1 sequences"),
        ({}, CU, None, {"window": 0}, "attention_varlen: window is 0"),
    ],
)
def test_misuse_of_varlen_is_named(shapes, cu_q, cu_k, options, message):
    q, k, v = (torch.randn(shape) for shape in {**PACKED_SHAPES, **shapes}.values())
    with pytest.raises(ValueError, match=message):
        attention_varlen(q, k, v, cu_q, cu_k, **options)


CACHE_SHAPES = {"q": (2, 1, 4, 16), "k": (2, 9, 2, 16), "v": (2, 9, 2, 16)}


@pytest.mark.parametrize(
    ("shapes", "row_lengths", "options", "message"),
    [
        ({"v": (2, 8, 2, 16)}, ints(1, 2), {}, "should be"),
        ({"k": (1, 9, 2, 16), "v": (1, 9, 2, 16)}, ints(1, 2), {}, "B and D"),
        ({}, ints(1), {}, "cache_seqlens_B is"),
        ({}, ints(1, 2), {"cache_starts_B": ints(1, 2).long()}, "cache_starts_B is"),
        ({}, ints(1, 2), {"softcap": -1.0}, "attention_decode: softcap is -1.0"),
    ],
)
def test_misuse_of_decode_is_named(shapes, row_lengths, options, message):
    q, k, v = (torch.randn(shape) for shape in {**CACHE_SHAPES, **shapes}.values())
    with pytest.raises(ValueError, match=message):
        attention_decode(q, k, v, row_lengths, **options)


def test_decode_says_that_it_has_no_gradient():
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in CACHE_SHAPES.values())
    with pytest.raises(ValueError, match="no gradient"):
        attention_decode(q, k, v, ints(1, 2))
    with torch.no_grad():
        assert not attention_decode(q, k, v, ints(1, 2)).requires_grad

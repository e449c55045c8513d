"""Attention outside the interpreter: the CPU path, its errors, and how it traces."""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastgpt_kernels import attention as public
from fastgpt_kernels import attention_decode, attention_varlen, reference
from fastgpt_kernels.attention import (
    _attention,
    _attention_backward,
    attention,
    attention_with_lse,
)

B, H, HK, T, D = 2, 4, 2, 70, 32


def documents() -> Tensor:
    cuts = torch.rand(B, T) < 0.05
    return torch.where(cuts, torch.arange(T), 0).cummax(1).values.int()


CASES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 20},
    "window without causal": {"window": 20, "causal": False},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.3},
    "documents": {"doc_start": True},
    "documents, window, softcap": {"doc_start": True, "window": 30, "softcap": 5.0},
    "documents without causal": {"doc_start": True, "causal": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("S", [T, 129, 40])
@pytest.mark.parametrize("name", CASES)
def test_cpu_path(name, S, dtype):
    options = dict(CASES[name])
    docs = documents() if options.pop("doc_start", None) else None

    def exact(q, k, v):
        return reference.attention(q, k, v, doc_start_BT=docs, **options)

    def native(q, k, v):
        seen = reference.attention_mask(
            T,
            S,
            causal=options.get("causal", True),
            window=options.get("window"),
            doc_start_BT=docs,
        )
        # Off plain self-attention the CPU path rounds scores to the dtype, as PyTorch's maths does.
        if "softcap" in options or S != T or not seen.any(-1).all():
            return exact(q, k, v)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=options.get("scale"), enable_gqa=True
        )

    harness.compare(
        ours=lambda q, k, v: attention(q, k, v, doc_start=docs, **options),
        native=native,
        exact=exact,
        inputs=[torch.randn(B, h, n, D).to(dtype) for h, n in ((H, T), (HK, S), (HK, S))],
        layouts=("padded", "transposed", "contiguous"),
    )


def test_rows_without_keys_give_exact_zeros():
    q, k, v = (torch.randn(1, 2, n, 32, requires_grad=True) for n in (100, 60, 60))
    out = attention(q, k, v)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (out[:, :, :40] == 0).all()
    assert (grads[0][:, :, :40] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_public_name_is_the_function():
    assert public is attention


def test_compiles_once_without_graph_break():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for length in (5, 17, 33, 64, 65):
        q, k = torch.randn(1, 2, length, 16, requires_grad=True), torch.randn(1, 1, length, 16)
        out, expected = compiled(q, k, k), attention(q, k, k)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), q), torch.autograd.grad(expected.sum(), q)
        )
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_operators_describe_their_results():
    """What torch.compile sees of the Triton operators: shapes, dtypes, strides, gradients."""
    q = torch.empty(2, 4, 70, 40, dtype=torch.bfloat16, device="meta", requires_grad=True)
    k = torch.empty(2, 2, 90, 40, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out, lse = _attention(q, k, k, None, True, 0.3, 7, 0.0)
    assert (out.shape, out.dtype, lse.dtype) == (q.shape, q.dtype, torch.float32)
    assert out.transpose(1, 2).is_contiguous()
    dq, dk, dv = _attention_backward(out, lse, q, k, k, out, lse, None, True, 0.3, 7, 0.0)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


GOOD = {"q": (2, 4, 8, 16), "k": (2, 2, 8, 16), "v": (2, 2, 8, 16)}
BAD = [
    ({"k": (2, 3, 8, 16), "v": (2, 3, 8, 16)}, {}, "multiple"),
    ({"q": (2, 0, 8, 16)}, {}, "multiple"),
    ({"k": (1, 2, 8, 16), "v": (1, 2, 8, 16)}, {}, "B and D"),
    ({"k": (2, 2, 8, 32), "v": (2, 2, 8, 32)}, {}, "B and D"),
    ({"v": (2, 2, 9, 16)}, {}, "twice the same"),
    ({"q": (4, 8, 16)}, {}, "twice the same"),
    ({}, {"window": 0}, "window is 0"),
    ({}, {"window": 2.5}, "window is 2.5, it must be a whole number"),
    ({}, {"scale": -1.0}, "scale is -1.0"),
    ({}, {"softcap": 0.0}, "softcap is 0.0"),
    ({}, {"doc_start": torch.zeros(2, 9, dtype=torch.int32)}, "doc_start"),
    ({}, {"doc_start": torch.zeros(2, 8, dtype=torch.int64)}, "torch.int32"),
]


@pytest.mark.parametrize(("shapes", "options", "message"), BAD)
def test_misuse_is_named(shapes, options, message):
    q, k, v = (torch.randn(shape) for shape in {**GOOD, **shapes}.values())
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **options)


def test_dtypes_that_do_not_fit_are_named():
    q, k = torch.randn(GOOD["q"]), torch.randn(GOOD["k"])
    with pytest.raises(ValueError, match="cast them to one"):
        attention(q, k.half(), k)
    with pytest.raises(ValueError, match="float64"):
        attention(q.double(), k.double(), k.double())
    with pytest.raises(ValueError, match="head sizes 1 to 256"):
        attention(*(torch.randn(1, 1, 2, 300) for _ in range(3)))


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_casts_as_of_pytorch(enabled):
    """Rotary embedding and q and k norms give float32, beside values in bfloat16."""
    q, k = torch.randn(2, 1, 2, 9, 16).unbind(0)
    v = torch.randn(1, 2, 9, 16)
    cu = torch.tensor([0, 9], dtype=torch.int32)
    length = torch.tensor([9], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        outs = [
            attention(q, k, v),
            attention_with_lse(q, k, v)[0],
            attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), cu).transpose(0, 1)[None],
            attention_decode(*(x.transpose(1, 2) for x in (q, k, v)), length).transpose(1, 2),
        ]
        if enabled:
            outs.append(attention(q, k, v.bfloat16()))
    assert expected.dtype == (torch.bfloat16 if enabled else torch.float32)
    for out in outs:
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected, rtol=0.03, atol=0.03)


def test_shapes_without_memory():
    """On meta tensors, of which autocast knows nothing; and integers are refused under it too."""
    x = torch.empty(1, 2, 9, 16, device="meta")
    assert attention(x, x, x).shape == x.shape
    ids = torch.ones(1, 2, 9, 16, dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="int32"):
        attention(ids, ids, ids)

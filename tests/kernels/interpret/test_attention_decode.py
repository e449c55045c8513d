"""Attention over a cache in the interpreter: numerics against float64, bytes read, same bits."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import harness
import pytest
import torch
import traffic
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.attention_decode import attention_decode

module = importlib.import_module("fastgpt_kernels.attention_decode")
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"window": 50}, {"softcap": 2.0})
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(
    autouse=True, params=[pytest.param(2, marks=pytest.mark.full), 40], ids=["whole", "split"]
)
def multiprocessors(request, monkeypatch):
    """With 2 a few heads fill the GPU; with 40 the keys of each are spread over it."""
    monkeypatch.setattr(module, "multiprocessor_count", lambda x: request.param // 2)
    return request.param


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def judge(
    T: int,
    row_lengths: Tensor,
    *,
    S: int = 200,
    D: int = 32,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous"),
    starts: Tensor | None = None,
    **options: Any,
) -> None:
    B, (H, HK) = len(row_lengths), heads

    def native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention_decode(q, k, v, row_lengths, cache_starts_B=starts, **options)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return attention_decode(q, k, v, row_lengths, cache_starts_B=starts, **options)

    harness.compare(
        ours=ours,
        native=native,
        exact=native,
        inputs=[torch.randn(B, n, h, D).to(dtype) for n, h in ((T, H), (S, HK), (S, HK))],
        layouts=layouts,
        grad_output=None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3])
def test_ragged_lengths(T, dtype):
    judge(T, lengths(200, 1, 0, 63, 64, 129), dtype=dtype)


def test_one_run_of_keys(monkeypatch):
    monkeypatch.setattr(module, "multiprocessor_count", lambda x: 1)
    judge(3, lengths(200, 1, 0, 63, 64, 129), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("T", "heads", "D", "dtype"),
    [
        (1, (1, 1), 40, torch.bfloat16),
        (1, (8, 1), 64, torch.float16),
        (5, (8, 2), 80, torch.bfloat16),  # 20 rows a key head: the wider tile
        (9, (4, 1), 96, torch.float32),  # 36: two tiles
        (2, (3, 3), 128, torch.bfloat16),
        (1, (4, 1), 256, torch.float32),
        (1, (2, 1), 5, torch.float32),
    ],
    ids=str,
)
def test_heads_and_head_sizes(T, heads, D, dtype):
    judge(T, lengths(130, 70), S=130, heads=heads, D=D, dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 70},
        {"softcap": 2.0, "scale": 0.5},
        {"window": 20, "softcap": 4.0, "starts": lengths(150, 0, 3)},
        {"starts": lengths(0, 60, 64)},
    ],
    ids=str,
)
def test_options(options):
    judge(2, lengths(190, 66, 5), **options)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [32, 40, 64, 80, 96, 128, 256])
def test_matrix(D, dtype):
    for T in (1, 2, 4, 17):
        for heads in ((1, 1), (2, 1), (8, 2)):
            for options in VARIANTS:
                judge(
                    T, lengths(257, 64, 0, 65, 2), S=260, D=D, heads=heads, dtype=dtype, **options
                )


@pytest.mark.parametrize(
    "layouts",
    [("transposed", "padded", "offset"), ("padded", "offset", "transposed")],
    ids=str,
)
def test_layouts(layouts):
    judge(3, lengths(77, 40), S=80, D=40, dtype=torch.bfloat16, layouts=layouts)


def test_tokens_behind_a_row_are_not_read_and_new_tokens_may_exceed_it():
    q, k, v = torch.randn(2, 3, 4, 32), torch.randn(2, 90, 2, 32), torch.randn(2, 90, 2, 32)
    k[0, 2:], v[0, 2:], k[1, 70:], v[1, 70:] = (float("nan"),) * 4
    out = attention_decode(q, k, v, lengths(2, 70))
    assert (out[0, 0] == 0).all()  # three new tokens in a row of two: the first is not there
    assert out.isfinite().all()
    assert (out[0, 1:] != 0).all()


@pytest.mark.parametrize("shape", [(0, 1, 5), (2, 0, 5), (2, 1, 0)], ids=str)
def test_empty(shape):
    B, T, S = shape
    q, k = torch.randn(B, T, 4, 32), torch.randn(B, S, 2, 32)
    out = attention_decode(q, k, k, torch.zeros(B, dtype=torch.int32))
    assert out.shape == q.shape
    assert (out == 0).all()


def test_the_cache_is_read_once_up_to_each_length(multiprocessors):
    """For all query heads and new tokens together; the window leaves out what nobody sees."""
    q = torch.randn(2, 2, 8, 32)
    k, v = torch.randn(2, 300, 2, 32), torch.randn(2, 300, 2, 32)
    for window, seen in ((None, 300 + 130), (64, 65 + 65)):
        with traffic.count() as moved:
            out = attention_decode(q, k, v, lengths(300, 130), window=window)
        for cache in (k, v):
            read = moved.loads(cache)
            assert read == traffic.Moved(*[4 * 2 * 32 * seen] * 3)
        assert moved.stores(out) == traffic.once(out)
        assert moved.loads(q).unique == traffic.nbytes(q)
    splits = moved.programs
    assert splits == 4 if multiprocessors == 2 else splits > 4


def test_two_runs_give_the_same_bits():
    q, k = torch.randn(2, 1, 4, 32), torch.randn(2, 200, 2, 32)
    runs = [attention_decode(q, k, k, lengths(200, 90)) for _ in range(2)]
    assert torch.equal(*runs)


def test_addresses_beyond_32_bits():
    """A cache of 40 tokens, 2**26 elements apart."""
    near = torch.randn(40, 32)
    far = harness.huge_stride_rows(near)
    q = torch.randn(1, 1, 2, 32)
    outs = [
        attention_decode(q, x[None, :, None], x[None, :, None], lengths(40)) for x in (near, far)
    ]
    assert torch.equal(*outs)


def test_operator_passes_opcheck():
    q, k = torch.randn(2, 2, 4, 16), torch.randn(2, 90, 2, 16)
    for starts in (None, lengths(0, 3)):
        arguments = (q, k, k, lengths(80, 5), starts, 0.3, 7, 2.0)
        torch.library.opcheck(module._attention_decode, arguments)


@pytest.mark.parametrize("window", [2**31 - 1, sys.maxsize])
def test_windows_that_hide_nothing(window):
    q, k, v = torch.randn(2, 4, 2, 16), *(torch.randn(2, 40, 2, 16) for _ in range(2))
    found = attention_decode(q, k, v, lengths(1, 40), window=window)
    torch.testing.assert_close(found, attention_decode(q, k, v, lengths(1, 40)))

"""Few compiled variants: none more for other token counts, batch sizes, lengths or cache sizes."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="the variants are Triton's; pip install triton")

import triton
from variants import variant

dense, varlen, decode = (
    importlib.import_module(f"fastgpt_kernels.attention{name}")
    for name in ("", "_varlen", "_decode")
)
TOKENS = (1, 2, 17, 64, 100, 128, 1000, 1024, 2047, 2048)
H, HK = 4, 2
heads = pytest.mark.parametrize("D", [64, 72])


@pytest.fixture
def launched(monkeypatch):
    """Keys of all launches; nothing runs."""
    keys: set[str] = set()

    def record(kernel, n_programs, *args, **options):
        assert n_programs > 0
        keys.add(variant(kernel, *args, **options))

    for module in (dense, varlen, decode):
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(decode, "multiprocessor_count", lambda x: 132)
    return keys


def qkv(D: int, *leading: int) -> list[torch.Tensor]:
    """Projections as a model makes them: one tensor (..., heads, D), cut along the heads."""
    joined = torch.empty(*leading, H + 2 * HK, D, dtype=torch.bfloat16)
    return list(joined.split([H, HK, HK], dim=-2))


@heads
def test_attention(launched, D):
    for B, T in ((b, t) for b in (1, 2, 3) for t in TOKENS):
        q, k, v = (x.transpose(1, 2) for x in qkv(D, B, T))
        out, lse = dense._attention._init_fn(q, k, v, None, True, 0.1, 0, 0.0)
        dense._attention_backward._init_fn(out, None, q, k, v, out, lse, None, True, 0.1, 0, 0.0)
    assert len(launched) == 3, "\n".join(sorted(launched))


@heads
def test_attention_varlen(launched, D):
    for n, T in ((n, t) for n in (1, 2, 16) for t in TOKENS):
        q, k, v = qkv(D, T)
        cu = torch.zeros(n + 1, dtype=torch.int32)
        out, lse = varlen._attention._init_fn(q, k, v, cu, cu, True, 0.1, 0, 0.0)
        varlen._attention_backward._init_fn(out, None, q, k, v, out, lse, cu, cu, True, 0.1, 0, 0.0)
    # The list of tiles, too; forward, dq and dkv may have blocks of different sizes.
    kernels = {key.split()[0] for key in launched}
    tiles = sum(key.startswith("tiles_kernel") for key in launched)
    assert tiles <= 3
    assert len(launched) - tiles == len(kernels) - 1 == 3, "\n".join(sorted(launched))


@heads
def test_attention_decode(launched, D):
    """Two widths of tile, with and without splitting, and the kernel that joins the parts."""
    for B, T in ((b, t) for b in (1, 3, 64, 1000) for t in (1, 2, 5, 9, 16)):
        for S in (64, 1000, 4096):
            q, k, v = qkv(D, B, T)[0], *(torch.empty(1, S, HK, D).bfloat16() for _ in range(2))
            k, v = (x.expand(B, S, HK, D) for x in (k, v))
            lengths = torch.zeros(B, dtype=torch.int32)
            decode._attention_decode._init_fn(q, k, v, lengths, None, 0.1, 0, 0.0)
    assert len(launched) <= 5, "\n".join(sorted(launched))


def test_a_specialised_count_would_show(monkeypatch):
    """The same sweep of a kernel that does not name its counts in ``do_not_specialize``."""
    kernel = triton.jit(dense.fwd_kernel.fn)  # the decorator's options left out
    keys: set[str] = set()

    def record(_, n_programs, *args, **options):
        keys.add(variant(kernel, *args, **options))

    monkeypatch.setattr(dense, "launch", record)
    for T in TOKENS:
        q, k, v = (x.transpose(1, 2) for x in qkv(64, 2, T))
        dense._attention._init_fn(q, k, v, None, True, 0.1, 0, 0.0)
    assert len(keys) > 2

"""Bytes that attention moves, counted: Q + K + V + O, and K + V again for each block of queries.

A program never loads anything twice. That its keys and values are read again by every block of
queries of every head that shares them is the algorithm (the block is the unit of reuse on chip; on
a GPU the second level cache answers most of it), and how often is stated here exactly.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import traffic

from fastgpt_kernels._common import cdiv, lookup_config
from fastgpt_kernels.attention import attention
from fastgpt_kernels.attention_varlen import attention_varlen

module = importlib.import_module("fastgpt_kernels.attention")
DTYPE, D = torch.float16, 32


def block(kernel: str, name: str) -> int:
    return lookup_config(kernel, "default", DTYPE, D)[name]


def tensors(H: int, HK: int, T: int, S: int | None = None) -> list[torch.Tensor]:
    S = T if S is None else S
    return [torch.randn(1, h, n, D).to(DTYPE) for h, n in ((H, T), (HK, S), (HK, S))]


def times(x: torch.Tensor, n: int) -> traffic.Moved:
    """Every element of x, by each of n programs once."""
    return traffic.Moved(n * traffic.nbytes(x), n * traffic.nbytes(x), traffic.nbytes(x))


def test_a_block_of_queries_moves_q_k_v_and_o_once():
    q, k, v = tensors(2, 2, 50, 150)
    with traffic.count() as moved:
        out = attention(q, k, v, causal=False)
    assert moved.programs == 2
    for x in (q, k, v):
        assert moved.loads(x) == traffic.once(x)
    assert moved.stores(out) == traffic.once(out)
    statistics = 2 * 50 * 4  # the log-sum-exp, float32
    assert moved.loads().total == traffic.nbytes(q, k, v)
    assert moved.stores().total == traffic.nbytes(out) + statistics


def test_keys_are_read_again_by_every_block_of_queries_and_head():
    q, k, v = tensors(4, 2, 150)
    with traffic.count() as moved:
        out = attention(q, k, v, causal=False)
    n_blocks = cdiv(150, block("attention_fwd", "BLOCK_M"))
    assert moved.loads(q) == traffic.once(q)
    assert moved.stores(out) == traffic.once(out)
    assert n_blocks == 3
    for x in (k, v):
        assert moved.loads(x) == times(x, n_blocks * 2)


@pytest.mark.parametrize("window", [None, 40])
def test_what_no_query_of_a_block_sees_is_not_read(window):
    T, BLOCK_M, BLOCK_N = 300, *(block("attention_fwd", n) for n in ("BLOCK_M", "BLOCK_N"))
    q, k, v = tensors(1, 1, T)
    with traffic.count() as moved:
        attention(q, k, v, window=window)
    keys = 0
    for start in range(0, T, BLOCK_M):
        first = 0 if window is None else max(0, start - window + 1) // BLOCK_N * BLOCK_N
        end = min(cdiv(min(start + BLOCK_M, T), BLOCK_N) * BLOCK_N, T)
        keys += end - first
    for x in (k, v):
        read = moved.loads(x)
        assert read == traffic.Moved(keys * D * 2, keys * D * 2, traffic.nbytes(x))


def test_the_backward_reads_each_operand_once_a_block():
    q, k, v = (x.requires_grad_() for x in tensors(2, 1, 150))
    out = attention(q, k, v, causal=False)
    grad = torch.randn_like(out)
    with traffic.count() as moved:
        grads = torch.autograd.grad(out, (q, k, v), grad)
    by_query = cdiv(150, block("attention_bwd_dq", "BLOCK_M"))
    by_key = cdiv(150, block("attention_bwd_dkv", "BLOCK_N"))
    for x in (q, grad):  # once by dq's kernel, once by every block of keys
        assert moved.loads(x) == times(x, 1 + by_key)
    for x in (k, v):  # once by dk's kernel, once by every block of queries of both heads
        assert moved.loads(x) == times(x, 1 + 2 * by_query)
    assert moved.loads(out) == traffic.once(out)
    for x in grads:
        assert moved.stores(x) == traffic.once(x)
    statistics = 2 * 150 * 4  # delta; it and the log-sum-exp are read like q
    stored = moved.stores().total - traffic.nbytes(*grads)
    assert stored == statistics


def test_packed_sequences_read_their_own_keys_alone():
    lengths = (70, 0, 30, 64)
    cu = torch.tensor([0, 70, 70, 100, 164], dtype=torch.int32)
    q, k, v = (torch.randn(164, 1, D).to(DTYPE) for _ in range(3))
    with traffic.count() as moved:
        out = attention_varlen(q, k, v, cu, causal=False)
    assert moved.loads(q) == traffic.once(q)
    assert moved.stores(out) == traffic.once(out)
    BLOCK_M = block("attention_fwd", "BLOCK_M")
    keys = sum(n * cdiv(n, BLOCK_M) for n in lengths)
    for x in (k, v):
        assert moved.loads(x) == traffic.Moved(*[keys * D * 2] * 2, traffic.nbytes(x))

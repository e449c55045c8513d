"""linear_log_probs with its kernels in the interpreter, judged against float64."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from harness import LAYOUTS, compare, guard, huge_stride_rows
from test_linear_log_probs import both, native, operands

from fastgpt_kernels import linear_log_probs, reference
from fastgpt_kernels._log_prob_kernels import log_prob_gradient_kernel, log_prob_kernel

MODULE = sys.modules["fastgpt_kernels.linear_log_probs"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.3}]
# rows, width, vocabulary, dtype, layout, which options, with bias, scale of the weight
PAIRS = [
    (1, 8, 8, torch.float32, "contiguous", 0, True, 0.4),
    (9, 32, 41, torch.bfloat16, "transposed", 2, False, 0.4),
    (6, 24, 1000, torch.float16, "padded", 1, True, 2.0),
    (5, 16, 1000, torch.float32, "offset", 2, False, 0.4),
    (5, 16, 2503, torch.bfloat16, "contiguous", 0, True, 2.0),
    (2, 8, 50257, torch.bfloat16, "contiguous", 1, False, 0.4),
]
FULL = list(
    itertools.product(
        (1, 7), (24,), (8, 41, 1000, 50257), DTYPES, LAYOUTS, range(3), (True,), (0.4,)
    )
)
BLOCK = {"VEC": 4, "BLOCK": 128}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four rows at a time, so that most cases take several chunks and a shorter last one."""
    monkeypatch.setattr(MODULE, "chunk_rows", lambda n_rows, n_cols: 4)


def native_by_four(hidden, weight, ids, *bias, **options):
    """PyTorch on the same four rows at a time.

    Its float32 GEMM of three rows or fewer on a CPU adds 50,257 products one after another (error
    2e-5 at magnitude 1.6), that of more rows in blocks (5e-7): both sides must use the same one.
    """
    parts = [native(hidden[i : i + 4], weight, ids[i : i + 4], *bias, **options)
             for i in range(0, len(ids), 4)]  # fmt: skip
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def _check(rows, width, vocabulary, dtype, layout, option, with_bias, scale):
    hidden, weight, ids = operands((rows,), width, vocabulary, dtype, scale)
    bias = [torch.randn(vocabulary).to(dtype)] * with_bias
    compare(
        both(linear_log_probs, **OPTIONS[option]),
        both(native_by_four, **OPTIONS[option]),
        both(reference.linear_log_probs, **OPTIONS[option]),
        [hidden, weight, ids, *bias],
        layouts=[layout, layout, "padded", "contiguous"][: 3 + with_bias],
        # One row has one logit of its id, rounded to 16 bits: PyTorch's own may round by luck.
        output_floor=dtype if rows == 1 else None,
    )


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "dtype", "layout", "option", "with_bias", "scale"), PAIRS
)
def test_linear_log_probs(rows, width, vocabulary, dtype, layout, option, with_bias, scale):
    _check(rows, width, vocabulary, dtype, layout, option, with_bias, scale)


@pytest.mark.full
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "dtype", "layout", "option", "with_bias", "scale"), FULL
)
def test_full_matrix(rows, width, vocabulary, dtype, layout, option, with_bias, scale):
    _check(rows, width, vocabulary, dtype, layout, option, with_bias, scale)


def statistics(logits, ids):
    """``log_prob_kernel`` on given logits: log-probability, entropy, top, total."""
    n_rows, n_cols = logits.shape
    results = [torch.full((n_rows,), float("nan")) for _ in range(4)]
    log_prob_kernel[(n_rows,)](
        logits, ids, *results, n_cols, *logits.stride(), 1, -100, MODULE.LOG2E, 1.0, 1.0,
        SOFTCAP=0, **BLOCK,
    )  # fmt: skip
    return results


def gradient(logits, ids, log_prob_weights):
    """``log_prob_gradient_kernel`` in place: of ``sum(weights * log_probs)``."""
    n_rows, n_cols = logits.shape
    log_probs, _, top, total = statistics(logits, ids)
    own = -log_prob_weights * torch.expm1(log_probs)
    a = -log_prob_weights / total
    log_prob_gradient_kernel[(n_rows,)](
        logits, ids, top, a, a, own, n_cols, logits.stride(0), 1, -100, MODULE.LOG2E, 1.0, 1.0,
        SOFTCAP=0, ENTROPY=False, **BLOCK,
    )  # fmt: skip
    return logits


@pytest.mark.parametrize("vocabulary", [*range(1, 12), 130, 257])
def test_every_alignment(vocabulary):
    """Rows start at every offset from a 16-byte boundary; nothing outside them is written."""
    values, ids = torch.randn(5, vocabulary), torch.randint(vocabulary, (5,))
    exact = values.double().requires_grad_()
    logp = torch.log_softmax(exact, -1)
    logits = guard(values)
    log_probs, entropy, *_ = statistics(logits, ids)
    torch.testing.assert_close(log_probs.double(), logp[torch.arange(5), ids], rtol=0, atol=2e-6)
    expected = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, rtol=0, atol=2e-6)
    weights = torch.randn(5)
    (weights * logp[torch.arange(5), ids]).sum().backward()
    before = logits.guard_snapshot.view(torch.float32)
    torch.testing.assert_close(
        gradient(logits, ids, weights).double(), exact.grad, atol=1e-6, rtol=0
    )
    storage = torch.tensor([]).set_(logits.untyped_storage())
    assert storage[:64].isnan().all()
    assert storage[64 + values.numel() :].isnan().all()
    assert len(storage) == len(before)


def test_rows_beyond_31_bits():
    values, ids = torch.randn(3, 50), torch.tensor([1, -100, 3])
    far, near = huge_stride_rows(values), values.clone()
    for a, b in zip(statistics(far, ids), statistics(near, ids), strict=True):
        torch.testing.assert_close(a, b)
    weights = torch.tensor([0.5, 1.0, -2.0])
    torch.testing.assert_close(gradient(far, ids, weights), gradient(near, ids, weights))
    assert near[1].eq(0).all()


def test_id_outside_the_vocabulary_shows():
    hidden, weight = torch.randn(3, 8), torch.randn(11, 8)
    log_probs, entropy = linear_log_probs(hidden, weight, torch.tensor([0, 11, -1]))
    assert log_probs.isnan().tolist() == [False, True, True]
    assert entropy.isfinite().all()


def test_repeats_bit_for_bit():
    hidden, weight, ids = operands((6,), 16, 3001, torch.float16)

    def once():
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        results = torch.stack(linear_log_probs(*leaves, ids, softcap=20.0))
        results.sum().backward()
        return results, *(x.grad for x in leaves)

    assert all(map(torch.equal, once(), once()))

"""linear_cross_entropy with its fused kernel in the interpreter, judged against float64."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from test_cross_entropy_kernels import OPTIONS, native

from fastgpt_kernels import linear_cross_entropy, reference

MODULE = sys.modules["fastgpt_kernels.linear_cross_entropy"]
# rows, width, vocabulary, dtype, layout, which options, with bias
PAIRS = [
    (7, 16, 41, torch.float32, "contiguous", 0, True),
    (9, 32, 57, torch.bfloat16, "transposed", 1, False),
    (9, 24, 1000, torch.float16, "padded", 2, True),
    (5, 16, 2503, torch.bfloat16, "contiguous", 3, True),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four rows at a time, so that every case takes several chunks and a shorter last one."""
    monkeypatch.setattr(MODULE, "chunk_rows", lambda n_rows, n_cols: 4)


def _operands(rows, width, vocabulary, dtype):
    target = torch.randint(vocabulary, (rows,))
    target[-1] = -100
    tensors = (
        torch.randn(rows, width),
        torch.randn(vocabulary, width) * 0.5,
        torch.randn(vocabulary),
    )
    return [*(x.to(dtype) for x in tensors), target]


@pytest.mark.parametrize("whole_row", [0, 16384])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "dtype", "layout", "option", "with_bias"), PAIRS
)
def test_linear_cross_entropy(
    monkeypatch, rows, width, vocabulary, dtype, layout, option, with_bias, whole_row
):
    """Rows read in pieces, and rows kept whole."""
    monkeypatch.setattr(MODULE, "WHOLE_ROW", whole_row)
    x, w, b, t = _operands(rows, width, vocabulary, dtype)
    options = OPTIONS[option]
    tensors = [x, w, t, b] if with_bias else [x, w, t]
    compare(
        lambda x, w, t, b=None: linear_cross_entropy(x, w, t, linear_bias=b, **options),
        lambda x, w, t, b=None: native(F.linear(x, w, b), t, **options),
        lambda x, w, t, b=None: reference.linear_cross_entropy(x, w, t, linear_bias=b, **options),
        tensors,
        layouts=[layout, layout, "contiguous", "padded"][: len(tensors)],
        output_floor=dtype if options.get("reduction") != "none" else None,
    )


def test_float16_gradients_survive_a_loss_scale():
    """1 / count and a loss scale of 2**16 meet before float16: unscaled they would vanish."""
    x, w, _, t = _operands(8, 16, 33, torch.float16)
    t[:] = 5
    leaf = (x * 1e-3).requires_grad_()
    (linear_cross_entropy(leaf, w, t) * 2.0**16 / 2**14).backward()
    exact = leaf.detach().double().requires_grad_()
    (reference.linear_cross_entropy(exact, w.double(), t) * 4).backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=5e-3, atol=1e-3)


def test_no_gradient_work_without_gradients(monkeypatch):
    x, w, b, t = _operands(6, 8, 21, torch.float32)
    expected = reference.linear_cross_entropy(x, w, t, linear_bias=b)

    def forbidden(*args, **kwargs):
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(MODULE, "_gradients", forbidden)
    torch.testing.assert_close(linear_cross_entropy(x, w, t, linear_bias=b), expected)
    with torch.no_grad():
        w.requires_grad_()
        torch.testing.assert_close(linear_cross_entropy(x, w, t, linear_bias=b), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", [0, 1, 2])
def test_single_gradient(reduction, needed):
    *tensors, t = _operands(5, 8, 21, torch.float32)
    leaves = [x.clone().requires_grad_(i == needed) for i, x in enumerate(tensors)]
    exact = [x.double().requires_grad_(i == needed) for i, x in enumerate(tensors)]
    for fn, (x, w, b) in ((linear_cross_entropy, leaves), (reference.linear_cross_entropy, exact)):
        fn(x, w, t, linear_bias=b, reduction=reduction).sum().backward()
    torch.testing.assert_close(
        leaves[needed].grad.double(), exact[needed].grad, rtol=1e-5, atol=1e-6
    )
    assert all(x.grad is None for i, x in enumerate(leaves) if i != needed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_loss_scale_beyond_float16(dtype):
    """65,536 is what GradScaler begins with; the products fit, and are rounded once."""
    x, out = torch.randn(41, 100).to(dtype) * 1e-3, torch.float16
    out = x.dtype if dtype != torch.float32 else out
    factor = torch.tensor(70001.0)
    found = MODULE.linear_cross_entropy_scaled(x, factor, out)
    exact = x.double() * factor.double()
    assert found.dtype == out
    assert ((found.double() - exact).abs() <= 0.51 * torch.finfo(out).eps * exact.abs()).all()

"""Cross-entropy kernels in the interpreter, judged against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from harness import LAYOUTS, compare, guard, huge_stride_rows, max_error
from test_cross_entropy import (  # noqa: F401  (collected here too, where they reach the kernels)
    test_gradient_over_the_logits_on_request,
    test_logits_that_cannot_hold_their_gradient_are_left_alone,
)

from fastgpt_kernels import cross_entropy, reference
from fastgpt_kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = [
    {},
    {"reduction": "none", "label_smoothing": 0.1},
    {"reduction": "sum", "softcap": 15.0, "z_loss": 1e-3},
    {"reduction": "sum", "label_smoothing": 0.2, "softcap": 2.0},
]
# rows, vocabulary, dtype, layout, which options, scale of the logits
PAIRS = [
    (1, 8, torch.float32, "contiguous", 0, 1.0),
    (7, 41, torch.bfloat16, "contiguous", 1, 1e4),
    (7, 41, torch.float16, "padded", 2, 3.0),
    (16, 8, torch.bfloat16, "transposed", 3, 3.0),
    (4, 1000, torch.float16, "offset", 1, 1.0),
    (4, 1000, torch.float32, "padded", 0, 1e4),
    (3, 5003, torch.bfloat16, "padded", 3, 3.0),
    (3, 50257, torch.bfloat16, "contiguous", 0, 3.0),
    (2, 50257, torch.float32, "contiguous", 1, 1e4),
    (2, 50304, torch.float16, "transposed", 2, 1.0),
]
FULL = list(
    itertools.product((1, 7), (8, 41, 1000, 50257, 50304), DTYPES, LAYOUTS, range(4), (3.0,))
) + list(itertools.product((2,), (262_144, 262_147), DTYPES, ("contiguous",), (0, 1), (3.0,)))


def native(input, target, reduction="mean", label_smoothing=0.0, z_loss=0.0, softcap=None):
    """PyTorch's own operations in the logits' dtype; the loss in float32."""
    if softcap is not None:
        input = softcap * torch.tanh(input / softcap)
    x = input.float()
    loss = F.cross_entropy(x, target, reduction="none", label_smoothing=label_smoothing)
    loss = loss + z_loss * torch.logsumexp(x, -1).square() * (target != -100)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != -100).sum()


def _check(rows, vocabulary, dtype, layout, option, scale):
    target = torch.randint(vocabulary, (rows,))
    if rows > 1:
        target[1] = -100
    options = OPTIONS[option]
    compare(
        lambda x, t: cross_entropy(x, t, **options),
        lambda x, t: native(x, t, **options),
        lambda x, t: reference.cross_entropy(x, t, **options),
        [(torch.randn(rows, vocabulary) * scale).to(dtype), target],
        layouts=[layout, "contiguous"],
        # 1 - tanh^2 of a capped logit keeps the rounding of 1, where it is small by chance or not
        gradient_floor=2.0**-21 if "softcap" in options else 1e-30,
    )


@pytest.mark.parametrize(("rows", "vocabulary", "dtype", "layout", "option", "scale"), PAIRS)
def test_cross_entropy(rows, vocabulary, dtype, layout, option, scale):
    _check(rows, vocabulary, dtype, layout, option, scale)


@pytest.mark.full
@pytest.mark.parametrize(("rows", "vocabulary", "dtype", "layout", "option", "scale"), FULL)
def test_full_matrix(rows, vocabulary, dtype, layout, option, scale):
    _check(rows, vocabulary, dtype, layout, option, scale)


@pytest.mark.parametrize("vocabulary", range(1, 40))
def test_every_alignment(vocabulary):
    """Rows start at every offset from a 16-byte boundary, with fewer columns than one group too."""
    x = guard(torch.randn(3, vocabulary).bfloat16()).requires_grad_()
    t = torch.randint(vocabulary, (3,))
    loss = cross_entropy(x, t, reduction="none")
    loss.sum().backward()
    exact = x.detach().double().requires_grad_()
    expected = reference.cross_entropy(exact, t, reduction="none")
    expected.sum().backward()
    assert max_error(loss, expected) < 1e-5
    assert max_error(x.grad, exact.grad) < 4e-3


def test_certain_prediction_keeps_its_small_gradient():
    """p of the target is 0.999 and more: p - 1 is no worse than PyTorch's float32, in any dtype."""
    x = torch.zeros(2, 1000)
    x[:, 3] = torch.tensor([13.8125, 60.0])
    t = torch.full((2,), 3)
    exact = x.double().requires_grad_()
    reference.cross_entropy(exact, t, reduction="sum").backward()
    native = x.clone().requires_grad_()
    F.cross_entropy(native, t, reduction="sum").backward()
    for dtype in DTYPES:
        leaf = x.to(dtype, copy=True).requires_grad_()
        loss = cross_entropy(leaf, t, reduction="sum")
        loss.backward()
        error = max_error(leaf.grad[:, 3], exact.grad[:, 3])
        assert error <= max_error(native.grad, exact.grad) + torch.finfo(dtype).eps * 1e-3 / 2
        assert abs(loss.item() - reference.cross_entropy(x.double(), t, reduction="sum")) < 2e-6


@pytest.mark.parametrize("layout", ["contiguous", "padded"])
def test_ignored_rows_are_written_zero_whatever_they_hold(layout):
    x = torch.randn(5, 37)
    x[1], x[3] = float("nan"), float("inf")
    t = torch.tensor([1, -100, 2, -100, 5])
    leaf = guard(x.bfloat16(), layout).requires_grad_()
    loss = cross_entropy(leaf, t, reduction="none")
    loss.backward(torch.randn(5))
    assert torch.equal(loss[[1, 3]], torch.zeros(2))
    assert torch.equal(leaf.grad[[1, 3]], torch.zeros(2, 37, dtype=torch.bfloat16))
    assert leaf.grad.isfinite().all()
    assert leaf.grad[[0, 2, 4]].ne(0).any(1).all()


def test_all_rows_ignored():
    leaf = torch.randn(4, 11, requires_grad=True)
    t = torch.full((4,), -100)
    assert cross_entropy(leaf, t, reduction="sum") == 0
    loss = cross_entropy(leaf, t)
    assert loss.isnan()
    assert F.cross_entropy(leaf, t).isnan()
    loss.backward()
    assert torch.equal(leaf.grad, torch.zeros(4, 11))


def test_index_outside_the_vocabulary_shows():
    leaf = torch.randn(3, 11, requires_grad=True)
    loss = cross_entropy(leaf, torch.tensor([0, 11, -1]), reduction="none")
    assert loss.isnan().tolist() == [False, True, True]


def test_masked_vocabulary_entries():
    """-inf logits have probability 0, loss and gradient stay finite."""
    x = torch.randn(3, 50)
    x[:, 40:] = -torch.inf
    leaf = x.clone().requires_grad_()
    t = torch.tensor([0, 5, 39])
    cross_entropy(leaf, t, reduction="sum").backward()
    expected = x.clone().requires_grad_()
    F.cross_entropy(expected, t, reduction="sum").backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_strided_gradient_and_target(dtype):
    x, t = torch.randn(4, 9), torch.randint(9, (4, 2)).to(dtype)[:, 1]
    grad = torch.randn(8)[::2]
    leaf, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = cross_entropy(leaf, t, reduction="none")
    native_loss = F.cross_entropy(expected, t.long(), reduction="none")
    loss.backward(grad)
    native_loss.backward(grad)
    torch.testing.assert_close(loss, native_loss)
    torch.testing.assert_close(leaf.grad, expected.grad)


def test_rows_beyond_31_bits():
    x = huge_stride_rows(torch.randn(3, 50).bfloat16())
    t = torch.tensor([1, 2, 3])
    loss, *statistics = cross_entropy_fwd(x, t, -100, 0.0, 0.0, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(x.float(), t, reduction="none"))
    d = cross_entropy_bwd(torch.ones(3), x, t, *statistics, -100, 0.0, 0.0, 0.0)
    leaf = x.float().requires_grad_()
    F.cross_entropy(leaf, t, reduction="sum").backward()
    assert max_error(d, leaf.grad) < 4e-3


def test_columns_beyond_31_bits():
    """Logits (V, N) transposed: V - 1 times N elements from a row's first to its last."""
    x = huge_stride_rows(torch.randn(50, 3)).t()
    t = torch.tensor([1, 49, 3])
    leaf = x.clone().requires_grad_()
    F.cross_entropy(leaf, t).backward()
    x.requires_grad_()
    cross_entropy(x, t).backward()
    torch.testing.assert_close(x.grad, leaf.grad)


@pytest.mark.parametrize(("start", "row"), [(0, 500), (8, 503), (3, 1000)])
def test_gradient_of_a_part_of_long_rows_is_not_as_long(start, row):
    """And stays aligned like the logits, so that both are accessed in whole groups."""
    logits, t = torch.randn(5, row).bfloat16(), torch.arange(5)
    part = logits[:, start : start + 41]
    _, *statistics = cross_entropy_fwd(part, t, -100, 0.0, 0.0, 0.0)
    d = cross_entropy_bwd(torch.ones(5), part, t, *statistics, -100, 0.0, 0.0, 0.0)
    assert 41 <= d.stride(0) < 41 + 8
    assert (d.stride(0) - row) % 8 == 0
    leaf = part.float().requires_grad_()
    F.cross_entropy(leaf, t, reduction="sum").backward()
    assert max_error(d, leaf.grad) < 4e-3


def test_repeats_bit_for_bit_and_handles_no_rows():
    x, t = torch.randn(3, 3001).half(), torch.tensor([0, 1, 2])
    options = (-100, 0.1, 1e-3, 20.0)
    first = cross_entropy_fwd(x, t, *options)
    assert all(map(torch.equal, first, cross_entropy_fwd(x, t, *options)))
    assert cross_entropy(x[:0], t[:0], reduction="none").shape == (0,)

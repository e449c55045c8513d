"""The harness itself: repaired interpreter, guard bands and poison do what other tests rely on."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from harness import INT_POISON, assert_as_good_as, assert_unwritten, guard

from fastgpt_kernels import static


@triton.jit
def _cast_kernel(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(tl.float32).to(y.dtype.element_ty))


@triton.jit
def _implicit_cast_kernel(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def _add_bfloat16_kernel(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i))


@triton.jit
def _dot_kernel(a, b, c, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@pytest.mark.parametrize("kernel", [_cast_kernel, _implicit_cast_kernel])
def test_float32_to_bfloat16_rounds_to_nearest_even(kernel):
    x = torch.randn(1024) * torch.logspace(-40, 37, 1024)
    x[:6] = torch.tensor([1.005859375, 1.00390625, float("nan"), float("inf"), -0.0, 3.4e38])
    y = torch.empty(1024, dtype=torch.bfloat16)
    kernel[(1,)](x, y, 1024)
    expected = x.bfloat16()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))


def test_bfloat16_widens_exactly():
    x = torch.randn(256).bfloat16()
    y = torch.empty(256)
    _cast_kernel[(1,)](x, y, 256)
    assert torch.equal(y, x.float())


def test_bfloat16_dot_accumulates_in_float32():
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, 16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_bfloat16_arithmetic_is_refused():
    x = torch.ones(16).bfloat16()
    with pytest.raises(Exception, match="bfloat16"):
        _add_bfloat16_kernel[(1,)](x, x.clone(), 16)


@pytest.mark.parametrize(
    "make", [lambda x: torch.empty_like(x), lambda x: x.new_empty(4), lambda x: torch.empty(4)]
)
def test_empty_is_poisoned(make):
    assert make(torch.zeros(4)).isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "padded", "transposed", "offset"])
def test_guard_keeps_values_and_sees_writes(layout):
    x = torch.arange(12.0).view(3, 4)
    guarded = guard(x, layout)
    assert torch.equal(guarded, x)
    assert_unwritten(guarded)
    outside = guarded.as_strided((1,), (1,), guarded.storage_offset() - 1)
    assert outside.isnan().all()
    outside.fill_(1.0)
    with pytest.raises(AssertionError, match="written"):
        assert_unwritten(guarded)
    assert guard(torch.ones(3, dtype=torch.int64)).as_strided((1,), (1,), 0).item() == INT_POISON


def test_error_rule_is_relative_to_pytorch():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    native = exact.float() + 1e-4
    assert_as_good_as(exact.float() + 1.9e-4, native, exact, 2.0)
    with pytest.raises(AssertionError, match="allowed"):
        assert_as_good_as(exact.float() + 2.2e-4, native, exact, 2.0)
    with pytest.raises(AssertionError, match="NaN"):
        assert_as_good_as(torch.full((100,), float("nan")), native, exact, 2.0)


def test_the_static_gate_wants_the_compiler(capsys):
    with pytest.raises(SystemExit, match="2"):
        static.main([])
    assert "unset" in capsys.readouterr().err

"""Rotary embedding: numerics, layouts, both conventions; on the CPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from harness import assert_unwritten, compare, guard, huge_stride_rows, max_error

from fastgpt_kernels import cpu, reference, rotary

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
B, T, H = 2, 5, 3


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


def table(length: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(half) / half)
    return angles.cos(), angles.sin()


def plain(x, cos, sin, interleaved=False):
    """PyTorch's operations in the dtype of x, for its error."""
    width = 2 * cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = (
        (x[..., 0:width:2], x[..., 1:width:2])
        if interleaved
        else (x[..., : width // 2], x[..., width // 2 : width])
    )
    pair = a * cos - b * sin, b * cos + a * sin
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((out, x[..., width:]), -1)


def judge(x, cos, sin, layout="contiguous", grad="random", **options):
    positions = options.pop("positions", None)
    tables = [t if positions is None else t[positions] for t in (cos, sin)]
    compare(
        lambda x: rotary(x, cos, sin, positions=positions, **options),
        lambda x: plain(x, *tables, **options),
        lambda x: reference.rotary(x, *(t.double() for t in tables), **options),
        [x],
        layouts=[layout],
        grad_output=grad,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("D", "half", "layout", "grad"),
    [
        (16, 8, "contiguous", "random"),
        (2, 1, "padded", "expanded"),
        (80, 40, "transposed", "random"),
        (40, 12, "padded", "random"),
        (64, 8, "offset", "expanded"),
        (7, 3, "transposed", "random"),
    ],
)
def test_bhtd(D, half, layout, grad, interleaved, dtype):
    x = torch.randn(B, H, T, D).to(dtype)
    judge(x, *table(T, half), layout, grad, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_other_layouts(interleaved):
    """BTHD, packed, one head, and BHTD that is a view of BTHD."""
    cos, sin = table(T, 8)
    column = cos[:, None], sin[:, None]
    judge(torch.randn(B, T, H, 20), *column, interleaved=interleaved)
    judge(torch.randn(T, H, 20), *column, interleaved=interleaved)
    judge(torch.randn(T, 20), cos, sin, interleaved=interleaved)
    base = guard(torch.randn(B, T, H, 20))
    view = base.transpose(1, 2)
    out = rotary(view, cos, sin, interleaved=interleaved)
    exact = reference.rotary(view.double(), cos.double(), sin.double(), interleaved=interleaved)
    assert max_error(out, exact) < 1e-6
    op = torch.ops.fastgpt_kernels.rotary
    assert op(view, cos, sin, None, interleaved, False).stride() == view.stride()
    assert_unwritten(base)


def test_rows_at_different_positions():
    """Decoding: each row of the batch continues at an offset of its own."""
    cos, sin = table(50, 8)
    positions = torch.tensor([7, 31])[:, None, None] + torch.arange(T)
    x = torch.randn(B, H, T, 20)
    judge(x, cos, sin, positions=positions)
    judge(x, cos, sin, positions=positions.int(), interleaved=True)
    judge(x, cos[positions], sin[positions])
    judge(x.transpose(1, 2), cos, sin, positions=positions.transpose(1, 2))
    judge(x, cos, sin, positions=torch.arange(3, 3 + T))
    one = rotary(x[:, :, 2:3], cos, sin, positions=positions[:, :, 2:3])
    whole = rotary(x, cos, sin, positions=positions)
    assert torch.equal(one, whole[:, :, 2:3])


def test_heads_of_one_projection_in_one_call():
    qkv = torch.randn(B, T, 3 * H, 16)
    cos, sin = (t[:, None] for t in table(T, 8))
    both = rotary(qkv[:, :, : 2 * H], cos, sin)
    q, k = rotary(qkv[:, :, :H], cos, sin), rotary(qkv[:, :, H : 2 * H], cos, sin)
    assert torch.equal(both, torch.cat((q, k), 2))


def test_scores_depend_on_distance_only():
    cos, sin = table(200, 8)
    q, k = torch.randn(1, 16).expand(200, 16), torch.randn(1, 16).expand(200, 16)
    scores = rotary(q, cos, sin) @ rotary(k, cos, sin).T
    for distance in (0, 1, 17):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)


def test_conventions_of_others():
    """``transformers`` (cos and sin doubled) and the complex product of the paper."""
    x, (cos, sin) = torch.randn(B, H, T, 16), table(T, 8)
    doubled_cos, doubled_sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    half_turned = torch.cat((-x[..., 8:], x[..., :8]), -1)
    torch.testing.assert_close(rotary(x, cos, sin), x * doubled_cos + half_turned * doubled_sin)
    phase = torch.polar(torch.ones(T, 8), torch.atan2(sin, cos))
    complex_x = torch.view_as_complex(x.unflatten(-1, (8, 2)).contiguous())
    expected = torch.view_as_real(complex_x * phase).flatten(-2)
    torch.testing.assert_close(
        rotary(x, cos, sin, interleaved=True), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_strides_beyond_31_bits(transposed):
    x = huge_stride_rows(torch.randn(16, 3) if transposed else torch.randn(3, 16))
    x = x.t() if transposed else x
    cos, sin = table(3, 8)
    op = torch.ops.fastgpt_kernels.rotary
    if transposed:  # empty_like of x would be as far apart, but dense: it is not
        assert torch.empty_like(x).numel() == 48
    assert torch.equal(
        op(x, cos, sin, None, False, False), op(x.contiguous(), cos, sin, None, False, False)
    )


def test_empty():
    x = torch.empty(0, H, T, 16, requires_grad=True)
    rotary(x, *table(T, 8)).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("x", "half", "positions", "message"),
    [
        ((T, 16), 9, None, "half the head dim"),
        ((16,), 8, None, "two to four dims"),
        ((B, T, H, 16), 8, None, "cos and sin .* broadcast"),
        ((B, H, T, 16), 8, torch.zeros(3, dtype=torch.int64), "positions .* broadcast"),
    ],
)
def test_errors_are_named(x, half, positions, message):
    with pytest.raises(ValueError, match=message):
        rotary(torch.randn(x), *table(T, half), positions=positions)


def test_tables_are_two_dimensional():
    cos, sin = (t[None] for t in table(T, 8))
    with pytest.raises(ValueError, match="tables"):
        rotary(torch.randn(T, 16), cos, sin, positions=torch.arange(T))
    with pytest.raises(ValueError, match="one shape"):
        rotary(torch.randn(T, 16), cos, sin[..., :3])

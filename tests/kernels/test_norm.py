"""layer_norm and rms_norm on the CPU: numerics against float64, layouts, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import LAYOUTS, compare

from fastgpt_kernels import add_layer_norm, add_rms_norm, cpu, layer_norm, reference, rms_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 3), (7, 41), (64, 768), (3, 5, 1023), (768, 64), (2, 4096)]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """The same numbers, without a C++ compiler run for each shape."""
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


@pytest.fixture(params=["few elements", "many"])
def path(request, monkeypatch):
    """Both paths of an eager call, whatever the number of elements."""
    many = request.param == "many"
    monkeypatch.setattr(cpu, "worth_fusing", lambda x: many and x.dtype != torch.float64)


def _inputs(shape, dtype):
    x = torch.randn(shape) * 2 + 3
    return [t.to(dtype) for t in (x, torch.randn(shape[-1]), torch.randn(shape[-1]))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grad", ["random", "expanded"])
@pytest.mark.usefixtures("path")
def test_layer_norm(shape, dtype, grad):
    n = shape[-1:]
    layout = LAYOUTS[(len(shape) + DTYPES.index(dtype)) % 4]
    compare(
        lambda x, w, b: layer_norm(x, n, w, b),
        lambda x, w, b: F.layer_norm(x, n, w, b),
        lambda x, w, b: reference.layer_norm(x, n, w, b),
        _inputs(shape, dtype),
        layouts=[layout, "padded", "contiguous"],
        grad_output=grad,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("path")
def test_rms_norm(shape, dtype, layout):
    n = shape[-1:]
    compare(
        lambda x, w: rms_norm(x, n, w),
        lambda x, w: F.rms_norm(x, n, w),
        lambda x, w: reference.rms_norm(x, n, w),
        _inputs(shape, dtype)[:2],
        layouts=[layout, "contiguous"],
    )


@pytest.mark.usefixtures("path")
def test_float32_statistics_beat_bfloat16_ones():
    """Mean 100, spread 0.5: PyTorch's bfloat16 statistics put percents on dw, ours a rounding."""
    x = (torch.randn(64, 768) * 0.5 + 100).bfloat16()
    grad = torch.randn(64, 768).bfloat16()

    def dw(norm, dtype, weight_dtype):
        w = torch.ones(768, dtype=weight_dtype, requires_grad=True)
        norm(x.to(dtype), (768,), w).backward(grad.to(dtype))
        return w.grad.double()

    exact = dw(reference.layer_norm, torch.float64, torch.float64)

    def error(norm, weight_dtype):
        difference = dw(norm, torch.bfloat16, weight_dtype) - exact
        return (difference.abs().max() / exact.abs().max()).item()

    assert error(layer_norm, torch.bfloat16) <= 2**-8  # rounding of dw itself
    assert error(layer_norm, torch.float32) <= 1e-4
    assert error(F.layer_norm, torch.bfloat16) >= 2e-2


@pytest.mark.parametrize("residual", [False, True])
def test_compiled_passes_are_those_of_the_tests_above(residual, monkeypatch):
    """A call large enough runs them compiled; one odd size, parameters of another type."""
    x, r, w = torch.randn(33, 4099).bfloat16(), torch.randn(33, 4099).bfloat16(), torch.randn(4099)

    def results():
        leaves = [v.clone().requires_grad_() for v in (x, w, r)]
        y = (
            add_rms_norm(leaves[0], leaves[2], 4099, leaves[1])
            if residual
            else [layer_norm(leaves[0], 4099, leaves[1], leaves[1])]
        )
        used = leaves[: 2 + residual]
        return *y, *torch.autograd.grad(y, used, [x] * len(y))

    monkeypatch.setattr(cpu, "worth_fusing", lambda x: True)
    expected = results()
    monkeypatch.undo()
    assert cpu.worth_fusing(x)
    for a, b in zip(results(), expected, strict=True):  # a rounding step or two of the largest
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("path")
def test_default_eps_is_that_of_pytorch():
    for dtype in DTYPES:
        x = torch.full((1, 8), 1e-4, dtype=dtype)
        torch.testing.assert_close(rms_norm(x, 8), F.rms_norm(x, (8,)))


def test_float64_stays_float64():
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(layer_norm(x, 8), F.layer_norm(x, (8,)))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, 8), x.requires_grad_())


@pytest.mark.usefixtures("path")
def test_parameters_may_be_wider_than_the_input():
    x, w = torch.randn(4, 8).bfloat16(), torch.randn(8, requires_grad=True)
    y = layer_norm(x, 8, w, w)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "parameter", "message"),
    [
        ((5,), None, "last dims"),
        ((), None, "last dims"),
        ((2, 8), None, "last dims"),
        ((8,), 7, "weight"),
    ],
)
def test_wrong_shapes_are_named(shape, parameter, message):
    w = None if parameter is None else torch.ones(parameter)
    for norm in (layer_norm, rms_norm):
        with pytest.raises(ValueError, match=message):
            norm(torch.randn(4, 8), shape, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("path")
def test_add_norms_are_the_norm_of_the_sum(dtype):
    x, w, b = _inputs((7, 41), dtype)
    residual = torch.randn(7, 41).to(dtype)
    for ours, plain, parameters in (
        (add_layer_norm, layer_norm, (w, b)),
        (add_rms_norm, rms_norm, (w,)),
    ):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        y, total = ours(*leaves, 41, *parameters)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, plain(total, 41, *parameters))
        (y * y + total).sum().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.usefixtures("path")
def test_add_norms_keep_a_wider_residual():
    x, residual = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    y, total = add_rms_norm(x, residual, 8)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    for norm in (add_layer_norm, add_rms_norm):
        with pytest.raises(ValueError, match="residual"):
            norm(x, residual[:2], 8)

"""Activations: numerics against float64, layouts, errors; on the CPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import LAYOUTS, compare, huge_stride_rows

from fastgpt_kernels import cpu, geglu, gelu, reference, relu_squared, swiglu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(5,), (7, 41), (2, 3, 64), (3, 1100)]
GATED = {
    "swiglu": (swiglu, lambda g, u: F.silu(g) * u, reference.swiglu),
    "geglu": (geglu, lambda g, u: F.gelu(g) * u, reference.geglu),
    "geglu_tanh": (
        lambda g, u: geglu(g, u, "tanh"),
        lambda g, u: F.gelu(g, approximate="tanh") * u,
        lambda g, u: reference.geglu(g, u, "tanh"),
    ),
}
PLAIN = {
    "gelu": (gelu, F.gelu, reference.gelu),
    "gelu_tanh": (
        lambda x: gelu(x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: reference.gelu(x, "tanh"),
    ),
    "relu_squared": (relu_squared, lambda x: F.relu(x).square(), reference.relu_squared),
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GATED)
def test_gated(name, shape, dtype):
    """Value and both gradients."""
    turn = len(shape) + DTYPES.index(dtype)
    inputs = [(2 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)]
    layouts = [LAYOUTS[turn % 4], LAYOUTS[(turn + 1) % 4]]
    grad = "expanded" if turn % 3 == 0 else "random"
    compare(*GATED[name], inputs, layouts=layouts, grad_output=grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PLAIN)
def test_plain(name, shape, dtype):
    layout = LAYOUTS[(len(shape) + DTYPES.index(dtype)) % 4]
    compare(*PLAIN[name], [(2 * torch.randn(shape)).to(dtype)], layouts=[layout])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLAIN)
def test_far_tails(name, dtype):
    x = torch.cat([torch.linspace(-12, 12, 301), torch.tensor([0.0, -0.0, 1e-6, 200.0, -200.0])])
    compare(*PLAIN[name], [x.to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GATED)
def test_halves_of_one_projection(name, layout, dtype):
    """In one tensor, and as views of it: the same values, the gradient in one piece."""
    ours, native, exact = GATED[name]
    x = torch.randn(6, 80).to(dtype)
    whole = {"swiglu": swiglu, "geglu": geglu, "geglu_tanh": lambda x: geglu(x, None, "tanh")}
    for fn in (whole[name], lambda x: ours(*x.chunk(2, dim=-1))):
        compare(
            fn,
            lambda x: native(*x.chunk(2, dim=-1)),
            lambda x: exact(*x.chunk(2, dim=-1)),
            [x],
            layouts=[layout],
        )


def test_empty_and_zero_dimensional():
    x = torch.empty(0, 8, requires_grad=True)
    swiglu(x, x).sum().backward()
    swiglu(x).sum().backward()
    assert x.grad.shape == (0, 8)
    one = torch.tensor(0.7)
    torch.testing.assert_close(gelu(one), F.gelu(one))
    torch.testing.assert_close(swiglu(one, one), F.silu(one) * one)


def test_rows_and_columns_beyond_31_bits():
    x = huge_stride_rows(torch.randn(3, 24).bfloat16())
    for far in (x, x.t()):
        near = far.contiguous()
        assert torch.equal(swiglu(far, far), swiglu(near, near))
        leaves = [t.detach().requires_grad_() for t in (far, near)]
        grads = [torch.autograd.grad(relu_squared(t).sum(), t)[0] for t in leaves]
        assert torch.equal(*grads)


def test_repeats_bit_for_bit():
    x = torch.randn(6, 80).bfloat16().requires_grad_()
    runs = [torch.autograd.grad(swiglu(x).square().sum(), x)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_only_inputs_are_kept_for_the_backward():
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    kept: list[int] = []

    def pack(x):
        kept.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        swiglu(gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: swiglu(x, x[:1]), "alike"),
        (lambda x: geglu(x, x.double()), "alike"),
        (lambda x: swiglu(x), "halves"),
        (lambda x: gelu(x, approximate="erf"), "approximate"),
        (lambda x: geglu(x, x, approximate="erf"), "approximate"),
    ],
)
def test_errors_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 7))

"""Rotary and activation kernels in the interpreter: what the CPU paths are asked, and traffic."""

from __future__ import annotations

import pytest
import test_activations
import test_rotary
import torch
import traffic
from test_activations import uncompiled  # noqa: F401

from fastgpt_kernels import rotary, swiglu
from fastgpt_kernels._common import use_triton


def _borrow(module, prefix):
    tests = {name: fn for name, fn in vars(module).items() if name.startswith("test_")}
    return {f"test_{prefix}_{name.removeprefix('test_')}": fn for name, fn in tests.items()}


globals().update(_borrow(test_activations, "activations"), **_borrow(test_rotary, "rotary"))


def test_kernels_run():
    assert use_triton(torch.empty(0))


@pytest.mark.parametrize("packed", [False, True])
def test_gated_traffic_is_what_must_move(packed):
    x = torch.randn(8, 192).bfloat16()
    parts = (x,) if packed else x.chunk(2, dim=-1)
    leaves = [part.detach().requires_grad_() for part in parts]
    grad = torch.randn(8, 96).bfloat16()
    with traffic.count() as moved:
        y = swiglu(*leaves)
        assert moved.loads().total == traffic.nbytes(x)
        assert moved.stores().total == traffic.nbytes(y)
    y = swiglu(*leaves)
    with traffic.count() as moved:
        torch.autograd.grad(y, leaves, grad)
    assert moved.loads().total == traffic.nbytes(x, grad)
    assert moved.stores().total == traffic.nbytes(x)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_traffic_is_what_must_move(interleaved):
    x, (cos, sin) = torch.randn(2, 3, 16, 40).bfloat16(), test_rotary.table(16, 8)
    with traffic.count() as moved:
        y = rotary(x, cos, sin, interleaved=interleaved)
    assert moved.loads(x) == traffic.once(x)
    assert moved.stores(y) == traffic.once(y)

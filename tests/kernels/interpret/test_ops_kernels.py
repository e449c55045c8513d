"""The custom operators on their Triton path, in the interpreter: what the CPU tests ask of them."""

from __future__ import annotations

import pytest
import torch
from test_ops import CASES, _losses

from fastgpt_kernels._common import use_triton


@pytest.mark.parametrize(("name", "args"), CASES, ids=[name for name, _ in CASES])
def test_opcheck(name, args):
    """Shapes, dtypes and strides of the fakes are those of the kernels' outputs."""
    assert use_triton(args[0])
    torch.library.opcheck(getattr(torch.ops.fastgpt_kernels, name).default, args)


def test_public_functions_compile_whole():
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    t = torch.randint(11, (5,))
    compiled = torch.compile(_losses, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(x, w, t), (x, w))
    for a, b in zip(gradients, torch.autograd.grad(_losses(x, w, t), (x, w)), strict=True):
        torch.testing.assert_close(a, b)

"""What the functions cannot compute in is refused by name, before a kernel sees it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastgpt_kernels as kernels
from fastgpt_kernels import _common

X = torch.ones(2, 4)
IDS = torch.zeros(2, dtype=torch.int64)


def _three(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, x, x


CALLS = {
    "add_layer_norm": lambda x: kernels.add_layer_norm(x, x, (4,)),
    "add_rms_norm": lambda x: kernels.add_rms_norm(x, x, (4,)),
    "attention": lambda x: kernels.attention(*_three(x[None, None])),
    "attention_with_lse": lambda x: kernels.attention_with_lse(*_three(x[None, None])),
    "attention_varlen": lambda x: kernels.attention_varlen(
        *_three(x[:, None]), torch.zeros(1).int()
    ),
    "attention_decode": lambda x: kernels.attention_decode(
        *_three(x[None, :, None]), torch.ones(1).int()
    ),
    "cross_entropy": lambda x: kernels.cross_entropy(x, IDS),
    "geglu": lambda x: kernels.geglu(x),
    "gelu": lambda x: kernels.gelu(x),
    "layer_norm": lambda x: kernels.layer_norm(x, (4,)),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x, x, IDS),
    "linear_log_probs": lambda x: kernels.linear_log_probs(x, x, IDS),
    "relu_squared": lambda x: kernels.relu_squared(x),
    "rms_norm": lambda x: kernels.rms_norm(x, (4,)),
    "rotary": lambda x: kernels.rotary(x, X[:, :2], X[:, :2]),
    "swiglu": lambda x: kernels.swiglu(x),
}


def test_every_function_is_here():
    assert set(CALLS) == set(kernels.__all__) - {"gae"}  # which casts whatever it gets to float32


@pytest.mark.parametrize("name", CALLS)
def test_integers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name.removesuffix('_with_lse')}: torch.int64"):
        CALLS[name](X.long())


@pytest.mark.parametrize("name", [name for name in CALLS if "attention" not in name])
def test_float64_is_for_the_cpu(name, monkeypatch):
    """Attention has no float64 at all."""
    CALLS[name](X.double())
    monkeypatch.setattr(_common, "use_triton", lambda x: True)
    with pytest.raises(ValueError, match=f"{name}: torch.float64"):
        CALLS[name](X.double())

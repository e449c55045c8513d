"""What the functions cannot compute in, or with, is refused by name, before a kernel sees it."""

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


def _away(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="meta")


ELSEWHERE = {  # one operand lies on another device than the first one
    "add_layer_norm": [
        lambda: kernels.add_layer_norm(X, _away(X), (4,)),
        lambda: kernels.add_layer_norm(X, X, (4,), X[0], _away(X[0])),
    ],
    "add_rms_norm": [lambda: kernels.add_rms_norm(X, X, (4,), _away(X[0]))],
    "attention": [
        lambda: kernels.attention(X[None, None], _away(X[None, None]), X[None, None]),
        lambda: kernels.attention(X[None, None], X[None, None], _away(X[None, None])),
    ],
    "attention_varlen": [
        lambda: kernels.attention_varlen(X[:, None], *[_away(X[:, None])] * 2, IDS[:1].int())
    ],
    "attention_decode": [
        lambda: kernels.attention_decode(
            X[None, :, None], *[_away(X[None, :, None])] * 2, IDS[:1].int()
        )
    ],
    "cross_entropy": [lambda: kernels.cross_entropy(X, _away(IDS))],
    "gae": [lambda: kernels.gae(_away(X), X, X), lambda: kernels.gae(X, X, _away(X))],
    "geglu": [lambda: kernels.geglu(X, _away(X))],
    "layer_norm": [lambda: kernels.layer_norm(X, (4,), _away(X[0]))],
    "linear_cross_entropy": [
        lambda: kernels.linear_cross_entropy(X, _away(X), IDS),
        lambda: kernels.linear_cross_entropy(X, X, _away(IDS)),
        lambda: kernels.linear_cross_entropy(X, X, IDS, linear_bias=_away(X[:, 0])),
    ],
    "linear_log_probs": [
        lambda: kernels.linear_log_probs(X, _away(X), IDS),
        lambda: kernels.linear_log_probs(X, X, _away(IDS)),
    ],
    "rms_norm": [lambda: kernels.rms_norm(X, (4,), _away(X[0]))],
    "rotary": [
        lambda: kernels.rotary(X, *[_away(X[:, :2])] * 2),
        lambda: kernels.rotary(X, X[:, :2], X[:, :2], positions=_away(IDS)),
    ],
    "swiglu": [lambda: kernels.swiglu(X, _away(X))],
}


def test_every_function_of_several_tensors_is_here():
    assert set(ELSEWHERE) == set(kernels.__all__) - {"attention_with_lse", "gelu", "relu_squared"}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_operands_on_another_device_are_refused(name):
    """A kernel would read at their address, on its own device."""
    for call in ELSEWHERE[name]:
        with pytest.raises(ValueError, match=f"{name}: got tensors on .*; move them to one device"):
            call()

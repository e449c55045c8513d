"""The advantage kernel in the interpreter: the same tests as on the CPU, and its own edges."""

from __future__ import annotations

import pytest
import torch
from harness import huge_stride_rows
from test_gae import (  # noqa: F401  (collected here too, where they reach the kernel)
    check,
    test_a_hole_is_as_if_cut_out,
    test_dtypes_and_detached,
    test_layouts,
    test_no_rows_and_no_positions,
    test_padding_on_either_side_and_a_row_of_nothing,
)

from fastgpt_kernels import gae


@pytest.mark.parametrize("length", [1, 17, 512, 513, 1025])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.0)])
def test_definition(length, gamma, gae_lambda):
    """Lengths around one block and two, where the scan hands over."""
    rewards, values = torch.randn(2, length), torch.randn(2, length)
    check(rewards, values, torch.rand(2, length) > 0.3, gamma=gamma, gae_lambda=gae_lambda)


def test_values_far_from_zero():
    """Advantages are differences of returns and values: no worse than the recurrence in float32."""
    rewards, values, mask = torch.randn(2, 600), torch.randn(2, 600) + 300.0, torch.ones(2, 600)
    exact = _recurrence(rewards.double(), values.double())
    native = (_recurrence(rewards, values) - exact).abs().max()
    assert (gae(rewards, values, mask)[0] - exact).abs().max() <= 2 * native + 2 * 300 * 1.2e-7


def _recurrence(rewards, values):
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        later = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        following = rewards[:, t] + later - values[:, t] + 0.95 * following
        advantages[:, t] = following
    return advantages


def test_rows_beyond_31_bits():
    x, mask = torch.randn(3, 40), torch.ones(3, 40, dtype=torch.bool)
    far = huge_stride_rows(x)
    for a, b in zip(gae(far, far, mask), gae(x, x, mask), strict=True):
        assert torch.equal(a, b)

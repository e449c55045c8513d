"""gae against the double sum of its definition, and what masks mean."""

from __future__ import annotations

import pytest
import torch
from harness import guard

from fastgpt_kernels import gae
from fastgpt_kernels.gae import CPU_BLOCK

SHAPES = [(1, 1), (3, 5), (2, CPU_BLOCK), (2, CPU_BLOCK + 1), (4, 3 * CPU_BLOCK - 1)]


def definition(rewards, values, gamma, gae_lambda):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, for one row without gaps, in float64."""
    r, v = rewards.double(), torch.cat([values.double(), torch.zeros(1)])
    delta = r + gamma * v[1:] - v[:-1]
    decay = (gamma * gae_lambda) ** torch.arange(len(r), dtype=torch.float64)
    return torch.stack([(decay[: len(r) - t] * delta[t:]).sum() for t in range(len(r))])


def check(rewards, values, mask, *, gamma, gae_lambda, layout="contiguous"):
    """Every row against its definition on what the mask keeps; the rest holds NaN, and gives 0."""
    poisoned = (torch.where(mask, x, float("nan")) for x in (rewards, values))
    inputs = [guard(x, layout) for x in (*poisoned, mask)]
    results = gae(*inputs, gamma=gamma, gae_lambda=gae_lambda)
    assert all(x.dtype == torch.float32 and x.shape == mask.shape for x in results)
    for row in range(len(mask)):
        kept = mask[row]
        expected = torch.zeros(2, mask.shape[1], dtype=torch.float64)
        if kept.any():
            advantages = definition(rewards[row, kept], values[row, kept], gamma, gae_lambda)
            expected[0, kept] = advantages
            expected[1, kept] = advantages + values[row, kept]
        torch.testing.assert_close(
            torch.stack([x[row] for x in results]).double(), expected, rtol=1e-5, atol=2e-5
        )
    return results


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.99, 1.0), (0.9, 0.0), (0.0, 1)])
def test_definition(shape, gamma, gae_lambda):
    rewards, values = torch.randn(shape), torch.randn(shape)
    holes = torch.rand(shape) > 0.3
    for mask in (torch.ones_like(holes), holes):
        check(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)


def test_padding_on_either_side_and_a_row_of_nothing():
    T = CPU_BLOCK + 9
    mask = torch.zeros(5, T, dtype=torch.bool)
    mask[0, :7] = mask[1, -7:] = mask[2, 30:-3] = mask[3, 4] = True
    rewards, values = torch.randn(5, T), torch.randn(5, T)
    rewards[1, -7:], values[1, -7:] = rewards[0, :7], values[0, :7]
    advantages, returns = check(rewards, values, mask, gamma=0.98, gae_lambda=0.9)
    torch.testing.assert_close(advantages[0, :7], advantages[1, -7:])
    assert returns[4].eq(0).all()
    torch.testing.assert_close(returns[3, 4], rewards[3, 4])  # nothing comes after


def test_a_hole_is_as_if_cut_out():
    rewards, values = torch.randn(1, 12), torch.randn(1, 12)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, [3, 4, 8]] = False
    kept = mask[0]
    whole = gae(rewards, values, mask)
    cut = gae(rewards[:, kept], values[:, kept], mask[:, kept])
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a[:, kept], b)


def test_lambda_one_returns_are_rewards_to_go():
    rewards, values, mask = torch.randn(2, 90), torch.randn(2, 90), torch.ones(2, 90)
    _, returns = gae(rewards, values, mask, gae_lambda=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "transposed"])
def test_layouts(layout):
    rewards, values, mask = torch.randn(4, 70), torch.randn(4, 70), torch.rand(4, 70) > 0.3
    check(rewards, values, mask, gamma=1.0, gae_lambda=0.95, layout=layout)


def test_dtypes_and_detached():
    rewards = torch.randn(2, 9).bfloat16()
    values = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    for mask in (torch.ones(2, 9), torch.ones(1, 1, dtype=torch.int64).expand(2, 9)):
        results = gae(rewards, values, mask)
        assert all(x.dtype == torch.float32 and not x.requires_grad for x in results)
        expected = gae(rewards.float(), values.detach().float(), torch.ones(2, 9))
        torch.testing.assert_close(results, expected)


def test_no_rows_and_no_positions():
    for shape in ((0, 5), (3, 0)):
        assert all(x.shape == shape for x in gae(*[torch.zeros(shape)] * 3))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3)], {}, "shape"),
        ([torch.zeros(3)] * 3, {}, "shape"),
        ([torch.zeros(2, 3)] * 3, {"gamma": 1.1}, "gamma"),
        ([torch.zeros(2, 3)] * 3, {"gae_lambda": -0.1}, "gae_lambda"),
    ],
)
def test_what_is_wrong_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        gae(*arguments, **options)

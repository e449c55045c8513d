"""The formulas of reinforcement learning from feedback, as pure functions of tensors.

Shape suffixes: B responses, R places of a response (right-padded), G responses of one prompt.

A response's ``mask_BR`` is true up to and including its first end-of-sequence id. Every mean here
is over that mask: padding is in no sum and in no count. Losses are *sums*, because the training
loop divides by the number of tokens of the whole accumulated step.

Sources: Ziegler et al. 2019 (arXiv:1909.08593) for the KL reward, its controller and whitening;
Stiennon et al. 2020 (arXiv:2009.01325) and InstructGPT (arXiv:2203.02155) for the set-up; Schulman
et al. 2017 (arXiv:1707.06347) for the clipped losses; Shao et al. 2024 (arXiv:2402.03300) for GRPO;
Ahmadian et al. 2024 (arXiv:2402.14740) for RLOO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""exp() of more would be infinite in a float32 sum; a ratio of e^20 is clipped by PPO anyway."""


def response_mask(ids_BR: Tensor, end_id: int) -> Tensor:
    """Bool (B, R): true up to and including the first ``end_id``, everywhere without one."""
    is_end = ids_BR == end_id
    return (is_end.cumsum(-1) - is_end.long()) == 0


def last_places(mask: Tensor) -> Tensor:
    """Index (B) of the last true place of each row of bool (B, R), 0 for a row without."""
    places = torch.arange(mask.shape[-1], device=mask.device)
    return (places * mask).amax(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask``; 0 where nothing is."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp_min(1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance (as ``torch.var``) of ``x`` where ``mask``; 0 for fewer than two."""
    deviation = torch.where(mask, x - masked_mean(x, mask), 0.0)
    return deviation.square().sum() / (mask.sum() - 1).clamp_min(1)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """``x`` with variance 1 over ``mask``, and mean 0 (or its own, for rewards); 0 outside.

    Ziegler et al.: ``(x - mean) * rsqrt(var + 1e-8)``, ``+ mean`` without ``shift_mean``.
    """
    exact = x.double()  # so that equal values differ by nothing
    mean = masked_mean(exact, mask)
    white = (exact - mean) * torch.rsqrt(masked_var(exact, mask) + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0).to(x.dtype)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: KLEstimator = "k1") -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token, in nats.

    With d = log p - log q of a token drawn from p (http://joschu.net/blog/kl-approx.html):
    k1 = d, unbiased, of either sign; k2 = d^2 / 2; k3 = exp(-d) - 1 + d, unbiased and >= 0.
    As a term of a *loss* it is the gradient of k2 that is that of the KL, k3's only near d = 0.
    """
    difference = log_probs - ref_log_probs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    limited = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(limited) - limited


def adapted_kl_coef(
    coef: float, kl: float, *, target: float, episodes: int, horizon: float
) -> float:
    """KL coefficient after a rollout: ``coef * (1 + clip(kl / target - 1, +-0.2) * n / horizon)``.

    ``kl`` is the mean over responses of the KL summed over tokens. Ziegler et al., section 2.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * episodes / horizon)


def token_rewards(
    scores_B: Tensor,
    log_probs_BR: Tensor,
    ref_log_probs_BR: Tensor,
    mask_BR: Tensor,
    kl_coef: float,
) -> Tensor:
    """Reward of each token: ``-kl_coef * k1``, and the score at the last token of the response.

    That is the first end-of-sequence id, or the last token of a response without; float32 (B, R),
    0 outside the mask.
    """
    kl_BR = kl_estimate(log_probs_BR, ref_log_probs_BR, "k1")
    rewards_BR = torch.where(mask_BR, -kl_coef * kl_BR, 0.0)
    rows = torch.arange(len(scores_B), device=scores_B.device)
    rewards_BR[rows, last_places(mask_BR)] += scores_B
    return rewards_BR


def response_scores(
    scores_B: Tensor,
    ended_B: Tensor,
    *,
    missing_end_penalty: float = 0.0,
    clip: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """Scores as they are used: normalised over the batch, clipped, less a penalty without an end.

    Args:
        scores_B: float32, of the reward model or function.
        ended_B: bool, whether a response has an end-of-sequence id.
        missing_end_penalty: taken off where it has none.
        clip: largest absolute value, before the penalty.
        normalize: to mean 0 and standard deviation 1 over the batch first.
    """
    if normalize:
        scores_B = masked_whiten(scores_B, torch.ones_like(scores_B, dtype=torch.bool))
    if clip is not None:
        scores_B = scores_B.clamp(-clip, clip)
    return scores_B - missing_end_penalty * (~ended_B).to(scores_B.dtype)


def group_advantages(scores_B: Tensor, group: int, *, scale: bool = True) -> Tensor:
    """GRPO: scores against the mean of their prompt's ``group``, over its standard deviation.

    Rows of one prompt are neighbours. The deviation is the unbiased one, with 1e-4 added; without
    ``scale`` it is not divided by (Dr. GRPO, arXiv:2503.20783).
    """
    scores_NG = scores_B.double().view(-1, group)  # so that equal scores differ by nothing
    centred_NG = scores_NG - scores_NG.mean(1, keepdim=True)
    if scale:
        centred_NG = centred_NG / (scores_NG.std(1, keepdim=True) + 1e-4)
    return centred_NG.flatten().to(scores_B.dtype)


def leave_one_out_advantages(scores_B: Tensor, group: int) -> Tensor:
    """RLOO: each score less the mean of the other scores of its prompt (neighbouring rows)."""
    scores_NG = scores_B.double().view(-1, group)
    others_NG = (scores_NG.sum(1, keepdim=True) - scores_NG) / (group - 1)
    return (scores_NG - others_NG).flatten().to(scores_B.dtype)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip: float
) -> Tensor:
    """PPO's loss of each token: ``max(-A r, -A clip(r, 1 - clip, 1 + clip))``, r the ratio."""
    ratio = probability_ratio(log_probs, old_log_probs)
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def probability_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """Probability of each token now over that when it was sampled."""
    return (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Half the larger squared error of a value, and of it held within ``clip`` of the old one."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (held - returns).square())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """``1 - var(returns - values) / var(returns)`` over the mask; 0 for constant returns."""
    total = float(masked_var(returns, mask))
    return 1.0 - float(masked_var(returns - values, mask)) / total if total > 0 else 0.0


def distinct_n(rows: Sequence[Sequence[int]], n: int = 2) -> float:
    """Different n-grams over all n-grams of the rows together (Li et al. 2016); 0 without any."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0

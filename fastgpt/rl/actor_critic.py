"""Policy and value model as one trainable module, and the losses they are updated with.

Shape suffixes: B responses, T positions of a row, N tokens of responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgpt.distributed import World
from fastgpt.loss import next_token_loss
from fastgpt.model import GPT
from fastgpt.preference.reward_model import RewardModel
from fastgpt.rl import formulas
from fastgpt.rl.rollout import token_log_probs


class ActorCritic(nn.Module):
    """A policy, and the value model that belongs to it if the algorithm has one.

    In a checkpoint the policy is the file "model": whatever opens a run gets the policy.
    """

    def __init__(self, policy: GPT, value: RewardModel | None):
        super().__init__()
        self.policy, self.value = policy, value
        self.config, self.compute_dtype = policy.config, policy.compute_dtype

    def checkpoint_parts(self) -> dict[str, nn.Module]:
        """See `fastgpt.trainer.Trainable`."""
        value = {} if self.value is None else {"value": self.value}
        return {"model": self.policy, **value}

    def token_values(self, tokens_BT: Tensor, places_N: Tensor) -> Tensor:
        """Value of each beginning that ends at one of ``places_N`` of (B, T), float32 (N)."""
        assert self.value is not None
        return self.value.normalized(self.value.raw(tokens_BT, places_N))


@dataclass(frozen=True)
class LossWeights:
    """Clips, weights of terms, the estimator of the KL term and the temperature."""

    clip: float
    value_clip: float
    vf_coef: float
    entropy_coef: float
    kl_loss: Literal["k2", "k3"]
    temperature: float


NAMES = (
    "ratio",
    "approx_kl",
    "clip_fraction",
    "policy_loss",
    "value_loss",
    "entropy",
    "kl_loss",
    "ref_kl",
)


@dataclass
class UpdateStats:
    """Sums over the response tokens of one optimizer step; means over all processes at its end."""

    means: dict[str, float] = field(default_factory=dict)
    _sums: Tensor | None = None
    _left: int = 0

    def begin(self, micro_batches: int) -> None:
        """A step of this many micro-batches follows."""
        self._sums, self._left = None, micro_batches

    def add(self, values: Mapping[str, Tensor], world: World) -> bool:
        """Add per-token values (N) of a micro-batch; true with the last one, when `means` is set.

        Called from inside the forward pass, in the same order on all processes.
        """
        count = values["ratio"].new_tensor(len(values["ratio"]), dtype=torch.float64)
        sums = [values[name].detach().double().sum() for name in NAMES]
        total = torch.stack([*sums, count])
        self._sums = total if self._sums is None else self._sums + total
        self._left -= 1
        if self._left:
            return False
        *sums, count = world.sum(self._sums.tolist())
        self.means = {name: x / count for name, x in zip(NAMES, sums, strict=True)}
        return True


def summed_loss(
    model: ActorCritic, batch: Mapping[str, Any], weights: LossWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the response tokens of a micro-batch, and the terms of each token (N).

    Args:
        model: policy and value model.
        batch: ``tokens_BT``, ``places_N``, ``targets_BT`` (N), ``ref_log_probs_N``,
            ``advantages_N``; ``old_log_probs_N`` if this is not the policy that sampled; with a
            value model ``old_values_N`` and ``returns_N``; with a KL term
            its ``kl_loss_coef`` (0-d); ``policy_weight`` (0-d), 0 while the
            value model warms up. With ``inputs_BT`` the loss of that pretraining text is added,
            ``ptx_scale`` times the sum over its targets ``ptx_targets_BT``.
        weights: of the terms.
    """
    log_probs_N, entropy_N = token_log_probs(
        model.policy,
        batch["tokens_BT"],
        batch["places_N"],
        batch["targets_BT"],
        weights.temperature,
    )
    old_N = batch.get("old_log_probs_N", log_probs_N.detach())
    policy_N = formulas.policy_loss(log_probs_N, old_N, batch["advantages_N"], clip=weights.clip)
    loss_N = policy_N
    if weights.entropy_coef:  # its gradient costs a pass over all logits
        loss_N = loss_N - weights.entropy_coef * entropy_N
    kl_N = torch.zeros_like(policy_N)
    if "kl_loss_coef" in batch:
        kl_N = formulas.kl_estimate(log_probs_N, batch["ref_log_probs_N"], weights.kl_loss)
        loss_N = loss_N + batch["kl_loss_coef"] * kl_N
    loss = batch["policy_weight"] * loss_N.sum()
    value_N = torch.zeros_like(policy_N)
    if model.value is not None:
        values_N = model.token_values(batch["tokens_BT"], batch["places_N"])
        value_N = formulas.value_loss(
            values_N, batch["old_values_N"], batch["returns_N"], clip=weights.value_clip
        )
        loss = loss + weights.vf_coef * value_N.sum()
    if "inputs_BT" in batch:
        text = {"inputs_BT": batch["inputs_BT"], "targets_BT": batch["ptx_targets_BT"]}
        ptx = next_token_loss(model.policy, text)
        loss = loss + batch["policy_weight"] * batch["ptx_scale"] * ptx
    ratio_N = formulas.probability_ratio(log_probs_N, old_N)
    terms = {
        "ratio": ratio_N,
        "approx_kl": formulas.kl_estimate(old_N, log_probs_N, "k3"),
        "clip_fraction": ((ratio_N - 1.0).abs() > weights.clip).float(),
        "policy_loss": policy_N,
        "value_loss": value_N,
        "entropy": entropy_N,
        "kl_loss": kl_N,
        "ref_kl": formulas.kl_estimate(log_probs_N, batch["ref_log_probs_N"], "k1"),
    }
    return loss, terms

"""Options of reinforcement learning, without importing torch; ``--help`` prints the doc strings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastgpt.errors import UsageError


@dataclass(frozen=True)
class RLConfig:
    """Rollouts, rewards and updates."""

    algorithm: Literal["ppo", "grpo", "rloo", "reinforce"] = "ppo"
    """ppo: a value model and GAE; grpo: scores normalised within the answers to a prompt, KL in the
    loss; rloo: each score against the others of its prompt; reinforce: rewards to go against the
    mean of the batch. All of them clip the ratio and average over tokens."""
    episodes: int = 8192
    """Responses sampled in the whole run, unless --steps says how long to train."""
    rollout: int = 64
    """Responses sampled before each round of updates, over all processes."""
    group: int | None = None
    """Responses to each prompt; default: 8 for grpo and rloo, else 1."""
    minibatches: int = 4
    """Optimizer steps of one pass over a rollout."""
    epochs: int = 4
    """Passes over a rollout."""
    max_new_tokens: int = 64
    """Longest response."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability."""
    kl_controller: Literal["adaptive", "fixed"] | None = None
    """adaptive: the coefficient follows the KL to --kl-target; fixed: it stays; default: fixed for
    grpo, else adaptive."""
    kl_coef: float | None = None
    """Of the KL to the model this run starts from: per token in the reward, with grpo in the loss;
    default: 0.04 for grpo (as published; 0 where a reward cannot be deceived), else 0.05, with
    which the controller begins."""
    kl_target: float = 6.0
    """KL, summed over a response, that the adaptive controller aims at (nats)."""
    kl_horizon: int = 10000
    """Episodes over which the controller answers an error in full."""
    kl_loss: Literal["k2", "k3"] = "k3"
    """Estimator in the loss of grpo: k3 as published; the gradient of k2 is that of the KL."""
    kl_stop: float = 0.1
    """A rollout ends early when the policy is this far from the one that sampled it (mean KL of a
    token); 0: never."""
    clip: float = 0.2
    """Ratios of probabilities count within 1 +- this."""
    value_clip: float = 0.2
    """Values count within this of those at sampling."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    whiten_advantages: bool = True
    """Advantages of ppo and reinforce get mean 0 and variance 1 over the tokens of a rollout."""
    whiten_rewards: bool = False
    """Rewards of ppo and reinforce get variance 1, and keep their mean."""
    missing_end_penalty: float = 1.0
    """Taken off the score of a response that was cut off."""
    score_clip: float | None = None
    """Largest absolute score."""
    normalize_scores: bool = False
    """Scores of a rollout get mean 0 and standard deviation 1."""
    critic_warmup: int = 0
    """First steps in which the value model learns alone."""
    ptx_coef: float = 0.0
    """Weight of the loss on pretraining text (PPO-ptx of InstructGPT)."""
    ptx_batch: int = 8
    """Sequences of that text in each step."""
    ptx_data: Path | None = None
    """Pretraining run whose text is used; default: the one that --init goes back to."""
    eval_prompts: int = 64
    """Prompts held out for evaluation, a quarter of them at most; 0: none."""

    def check(self) -> None:
        """Raise UsageError for values no run can have."""
        positive = ("episodes", "rollout", "minibatches", "epochs", "max_new_tokens")
        least = dict.fromkeys((*positive, "kl_horizon", "ptx_batch"), 1.0)
        least |= dict.fromkeys(("critic_warmup", "eval_prompts", "ptx_coef", "kl_coef"), 0.0)
        least |= dict.fromkeys(("vf_coef", "entropy_coef", "kl_stop", "missing_end_penalty"), 0.0)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value < math.inf:
                raise UsageError(f"{_flag(name, value)}: it must be at least {bound:g}")
        for name in ("temperature", "kl_target", "clip", "value_clip", "score_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{_flag(name, value)}: it must be above 0")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{_flag(name, getattr(self, name))}: between 0 and 1")
        if self.per_prompt < (2 if self.in_groups else 1):
            raise UsageError(
                f"--group {self.per_prompt}: {self.algorithm} compares responses to one prompt; "
                "it takes 2 at least"
            )
        if self.adapts_kl and self.kl_horizon < self.rollout:
            raise UsageError(
                f"--kl-horizon {self.kl_horizon}: less than a --rollout of {self.rollout}, it lets "
                "one rollout change the coefficient by more than a fifth; raise it, or take "
                "--kl-controller fixed"
            )
        for name, part in (("group", self.per_prompt), ("minibatches", self.minibatches)):
            if self.rollout % part:
                raise UsageError(f"--rollout {self.rollout} is not a multiple of --{name} {part}")

    @property
    def in_groups(self) -> bool:
        """Whether the algorithm compares the responses to one prompt."""
        return self.algorithm in ("grpo", "rloo")

    @property
    def per_prompt(self) -> int:
        """Responses to each prompt."""
        if self.group is None:
            return 8 if self.in_groups else 1
        return self.group

    @property
    def adapts_kl(self) -> bool:
        """Whether the KL coefficient follows the KL.

        A target for the KL of a whole response has a meaning where the KL is part of the reward.
        GRPO's is a mean over tokens in the loss, and its coefficient was published as a constant.
        """
        if self.kl_controller is None:
            return self.algorithm != "grpo"
        return self.kl_controller == "adaptive"

    @property
    def scores_first(self) -> bool:
        """Whether the policy scores a rollout before it is updated on it.

        A single update finds the log-probabilities in its own forward pass, whose policy is still
        the one that sampled. Where the KL is part of the reward, they are needed before.
        """
        return self.algorithm != "grpo" or self.adapts_kl or self.minibatches * self.epochs > 1

    @property
    def first_kl_coef(self) -> float:
        """The KL coefficient that a run begins with."""
        if self.kl_coef is None:
            return 0.04 if self.algorithm == "grpo" else 0.05
        return self.kl_coef

    @property
    def minibatch(self) -> int:
        """Responses of an optimizer step."""
        return self.rollout // self.minibatches

    @property
    def total_steps(self) -> int:
        """Optimizer steps that the episodes take when no rollout ends early."""
        rollouts = max(1, round(self.episodes / self.rollout))
        return rollouts * self.minibatches * self.epochs


def _flag(name: str, value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"--{name.replace('_', '-')} {text}"

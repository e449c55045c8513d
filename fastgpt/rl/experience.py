"""What a reinforcement run learns from: rollouts, their rewards, and the batches made of them.

Every process holds the whole rollout and computes the same rewards and advantages from it; sampling
and scoring are shared out, and so are the rows of a step. So a run with two processes is the run
with one, up to rounding, and a checkpoint of the first process is complete.

Shape suffixes: B responses, T positions of a row, R places of a response, N tokens of responses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgpt.data.batches import PackedDataset
from fastgpt.data.order import mix64, permute
from fastgpt.distributed import World
from fastgpt.errors import DataError, UsageError
from fastgpt.model import GPT
from fastgpt.rl import formulas
from fastgpt.rl.actor_critic import ActorCritic, LossWeights, UpdateStats, summed_loss
from fastgpt.rl.config import RLConfig
from fastgpt.rl.rollout import Rows, gather_rows, sample_responses, score_rows, token_log_probs
from fastgpt_kernels import gae

Scorer = Callable[[Rows, Sequence[int]], Tensor]
"""(some rows on the CPU, which prompt each answers) -> float32 scores (B)."""

SCORING_ROWS = 4
"""Without gradients this many times the rows of a training pass fit."""


@dataclass(frozen=True)
class Problem:
    """What is learned from what: models, prompts, scores. ``reference`` never changes."""

    model: ActorCritic
    reference: GPT
    prompts: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    scorer: Scorer
    """Score of responses to ``prompts``, then ``held_out``, numbered through."""
    end_id: int
    pad_id: int
    seed: int
    micro: int
    """Rows of one training pass."""
    ptx: PackedDataset | None = None
    reward: nn.Module | None = None
    """The frozen reward model among what ``scorer`` asks, if any."""
    sources: Mapping[str, object] = field(default_factory=dict)
    """Flag -> what it names, for messages."""


@dataclass(frozen=True)
class Rollout:
    """Responses and all that the updates take from them; float32 (B, R), 0 outside the mask."""

    rows: Rows
    columns: dict[str, Tensor]
    kl_coef: float


class Experience:
    """Batches, loss, metrics, evaluation and state of a reinforcement run, for `trainer.train`."""

    def __init__(self, config: RLConfig, problem: Problem, world: World):
        self.config, self.problem, self.world = config, problem, world
        self.stats = UpdateStats()
        self.weights = LossWeights(
            config.clip,
            config.value_clip,
            config.vf_coef,
            config.entropy_coef,
            config.kl_loss,
            config.temperature,
        )
        self.kl_coef = config.first_kl_coef
        self.generator = torch.Generator().manual_seed(problem.seed)
        self.rollout: Rollout | None = None
        self.rollouts = self.cursor = self.step = 0
        self.stopped = False
        self.values: dict[str, float] = {}
        self.inputs = _inputs(problem)

    # Batches and loss

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """This process's part of the next minibatch; a new rollout when the present one is used."""
        if self.rollout is None or self.stopped or self.cursor == self._updates():
            self.rollout = self._new_rollout()
            self.rollouts += 1
            self.cursor, self.stopped = 0, False
        rollout, config = self.rollout, self.config
        epoch, part = divmod(self.cursor, config.minibatches)
        seed = mix64(mix64(self.problem.seed) + np.uint64(self.rollouts << 16) + np.uint64(epoch))
        order = permute(np.arange(config.rollout), config.rollout, seed)
        chosen = torch.from_numpy(order[part * config.minibatch : (part + 1) * config.minibatch])
        share = config.minibatch // self.world.size
        mine = chosen[self.world.rank * share : (self.world.rank + 1) * share]
        warm = 1.0 if step >= config.critic_warmup else 0.0
        count = -(-share // self.problem.micro)
        scalars = {"policy_weight": torch.tensor(warm)}
        if config.algorithm == "grpo":
            scalars["kl_loss_coef"] = torch.tensor(rollout.kl_coef)
        batches = [_micro_batch(rollout, rows) | scalars for rows in mine.tensor_split(count)]
        if self.problem.ptx is not None:
            targets = int(rollout.rows.mask_BR[chosen].sum())
            batches[0] |= self._pretraining_batch(self.problem.ptx, step, targets)
        self.cursor += 1
        self.step = step + 1
        self.stats.begin(len(batches))
        return batches

    def loss(self, model: ActorCritic, batch: Mapping[str, Any]) -> Tensor:
        """See `fastgpt.trainer.LossFn`; after the last micro-batch it decides on an early stop."""
        loss, terms = summed_loss(model, batch, self.weights)
        if self.stats.add(terms, self.world):
            limit = self.config.kl_stop
            self.stopped = 0 < limit < self.stats.means["approx_kl"]
        return loss

    def metrics(self) -> dict[str, float]:
        """Of the rollout in use and of the last update."""
        found = self.values | self.stats.means | {"rollouts": self.rollouts}
        per_token = found.pop("ref_kl", 0.0)
        # The update that found it is the first and only one of its rollout.
        return {"kl": per_token * found["length"]} | found

    def _updates(self) -> int:
        return self.config.minibatches * self.config.epochs

    def _pretraining_batch(self, data: PackedDataset, step: int, targets: int) -> dict[str, Tensor]:
        """A part of the step's text, weighed so that its mean loss counts ``ptx_coef`` times."""
        total = self.config.ptx_batch
        share = total // self.world.size
        first = step * total + self.world.rank * share
        windows = torch.from_numpy(data.rows(np.arange(first, first + share)))
        scale = self.config.ptx_coef * targets / (total * data.seq_len)
        return {
            "inputs_BT": windows[:, :-1].contiguous(),
            "ptx_targets_BT": windows[:, 1:].contiguous(),
            "ptx_scale": torch.tensor(scale),
        }

    # Rollouts

    def _new_rollout(self) -> Rollout:
        config, problem = self.config, self.problem
        group = config.per_prompt
        first = self.rollouts * (config.rollout // group)
        places = np.arange(first, first + config.rollout // group)
        n = len(problem.prompts)
        epochs = mix64(mix64(problem.seed) + (places // n).astype(np.uint64))
        numbers = permute(places % n, n, epochs).repeat(group).tolist()
        rows = self._sample(numbers, self.generator)
        columns = {"ref_log_probs": self._log_probs(problem.reference, rows)}
        kl_B = None
        if config.scores_first:
            columns["old_log_probs"] = self._log_probs(problem.model.policy, rows)
            kl_B = _kl(columns["old_log_probs"], columns["ref_log_probs"], rows)
        scores_B = self._scores(rows, numbers)
        ended_B = rows.ended_B(problem.end_id)
        used_B = formulas.response_scores(
            scores_B,
            ended_B,
            missing_end_penalty=config.missing_end_penalty,
            clip=config.score_clip,
            normalize=config.normalize_scores,
        )
        columns |= self._advantages(rows, used_B, kl_B, columns)
        self.values = _rollout_metrics(rows, scores_B, used_B, kl_B, ended_B) | {
            "kl_coef": self.kl_coef
        }
        if "returns" in columns:
            self.values["explained_variance"] = formulas.explained_variance(
                columns["old_values"], columns["returns"], rows.mask_BR
            )
        rollout = Rollout(rows, columns, self.kl_coef)
        if config.adapts_kl:
            self.kl_coef = formulas.adapted_kl_coef(
                self.kl_coef,
                self.values["kl"],
                target=config.kl_target,
                episodes=config.rollout,
                horizon=config.kl_horizon,
            )
        return rollout

    def _advantages(
        self, rows: Rows, scores_B: Tensor, kl_B: Tensor | None, columns: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Advantage of each token; with a value model also its values and returns."""
        config, mask_BR = self.config, rows.mask_BR
        if config.in_groups:
            if config.algorithm == "grpo":
                advantages_B = formulas.group_advantages(scores_B, config.per_prompt)
            else:
                assert kl_B is not None
                penalised_B = scores_B - self.kl_coef * kl_B
                advantages_B = formulas.leave_one_out_advantages(penalised_B, config.per_prompt)
            return {"advantages": torch.where(mask_BR, advantages_B[:, None], 0.0)}
        log_probs_BR, ref_BR = columns["old_log_probs"], columns["ref_log_probs"]
        rewards_BR = formulas.token_rewards(scores_B, log_probs_BR, ref_BR, mask_BR, self.kl_coef)
        if config.whiten_rewards:
            rewards_BR = formulas.masked_whiten(rewards_BR, mask_BR, shift_mean=False)
        found: dict[str, Tensor] = {}
        if self.problem.model.value is not None:
            found["old_values"] = self._by_token(self.problem.model.token_values, rows)
            gae_lambda = config.gae_lambda
        else:  # rewards to go
            found["old_values"] = torch.zeros_like(rewards_BR)
            gae_lambda = 1.0
        found["advantages"], found["returns"] = gae(
            rewards_BR, found["old_values"], mask_BR, gamma=config.gamma, gae_lambda=gae_lambda
        )
        if config.whiten_advantages:
            found["advantages"] = formulas.masked_whiten(found["advantages"], mask_BR)
        if self.problem.model.value is None:
            del found["old_values"], found["returns"]
        return found

    def _sample(self, numbers: Sequence[int], generator: torch.Generator) -> Rows:
        """A response to each of the numbered prompts, sampled in parts by the processes."""
        config, problem = self.config, self.problem
        prompts = [self._prompt(number) for number in numbers]
        shape = len(prompts), config.max_new_tokens
        uniforms_BR = torch.rand(shape, generator=generator, dtype=torch.float64)
        share = len(prompts) // self.world.size
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        ids_BR = sample_responses(
            problem.model.policy,
            prompts[mine],
            uniforms_BR[mine],
            temperature=config.temperature,
            end_id=problem.end_id,
            pad_id=problem.pad_id,
        )
        return Rows.join(
            prompts,
            gather_rows(ids_BR, self.world),
            end_id=problem.end_id,
            pad_id=problem.pad_id,
            context=problem.model.config.context,
        )

    def _prompt(self, number: int) -> Sequence[int]:
        n = len(self.problem.prompts)
        return self.problem.prompts[number] if number < n else self.problem.held_out[number - n]

    def _log_probs(self, model: GPT, rows: Rows) -> Tensor:
        def score(tokens_BT: Tensor, some: Rows) -> Tensor:
            places_N, targets_N = some.places_N, some.targets_N
            device = tokens_BT.device
            return token_log_probs(
                model,
                tokens_BT,
                places_N.to(device),
                targets_N.to(device),
                self.config.temperature,
            )[0]

        return score_rows(rows, score, self.world, SCORING_ROWS * self.problem.micro)

    def _by_token(self, values: Callable[[Tensor, Tensor], Tensor], rows: Rows) -> Tensor:
        def score(tokens_BT: Tensor, some: Rows) -> Tensor:
            return values(tokens_BT, some.places_N.to(tokens_BT.device))

        return score_rows(rows, score, self.world, SCORING_ROWS * self.problem.micro)

    def _scores(self, rows: Rows, numbers: Sequence[int]) -> Tensor:
        share = len(numbers) // self.world.size
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        return gather_rows(self.problem.scorer(rows[mine], numbers[mine]), self.world)

    # Evaluation

    def evaluate(self) -> tuple[dict[str, float], Rows]:
        """Answers to the held-out prompts, the same random numbers each time, and their figures."""
        n, held = len(self.problem.prompts), len(self.problem.held_out)
        padded = -(-held // self.world.size) * self.world.size
        numbers = [n + i % held for i in range(padded)]
        generator = torch.Generator().manual_seed(self.problem.seed + 1)
        rows = self._sample(numbers, generator)
        log_probs_BR, ref_BR = (
            self._log_probs(model, rows)[:held]
            for model in (self.problem.model.policy, self.problem.reference)
        )
        scores_B = self._scores(rows, numbers)[:held]
        rows = rows[slice(0, held)]
        kl_B = _kl(log_probs_BR, ref_BR, rows)
        ended_B = rows.ended_B(self.problem.end_id)
        found = _rollout_metrics(rows, scores_B, scores_B, kl_B, ended_B)
        return {f"val_{name}": value for name, value in found.items() if name != "reward"}, rows

    # State

    def state(self) -> dict[str, Any]:
        """See `fastgpt.trainer.StageState`."""
        return {
            "inputs": self.inputs,
            "step": self.step,
            "rollouts": self.rollouts,
            "cursor": self.cursor,
            "stopped": self.stopped,
            "kl_coef": self.kl_coef,
            "rollout_kl_coef": None if self.rollout is None else self.rollout.kl_coef,
            "values": self.values,
            "update": self.stats.means,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The random state and the rollout in use."""
        tensors = {"generator": self.generator.get_state()}
        if self.rollout is not None:
            rows = self.rollout.rows
            tensors |= {name: getattr(rows, name) for name in _ROW_FIELDS}
            tensors |= {f"column.{k}": v for k, v in self.rollout.columns.items()}
        return tensors

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from there.

        Raises DataError for other prompts, UsageError for another reference or reward model.
        """
        _check_inputs(state["inputs"], self.inputs, self.problem.sources)
        self.step, self.rollouts, self.cursor = (
            state[name] for name in ("step", "rollouts", "cursor")
        )
        self.stopped, self.kl_coef = state["stopped"], state["kl_coef"]
        self.values, self.stats.means = state["values"], state["update"]
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        self.generator.set_state(tensors["generator"])
        if state["rollout_kl_coef"] is not None:
            rows = Rows(*(tensors[name] for name in _ROW_FIELDS))
            columns = {
                name.removeprefix("column."): tensor
                for name, tensor in tensors.items()
                if name.startswith("column.")
            }
            self.rollout = Rollout(rows, columns, state["rollout_kl_coef"])


_ROW_FIELDS = ("tokens_BT", "prompt_lengths_B", "ids_BR", "mask_BR")


def _micro_batch(rollout: Rollout, chosen: Tensor) -> dict[str, Tensor]:
    """Rows ``chosen`` of a rollout as `summed_loss` takes them."""
    rows = rollout.rows[chosen]
    mask_BR = rows.mask_BR
    columns = {f"{name}_N": x[chosen][mask_BR] for name, x in rollout.columns.items()}
    return {
        "tokens_BT": rows.tokens_BT,
        "places_N": rows.places_N,
        "targets_BT": rows.targets_N,
        **columns,
    }


def _kl(log_probs_BR: Tensor, ref_log_probs_BR: Tensor, rows: Rows) -> Tensor:
    """Estimate (k1) of the KL of each whole response (B)."""
    return torch.where(rows.mask_BR, log_probs_BR - ref_log_probs_BR, 0.0).sum(1)


def _rollout_metrics(
    rows: Rows, scores_B: Tensor, used_B: Tensor, kl_B: Tensor | None, ended_B: Tensor
) -> dict[str, float]:
    lengths = rows.mask_BR.sum(1)
    responses = [ids[:n].tolist() for ids, n in zip(rows.ids_BR, lengths.tolist(), strict=True)]
    return {
        "score": float(scores_B.mean()),
        "score_std": float(scores_B.std()) if len(scores_B) > 1 else 0.0,
        "reward": float(used_B.mean()),
        **({} if kl_B is None else {"kl": float(kl_B.mean())}),
        "length": float(lengths.double().mean()),
        "eos_rate": float(ended_B.double().mean()),
        "distinct_2": formulas.distinct_n(responses, 2),
    }


def _inputs(problem: Problem) -> dict[str, str]:
    """SHA-256 of what a resumed run reads again and must find as it was, by the flag it is from."""
    digest = hashlib.sha256()
    for prompt in (*problem.prompts, [-1], *problem.held_out):
        digest.update(np.asarray([len(prompt), *prompt], dtype=np.int64).tobytes())
    found = {"--prompts": digest.hexdigest(), "--init": weights_hash(problem.reference)}
    if problem.reward is not None:
        found["--reward"] = weights_hash(problem.reward)
    return found


def _check_inputs(
    saved: Mapping[str, str], now: Mapping[str, str], sources: Mapping[str, object]
) -> None:
    """Raise UsageError or DataError unless all inputs are those of the checkpoint."""
    for flag in sorted(saved.keys() | now.keys()):
        if saved.get(flag) == now.get(flag):
            continue
        named = f"{flag} {sources[flag]}" if flag in sources else flag
        if flag == "--prompts":
            raise DataError(
                f"{named}: the prompts are not what this run began with; a resumed run needs the "
                "same"
            )
        if flag not in saved or flag not in now:
            less = "had none" if flag in now else "had one"
            raise UsageError(f"{named}: this run {less} when it began; resume it as it was")
        raise UsageError(
            f"{named}: the weights there are not those that this run began with; put that model "
            "back, or begin a new run with another --out"
        )


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

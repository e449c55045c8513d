"""Direct preference optimisation: learn from rankings without a reward model.

``python -m fastgpt.dpo --init runs/sft --data rankings.jsonl --out runs/dpo`` takes the data of
`fastgpt.reward`. Rafailov et al. 2023, arXiv:2305.18290, equation 7: the loss of a pair is
-log sigmoid(beta x (log pi(better) / ref(better) - log pi(worse) / ref(worse))), log-probabilities
summed over the answer, its ``<|end|>`` included. A prompt counts once, with the mean of its pairs.

The reference is the model that training starts from. Its log-probabilities are all that the loss
takes of it; they are computed once, before the first step, and belong to every checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastgpt import cli
from fastgpt.config import OptimConfig, RankingConfig
from fastgpt.errors import UsageError
from fastgpt.launch import launch

if TYPE_CHECKING:
    from torch import Tensor

    from fastgpt.checkpoint import Checkpoint
    from fastgpt.distributed import World
    from fastgpt.model import GPT
    from fastgpt.preference.comparisons import PackedComparisons
    from fastgpt.rundir import RunDir
    from fastgpt.tokenizer import Tokenizer
    from fastgpt.trainer import Batch

SAMPLES = 4


@dataclass(frozen=True)
class DPOConfig(RankingConfig):
    """Finetune a model on rankings of answers."""

    beta: float = 0.1
    """What a nat away from the reference costs: low values let the model go far."""
    label_smoothing: float = 0.0
    """Probability that a pair is the wrong way round (conservative DPO)."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            optimizer="adamw", lr=1e-4, weight_decay=0.0, warmup=0.1, schedule="linear"
        )
    )

    def check(self) -> None:
        """Raise UsageError for values no run can have."""
        super().check()
        if not 0 < self.beta < float("inf"):
            raise UsageError(f"--beta {self.beta:g}: it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            smoothing = f"--label-smoothing {self.label_smoothing:g}"
            raise UsageError(f"{smoothing}: it must be at least 0 and below 0.5")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    launch(DPOConfig, dpo, argv)


def dpo(config: DPOConfig, world: World) -> None:
    """Prepare model and data, train, evaluate, sample, report."""
    from fastgpt.preference.comparisons import prepare
    from fastgpt.run import preparing, save_config
    from fastgpt.trainer import train

    with preparing(config, world, "dpo") as (run, checkpoint):
        config, model, tokenizer = _start(config, run, world, checkpoint)
        config, data = prepare(config, tokenizer, world)
    stage = Stage(
        model, world, data.prompts, config.beta, config.label_smoothing, data.train, data.val
    )
    result = train(
        model,
        stage.batches,
        stage.loss,
        config.train,
        config.optim,
        world=world,
        run=run,
        seq_len=stage.train.seq_len,
        stage="dpo",
        evaluate=stage.evaluate if stage.val else None,
        resume=checkpoint,
        stop_at=config.stop_at,
        metrics=stage.metrics,
        stage_state=stage,
        counted="prompts",
        began=lambda: save_config(config, run),
        varying=True,
    )
    if world.rank == 0:
        finish(config, run, stage, tokenizer, result.evaluation)


@dataclass
class Stage:
    """What is trained on, the reference, and the numbers of a step."""

    model: GPT
    world: World
    prompts: int
    beta: float
    smoothing: float
    train: PackedComparisons
    val: PackedComparisons | None
    reference: Tensor | None = None
    """Log-probabilities of the training answers under the reference, float32."""
    val_reference: Tensor | None = None
    sums: Any = 0.0
    """Of this process in the current step: pairs, right ones, leads, log-probabilities."""

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """See `fastgpt.trainer.Batches`."""
        if self.reference is None:  # before the first step the model is the reference
            self.reference = self.log_probs(self.train)
            self.val_reference = None if self.val is None else self.log_probs(self.val)
        self.sums = 0.0
        ranks = {"rank": self.world.rank, "world_size": self.world.size}
        return self.train.step(step, self.prompts, **ranks, predict=True)

    def loss(self, model: GPT, batch: Batch) -> Tensor:
        """See `fastgpt.trainer.LossFn`; a target is a prompt."""
        import torch

        from fastgpt.preference.comparisons import pair_loss

        tensors: Any = batch
        assert self.reference is not None
        log_probs_R = answer_log_probs(model, tensors)
        rewards_R = self.beta * (log_probs_R - self.reference[tensors["numbers_R"]])
        better, worse = tensors["better_P"], tensors["worse_P"]
        leads_P = rewards_R[better] - rewards_R[worse]
        with torch.no_grad():
            right = (leads_P > 0).float() + 0.5 * (leads_P == 0)
            values = (torch.ones_like(right), right, leads_P, log_probs_R[better])
            self.sums = self.sums + torch.stack([*values, log_probs_R[worse]]).double().sum(1)
        return pair_loss(leads_P, tensors["weights_P"], smoothing=self.smoothing)

    def metrics(self) -> dict[str, float]:
        """Of the last step, before its update: means over its pairs."""
        pairs, *sums = self.world.sum(self.sums.tolist())
        names = ("accuracy", "reward_margin", "log_prob_chosen", "log_prob_rejected")
        return {name: total / pairs for name, total in zip(names, sums, strict=True)}

    def evaluate(self) -> dict[str, float]:
        """Loss, accuracy and reward margin on the held-out prompts."""
        import numpy as np

        from fastgpt.preference.comparisons import all_pairs
        from fastgpt.preference.metrics import accuracy, leads_of

        assert self.val is not None
        assert self.val_reference is not None
        change = self.log_probs(self.val).double() - self.val_reference.double()
        pairs, weights, _ = all_pairs(self.val.comparisons)
        leads = leads_of(self.beta * change.cpu().numpy(), pairs)
        losses = (1 - self.smoothing) * np.logaddexp(0, -leads)
        losses += self.smoothing * np.logaddexp(0, leads)
        return {
            "val_loss": float((weights * losses).sum() / weights.sum()),
            "val_accuracy": accuracy(leads),
            "val_reward_margin": float(leads.mean()),
        }

    def log_probs(self, packed: PackedComparisons) -> Tensor:
        """Summed log-probability of every answer, float32, the same on all processes."""
        import torch

        from fastgpt.trainer import to_device

        found = torch.zeros(packed.n_answers)
        ranks = {"rank": self.world.rank, "world_size": self.world.size}
        with torch.no_grad():
            for batch in packed.all(**ranks, predict=True):
                log_probs_R = answer_log_probs(self.model, to_device(batch, self.world.device))
                found[batch["numbers_R"]] = log_probs_R.cpu()
        return torch.tensor(self.world.sum(found.tolist())).to(self.world.device)

    def state(self) -> dict[str, Any]:
        """See `fastgpt.trainer.StageState`."""
        return {"data": self.train.fingerprint()}

    def tensors(self) -> dict[str, Tensor]:
        """The reference's log-probabilities."""
        found = {"reference": self.reference, "val_reference": self.val_reference}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back the reference. Raises DataError when the data is another."""
        from fastgpt.run import check_same_data

        check_same_data(state, self.state())
        device = self.world.device
        self.reference = tensors["reference"].to(device)
        if "val_reference" in tensors:
            self.val_reference = tensors["val_reference"].to(device)


def answer_log_probs(model: GPT, batch: Any) -> Tensor:
    """Log-probability (R,) of each answer behind its prompt, summed over its tokens, float32.

    ``batch`` is of `PackedComparisons` with ``predict``; other places meet no output head.
    """
    import torch

    from fastgpt_kernels import linear_log_probs

    hidden_NC = model(
        batch["inputs_BT"],
        positions=batch["positions_BT"],
        doc_start=batch["doc_start_BT"],
        places=batch["places_N"],
    )
    log_probs_N, _ = linear_log_probs(
        hidden_NC,
        model.head_weight,
        batch["ids_N"],
        softcap=model.config.logit_softcap,
    )
    return torch.segment_reduce(log_probs_N, "sum", lengths=batch["counts_R1"])[:-1]


def _start(
    config: DPOConfig, run: RunDir, world: World, checkpoint: Checkpoint | None
) -> tuple[DPOConfig, GPT, Tokenizer]:
    """The model to train and its tokenizer."""
    from fastgpt.hardware import compute_dtype
    from fastgpt.model import GPT
    from fastgpt.run import load_chat_init, load_tokenizer

    if checkpoint is not None:  # the loop takes the weights from it
        dtype = compute_dtype(config.train.dtype, world.device)
        return config, GPT(config.model, dtype).to(world.device), load_tokenizer(run)
    model, tokenizer = load_chat_init(config, run, world)
    return dataclasses.replace(config, model=model.config), model.train(), tokenizer


def finish(
    config: DPOConfig,
    run: RunDir,
    stage: Stage,
    tokenizer: Tokenizer,
    evaluation: dict[str, float],
) -> None:
    """Print answers to held-out prompts and results, write the report."""
    from fastgpt.answers import print_answers
    from fastgpt.report import environment, write_report

    room = stage.model.config.context // 2
    held = () if stage.val is None else stage.val.comparisons
    asked = [
        (c.ranking.prompt[-1]["content"] if c.ranking else "", c.answers[0][: c.prompt].tolist())
        for c in held
        if c.prompt <= room
    ]
    texts = print_answers(stage.model, tokenizer, asked[:SAMPLES], config.train.sample_tokens)
    report = write_report(run, texts, cli.to_tree(config), environment())
    if evaluation:
        print(
            f"\nval loss {evaluation['val_loss']:.4f}, accuracy {evaluation['val_accuracy']:.3f}, "
            f"reward margin {evaluation['val_reward_margin']:.3f}"
        )
    print(f"run {run.path}, report {report}")


if __name__ == "__main__":
    raise SystemExit(cli.command(main)())

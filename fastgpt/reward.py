"""Stage 3a: learn from rankings which answer is better.

``python -m fastgpt.reward --init runs/sft --data rankings.jsonl --out runs/rm``; without ``--data``
it trains on the rankings that come with the package. All answers of a prompt are scored in one
forward pass, and the loss is the mean over its pairs of -log sigmoid(better - worse).
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
    from fastgpt.preference.reward_model import RewardModel
    from fastgpt.rundir import RunDir
    from fastgpt.tokenizer import Tokenizer
    from fastgpt.trainer import Batch

SHOWN = 4  # held-out rankings in the report


@dataclass(frozen=True)
class RewardConfig(RankingConfig):
    """Train a reward model on rankings of answers."""

    margin: float = 0.0
    """A better answer must lead by this times the difference of the scores in the data."""
    norm_samples: int = 256
    """Answers of the --init model whose scores get mean 0 and standard deviation 1; 0: leave them
    as they are."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(optimizer="adamw", lr=1e-3, weight_decay=0.0)
    )

    def check(self) -> None:
        """Raise UsageError for values no run can have."""
        super().check()
        if not 0 <= self.margin < float("inf"):
            raise UsageError(f"--margin {self.margin:g}: it must be at least 0")
        if self.norm_samples < 0 or self.norm_samples == 1:
            raise UsageError(
                f"--norm-samples {self.norm_samples}: it must be 0, or at least 2 to have a "
                "standard deviation"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    launch(RewardConfig, reward, argv)


def reward(config: RewardConfig, world: World) -> None:
    """Prepare model and data, train, evaluate, normalise, report."""
    from fastgpt.preference.comparisons import prepare
    from fastgpt.run import preparing, save_config
    from fastgpt.trainer import train

    with preparing(config, world, "reward") as (run, checkpoint):
        config, model, tokenizer, writer = _start(config, run, world, checkpoint)
        needs_scores = "--margin" if config.margin else ""
        config, data = prepare(config, tokenizer, world, needs_scores=needs_scores)
        samples = None
        if writer is not None and config.norm_samples:
            rows = sample_answers(writer, tokenizer, data.train, config)
            samples = packed_samples(rows, data.train)
        del writer  # or its weights would stay in memory
    stage = Stage(model, world, data.prompts, config.margin, data.train, data.val, samples)
    # It cancels in every pair: its gradient is rounding, which Adam would take for a direction.
    model.head.bias.requires_grad_(False)
    result = train(
        model,
        stage.batches,
        stage.loss,
        config.train,
        config.optim,
        world=world,
        run=run,
        seq_len=stage.train.seq_len,
        stage="reward",
        evaluate=stage.evaluate,
        resume=checkpoint,
        stop_at=config.stop_at,
        metrics=stage.metrics,
        stage_state=stage,
        counted="prompts",
        began=lambda: save_config(config, run),
        varying=True,
    )
    if world.rank == 0:
        finish(config, run, stage, result.evaluation)


@dataclass
class Stage:
    """What is trained on, the answers that normalise the scores, and the numbers of a step."""

    model: RewardModel
    world: World
    prompts: int
    margin: float
    train: PackedComparisons
    val: PackedComparisons | None
    samples: PackedComparisons | None
    scores: Any = None
    """Raw scores of the held-out answers, at the last evaluation."""
    right: Any = 0.0
    """Right pairs of this process in the current step, and how many there are."""
    pairs: int = 0
    used: int = 0
    """Rankings up to the current step, over all processes."""

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """See `fastgpt.trainer.Batches`."""
        self.right, self.pairs, self.used = 0.0, 0, (step + 1) * self.prompts
        return self.train.step(step, self.prompts, rank=self.world.rank, world_size=self.world.size)

    def loss(self, model: RewardModel, batch: Batch) -> Tensor:
        """See `fastgpt.trainer.LossFn`; a target is a prompt."""
        leads_P, loss = ranking_loss(model, batch, self.margin)
        self.right = self.right + (leads_P > 0).sum() + 0.5 * (leads_P == 0).sum()
        self.pairs += len(leads_P)
        return loss

    def metrics(self) -> dict[str, float]:
        """Accuracy on the pairs of the last step, before its update; tokens read so far."""
        right, pairs = self.world.sum([float(self.right), self.pairs])
        return {"accuracy": right / pairs, "tokens_read": self.train.tokens_before(self.used)}

    def evaluate(self) -> dict[str, float]:
        """Normalise the scores; loss and accuracy on the held-out prompts."""
        import numpy as np

        from fastgpt.preference.comparisons import all_pairs
        from fastgpt.preference.metrics import accuracy, leads_of

        values: dict[str, float] = {}
        if self.samples is not None:
            raw = self._raw_scores(self.samples)
            mean, std = float(raw.mean()), float(raw.std(ddof=1))
            self.model.normalize(mean, std)
            values = {"sample_mean": mean, "sample_std": std}
        if self.val is None:
            return values
        self.scores = self._raw_scores(self.val)
        pairs, weights, differences = all_pairs(self.val.comparisons)
        leads = leads_of(self.scores, pairs)
        losses = np.logaddexp(0, self.margin * differences - leads)
        loss = float((weights * losses).sum() / weights.sum())
        return {"val_loss": loss, "val_accuracy": accuracy(leads), **values}

    def _raw_scores(self, packed: PackedComparisons) -> Any:
        """Raw score of every answer, float64, the same on all processes."""
        import numpy as np
        import torch

        from fastgpt.trainer import to_device

        scores = np.zeros(packed.n_answers)
        with torch.no_grad():
            for batch in packed.all(rank=self.world.rank, world_size=self.world.size):
                raw = raw_scores(self.model, to_device(batch, self.world.device))
                scores[batch["numbers_R"].numpy()] = raw.double().cpu().numpy()
        return np.array(self.world.sum(scores.tolist()))

    def state(self) -> dict[str, Any]:
        """See `fastgpt.trainer.StageState`."""
        return {"data": self.train.fingerprint()}

    def tensors(self) -> dict[str, Tensor]:
        """The sampled answers, for the model that wrote them may be gone at a resume."""
        import torch

        if self.samples is None:
            return {}
        rows = [ids for c in self.samples.comparisons for ids in c.answers]
        lengths = torch.tensor([len(ids) for ids in rows])
        return {
            "sample_ids": torch.cat([torch.from_numpy(ids) for ids in rows]),
            "sample_lengths": lengths,
        }

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back the samples. Raises DataError when the data is another."""
        from fastgpt.run import check_same_data

        check_same_data(state, self.state())
        if tensors:
            ids, lengths = tensors["sample_ids"].numpy(), tensors["sample_lengths"].tolist()
            rows, begin = [], 0
            for length in lengths:
                rows.append(ids[begin : begin + length])
                begin += length
            self.samples = packed_samples(rows, self.train)


def raw_scores(model: RewardModel, batch: Any) -> Tensor:
    """Raw scores (R,) of the answers of a micro-batch of `PackedComparisons`."""
    return model.raw(
        batch["inputs_BT"],
        batch["last_R"],
        positions=batch["positions_BT"],
        doc_start=batch["doc_start_BT"],
    )


def ranking_loss(model: RewardModel, batch: Any, margin: float) -> tuple[Tensor, Tensor]:
    """Leads (P,) of the better answers, and the loss summed over prompts.

    The loss of a prompt is the mean over its untied pairs of -log sigmoid(lead - margin x score
    difference): InstructGPT, arXiv:2203.02155, equation 1; the margin as in Llama 2,
    arXiv:2307.09288, equation 2.
    """
    from fastgpt.preference.comparisons import pair_loss

    scores_R = raw_scores(model, batch)
    leads_P = scores_R[batch["better_P"]] - scores_R[batch["worse_P"]]
    loss = pair_loss(leads_P - margin * batch["differences_P"], batch["weights_P"])
    return leads_P.detach(), loss


def packed_samples(rows: Sequence[Any], like: PackedComparisons) -> PackedComparisons:
    """Texts to be scored, packed like the training set."""
    from fastgpt.preference.comparisons import Comparison, PackedComparisons

    singles = [Comparison([ids], 0, [], []) for ids in rows]
    return PackedComparisons(singles, like.seq_len, like.rows)


def _start(
    config: RewardConfig, run: RunDir, world: World, checkpoint: Checkpoint | None
) -> tuple[RewardConfig, RewardModel, Tokenizer, GPT | None]:
    """The reward model, its tokenizer, and the model that it starts from, None at a resume."""
    from fastgpt.hardware import compute_dtype
    from fastgpt.preference.reward_model import RewardModel
    from fastgpt.run import load_chat_init, load_tokenizer

    if checkpoint is not None:  # the loop takes the weights from it
        dtype = compute_dtype(config.train.dtype, world.device)
        model = RewardModel(config.model, dtype).to(world.device)
        return config, model, load_tokenizer(run), None
    writer, tokenizer = load_chat_init(config, run, world)
    model = RewardModel.from_gpt(writer)
    return dataclasses.replace(config, model=model.config), model, tokenizer, writer


def sample_answers(
    model: GPT, tokenizer: Tokenizer, data: PackedComparisons, config: RewardConfig
) -> list[Any]:
    """``norm_samples`` answers of ``model`` to training prompts, as ids behind their prompt.

    Sampled at temperature 1, up to ``sample_tokens`` of them; an answer that ended has its
    ``<|end|>``. Prompts are taken in turn until there are enough.
    """
    import numpy as np

    from fastgpt.chat import end_id
    from fastgpt.generate import SamplingConfig, generate

    seed, most = config.train.seed, config.train.sample_tokens
    end = end_id(tokenizer)
    prompts = [c.answers[0][: c.prompt].tolist() for c in data.comparisons]
    prompts = [ids for ids in prompts if len(ids) + most <= data.seq_len]
    if not prompts:
        raise UsageError(
            f"--sample-tokens {most}: no prompt leaves room for them in {data.seq_len} tokens; "
            "lower it, or --norm-samples 0"
        )
    order = np.random.default_rng(seed).permutation(len(prompts))
    picked = [prompts[order[i % len(order)]] for i in range(config.norm_samples)]
    picked.sort(key=len)  # so that a batch has little padding
    rows = []
    for start in range(0, len(picked), 32):
        batch = picked[start : start + 32]
        sampling = SamplingConfig(max_new_tokens=most, temperature=1.0, seed=seed + start)
        for prompt, new in zip(
            batch, generate(model, batch, sampling, stop_ids=(end,)), strict=True
        ):
            ended = [end] if len(new) < most else []
            rows.append(np.array([*prompt, *new, *ended], dtype=np.int64))
    return rows


def finish(config: RewardConfig, run: RunDir, stage: Stage, evaluation: dict[str, float]) -> None:
    """Print and report how good the scores are."""
    from fastgpt.preference.report import assess, sections, summary
    from fastgpt.report import environment, write_report

    samples: list[dict[str, str]] = []
    parts: list[str] = []
    if stage.val is not None:
        found = assess(stage.val.comparisons, stage.scores)
        print("\n" + summary(found))
        parts = sections(found)
        shown = stage.model.gain.item() * stage.scores + stage.model.bias.item()
        for first, comparison in zip(stage.val.first[:SHOWN], stage.val.comparisons, strict=False):
            ranking = comparison.ranking
            if ranking is not None:
                answers = enumerate(ranking.responses)
                lines = ["", *(f"{shown[first + i]:+.2f}  {text}" for i, text in answers)]
                prompt = ranking.prompt[-1]["content"]
                samples.append({"prompt": prompt, "text": "\n".join(lines)})
    report = write_report(run, samples, cli.to_tree(config), environment(), parts)
    if stage.samples is not None:
        mean, std = evaluation["sample_mean"], evaluation["sample_std"]
        print(
            f"\n{stage.samples.n_answers} sampled answers had a mean score of {mean:.3f} and a "
            f"standard deviation of {std:.3f}; normalised to 0 and 1"
        )
    print(f"run {run.path}, report {report}")


if __name__ == "__main__":
    raise SystemExit(cli.command(main)())

"""Stage 3b: reinforcement learning from a reward model, a Python function, or both.

``python -m fastgpt.ppo --init runs/sft --reward runs/rm --prompts prompts.jsonl --out runs/rl``;
without ``--prompts`` it takes the prompts that come with the package. A rollout of responses is
sampled and scored, then learned from in ``--epochs`` passes of ``--minibatches`` optimizer steps.

A reward function is ``package.module:function`` with the signature ``(prompts, responses,
references) -> scores``: conversations (lists of messages), texts without their end, and what each
record had as reference; one number for each, higher is better.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastgpt import cli
from fastgpt.config import OptimConfig, StageConfig, TrainConfig
from fastgpt.errors import DataError, UsageError
from fastgpt.launch import launch
from fastgpt.rl.config import RLConfig

if TYPE_CHECKING:
    from torch import Tensor

    from fastgpt.assess.judges import Judge
    from fastgpt.data.batches import PackedDataset
    from fastgpt.data.examples import Prompt
    from fastgpt.distributed import World
    from fastgpt.model import GPT
    from fastgpt.preference.reward_model import RewardModel
    from fastgpt.rl.actor_critic import ActorCritic
    from fastgpt.rl.experience import Experience, Problem
    from fastgpt.rl.rollout import Rows
    from fastgpt.rundir import MetricsLog, RunDir
    from fastgpt.tokenizer import Tokenizer

SAMPLES = 4
SCORE_ROWS = 64


@dataclass(frozen=True)
class PPOConfig(StageConfig):
    """Reinforcement learning: PPO, GRPO, RLOO or REINFORCE."""

    reward: Path | None = None
    """Run of a reward model; the value model starts from it."""
    reward_fn: str | None = None
    """Reward function, package.module:function; its scores are added to those of --reward."""
    prompts: tuple[Path, ...] = ()
    """Prompts (.jsonl, .gz, .xz) with "prompt" or "messages"; default: the embedded ones."""
    judge: str | None = None
    """Another judge of the held-out answers: a function like --reward-fn, or a reward run."""
    on_long: Literal["error", "skip"] = "skip"
    """A prompt that leaves no room for --max-new-tokens ends the run, or is left out."""
    rl: RLConfig = field(default_factory=RLConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=0, eval_every=64, save_every=64, log_every=4)
    )
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            optimizer="adamw", lr=1e-4, eps=1e-5, weight_decay=0.0, schedule="linear", warmup=0.03
        )
    )

    def check(self) -> None:
        """Raise UsageError for values no run can have."""
        super().check()
        self.rl.check()
        if self.reward is None and self.reward_fn is None:
            raise UsageError("nothing to learn from; give --reward RUN or --reward-fn MODULE:NAME")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    launch(PPOConfig, ppo, argv)


def ppo(config: PPOConfig, world: World) -> None:
    """Prepare models and prompts, sample and update, evaluate, report."""
    from fastgpt.rl.experience import Experience
    from fastgpt.run import preparing, save_config
    from fastgpt.rundir import MetricsLog
    from fastgpt.trainer import train

    with preparing(config, world, config.rl.algorithm) as (run, checkpoint):
        config, model, reference, tokenizer = _start(config, run, world)
        config, problem, scorer = _prepare(config, model, reference, tokenizer, world)
    experience = Experience(config.rl, problem, world)
    after_step = -1 if checkpoint is None else checkpoint.state["train"]["step"]
    with contextlib.ExitStack() as stack:
        log = None
        if world.rank == 0:
            path = run.path / "samples.jsonl"
            log = stack.enter_context(MetricsLog(path, after_step=after_step))
        evaluation = _Evaluation(experience, scorer, tokenizer, log, after_step)
        if checkpoint is None and problem.held_out:
            evaluation()  # what the run starts from
        result = train(
            model,
            experience.batches,
            experience.loss,
            config.train,
            config.optim,
            world=world,
            run=run,
            seq_len=min(config.model.context, 2 * config.rl.max_new_tokens),
            stage=config.rl.algorithm,
            evaluate=evaluation if problem.held_out else None,
            resume=checkpoint,
            stop_at=config.stop_at,
            metrics=experience.metrics,
            stage_state=experience,
            began=lambda: save_config(config, run),
            varying=True,
        )
    if world.rank == 0:
        finish(config, run, result.evaluation)


def _start(
    config: PPOConfig, run: RunDir, world: World
) -> tuple[PPOConfig, ActorCritic, GPT, Tokenizer]:
    """Policy and value model, the reference with weights of its own, and the tokenizer."""
    import torch

    from fastgpt.preference.reward_model import RewardModel, load_reward_model
    from fastgpt.rl.actor_critic import ActorCritic
    from fastgpt.run import load_chat_init

    reference, tokenizer = load_chat_init(config, run, world)
    policy = copy.deepcopy(reference)
    value = None
    if config.rl.algorithm == "ppo":
        if config.reward is not None:
            options: Any = {"device": str(world.device), "dtype": config.train.dtype}
            value, _ = load_reward_model(config.reward, **options)
        else:
            value = RewardModel.from_gpt(policy)
            torch.nn.init.zeros_(value.head.weight)
    model = ActorCritic(policy, value).train()
    config = dataclasses.replace(config, model=policy.config)
    return config, model, _frozen(reference, config.train.compile), tokenizer


def _frozen(module: Any, compiled: bool) -> Any:
    """``module`` for scoring alone."""
    from fastgpt.compiled import compile_blocks

    module.requires_grad_(False).eval()
    if compiled:
        compile_blocks(module, varying=True)
    return module


def _prepare(
    config: PPOConfig,
    model: ActorCritic,
    reference: GPT,
    tokenizer: Tokenizer,
    world: World,
) -> tuple[PPOConfig, Problem, _Scorer]:
    """Prompts and scores, and the configuration with what they decide."""
    import numpy as np

    from fastgpt.chat import end_id
    from fastgpt.data.examples import embedded, read_prompts
    from fastgpt.data.order import permute
    from fastgpt.rl.experience import Problem

    settings, rl = config.train, config.rl
    _check_ranks(rl, world.size)
    prompts = read_prompts(config.prompts or (embedded("prompts"),))
    kept, ids = _encode(prompts, tokenizer, config, world)
    order = permute(np.arange(len(kept)), len(kept), settings.seed).tolist()
    held = min(rl.eval_prompts, len(kept) // 4)
    numbered = order[held:] + order[:held]  # the same for what is sampled and what is scored
    kept, ids = [kept[i] for i in numbered], [ids[i] for i in numbered]
    learned = len(kept) - held
    longest = max(map(len, ids)) + rl.max_new_tokens
    most = 16384 if world.device.type == "cuda" else 8192
    micro = settings.micro_batch or max(1, most // longest)
    scorer = _Scorer.load(config, tokenizer, kept, world)
    steps = settings.steps or rl.total_steps
    config = dataclasses.replace(config, train=dataclasses.replace(settings, steps=steps))
    problem = Problem(
        model,
        reference,
        ids[:learned],
        ids[learned:],
        scorer,
        end_id(tokenizer),
        _padding(tokenizer),
        settings.seed,
        micro,
        _pretraining_text(config, tokenizer),
        scorer.model,
        {"--init": config.init, "--reward": config.reward},
    )
    if world.rank == 0:
        print(
            f"{learned} prompts, {held} held out; {steps} steps, a rollout of {rl.rollout} "
            f"responses every {rl.epochs * rl.minibatches}"
        )
    return config, problem, scorer


def _check_ranks(rl: RLConfig, size: int) -> None:
    for flag, count in (("--rollout / --minibatches", rl.minibatch), ("--ptx-batch", rl.ptx_batch)):
        if count % size and (flag != "--ptx-batch" or rl.ptx_coef):
            raise UsageError(f"{flag} is {count}; {size} processes need a multiple of {size}")


def _padding(tokenizer: Tokenizer) -> int:
    """An id that is not the end of a response; what it is matters to nothing else."""
    return tokenizer.eot_id


def _encode(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, config: PPOConfig, world: World
) -> tuple[list[Prompt], list[list[int]]]:
    """Ids of the prompts that leave room for a response, and those prompts."""
    from fastgpt.chat import render_prompt

    room = config.model.context - config.rl.max_new_tokens
    kept, ids = [], []
    for prompt in prompts:
        row = render_prompt(tokenizer, prompt.messages)
        if len(row) <= room:
            kept.append(prompt)
            ids.append(row)
        elif config.on_long == "error":
            raise DataError(
                f"{prompt.source}:{prompt.line}: {len(row)} tokens, and --max-new-tokens "
                f"{config.rl.max_new_tokens} leave {room} of the context; shorten it, lower "
                "--max-new-tokens, or --on-long skip"
            )
    if not kept:
        raise DataError(
            f"{prompts[0].source}: no prompt leaves room for --max-new-tokens "
            f"{config.rl.max_new_tokens} in the context of {config.model.context}; lower it"
        )
    if len(kept) < len(prompts) and world.rank == 0:
        print(f"{len(prompts) - len(kept)} prompts of more than {room} tokens are left out")
    return kept, ids


def _pretraining_text(config: PPOConfig, tokenizer: Tokenizer) -> PackedDataset | None:
    """Token shards of the base run for PPO-ptx, None without --ptx-coef."""
    from fastgpt.data.batches import PackedDataset, find_tokenized, open_shard
    from fastgpt.run import load_tokenizer
    from fastgpt.rundir import RunDir

    if not config.rl.ptx_coef:
        return None
    path: Path | None = config.rl.ptx_data or config.init
    while path is not None:
        run = RunDir.open(path)
        data = find_tokenized(run.path / "tokens")
        if data is not None:
            base = load_tokenizer(run)
            if base.vocab_size > tokenizer.vocab_size:
                raise UsageError(f"{run.path}: its tokenizer is not that of {config.init}")
            shard = open_shard(
                data.train_path, vocab_size=base.vocab_size, tokenizer_hash=base.hash
            )
            seq_len = config.train.seq_len or config.model.context
            return PackedDataset([shard], seq_len, seed=config.train.seed)
        tree = cli.read_toml(run.config_path, "--init")
        path = Path(tree["init"]) if "init" in tree else None
    raise UsageError("--ptx-coef: no run behind --init has token shards; give --ptx-data RUN")


@dataclass
class _Scorer:
    """Scores of responses: of the reward model, of the function, or their sum; and the judge's."""

    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    model: RewardModel | None
    function: Judge | None
    judge: Judge | None
    world: World
    name: str

    @classmethod
    def load(
        cls, config: PPOConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt], world: World
    ) -> _Scorer:
        from fastgpt.assess.judges import load_function, load_judge
        from fastgpt.preference.reward_model import load_reward_model

        options: Any = {"device": str(world.device), "dtype": config.train.dtype}
        model = None
        if config.reward is not None:
            model, its = load_reward_model(config.reward, **options)
            if its.hash != tokenizer.hash:
                raise UsageError(
                    f"--reward {config.reward}: its tokenizer is not that of --init {config.init}"
                )
            if model.config.context < config.model.context:
                raise UsageError(
                    f"--reward {config.reward}: its context of {model.config.context} is shorter "
                    f"than that of --init, {config.model.context}; train one from {config.init}"
                )
            model = _frozen(model, config.train.compile)
        function = load_function(config.reward_fn, "--reward-fn") if config.reward_fn else None
        judge = load_judge(config.judge, **options) if config.judge else None
        name = f"--reward-fn {config.reward_fn}"
        return cls(tokenizer, prompts, model, function, judge, world, name)

    def __call__(self, rows: Rows, numbers: Sequence[int]) -> Tensor:
        """See `fastgpt.rl.experience.Scorer`."""
        import torch

        from fastgpt.assess.judges import scores_of

        scores_B = torch.zeros(len(numbers))
        if self.model is not None:
            device = self.world.device
            with torch.no_grad():
                for first in range(0, len(numbers), SCORE_ROWS):
                    some = rows[slice(first, first + SCORE_ROWS)]
                    last_B = some.last_B.to(device)
                    found = self.model.scores(some.tokens_BT.to(device), last_B)
                    scores_B[first : first + SCORE_ROWS] = found.cpu()
        if self.function is not None:
            prompts = [self.prompts[number] for number in numbers]
            scores_B += torch.tensor(
                scores_of(self.function, self.name, prompts, self.texts(rows)), dtype=torch.float32
            )
        return scores_B

    def texts(self, rows: Rows) -> list[str]:
        """The responses as texts, without their end."""
        from fastgpt.chat import end_id

        end = end_id(self.tokenizer)
        kept = [ids[mask].tolist() for ids, mask in zip(rows.ids_BR, rows.mask_BR, strict=True)]
        known = (self.tokenizer.known(i for i in ids if i != end) for ids in kept)
        return [self.tokenizer.decode(ids) for ids in known]

    def held_out(self, rows: Rows) -> list[Prompt]:
        """The prompts that the rows of an evaluation answer."""
        return list(self.prompts[len(self.prompts) - len(rows.mask_BR) :])


@dataclass
class _Evaluation:
    """Figures of the held-out prompts, and a line of samples.jsonl for each evaluation."""

    experience: Experience
    scorer: _Scorer
    tokenizer: Tokenizer
    log: MetricsLog | None
    logged: int

    def __call__(self) -> dict[str, float]:
        """See `fastgpt.trainer.Evaluate`."""
        from fastgpt.assess.judges import scores_of

        values, rows = self.experience.evaluate()
        texts, prompts = self.scorer.texts(rows), self.scorer.held_out(rows)
        if self.scorer.judge is not None:
            scores = scores_of(self.scorer.judge, "--judge", prompts, texts)
            values["val_judge"] = sum(scores) / len(scores)
        step = self.experience.step
        if self.log is not None and step > self.logged:
            shown: dict[str, str] = {}
            for i, (prompt, text) in enumerate(list(zip(prompts, texts, strict=True))[:SAMPLES]):
                shown |= {f"prompt_{i}": prompt.messages[-1]["content"], f"response_{i}": text}
            self.log.log(step, **values, **shown)
        self.logged = max(self.logged, step)
        return values


def finish(config: PPOConfig, run: RunDir, evaluation: dict[str, float]) -> None:
    """Print answers to the same prompts before and after, write the report."""
    from fastgpt.report import environment, write_report
    from fastgpt.rundir import read_metrics

    records = read_metrics(run.path / "samples.jsonl")
    samples = []
    for i in range(SAMPLES):
        for record in dict.fromkeys((0, len(records) - 1)) if records else ():
            line = records[record]
            if f"prompt_{i}" in line:
                question = f"[step {line['step']}] {line[f'prompt_{i}']}"
                samples.append({"prompt": question, "text": f"\n{line[f'response_{i}']}"})
                print(f"\n> {question}|{line[f'response_{i}']}")
    report = write_report(run, samples, cli.to_tree(config), environment())
    if evaluation:
        before = records[0]["val_score"] if records else float("nan")
        print(
            f"\nheld-out score {before:.4f} -> {evaluation['val_score']:.4f}, "
            f"KL {evaluation['val_kl']:.2f} nats a response"
        )
    print(f"run {run.path}, report {report}")


if __name__ == "__main__":
    raise SystemExit(cli.command(main)())

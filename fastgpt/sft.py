"""Stage 2: teach a base model to answer.

``python -m fastgpt.sft --init runs/base --data chats.jsonl --out runs/sft``; without ``--data`` it
trains on the chats that come with the package. The loss is on what the assistant says, its end of
turn included; chats are packed into rows and never see each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fastgpt import cli
from fastgpt.config import StageConfig, TrainConfig, check_passes
from fastgpt.errors import DataError, UsageError
from fastgpt.launch import launch
from fastgpt.plan import batch_shape

if TYPE_CHECKING:
    from torch import Tensor

    from fastgpt.checkpoint import Checkpoint
    from fastgpt.data.examples import Chat
    from fastgpt.data.packing import Example, PackedExamples
    from fastgpt.distributed import World
    from fastgpt.model import GPT
    from fastgpt.rundir import RunDir
    from fastgpt.tokenizer import Tokenizer
    from fastgpt.trainer import Batch

SAMPLES = 4


@dataclass(frozen=True)
class SFTConfig(StageConfig):
    """Finetune a model on chats."""

    data: tuple[Path, ...] = ()
    """Chats (.jsonl, .gz, .xz) with "messages", or "prompt" and "response"; default: the embedded
    ones."""
    epochs: float = 3.0
    """How often each chat is used, unless --steps says how long to train."""
    val_fraction: float = 0.05
    """Part of the chats held out for validation."""
    on_long: Literal["error", "skip"] = "error"
    """A chat in which the assistant first speaks beyond --seq-len ends the run, or is left out."""
    lora_rank: int = 0
    """Train adapters of this rank instead of all weights; 0: all weights."""
    lora_alpha: float | None = None
    """Adapters count alpha / rank times; default: twice the rank."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=0, batch_tokens=4096, save_every=200)
    )

    def check(self) -> None:
        """Raise UsageError for values no run can have."""
        super().check()
        check_passes(self.epochs, self.val_fraction)
        if self.lora_rank < 0:
            raise UsageError(f"--lora-rank {self.lora_rank}: it must be at least 0")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise UsageError(f"--lora-alpha {self.lora_alpha:g}: it must be above 0")
        if self.lora_alpha is not None and not self.lora_rank:
            raise UsageError(f"--lora-alpha {self.lora_alpha:g}: give --lora-rank, too")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    launch(SFTConfig, sft, argv)


def loss_fn(model: GPT, batch: Batch) -> Tensor:
    """Summed cross-entropy of the targets; only places that have one meet the output head."""
    from fastgpt_kernels import linear_cross_entropy

    tensors = cast("dict[str, Tensor]", batch)
    hidden_NC = model(
        tensors["inputs_BT"],
        positions=tensors["positions_BT"],
        doc_start=tensors["doc_start_BT"],
        places=tensors["places_N"],
    )
    return linear_cross_entropy(
        hidden_NC,
        model.head_weight,
        tensors["targets_BT"],
        reduction="sum",
        softcap=model.config.logit_softcap,
    )


def sft(config: SFTConfig, world: World) -> None:
    """Prepare model and data, train, evaluate, sample, report."""
    from fastgpt.data.packing import all_batches, step_batches
    from fastgpt.lora import LoRAGPT
    from fastgpt.run import preparing, save_config
    from fastgpt.trainer import train

    with preparing(config, world, "sft") as (run, checkpoint):
        config, model, tokenizer = _start(config, run, world, checkpoint)
        config, data = _prepare(config, tokenizer, world)
    settings = config.train
    batch_size, micro = batch_shape(config.model, settings, world)
    bytes_per_id = tokenizer.bytes_per_id()
    ranks = {"rank": world.rank, "world_size": world.size}
    max_batches = -(-settings.eval_tokens // (micro * data.train.seq_len)) or None

    def batches(step: int):
        return step_batches(
            data.train, step, batch_size=batch_size, micro_batch_size=micro, **ranks
        )

    def evaluate() -> dict[str, float]:
        from fastgpt.evaluation import evaluate_loss

        val = all_batches(data.val, micro, max_batches, **ranks) if data.val else ()
        return evaluate_loss(model, val, loss_fn, bytes_per_id, world)

    result = train(
        model,
        batches,
        loss_fn,
        settings,
        config.optim,
        world=world,
        run=run,
        seq_len=data.train.seq_len,
        stage="sft",
        evaluate=evaluate if data.val else None,
        resume=checkpoint,
        stop_at=config.stop_at,
        stage_state=data,
        began=lambda: save_config(config, run),
    )
    if world.rank == 0:
        plain = model.merged() if isinstance(model, LoRAGPT) else model
        finish(config, run, plain, tokenizer, data.held_out, result.evaluation)


def _start(
    config: SFTConfig, run: RunDir, world: World, checkpoint: Checkpoint | None
) -> tuple[SFTConfig, GPT, Tokenizer]:
    """The model to train, with rows for the chat's tokens, and the tokenizer that has them."""
    from fastgpt.chat import with_chat_tokens
    from fastgpt.hardware import compute_dtype
    from fastgpt.lora import LoRAGPT
    from fastgpt.model import GPT
    from fastgpt.run import load_init, load_tokenizer

    dtype = compute_dtype(config.train.dtype, world.device)
    alpha = config.lora_alpha or 2.0 * config.lora_rank
    if checkpoint is not None:
        # The loop takes the weights from the checkpoint.
        if bool(config.lora_rank) != ("lora" in checkpoint.tensors):
            has = "has adapters" if "lora" in checkpoint.tensors else "has no adapters"
            raise UsageError(f"--lora-rank {config.lora_rank}: the run {run.path} {has}; leave it")
        if not config.lora_rank:
            return config, GPT(config.model, dtype).to(world.device), load_tokenizer(run)
        added = len(checkpoint.tensors["lora"].get("wte.added", ()))
        model = LoRAGPT(config.model, dtype, config.lora_rank, alpha, added)
        return config, model.to(world.device), load_tokenizer(run)
    base, old = load_init(config, run, world)
    tokenizer = with_chat_tokens(old)
    # A model may have rows for more ids than its tokenizer has.
    rows = max(tokenizer.vocab_size, base.config.vocab_size)
    shape = dataclasses.replace(base.config, vocab_size=rows)
    config = dataclasses.replace(config, model=shape)
    added = rows - old.vocab_size if tokenizer is not old else 0
    weights = grown_weights(base, rows, added, config.train.seed)
    if config.lora_rank:
        model = LoRAGPT(shape, dtype, config.lora_rank, alpha, added).to(world.device)
        model.load_base(weights)
    else:
        model = GPT(shape, dtype).to(world.device)
        model.load_state_dict(weights)
    if world.rank == 0:
        tokenizer.save(run.tokenizer_path)
    return config, model, tokenizer


def grown_weights(model: GPT, rows: int, new: int, seed: int) -> dict[str, Tensor]:
    """Weights of ``model`` with embedding and head of ``rows`` rows, the last ``new`` of them anew.

    A new row is the mean of the others and noise of a tenth of their standard deviation: to the
    model a token like any other, but not the same as its neighbour.
    """
    import torch

    weights = dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for name in ("wte.weight", "head.weight"):
        if new and name in weights:
            old = weights[name][: rows - new]
            noise = torch.randn(new, old.shape[1], generator=generator).to(old)
            weights[name] = torch.cat((old, old.mean(0) + 0.1 * old.std() * noise))
    return weights


@dataclass
class _Data:
    """What is trained on, and that a resumed run still has the same."""

    train: PackedExamples
    val: PackedExamples | None
    held_out: list[Chat]

    def state(self) -> dict[str, Any]:
        return {"data": self.train.fingerprint}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        from fastgpt.run import check_same_data

        check_same_data(state, self.state())


def _prepare(config: SFTConfig, tokenizer: Tokenizer, world: World) -> tuple[SFTConfig, _Data]:
    """Training and validation set, and the configuration with what they decide."""
    from fastgpt.data.batches import check_sizes
    from fastgpt.data.examples import embedded, read_chats
    from fastgpt.data.packing import PackedExamples

    seq_len = config.train.seq_len or config.model.context
    if seq_len > config.model.context:
        raise UsageError(
            f"--seq-len {seq_len} is beyond the context of {config.model.context} of the model"
        )
    chats = read_chats(config.data or (embedded("sft"),))
    held_out, learned = split(chats, config.val_fraction, config.train.seed)
    said = print if world.rank == 0 else _nothing
    examples = encode(learned, tokenizer, seq_len, config.on_long, said)
    if not examples:
        raise DataError("no chat is left to learn from; give shorter ones, or raise --seq-len")
    train_set = PackedExamples(examples, seq_len, seed=config.train.seed)
    val = encode(held_out, tokenizer, seq_len, "skip", _nothing)
    val_set = PackedExamples(val, seq_len, seed=config.train.seed) if val else None
    batch_size, micro = batch_shape(config.model, config.train, world)
    sizes = {"batch_size": batch_size, "micro_batch_size": micro, "world_size": world.size}
    check_sizes(seq_len, **sizes)
    if not config.train.steps:
        steps = max(1, round(config.epochs * len(train_set) / batch_size))
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    if world.rank == 0:
        said(
            f"{len(train_set.lengths)} chats in {len(train_set)} rows of {seq_len}, "
            f"{train_set.targets} of {train_set.lengths.sum()} tokens to learn; "
            f"{len(held_out)} chats held out"
        )
    return config, _Data(train_set, val_set, held_out)


def _nothing(message: str) -> None:
    """For processes that print nothing."""


def split(chats: Sequence[Chat], fraction: float, seed: int) -> tuple[list[Chat], list[Chat]]:
    """Held-out chats and the others, chosen by the seed. Raises DataError when none would be left.

    At least one is held out unless ``fraction`` is 0.
    """
    import numpy as np

    from fastgpt.data.order import permute

    order = permute(np.arange(len(chats)), len(chats), seed).tolist()
    held = max(1, round(fraction * len(chats))) if fraction else 0
    if held >= len(chats):
        where = chats[0].source if chats else "no data"
        raise DataError(
            f"{where}: {len(chats)} chats, {held} held out; give more, or --val-fraction 0"
        )
    picked = [chats[i] for i in order]
    return picked[:held], picked[held:]


def encode(
    chats: Iterable[Chat],
    tokenizer: Tokenizer,
    seq_len: int,
    on_long: Literal["error", "skip"],
    say: Any,
) -> list[Example]:
    """Ids and masks of the chats, cut behind ``seq_len`` + 1 ids; ``say`` gets how many were.

    The beginning is kept, for an answer without its question teaches nothing. Raises DataError for
    a chat with nothing to learn in what is kept, unless ``on_long`` is "skip".
    """
    import numpy as np

    from fastgpt.chat import render

    examples: list[Example] = []
    cut = skipped = 0
    for chat in chats:
        ids, mask = render(tokenizer, chat.messages)
        if not any(mask[: seq_len + 1]):
            if on_long == "error":
                raise DataError(
                    f"{chat.source}:{chat.line}: the assistant first speaks at token "
                    f"{mask.index(True) + 1}, a row has {seq_len + 1}: nothing of it would be "
                    "learned; shorten what is before, raise --seq-len, or --on-long skip"
                )
            skipped += 1
            continue
        cut += len(ids) > seq_len + 1
        examples.append((np.array(ids[: seq_len + 1]), np.array(mask[: seq_len + 1])))
    if cut:
        say(f"{cut} chats are longer than {seq_len} tokens: their ends are cut off")
    if skipped:
        say(f"{skipped} chats are left out: the assistant speaks beyond --seq-len {seq_len}")
    return examples


def finish(
    config: SFTConfig,
    run: RunDir,
    model: GPT,
    tokenizer: Tokenizer,
    held_out: Sequence[Chat],
    evaluation: dict[str, float],
) -> None:
    """Print answers to held-out prompts and results, write the report."""
    from fastgpt.answers import print_answers
    from fastgpt.chat import render_prompt
    from fastgpt.report import environment, write_report

    asked = []
    room = model.config.context // 2
    for chat in held_out:
        first = next(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
        prompt = render_prompt(tokenizer, chat.messages[:first])
        if first and len(prompt) <= room and len(asked) < SAMPLES:
            asked.append((chat.messages[first - 1]["content"], prompt))
    texts = print_answers(model, tokenizer, asked, config.train.sample_tokens)
    report = write_report(run, texts, cli.to_tree(config), environment())
    if evaluation:
        loss, bits = evaluation["val_loss"], evaluation["val_bpb"]
        print(f"\nval loss {loss:.4f} nats/token, {bits:.4f} bits/byte")
    print(f"run {run.path}, report {report}")


if __name__ == "__main__":
    raise SystemExit(cli.command(main)())

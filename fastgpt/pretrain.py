"""Stage 1: train a base model. ``python -m fastgpt.pretrain --data my.txt --out runs/base``.

Without ``--data`` it trains on the text that comes with the package. Everything of a run lies in
its directory; ``--resume RUN`` goes on with it.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastgpt import cli
from fastgpt.config import PretrainConfig
from fastgpt.plan import batch_shape, print_plan

if TYPE_CHECKING:
    from fastgpt.data.batches import PackedDataset
    from fastgpt.distributed import World
    from fastgpt.model import GPT
    from fastgpt.rundir import RunDir
    from fastgpt.tokenizer import Tokenizer

SAMPLES, PROMPT_TOKENS = 3, 12


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = cli.parse(PretrainConfig, argv)
    config.check()
    if config.dry_run:
        print_plan(config)
        return
    from fastgpt.distributed import world
    from fastgpt.memory import keep_freed_memory

    keep_freed_memory()
    with world(config.train.device) as processes:
        pretrain(config, processes)


def pretrain(config: PretrainConfig, world: World) -> None:
    """Prepare data and model, train, evaluate, sample, report."""
    from fastgpt.data.batches import step_batches, validation_batches
    from fastgpt.evaluation import evaluate_loss
    from fastgpt.hardware import compute_dtype
    from fastgpt.loss import next_token_loss
    from fastgpt.model import GPT
    from fastgpt.run import check_same_text, preparing, save_config
    from fastgpt.trainer import train

    with preparing(config, world, f"pretrain-{config.preset}") as (run, checkpoint):
        if config.resume:
            check_same_text(config, run)
        config, tokenizer, train_set, val_set = _prepare(config, run, world)
    settings = config.train
    seq_len = train_set.seq_len
    batch_size, micro = batch_shape(config.model, config.train, world)
    masking = {"mask_documents": config.data.mask_documents, "eot_id": tokenizer.eot_id}

    model = GPT(config.model, compute_dtype(settings.dtype, world.device)).to(world.device)
    bytes_per_id = tokenizer.bytes_per_id()
    max_batches = -(-settings.eval_tokens // (micro * seq_len)) or None
    ranks = {"rank": world.rank, "world_size": world.size}

    def batches(step: int):
        return step_batches(
            train_set, step, batch_size=batch_size, micro_batch_size=micro, **ranks, **masking
        )

    def evaluate() -> dict[str, float]:
        val = validation_batches(val_set, micro, max_batches, **ranks, **masking)
        return evaluate_loss(model, val, next_token_loss, bytes_per_id, world)

    result = train(
        model,
        batches,
        next_token_loss,
        settings,
        config.optim,
        world=world,
        run=run,
        seq_len=seq_len,
        stage="pretrain",
        evaluate=evaluate,
        resume=checkpoint,
        stop_at=config.stop_at,
        began=lambda: save_config(config, run),
    )
    if world.rank == 0:
        finish(config, run, model, tokenizer, val_set, result.evaluation)


def _prepare(
    config: PretrainConfig, run: RunDir, world: World
) -> tuple[PretrainConfig, Tokenizer, PackedDataset, PackedDataset]:
    """Tokenizer, training and validation set, and the configuration with what they decided."""
    from fastgpt.data.batches import PackedDataset, check_batches, open_shard
    from fastgpt.run import prepare_data

    settings = config.train
    tokenizer, data = prepare_data(config.data, config.model.vocab_size, settings.seed, run, world)
    # A small text, or a tokenizer from a file, has a vocabulary of its own size.
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model)
    seq_len = settings.seq_len or config.model.context
    batch_size, micro = batch_shape(config.model, config.train, world)
    with world.together():
        shards = [
            open_shard(path, vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash)
            for path in (data.train_path, data.val_path)
        ]
        train_set, val_set = (PackedDataset([s], seq_len, seed=settings.seed) for s in shards)
        sizes = {"batch_size": batch_size, "micro_batch_size": micro, "world_size": world.size}
        check_batches(train_set, **sizes)
    return config, tokenizer, train_set, val_set


def finish(
    config: PretrainConfig,
    run: RunDir,
    model: GPT,
    tokenizer: Tokenizer,
    val_set: PackedDataset,
    evaluation: dict[str, float],
) -> None:
    """Print samples and results, write the report."""
    import numpy as np

    from fastgpt.generate import SamplingConfig, continuation, generate
    from fastgpt.report import environment, write_report

    tokens = val_set.shards[0].tokens
    ends = np.flatnonzero(tokens[: 1 << 22] == tokenizer.eot_id) + 1
    starts = np.concatenate([[0], ends[ends + PROMPT_TOKENS < len(tokens)]])
    picked = starts[np.linspace(0, len(starts) - 1, SAMPLES).astype(int)]
    length = min(PROMPT_TOKENS, model.config.context - 1)
    prompts = [tokens[s : s + length].astype(np.int64).tolist() for s in picked]
    sampling = SamplingConfig(max_new_tokens=config.train.sample_tokens, seed=config.train.seed)
    new = generate(model, prompts, sampling, stop_ids=(tokenizer.eot_id,))
    samples = [
        {"prompt": tokenizer.decode(prompt), "text": continuation(tokenizer, prompt, ids)}
        for prompt, ids in zip(prompts, new, strict=True)
    ]
    report = write_report(run, samples, cli.to_tree(config), environment())
    for sample in samples:
        print(f"\n> {sample['prompt']}|{sample['text']}")
    loss, bits = evaluation["val_loss"], evaluation["val_bpb"]
    print(f"\nval loss {loss:.4f} nats/token, {bits:.4f} bits/byte")
    print(f"run {run.path}, report {report}")
    path = shlex.quote(str(run.path))
    print(f'try: python -m fastgpt.generate --run {path} --prompt "Once upon a time"')


if __name__ == "__main__":
    raise SystemExit(cli.command(main)())

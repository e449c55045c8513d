"""What the stages share around a run directory: its tokenizer, its token shards, its model."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastgpt import cli
from fastgpt.chat import end_id
from fastgpt.checkpoint import Checkpoint, list_steps, load_checkpoint
from fastgpt.config import DataConfig, ModelConfig, PretrainConfig, StageConfig
from fastgpt.data.batches import (
    TokenizedData,
    embedded_text,
    find_tokenized,
    read_documents,
    tokenize_documents,
)
from fastgpt.data.documents import Documents
from fastgpt.distributed import World, pick_device
from fastgpt.errors import DataError, UsageError
from fastgpt.hardware import compute_dtype
from fastgpt.model import GPT
from fastgpt.progress import ReadThenWork, task
from fastgpt.rundir import RunDir, write_atomic
from fastgpt.tokenizer import Tokenizer, train_sentencepiece
from fastgpt.trainer import load_weights


@contextmanager
def preparing(config: Any, world: World, name: str) -> Iterator[tuple[RunDir, Checkpoint | None]]:
    """The directory of a stage's run, and the checkpoint that it goes on from.

    The stage prepares its parts inside: the processes wait for each other at the end, what fails in
    one fails in all, and a new directory is emptied again when something does, so that the command
    can be given once more. The random generators begin with ``train.seed``; their state is part of
    a checkpoint.

    Args:
        config: of the stage, with ``train`` and ``resume``.
        world: rank 0 makes the directory.
        name: of the directory below ``runs/`` without ``--out``.
    """
    run = _open_run(config, world, name)
    with world.together():
        checkpoint = resume_from(run) if config.resume else None
    new = world.rank == 0 and not config.resume
    with run.emptied_on_error() if new else nullcontext(), world.together():
        random.seed(config.train.seed)
        torch.manual_seed(config.train.seed)
        yield run, checkpoint


def _open_run(config: Any, world: World, name: str) -> RunDir:
    """A new directory with its config.toml, or that of the run to go on with."""
    with world.together():
        if config.resume:
            return RunDir.open(config.resume)
        path = config.train.out or Path("runs") / name
        if world.rank == 0:
            # Its configuration at once, so that a run killed from here on can be resumed.
            save_config(config, RunDir.create(path))
    return RunDir(path)


def save_config(config: Any, run: RunDir) -> None:
    """Write config.toml."""
    write_atomic(run.config_path, cli.to_toml(cli.to_tree(config)))


def load_tokenizer(run: RunDir) -> Tokenizer:
    """The tokenizer a run was trained with."""
    return Tokenizer.from_file(run.tokenizer_path)


def load_model(
    path: Path, *, step: int | None = None, device: str = "auto", dtype: str = "auto"
) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer of the run in ``path``, for inference. Raises UsageError or DataError."""
    run = RunDir.open(path)
    tree = cli.read_toml(run.config_path, "--run")
    config = cli.from_tree(ModelConfig, tree["model"], str(run.config_path))
    config.check()
    if any(run.checkpoints.glob("step_*/reward.safetensors")):
        raise UsageError(
            f"{path}: a reward model scores answers and writes none; give a run of another stage"
        )
    checkpoint = load_checkpoint(run.checkpoints, step, only=("model",))
    where = pick_device(device, 0)
    with torch.device("meta"):
        model = GPT(config, compute_dtype(dtype, where))
    model.to_empty(device=where)
    load_weights(model, checkpoint)
    return model.eval(), load_tokenizer(run)


def load_init(config: StageConfig, run: RunDir, world: World) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer of ``--init``, for inference. Raises as `load_model`."""
    if config.init is None:
        raise UsageError(f"{run.path}: its config.toml names no run to start from; give --init RUN")
    return load_model(config.init, device=str(world.device), dtype=config.train.dtype)


def load_chat_init(config: StageConfig, run: RunDir, world: World) -> tuple[GPT, Tokenizer]:
    """As `load_init`, of a model that was finetuned on chats.

    Its tokenizer becomes that of a new run; one that is resumed keeps its own.
    """
    model, tokenizer = load_init(config, run, world)
    end_id(tokenizer)  # or it says what is missing
    if world.rank == 0 and not list_steps(run.checkpoints):
        tokenizer.save(run.tokenizer_path)
    return model, tokenizer


def check_same_text(config: PretrainConfig, run: RunDir) -> None:
    """Raise UsageError if a resumed run is to be trained on other tokens than it made of its text.

    They are in its directory and not made again, whatever flags say.
    """
    if find_tokenized(run.path / "tokens") is None:
        return  # it ended before
    saved = cli.from_tree(PretrainConfig, cli.read_toml(run.config_path, "--resume"), str(run.path))
    for field in dataclasses.fields(DataConfig):
        before, now = (_absolute(getattr(c.data, field.name)) for c in (saved, config))
        if before != now and field.name != "mask_documents":
            flag = f"--{field.name.replace('_', '-')}"
            raise UsageError(f"{flag}: a resumed run keeps its tokens; leave it out")


def _absolute(value: Any) -> Any:
    paths = isinstance(value, tuple) and all(isinstance(part, Path) for part in value)
    return tuple(part.absolute() for part in value) if paths else value


def check_same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise DataError unless a checkpoint's state is that of the data at hand."""
    if saved != now:
        raise DataError("--data is not what this run began with; a resumed run needs the same")


def prepare_data(
    config: DataConfig, vocab_size: int, seed: int, run: RunDir, world: World
) -> tuple[Tokenizer, TokenizedData]:
    """The tokenizer and the token shards of ``run``; rank 0 makes them unless they are there."""
    directory = run.path / "tokens"
    with world.together():
        if world.rank == 0 and find_tokenized(directory) is None:
            _tokenize(config, vocab_size, seed, run)
    with world.together():
        data = find_tokenized(directory)
        if data is None:
            raise DataError(f"{directory}: no token shards; do all processes see the same files?")
        tokenizer = load_tokenizer(run)
    return tokenizer, data


def _tokenize(config: DataConfig, vocab_size: int, seed: int, run: RunDir) -> None:
    documents = read_documents(
        config.data or (embedded_text(),), text_key=config.text_key, on_error=config.on_bad_data
    )
    tokenizer = _make_tokenizer(config, vocab_size, documents, run)
    with task("tokenize", documents.bytes_total) as bar:
        tokenize_documents(
            documents,
            tokenizer,
            run.path / "tokens",
            val_fraction=config.val_fraction,
            seed=seed,
            progress=lambda done, _total: bar.update(done),
        )


def _make_tokenizer(
    config: DataConfig, vocab_size: int, documents: Documents, run: RunDir
) -> Tokenizer:
    if run.tokenizer_path.is_file():
        return load_tokenizer(run)
    if config.tokenizer is not None:
        tokenizer = Tokenizer.from_file(config.tokenizer)
    else:
        bars = ReadThenWork("train tokenizer: read", documents.bytes_total, "train tokenizer")
        texts = bars.reading(
            (document.text for document in documents), lambda: documents.bytes_done
        )
        try:
            with bars:
                if config.tokenizer_kind == "sentencepiece":
                    model_path = run.tokenizer_path.with_suffix(".model")
                    tokenizer = train_sentencepiece(texts, vocab_size, model_path)
                else:
                    tokenizer = Tokenizer.train(
                        texts, vocab_size, pattern=config.pattern, progress=bars.update
                    )
        except ValueError as error:
            raise UsageError(f"--vocab-size {vocab_size}: {error}") from error
    tokenizer.save(run.tokenizer_path)
    return tokenizer


def resume_from(run: RunDir) -> Checkpoint | None:
    """The newest undamaged checkpoint of ``run``, None when it ended before its first one.

    Says what it passes over, and that it begins anew. Raises DataError when all are damaged.
    """

    def say(message: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {message}", file=sys.stderr, flush=True)

    try:
        return load_checkpoint(run.checkpoints, warn=say)
    except UsageError as error:
        say(f"{error}; starting at step 1")
        return None

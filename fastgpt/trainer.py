"""The one training loop. A stage brings a model, batches, a loss and an evaluation.

Loss functions return the *sum* over a micro-batch's targets. The loop divides by the number of
targets of the whole step, over micro-batches and processes, so accumulation and data parallelism
change nothing but the order of additions.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt.checkpoint import (
    Checkpoint,
    SaveError,
    check_space,
    required_bytes,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from fastgpt.compiled import compile_blocks
from fastgpt.config import ModelConfig, OptimConfig, TrainConfig
from fastgpt.data.batches import IGNORE_INDEX, MicroBatch
from fastgpt.distributed import World
from fastgpt.errors import DataError, DivergedError, Preempted, UsageError
from fastgpt.hardware import peak_flops
from fastgpt.optim import Optimizers, clip_gradients
from fastgpt.progress import Progress
from fastgpt.rundir import MetricsLog, RunDir

Batch = MicroBatch | Mapping[str, Tensor]
Batches = Callable[[int], Sequence[Batch]]
"""Optimizer step (from 0) -> this process's micro-batches; ``targets_BT`` is -100 where ignored."""
LossFn = Callable[[Any, Batch], Tensor]
"""(model, micro-batch) -> sum of the losses of its targets, float32, 0-d."""
Evaluate = Callable[[], dict[str, float]]


class Trainable(Protocol):
    """What the loop asks of a model besides being an ``nn.Module``.

    A model may also have ``checkpoint_parts() -> dict[str, nn.Module]``: its files in a checkpoint,
    in place of the one file "model".
    """

    config: ModelConfig
    compute_dtype: torch.dtype


class StageState(Protocol):
    """What a stage keeps between steps; part of a checkpoint, and given back before `Batches`."""

    def state(self) -> dict[str, Any]:
        """JSON values."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name."""
        ...

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what `state` and `tensors` returned."""
        ...


@dataclass
class TrainState:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    tokens: int = 0
    """Targets trained on."""
    skipped: int = 0
    """Steps left out because loss or gradient was not finite."""
    skipped_in_row: int = 0


@dataclass
class Result:
    """The end of a run."""

    state: TrainState
    evaluation: dict[str, float] = field(default_factory=dict)


class _LossModule(nn.Module):
    """Model and loss as one module: DistributedDataParallel sees every use of a parameter."""

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch)


@dataclass
class StopRequest:
    """Whether somebody asked the run to end."""

    asked: bool = False


@contextlib.contextmanager
def listen_for_stop(*, announce: bool) -> Iterator[StopRequest]:
    """SIGTERM and SIGINT ask the loop to save and end; a second SIGINT ends at once."""
    stop = StopRequest()

    def handle(signum: int, _frame: Any) -> None:
        if stop.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if announce and not stop.asked:
            with contextlib.suppress(OSError):  # print() may be what was interrupted
                os.write(2, b"saving after this step; Ctrl-C again quits at once\n")
        stop.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def train(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    config: TrainConfig,
    optim: OptimConfig,
    *,
    world: World,
    run: RunDir,
    seq_len: int,
    stage: str,
    evaluate: Evaluate | None = None,
    resume: Checkpoint | None = None,
    stop_at: int | None = None,
    metrics: Evaluate | None = None,
    stage_state: StageState | None = None,
    counted: str = "tokens",
    began: Callable[[], None] | None = None,
    varying: bool = False,
) -> Result:
    """Train ``model`` in place up to ``config.steps`` optimizer steps.

    Args:
        model: a `Trainable` on ``world.device``.
        batches: see `Batches`; a pure function of the step, so that resuming needs no loader state.
        loss_fn: see `LossFn`.
        config: the loop.
        optim: optimizer and schedule.
        world: this process among all.
        run: metrics and checkpoints go here; written by rank 0.
        seq_len: tokens of a sequence, for FLOP counts.
        stage: name in the progress display.
        evaluate: called at ``eval_every`` and at the end; its values are logged.
        resume: a checkpoint of the same run.
        stop_at: save and end after this step.
        metrics: values of the stage's own, asked for after a step that is logged.
        stage_state: see `StageState`.
        counted: what a target is, the name of their number in metrics.jsonl.
        began: called by rank 0 when nothing can refuse the run any more. Settings are saved there:
            a resume that is refused must leave those that the run can go on with.
        varying: batches differ in their rows and widths, see `fastgpt.compiled`.

    Raises:
        Preempted: asked to end early; a checkpoint is saved.
        DivergedError: ``skip_budget`` steps in a row were not finite.
        UsageError: no room for checkpoints, or ``stop_at`` is behind the run.
    """
    loop = _Loop(model, loss_fn, config, optim, world, seq_len, stage_state, varying)
    if resume is not None:
        with world.together():
            loop.restore(resume)
    if stop_at is not None and stop_at <= loop.state.step:
        raise UsageError(f"--stop-at {stop_at}: the run is at step {loop.state.step} already")
    rank0 = world.rank == 0
    progress = Progress(config.steps, loop.state.step, stage=stage, enabled=rank0)
    with contextlib.ExitStack() as stack:
        logs = _Logs.open(run, loop.state.step, stack) if rank0 else None
        saver = _Saver(loop, run, progress, config.keep_last, logs)
        with world.together():
            saver.check_space()
            if rank0 and began is not None:
                began()
        if not config.compile:  # reaches the compiled CPU kernels too
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stop = stack.enter_context(listen_for_stop(announce=rank0))
        stack.enter_context(progress)
        evaluation: dict[str, float] = {}
        while loop.state.step < config.steps:
            stats = loop.step(batches(loop.state.step), stop)
            step, last = loop.state.step, loop.state.step == config.steps
            if evaluate is not None and _due(step, config.eval_every, last):
                evaluation = evaluate()
            else:
                evaluation = {}
            logged = bool(evaluation) or step == 1 or step % config.log_every == 0
            values = (metrics() if logged and metrics is not None else {}) | evaluation
            _report(progress, logs if logged else None, loop, stats, values, counted)
            ending = stats.stop or step == stop_at
            if ending or _due(step, config.save_every, last):
                saver.save(must_succeed=ending or last)
            if ending and not last:
                raise Preempted(
                    f"stopped after step {step} of {config.steps}; go on with --resume {run.path}"
                )
        if evaluate is not None and not evaluation:  # resumed at its last step
            evaluation = evaluate()
        return Result(loop.state, evaluation)


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The tensors of ``batch`` on ``device``."""
    tensors = cast(Mapping[str, Tensor], batch)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def _positions(batch: Sequence[Batch]) -> int:
    names = ("inputs_BT", "tokens_BT")
    tensors = [cast(Mapping[str, Tensor], micro) for micro in batch]
    return sum(micro[name].numel() for micro in tensors for name in names if name in micro)


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


@dataclass
class _Stats:
    """One step: mean loss, gradient norm before clipping, learning-rate multiplier, seconds.

    ``positions`` are the tokens read, padding included: what the work is proportional to.
    """

    loss: float
    grad_norm: float
    lr_multiplier: float
    positions: int
    seconds: float
    stop: bool


class _Loop:
    """Model, optimizers and counters; `step` is one optimizer step."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        config: TrainConfig,
        optim: OptimConfig,
        world: World,
        seq_len: int,
        stage_state: StageState | None,
        varying: bool,
    ):
        self.model, self.config, self.optim, self.world = model, config, optim, world
        self.stage_state = stage_state
        self.optimizers = Optimizers(model, optim)
        self.state = TrainState()
        shape = cast(Trainable, model)
        self.peak_flops = peak_flops(world.device, shape.compute_dtype) * world.size
        self.flops_per_token = shape.config.flops_per_token(seq_len)
        if config.compile:
            compile_blocks(model, varying=varying)
        module = _LossModule(model, loss_fn)
        gpu_ids = [world.device] if world.device.type == "cuda" else None
        self.ddp = DistributedDataParallel(module, gpu_ids) if world.size > 1 else None
        self.module = self.ddp or module

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of a checkpoint."""
        parts = {name: part.state_dict() for name, part in checkpoint_parts(self.model).items()}
        stage = {} if self.stage_state is None else {"stage": self.stage_state.tensors()}
        return parts | stage | {"optimizer": self.optimizers.state_tensors()}

    def counters(self) -> dict[str, Any]:
        """All of a checkpoint that is not a tensor."""
        stage = {} if self.stage_state is None else {"stage": self.stage_state.state()}
        return {"train": vars(self.state), "rng": rng_state(), **stage}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take model, optimizers, counters and random state from ``checkpoint``, and empty it.

        The stage comes first: what it refuses explains weights that do not fit. A checkpoint of a
        large model would stay in the memory of every process to the end of the run.
        """
        if self.stage_state is not None:
            self.stage_state.load(checkpoint.state["stage"], checkpoint.tensors.get("stage", {}))
        for name, part in checkpoint_parts(self.model).items():
            load_weights(part, checkpoint, name)
        self.optimizers.load_state_tensors(checkpoint.tensors["optimizer"])
        self.state = TrainState(**checkpoint.state["train"])
        set_rng_state(checkpoint.state["rng"])
        checkpoint.tensors.clear()

    def step(self, batch: Sequence[Batch], stop: StopRequest) -> _Stats:
        """Forward, backward, and an update unless something is not finite."""
        start = time.perf_counter()
        targets = sum(int((micro["targets_BT"] != IGNORE_INDEX).sum()) for micro in batch)
        n_targets, asked, positions = self.world.sum([targets, stop.asked, _positions(batch)])
        if n_targets == 0:
            raise DataError(f"step {self.state.step + 1}: no micro-batch has a target to predict")
        loss = self.world.sum([self._backward(batch, self.world.size / n_targets)])[0]
        grad_norm = float(clip_gradients(self.model, self.optim.grad_clip))
        multiplier = self.optim.multiplier(self.state.step, self.config.steps)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizers.step(multiplier)
            self.state.skipped_in_row = 0
        else:
            self._skip(loss, grad_norm)
        self.optimizers.zero_grad()
        self.state.step += 1
        self.state.tokens += int(n_targets)
        seconds = time.perf_counter() - start
        return _Stats(loss / n_targets, grad_norm, multiplier, int(positions), seconds, bool(asked))

    def _backward(self, batch: Sequence[Batch], scale: float) -> float:
        """Accumulate gradients of ``scale`` x loss; return this process's summed loss."""
        total = torch.zeros((), device=self.world.device)
        for i, micro in enumerate(batch):
            more = self.ddp if i + 1 < len(batch) else None
            with more.no_sync() if more else contextlib.nullcontext():
                loss = self.module(to_device(micro, self.world.device))
                (loss * scale).backward()
            total += loss.detach()
        return total.item()

    def _skip(self, loss: float, grad_norm: float) -> None:
        self.state.skipped += 1
        self.state.skipped_in_row += 1
        if self.state.skipped_in_row >= self.config.skip_budget:
            raise DivergedError(
                f"step {self.state.step + 1}: loss {loss} or gradient norm {grad_norm} is not "
                f"finite, {self.state.skipped_in_row} steps in a row; go on from the last "
                "checkpoint with --resume and a lower --lr, or look at the data of these steps"
            )


@dataclass
class _Logs:
    """metrics.jsonl is a function of seed and data; what depends on the clock goes apart."""

    metrics: MetricsLog
    timings: MetricsLog

    @classmethod
    def open(cls, run: RunDir, after_step: int, stack: contextlib.ExitStack) -> _Logs:
        paths = (run.metrics_path, run.timings_path)
        logs = [stack.enter_context(MetricsLog(p, after_step=after_step)) for p in paths]
        return cls(*logs)


def _report(
    progress: Progress,
    logs: _Logs | None,
    loop: _Loop,
    stats: _Stats,
    values: dict[str, float],
    counted: str,
) -> None:
    step = loop.state.step
    rate = stats.positions / stats.seconds
    mfu = rate * loop.flops_per_token / loop.peak_flops
    lr = loop.optim.lr * stats.lr_multiplier
    progress.update(
        step,
        loss=stats.loss,
        val_loss=values.get("val_loss"),
        tokens_per_s=rate,
        mfu=mfu,
        lr=lr,
    )
    if logs is None:
        return
    logs.metrics.log(
        step,
        loss=stats.loss,
        grad_norm=stats.grad_norm,
        lr=lr,
        skipped=loop.state.skipped,
        **{counted: loop.state.tokens},
        **values,
    )
    logs.timings.log(step, tokens_per_s=rate, mfu=mfu, seconds=progress.elapsed())


@dataclass
class _Saver:
    """Writes checkpoints on rank 0; a failed write is reported and training goes on."""

    loop: _Loop
    run: RunDir
    progress: Progress
    keep_last: int
    logs: _Logs | None

    def check_space(self) -> None:
        """Refuse a disk without room for two checkpoints."""
        if self.loop.world.rank == 0:
            weights = self.loop.model.state_dict()
            moments = {f"{k}/{i}": v for k, v in weights.items() for i in range(2)}
            size = required_bytes({"model": weights, "optimizer": moments}, {})
            check_space(self.run.checkpoints, size)

    def save(self, *, must_succeed: bool) -> None:
        """Write the checkpoint of the current step; all processes wait for it.

        Raises UsageError when it fails although no later one will make up for it.
        """
        with self.loop.world.together():
            if self.logs is not None:
                self._save(self.logs, must_succeed)

    def _save(self, logs: _Logs, must_succeed: bool) -> None:
        logs.metrics.sync()
        try:
            save_checkpoint(
                self.run.checkpoints,
                self.loop.state.step,
                self.loop.tensors(),
                self.loop.counters(),
                keep_last=self.keep_last,
                warn=self.progress.message,
            )
        except SaveError as error:
            if must_succeed:
                mend = f"free some space and --resume {self.run.path}"
                raise UsageError(f"{error}; {mend}") from error
            self.progress.message(f"warning: {error}; training goes on")


def checkpoint_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are files of a checkpoint, see `Trainable`."""
    parts = getattr(model, "checkpoint_parts", None)
    return {"model": model} if parts is None else parts()


def load_weights(model: nn.Module, checkpoint: Checkpoint, part: str = "model") -> None:
    """Copy weights of ``checkpoint`` into ``model``. Raises DataError when they do not fit."""
    weights = checkpoint.tensors[part]
    expected = model.state_dict()
    for name, parameter in expected.items():
        if name not in weights or weights[name].shape != parameter.shape:
            found = "missing" if name not in weights else f"of shape {tuple(weights[name].shape)}"
            raise DataError(
                f"{checkpoint.path}: {name} is {found}, the configured model needs "
                f"{tuple(parameter.shape)}; use the config.toml of that run"
            )
    surplus = sorted(weights.keys() - expected.keys())
    if surplus:
        raise DataError(
            f"{checkpoint.path}: {surplus[0]} has no place in the configured model; use the "
            "config.toml of that run"
        )
    model.load_state_dict(weights)

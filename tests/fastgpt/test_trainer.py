"""The loop: accumulation, guards, preemption, saves that fail, and what is logged."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import trainer
from fastgpt.checkpoint import SaveError, list_steps, load_checkpoint
from fastgpt.config import ModelConfig, OptimConfig, TrainConfig
from fastgpt.data.batches import IGNORE_INDEX
from fastgpt.distributed import World
from fastgpt.errors import DataError, DivergedError, Preempted, UsageError
from fastgpt.model import GPT
from fastgpt.optim import Optimizers
from fastgpt.rundir import RunDir, read_metrics

pytestmark = pytest.mark.usefixtures("uncompiled", "measured")

ALONE = World(0, 1, torch.device("cpu"))
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=23, context=8)
TRAIN = TrainConfig(steps=6, eval_every=0, save_every=0, log_every=1, compile=False, skip_budget=3)
OPTIM = OptimConfig(lr=0.01, warmup=0.0)


@pytest.fixture
def measured(monkeypatch):
    """A peak without the second of matrix products that measures it."""
    monkeypatch.setattr(trainer, "peak_flops", lambda device, dtype: 1e12)


def loss_fn(model, batch):
    logits = model.logits(model(batch["inputs_BT"]))
    return F.cross_entropy(logits.flatten(0, 1), batch["targets_BT"].flatten(), reduction="sum")


def micro_batch(step: int, rows: int = 4):
    ids = torch.randint(23, (rows, 9), generator=torch.Generator().manual_seed(step))
    return {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:].clone()}


def batches(step):
    return [micro_batch(step)]


def new_model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def train(run, model=None, batches=batches, loss_fn=loss_fn, train=TRAIN, optim=OPTIM, **options):
    return trainer.train(
        model or new_model(), batches, loss_fn, train, optim,
        world=ALONE, run=run, seq_len=8, stage="test", **options,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create(tmp_path / "run")


def with_targets(micro, counts):
    """Keep ``counts[row]`` targets of each row."""
    for row, count in enumerate(counts):
        micro["targets_BT"][row, count:] = IGNORE_INDEX
    return micro


COUNTS = [[8, 1, 5, 0], [0, 0, 0, 0], [2, 8, 8, 3]]


def test_accumulation_is_one_large_batch(tmp_path):
    """Micro-batches with 14, 0 and 21 targets weigh by their targets, not by their number."""
    parts = [with_targets(micro_batch(i), counts) for i, counts in enumerate(COUNTS)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    adamw = dataclasses.replace(OPTIM, optimizer="adamw", eps=1e-3)
    config = dataclasses.replace(TRAIN, steps=3)
    models, logs = [], []
    for name, batch in (("parts", parts), ("whole", [whole])):
        run = RunDir.create(tmp_path / name)
        models.append(new_model())
        train(run, models[-1], lambda step, batch=batch: batch, train=config, optim=adamw)
        logs.append(read_metrics(run.metrics_path))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        assert a["tokens"] == 35 * a["step"]


def test_loss_and_gradient_norm_are_of_the_mean_over_targets(run):
    parts = [with_targets(micro_batch(i), counts) for i, counts in enumerate(COUNTS)]
    model = new_model()
    hidden = [model(part["inputs_BT"]) for part in parts]
    logits = torch.cat([F.linear(h, model.head_weight).flatten(0, 1) for h in hidden])
    loss = F.cross_entropy(logits, torch.cat([p["targets_BT"].flatten() for p in parts]))
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    train(run, batches=lambda step: parts, train=dataclasses.replace(TRAIN, steps=1))
    (record,) = read_metrics(run.metrics_path)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def nan_loss(model, batch):
    return loss_fn(model, batch) * float("nan")


def infinite_loss(model, batch):
    """Its gradient is finite."""
    return loss_fn(model, batch) + float("inf")


class _PoisonGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, float("nan"))


def nan_gradient(model, batch):
    return _PoisonGradient.apply(loss_fn(model, batch))


def at_steps(steps, bad):
    """``bad`` at the given steps (0-based), `loss_fn` at the others."""
    calls = iter(range(10**6))

    def loss(model, batch):
        return (bad if next(calls) in steps else loss_fn)(model, batch)

    return loss


@pytest.mark.parametrize("bad", [nan_loss, infinite_loss, nan_gradient])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_moves_nothing(bad, optimizer, run, monkeypatch):
    """Weights and moments stay, the step is counted and logged, the next one learns."""
    snapshots = []
    original = trainer._Loop.step

    def step(self, *args):
        stats = original(self, *args)
        tensors = self.tensors()
        snapshots.append({k: v.clone() for part in tensors.values() for k, v in part.items()})
        return stats

    monkeypatch.setattr(trainer._Loop, "step", step)
    optim = dataclasses.replace(OPTIM, optimizer=optimizer)
    result = train(run, loss_fn=at_steps({2, 3}, bad), optim=optim)
    assert (result.state.step, result.state.skipped, result.state.skipped_in_row) == (6, 2, 0)
    for before, after, moves in zip(snapshots, snapshots[1:], [1, 0, 0, 1, 1], strict=False):
        same = [torch.equal(before[name], after[name]) for name in before]
        assert all(same) if not moves else not any(same)
    records = read_metrics(run.metrics_path)
    assert [record["skipped"] for record in records] == [0, 0, 1, 2, 2, 2]
    lost = "grad_norm" if bad is nan_gradient else "loss"
    assert [not math.isfinite(record[lost]) for record in records] == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("bad", [nan_loss, nan_gradient])
def test_divergence_ends_the_run_after_the_budget(bad, run):
    model = new_model()
    with pytest.raises(DivergedError, match=r"step 5: .* 3 steps in a row") as caught:
        train(run, model, loss_fn=at_steps({2, 3, 4}, bad))
    assert caught.value.exit_code == 4
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_budget_counts_steps_in_a_row(run):
    config = dataclasses.replace(TRAIN, steps=8)
    assert (
        train(run, loss_fn=at_steps({0, 1, 3, 4, 6, 7}, nan_loss), train=config).state.skipped == 6
    )


def test_a_step_without_targets_is_bad_data(run):
    with pytest.raises(DataError, match="step 1: no micro-batch has a target"):
        train(run, batches=lambda step: [with_targets(micro_batch(step), [0] * 4)])


def test_stop_at_saves_and_resume_gives_the_same_bits(tmp_path):
    """The schedule stays that of all steps, whatever the number of interruptions."""
    straight, broken = RunDir.create(tmp_path / "a"), RunDir.create(tmp_path / "b")
    expected = new_model()
    train(straight, expected)
    checkpoint = None
    for stop_at in (2, 5):
        with pytest.raises(Preempted, match=f"stopped after step {stop_at} of 6; .*--resume"):
            train(broken, stop_at=stop_at, resume=checkpoint)
        checkpoint = load_checkpoint(broken.checkpoints)
        assert checkpoint.step == stop_at
    model = GPT(CONFIG)
    train(broken, model, resume=checkpoint)
    for (name, a), b in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert broken.metrics_path.read_bytes() == straight.metrics_path.read_bytes()
    records = read_metrics(broken.metrics_path)
    assert [r["lr"] for r in records] == [0.01 * OPTIM.multiplier(i, 6) for i in range(6)]


def test_stopping_at_the_last_step_is_the_end(run):
    assert train(run, stop_at=6).state.step == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_after_the_step_and_handlers_come_back(number, run):
    def interrupted(step):
        if step == 2:
            os.kill(os.getpid(), number)
        return batches(step)

    before = signal.getsignal(number)
    with pytest.raises(Preempted) as caught:
        train(run, batches=interrupted)
    assert caught.value.exit_code == 75
    assert load_checkpoint(run.checkpoints).step in (3, 4)
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once(run):
    def impatient(step):
        if step >= 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        train(run, batches=impatient)
    assert list_steps(run.checkpoints) == []


def test_training_off_the_main_thread_needs_no_signals(run):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(run)))
    thread.start()
    thread.join()
    assert results[0].state.step == 6


def test_checkpoints_and_evaluations_are_due_at_their_steps_and_at_the_end(run):
    calls = []

    def evaluate():
        calls.append(len(read_metrics(run.metrics_path)) + 1)
        return {"val_loss": 1.5, "val_bpb": 0.5}

    config = dataclasses.replace(TRAIN, steps=7, eval_every=3, save_every=2, keep_last=0)
    result = train(run, train=config, evaluate=evaluate)
    assert calls == [3, 6, 7]
    assert list_steps(run.checkpoints) == [2, 4, 6, 7]
    assert result.evaluation == {"val_loss": 1.5, "val_bpb": 0.5}
    records = read_metrics(run.metrics_path)
    assert [r["step"] for r in records if "val_loss" in r] == [3, 6, 7]


def test_only_logged_steps_are_logged(run):
    train(run, train=dataclasses.replace(TRAIN, steps=7, log_every=3))
    assert [r["step"] for r in read_metrics(run.metrics_path)] == [1, 3, 6]
    timings = [json.loads(line) for line in run.timings_path.read_text().splitlines()]
    assert [r["step"] for r in timings] == [1, 3, 6]
    assert all(r["tokens_per_s"] > 0 and r["mfu"] > 0 for r in timings)


def test_a_failing_save_does_not_stop_training(run, monkeypatch, capsys):
    original = trainer.save_checkpoint

    def save(root, step, *args, **options):
        if step == 2:
            raise SaveError(errno.ENOSPC, "step_2: the disk is full")
        return original(root, step, *args, **options)

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    config = dataclasses.replace(TRAIN, save_every=2)
    assert train(run, train=config).state.step == 6
    assert list_steps(run.checkpoints) == [4, 6]
    assert "the disk is full; training goes on" in capsys.readouterr().out


def test_a_preempted_run_that_could_not_save_does_not_claim_it_did(run, monkeypatch):
    def save(*args, **options):
        raise SaveError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    with pytest.raises(UsageError, match="the disk is full; free some space and --resume"):
        train(run, stop_at=2)
    with pytest.raises(UsageError, match="the disk is full"):
        train(run)


def test_a_stop_behind_the_run_is_refused(run):
    with pytest.raises(Preempted):
        train(run, stop_at=3)
    with pytest.raises(UsageError, match="--stop-at 3: the run is at step 3 already"):
        train(run, stop_at=3, resume=load_checkpoint(run.checkpoints))


def test_a_finished_run_still_evaluates(run):
    train(run)
    checkpoint = load_checkpoint(run.checkpoints)
    result = train(run, resume=checkpoint, evaluate=lambda: {"val_loss": 1.0})
    assert result.evaluation == {"val_loss": 1.0}
    assert not checkpoint.tensors, "they would stay in memory to the end of the run"


def test_weights_of_another_model_are_refused(run):
    train(run)
    other = GPT(dataclasses.replace(CONFIG, n_embd=32))
    with pytest.raises(DataError, match=r"wte\.weight is of shape \(23, 16\)"):
        train(run, other, resume=load_checkpoint(run.checkpoints))
    deeper = GPT(dataclasses.replace(CONFIG, n_layer=3))
    with pytest.raises(DataError, match=r"blocks\.2\.[a-z_.]+ is missing"):
        train(run, deeper, resume=load_checkpoint(run.checkpoints))


def test_weights_that_the_model_has_no_place_for_are_refused(run):
    train(run)
    shallower = GPT(dataclasses.replace(CONFIG, n_layer=1))
    with pytest.raises(DataError, match=r"blocks\.1\."):
        train(run, shallower, resume=load_checkpoint(run.checkpoints))


@pytest.mark.full
def test_compiled_blocks_train_the_same(tmp_path):
    models = []
    for compile in (False, True):
        run = RunDir.create(tmp_path / str(compile))
        models.append(new_model())
        optim = dataclasses.replace(OPTIM, optimizer="adamw", eps=1e-3)
        train(
            run, models[-1], train=dataclasses.replace(TRAIN, steps=2, compile=compile), optim=optim
        )
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class Pair(nn.Module):
    """Two models in one, each with a file of its own in the checkpoint."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config, self.compute_dtype = CONFIG, torch.float32
        self.policy, self.value = GPT(CONFIG), GPT(CONFIG)

    def checkpoint_parts(self):
        return {"model": self.policy, "value": self.value}


class Counter:
    """Batches that depend on a state of their own, which only a checkpoint can bring back."""

    def __init__(self):
        self.calls, self.seen = 0, torch.zeros(3)

    def __call__(self, step):
        self.calls += 2
        self.seen += self.calls
        return [micro_batch(self.calls + int(self.seen[0]))]

    def state(self):
        return {"calls": self.calls}

    def tensors(self):
        return {"seen": self.seen}

    def load(self, state, tensors):
        self.calls, self.seen = state["calls"], tensors["seen"]


def pair_loss(model, batch):
    return loss_fn(model.policy, batch) + loss_fn(model.value, batch)


def test_a_stage_with_state_and_parts_resumes_exactly(tmp_path):
    def go(name, stop_at=None, resume=None):
        run = RunDir(tmp_path / name) if resume else RunDir.create(tmp_path / name)
        model, counter = Pair(), Counter()
        checkpoint = load_checkpoint(run.checkpoints) if resume else None
        with contextlib.suppress(Preempted):
            train(
                run, model, counter, pair_loss, stop_at=stop_at, resume=checkpoint,
                stage_state=counter, metrics=lambda: {"calls": counter.calls},
            )  # fmt: skip
        return model, run

    whole, whole_run = go("whole")
    go("parts", stop_at=3)
    parts, parts_run = go("parts", resume=True)
    assert whole_run.metrics_path.read_bytes() == parts_run.metrics_path.read_bytes()
    assert [record["calls"] for record in read_metrics(whole_run.metrics_path)] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    files = load_checkpoint(whole_run.checkpoints).tensors
    assert files["model"].keys() == files["value"].keys() == GPT(CONFIG).state_dict().keys()
    assert not torch.equal(files["model"]["wte.weight"], Pair().policy.wte.weight)


def test_what_a_stage_refuses_is_said_before_weights_that_do_not_fit(run):
    class Refusing(Counter):
        def load(self, state, tensors):
            raise UsageError("--init: another model")

    with pytest.raises(Preempted):
        train(run, stage_state=Counter(), stop_at=2)
    wider = GPT(dataclasses.replace(CONFIG, n_embd=32))
    checkpoint = load_checkpoint(run.checkpoints)
    for stage_state, error, message in (
        (Refusing(), UsageError, "--init: another model"),
        (Counter(), DataError, "the configured model needs"),
    ):
        with pytest.raises(error, match=message):
            train(run, wider, resume=checkpoint, stage_state=stage_state)


def test_muon_takes_the_hidden_matrices_of_every_model_inside():
    names = {n for n in Optimizers(Pair(), OPTIM)._names.values() if n.endswith("qkv.weight")}
    optimizers = Optimizers(Pair(), OPTIM)
    muon = {optimizers._names[p] for p in optimizers._optimizers[1].param_groups[0]["params"]}
    assert names
    assert names <= muon
    assert not any("wte" in name for name in muon)

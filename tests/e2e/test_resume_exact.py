"""N steps, an end of any kind, a resume and M steps are N + M steps, byte for byte."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from commands import TINY, Shell, real_python
from runs import assert_same_run, log

STEPS = 3000  # of the schedule; no run here comes to its end


def steps_logged(run: Path) -> list[int]:
    return [record["step"] for record in log(run)]


@pytest.fixture(scope="module")
def uninterrupted(server, corpus, tmp_path_factory) -> Path:
    """40 steps in one go."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = Shell(server, corpus).pretrain(*arguments(run), "--stop-at", 40, expect=75)
    assert done.errors == [f"fastgpt: stopped after step 40 of {STEPS}; go on with --resume {run}"]
    return run


def arguments(run: Path, *more: object) -> list[object]:
    return ["--data", "my.txt", "--out", run, "--steps", STEPS, "--warmup", 5, *TINY, *more]


VARIANTS = {
    "muon": [],
    "adamw": ["--optimizer", "adamw", "--schedule", "cosine"],
    "accumulation": ["--micro-batch", 1],
    "documents": ["--mask-documents", "--dtype", "bfloat16", "--log-every", 3],
}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.full if v == "adamw" else ()) for v in VARIANTS],
)
def test_a_resumed_run_equals_an_uninterrupted_one(variant, shell: Shell, tmp_path):
    options = VARIANTS[variant]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    shell.pretrain(*arguments(whole, *options), "--stop-at", 18, expect=75)
    shell.pretrain(*arguments(parts, *options), "--stop-at", 7, expect=75)
    assert steps_logged(parts)[-1] <= 7
    shell.pretrain("--resume", parts, "--stop-at", 11, expect=75)
    shell.pretrain("--resume", parts, "--stop-at", 18, expect=75)
    assert_same_run(whole, parts, 18)


def test_the_end_of_a_run_is_the_same_after_a_resume(shell: Shell, base_run, tmp_path):
    """The last steps, their evaluation and the samples, not only a middle."""
    run = tmp_path / "run"
    shell.pretrain("--config", base_run[0] / "config.toml", "--out", run, "--stop-at", 9, expect=75)
    out = shell.pretrain("--resume", run).out
    assert_same_run(base_run[0], run, 24)
    samples = [line for line in out.splitlines() if line.startswith(">")]
    assert samples == [line for line in base_run[1].splitlines() if line.startswith(">")]


def test_resuming_a_finished_run_finishes_it_again(shell: Shell, fresh):
    """As after a crash between the last checkpoint and the report."""
    run = fresh()
    before = (run / "metrics.jsonl").read_bytes()
    (run / "report.html").unlink()
    out = shell.pretrain("--resume", run).out
    assert "bits/byte" in out
    assert (run / "report.html").is_file()
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_the_run(name, shell: Shell, uninterrupted, tmp_path):
    run = tmp_path / "run"
    command = shell.start("pretrain", *arguments(run))
    command.wait_until(lambda: "pretrain 1/" in command.out)
    command.send(getattr(signal, name))
    assert command.wait() == 75, command.out
    stopped = steps_logged(run)[-1]
    assert command.out.splitlines()[-1] == (
        f"fastgpt: stopped after step {stopped} of {STEPS}; go on with --resume {run}"
    )
    assert [p.name for p in (run / "checkpoints").glob("step_*")] == [f"step_{stopped}"]
    # A slow machine may let the run go on for long before the signal arrives.
    end = max(40, stopped + 5)
    whole = uninterrupted
    if end != 40:
        whole = tmp_path / "whole"
        shell.pretrain(*arguments(whole), "--stop-at", end, expect=75)
    shell.pretrain("--resume", run, "--stop-at", end, expect=75)
    assert_same_run(whole, run, end)


def test_a_second_interrupt_quits_at_once(shell: Shell, tmp_path):
    """Steps of several seconds: the first Ctrl-C waits for the end of one, the second does not."""
    run = tmp_path / "run"
    command = shell.start(
        "pretrain", *arguments(run, "--micro-batch", 1, "--batch-tokens", 1 << 20)
    )
    command.wait_until(lambda: command.handles(signal.SIGTERM))  # SIGINT comes first
    command.send(signal.SIGINT)
    command.wait_until(lambda: "again" in command.out)
    command.send(signal.SIGINT)
    assert command.wait() == 130, command.out
    assert command.out.splitlines()[-1] == "fastgpt: interrupted"


MOMENTS = {
    "before the first save": lambda root: root.parent.joinpath("metrics.jsonl").exists(),
    "in a save": lambda root: next(root.glob(".tmp-step_3-*"), None),
    "after a save": lambda root: (root / "step_6").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_exactly(moment, shell: Shell, uninterrupted, tmp_path):
    run = tmp_path / "run"
    command = shell.start("pretrain", *arguments(run, "--save-every", 3))
    command.wait_until(lambda: MOMENTS[moment](run / "checkpoints"))
    command.send(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    done = shell.pretrain("--resume", run, "--stop-at", 40, expect=75)
    assert "damaged" not in done.out
    assert_same_run(uninterrupted, run, 40)
    assert list((run / "checkpoints").glob(".*")) == []


def test_a_run_killed_while_it_prepares_its_data_can_be_resumed(
    shell: Shell, uninterrupted, tmp_path
):
    run = tmp_path / "run"
    command = shell.start("pretrain", *arguments(run))
    command.wait_until((run / "tokens").exists)
    command.send(signal.SIGKILL)
    command.wait()
    shell.pretrain("--resume", run, "--stop-at", 40, expect=75)
    assert_same_run(uninterrupted, run, 40)


@pytest.mark.full
def test_killed_again_and_again(shell: Shell, uninterrupted, tmp_path):
    """Kill at a different step each time, restart, and come out with the same bytes."""
    run = tmp_path / "run"
    first = ["--data", "my.txt", "--out", run, "--steps", STEPS, "--warmup", 5, *TINY]
    command = shell.start("pretrain", *first, "--save-every", 1)
    kills = 0
    for step in range(2, 38):
        root = run / "checkpoints"
        command.wait_until(lambda r=root, s=step: (r / f"step_{s}").exists() or _beyond(r, s))
        command.send(signal.SIGKILL)
        if command.wait() == -signal.SIGKILL:
            kills += 1
        command = shell.start("pretrain", "--resume", run, "--stop-at", 40)
    assert kills > 20
    assert command.wait() == 75, command.out
    assert_same_run(uninterrupted, run, 40)


def _beyond(root: Path, step: int) -> bool:
    names = [name for name in os.listdir(root) if name.startswith("step_")] if root.exists() else []
    return max((int(name[5:]) for name in names), default=0) >= step


@pytest.mark.full
def test_a_compiled_run_resumes_exactly(corpus, tmp_path):
    """With real interpreters: a server that forks must not hold a compiler's threads."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def pretrain(*options: object) -> None:
        done = real_python(["-m", "fastgpt.pretrain", *options], cwd=corpus)
        assert done.returncode == 75, done.stdout

    pretrain(*arguments(whole, "--compile"), "--stop-at", 12)
    pretrain(*arguments(parts, "--compile"), "--stop-at", 5)
    pretrain("--resume", parts, "--stop-at", 12)
    assert_same_run(whole, parts, 12)

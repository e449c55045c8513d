"""What holds for every stage that starts from a run: how it ends early, goes on, and refuses to."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from commands import ENVIRONMENT, SECONDS, real_python
from runs import Stage, assert_same_run, free_port, log

FULL = pytest.mark.full
STEPS = 3000  # of the schedule; no run here comes to its end


@pytest.fixture
def stage(request) -> Stage:
    return request.getfixturevalue(request.param)


def options(stage: Stage) -> list[object]:
    """What a run needs besides."""
    return ["--reward", "reward"] if stage.module == "ppo" else []


def stages(*full: str):
    """All stages, some of them in the full run only."""
    names = ("sft", "reward", "dpo", "ppo")
    values = [pytest.param(n, marks=FULL) if n in full else n for n in names]
    return pytest.mark.parametrize("stage", values, indirect=True)


@stages("dpo")
def test_a_signal_saves_and_ends_the_run(stage, tmp_path):
    run = tmp_path / "run"
    command = stage.start("--out", run, "--steps", STEPS, *options(stage))
    command.wait_until(lambda: f"{stage.module} 1/" in command.out)
    command.send(signal.SIGTERM)
    assert command.wait() == 75, command.out
    stopped = log(run)[-1]["step"]
    last = f"fastgpt: stopped after step {stopped} of {STEPS}; go on with --resume {run}"
    assert command.out.splitlines()[-1] == last
    stage("--resume", run, "--stop-at", stopped + 2, expect=75)
    assert log(run)[-1]["step"] == stopped + 2


@stages("sft", "reward", "dpo")
def test_the_real_launcher_passes_a_signal_on_and_the_run_goes_on_exactly(stage, tmp_path):
    """torchrun ends with 1 when it is asked to end, its processes with the 75 of a saved run."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    new = ("--steps", STEPS, *options(stage))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    launcher += ["-m", f"fastgpt.{stage.module}"]
    words = [sys.executable, *launcher, *stage.words("--out", run, *new)]
    with subprocess.Popen(
        [str(word) for word in words],
        cwd=stage.shell.cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        out = ""
        for line in process.stdout:
            if line.startswith(f"{stage.module} 1/"):
                process.send_signal(signal.SIGTERM)
            out += line
        assert process.wait(SECONDS) == 1, out
    stopped = log(run)[-1]["step"]
    said = [line for line in out.splitlines() if line.startswith("fastgpt: ")]
    assert said == [f"fastgpt: stopped after step {stopped} of {STEPS}; go on with --resume {run}"]
    end = ("--stop-at", stopped + 3)
    if stage.module == "sft":  # a start of the launcher takes seconds; the others do it again
        stage.on_two("--resume", run, *end, expect=75)
    else:
        done = real_python([*launcher, *stage.words("--resume", run, *end)], cwd=stage.shell.cwd)
        assert done.returncode == 1, done.stdout
        assert "exitcode  : 75" in done.stdout
    stage.on_two("--out", whole, *new, *end, expect=75)
    assert_same_run(whole, run, stopped + 3)


@FULL
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@stages()
def test_a_compiled_run_resumes_exactly(stage, dtype, tmp_path):
    """A resume meets other sizes of batches first, of which the compiled code must not depend.

    In real interpreters: a server that forks must not hold a compiler's threads.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(*more: object) -> None:
        words = stage.words(*more)
        done = real_python(["-m", f"fastgpt.{stage.module}", *words], cwd=stage.shell.cwd)
        assert done.returncode == 75, done.stdout

    new = ("--steps", STEPS, *options(stage), "--compile", "--dtype", dtype)
    run("--out", whole, *new, "--stop-at", 10)
    run("--out", parts, *new, "--stop-at", 3)
    for step in (5, 8, 10):
        run("--resume", parts, "--stop-at", step)
    assert_same_run(whole, parts, 10)


@stages("dpo")
def test_changed_data_cannot_be_resumed(stage, tmp_path):
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text(stage.data.read_text())
    stage("--out", run, stage.flag, data, "--stop-at", 2, *options(stage), expect=75)
    data.write_text(stage.data.read_text().replace("cat", "cow"))
    (error,) = stage("--resume", run, expect=3).errors
    assert stage.flag in error
    assert "not what this run began with; a resumed run needs the same" in error


@stages()
def test_a_run_to_start_from_is_needed(stage, tmp_path):
    words = (stage.flag, stage.data, *stage.options, *options(stage), "--out", tmp_path / "run")
    done = stage.shell.run(stage.module, *words)
    assert done.status == 2
    message = "fastgpt: --init: the run to start from is missing; give its directory"
    assert done.errors == [message]

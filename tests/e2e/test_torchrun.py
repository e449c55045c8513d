"""Data parallel on two processes over gloo: the same run as on one, written by rank 0 alone."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from commands import TINY, Shell, real_python
from runs import free_port, log

from fastgpt.checkpoint import load_checkpoint


def arguments(run: Path, *more: object) -> list[object]:
    return ["--data", "my.txt", "--out", run, "--steps", 12, *TINY, *more]


def assert_close(one: list[dict], two: list[dict], tolerance: float = 1e-4) -> None:
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == pytest.approx(b[key], rel=tolerance), (a["step"], key)


def on_two(shell: Shell, *options: object, expect: int = 0) -> str:
    """Run on two ranks as torchrun starts them; returns what rank 0 printed."""
    commands = shell.ranks(2, free_port(), "pretrain", *options)
    statuses = [command.wait() for command in commands]
    assert statuses == [expect, expect], "\n".join(command.out for command in commands)
    assert commands[1].out == "", "rank 1 is to be silent"
    return commands[0].out


@pytest.fixture(scope="module")
def on_one(server, corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    Shell(server, corpus).pretrain(*arguments(run))
    return run


@pytest.fixture(scope="module")
def torchrun(corpus, tmp_path_factory) -> tuple[Path, str]:
    """The run of the other tests under the real launcher; its output."""
    run = tmp_path_factory.mktemp("torchrun") / "run"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    done = real_python([*launcher, "-m", "fastgpt.pretrain", *arguments(run)], cwd=corpus)
    assert done.returncode == 0, done.stdout
    return run, done.stdout


def test_torchrun_trains_as_one_process_does(torchrun, on_one):
    run, out = torchrun
    assert_close(log(run), log(on_one))
    assert out.count("pretrain 12/12") == 1
    assert len([line for line in out.splitlines() if line.startswith("> ")]) == 3


def test_only_rank_0_writes(torchrun, on_one):
    names = [
        sorted(str(p.relative_to(run)) for p in run.rglob("*")) for run in (torchrun[0], on_one)
    ]
    assert names[0] == names[1]


def test_accumulation_on_two_processes_changes_nothing(shell: Shell, on_one, tmp_path):
    """Gradients are synchronised after the last micro-batch only."""
    run = tmp_path / "run"
    on_two(shell, *arguments(run, "--micro-batch", 1))
    assert_close(log(run), log(on_one))


def test_masked_targets_weigh_the_same_on_any_rank(shell: Shell, tmp_path):
    """Ranks with different numbers of targets: the mean is over tokens, not over ranks."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--mask-documents", "--steps", 4, "--batch-tokens", 1024]
    shell.pretrain(*arguments(one, *options))
    on_two(shell, *arguments(two, *options))
    assert_close(log(one), log(two))
    masked = [4096 - record["tokens"] for record in log(one)[-1:]]
    assert 0 < masked[0] < 100


def test_a_run_moves_from_two_processes_to_one_and_back(shell: Shell, on_one, tmp_path):
    """Every sample is used once, whatever number of processes does it."""
    run = tmp_path / "run"
    on_two(shell, *arguments(run), "--stop-at", 4, expect=75)
    shell.pretrain("--resume", run, "--stop-at", 8, expect=75)
    on_two(shell, "--resume", run)
    assert_close(log(run), log(on_one))


def test_two_processes_resume_exactly(shell: Shell, torchrun, tmp_path):
    run = tmp_path / "run"
    on_two(shell, *arguments(run), "--stop-at", 5, expect=75)
    on_two(shell, "--resume", run)
    for name in ("checkpoints/step_12/model.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (torchrun[0] / name).read_bytes(), name


@pytest.mark.parametrize("who", [(0, 1), (1,)])
def test_a_signal_to_any_rank_saves_and_ends_all(who, shell: Shell, tmp_path):
    run = tmp_path / "run"
    ranks = shell.ranks(2, free_port(), "pretrain", *arguments(run, "--steps", 3000))
    ranks[0].wait_until(lambda: "pretrain 1/" in ranks[0].out)
    for rank in who:
        ranks[rank].send(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [75, 75], ranks[0].out + ranks[1].out
    assert load_checkpoint(run / "checkpoints", warn=pytest.fail).step == log(run)[-1]["step"]


@pytest.mark.parametrize("what", ["data", "batch", "damage"])
def test_an_error_is_one_line_on_two_processes(what, shell: Shell, fresh, tmp_path):
    """The rank that finds it says so; the others neither hang nor add tracebacks."""
    options = arguments(tmp_path / "run")
    if what == "data":
        options[1] = "none.txt"
    elif what == "batch":
        options += ["--batch-tokens", 96]
    else:
        run = fresh()
        content = bytearray((run / "tokens" / "train.bin").read_bytes())
        content[200] ^= 1
        (run / "tokens" / "train.bin").write_bytes(content)
        options = ["--resume", run, "--steps", 30]
    ranks = shell.ranks(2, free_port(), "pretrain", *options)
    statuses = [rank.wait() for rank in ranks]
    out = "".join(rank.out for rank in ranks)
    assert set(statuses) == {2 if what == "batch" else 3}, out
    assert "Traceback" not in out
    assert len([line for line in out.splitlines() if line.startswith("fastgpt: ")]) == 1, out


@pytest.mark.full
def test_no_abort_at_exit(shell: Shell, tmp_path):
    """Objects that outlive a gloo group abort the process now and then, after a good run."""
    for i in range(10):
        on_two(shell, *arguments(tmp_path / str(i), "--steps", 3))
        on_two(shell, *arguments(tmp_path / f"stopped {i}"), "--stop-at", 3, expect=75)

"""The run directory and its logs: each step once, valid JSON, and never a reason to stop."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastgpt.errors import UsageError
from fastgpt.rundir import MetricsLog, RunDir, read_metrics, write_atomic


def fail(message: str) -> None:
    raise AssertionError(message)


def write_steps(path: Path, steps, **kwargs) -> None:
    with MetricsLog(path, warn=fail, **kwargs) as log:
        for step in steps:
            log.log(step, loss=1 / (step + 1), lr=0.1, tokens=step * 512)


def test_create_and_open(tmp_path: Path) -> None:
    run = RunDir.create(str(tmp_path / "runs" / "x"))
    assert run.path.is_dir()
    assert RunDir.create(run.path) == run  # still empty
    with pytest.raises(UsageError, match=r"not a run directory: it has no config\.toml"):
        RunDir.open(run.path)
    run.config_path.write_text("")
    assert RunDir.open(run.path) == run
    with pytest.raises(UsageError, match=r"not empty.*--resume .*x, or choose another --out"):
        RunDir.create(run.path)
    with pytest.raises(UsageError, match="no such directory"):
        RunDir.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot create"):
        RunDir.create(run.config_path)
    with pytest.raises(UsageError, match="cannot create"):
        RunDir.create(run.config_path / "below")


def test_names_are_those_of_the_documentation() -> None:
    run = RunDir(Path("r"))
    names = [run.config_path, run.tokenizer_path, run.metrics_path, run.timings_path]
    names += [run.checkpoints, run.report_path, run.report_data_path]
    assert [path.name for path in names] == [
        *("config.toml", "tokenizer.json", "metrics.jsonl", "timings.jsonl"),
        *("checkpoints", "report.html", "report.json"),
    ]


def test_import_needs_no_torch() -> None:
    modules = "fastgpt.rundir, fastgpt.progress, fastgpt.report"
    code = f"import sys, {modules}; print([m for m in ('torch', 'rich') if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert done.stdout.split() == [b"[]"]


def test_lines_are_stable_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, warn=fail) as log:
        log.log(1, loss=0.1, grad_norm=float("nan"), a=float("-inf"), z=float("inf"), val_loss=None)
        assert path.read_text().endswith("}\n")  # there before the file is closed
        log.log(2, text="ü\n", flag=True, tokens=2**60, small=np.float32("nan"), size=np.int64(3))
    first, second = path.read_text().splitlines()
    assert first == (
        '{"step": 1, "a": "-Infinity", "grad_norm": "NaN", "loss": 0.1, "val_loss": null, '
        '"z": "Infinity"}'
    )
    for line in (first, second):
        json.loads(line, parse_constant=fail)
    one, two = read_metrics(path)
    assert math.isnan(one["grad_norm"])
    assert (one["a"], one["z"], one["val_loss"]) == (-math.inf, math.inf, None)
    assert (two["text"], two["tokens"], two["size"], two["flag"]) == ("ü\n", 2**60, 3, True)
    assert math.isnan(two["small"])


@pytest.mark.parametrize("stop", [0, 1, 7, 20, 23])
def test_resume_gives_the_bytes_of_an_uninterrupted_run(tmp_path: Path, stop: int) -> None:
    """A checkpoint at ``stop``, steps up to 23, then the process dies and resumes at ``stop``."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    write_steps(whole, range(1, 41))
    write_steps(resumed, range(1, 24))
    write_steps(resumed, range(stop + 1, 41), after_step=stop)
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_cut_at_any_byte_is_mended_on_resume(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    write_steps(whole, range(1, 5))
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        torn.write_bytes(content[:cut])
        complete = sum(cut >= end - 1 for end in ends)  # only the newline may be missing
        assert [record["step"] for record in read_metrics(torn)] == list(range(1, complete + 1))
        write_steps(torn, range(complete + 1, 5), after_step=complete)
        assert torn.read_bytes() == content


def test_rubbish_and_repeated_steps_are_removed_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}', "\0\0", '{"step": 2}', '{"step": 2, "x": 1}', "[" * 9999, '{"step": 3}']
    lines += ['{"step": 9}', '{"step": "4"}', "null", '{"step": 4}']
    path.write_text("\n".join(lines))
    with MetricsLog(path, after_step=4, warn=fail) as log:
        log.log(5)
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in range(1, 6))


def test_a_step_cannot_be_logged_twice(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m", after_step=3, warn=fail) as log:
        for step in (3, 0):
            with pytest.raises(ValueError, match="already logged"):
                log.log(step)
        log.log(4)
        with pytest.raises(ValueError, match="already logged"):
            log.log(4)


def test_a_file_that_cannot_be_opened_is_one_warning(tmp_path: Path) -> None:
    messages: list[str] = []
    (tmp_path / "m").mkdir()
    with MetricsLog(tmp_path / "m", warn=messages.append) as log:
        for step in range(3):
            log.log(step, loss=1.0)
        log.sync()
    with MetricsLog(tmp_path / "no" / "m", warn=messages.append) as log:
        log.log(1)
    assert len(messages) == 2
    assert "training goes on without it" in messages[0]
    assert read_metrics(tmp_path / "m") == []


def test_a_disk_that_fills_up_and_empties_leaves_whole_lines(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "m"
    messages: list[str] = []
    real_write = os.write
    room = [10_000]

    def write(descriptor: int, data: bytes) -> int:
        size = min(len(data), room[0])
        if size == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= size
        return real_write(descriptor, data[:size])

    monkeypatch.setattr(os, "write", write)
    with MetricsLog(path, warn=messages.append) as log:
        log.log(1, loss=1.0)
        room[0] = 80  # the next line fails half way, with more bytes than the one after it
        log.log(2, text="x" * 100)
        log.log(3, loss=3.0)
        room[0] = 10_000
        log.log(4, loss=4.0)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 4, "loss": 4.0}\n'
    assert len(messages) == 1
    assert "No space left" in messages[0]


def test_a_failing_sync_is_a_warning(tmp_path: Path, monkeypatch) -> None:
    messages: list[str] = []

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with MetricsLog(tmp_path / "m", warn=messages.append) as log:
        log.sync()
        assert not messages
        monkeypatch.setattr(os, "fsync", fsync)
        log.sync()
    assert len(messages) == 1


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "config.toml"
    write_atomic(path, "ü = 1\n")
    assert path.read_bytes() == "ü = 1\n".encode()

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == "ü = 1\n".encode()

"""A save may die or fail at any moment: what was there before stays loadable, or the new one is."""

from __future__ import annotations

import builtins
import errno
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from fastgpt import checkpoint as ckpt
from fastgpt.checkpoint import SaveError, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PROJECT = Path(__file__).parents[2]
OS_CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "open", "listdir", "scandir")


@pytest.fixture(autouse=True)
def no_sync(monkeypatch) -> None:
    """What reaches the platters cannot be seen here, and a busy disk makes it slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Crash(BaseException):
    """Stands for the end of the process: nothing in the project may catch it."""


def tensors_of(step: int, version: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((300,), float(step))},
        "optimizer": {"v": torch.tensor(version)},
    }


def save(root: Path, step: int, version: int = 0, keep_last: int = 2) -> None:
    state = {"step": step, "version": version}
    save_checkpoint(root, step, tensors_of(step, version), state, keep_last=keep_last)


def holds(root: Path) -> tuple[int, int]:
    """(step, version) of what loads, after checking that all its parts belong together."""
    warnings: list[str] = []
    loaded = load_checkpoint(root, warn=warnings.append)
    assert all("latest: No such file" in text for text in warnings)  # a first save died before it
    for other in ckpt.list_steps(root):
        ckpt.find_checkpoint(root, other)  # no crash leaves a damaged one in sight
    step, version = loaded.state["step"], loaded.state["version"]
    assert loaded.step == step
    expected = tensors_of(step, version)
    assert torch.equal(loaded.tensors["model"]["w"], expected["model"]["w"])
    assert torch.equal(loaded.tensors["optimizer"]["v"], expected["optimizer"]["v"])
    return step, version


class HalfWriter:
    """A file whose write stores half of the data and then fails."""

    def __init__(self, file, error: BaseException):
        self._file, self._error = file, error

    def write(self, data) -> int:
        self._file.write(bytes(data)[: len(data) // 2])
        self._file.flush()
        raise self._error

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


@contextmanager
def failing_at(position: int, error: BaseException, when: str) -> Iterator[list[str]]:
    """Let the ``position``-th call of the file system fail: before it, after it, or half way."""
    calls: list[str] = []

    def wrap(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) != position:
                return real(*args, **kwargs)
            if when == "before":
                raise error
            with suppress(FileExistsError):  # mkdir(exist_ok=True)
                result = real(*args, **kwargs)
                if when == "half" and name == "file":
                    return HalfWriter(result, error)
            raise error

        return call

    def wrap_open(*args, **kwargs):
        writes = len(args) > 1 and "x" in args[1]
        return (opened if writes else real_open)(*args, **kwargs)

    real_open = builtins.open
    opened = wrap("file", real_open)
    with pytest.MonkeyPatch.context() as patch:
        for name in OS_CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        patch.setattr(builtins, "open", wrap_open)
        yield calls


SCENARIOS = {
    # name: (checkpoints there, (step, version) saved, keep_last)
    "first": ([], (10, 1), 2),
    "next": ([(10, 0), (20, 0)], (30, 1), 2),
    "again": ([(10, 0), (20, 0)], (20, 1), 2),
    "again_only": ([(20, 0)], (20, 1), 1),
    "keep_one": ([(10, 0)], (20, 1), 1),
}


def prepare(tmp_path: Path, scenario: str) -> Path:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    for step, version in SCENARIOS[scenario][0]:
        save(prepared, step, version)
    return prepared


def attempts(tmp_path: Path, scenario: str, error: BaseException, when: str):
    """Save with a failure at the first call of the file system, at the second, ..., at none.

    Yields the directory, the calls made and what the save raised.
    """
    prepared = prepare(tmp_path, scenario)
    _, new, keep_last = SCENARIOS[scenario]
    for position in range(1, 500):
        root = tmp_path / str(position)
        shutil.copytree(prepared, root)
        raised = None
        with failing_at(position, error, when) as calls:
            try:
                save(root, *new, keep_last=keep_last)
            except (Crash, SaveError) as caught:
                raised = caught
        yield root, calls, raised
        if len(calls) < position:
            assert raised is None
            return
        shutil.rmtree(root)
    pytest.fail("the save never got through")


@pytest.mark.parametrize("when", ["before", "after", "half"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, scenario: str, when: str
) -> None:
    there, new, keep_last = SCENARIOS[scenario]
    old = there[-1] if there else None
    outcomes = set()
    for root, calls, raised in attempts(tmp_path, scenario, Crash(), when):
        assert isinstance(raised, Crash) or holds(root) == new
        found = holds(root) if there or ckpt.list_steps(root) else None
        assert found in (old, new), calls
        outcomes.add(found)
        assert found is None or not [n for n in os.listdir(root) if n.startswith(".")]
        save(root, *new, keep_last=keep_last)  # the next run goes on
        assert holds(root) == new
        assert len(ckpt.list_steps(root)) <= keep_last
    assert outcomes == {old, new}  # or the crashes would not have covered the save


@pytest.mark.parametrize("when", ["before", "after", "half"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_full_disk_at_any_call_loses_nothing(tmp_path: Path, scenario: str, when: str) -> None:
    there, new, _ = SCENARIOS[scenario]
    full = OSError(errno.ENOSPC, "No space left on device")
    failures = 0
    for root, calls, raised in attempts(tmp_path, scenario, full, when):
        if raised is None:
            assert holds(root) == new, calls
        else:
            failures += 1
            assert isinstance(raised, SaveError)
            assert raised.errno == errno.ENOSPC
            assert f"checkpoint of step {new[0]} not saved: No space left" in str(raised)
            assert "free)" in str(raised)
        assert not [name for name in os.listdir(root) if name.startswith(".")], calls
        if there or ckpt.list_steps(root):
            assert holds(root) in [*there[-1:], new], calls
    assert failures > 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads names from /proc")
def test_everything_is_synced_before_a_name_depends_on_it(tmp_path: Path, monkeypatch) -> None:
    events: list[str] = []
    rename, replace = os.rename, os.replace

    def relative(path) -> str:
        return str(Path(path).relative_to(tmp_path)).replace(f"-{os.getpid()}", "")

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        events.append(f"sync {relative(path)}")

    def moved(real):
        def move(source, target) -> None:
            events.append(f"move {relative(source)} {relative(target)}")
            real(source, target)

        return move

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moved(rename))
    monkeypatch.setattr(os, "replace", moved(replace))
    save(tmp_path, 10, keep_last=1)
    files = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    assert events == [
        *(f"sync .tmp-step_10/{name}" for name in files),
        "sync .tmp-step_10",
        "move .tmp-step_10 step_10",
        "sync .",
        "sync .tmp-latest",
        "move .tmp-latest latest",
        "sync .",
    ]


def test_the_limit_of_the_kernel_on_file_size_is_a_save_error(tmp_path: Path) -> None:
    """A real failure of write(2), without privileges."""
    save(tmp_path, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(SaveError, match="File too large"):
            save_checkpoint(tmp_path, 20, {"model": {"w": torch.zeros(50_000)}}, {}, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert holds(tmp_path) == (10, 0)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_10"]


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        root = disk / "checkpoints"
        big = {"model": {"w": torch.zeros(1_200_000)}}  # 4.8 MB: one fits, two do not
        with pytest.raises(ckpt.UsageError, match="2 more checkpoints"):
            ckpt.check_space(root, ckpt.required_bytes(big, {}))
        save_checkpoint(root, 10, big, {}, keep_last=1)
        with pytest.raises(SaveError, match=r"No space left on device \(.* free\)"):
            save_checkpoint(root, 20, big, {}, keep_last=1)
        assert load_checkpoint(root).step == 10
        assert sorted(os.listdir(root)) == ["latest", "step_10"]
        save_checkpoint(root, 20, {"model": {"w": torch.zeros(100)}}, {}, keep_last=1)
        assert load_checkpoint(root).step == 20
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_wrong_byte_on_the_way_to_the_disk_is_found_before_the_rename(
    tmp_path: Path, monkeypatch
) -> None:
    save(tmp_path, 10)
    real = ckpt._sync_directory

    def damage(path: Path) -> None:
        real(path)
        if path.name.startswith(".tmp-step_20"):
            with open(path / "model.safetensors", "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x01")

    monkeypatch.setattr(ckpt, "_sync_directory", damage)
    with pytest.raises(SaveError, match=r"reads back wrong: model\.safetensors"):
        save(tmp_path, 20, keep_last=1)
    assert ckpt.list_steps(tmp_path) == [10]


def test_an_old_checkpoint_that_cannot_be_deleted_is_only_a_warning(
    tmp_path: Path, monkeypatch
) -> None:
    save(tmp_path, 10)
    messages: list[str] = []

    def refuse(path, ignore_errors=False):
        if ignore_errors:
            return
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        save_checkpoint(tmp_path, 20, {}, {}, keep_last=1, warn=messages.append)
    assert len(messages) == 1
    assert "step_10" in messages[0]
    assert load_checkpoint(tmp_path).step == 20


def test_a_reader_leaves_the_files_of_a_living_writer_alone(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / ".tmp-step_20-1").mkdir()
    with ckpt._writer_lock(tmp_path, wait=True) as held:
        assert held
        assert load_checkpoint(tmp_path).step == 10
        assert (tmp_path / ".tmp-step_20-1").is_dir()
    assert load_checkpoint(tmp_path).step == 10
    assert not (tmp_path / ".tmp-step_20-1").exists()


def test_two_writers_take_turns(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=lambda s=step: save(tmp_path, s, keep_last=0)) for step in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ckpt.list_steps(tmp_path) == list(range(8))
    for step in range(8):
        assert load_checkpoint(tmp_path, step).state == {"step": step, "version": 0}


KILLER = """
    import os, random, select, signal, sys, time, warnings
    from pathlib import Path
    import torch
    from fastgpt.checkpoint import load_checkpoint, save_checkpoint

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    luck = random.Random(7)

    def tensors_of(step):
        weights = torch.full((200_000,), float(step))
        return {"model": {"w": weights}, "optimizer": {"v": torch.tensor(step)}}

    def save_for_ever(step, pipe):
        while True:
            step += luck.choice([0, 1])  # sometimes the same step again
            os.write(pipe, b"started %d\\n" % step)
            keep_last = luck.choice([1, 2])
            save_checkpoint(root, step, tensors_of(step), {"step": step}, keep_last=keep_last)
            os.write(pipe, b"finished %d\\n" % step)

    save_checkpoint(root, 0, tensors_of(0), {"step": 0}, keep_last=1)
    begin = time.perf_counter()
    save_checkpoint(root, 1, tensors_of(1), {"step": 1}, keep_last=1)
    duration = time.perf_counter() - begin
    step, unfinished = 1, 0
    for _ in range(kills):
        luck.seed(luck.random())
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(step, writable)
        os.close(writable)
        lines = os.fdopen(readable)
        for _ in range(luck.randint(1, 3)):
            line = lines.readline()
        select.select([], [], [], luck.random() * duration)  # dies somewhere inside
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = ([line, *lines])[-1].split()
        lines.close()
        unfinished += last[0] == "started"
        loaded = load_checkpoint(root)
        started = int(last[1])
        allowed = {started} if last[0] == "finished" else {started, started - 1}
        assert loaded.step in allowed, (loaded.step, last)
        assert loaded.state == {"step": loaded.step}
        for stem, named in tensors_of(loaded.step).items():
            for name, tensor in named.items():
                assert torch.equal(loaded.tensors[stem][name], tensor)
        left = [name for name in os.listdir(root) if name.startswith(".")]
        assert not left, left
        step = loaded.step
    print("unfinished", unfinished)
"""


def run_killer(root: Path, kills: int) -> int:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), str(root), str(kills)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    assert run_killer(tmp_path, 50) >= 20  # of 50 kills, at least 40 % inside a save


@pytest.mark.full
def test_kill_9_at_many_random_moments(tmp_path: Path) -> None:
    assert run_killer(tmp_path, 2000) >= 800

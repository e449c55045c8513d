"""The display on a pseudo terminal, in a pipe, on a broken stream; time is simulated."""

from __future__ import annotations

import io
import os
import re
import threading
from pathlib import Path

import pytest

from fastgpt.progress import Progress, ReadThenWork, Smoothed, Task, clock_text, si, task

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A pseudo terminal: ``stream`` is its near end, ``text()`` what arrived at the far one."""

    def __init__(self) -> None:
        self._far, near = os.openpty()
        self.stream = os.fdopen(near, "w", encoding="utf-8")
        self._received: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._far, 65536):
                self._received.append(data)
        except OSError:  # the near end was closed
            pass

    def text(self) -> str:
        self.stream.close()
        self._thread.join(timeout=30)
        os.close(self._far)
        return CONTROL.sub("", b"".join(self._received).decode())


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "25")
    monkeypatch.delenv("RANK", raising=False)
    return Terminal()


def train(progress: Progress, clock: Clock, steps, seconds: float = 1.0) -> None:
    for step in steps:
        clock.now += seconds
        progress.update(step, loss=10 / step, tokens_per_s=12_345.0, mfu=0.314, lr=3e-4)


def test_plain_lines_where_there_is_no_terminal() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(100, stage="sft", enabled=True, stream=out, clock=clock) as progress:
        train(progress, clock, range(1, 51))
        progress.update(50, val_loss=2.5)
        progress.message("[bold]as it is[/bold] \x1b")
        train(progress, clock, range(51, 101))
    lines = out.getvalue().splitlines()
    assert lines[0] == (
        "sft 1/100  loss 10.0000  12.3k tok/s  MFU 31.4%  lr 3.00e-04  00:01 ETA 01:39"
    )
    assert lines[1].startswith("sft 11/100  loss 0.9091")
    assert "[bold]as it is[/bold] \x1b" in lines
    assert lines[-1] == (
        "sft 100/100  loss 0.1000  val 2.5000  12.3k tok/s  MFU 31.4%  lr 3.00e-04  01:40 ETA 00:00"
    )
    assert len(lines) == 1 + 10 + 1  # one each 10 s, the last step, the message
    assert "\x1b" not in "".join(lines[:2])


def test_an_early_end_still_shows_the_last_step() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(100, 40, enabled=True, stream=out, clock=clock) as progress:
        train(progress, clock, range(41, 44))
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["41/100", "43/100"]


def test_time_left_counts_only_steps_of_this_process() -> None:
    clock = Clock()
    with Progress(1000, 900, enabled=False, clock=clock) as progress:
        assert progress.seconds_left() is None
        clock.now += 20
        progress.update(910)  # reported once for ten steps
        assert progress.seconds_left() == pytest.approx(90 * 2)
        assert progress.elapsed() == 20
        train(progress, clock, range(911, 1001), seconds=1.0)
        assert progress.seconds_left() == 0


def test_live_bar_on_a_terminal(terminal: Terminal) -> None:
    clock = Clock()
    with Progress(10_000, stage="pretrain", stream=terminal.stream, clock=clock) as progress:
        train(progress, clock, range(1, 413))
        progress.update(412, val_loss=5.4561)
        progress.message("saved [runs/x] <b>")
    text = terminal.text()
    assert "saved [runs/x] <b>" in text
    bar, values = [line for line in re.split(r"[\r\n]+", text) if line.strip()][-2:]
    assert bar.startswith("pretrain ━")
    assert "412/10000" in bar
    assert "06:52 ETA 2:39:48" in bar
    assert values.strip() == ("loss 0.0243  val 5.4561  12.3k tok/s  MFU 31.4%  lr 3.00e-04")
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_without_cursor_gets_plain_lines(terminal: Terminal, monkeypatch, term) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(5, stream=terminal.stream, clock=(clock := Clock())) as progress:
        train(progress, clock, range(1, 6))
    assert terminal.text().splitlines()[0].startswith("pretrain 1/5  loss 10.0000")


def test_force_color_does_not_draw_bars_into_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with open(tmp_path / "log", "w") as file, Progress(5, stream=file) as progress:
        train(progress, Clock(), range(1, 6))
    assert "\x1b" not in (tmp_path / "log").read_text()


def test_ranks_above_0_are_silent(terminal: Terminal, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for stream in (terminal.stream, out := io.StringIO()):
        with Progress(5, stream=stream) as progress, Task("tokenize", 5, stream=stream) as work:
            train(progress, Clock(), range(1, 6))
            progress.message("x")
            work.advance()
            work.message("x")
    assert out.getvalue() == ""
    assert terminal.text() == ""
    monkeypatch.setenv("RANK", "0")
    with Progress(5, stream=out) as progress:
        progress.message("x")
    assert out.getvalue() == "x\n"


def test_a_broken_output_never_stops_the_work() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    pipe = os.fdopen(writing, "w", buffering=1)
    closed = io.StringIO()
    closed.close()
    for stream in (pipe, closed):
        with Progress(5, enabled=True, stream=stream) as progress:
            train(progress, Clock(), range(1, 6))
            progress.message("x")
        with Task("tokenize", enabled=True, stream=stream) as work:
            work.message("x")
    with pytest.raises(BrokenPipeError):
        pipe.close()


def test_letters_the_stream_cannot_show_are_replaced() -> None:
    raw = io.BytesIO()
    with Progress(1, enabled=True, stream=io.TextIOWrapper(raw, "latin-1")) as progress:
        progress.message("Gödel 東京 \ud800")
    assert raw.getvalue() == "Gödel ?? ?\n".encode("latin-1")


def test_task_in_a_pipe_and_on_a_terminal(terminal: Terminal, capsys) -> None:
    clock, out = Clock(), io.StringIO()
    with Task("tokenize", 10, enabled=True, stream=out, clock=clock) as work:
        clock.now += 3
        work.advance(4)
        work.message("note")
    assert out.getvalue() == "note\ntokenize: 3.0 s\n"
    with Task("tokenize", 10, stream=terminal.stream) as work:
        work.advance(4)
        work.update(10)
    assert "100%" in terminal.text()
    with pytest.raises(RuntimeError), task("fails"):
        raise RuntimeError
    assert capsys.readouterr().out == ""
    with task("works", 3) as work:
        work.advance(3)
    assert re.fullmatch(r"works: \d+\.\d s\n", capsys.readouterr().out)


def test_smoothed_weighs_by_time() -> None:
    average = Smoothed(seconds=10)
    assert average.value is None
    assert average.add(100, 0) == 100  # the first lasted no time, but is all that is known
    assert average.add(50, 10) == pytest.approx(50, abs=1e-6)
    assert average.add(80, 10) == pytest.approx((50 * 0.25 + 80 * 0.5) / 0.75)
    many, one = Smoothed(10), Smoothed(10)
    for _ in range(5):
        split = many.add(7, 2)
    assert split == pytest.approx(one.add(7, 10))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999.4, "999"), (999.6, "1k"), (12_345, "12.3k"), (4.56e6, "4.56M"), (1e12, "1T")],
)
def test_si(value: float, text: str) -> None:
    assert si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00"),
        (59.6, "01:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (1e5, "1d 03:46"),
        (float("nan"), "--:--"),
        (float("inf"), "--:--"),
        (-1, "--:--"),
    ],
)
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def test_reading_and_the_work_behind_it_have_a_bar_each(capsys, monkeypatch) -> None:
    shown: list[tuple[str, float]] = []
    monkeypatch.setattr(Task, "update", lambda self, done: shown.append((self._description, done)))
    with ReadThenWork("read", 6, "merge") as bars:
        seen: list[int] = []
        for item in bars.reading([1, 2, 3], lambda: sum(seen)):
            assert capsys.readouterr().out == ""
            seen.append(item)
        assert re.fullmatch(r"read: \d\.\d s\n", capsys.readouterr().out)
        bars.update(1, 4)
        bars.update(4, 4)
        bars.update(0, 0)
        assert capsys.readouterr().out == ""
    assert re.fullmatch(r"merge: \d\.\d s\n", capsys.readouterr().out)
    assert shown == [
        *(("read", 1), ("read", 3), ("read", 6)),
        *(("merge", 0.25), ("merge", 1.0), ("merge", 0.0)),
    ]
    with pytest.raises(ZeroDivisionError), ReadThenWork("read", 6, "merge") as bars:
        list(bars.reading([1], lambda: 1 // 0))
    assert capsys.readouterr().out == ""

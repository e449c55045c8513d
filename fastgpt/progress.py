"""What a person sees while something runs: a live bar on a terminal, plain lines elsewhere.

Ranks above 0 are silent. Whatever happens to the output (a closed pipe, an encoding that lacks a
letter), the work goes on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

Clock = Callable[[], float]
T = TypeVar("T")

_SMOOTHING_SECONDS = 10.0
_REFRESH_PER_SECOND = 4
_VALUES = {
    "loss": lambda v: f"loss {v:.4f}",
    "val_loss": lambda v: f"val {v:.4f}",
    "tokens_per_s": lambda v: f"{si(v)} tok/s",
    "mfu": lambda v: f"MFU {100 * v:.1f}%",
    "lr": lambda v: f"lr {v:.2e}",
}


class Progress:
    """Context manager that shows how far a stage has come.

    ::

        with Progress(total_steps=1000, stage="pretrain") as progress:
            progress.update(step, loss=loss, tokens_per_s=rate, mfu=0.41, lr=lr)
            progress.message("saved runs/x/checkpoints/step_100")

    On a terminal: one live bar (step, elapsed, time left) above one line of values. Elsewhere: a
    plain line at the first and the last step, and at most one every ``line_seconds`` in between.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stage: str = "pretrain",
        *,
        enabled: bool | None = None,
        stream: TextIO | None = None,
        line_seconds: float = 10.0,
        clock: Clock = time.monotonic,
    ) -> None:
        """Prepare a display; nothing is shown before ``with``.

        Args:
            total_steps: the step at which the stage ends.
            start_step: steps done before (a resume).
            stage: name shown in front.
            enabled: ``None`` means on rank 0 only.
            stream: ``sys.stdout`` when ``None``.
            line_seconds: least time between two plain lines.
            clock: seconds, monotonic.
        """
        self._total = total_steps
        self._stage = stage
        self._out = _Output(_is_rank_0() if enabled is None else enabled, stream)
        self._line_seconds = line_seconds
        self._clock = clock
        self._values: dict[str, float] = {}
        self._pace = Smoothed()
        self._rates = {"tokens_per_s": Smoothed(), "mfu": Smoothed()}
        self._start = self._last_time = clock()
        self._step = self._last_line_step = start_step
        self._next_line = self._start
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._start = self._last_time = self._clock()
        if self._out.is_terminal:
            self._bar = _step_bar(self._out.stream, self)
            self._bar.add_task(self._stage, total=self._total, completed=self._step)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.stop()
            self._bar = None
        elif self._step != self._last_line_step:
            self._line()

    def update(self, step: int, **values: float | None) -> None:
        """Report that ``step`` steps are done.

        Args:
            step: absolute, as in ``total_steps``.
            values: any of ``loss`` and ``val_loss`` (nats per token), ``tokens_per_s``,
                ``mfu`` (0 to 1; both smoothed here), ``lr``. One left out keeps its last value.
        """
        now, rates = self._clock(), self._rates
        seconds = now - self._last_time
        if step > self._step:
            self._pace.add(seconds / (step - self._step), seconds)
        for name, value in values.items():
            if value is None:
                continue
            self._values[name] = rate.add(value, seconds) if (rate := rates.get(name)) else value
        self._step, self._last_time = step, now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)
        elif now >= self._next_line or step >= self._total:
            self._next_line = now + self._line_seconds
            self._line()

    def message(self, text: str) -> None:
        """Print ``text`` as it is, above the bar if there is one."""
        self._out.print(text, self._bar)

    def elapsed(self) -> float:
        """Seconds since ``with``."""
        return self._clock() - self._start

    def seconds_left(self) -> float | None:
        """Expected time to the last step, ``None`` before there is a pace."""
        if self._pace.value is None:
            return None
        return max(0, self._total - self._step) * self._pace.value

    def values_text(self) -> str:
        """The values last reported, in a fixed order."""
        known = [show(self._values[name]) for name, show in _VALUES.items() if name in self._values]
        return "  ".join(known)

    def time_text(self) -> str:
        """Time elapsed and expected."""
        left = self.seconds_left()
        return f"{clock_text(self.elapsed())} ETA {'--:--' if left is None else clock_text(left)}"

    def _line(self) -> None:
        self._last_line_step = self._step
        parts = [f"{self._stage} {self._step}/{self._total}", self.values_text(), self.time_text()]
        self._out.print("  ".join(part for part in parts if part), None)


class Task:
    """Context manager for work with a known amount of units: tokenizing bytes, counting pairs.

    A live bar on a terminal; elsewhere one line when it ends.
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        *,
        enabled: bool | None = None,
        stream: TextIO | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Prepare a display.

        Args:
            description: what is being done.
            total: units in all; ``None`` when unknown.
            enabled: ``None`` means on rank 0 only.
            stream: ``sys.stdout`` when ``None``.
            clock: seconds, monotonic.
        """
        self._description = description
        self._total = total
        self._out = _Output(_is_rank_0() if enabled is None else enabled, stream)
        self._clock = clock
        self._start = clock()
        self._done = 0.0
        self._bar: Bar | None = None

    def __enter__(self) -> Task:
        self._start = self._clock()
        if self._out.is_terminal:
            self._bar = _task_bar(self._out.stream)
            self._bar.add_task(self._description, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.stop()
            self._bar = None
        elif kind is None:
            seconds = self._clock() - self._start
            self._out.print(f"{self._description}: {seconds:.1f} s", None)

    def advance(self, units: float = 1) -> None:
        """Report ``units`` more."""
        self.update(self._done + units)

    def update(self, done: float) -> None:
        """Report the units done since the start."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def message(self, text: str) -> None:
        """Print ``text`` as it is, above the bar if there is one."""
        self._out.print(text, self._bar)


def task(description: str, total: float | None = None) -> Task:
    """A ``Task`` on standard output, silent on ranks above 0."""
    return Task(description, total)


class ReadThenWork:
    """Context manager for work on a stream that begins when all of it is read: two bars in turn."""

    def __init__(self, reading: str, total: float | None, work: str) -> None:
        """Descriptions of both, and the units of reading in all."""
        self._reading = task(reading, total)
        self._work = task(work, 1)
        self._stack = ExitStack()

    def __enter__(self) -> ReadThenWork:
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def reading(self, items: Iterable[T], done: Callable[[], float]) -> Iterator[T]:
        """``items``, of which ``done()`` units are read; the second bar begins behind the last."""
        with self._reading as bar:
            for item in items:
                yield item
                bar.update(done())
        self._stack.enter_context(self._work)

    def update(self, done: int, total: int) -> None:
        """Report the work done, of the work in all."""
        self._work.update(done / max(total, 1))


class Smoothed:
    """Exponential average over time: a value counts for as long as it lasted."""

    def __init__(self, seconds: float = _SMOOTHING_SECONDS) -> None:
        self._constant = seconds
        self._weight = 0.0
        self._sum = 0.0

    @property
    def value(self) -> float | None:
        """The average, ``None`` before the first value."""
        return self._sum / self._weight if self._weight > 0 else None

    def add(self, value: float, seconds: float) -> float:
        """Take in ``value``, which held for the last ``seconds``; returns the average."""
        keep = 0.5 ** (seconds / self._constant)
        weight = max(1 - keep, 1e-9)  # the first of all may have lasted no time
        self._sum = self._sum * keep + value * weight
        self._weight = self._weight * keep + weight
        return self._sum / self._weight


class _Output:
    """A stream whose failures are not ours."""

    def __init__(self, enabled: bool, stream: TextIO | None) -> None:
        self.stream: TextIO = stream or sys.stdout
        self._enabled = enabled and self.stream is not None and not self.stream.closed
        self.is_terminal = self._enabled and _is_terminal(self.stream)

    def print(self, text: str, bar: Bar | None) -> None:
        if not self._enabled:
            return
        try:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            text = text.encode(encoding, errors="replace").decode(encoding)
            if bar is not None:
                bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                self.stream.write(text + "\n")
                self.stream.flush()
        except (OSError, ValueError):  # a closed pipe, a closed file
            self._enabled = False


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_terminal(stream: TextIO) -> bool:
    # Not rich's answer: FORCE_COLOR would make it draw bars into a log file.
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown", "")


def _step_bar(stream: TextIO, progress: Progress) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class TwoLines(Bar):
        def get_renderables(self):
            yield self.make_tasks_table(self.tasks)
            # Values have a line of their own: beside the bar they would not fit 80 columns.
            yield Text(
                "  " + progress.values_text(), no_wrap=True, overflow="ellipsis", style="dim"
            )

    class Times(TextColumn):
        def render(self, task: Any) -> Text:
            return Text(progress.time_text(), style="cyan", no_wrap=True)

    return TwoLines(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        Times(""),
        console=Console(file=stream),
        expand=True,
        refresh_per_second=_REFRESH_PER_SECOND,
    )


def _task_bar(stream: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(file=stream),
        expand=True,
        refresh_per_second=_REFRESH_PER_SECOND,
    )


def si(value: float) -> str:
    """A count in three digits: 950, 12.3k, 4.56M."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def clock_text(seconds: float) -> str:
    """Seconds as 01:23, 2:01:23 or 3d 04:05."""
    if not 0 <= seconds < 1e9:
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"

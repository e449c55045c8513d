"""The run directory, and the logs in it that read the same after a crash and a resume.

::

    runs/<name>/
      config.toml      every setting of the run
      tokenizer.json
      metrics.jsonl    step, loss, lr, grad_norm, ...: a function of configuration and data alone
      timings.jsonl    step, tokens_per_s, mfu, ...: what a clock had a part in
      report.json      samples and environment, for report.html
      checkpoints/     see fastgpt.checkpoint
      report.html

Two logs, because a resumed run must give the same ``metrics.jsonl`` byte for byte.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError

Warn = Callable[[str], None]


@dataclass(frozen=True)
class RunDir:
    """Names of the files of a run."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @classmethod
    def create(cls, path: str | Path) -> RunDir:
        """Make the directory of a new run; an empty one may exist already.

        Raises:
            UsageError: it holds something, is a file, or cannot be made.
        """
        run = cls(Path(path))
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            occupied = next(run.path.iterdir(), None) is not None
        except OSError as error:
            raise UsageError(
                f"{path}: cannot create the run directory: {error.strerror}"
            ) from error
        if occupied:
            raise UsageError(
                f"{path}: this directory is not empty; go on with that run by --resume {path}, "
                "or choose another --out"
            )
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """The directory of an existing run.

        Raises:
            UsageError: there is no run.
        """
        run = cls(Path(path))
        if not run.config_path.is_file():
            missing = "no such directory" if not run.path.is_dir() else "it has no config.toml"
            raise UsageError(f"{path}: not a run directory: {missing}")
        return run

    @contextmanager
    def emptied_on_error(self) -> Iterator[None]:
        """Empty the directory when what is done within fails: the command can be given again."""
        try:
            yield
        except BaseException:
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
            raise

    @property
    def config_path(self) -> Path:
        """All settings, as TOML."""
        return self.path / "config.toml"

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer the run was trained with."""
        return self.path / "tokenizer.json"

    @property
    def metrics_path(self) -> Path:
        """Deterministic values, a line for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def timings_path(self) -> Path:
        """Values that depend on the clock, a line for each logged step."""
        return self.path / "timings.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Root of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def report_data_path(self) -> Path:
        """What the report shows and no other file of the run holds."""
        return self.path / "report.json"

    @property
    def report_path(self) -> Path:
        """The report for people."""
        return self.path / "report.html"


def make_directory(path: Path) -> None:
    """Make the directory of ``--out``; it may exist. Raises UsageError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: not a directory: {error.strerror}") from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file so that a crash leaves the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class MetricsLog:
    """Appends a JSON object for each step; whatever happens to the file, training goes on.

    Every line is handed to the operating system before ``log`` returns. A line that fails half way
    (disk full) is cut off again before the next one, so the file never holds a broken line in its
    middle. Non-finite floats become the strings "NaN", "Infinity" and "-Infinity".
    """

    def __init__(self, path: Path, *, after_step: int = -1, warn: Warn = warnings.warn) -> None:
        """Open ``path`` for appending.

        Args:
            path: created if missing.
            after_step: the step of the checkpoint resumed from: later lines are removed, so that
                each step stands exactly once. -1 for a new run.
            warn: called once, when the file fails first.
        """
        self._path = path
        self._warn = warn
        self._warned = False
        self._last_step = after_step
        self._descriptor = -1
        self._size = 0  # up to here the file holds whole lines
        try:
            self._size = _rewind(path, after_step)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._fail(error)

    def log(self, step: int, **values: Any) -> None:
        """Append the line of ``step``, which must be above that of the last line.

        Values are numbers, strings or ``None``. Log a step before its checkpoint is saved: a resume
        keeps the line of the step it starts from.

        Raises:
            ValueError: a step that goes back, which is a bug of the caller.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} is already logged; the last one is {self._last_step}")
        self._last_step = step
        record = {"step": step, **{key: _finite(values[key]) for key in sorted(values)}}
        if self._descriptor < 0:
            return
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            os.ftruncate(self._descriptor, self._size)
            os.lseek(self._descriptor, self._size, os.SEEK_SET)
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            self._size += len(line)
        except OSError as error:
            self._fail(error)

    def sync(self) -> None:
        """Make the lines durable; to be called before a checkpoint that counts on them."""
        if self._descriptor >= 0:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """Close the file; later lines are dropped."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fail(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"{self._path}: cannot write: {error.strerror}; training goes on without it")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a log, with non-finite values as floats again; broken lines are left out.

    A missing file has no records.
    """
    if not path.is_file():
        return []
    return [record for _, record in _lines(path.read_bytes())]


def _rewind(path: Path, after_step: int) -> int:
    """Remove what does not belong before the next line; return the size of what stays."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    kept, last = [], -math.inf
    for line, record in _lines(content):
        if last < record["step"] <= after_step:
            kept.append(line + b"\n")
            last = record["step"]
    good = b"".join(kept)
    if good == content[: len(good)]:
        os.truncate(path, len(good))
    else:
        write_atomic(path, good)
    return len(good)


def _lines(content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    pairs = []
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if isinstance(step, int):
            pairs.append(
                (
                    line,
                    {
                        key: _NAMED.get(value, value) if isinstance(value, str) else value
                        for key, value in record.items()
                    },
                )
            )
    return pairs


_NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _finite(value: Any) -> Any:
    if value is not None and not isinstance(value, int | float | str):
        value = float(value)  # numpy scalars
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value

"""Chats and prompts from JSONL files, checked line by line before anything is trained on them.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "response": "..."}          one question and its answer

Prompts to answer: ``{"prompt": "..."}``, or ``messages`` that end with the user; with ``reference``
or ``answer`` beside it where one is known. Other keys are ignored. ``.jsonl`` files may carry
``.gz`` or ``.xz`` behind; a directory stands for those in it, sorted.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from fastgpt.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


class Message(TypedDict):
    """One turn: ``role`` is user, assistant or system."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object and where it stands; ``line`` counts from 1."""

    values: dict[str, Any]
    source: Path
    line: int

    def bad(self, problem: str) -> DataError:
        """The error that says what is wrong with this record, and where it is."""
        return DataError(f"{self.source}:{self.line}: {problem}")

    def text(self, key: str) -> str:
        """The text under ``key``; raises DataError unless it is one that says something."""
        if key not in self.values:
            keys = ", ".join(map(repr, list(self.values)[:8])) or "no keys"
            raise self.bad(f"no key {key!r} (the line has {keys}); add it")
        return self.check_text(self.values[key], repr(key))

    def check_text(self, value: Any, what: str) -> str:
        """``value`` if it is a text with more than white space, else DataError about ``what``."""
        if not isinstance(value, str):
            raise self.bad(f"{what} is {type(value).__name__}, not a string; mend the line")
        if not value or value.isspace():
            raise self.bad(f"{what} is empty; fill it or remove the line")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            where = f"{code}, half of a surrogate pair, at character {error.start} of {what}"
            raise self.bad(f"{where}; mend the line") from None
        return value


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation with something for the assistant to say."""

    messages: list[Message]
    source: Path
    line: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation to answer; ``reference`` is the record's reference or answer, None without."""

    messages: list[Message]
    reference: Any
    source: Path
    line: int


def embedded(name: str) -> Path:
    """Path of the data set ``name`` that comes with the package: sft, rankings or prompts.

    Raises DataError if the installation lacks it.
    """
    path = Path(__file__).parents[1] / "assets" / f"{name}.jsonl.xz"
    if not path.is_file():
        raise DataError(f"{path}: the packaged data is missing; reinstall fastgpt-trainer")
    return path


def read_chats(paths: Sequence[Path | str]) -> list[Chat]:
    """All chats of ``paths``. Raises DataError with file and line for one that is not sound."""
    return [_chat(record) for record in read_records(paths)]


def read_prompts(paths: Sequence[Path | str]) -> list[Prompt]:
    """All prompts of ``paths``. Raises DataError with file and line for one that is not sound."""
    return [_prompt(record) for record in read_records(paths)]


def read_records(paths: Sequence[Path | str]) -> Iterator[Record]:
    """The JSON objects of ``paths``, blank lines left out.

    Raises DataError: a file is missing, damaged or without records, or a line is no JSON object.
    """
    for file in [file for path in paths for file in _files(Path(path))]:
        opener = _OPEN.get(file.suffix.lower(), open)
        try:
            with opener(file, "rb") as stream:
                yield from _read(file, stream)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{file}: cannot read: {reason}; check or replace the file") from error


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.lower().endswith(SUFFIXES))
        if not found:
            raise DataError(f"{path}: no {', '.join(SUFFIXES)} files in it; name files")
        return found
    if not path.exists():
        raise DataError(f"{path}: no such file or directory; check the path")
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; convert it to {', '.join(SUFFIXES)}")
    return [path]


def _read(file: Path, stream: Any) -> Iterator[Record]:
    empty = True
    for line, raw in enumerate(stream, 1):
        if not raw.strip():
            continue
        empty = False
        try:
            values = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            problem = f"byte {error.start} of the line is not valid UTF-8; convert the file"
            raise DataError(f"{file}:{line}: {problem}") from None
        except json.JSONDecodeError as error:
            problem = f"invalid JSON ({error.msg} at column {error.colno}); mend the line"
            raise DataError(f"{file}:{line}: {problem}") from None
        except (RecursionError, ValueError):
            problem = "invalid JSON (nested too deeply, or too long a number); mend the line"
            raise DataError(f"{file}:{line}: {problem}") from None
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise DataError(f"{file}:{line}: a JSON object is expected, not {kind}; mend the line")
        yield Record(values, file, line)
    if empty:
        raise DataError(f"{file}: the file has no records; remove it from the data")


def _chat(record: Record) -> Chat:
    values = record.values
    if "messages" in values:
        messages = read_messages(record)
    elif "prompt" in values or "response" in values:
        messages = [
            Message(role="user", content=record.text("prompt")),
            Message(role="assistant", content=record.text("response")),
        ]
    else:
        keys = ", ".join(map(repr, list(values)[:8])) or "no keys"
        raise record.bad(f"neither 'messages' nor 'prompt' and 'response' (it has {keys}); add it")
    if all(message["role"] != "assistant" for message in messages):
        raise record.bad("no message of the assistant, nothing to learn; add one or remove it")
    return Chat(messages, record.source, record.line)


def _prompt(record: Record) -> Prompt:
    if "messages" in record.values:
        messages = read_messages(record)
        if messages[-1]["role"] != "user":
            role = messages[-1]["role"]
            raise record.bad(f"a prompt ends with the user, not with {role!r}; remove that message")
    else:
        messages = [Message(role="user", content=record.text("prompt"))]
    reference = record.values.get("reference", record.values.get("answer"))
    return Prompt(messages, reference, record.source, record.line)


def read_messages(record: Record, key: str = "messages") -> list[Message]:
    """The conversation under ``key`` of ``record``; raises DataError unless it is a sound one."""
    found = record.values[key]
    if not isinstance(found, list) or not found:
        raise record.bad(f"{key!r} is not a list with messages; mend the line")
    messages = []
    for i, message in enumerate(found):
        where = f"{key}[{i}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise record.bad(f"{where} is not an object with 'role' and 'content'; mend the line")
        role = message["role"]
        if role not in ("user", "assistant", "system"):
            raise record.bad(f"{where} has role {role!r}; use user, assistant or system")
        if role == "system" and i:
            raise record.bad(f"{where} has role 'system', which can only come first; move it")
        content = record.check_text(message["content"], f"{where} 'content'")
        messages.append(Message(role=role, content=content))
    return messages

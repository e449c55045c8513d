"""Rankings of answers to one prompt from JSONL files, checked line by line.

    {"prompt": "...", "responses": ["best", ..., "worst"]}
    {"prompt": "...", "responses": [...], "ranks": [1, 2, 2]}       1 is the best, ties are allowed
    {"prompt": "...", "responses": [...], "scores": [0.3, 2.0]}     more is better, likewise
    {"prompt": "...", "chosen": "...", "rejected": "..."}           a pair, with "margin" or without
    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "..."}  two transcripts (HH)

The prompt may also be a list of messages that ends with the user, or stand under ``messages``.
``chosen`` and ``rejected`` may be lists of messages as well, which say the same up to their last
one. Files as in `fastgpt.data.examples`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.data.examples import Message, Record, read_messages, read_records
from fastgpt.errors import DataError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Ranking:
    """At least two answers to one prompt, the best first.

    ``scores`` fall, equal ones are ties; without scores in the file they count down to 0, and
    ``scored`` is False: their differences say which is better, not by how much.
    """

    prompt: list[Message]
    responses: list[str]
    scores: list[float]
    scored: bool
    source: Path
    line: int

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) as indices of responses, without ties.

        The same text twice is a tie whatever its scores are: there is nothing to tell apart.
        """
        return [
            (i, j)
            for i, j in itertools.combinations(range(len(self.responses)), 2)
            if self.scores[i] > self.scores[j] and self.responses[i] != self.responses[j]
        ]


def read_rankings(paths: Sequence[Path | str]) -> list[Ranking]:
    """All rankings of ``paths``, those that are nothing but ties included.

    Raises DataError with file and line for one that is not sound.
    """
    return [_ranking(record) for record in read_records(paths)]


def _ranking(record: Record) -> Ranking:
    values = record.values
    if "responses" in values:
        prompt, responses = _prompt(record), _responses(record)
        scores, scored = _scores(record, len(responses))
    elif "chosen" in values and "rejected" in values:
        prompt, responses = _pair(record)
        scores, scored = _margin(record)
    else:
        keys = ", ".join(map(repr, list(values)[:8])) or "no keys"
        raise record.bad(
            f"neither 'responses' nor 'chosen' and 'rejected' (the line has {keys}); add them"
        )
    order = sorted(range(len(responses)), key=lambda i: -scores[i])  # stable
    return Ranking(
        prompt,
        [responses[i] for i in order],
        [scores[i] for i in order],
        scored,
        record.source,
        record.line,
    )


def _prompt(record: Record) -> list[Message]:
    key = "messages" if "messages" in record.values else "prompt"
    if key == "prompt" and not isinstance(record.values.get(key), list):
        return [Message(role="user", content=record.text(key))]
    messages = read_messages(record, key)
    if messages[-1]["role"] != "user":
        role = messages[-1]["role"]
        raise record.bad(f"a prompt ends with the user, not with {role!r}; remove that message")
    return messages


def _responses(record: Record) -> list[str]:
    found = record.values["responses"]
    if not isinstance(found, list):
        raise record.bad(f"'responses' is {type(found).__name__}, not a list; mend the line")
    if len(found) < 2:
        raise record.bad(f"{len(found)} response(s), nothing to rank; add one or remove the line")
    return [_answer(record, text, f"responses[{i}]") for i, text in enumerate(found)]


def _answer(record: Record, value: Any, what: str) -> str:
    """A response; it may be empty, for a model may well say nothing."""
    return value if value == "" else record.check_text(value, what)


def _scores(record: Record, count: int) -> tuple[list[float], bool]:
    """A score of each response, more is better, and whether the file has it."""
    keys = [key for key in ("scores", "ranks") if record.values.get(key) is not None]
    if not keys:
        return [float(count - 1 - i) for i in range(count)], False
    if len(keys) == 2:
        raise record.bad("both 'scores' and 'ranks'; keep one of them")
    key = keys[0]
    found = record.values[key]
    if not isinstance(found, list) or len(found) != count:
        what = f"{len(found)} of them" if isinstance(found, list) else type(found).__name__
        raise record.bad(f"{key!r} must be a list of {count}, one for each response, not {what}")
    for i, value in enumerate(found):
        if not _is_number(value):
            raise record.bad(f"{key}[{i}] is {value!r}, not a finite number; mend the line")
    sign = -1.0 if key == "ranks" else 1.0
    return [sign * value for value in found], key == "scores"


def _margin(record: Record) -> tuple[list[float], bool]:
    """Scores of a pair that differ by its margin, and whether the file has one."""
    value = record.values.get("margin")
    if value is None:
        return [1.0, 0.0], False
    if not _is_number(value) or value < 0:
        raise record.bad(
            f"'margin' is {value!r}; it says by how much 'chosen' is better, a number of at least "
            "0; mend the line"
        )
    return [float(value), 0.0], True


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _pair(record: Record) -> tuple[list[Message], list[str]]:
    """Prompt, and the chosen and the rejected response."""
    keys = ("chosen", "rejected")
    values = [record.values[key] for key in keys]
    given = "prompt" in record.values or "messages" in record.values
    if all(isinstance(value, str) for value in values) and given:
        texts = [_answer(record, value, repr(key)) for key, value in zip(keys, values, strict=True)]
        return _prompt(record), texts
    if all(isinstance(value, list) for value in values):
        talks = [read_messages(record, key) for key in keys]
    elif all(isinstance(value, str) for value in values):
        talks = [_transcript(record, key) for key in keys]
    else:
        kinds = " and ".join(type(value).__name__ for value in values)
        raise record.bad(f"'chosen' and 'rejected' are {kinds}; both are texts or both messages")
    prompt = [*(_prompt(record) if given and len(talks[0]) == 1 else []), *talks[0][:-1]]
    for key, talk in zip(keys, talks, strict=True):
        if talk[-1]["role"] != "assistant":
            raise record.bad(f"{key!r} does not end with the assistant; mend the line")
        if talk[:-1] != talks[0][:-1]:
            raise record.bad("'chosen' and 'rejected' differ before their last answer; mend them")
    if not prompt or prompt[-1]["role"] != "user":
        raise record.bad("nothing of the user stands in front of the answers; add a 'prompt'")
    return prompt, [talk[-1]["content"] for talk in talks]


def _transcript(record: Record, key: str) -> list[Message]:
    """Messages of a text like "\\n\\nHuman: Hello\\n\\nAssistant: Hello!"."""
    text = record.values[key]
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise record.bad(
            f"no 'prompt', and {key!r} is no transcript that begins with "
            f"{chr(10) * 2 + 'Human:'!r}; add a 'prompt'"
        )
    turns = list(zip(parts[1::2], parts[2::2], strict=True))
    messages = []
    for i, (speaker, said) in enumerate(turns):
        what = f"turn {i + 1} of {key!r}"
        last = i + 1 == len(turns)
        content = _answer(record, said.strip(), what) if last else _said(record, said, what)
        messages.append(Message(role=_ROLES[speaker], content=content))
    return messages


def _said(record: Record, text: str, what: str) -> str:
    return record.check_text(text.strip(), what)


def untied(rankings: Sequence[Ranking]) -> list[Ranking]:
    """The rankings that have a pair to learn from. Raises DataError when none has."""
    found = [ranking for ranking in rankings if ranking.pairs()]
    if not found:
        where = rankings[0].source if rankings else "the data"
        raise DataError(f"{where}: no ranking has a response better than another; give more")
    return found

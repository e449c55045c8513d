"""Benchmarks as JSONL files: multiple choice, last word, exact match; zero- or few-shot.

The published files are read as they are::

    {"ctx", "endings": [...], "label"}                            HellaSwag
    {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}, or choices of lists    ARC
    {"question", "choices": [...], "answer": 2}                   MMLU
    {"text": "... last"}                                          LAMBADA
    {"question", "answer": "... #### 42"}                         GSM8K
    {"prompt", "choices": [...], "answer": 0}, {"prompt", "answer": "..."}       your own

A choice is scored by the sum of its tokens' log-probabilities: ``acc`` takes the most probable,
``acc_norm`` the most probable for its bytes, which does not favour short ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.chat import render, render_prompt
from fastgpt.data.batches import IGNORE_INDEX
from fastgpt.data.examples import Record, read_records
from fastgpt.errors import DataError
from fastgpt.generate import SamplingConfig, continuation, generate
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

Pair = tuple[list[int], list[int]]
"""Ids of a context, and of what follows it."""

BATCH_TOKENS, LOGIT_ROWS, PAD_TO = 8192, 1024, 32
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Example:
    """A question. With ``choices``, ``answer`` counts among them; without, it is a text.

    ``question`` marks an instruction, as opposed to a text to go on with.
    """

    context: str
    answer: int | str
    choices: tuple[str, ...] = ()
    question: bool = True
    last_word: bool = False
    place: str = ""
    """File and line, for messages."""

    @property
    def answer_text(self) -> str:
        """The right answer, written out."""
        return self.choices[self.answer] if isinstance(self.answer, int) else self.answer


@dataclass(frozen=True)
class Task:
    """Examples of one kind; the first ``few_shot`` are shown in front of each of the others."""

    name: str
    examples: list[Example]


def read_task(path: Path) -> Task:
    """Read a benchmark. Raises DataError with file and line, also when kinds are mixed."""
    examples = []
    for record in read_records([path]):
        example = replace(_example(record), place=f"{record.source}:{record.line}")
        examples.append(example)
        if (bool(example.choices), example.last_word) != (
            bool(examples[0].choices),
            examples[0].last_word,
        ):
            raise record.bad("another kind of question than the first line; split the file")
    return Task(_name(path), examples)


def _name(path: Path) -> str:
    """The file's name without the endings that say how it is stored."""
    name = path.name
    while name.lower().endswith((".jsonl", ".json", ".gz", ".xz")):
        name = name.rpartition(".")[0]
    return name


def _example(record: Record) -> Example:
    values = record.values
    if "endings" in values:
        choices = _texts(record, values["endings"])
        answer = _index(record, values.get("label"), len(choices))
        return Example(record.text("ctx"), answer, choices, question=False)
    if set(values) & {"question", "prompt", "choices", "answer", "answerKey"} == set():
        context, _, word = record.text("text").rstrip().rpartition(" ")
        if not context.strip():
            raise record.bad("'text' has one word, nothing to predict it from; remove the line")
        return Example(context, word, question=False, last_word=True)
    key = "question" if "question" in values else "prompt"
    stem = values.get(key)
    nested = stem if isinstance(stem, dict) else {}
    context = record.check_text(nested.get("stem", stem), repr(key))
    choices = nested.get("choices", values.get("choices"))
    if choices is None:
        return Example(context, record.text("answer"))
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    elif isinstance(choices, list) and choices and isinstance(choices[0], dict):
        choices, labels = ([c.get(k) for c in choices] for k in ("text", "label"))
    else:
        labels = None
    texts = _texts(record, choices)
    given = values.get("answerKey", values.get("answer"))
    if labels is not None:
        known = [str(label) for label in labels]
        if str(given) not in known:
            raise record.bad(f"the right answer is {given!r}, none of the labels {known}")
        given = known.index(str(given))
    return Example(context, _index(record, given, len(texts)), texts)


def _texts(record: Record, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise record.bad("the choices are not a list of at least two texts; mend the line")
    return tuple(record.check_text(text, f"choice {i + 1}") for i, text in enumerate(value))


def _index(record: Record, value: Any, choices: int) -> int:
    try:
        index = -1 if isinstance(value, float) else int(value)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < choices:
        raise record.bad(f"the right answer is {value!r}, none of the {choices} choices")
    return index


def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    *,
    few_shot: int = 0,
    limit: int = 0,
    chat: bool = False,
    max_new_tokens: int = 256,
) -> dict[str, float]:
    """Score ``model`` on ``task``.

    Args:
        model: on its device, in eval mode.
        tokenizer: of the model.
        task: see `read_task`.
        few_shot: demonstrations in front of each question.
        limit: questions to ask at most; 0: all.
        chat: ask as the user of a conversation; demonstrations are earlier turns.
        max_new_tokens: length of a written answer (exact match).

    Returns:
        ``n`` and, for choices, ``acc`` and ``acc_norm``; for last words, ``acc`` (greedy) and
        ``ppl`` (a word); for exact match, ``acc``. ``se`` is the standard error of ``acc``.

    Raises:
        DataError: no example is left to ask behind the demonstrations, or an answer has no token
            or too many to be scored.
    """
    shown, asked = task.examples[:few_shot], task.examples[few_shot:]
    asked = asked[:limit] if limit else asked
    if not asked:
        raise DataError(
            f"{task.name}: {len(task.examples)} examples, {few_shot} of them shown and "
            "none left to ask; lower --few-shot"
        )
    if asked[0].choices:
        values = _choices(model, tokenizer, shown, asked, chat)
    elif asked[0].last_word:
        values = _last_words(model, tokenizer, shown, asked)
    else:
        values = _written(model, tokenizer, shown, asked, chat, max_new_tokens)
    acc = values["acc"]
    return {"n": len(asked), **values, "se": math.sqrt(acc * (1 - acc) / len(asked))}


def _choices(
    model: GPT, tokenizer: Tokenizer, shown: list[Example], asked: list[Example], chat: bool
) -> dict[str, float]:
    pairs = [
        _fitting(model, example, _ask(tokenizer, shown, example, choice, chat))
        for example in asked
        for choice in example.choices
    ]
    scores = iter(score(model, pairs))
    right = right_norm = 0
    for example in asked:
        sums = np.array([next(scores)[0] for _ in example.choices])
        lengths = np.array([len(choice.encode()) for choice in example.choices])
        right += int(sums.argmax() == example.answer)
        right_norm += int((sums / lengths).argmax() == example.answer)
    return {"acc": right / len(asked), "acc_norm": right_norm / len(asked)}


def _last_words(
    model: GPT, tokenizer: Tokenizer, shown: list[Example], asked: list[Example]
) -> dict[str, float]:
    pairs = [
        _fitting(model, example, _ask(tokenizer, shown, example, example.answer_text, False))
        for example in asked
    ]
    scores = list(score(model, pairs))
    return {
        "acc": sum(greedy for _, greedy in scores) / len(scores),
        "ppl": math.exp(-sum(total for total, _ in scores) / len(scores)),
    }


def _written(
    model: GPT,
    tokenizer: Tokenizer,
    shown: list[Example],
    asked: list[Example],
    chat: bool,
    max_new_tokens: int,
) -> dict[str, float]:
    stop = [tokenizer.eot_id]
    if chat:
        stop.append(tokenizer.special_tokens["<|end|>"])
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0)
    room = model.config.context - min(max_new_tokens, model.config.context // 2)
    right, batch = 0, 32
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        prompts = [_ask(tokenizer, shown, example, "", chat)[0][-room:] for example in part]
        new = generate(model, prompts, sampling, stop_ids=stop)
        for example, prompt, ids in zip(part, prompts, new, strict=True):
            text = continuation(tokenizer, prompt, ids, chat=chat)
            # A base model goes on with the next question of its own making.
            text = text if chat else text.split("\n\n")[0]
            right += final_answer(text) == final_answer(example.answer_text)
    return {"acc": right / len(asked)}


def final_answer(text: str) -> str:
    """What counts of an answer: behind ``####``, else its last number, else the words in it."""
    text = text.rpartition("####")[2].strip()
    numbers = _NUMBER.findall(text)
    if not numbers:
        return " ".join(text.casefold().rstrip(".!").split())
    return f"{Decimal(numbers[-1].replace(',', '')).normalize():f}"


def _ask(
    tokenizer: Tokenizer, shown: Sequence[Example], example: Example, answer: str, chat: bool
) -> Pair:
    if chat:
        turns = []
        for other in shown:
            turns += [_turn("user", other.context), _turn("assistant", other.answer_text)]
        turns.append(_turn("user", example.context))
        context = render_prompt(tokenizer, turns)
        if not answer:
            return context, []
        whole = render(tokenizer, [*turns, _turn("assistant", answer)])[0]
        return context, whole[len(context) : -1]
    text = "".join(f"{_plain(other)} {other.answer_text}\n\n" for other in shown) + _plain(example)
    ids = tokenizer.encode(text)
    context = [tokenizer.eot_id, *ids]
    if not answer:
        return context, []
    # Encoded together: alone, a sentencepiece model would put a second space in front.
    return context, tokenizer.encode(f"{text} {answer}")[len(ids) :]


def _fitting(model: GPT, example: Example, pair: Pair) -> Pair:
    n, most = len(pair[1]), model.config.context - 1
    if not 0 < n <= most:
        where = f"{example.place}: " if example.place else ""
        raise DataError(
            f"{where}an answer of {n} tokens, and the model can score 1 to {most};"
            " shorten it or remove the line"
        )
    return pair


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _plain(example: Example) -> str:
    return f"Question: {example.context}\nAnswer:" if example.question else example.context


@torch.no_grad()
def score(model: GPT, pairs: Sequence[Pair]) -> Iterator[tuple[float, bool]]:
    """Log-probability of what follows each context, and whether greedy decoding would say it.

    Contexts too long for the model lose their beginning; what follows must have a token and fewer
    than the model's context. Rows are batched by length.
    """
    longest = model.config.context + 1
    rows = [([*context, *following][-longest:], len(following)) for context, following in pairs]
    results: dict[int, tuple[float, bool]] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    while order:
        width = -(-(len(rows[order[-1]][0]) - 1) // PAD_TO) * PAD_TO
        width = min(width, model.config.context)
        chosen = order[-max(1, BATCH_TOKENS // width) :]
        del order[-len(chosen) :]
        results.update(
            zip(chosen, _score_rows(model, [rows[i] for i in chosen], width), strict=True)
        )
    return iter([results[i] for i in range(len(rows))])


def _score_rows(
    model: GPT, rows: list[tuple[list[int], int]], width: int
) -> list[tuple[float, bool]]:
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full((len(rows), width), IGNORE_INDEX)
    for i, (ids, answer) in enumerate(rows):
        inputs[i, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[i, len(ids) - 1 - answer : len(ids) - 1] = torch.tensor(ids[-answer:])
    device = model.wte.weight.device
    stance = torch.compiler.set_stance("force_eager")  # every length would be compiled anew
    with stance:
        hidden = model(inputs.to(device))[(targets != IGNORE_INDEX).to(device)]
    wanted = targets[targets != IGNORE_INDEX].to(device)
    log_probs, greedy = [], []
    for part, ids in zip(hidden.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True):
        logits = model.logits(part)
        log_probs.append(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == ids)
    lengths = [answer for _, answer in rows]
    return [
        (float(values.double().sum()), bool(hits.all()))
        for values, hits in zip(
            torch.cat(log_probs).cpu().split(lengths),
            torch.cat(greedy).cpu().split(lengths),
            strict=True,
        )
    ]

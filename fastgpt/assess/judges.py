"""Who says which answer is better: a reward model, a Python function, or people's recorded votes.

A function judges ``(prompts, responses, references) -> scores``: the conversations (lists of
messages), the answers, and what each record had as reference (None without), all of one length; a
higher score is better. It is named ``package.module:function``.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.assess.ratings import Vote
from fastgpt.chat import render
from fastgpt.data.examples import Message, Prompt, read_records
from fastgpt.errors import DataError, FastGPTError, UsageError

if TYPE_CHECKING:
    from fastgpt.preference.reward_model import RewardModel
    from fastgpt.tokenizer import Tokenizer

SCORE_BATCH = 64

Judge = Callable[[Sequence[Sequence[Message]], Sequence[str], Sequence[Any]], Sequence[float]]

_OUTCOMES = {"a": 1.0, "b": 0.0, "tie": 0.5}


def load_function(spec: str, flag: str) -> Callable[..., Any]:
    """The function ``package.module:function`` of ``flag``; modules here and on the path count.

    Raises:
        UsageError: it cannot be imported.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise UsageError(f"{flag} {spec}: name it as package.module:function")
    if "" not in sys.path:  # a file in the working directory, as with python -m
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{flag} {spec}: {error}; is it installed, or in this directory?"
        ) from error
    except Exception as error:  # whatever the module does
        raise UsageError(f"{flag} {spec}: cannot import it: {_failure(error)}") from error
    if not callable(function):
        raise UsageError(f"{flag} {spec}: it is {type(function).__name__}, not a function")
    return function


def names_run(spec: str) -> bool:
    """Whether a judge is a directory and no function. Raises UsageError when it is neither."""
    there = Path(spec).is_dir()
    if not there and ":" not in spec:
        raise UsageError(
            f"--judge {spec}: no such directory; give a reward run, or a function as "
            "package.module:function"
        )
    return there


def check_judge(spec: str, prompts: Sequence[Prompt]) -> None:
    """Raise what `load_judge` would, without loading a model, or DataError for a missing reference.

    For those who have much to do before they ask the judge.
    """
    if names_run(spec):
        from fastgpt.preference.reward_model import find_reward_model

        find_reward_model(Path(spec))
    elif load_function(spec, "--judge") is chrf:
        bare = next((prompt for prompt in prompts if prompt.reference is None), None)
        if bare is not None:
            raise DataError(f"{bare.source}:{bare.line}: {_no_reference(spec)}")


def _no_reference(judge: str) -> str:
    return (
        f"no 'reference' (or 'answer'), which --judge {judge} compares answers with; "
        "add it to every prompt, or give another judge"
    )


def load_judge(spec: str, *, device: str = "auto", dtype: str = "auto") -> Judge:
    """The judge ``spec``: a function, or the run directory of a reward model.

    Raises:
        UsageError: it is neither.
    """
    if not names_run(spec):
        return load_function(spec, "--judge")
    from fastgpt.preference.reward_model import load_reward_model

    model, tokenizer = load_reward_model(Path(spec), device=device, dtype=dtype)
    return RewardJudge(model, tokenizer)


class RewardJudge:
    """A reward model as a judge of texts."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        references: Sequence[Any] = (),
    ) -> list[float]:
        """Normalised scores; a conversation beyond the model's context loses its beginning."""
        import torch

        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            turns = [*prompt, Message(role="assistant", content=response)]
            rows.append(render(self.tokenizer, turns)[0][-self.model.config.context :])
        device = self.model.head.weight.device
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = [0.0] * len(rows)
        eager = torch.compiler.set_stance("force_eager")  # every length would be compiled anew
        with torch.no_grad(), eager:
            for first in range(0, len(order), SCORE_BATCH):
                part = order[first : first + SCORE_BATCH]
                tokens_BT = torch.zeros(len(part), len(rows[part[-1]]), dtype=torch.int64)
                for row_T, i in zip(tokens_BT, part, strict=True):
                    row_T[: len(rows[i])] = torch.tensor(rows[i])
                last_B = torch.tensor([len(rows[i]) - 1 for i in part])
                values = self.model.scores(tokens_BT.to(device), last_B.to(device)).tolist()
                for i, value in zip(part, values, strict=True):
                    scores[i] = value
        return scores


def scores_of(
    judge: Judge, name: str, prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[float]:
    """What ``judge`` says of each response.

    Raises DataError when it fails, or unless it is a finite number each.
    """
    references = [prompt.reference for prompt in prompts]
    messages = [prompt.messages for prompt in prompts]
    try:
        found = judge(messages, list(responses), references)
    except FastGPTError:
        raise
    except Exception as error:  # a function of the user's: whatever it does
        raise DataError(f"{name}: {_failure(error)}; --debug shows the way there") from error
    try:
        scores = list(found)
        values = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: not a list of numbers, one for each response, but {error}"
        ) from error
    if len(values) != len(responses):
        raise DataError(f"{name}: {len(values)} scores for {len(responses)} responses")
    for prompt, value in zip(prompts, values, strict=True):
        if not math.isfinite(value):
            raise DataError(
                f"{name}: a score of {value} for the prompt {prompt.source}:{prompt.line}"
            )
    return values


def _failure(error: Exception) -> str:
    """What a user's code ended with, and the line of it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if isinstance(error, SyntaxError):
        where = ""  # the message has it
    return f"{type(error).__name__}: {error}{where}"


def votes_from_scores(
    scores: Mapping[str, Sequence[float]], answers: Mapping[str, Sequence[str]]
) -> list[Vote]:
    """Every two models compared on every prompt, from the scores of their answers.

    The same answer is a tie, whatever a model that scored it in two batches makes of it.
    """
    return [
        Vote(prompt, a, b, 0.5 if x == y or said == same else float(x > y))
        for a, b in itertools.combinations(scores, 2)
        for prompt, (x, y, said, same) in enumerate(
            zip(scores[a], scores[b], answers[a], answers[b], strict=True)
        )
    ]


def read_votes(path: Path) -> list[Vote]:
    """Recorded votes: ``{"prompt": any, "a": model, "b": model, "winner": "a" | "b" | "tie"}``.

    Raises DataError with file and line.
    """
    votes, numbers = [], {}
    for record in read_records([path]):
        winner = record.values.get("winner")
        if not isinstance(winner, str) or winner not in _OUTCOMES:
            raise record.bad(f"'winner' is {winner!r}; it must be a, b or tie")
        prompt = numbers.setdefault(str(record.values.get("prompt", record.line)), len(numbers))
        a, b = record.text("a"), record.text("b")
        if a == b:
            raise record.bad(f"{a!r} is compared with itself; name two models")
        votes.append(Vote(prompt, a, b, _OUTCOMES[winner]))
    return votes


def chrf(
    prompts: Sequence[Sequence[Message]], responses: Sequence[str], references: Sequence[Any]
) -> list[float]:
    """Likeness to the reference answer in [0, 1]: chrF2, character 1- to 6-grams.

    Popovic 2015 (aclanthology.org/W15-3049): the F-score of their mean precision and recall, recall
    counting twice as much; spaces are left out. Raises DataError where there is no reference.
    """
    for i, reference in enumerate(references):
        if reference is None:
            raise DataError(f"prompt {i + 1}: {_no_reference('chrf')}")
    return [
        _chrf(response, str(reference))
        for response, reference in zip(responses, references, strict=True)
    ]


def _chrf(text: str, reference: str, longest: int = 6, beta: float = 2.0) -> float:
    text, reference = "".join(text.split()), "".join(reference.split())
    precisions, recalls = [], []
    for n in range(1, longest + 1):
        ours, theirs = (
            Counter(s[i : i + n] for i in range(len(s) - n + 1)) for s in (text, reference)
        )
        shared = (ours & theirs).total()
        if ours and theirs:
            precisions.append(shared / ours.total())
            recalls.append(shared / theirs.total())
    if not precisions:
        return float(text == reference)
    precision, recall = (sum(values) / len(values) for values in (precisions, recalls))
    if precision + recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)

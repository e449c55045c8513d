"""Answers to a few held-out questions, which the stages print when they are done."""

from __future__ import annotations

from collections.abc import Sequence

from fastgpt.chat import end_id
from fastgpt.generate import SamplingConfig, generate
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer


def print_answers(
    model: GPT, tokenizer: Tokenizer, asked: Sequence[tuple[str, Sequence[int]]], length: int
) -> list[dict[str, str]]:
    """Answer questions (text, ids of the prompt) greedily; print, and return for the report."""
    if not asked:
        return []
    sampling = SamplingConfig(max_new_tokens=length, temperature=0.0)
    stop_ids = (end_id(tokenizer), tokenizer.eot_id)
    answers = generate(model, [ids for _, ids in asked], sampling, stop_ids=stop_ids)
    texts = []
    for (question, _), ids in zip(asked, answers, strict=True):
        texts.append({"prompt": question, "text": tokenizer.decode(tokenizer.known(ids))})
        print(f"\n> {question}|{texts[-1]['text']}")
    return texts

"""Generation as a conversation: what the model is given, and what is shown of its answer."""

from __future__ import annotations

import builtins

import pytest
import torch

from fastgpt import generate
from fastgpt.chat import render, render_prompt, with_chat_tokens
from fastgpt.config import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.generate import SamplingConfig, complete, converse
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("uncompiled")
SAMPLING = SamplingConfig(max_new_tokens=20)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_chat_tokens(Tokenizer.train(["hello there, héllo"], 262))


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    torch.manual_seed(0)
    return GPT(
        ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=tokenizer.vocab_size, context=48)
    )


@pytest.fixture
def says(monkeypatch, tokenizer):
    """The model says these texts, one an answer; the list of what it was given."""
    given: list[list[int]] = []

    def let(*texts):
        answers = iter(texts)

        def stream(model, prompts, sampling, *, stop_ids):
            assert set(stop_ids) == {tokenizer.eot_id, tokenizer.special_tokens["<|end|>"]}
            given.extend(prompts)
            for token in tokenizer.encode(next(answers)):
                yield [token]

        monkeypatch.setattr(generate, "stream", stream)
        return given

    return let


def user(text):
    return {"role": "user", "content": text}


def test_a_prompt_is_what_the_user_says(says, model, tokenizer):
    given = says("hi <|end|> ya")
    answer = complete(model, tokenizer, ["hello"], SAMPLING, chat=True)
    assert answer == ["hi <|end|> ya"]
    assert given == [render_prompt(tokenizer, [user("hello")])]


def talk(monkeypatch, capsys, model, tokenizer, *lines) -> str:
    said = iter(lines)

    def line(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", line)
    converse(model, tokenizer, SAMPLING)
    return capsys.readouterr().out


def test_a_conversation_goes_on_from_what_was_said(says, monkeypatch, capsys, model, tokenizer):
    given = says("héllo", "bye")
    out = talk(monkeypatch, capsys, model, tokenizer, "hello", "and?")
    assert out == "héllo\nbye\n\n"
    turns = [user("hello"), {"role": "assistant", "content": "héllo"}, user("and?")]
    assert given[1] == [
        *render(tokenizer, turns)[0],
        tokenizer.special_tokens["<|assistant|>"],
    ]


def test_what_does_not_fit_is_forgotten_in_whole_turns(says, monkeypatch, capsys, model, tokenizer):
    given = says("a" * 20, "b", "c")
    talk(monkeypatch, capsys, model, tokenizer, "x" * 10, "y" * 10, "z")
    assert given[1] == render_prompt(tokenizer, [user("y" * 10)])
    with pytest.raises(UsageError, match="longer than the model's context"):
        talk(monkeypatch, capsys, model, tokenizer, "x" * 60)

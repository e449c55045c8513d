"""Generation as a conversation: what the model is given, and what is shown of its answer."""

from __future__ import annotations

import builtins
import io
import random
import sys

import pytest
import torch

from fastgpt import generate, run
from fastgpt.chat import render, render_prompt, with_chat_tokens
from fastgpt.config import ModelConfig
from fastgpt.generate import SamplingConfig, complete, continuation, converse
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer, train_sentencepiece

pytestmark = pytest.mark.usefixtures("uncompiled")
SAMPLING = SamplingConfig(max_new_tokens=20)
WORDS = ("hello", "world", "this", "text", "of", "many", "words", "answer", "question", "model")


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
    """And an answer finds the room that it may take."""
    given = says("a" * 9, "b", "c")
    talk(monkeypatch, capsys, model, tokenizer, "x" * 10, "y" * 10, "z")
    assert len(given[0]) < 28  # the context of 48, less 20
    assert given[1] == render_prompt(tokenizer, [user("y" * 10)])
    assert len(given[2]) > len(render_prompt(tokenizer, [user("z")]))  # what fits is remembered
    assert all(len(ids) <= 28 for ids in given)


def test_what_is_too_long_is_asked_for_again(says, monkeypatch, capsys, model, tokenizer):
    given = says("a", "b")
    out = talk(monkeypatch, capsys, model, tokenizer, "x", "y" * 60, "z")
    assert out.startswith("a\nthat is 64 of the model's 48 tokens; say less at once\nb\n")
    turns = [user("x"), {"role": "assistant", "content": "a"}, user("z")]
    assert given[1] == render_prompt(tokenizer, turns)


def test_ids_without_a_token_say_nothing(says, monkeypatch, capsys):
    """Rows of a model beyond the vocabulary, and ids that a vocabulary leaves out."""
    base = Tokenizer.train(["hello there"], 262)
    ranks = {token: i for i, token in enumerate(base.vocabulary.tokens) if token}
    hole = len(base.vocabulary.tokens)
    specials = {"<|endoftext|>": hole + 1}
    tokenizer = with_chat_tokens(Tokenizer.from_tiktoken_ranks(ranks, "gpt4", specials))
    ids = [hole, *tokenizer.encode("hello"), tokenizer.vocab_size + 7]
    assert tokenizer.known(ids) == ids[1:-1]

    def stream(model, prompts, sampling, *, stop_ids):
        yield from ([token] for token in ids)

    monkeypatch.setattr(generate, "stream", stream)
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=tokenizer.vocab_size + 8)
    model = GPT(config)
    for chat in (True, False):
        assert complete(model, tokenizer, ["there"], SAMPLING, chat=chat) == ["hello"]
    assert talk(monkeypatch, capsys, model, tokenizer, "there") == "hello\n\n"


def test_an_answer_of_a_sentencepiece_model_begins_as_it_was_written(tmp_path):
    """A judge encodes the text again, and must see the ids that the model wrote."""
    texts = [" ".join(random.Random(i).choices(WORDS, k=8)) for i in range(200)]
    tokenizer = with_chat_tokens(train_sentencepiece(texts, 300, tmp_path / "sp.model"))
    prompt, new = render_prompt(tokenizer, [user("question")]), tokenizer.encode("hello world")
    answer = continuation(tokenizer, prompt, new, chat=True)
    assert answer == "hello world"
    assert tokenizer.encode(answer) == new
    said = tokenizer.encode("hello")
    assert continuation(tokenizer, said, new[len(said) :]) == " world"


@pytest.mark.parametrize(("chat", "asked"), [("yes", "hello there"), ("no", "hello there\n")])
def test_a_question_from_a_pipe(monkeypatch, capsys, model, tokenizer, chat, asked):
    """``echo`` ends it with a line feed, which nobody has said."""
    seen = []
    monkeypatch.setattr(run, "load_model", lambda *args, **options: (model, tokenizer))
    monkeypatch.setattr(
        generate, "complete", lambda m, t, prompts, *a, **k: seen.append(prompts) or [""]
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello there\n"))
    generate.main(["--run", "somewhere", "--chat", chat])
    assert seen == [(asked,)]

"""Judges: functions by name, likeness to a reference, people's votes."""

from __future__ import annotations

import json
import random

import pytest
import torch

from fastgpt.assess.judges import (
    RewardJudge,
    check_judge,
    chrf,
    load_function,
    load_judge,
    read_votes,
    scores_of,
    votes_from_scores,
)
from fastgpt.assess.ratings import Vote
from fastgpt.chat import with_chat_tokens
from fastgpt.config import ModelConfig
from fastgpt.data.examples import read_prompts
from fastgpt.errors import DataError, UsageError
from fastgpt.preference.reward_model import RewardModel
from fastgpt.tokenizer import Tokenizer


def test_a_function_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text("def shortest(p, r, ref): return [-len(t) for t in r]")
    monkeypatch.chdir(tmp_path)
    judge = load_judge("my_judges:shortest")
    assert judge([[]], ["four"], [None]) == [-4]


@pytest.mark.parametrize("spec", ["json", "no.such.module:f", "json:nothing", "json:decoder", ":f"])
def test_what_is_no_function_is_refused(spec):
    with pytest.raises(UsageError, match="--judge"):
        load_function(spec, "--judge")


@pytest.mark.parametrize(("text", "named"), [("1 / 0", ":1"), ("def f(:", "SyntaxError")])
def test_a_module_that_fails_is_named(text, named, tmp_path, monkeypatch):
    (tmp_path / "failing_module.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"--reward-fn failing_module:f: cannot .*{named}"):
        load_function("failing_module:f", "--reward-fn")


def test_judges_are_looked_at_before_there_is_something_to_judge(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "answer": 3}\n{"prompt": "y"}\n')
    prompts = read_prompts([path])
    with pytest.raises(DataError, match=r"p\.jsonl:2: no 'reference'"):
        check_judge("fastgpt.assess.judges:chrf", prompts)
    check_judge("fastgpt.assess.judges:chrf", prompts[:1])
    check_judge("math:sqrt", prompts)
    with pytest.raises(DataError, match="prompt 2: no 'reference'"):
        chrf([[]] * 2, ["None"] * 2, ["None", None])
    with pytest.raises(UsageError, match=r"--judge .*nowhere: no such directory; "):
        check_judge(str(tmp_path / "nowhere"), prompts)
    (tmp_path / "config.toml").touch()
    with pytest.raises(UsageError, match="no reward model was saved there"):
        check_judge(str(tmp_path), prompts)


def test_every_two_models_are_compared_on_every_prompt():
    scores = {"a": [1.0, 2.0], "b": [0.5, 2.0], "c": [3.0, -1.0]}
    votes = votes_from_scores(scores, {"a": ["x", "y"], "b": ["z", "w"], "c": ["u", "v"]})
    assert set(votes) == {
        Vote(0, "a", "b", 1.0), Vote(1, "a", "b", 0.5),
        Vote(0, "a", "c", 0.0), Vote(1, "a", "c", 1.0),
        Vote(0, "b", "c", 0.0), Vote(1, "b", "c", 1.0),
    }  # fmt: skip


def test_the_same_answer_is_a_tie_whatever_rounding_makes_of_it():
    scores = {"a": [1.0, 1.0], "b": [1.0 + 1e-7, 1.0 + 1e-7]}
    votes = votes_from_scores(scores, {"a": ["same", "one"], "b": ["same", "two"]})
    assert [vote.outcome for vote in votes] == [0.5, 0.0]


def test_scores_must_be_numbers_one_for_each_response(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "y", "answer": "z"}\n')
    prompts = read_prompts([path])
    seen = []

    def judge(messages, responses, references):
        seen.append((messages[0][0]["content"], responses[1], references[1]))
        return [1, 2.5]

    assert scores_of(judge, "j", prompts, ["a", "b"]) == [1.0, 2.5]
    assert seen == [("x", "b", "z")]
    with pytest.raises(DataError, match="j: 1 scores for 2 responses"):
        scores_of(lambda *_: [0.0], "j", prompts, ["a", "b"])
    with pytest.raises(DataError, match=r"j: a score of nan for the prompt .*p\.jsonl:2"):
        scores_of(lambda *_: [0.0, float("nan")], "j", prompts, ["a", "b"])
    for found in (None, ["good", "bad"], [None, None], 3):
        with pytest.raises(DataError, match="j: not a list of numbers, one for each response"):
            scores_of(lambda *_, found=found: found, "j", prompts, ["a", "b"])  # pyright: ignore


def test_a_function_that_fails_is_named_with_its_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x"}')
    prompts = read_prompts([path])
    with pytest.raises(DataError, match=r"j: ZeroDivisionError: .* at .*test_judges\.py:\d+;"):
        scores_of(lambda *_: [1 / 0], "j", prompts, ["a"])
    with pytest.raises(DataError, match=r"j: TypeError: .*2 positional arguments but 3 "):
        scores_of(lambda a, b: [0.0], "j", prompts, ["a"])  # pyright: ignore


def test_votes_of_people_are_read(tmp_path):
    path = tmp_path / "votes.jsonl"
    lines = [("q1", "sft", "rl", "b"), ("q2", "sft", "rl", "tie"), ("q1", "base", "rl", "a")]
    path.write_text(
        "\n".join(
            json.dumps(dict(zip(("prompt", "a", "b", "winner"), x, strict=True))) for x in lines
        )
    )
    assert read_votes(path) == [
        Vote(0, "sft", "rl", 0.0), Vote(1, "sft", "rl", 0.5), Vote(0, "base", "rl", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": "x", "b": "y", "winner": "x"}, "'winner' is 'x'"),
        ({"a": "x", "b": "y", "winner": ["a"]}, r"'winner' is \['a'\]"),
        ({"a": "x", "b": "x", "winner": "a"}, "itself"),
        ({"a": "x", "winner": "a"}, "no key 'b'"),
    ],
)
def test_a_bad_vote_is_named(record, message, tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=rf"votes\.jsonl:1: .*{message}"):
        read_votes(path)


def slow_chrf(text: str, reference: str) -> float:
    """From the definition, n-gram by n-gram, taking matches away one at a time."""
    text, reference = text.replace(" ", ""), reference.replace(" ", "")
    p_total = r_total = 0.0
    orders = 0
    for n in range(1, 7):
        ours = [text[i : i + n] for i in range(len(text) - n + 1)]
        theirs = [reference[i : i + n] for i in range(len(reference) - n + 1)]
        if not ours or not theirs:
            continue
        left, hits = list(theirs), 0
        for gram in ours:
            if gram in left:
                left.remove(gram)
                hits += 1
        p_total, r_total, orders = (
            p_total + hits / len(ours),
            r_total + hits / len(theirs),
            orders + 1,
        )
    p, r = (p_total / orders, r_total / orders) if orders else (0, 0)
    return 5 * p * r / (4 * p + r) if p + r else 0.0


def test_chrf_follows_its_definition():
    rng = random.Random(2)
    for _ in range(50):
        text, reference = (
            "".join(rng.choices("ab c", k=rng.randint(1, 14))) + "a" for _ in range(2)
        )
        assert chrf([[]], [text], [reference]) == [pytest.approx(slow_chrf(text, reference))]
    assert chrf([[]] * 3, ["the cat", "", "dog"], ["the cat", "x", "zzz"]) == [1.0, 0.0, 0.0]


def test_chrf_likes_missing_words_less_than_surplus_ones():
    missing, surplus = chrf([[]] * 2, ["the cat", "the cat sat on the mat"], ["the cat sat"] * 2)
    assert missing < surplus


@pytest.mark.usefixtures("uncompiled")
def test_a_reward_model_scores_answers_as_it_was_trained_to():
    """In a batch with longer ones as alone, read at the end of turn behind the answer."""
    tokenizer = with_chat_tokens(Tokenizer.train(["the cat sat on the mat"], 270))
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.vocab_size, context=32
    )
    model = RewardModel(config)
    model.normalize(0.25, 0.5)
    prompt = [{"role": "user", "content": "who sat"}]
    answers = ["the cat", "the mat, the mat, the mat", "c"]
    scores = RewardJudge(model, tokenizer)([prompt] * 3, answers)
    for answer, score in zip(answers, scores, strict=True):
        names = tokenizer.special_tokens
        ids = [tokenizer.eot_id, names["<|user|>"], *tokenizer.encode("who sat"), names["<|end|>"]]
        ids += [names["<|assistant|>"], *tokenizer.encode(answer), names["<|end|>"]]
        with torch.no_grad():
            raw = model.head(model.trunk(torch.tensor([ids]))[0, -1])
        assert score == pytest.approx((float(raw) - 0.25) / 0.5, abs=1e-4)

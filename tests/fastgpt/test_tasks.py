"""Benchmarks: the published files are read, and scores are those of one sequence at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fastgpt.assess import tasks
from fastgpt.assess.tasks import Example, Task, evaluate_task, final_answer, read_task, score
from fastgpt.chat import render, with_chat_tokens
from fastgpt.config import ModelConfig
from fastgpt.errors import DataError
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer, train_sentencepiece

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_chat_tokens(Tokenizer.train(["the cat sat on the mat, the dog did not"], 280))


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    torch.manual_seed(1)
    model = GPT(
        ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size, context=64)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # far from uniform, so that choices differ
    return model.eval()


def alone(model, context, following) -> tuple[float, bool]:
    """Token by token, each from a forward pass of its own, in the order of the definition."""
    total, greedy, ids = 0.0, True, list(context)
    for token in following:
        logits = model.logits(model(torch.tensor([ids]))[:, -1])[0].double()
        total += float(logits[token] - logits.logsumexp(-1))
        greedy &= int(logits.argmax()) == token
        ids.append(token)
    return total, greedy


@torch.no_grad()
def test_scores_are_those_of_one_sequence_at_a_time(model):
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(280, (n,), generator=generator).tolist()  # noqa: E731
    pairs = [(ids(n), ids(m)) for n, m in [(1, 1), (5, 3), (31, 2), (30, 34), (2, 7), (12, 1)]]
    best = model.logits(model(torch.tensor([pairs[1][0]]))[:, -1]).argmax().item()
    pairs.append((pairs[1][0], [best]))
    for (total, greedy), pair in zip(score(model, pairs), pairs, strict=True):
        expected = alone(model, *pair)
        assert total == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    assert list(score(model, pairs))[-1][1]


@torch.no_grad()
def test_a_context_too_long_loses_its_beginning(model):
    context, following = list(range(100)), [3, 4]
    (found,) = score(model, [(context, following)])
    # 64 inputs: the context's last 63 tokens and the first of the two that follow.
    ids = torch.tensor([[*context[-63:], 3]])
    log_probs = model.logits(model(ids))[0].double().log_softmax(-1)
    assert found[0] == pytest.approx(float(log_probs[-2, 3] + log_probs[-1, 4]), abs=1e-4)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "the cat", "choices": ["sat", "sat on " * 300], "answer": 0},
        {"text": "the " + "dogsat" * 300},
    ],
)
def test_an_answer_that_fills_the_context_is_named(model, tokenizer, record, tmp_path):
    path = tmp_path / "t.jsonl"
    short = {"text": "the cat"} if "text" in record else {**record, "choices": ["a", "b"]}
    path.write_text(json.dumps(short) + "\n" + json.dumps(record))
    message = r"t\.jsonl:2: an answer of \d+ tokens, .* 1 to 63; shorten it"
    with pytest.raises(DataError, match=message):
        evaluate_task(model, tokenizer, read_task(path))


PUBLISHED = {
    "hellaswag": ({"ctx": "A man", "endings": ["runs", "sits"], "label": "1"}, "sits"),
    "arc": (
        {
            "question": {
                "stem": "Hot?",
                "choices": [{"text": "ice", "label": "A"}, {"text": "sun", "label": "B"}],
            },
            "answerKey": "B",
        },
        "sun",
    ),
    "arc_lists": (
        {
            "question": "Hot?",
            "choices": {"text": ["ice", "sun"], "label": ["1", "2"]},
            "answerKey": "1",
        },
        "ice",
    ),
    "arc_numbers": (
        {
            "question": "Hot?",
            "choices": {"text": ["ice", "sun", "sea"], "label": ["1", "2", "3"]},
            "answerKey": 1,
        },
        "ice",
    ),
    "mmlu": ({"question": "2+2", "choices": ["3", "4", "5"], "answer": 1}, "4"),
    "lambada": ({"text": "She opened the door"}, "door"),
    "gsm8k": ({"question": "How many?", "answer": "2+2=4\n#### 4"}, "2+2=4\n#### 4"),
    "own": ({"prompt": "Capital?", "answer": "Paris"}, "Paris"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms_are_read(name, tmp_path):
    record, answer = PUBLISHED[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(record))
    task = read_task(path)
    assert task.name == name
    assert task.examples[0].answer_text == answer


BAD = [
    ({"ctx": "A", "endings": ["x", "y"], "label": 2}, "the right answer is 2, none of the 2"),
    ({"ctx": "A", "endings": ["x"], "label": 0}, "at least two"),
    ({"question": "A", "choices": ["x", "y"]}, "the right answer is None"),
    ({"text": "alone"}, "one word"),
    ({"question": "A"}, "no key 'answer'"),
    ({"question": {"stem": 3, "choices": []}}, "not a string"),
    ({"question": "A", "choices": ["x", "y"], "answer": 1.0}, "the right answer is 1.0"),
    (
        {"question": "A", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "1"},
        "the right answer is '1', none of the labels",
    ),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_is_named(record, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n" + json.dumps(record))
    with pytest.raises(DataError, match=f"bad.jsonl:2: .*{message}"):
        read_task(path)


def test_mixed_kinds_are_refused(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(PUBLISHED[name][0]) for name in ("mmlu", "gsm8k")))
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: another kind"):
        read_task(path)


@torch.no_grad()
def test_choices_follow_the_definition(model, tokenizer):
    """Also with a demonstration: the context is spelled out here once more."""
    examples = [
        Example("who sat", 0, ("the cat", "a very long answer about dogs")),
        Example("on what", 1, ("mat", "the mat, the mat")),
        Example("who did not", 1, ("the cat", "dog")),
        Example("what", 0, ("the dog did not", "mat")),
    ]
    shown = "Question: who sat\nAnswer: the cat\n\n"
    acc = norm = 0
    for example in examples[1:]:
        context = tokenizer.encode(f"{shown}Question: {example.context}\nAnswer:")
        sums = [
            alone(model, [tokenizer.eot_id, *context], tokenizer.encode(f" {c}"))[0]
            for c in example.choices
        ]
        per_byte = [s / len(c) for s, c in zip(sums, example.choices, strict=True)]
        acc += sums.index(max(sums)) == example.answer
        norm += per_byte.index(max(per_byte)) == example.answer
    found = evaluate_task(model, tokenizer, Task("t", examples), few_shot=1)
    assert (found["n"], found["acc"], found["acc_norm"]) == (3, acc / 3, norm / 3)
    assert found["se"] == pytest.approx(math.sqrt(acc / 3 * (1 - acc / 3) / 3))


@torch.no_grad()
def test_an_answer_is_encoded_with_what_it_follows(tmp_path, monkeypatch):
    """Alone, a sentencepiece model would put a second space in front of it."""
    text = "the cat sat on the mat and the dog did not"
    tokenizer = train_sentencepiece([text] * 50, 280, tmp_path / "sp.model")
    asked = []
    monkeypatch.setattr(tasks, "score", lambda model, pairs: asked.extend(pairs) or [(0.0, True)])
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=tokenizer.vocab_size)
    evaluate_task(GPT(config), tokenizer, Task("t", [Example(text, "not", (), False, True)]))
    ((context, following),) = asked
    assert [*context, *following] == [tokenizer.eot_id, *tokenizer.encode(f"{text} not")]
    assert tokenizer.decode(context[1:]) == text


@pytest.mark.parametrize("name", ["mmlu.law.jsonl", "mmlu.law.jsonl.gz", "mmlu.law.json.xz"])
def test_only_how_it_is_stored_is_cut_from_a_name(name):
    assert tasks._name(Path("x.y") / name) == "mmlu.law"


def test_a_chat_model_is_asked_as_it_was_trained(model, tokenizer):
    example = Example("who sat", 1, ("cat", "dog"))
    expected = []
    for choice in example.choices:
        turns = [("user", "who sat"), ("assistant", choice)]
        ids, mask = render(tokenizer, [{"role": r, "content": c} for r, c in turns])
        n = sum(mask)
        expected.append(alone(model, ids[:-n], ids[-n:-1])[0])
    found = evaluate_task(model, tokenizer, Task("t", [example]), chat=True)
    assert found["acc"] == float(expected[1] > expected[0])


def test_last_words_are_greedy_and_have_a_perplexity(model, tokenizer):
    examples = [Example("the cat sat on the", "mat", question=False, last_word=True)]
    context = [tokenizer.eot_id, *tokenizer.encode("the cat sat on the")]
    with torch.no_grad():
        total, greedy = alone(model, context, tokenizer.encode(" mat"))
    found = evaluate_task(model, tokenizer, Task("t", examples))
    assert found["acc"] == greedy
    assert found["ppl"] == pytest.approx(math.exp(-total), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2+2=4\n#### 4", "4"),
        ("so 1,234 in all.", "1234"),
        ("it is 3.50", "3.5"),
        ("-7", "-7"),
        ("Paris.", "paris"),
        ("  The   Cat! ", "the cat"),
        ("10", "10"),
        ("about .75 of it", "0.75"),
        ("0.750", "0.75"),
        ("007", "7"),
        ("10-5", "5"),
        ("is it -5", "-5"),
        ("1000", "1000"),
    ],
)
def test_what_counts_of_an_answer(text, answer):
    assert final_answer(text) == answer


def test_written_answers_are_compared(model, tokenizer, monkeypatch):
    said = {"a": "it is 4", "b": "5 I think", "c": "seven"}

    def generate(model, prompts, sampling, *, stop_ids):
        assert sampling.temperature == 0
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        return [tokenizer.encode(said[text[len("Question: ")]]) for text in
                (text[text.index("Question") :] for text in texts)]  # fmt: skip

    monkeypatch.setattr("fastgpt.assess.tasks.generate", generate)
    examples = [Example("a", "#### 4"), Example("b", "4"), Example("c", "Seven.")]
    found = evaluate_task(model, tokenizer, Task("t", examples), max_new_tokens=8)
    assert found["acc"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("max_new_tokens", [8, 64, 1000])
def test_a_long_question_keeps_its_end_and_room_for_an_answer(
    model, tokenizer, monkeypatch, max_new_tokens
):
    def generate(model, prompts, sampling, *, stop_ids):
        ((*prompt,),) = prompts
        assert len(prompt) == 64 - min(max_new_tokens, 32)
        assert tokenizer.decode(prompt).endswith("the dog did not\nAnswer:")
        assert sampling.max_new_tokens == max_new_tokens
        return [tokenizer.encode("4")]

    monkeypatch.setattr("fastgpt.assess.tasks.generate", generate)
    task = Task("t", [Example("the cat sat on " * 40 + "the dog did not", "4")])
    assert evaluate_task(model, tokenizer, task, max_new_tokens=max_new_tokens)["acc"] == 1


def test_no_example_left_to_ask(model, tokenizer):
    with pytest.raises(
        DataError, match="t: 1 examples, 1 of them shown and none left to ask; lower"
    ):
        evaluate_task(model, tokenizer, Task("t", [Example("a", "b")]), few_shot=1)

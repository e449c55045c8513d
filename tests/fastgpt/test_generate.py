"""Sampling against hand-computed distributions; batches against one prompt at a time, uncached."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch

from fastgpt.config import ModelConfig
from fastgpt.decoder import Decoder
from fastgpt.errors import UsageError
from fastgpt.generate import SamplingConfig, complete, generate, sample, stream
from fastgpt.model import GPT

pytestmark = pytest.mark.usefixtures("uncompiled", "seeded")

ROTARY = ModelConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, vocab_size=23, context=20)
LEARNED = dataclasses.replace(ROTARY, position="learned", norm="layer_norm", bias=True, window=3)
EVERYTHING = dataclasses.replace(
    ROTARY,
    **{"mlp": "swiglu", "parallel": True, "qk_norm": True, "embed_norm": True, "tied": False},
    **{"logit_softcap": 3.0, "window": 3, "bias": True},
)
GPT2 = dataclasses.replace(LEARNED, mlp="gelu_tanh", window=None, n_kv_head=None)
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]


def random_model(config: ModelConfig = ROTARY) -> GPT:
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def argmax_loop(model: GPT, prompt: list[int], n_new: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_new):
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "config",
    [ROTARY, LEARNED, EVERYTHING, GPT2],
    ids=["rotary", "learned", "everything", "gpt2"],
)
def test_greedy_is_the_argmax_loop_without_cache_or_batch(config):
    model = random_model(config)
    expected = [argmax_loop(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == 3
    assert generate(model, PROMPTS, GREEDY) == expected


def test_rows_that_are_kept_go_on_as_before():
    """Logits of each step, with a row dropped on the way, against whole sequences in one pass."""
    model = random_model(EVERYTHING)
    decoder = Decoder(model)
    rows, texts = [0, 1, 2], [list(prompt) for prompt in PROMPTS]
    logits = decoder.start(PROMPTS, 6)
    for step in range(6):
        for row, found in zip(rows, logits, strict=True):
            with torch.no_grad():
                whole = model.logits(model(torch.tensor([texts[row]])))[0, -1]
            torch.testing.assert_close(found, whole)
        if step == 2:
            rows = [0, 2]
            decoder.keep(torch.tensor(rows))
        for row in rows:
            texts[row].append((7 * step + row) % 23)
        logits = decoder.step(torch.tensor([texts[row][-1] for row in rows]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_is_left_as_it_is(dtype):
    """A decoder shares embeddings and norms, and has linear layers of its own."""
    model = GPT(LEARNED, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = Decoder(model)
    logits = decoder.start([[1, 2]], 2)
    assert logits.dtype == torch.float32
    assert not any(p.requires_grad for p in decoder.model.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "config", [LEARNED, EVERYTHING, GPT2], ids=["learned", "everything", "gpt2"]
)
def test_where_nothing_can_be_packed(config, monkeypatch):
    from fastgpt import decoder

    def logits() -> list[torch.Tensor]:
        made = decoder.Decoder(model)
        return [
            made.start(PROMPTS, 3),
            *(made.step(torch.tensor(ids)) for ids in ([1, 2, 3], [4, 5, 6])),
        ]

    model = random_model(config)
    packed = logits()
    monkeypatch.setattr(decoder, "_Packed", decoder._Plain)
    torch.testing.assert_close(logits(), packed)


def test_the_context_ends_the_continuation():
    model = random_model()
    sampling = dataclasses.replace(GREEDY, max_new_tokens=100)
    (row,) = generate(model, [[1] * 17], sampling)
    assert len(row) == 3
    (row,) = generate(model, [[1] * 19], sampling)
    assert len(row) == 1


def test_prompts_that_leave_no_room_or_say_nothing():
    model = random_model()
    with pytest.raises(UsageError, match="the prompt has 20 tokens, the model's context is 20"):
        generate(model, [[1], [1] * 20], GREEDY)
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(UsageError, match="the prompt is empty"):
            generate(model, prompts, GREEDY)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1)],
)
def test_sampling_options_out_of_range(name, value):
    flag = name.replace("_", "-")
    with pytest.raises(UsageError, match=f"--{flag} {value} is out of range"):
        generate(random_model(), PROMPTS, SamplingConfig(**{name: value}))


def frequencies(probabilities: list[float], n: int = 4000, **options) -> list[float]:
    """Shares of the ids over uniform numbers at equal distances: exact to 1 / n."""
    logits = torch.tensor([probabilities]).log().expand(n, -1)
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = Counter(sample(logits, SamplingConfig(**options), uniforms).tolist())
    return [counts[i] / n for i in range(len(probabilities))]


SKEWED = [0.1, 0.4, 0.05, 0.3, 0.15]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, SKEWED),
        # p^2, p^(1/2), renormalised
        ({"temperature": 0.5}, [p * p / 0.285 for p in SKEWED]),
        ({"temperature": 2.0}, [math.sqrt(p) / 2.107254 for p in SKEWED]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 9}, SKEWED),
        ({"temperature": 1.0, "top_p": 0.69}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1.0, "top_p": 0.71}, [0, 40 / 85, 0, 30 / 85, 15 / 85]),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 1.0}, SKEWED),
        # top_p of what top_k leaves: 4/7 and 3/7
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_distributions(options, expected):
    found = frequencies(SKEWED, **options)
    for p, q in zip(expected, found, strict=True):
        assert (q == 0) == (p == 0)
        assert q == pytest.approx(p, abs=1 / 4000)


def test_an_impossible_id_is_never_chosen():
    logits = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log().expand(2, -1)
    edges = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert sample(logits, SamplingConfig(temperature=1.0), edges).tolist() == [1, 3]


def test_every_token_has_a_number_of_its_own():
    model = GPT(dataclasses.replace(ROTARY, context=80))
    torch.nn.init.zeros_(model.wte.weight)  # all ids are equally likely
    (row,) = generate(model, [[1]], SamplingConfig(max_new_tokens=70, temperature=1.0))
    assert len(set(row)) > 15


def test_seeds_reproduce_and_differ():
    model = random_model()
    hot = SamplingConfig(max_new_tokens=12, temperature=1.0, seed=5)
    prompts = [[1, 2, 3]] * 3
    rows = generate(model, prompts, hot)
    assert generate(model, prompts, hot) == rows
    assert len({tuple(row) for row in rows}) == 3  # rows draw from generators of their own
    other = generate(model, prompts, dataclasses.replace(hot, seed=6))
    assert all(a != b for a, b in zip(rows, other, strict=True))


def test_a_row_does_not_depend_on_its_neighbours():
    model = random_model()
    hot = SamplingConfig(max_new_tokens=10, temperature=1.0, seed=5)
    alone = generate(model, PROMPTS[:1], hot)
    assert generate(model, [PROMPTS[0], [7] * 9, [8]], hot)[0] == alone[0]


def test_sampling_leaves_the_global_generator_alone():
    model = random_model()
    state = torch.get_rng_state()
    generate(model, PROMPTS, SamplingConfig(max_new_tokens=3, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_ids_end_each_row_on_its_own():
    model = random_model()
    free = generate(model, PROMPTS, GREEDY)
    stop = free[0][4]
    ended = generate(model, PROMPTS, GREEDY, stop_ids=(stop,))
    for row, whole in zip(ended, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(ended[0]) < 12


def test_a_stream_gives_token_by_token_and_leaves_its_caller_alone():
    model = random_model()
    whole = generate(model, PROMPTS, GREEDY)
    steps = []
    for ids in stream(model, PROMPTS, GREEDY):
        assert torch.is_grad_enabled()
        steps.append(ids)
    assert [list(row) for row in zip(*steps, strict=True)] == whole
    assert torch.is_grad_enabled()


class Letters:
    """A tokenizer of one letter an id."""

    eot_id = -1
    alphabet = "_abcdefghijklmnopqrstuv"

    def encode(self, text):
        return [self.alphabet.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids)

    def known(self, ids):
        return list(ids)


def test_texts_end_before_the_first_mark():
    model, letters = random_model(), Letters()
    free = complete(model, letters, ["cad", "i"], GREEDY)
    assert [len(text) for text in free] == [12, 12]
    marks = [free[0][5:7], free[0][2:4]]
    cut = complete(model, letters, ["cad", "i"], GREEDY, stop=marks)
    for text, whole in zip(cut, free, strict=True):
        assert text == whole[: min(whole.find(m) if m in whole else 99 for m in marks)]
    assert len(cut[0]) <= 2


def test_a_stop_mark_ends_the_work(monkeypatch):
    model = random_model()
    mark = complete(model, Letters(), ["cad"], GREEDY)[0][2]
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(0) or forward(*a, **k))
    complete(model, Letters(), ["cad"], GREEDY, stop=[mark])
    assert len(calls) <= 3


def test_end_of_text_ends_a_text():
    model, letters = random_model(), Letters()
    free = complete(model, letters, ["cad"], GREEDY)[0]
    letters.eot_id = letters.encode(free[3])[0]
    assert complete(model, letters, ["cad"], GREEDY) == [free[: free.index(free[3])]]

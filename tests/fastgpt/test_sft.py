"""What is learned from a chat, and how a model is made ready for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizer_samples as samples
import torch

from fastgpt import chat
from fastgpt.config import ModelConfig
from fastgpt.data.examples import Chat
from fastgpt.data.packing import PackedExamples
from fastgpt.errors import DataError, UsageError
from fastgpt.model import GPT
from fastgpt.sft import SFTConfig, encode, grown_weights, loss_fn, split
from fastgpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat.with_chat_tokens(Tokenizer.train([samples.english(30_000)], 300))


def make_chat(*texts: str, line: int = 1) -> Chat:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Chat(messages, Path("chats.jsonl"), line)  # pyright: ignore[reportArgumentType]


CHATS = [
    make_chat("Who?", "I am."),
    make_chat("One and two?", "Three.", "And four?", "Seven, of course."),
    make_chat("x", "y"),
    make_chat("Say something long", "word " * 12),
]


def encoded(tokenizer, chats=CHATS, seq_len: int = 40, on_long="error"):
    said: list[str] = []
    return encode(chats, tokenizer, seq_len, on_long, said.append), said


@pytest.mark.parametrize("shape", [{}, {"logit_softcap": 2.0, "tied": False}])
def test_the_loss_is_the_sum_over_what_the_assistant_says(shape, tokenizer, seeded, uncompiled):
    """Against one chat at a time, one target at a time."""
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=32, vocab_size=tokenizer.vocab_size, context=40, **shape
    )
    model = GPT(config)
    examples, _ = encoded(tokenizer)
    packed = PackedExamples(examples, 40)
    batch = packed.batch(packed.epoch(0))
    expected, targets = 0.0, 0
    for item in CHATS:
        ids, mask = chat.render(tokenizer, item.messages)
        logits = model.logits(model(torch.tensor([ids[:40]])))[0].double()
        for i in range(1, min(len(ids), 41)):
            if mask[i]:
                expected -= logits[i - 1].log_softmax(-1)[ids[i]].item()
                targets += 1
    assert int((batch["targets_BT"] != -100).sum()) == targets == packed.targets
    assert loss_fn(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_of_a_step_do_not_depend_on_micro_batches(tokenizer, seeded, uncompiled):
    """Sums, divided once by the targets of the whole step: rows of unequal length weigh alike."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=310, context=24))
    packed = PackedExamples(encoded(tokenizer, seq_len=24)[0], 24)
    rows = packed.epoch(0)
    loss_fn(model, packed.batch(rows)).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for row in rows:
        loss_fn(model, packed.batch([row])).backward()
    parts = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(rows) > 1
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_end_of_a_turn_is_learned(tokenizer):
    ((ids, learned),), _ = encoded(tokenizer, [CHATS[0]])
    assert ids[-1] == chat.end_id(tokenizer)
    assert learned[-1]
    assert ids.tolist().count(tokenizer.eot_id) == 1
    assert not learned[0]


def test_a_long_chat_keeps_its_beginning(tokenizer):
    whole, _ = chat.render(tokenizer, CHATS[3].messages)
    short = len(whole) - 5
    examples, said = encoded(tokenizer, seq_len=short - 1)
    assert examples[3][0].tolist() == whole[:short]
    assert said == [f"1 chats are longer than {short - 1} tokens: their ends are cut off"]
    assert encoded(tokenizer, seq_len=len(whole) - 1)[1] == []


def test_a_chat_of_which_nothing_would_be_learned(tokenizer):
    late = make_chat("very long question " * 9, "yes", line=7)
    _, mask = chat.render(tokenizer, late.messages)
    first = mask.index(True)
    with pytest.raises(DataError, match=rf"^chats.jsonl:7: .*at token {first + 1}, a row has 21:"):
        encoded(tokenizer, [CHATS[0], late], seq_len=20)
    examples, said = encoded(tokenizer, [CHATS[0], late], seq_len=20, on_long="skip")
    assert len(examples) == 1
    assert said == ["1 chats are left out: the assistant speaks beyond --seq-len 20"]
    # One token more, and there is a target.
    assert len(encoded(tokenizer, [late], seq_len=first)[0]) == 1
    with pytest.raises(DataError, match="first speaks"):
        encoded(tokenizer, [late], seq_len=first - 1)


def test_held_out_chats_are_a_function_of_the_seed():
    chats = [make_chat(str(i), "x", line=i) for i in range(40)]
    held, rest = split(chats, 0.1, seed=3)
    assert len(held) == 4
    assert sorted(c.line for c in held + rest) == list(range(40))
    assert split(chats, 0.1, seed=3) == (held, rest)
    assert split(chats, 0.1, seed=4)[0] != held
    assert [c.line for c in held] != sorted(c.line for c in held)
    assert len(split(chats, 0.001, seed=3)[0]) == 1
    assert split(chats, 0.0, seed=3)[0] == []


@pytest.mark.parametrize(("n", "fraction"), [(1, 0.05), (0, 0.0), (3, 0.9)])
def test_something_must_be_left_to_learn(n, fraction):
    with pytest.raises(DataError, match="give more, or --val-fraction 0"):
        split([make_chat("a", "b")] * n, fraction, seed=0)


@pytest.mark.parametrize("rows", [204, 200], ids=["appended", "in rows without a token"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_like_the_old_ones(tied, rows, seeded):
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=200, context=8, tied=tied))
    with torch.no_grad():
        model.wte.weight += 0.5
    weights = grown_weights(model, rows, 4, seed=1)
    names = {"wte.weight"} if tied else {"wte.weight", "head.weight"}
    for name, old in model.state_dict().items():
        kept = rows - 4 if name in names else len(old)
        assert torch.equal(weights[name][:kept], old[:kept])
        assert len(weights[name]) == (rows if name in names else len(old))
    new, old = weights["wte.weight"][-4:], model.wte.weight[: rows - 4]
    spread = float((new - old.mean(0)).square().mean().sqrt() / old.std())
    assert spread == pytest.approx(0.1, rel=0.3)
    assert len({tuple(row.tolist()) for row in new}) == 4
    assert torch.equal(new, grown_weights(model, rows, 4, seed=1)["wte.weight"][-4:])
    assert not torch.equal(new, grown_weights(model, rows, 4, seed=2)["wte.weight"][-4:])


def test_without_new_tokens_nothing_changes(seeded):
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=200, context=8))
    weights = grown_weights(model, 200, 0, seed=1)
    assert all(torch.equal(weights[name], old) for name, old in model.state_dict().items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": None}, "--init: the run to start from is missing"),
        ({"epochs": 0.0}, "--epochs 0"),
        ({"epochs": float("inf")}, "--epochs inf"),
        ({"val_fraction": 1.0}, "--val-fraction 1"),
        ({"lora_rank": -1}, "--lora-rank -1"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "--lora-alpha 0"),
        ({"lora_alpha": 64.0}, "--lora-alpha 64: give --lora-rank, too"),
        ({"stop_at": 0}, "--stop-at 0"),
    ],
)
def test_values_no_run_can_have(values, message):
    with pytest.raises(UsageError, match=message):
        SFTConfig(**{"init": Path("base"), **values}).check()


def test_rows_share_no_ids_with_padding(tokenizer):
    """The filling behind the last chat is no target and no chat attends to it."""
    packed = PackedExamples(encoded(tokenizer)[0], 40)
    batch = packed.batch([[0]])
    n = int(packed.lengths[0])
    assert batch["doc_start_BT"][0].tolist() == [0] * n + list(range(n, 40))
    real = batch["targets_BT"] != -100
    assert int(batch["places_N"][real].max()) == n - 1
    assert np.array_equal(batch["positions_BT"][0, :n], np.arange(n))

"""Rankings as ids: the split, what is cut, which comparison comes when; what is said of scores."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt.chat import end_id, with_chat_tokens
from fastgpt.data.batches import IGNORE_INDEX
from fastgpt.data.packing import pack
from fastgpt.data.rankings import Ranking
from fastgpt.errors import DataError, UsageError
from fastgpt.preference.comparisons import (
    Comparison,
    PackedComparisons,
    encode,
    prompts_per_step,
    row_length,
    split,
)
from fastgpt.preference.metrics import (
    accuracy,
    by_count,
    by_difference,
    calibration,
    calibration_error,
    correlation,
    text_table,
)
from fastgpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return with_chat_tokens(Tokenizer.train(["the cat sat on the mat " * 20], 280))


def ranking(prompt: str, *responses: str, line: int = 1) -> Ranking:
    scores = [float(-i) for i in range(len(responses))]
    message = {"role": "user", "content": prompt}
    return Ranking([message], list(responses), scores, False, Path("r.jsonl"), line)  # pyright: ignore


def test_an_answer_stands_behind_its_prompt_and_ends(tokenizer):
    (c,) = encode([ranking("cat", "on", "mat the")], tokenizer, 99, "error", pytest.fail)
    names = tokenizer.special_tokens
    start = [tokenizer.eot_id, names["<|user|>"], *tokenizer.encode("cat"), names["<|end|>"]]
    start += [names["<|assistant|>"]]
    assert c.prompt == len(start)
    for ids, text in zip(c.answers, ("on", "mat the"), strict=True):
        assert ids.tolist() == [*start, *tokenizer.encode(text), names["<|end|>"]]


def test_special_tokens_in_a_text_stay_text(tokenizer):
    (c,) = encode([ranking("<|end|>", "a<|end|>b", "c")], tokenizer, 99, "error", pytest.fail)
    assert [(ids == end_id(tokenizer)).sum() for ids in c.answers] == [2, 2]


def test_a_long_answer_is_cut_and_a_long_prompt_an_error(tokenizer):
    said: list[str] = []
    data = [ranking("a", "b" * 30, "c", line=7)]
    (c,) = encode(data, tokenizer, 20, "error", said.append)
    assert [len(ids) for ids in c.answers] == [20, 7]
    assert c.answers[0][-1] != end_id(tokenizer)
    assert said == ["1 answers are longer than 20 tokens with their prompt: their ends are cut"]
    with pytest.raises(DataError, match=r"r\.jsonl:7: the prompt has 5 tokens, a row has 5"):
        encode(data, tokenizer, 5, "error", said.append)
    assert encode(data, tokenizer, 5, "skip", said.append) == []
    assert said[1:] == ["1 rankings are left out: their prompt fills --seq-len 5"]


def test_a_prompt_is_on_one_side_of_the_split():
    data = [ranking(f"p{i % 20}", "a", "b", line=i) for i in range(60)]
    held, learned = split(data, 0.2, seed=3)
    prompts = [{r.prompt[0]["content"] for r in part} for part in (held, learned)]
    assert len(prompts[0]) == 4
    assert len(held) == 12
    assert not prompts[0] & prompts[1]
    assert sorted(r.line for r in held + learned) == list(range(60))
    assert split(data, 0.2, seed=4)[0] != held
    assert split(data, 0.0, seed=3)[0] == []
    with pytest.raises(DataError, match="1 different prompts, 1 held out"):
        split(data[:1], 0.1, seed=3)


def comparisons(n: int, seed: int = 0) -> list[Comparison]:
    """Each answer begins with its comparison's number, so that it can be told."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        k = int(rng.integers(2, 6))
        answers = [rng.integers(100, 200, rng.integers(3, 20)) for _ in range(k)]
        for ids in answers:
            ids[0] = i
        pairs = list(itertools.combinations(range(k), 2))[: int(rng.integers(1, 4))]
        found.append(Comparison(answers, 2, pairs, [1.0] * len(pairs)))
    return found


def members(batch: dict[str, torch.Tensor]) -> Counter[int]:
    """Comparison -> its answers in a micro-batch."""
    flat = batch["inputs_BT"].flatten()
    begins = batch["last_R"] - batch["positions_BT"].flatten()[batch["last_R"]]
    return Counter(flat[begins].tolist())


def test_every_comparison_comes_once_an_epoch_whole_in_a_micro_batch():
    data = comparisons(37)
    packed = PackedComparisons(data, 24, 4, seed=5)
    epochs = []
    for epoch in range(2):
        seen: Counter[int] = Counter()
        order = []
        for step in range(epoch * 37, (epoch + 1) * 37):
            (batch,) = packed.step(step, 1)
            order += list(members(batch))
            seen += members(batch)
        assert seen == {i: len(c.answers) for i, c in enumerate(data)}
        epochs.append(order)
    assert epochs[0] != epochs[1]


def test_tokens_are_those_of_the_steps_before():
    """Also over the end of an epoch, and at it."""
    packed = PackedComparisons(comparisons(12), 24, 4, seed=5)
    read = 0
    for step in range(6):
        assert packed.tokens_before(5 * step) == read
        for batch in packed.step(step, 5):
            read += int((batch["positions_BT"].flatten()[batch["last_R"]] + 1).sum())
    assert packed.tokens_before(24) == 2 * sum(map(sum, packed.lengths))


@pytest.mark.parametrize("prompts", [5, 8])
def test_ranks_share_a_step(prompts):
    packed = PackedComparisons(comparisons(37), 24, 4, seed=5)
    alone = sum((members(b) for b in packed.step(3, prompts)), Counter())
    ranks = [packed.step(3, prompts, rank=r, world_size=2) for r in range(2)]
    assert all(ranks)
    assert sum((members(b) for batches in ranks for b in batches), Counter()) == alone
    assert len(alone) == prompts


def test_all_goes_through_everything_once():
    data = comparisons(37)
    packed = PackedComparisons(data, 24, 4, seed=5)
    parts = [packed.all(rank=r, world_size=2) for r in range(2)]
    numbers = torch.cat([b["numbers_R"] for part in parts for b in part])
    assert sorted(numbers.tolist()) == list(range(sum(len(c.answers) for c in data)))


def test_micro_batches_hold_up_to_their_rows_and_little_waste():
    packed = PackedComparisons(comparisons(60), 24, 6)
    shapes = [batch["inputs_BT"].shape for batch in packed.step(0, 60)]
    assert all(2 <= B <= 6 and T == 24 for B, T in shapes)
    used = sum(sum(lengths) for lengths in packed.lengths)
    assert used / sum(B * T for B, T in shapes) > 0.9
    last = packed.batch([0])["inputs_BT"]
    assert last.shape == (max(2, len(pack(np.array(packed.lengths[0]), 24))), 24)
    one = PackedComparisons(comparisons(1), 24, 1).step(0, 1)
    assert one[0]["inputs_BT"].shape[0] > 1, "a comparison is never torn apart"


def test_what_a_batch_says_of_its_answers():
    data = comparisons(6)
    packed = PackedComparisons(data, 24, 20)
    group = [4, 1, 3]
    batch = packed.batch(group, predict=True)
    flat, positions = batch["inputs_BT"].flatten(), batch["positions_BT"].flatten()
    texts = [ids for i in group for ids in data[i].answers]
    numbers = [packed.first[i] + k for i in group for k in range(len(data[i].answers))]
    assert batch["numbers_R"].tolist() == numbers
    place, predicted = 0, []
    for r, ids in enumerate(texts):
        end = int(batch["last_R"][r])
        begin = end - len(ids) + 1
        assert flat[begin : end + 1].tolist() == ids.tolist()
        assert positions[begin : end + 1].tolist() == list(range(len(ids)))
        assert set(batch["doc_start_BT"].flatten()[begin : end + 1].tolist()) == {begin % 24}
        # The token behind the prompt of 2 is predicted from place 1.
        predicted += list(zip(range(begin + 1, end), ids[2:].tolist(), strict=True))
        place += len(ids) - 2
    n = len(predicted)
    assert (
        list(zip(*(batch[k][:n].tolist() for k in ("places_N", "ids_N")), strict=True)) == predicted
    )
    assert set(batch["ids_N"][n:].tolist()) <= {IGNORE_INDEX}
    assert batch["counts_R1"].tolist() == [
        *(len(ids) - 2 for ids in texts),
        len(batch["ids_N"]) - n,
    ]
    pairs = list(zip(batch["better_P"].tolist(), batch["worse_P"].tolist(), strict=True))
    offsets = np.cumsum([0, *(len(data[i].answers) for i in group)]).tolist()
    assert pairs == [
        (o + a, o + b) for o, i in zip(offsets, group, strict=False) for a, b in data[i].pairs
    ]
    assert batch["weights_P"].sum().item() == pytest.approx(3)


def test_the_fingerprint_sees_every_change():
    data = comparisons(3)
    prints = {PackedComparisons(data, 24, 4, seed=s).fingerprint() for s in (0, 1)}
    prints.add(PackedComparisons(data, 25, 4).fingerprint())
    prints.add(PackedComparisons(data[::-1], 24, 4).fingerprint())
    other = Comparison(
        [ids.copy() for ids in data[0].answers], 2, data[0].pairs, data[0].differences
    )
    other.answers[0][1] += 1
    prints.add(PackedComparisons([other, *data[1:]], 24, 4).fingerprint())
    assert len(prints) == 5
    assert PackedComparisons(data, 24, 7).fingerprint() in prints, "rows are no part of the data"


def test_the_size_of_a_step():
    packed = PackedComparisons(comparisons(40), 24, 4)
    mean = sum(map(sum, packed.lengths)) / 40
    assert prompts_per_step(packed, None, round(mean * 10), 2) == 10
    assert prompts_per_step(packed, None, 10**9, 2) == 40
    assert prompts_per_step(packed, 7, 1, 2) == 7
    with pytest.raises(UsageError, match="2 processes need one each"):
        prompts_per_step(packed, 1, 1, 2)
    with pytest.raises(DataError, match="no ranking is left"):
        prompts_per_step(PackedComparisons([], 24, 4), None, 1, 1)
    assert (row_length(None, 64), row_length(32, 64)) == (64, 32)
    with pytest.raises(UsageError, match="--seq-len 65 is beyond the context of 64"):
        row_length(65, 64)


LEADS = np.array([2.0, -1.0, 0.0, 0.5])


def test_accuracy_counts_a_tie_as_a_coin():
    assert accuracy(LEADS) == pytest.approx(2.5 / 4)
    assert math.isnan(accuracy(LEADS[:0]))


def test_accuracy_by_difference_and_count():
    assert by_difference(LEADS, np.array([1.0, 2.0, 2.0, 1.0])) == [
        {"score difference": "1", "pairs": 2, "accuracy": 1.0},
        {"score difference": "2", "pairs": 2, "accuracy": 0.25},
    ]
    differences = np.arange(40) / 10
    lines = by_difference(np.where(differences > 1.9, 1.0, -1.0), differences)
    assert [line["pairs"] for line in lines] == [10, 10, 10, 10]
    assert [line["accuracy"] for line in lines] == [0, 0, 1, 1]
    assert [line["answers"] for line in by_count(LEADS, np.array([4, 2, 2, 4]))] == [2, 4]


def test_a_calibrated_model_is_found_calibrated():
    rng = np.random.default_rng(0)
    size = rng.normal(0, 1.5, 40_000)
    right = rng.random(size.shape) < 1 / (1 + np.exp(-np.abs(size)))
    lines = calibration(np.where(right, np.abs(size), -np.abs(size)))
    assert sum(int(line["pairs"]) for line in lines) == 40_000
    assert calibration_error(lines) < 0.01
    for line in lines:
        assert line["accuracy"] == pytest.approx(line["predicted"], abs=0.02)
    sure = calibration(np.where(right, 3 * np.abs(size), -3 * np.abs(size)))
    assert calibration_error(sure) > 0.1


def test_correlation_inside_groups():
    x, groups = np.array([1.0, 2.0, 11.0, 12.0]), np.array([0, 0, 1, 1])
    y = np.array([2.0, 1.0, 12.0, 11.0])
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert correlation(x, y, groups) == pytest.approx(-1)
    assert math.isnan(correlation(x, np.ones(4)))


def test_a_table_as_text():
    lines = text_table([{"a": 1, "long": 0.5}, {"a": 100, "long": 0.25}]).splitlines()
    assert lines == ["  a   long", "  1  0.500", "100  0.250"]

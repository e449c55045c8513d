"""Where a score is read, what normalises it, and the ranking loss, against plain double loops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastgpt.config import ModelConfig
from fastgpt.model import GPT
from fastgpt.preference.comparisons import Comparison, PackedComparisons, pair_loss
from fastgpt.preference.reward_model import RewardModel
from fastgpt.reward import ranking_loss, raw_scores

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64, context=32)
pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture
def model(seeded) -> RewardModel:
    model = RewardModel(CONFIG)
    with torch.no_grad():
        model.head.bias.fill_(0.3)
    return model


def texts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 64, (n,), generator=generator) for n in lengths]


def padded(rows: list[torch.Tensor], width: int, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full((len(rows), width), filler)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out, torch.tensor([len(ids) - 1 for ids in rows])


def by_hand(model: RewardModel, ids: torch.Tensor, at: int = -1) -> float:
    """The score of one text alone, unpadded, in float64 behind the trunk."""
    hidden = model.trunk(ids[None])[0, at].double()
    score = hidden @ model.head.weight[0].double() + model.head.bias.double()
    return (model.gain.double() * score + model.bias.double()).item()


def test_a_score_is_read_at_the_last_token_whatever_stands_behind(model):
    rows = texts(1, 7, 20)
    expected = [by_hand(model, ids) for ids in rows]
    for width, filler in ((20, 0), (32, 0), (32, 5)):
        scores = model.scores(*padded(rows, width, filler))
        assert scores.dtype == torch.float32
        torch.testing.assert_close(
            scores.double(), torch.tensor(expected).double(), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_place_further_is_another_score(shift, model):
    rows = texts(3, 7, 20)
    expected = torch.tensor([by_hand(model, ids) for ids in rows])
    tokens, last = padded(rows, 32, 0)
    assert ((model.scores(tokens, last + shift) - expected).abs() > 1e-3).all()


def test_values_are_the_scores_of_every_beginning(model):
    tokens = torch.stack(texts(12, 12))
    values = model.values(tokens)
    assert values.shape == (2, 12)
    for b, t in ((0, 0), (1, 5), (0, 11)):
        assert values[b, t].item() == pytest.approx(by_hand(model, tokens[b, : t + 1]), abs=1e-5)


def test_packed_scores_are_those_of_texts_alone(model):
    """And no text in a row reaches into another."""
    rows = texts(5, 9, 20, 3, 14)
    packed = PackedComparisons(
        [Comparison([ids.numpy() for ids in rows], 1, [(0, 1)], [1.0])], 32, 2
    )
    batch = packed.batch([0])
    assert batch["inputs_BT"].shape == (2, 32)
    expected = torch.tensor([by_hand(model, ids) for ids in rows])
    torch.testing.assert_close(raw_scores(model, batch), expected, atol=1e-5, rtol=0)


def test_a_new_model_has_the_trunk_of_another_and_a_head_of_the_right_size():
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, n_embd=512, n_head=8, tied=False)
    gpt = GPT(config)
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    model = RewardModel.from_gpt(gpt)
    for name, tensor in model.trunk.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert "trunk.head.weight" not in model.state_dict(), "no logits, no output layer"
    assert model.head.weight.std().item() == pytest.approx(513**-0.5, rel=0.15)
    assert model.head.bias.item() == 0
    with torch.no_grad():
        model.trunk.wte.weight.zero_()
    assert torch.equal(gpt.wte.weight, before["wte.weight"]), "a copy"


def test_normalised_scores_have_mean_0_and_std_1(model):
    rows = texts(*range(3, 30))
    tokens, last = padded(rows, 32, 0)
    places = torch.arange(len(rows)) * 32 + last
    with torch.no_grad():
        raw = model.raw(tokens, places).double()
        model.normalize(raw.mean().item(), raw.std().item())
        scores = model.scores(tokens, last).double()
        again = model.raw(tokens, places).double()
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(raw, again), "the loss does not see the normalisation"
    assert {"gain", "bias"} <= model.state_dict().keys(), "saved with the model"
    torch.testing.assert_close(model.values(tokens)[0, last[0]].double(), scores[0])


def comparisons(counts: list[int], scores: list[list[float]]) -> list[Comparison]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for count, values in zip(counts, scores, strict=True):
        prompt = torch.randint(1, 64, (3,), generator=generator)
        rows = []
        for _ in range(count):
            length = int(torch.randint(1, 9, (), generator=generator))
            rows.append(torch.cat((prompt, torch.randint(1, 64, (length,), generator=generator))))
        pairs = [(i, j) for i in range(count) for j in range(count) if values[i] > values[j]]
        differences = [values[i] - values[j] for i, j in pairs]
        found.append(Comparison([ids.numpy() for ids in rows], 3, pairs, differences))
    return found


COUNTS = [2, 4, 3, 5]
SCORES = [[1.0, 0.0], [3.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.0], [4.0, 3.0, 3.0, 3.0, -1.0]]


def double_loop(model: RewardModel, data: list[Comparison], margin: float) -> float:
    """Sum over prompts of the mean over untied pairs, float64, every answer in its own forward."""
    total = 0.0
    for c, values in zip(data, SCORES, strict=True):
        r = [by_hand(model, torch.from_numpy(ids)) for ids in c.answers]
        losses = []
        for w in range(len(r)):
            for l in range(len(r)):
                if values[w] > values[l]:
                    d = r[w] - r[l] - margin * (values[w] - values[l])
                    losses.append(-math.log(1 / (1 + math.exp(-d))))
        total += sum(losses) / len(losses)
    return total


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_the_loss_is_that_of_a_double_loop(margin, model):
    data = comparisons(COUNTS, SCORES)
    packed = PackedComparisons(data, 32, 8)
    leads, loss = ranking_loss(model, packed.batch(range(4)), margin)
    assert loss.item() == pytest.approx(double_loop(model, data, margin), rel=1e-5)
    assert len(leads) == sum(len(c.pairs) for c in data) == 1 + 5 + 2 + 7
    assert (packed.batch(range(4))["targets_BT"] == 0).sum() == 4


def test_the_loss_pushes_the_better_answer_up(model):
    batch = PackedComparisons(comparisons(COUNTS, SCORES), 32, 8).batch(range(4))
    before, loss = ranking_loss(model, batch, 0.0)
    loss.backward()
    assert model.head.bias.grad is not None
    assert abs(model.head.bias.grad.item()) < 1e-6, "it cancels in every pair"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
        after, _ = ranking_loss(model, batch, 0.0)
    assert after.mean() > before.mean()


def test_micro_batches_of_any_size_are_one_batch(model):
    data = comparisons(COUNTS, SCORES)
    whole = PackedComparisons(data, 32, 8)
    parts = PackedComparisons(data, 32, 2)
    batches = [parts.batch(group) for group in parts.groups(range(4))]
    assert len(batches) > 1
    total = sum(ranking_loss(model, batch, 0.0)[1].item() for batch in batches)
    assert total == pytest.approx(
        ranking_loss(model, whole.batch(range(4)), 0.0)[1].item(), rel=1e-5
    )


def test_the_order_of_answers_and_prompts_changes_nothing(model):
    data = comparisons(COUNTS, SCORES)
    turned = []
    for c in data[::-1]:
        k = len(c.answers)
        pairs = [(k - 1 - i, k - 1 - j) for i, j in c.pairs][::-1]
        turned.append(Comparison(c.answers[::-1], c.prompt, pairs, c.differences[::-1]))
    losses = [
        ranking_loss(model, PackedComparisons(d, 32, 8).batch(range(4)), 0.5)[1].item()
        for d in (data, turned)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_pair_loss_is_stable_far_away():
    leads = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], requires_grad=True)
    losses = [pair_loss(lead[None], torch.ones(1)) for lead in leads]
    expected = [1e4, 50.0, math.log(2), math.log1p(math.exp(-50.0)), 0.0]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-6)
    torch.stack(losses).sum().backward()
    assert leads.grad is not None
    expected = [-1.0, -1.0, -0.5, -math.exp(-50.0), 0.0]
    np.testing.assert_allclose(leads.grad.numpy(), expected, rtol=1e-5, atol=1e-30)

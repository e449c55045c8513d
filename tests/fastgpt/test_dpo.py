"""DPO against its formula in float64, token by token, and against the usual batched way."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt.config import ModelConfig
from fastgpt.distributed import World
from fastgpt.dpo import Stage, answer_log_probs
from fastgpt.model import GPT
from fastgpt.preference.comparisons import Comparison, PackedComparisons

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64, context=32)
PROMPT = 3
pytestmark = pytest.mark.usefixtures("uncompiled")


def comparisons() -> list[Comparison]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for lengths, pairs in (((5, 1), [(0, 1)]), ((4, 9, 2), [(0, 1), (0, 2)]), ((2, 6), [(0, 1)])):
        prompt = torch.randint(1, 64, (PROMPT,), generator=generator)
        answers = [torch.randint(1, 64, (n,), generator=generator) for n in lengths]
        rows = [torch.cat((prompt, ids)).numpy() for ids in answers]
        found.append(Comparison(rows, PROMPT, pairs, [1.0] * len(pairs)))
    return found


@pytest.fixture
def models(seeded) -> tuple[GPT, GPT]:
    """Policy and reference, unlike each other."""
    return GPT(CONFIG), GPT(CONFIG)


def stage(policy: GPT, reference: GPT, data: list[Comparison], **options) -> Stage:
    packed = PackedComparisons(data, 32, 4)
    world = World(0, 1, torch.device("cpu"))
    values = {"beta": 0.3, "smoothing": 0.0} | options
    made = Stage(reference, world, len(data), values["beta"], values["smoothing"], packed, None)
    made.reference = made.log_probs(packed)
    made.model = policy
    return made


def by_hand(model: GPT, ids, prompt: int = PROMPT) -> float:
    """log p of an answer, token by token, each from a forward pass of its own, float64."""
    tokens = torch.from_numpy(ids)
    total = 0.0
    for t in range(prompt, len(tokens)):
        logits = model.logits(model(tokens[None, :t]))[0, -1].double()
        total += F.log_softmax(logits, -1)[tokens[t]].item()
    return total


def test_log_probs_are_those_of_each_token_behind_the_prompt(models):
    data = comparisons()
    packed = PackedComparisons(data, 32, 4)
    found = answer_log_probs(models[0], packed.batch(range(3), predict=True))
    expected = [by_hand(models[0], ids) for c in data for ids in c.answers]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    for wrong in (PROMPT - 1, PROMPT + 1):
        shifted = [by_hand(models[0], ids, wrong) for c in data for ids in c.answers]
        assert min(abs(a - b) for a, b in zip(expected, shifted, strict=True)) > 1e-2


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_formula(smoothing, models):
    """Equation 7 of the paper, and of the smoothed labels both ways round."""
    policy, reference = models
    data = comparisons()
    made = stage(policy, reference, data, smoothing=smoothing)
    loss = made.loss(policy, made.batches(0)[0])

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected, leads = 0.0, []
    for c in data:
        ratio = [by_hand(policy, ids) - by_hand(reference, ids) for ids in c.answers]
        losses = []
        for w, l in c.pairs:
            z = 0.3 * (ratio[w] - ratio[l])
            leads.append(z)
            losses.append(-(1 - smoothing) * math.log(sigmoid(z)))
            losses[-1] -= smoothing * math.log(sigmoid(-z))
        expected += sum(losses) / len(losses)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    metrics = made.metrics()
    assert metrics["reward_margin"] == pytest.approx(sum(leads) / 4, abs=1e-5)
    assert metrics["accuracy"] == sum(z > 0 for z in leads) / 4


def test_pairs_are_the_usual_way_of_padded_rows_and_shifted_labels(models):
    """As other implementations do it: chosen and rejected concatenated, right-padded, masked."""
    policy, reference = models
    data = [c for c in comparisons() if len(c.answers) == 2]
    made = stage(policy, reference, data)
    loss = made.loss(policy, made.batches(0)[0]) / len(data)

    rows = [torch.from_numpy(c.answers[side]) for side in (0, 1) for c in data]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = tokens.clone()
    labels[:, :PROMPT] = -100
    for label, ids in zip(labels, rows, strict=True):
        label[len(ids) :] = -100

    def sums(model: GPT) -> torch.Tensor:
        log_probs = F.log_softmax(model.logits(model(tokens))[:, :-1], -1)
        target = labels[:, 1:]
        picked = log_probs.gather(-1, target.clamp_min(0)[..., None])[..., 0]
        return (picked * (target != -100)).sum(-1)

    change = (sums(policy) - sums(reference)).chunk(2)
    expected = -F.logsigmoid(0.3 * (change[0] - change[1])).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    chosen = sums(policy)[: len(data)].mean().item()
    assert made.metrics()["log_prob_chosen"] == pytest.approx(chosen, rel=1e-5)


def test_at_the_reference_the_loss_is_log_2_and_an_update_favours_the_better(models):
    policy = models[0]
    data = comparisons()
    made = stage(policy, policy, data)
    assert made.reference is not None
    kept = made.reference.clone()
    batch = made.batches(0)[0]
    before = made.loss(policy, batch)
    assert before.item() == pytest.approx(3 * math.log(2), rel=1e-6)
    assert made.metrics()["reward_margin"] == pytest.approx(0, abs=1e-6)
    before.backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            assert parameter.grad is not None
            parameter -= 1e-2 * parameter.grad
    made.batches(0)
    after = made.loss(policy, batch)
    assert after < before
    assert made.metrics()["reward_margin"] > 0
    assert torch.equal(made.reference, kept), "the reference does not follow the policy"
    assert made.batches(1)
    assert torch.equal(made.reference, kept)


def test_beta_scales_the_margin_and_micro_batches_add_up(models):
    policy, reference = models
    data = comparisons()
    margins = []
    for beta in (0.1, 0.2):
        made = stage(policy, reference, data, beta=beta)
        made.loss(policy, made.batches(0)[0])
        margins.append(made.metrics()["reward_margin"])
    assert margins[1] == pytest.approx(2 * margins[0], rel=1e-4)
    whole = stage(policy, reference, data)
    parts = stage(policy, reference, data)
    parts.train = PackedComparisons(data, 32, 1)
    batches = parts.batches(0)
    assert len(batches) > 1
    total = sum(parts.loss(policy, batch).item() for batch in batches)
    assert total == pytest.approx(whole.loss(policy, whole.batches(0)[0]).item(), rel=1e-5)
    assert parts.metrics() == pytest.approx(whole.metrics(), rel=1e-4)

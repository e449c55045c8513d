"""Rollouts against one prompt at a time, uncached, and against what the padding holds."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastgpt.config import ModelConfig
from fastgpt.decoder import draw
from fastgpt.distributed import World
from fastgpt.errors import UsageError
from fastgpt.model import GPT
from fastgpt.rl import formulas
from fastgpt.rl.rollout import Rows, sample_responses, score_rows, token_log_probs

pytestmark = pytest.mark.usefixtures("uncompiled", "seeded")

ROTARY = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=23, context=40, logit_softcap=5.0)
LEARNED = dataclasses.replace(ROTARY, position="learned", norm="layer_norm", bias=True)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [9, 8]]
END, PAD, R = 7, 22, 12
ALONE = World(0, 1, torch.device("cpu"))


def random_model(config: ModelConfig = ROTARY) -> GPT:
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def uniforms(n: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, R, generator=generator, dtype=torch.float64)


def sample(model, prompts, numbers, temperature=1.0):
    return sample_responses(
        model, prompts, numbers, temperature=temperature, end_id=END, pad_id=PAD
    )


def distribution(model: GPT, ids: list[int], temperature: float) -> torch.Tensor:
    """Of the token behind ``ids``: one text, no cache, no padding."""
    with torch.no_grad():
        return (model.logits(model(torch.tensor([ids])))[0, -1] / temperature).softmax(-1)


def sample_one(model: GPT, prompt: list[int], numbers: list[float], temperature: float):
    ids = list(prompt)
    for number in numbers:
        token, total = -1, 0.0
        probabilities = distribution(model, ids, temperature).double().tolist()
        while number >= total:
            token += 1
            total += probabilities[token]
        ids.append(token)
        if token == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("config", [ROTARY, LEARNED], ids=["rotary", "learned"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rows_are_sampled_as_if_alone(config, temperature):
    model, numbers = random_model(config), uniforms(4)
    found = sample(model, PROMPTS, numbers, temperature)
    assert found.shape == (4, R)
    for prompt, row, own in zip(PROMPTS, found.tolist(), numbers.tolist(), strict=True):
        expected = sample_one(model, prompt, own, temperature)
        assert row == expected + [PAD] * (R - len(expected))


def test_what_has_ended_is_dropped_and_changes_nothing(monkeypatch):
    """With many rows, most end early: the batch gets narrow, and every row stays what it is."""
    from fastgpt.rl import rollout

    model = GPT(dataclasses.replace(ROTARY, vocab_size=4))  # all four are about equally likely
    prompts, numbers = [[i % 4] for i in range(40)], uniforms(40)
    widths = []
    step = rollout.Decoder.step
    monkeypatch.setattr(
        rollout.Decoder,
        "step",
        lambda decoder, tokens_B: widths.append(len(tokens_B)) or step(decoder, tokens_B),
    )
    monkeypatch.setattr(f"{__name__}.END", 2)
    monkeypatch.setattr(f"{__name__}.PAD", 3)
    found = sample(model, prompts, numbers)
    assert widths[0] == 40
    assert 1 <= widths[-1] < 20
    for i in range(0, 40, 3):
        expected = sample_one(model, prompts[i], numbers[i].tolist(), 1.0)
        assert found[i].tolist() == expected + [3] * (R - len(expected))


def test_frequencies_are_the_full_softmax_at_the_temperature():
    model = random_model()
    n = 4000
    numbers = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    found = sample(model, [[5]] * n, numbers, 0.7)[:, 0]
    shares = torch.bincount(found, minlength=23) / n
    torch.testing.assert_close(shares, distribution(model, [5], 0.7), atol=1 / n, rtol=0)


def test_padding_that_could_be_an_end_is_refused():
    with pytest.raises(UsageError, match="the padding id 7 is the end-of-sequence id"):
        sample_responses(
            random_model(), PROMPTS, uniforms(4), temperature=1.0, end_id=END, pad_id=END
        )


def rows_of(prompts, ids_BR, context=40) -> Rows:
    return Rows.join(prompts, ids_BR, end_id=END, pad_id=PAD, context=context)


RESPONSES = torch.tensor(
    [[4, 7, 22, 22], [7, 22, 22, 22], [1, 2, 3, 4], [5, 5, 7, 22]]  # one ends at once, one never
)


def test_rows_hold_prompt_and_response():
    rows = rows_of(PROMPTS, RESPONSES)
    assert rows.tokens_BT.shape == (4, 32)
    responses = [[4, 7], [7], [1, 2, 3, 4], [5, 5, 7]]
    for row, prompt, response in zip(rows.tokens_BT.tolist(), PROMPTS, responses, strict=True):
        used = [*prompt, *response]
        assert row == used + [PAD] * (32 - len(used))
    assert rows.last_B.tolist() == [6, 1, 6, 4]
    assert rows.ended_B(END).tolist() == [True, True, False, True]
    assert rows.targets_N.tolist() == [token for response in responses for token in response]
    flat = rows.tokens_BT.flatten()
    assert flat[rows.places_N + 1].tolist() == rows.targets_N.tolist()
    assert rows_of(PROMPTS, RESPONSES, context=20).tokens_BT.shape == (4, 20)


@pytest.mark.parametrize("config", [ROTARY, LEARNED], ids=["rotary", "learned"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_one_text_at_a_time(config, temperature):
    """The temperature of sampling; the place before each token; no padding to be seen."""
    model, rows = random_model(config), rows_of(PROMPTS, RESPONSES)
    log_probs_N, entropy_N = token_log_probs(
        model, rows.tokens_BT, rows.places_N, rows.targets_N, temperature
    )
    expected, entropies = [], []
    for prompt, ids, mask in zip(PROMPTS, RESPONSES, rows.mask_BR, strict=True):
        text = list(prompt)
        for token in ids[mask].tolist():
            p = distribution(model, text, temperature).double()
            expected.append(math.log(p[token]))
            entropies.append(float(-(p * p.log()).sum()))
            text.append(token)
    torch.testing.assert_close(log_probs_N, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy_N, torch.tensor(entropies), atol=1e-5, rtol=1e-5)


def scored(model, rows, micro=3):
    def score(tokens_BT, some):
        return token_log_probs(model, tokens_BT, some.places_N, some.targets_N, 1.0)[0]

    return score_rows(rows, score, ALONE, micro)


def test_what_the_padding_holds_reaches_nothing():
    model, rows = random_model(), rows_of(PROMPTS, RESPONSES)
    before = scored(model, rows)
    used = torch.arange(32) <= rows.last_B[:, None]
    other = dataclasses.replace(rows, tokens_BT=torch.where(used, rows.tokens_BT, END))
    assert torch.equal(scored(model, other), before)
    assert (before[~rows.mask_BR] == 0).all()
    assert torch.equal(scored(model, rows, micro=4) != 0, rows.mask_BR)
    torch.testing.assert_close(scored(model, rows, micro=1), before)


def test_the_kl_of_the_own_samples_is_not_negative_in_expectation():
    """Samples, log-probabilities and the estimator together: a bias anywhere shows as KL < 0."""
    policy, reference = random_model(), random_model()
    prompts, numbers = [[1 + i % 20] for i in range(200)], uniforms(200)
    rows = rows_of(prompts, sample(policy, prompts, numbers))
    kl_BR = formulas.kl_estimate(scored(policy, rows, 64), scored(reference, rows, 64), "k1")
    mean = formulas.masked_mean(kl_BR, rows.mask_BR)
    spread = formulas.masked_var(kl_BR, rows.mask_BR).sqrt() / rows.mask_BR.sum().sqrt()
    assert mean > 5 * spread
    # The reference's own samples say the same of it, with the sign turned.
    rows = rows_of(prompts, sample(reference, prompts, numbers))
    kl_BR = formulas.kl_estimate(scored(policy, rows, 64), scored(reference, rows, 64), "k1")
    assert formulas.masked_mean(kl_BR, rows.mask_BR) < -5 * spread


@pytest.mark.parametrize("vocab_size", [1, 100, 128, 129, 1000])
def test_draw_is_where_the_running_sum_passes_the_number(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    probs = torch.rand(400, vocab_size, generator=generator) ** 6
    probs[torch.rand(probs.shape, generator=generator) < 0.5] = 0.0
    probs[:, vocab_size // 2] += 1e-3
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    uniforms[:100], uniforms[100:200] = 0.0, 1 - 2**-53
    drawn = draw(probs, uniforms)
    sums = probs.double().numpy().cumsum(1)
    rows = zip(sums, (uniforms.numpy() * sums[:, -1]), strict=True)
    assert drawn.tolist() == [int(np.searchsorted(row, place, "right")) for row, place in rows]
    assert (probs.gather(1, drawn[:, None]) > 0).all()

"""The formulas against their definitions: Python loops, float64, one token at a time."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from fastgpt.rl import formulas

B, R = 5, 7
LENGTHS = [7, 1, 4, 3, 6]  # the first one has no end
MASK = torch.arange(R) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def kept(x):
    """The masked values of (B, R) as a flat list."""
    return [float(x[b, t]) for b in range(B) for t in range(LENGTHS[b])]


def poisoned(x):
    """What stands in the padding must not matter, and NaN would show."""
    return torch.where(MASK, x, float("nan"))


def test_a_mask_ends_with_the_first_end():
    ids = torch.tensor([[5, 6, 9, 9, 7], [9, 5, 5, 9, 5], [5, 6, 7, 8, 5], [5, 6, 7, 8, 9]])
    mask = formulas.response_mask(ids, 9)
    assert mask.sum(1).tolist() == [3, 1, 5, 5]
    assert (mask.int().diff(dim=1) <= 0).all()
    assert formulas.last_places(mask).tolist() == [2, 0, 4, 4]


def test_mean_variance_and_whitening_see_the_mask_alone(draw):
    x = draw(B, R) * 3 + 2
    values = kept(x)
    assert float(formulas.masked_mean(poisoned(x), MASK)) == pytest.approx(statistics.mean(values))
    # The unbiased one: statistics.pvariance would be 4 % less here.
    assert float(formulas.masked_var(poisoned(x), MASK)) == pytest.approx(
        statistics.variance(values)
    )
    white = formulas.masked_whiten(poisoned(x), MASK)
    assert (white[~MASK] == 0).all()
    assert statistics.mean(kept(white)) == pytest.approx(0, abs=1e-12)
    assert statistics.stdev(kept(white)) == pytest.approx(1)
    scaled = formulas.masked_whiten(poisoned(x), MASK, shift_mean=False)
    assert (scaled[~MASK] == 0).all()
    assert statistics.mean(kept(scaled)) == pytest.approx(statistics.mean(values))
    assert statistics.stdev(kept(scaled)) == pytest.approx(1)


def test_degenerate_whitening_is_finite():
    one = torch.zeros(2, 3, dtype=torch.bool)
    one[0, 0] = True
    assert formulas.masked_whiten(torch.ones(2, 3), one).abs().sum() == 0
    assert formulas.masked_whiten(torch.ones(2, 3), torch.zeros_like(one)).abs().sum() == 0


def exact_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(("kind", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_estimators_in_expectation(kind, unbiased, draw):
    """The expectation under p is a sum over the vocabulary: exact, no sampling."""
    log_p, log_q = (0.7 * draw(11)).log_softmax(-1), (0.7 * draw(11)).log_softmax(-1)
    mean = float((log_p.exp() * formulas.kl_estimate(log_p, log_q, kind)).sum())
    kl = exact_kl(log_p.exp().tolist(), log_q.exp().tolist())
    assert kl > 0.1
    assert mean > 0
    # The other direction, or the other sign, is off by much more than this.
    assert abs(exact_kl(log_q.exp().tolist(), log_p.exp().tolist()) - kl) > 0.02 * kl
    if unbiased:
        assert mean == pytest.approx(kl, rel=1e-9)
    else:
        assert mean == pytest.approx(kl, rel=0.5)


def test_estimators_token_by_token():
    log_p, log_q = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    assert formulas.kl_estimate(log_p, log_q, "k1").tolist() == [0.5, -1.0, 0.0]
    assert formulas.kl_estimate(log_p, log_q, "k2").tolist() == [0.125, 0.5, 0.0]
    expected = [math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1, 0.0]
    assert formulas.kl_estimate(log_p, log_q, "k3").tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(
        formulas.kl_estimate(torch.tensor([-1e4]), torch.tensor([0.0]), "k3")
    ).all()


def test_only_the_gradient_of_k2_is_that_of_the_kl(draw):
    logits = draw(9).requires_grad_()
    log_q = draw(9).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    (true,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits)

    def of_loss(kind):
        log_p = logits.log_softmax(-1)
        weighted = log_p.detach().exp() * formulas.kl_estimate(log_p, log_q, kind)
        return torch.autograd.grad(weighted.sum(), logits)[0]

    torch.testing.assert_close(of_loss("k2"), true)
    assert not torch.allclose(of_loss("k3"), true, rtol=0.1)
    torch.testing.assert_close(of_loss("k1"), torch.zeros(9, dtype=torch.float64))


def test_the_controller_moves_towards_its_target():
    def step(kl, episodes=500):
        return formulas.adapted_kl_coef(0.2, kl, target=6.0, episodes=episodes, horizon=10000)

    assert step(6.0) == 0.2
    assert step(6.6) == pytest.approx(0.2 * (1 + 0.1 * 0.05))
    assert step(5.4) == pytest.approx(0.2 * (1 - 0.1 * 0.05))
    # An error counts as 20 % at most.
    assert step(60.0) == pytest.approx(0.2 * 1.01)
    assert step(-3.0) == pytest.approx(0.2 * 0.99)
    assert step(60.0, episodes=1000) == pytest.approx(0.2 * 1.02)


def test_the_score_is_at_the_first_end_or_the_last_token(draw):
    log_p, log_ref, scores = draw(B, R), draw(B, R), draw(B)
    rewards = formulas.token_rewards(scores, poisoned(log_p), poisoned(log_ref), MASK, 0.3)
    for b in range(B):
        for t in range(R):
            expected = 0.0
            if t < LENGTHS[b]:
                expected = -0.3 * float(log_p[b, t] - log_ref[b, t])
            if t == LENGTHS[b] - 1:
                expected += float(scores[b])
            assert float(rewards[b, t]) == pytest.approx(expected, abs=1e-12), (b, t)


def test_scores_are_normalised_then_clipped_then_penalised():
    scores = torch.tensor([1.0, -7.0, 4.0, 0.5])
    ended = torch.tensor([True, True, False, False])
    plain = formulas.response_scores(scores, ended)
    assert torch.equal(plain, scores)
    clipped = formulas.response_scores(scores, ended, clip=2.0, missing_end_penalty=1.5)
    assert clipped.tolist() == [1.0, -2.0, 2.0 - 1.5, 0.5 - 1.5]
    normal = formulas.response_scores(scores, ended, normalize=True, missing_end_penalty=1.0)
    mean, std = statistics.mean(scores.tolist()), statistics.stdev(scores.tolist())
    expected = [(s - mean) / std - (not e) for s, e in zip(scores.tolist(), ended, strict=True)]
    assert normal.tolist() == pytest.approx(expected, abs=1e-6)


GROUPS = [[1.0, 0.0, 0.0, 1.0], [2.0, 5.0, -1.0, 0.0], [3.0, 3.0, 3.0, 3.0]]


def test_group_advantages():
    scores = torch.tensor(GROUPS, dtype=torch.float64).flatten()
    expected = [
        (s - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        for group in GROUPS
        for s in group
    ]
    assert formulas.group_advantages(scores, 4).tolist() == pytest.approx(expected)
    centred = [s - statistics.mean(group) for group in GROUPS for s in group]
    assert formulas.group_advantages(scores, 4, scale=False).tolist() == pytest.approx(centred)


def test_leave_one_out_advantages():
    scores = torch.tensor(GROUPS, dtype=torch.float64).flatten()
    expected = [
        group[i] - statistics.mean(group[:i] + group[i + 1 :]) for group in GROUPS for i in range(4)
    ]
    found = formulas.leave_one_out_advantages(scores, 4)
    assert found.tolist() == pytest.approx(expected)
    # Ahmadian et al., equation 9: G / (G - 1) times the score against the mean of all.
    centred = formulas.group_advantages(scores, 4, scale=False)
    torch.testing.assert_close(found, centred * 4 / 3)


@pytest.mark.parametrize("score", [33.3, 1000.1, 12345.678, 0.7])
@pytest.mark.parametrize("group", [3, 8, 10])
def test_equal_scores_teach_nothing(group, score):
    """The rounding of their mean, over a deviation of nothing but 1e-4, would."""
    scores = torch.full((2 * group,), score)
    for scale in (True, False):
        assert (formulas.group_advantages(scores, group, scale=scale).abs() < 1e-8).all()
    assert (formulas.leave_one_out_advantages(scores, group).abs() < 1e-8).all()
    assert (formulas.masked_whiten(scores, scores > 0).abs() < 1e-3).all()
    assert formulas.group_advantages(scores, group).dtype == torch.float32


def test_policy_loss_token_by_token():
    ratios = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0]
    for advantage in (2.0, -2.0):
        new = torch.tensor(ratios).log().requires_grad_()
        loss = formulas.policy_loss(new, torch.zeros(7), torch.full((7,), advantage), clip=0.2)
        expected = [-min(advantage * r, advantage * min(max(r, 0.8), 1.2)) for r in ratios]
        assert loss.tolist() == pytest.approx(expected, rel=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), new)
        # A good token's ratio is pushed no further above 1.2, a bad one's no further below 0.8.
        still = [r > 1.2 if advantage > 0 else r < 0.8 for r in ratios]
        assert [g == 0 for g in gradient.tolist()] == still
        pushed = [-advantage * r * (not s) for r, s in zip(ratios, still, strict=True)]
        assert gradient.tolist() == pytest.approx(pushed, rel=1e-6)


def test_ratios_are_finite_whatever_happened():
    far = torch.tensor([300.0, -300.0])
    assert torch.isfinite(formulas.probability_ratio(far, torch.zeros(2))).all()
    assert formulas.probability_ratio(torch.tensor([0.25]), torch.tensor([0.25])).item() == 1.0


def test_value_loss_token_by_token():
    for value, old, target in [
        (1.0, 0.0, 2.0),
        (1.0, 0.0, -2.0),
        (0.1, 0.0, 5.0),
        (-1.0, 0.0, 0.0),
    ]:
        held = old + min(max(value - old, -0.2), 0.2)
        expected = 0.5 * max((value - target) ** 2, (held - target) ** 2)
        found = formulas.value_loss(*(torch.tensor([x]) for x in (value, old, target)), clip=0.2)
        assert found.item() == pytest.approx(expected)


def test_explained_variance(draw):
    returns = draw(B, R)
    assert formulas.explained_variance(returns + 3, returns, MASK) == pytest.approx(1)
    assert formulas.explained_variance(torch.zeros(B, R), returns, MASK) == pytest.approx(0)
    values = draw(B, R)
    unexplained = statistics.variance(kept(returns - values))
    expected = 1 - unexplained / statistics.variance(kept(returns))
    assert formulas.explained_variance(values, returns, MASK) == pytest.approx(expected)
    assert formulas.explained_variance(values, torch.ones(B, R), MASK) == 0


def test_distinct_bigrams():
    assert formulas.distinct_n([[1, 2, 1, 2, 1]]) == 2 / 4
    assert formulas.distinct_n([[1, 2], [1, 2], [3]]) == 1 / 2  # no pair spans two rows
    assert formulas.distinct_n([[1, 2, 3]], 3) == 1
    assert formulas.distinct_n([[], [4]]) == 0

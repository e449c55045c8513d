"""Bradley-Terry ratings against closed forms, a search that knows nothing of Newton, and luck."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from fastgpt.assess.ratings import MEAN, POINTS, PRIOR_TIES, Vote, bradley_terry, leaderboard
from fastgpt.errors import DataError


def duel(wins: int, losses: int, ties: int = 0) -> list[Vote]:
    outcomes = [1.0] * wins + [0.0] * losses + [0.5] * ties
    return [Vote(i, "x", "y", outcome) for i, outcome in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("wins", "losses", "ties"), [(30, 10, 0), (7, 7, 3), (0, 5, 2), (64, 0, 0)]
)
def test_two_models_have_the_odds_of_their_wins(wins, losses, ties):
    rows = {row.model: row for row in leaderboard(duel(wins, losses, ties), samples=10)}
    half = (ties + PRIOR_TIES) / 2
    gap = POINTS * math.log((wins + half) / (losses + half))
    assert rows["x"].rating - rows["y"].rating == pytest.approx(gap, abs=1e-6)
    assert rows["x"].rating + rows["y"].rating == pytest.approx(2 * MEAN)
    assert rows["x"].wins == pytest.approx((wins + ties / 2) / (wins + losses + ties))
    assert rows["x"].votes == rows["y"].votes == wins + losses + ties


def test_ratings_maximise_the_likelihood():
    """Coordinate search in float64, from the definition."""
    rng = np.random.default_rng(3)
    wins = rng.integers(0, 20, (4, 4)).astype(float)

    def log_likelihood(theta):
        total = 0.0
        for i in range(4):
            for j in range(4):
                if i != j:
                    weight = wins[i, j] + PRIOR_TIES / 2
                    total -= weight * math.log1p(math.exp(theta[j] - theta[i]))
        return total

    best, width = np.zeros(4), 1.0
    while width > 1e-9:
        moves = [best + width * sign * row for row in np.eye(4) for sign in (1, -1)]
        top = max(moves, key=log_likelihood)
        best, width = (
            (top, width) if log_likelihood(top) > log_likelihood(best) else (best, width / 2)
        )
    np.testing.assert_allclose(
        bradley_terry(wins), MEAN + POINTS * (best - best.mean()), rtol=0, atol=1e-4
    )


def test_order_of_votes_and_of_names_changes_nothing():
    rng = random.Random(0)
    votes = [
        Vote(i % 40, *rng.sample(["base", "sft", "rl"], 2), rng.choice([0.0, 0.5, 1.0]))
        for i in range(200)
    ]
    turned = [Vote(v.prompt, v.b, v.a, 1 - v.outcome) for v in votes]
    rng.shuffle(turned)
    assert leaderboard(votes, samples=50) == leaderboard(turned, samples=50)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Known strengths, 60 worlds of 150 prompts: 95 % intervals of the gap to the mean."""
    truth = np.array([0.8, 0.0, -0.8])
    names = ["a", "b", "c"]
    rng, held = random.Random(5), 0
    for world in range(60):
        votes = []
        for prompt in range(150):
            i, j = rng.sample(range(3), 2)
            won = rng.random() < 1 / (1 + math.exp(truth[j] - truth[i]))
            votes.append(Vote(prompt, names[i], names[j], float(won)))
        for row in leaderboard(votes, samples=200, seed=world):
            held += row.low <= MEAN + POINTS * truth[names.index(row.model)] <= row.high
    assert 0.88 <= held / 180 <= 0.99


def test_votes_on_one_prompt_count_as_one_draw():
    """The same ten prompts voted on 50 times leave the doubt of ten, not of 500."""
    few = leaderboard(duel(7, 3), samples=400)
    many = leaderboard([vote for vote in duel(7, 3) for _ in range(50)], samples=400)
    assert many[0].high - many[0].low > 0.8 * (few[0].high - few[0].low)


def test_rank_counts_only_models_that_are_surely_better():
    sure = leaderboard(duel(95, 5), samples=200)
    assert [row.rank for row in sure] == [1, 2]
    unsure = leaderboard(duel(6, 5), samples=200)
    assert [row.rank for row in unsure] == [1, 1]


def test_no_votes_and_a_model_against_itself_are_refused():
    with pytest.raises(DataError, match="no votes"):
        leaderboard([])
    with pytest.raises(DataError, match="prompt 4: a vote of 'x' against itself"):
        leaderboard([Vote(4, "x", "x", 1.0)])

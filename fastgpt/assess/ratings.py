"""Bradley-Terry ratings of models from pairwise votes, with bootstrap intervals: the leaderboard.

Model i beats model j with probability sigmoid(theta_i - theta_j) (Bradley & Terry 1952); a tie is
half a win each way. Ratings are maximum likelihood on the scale of Elo, 400 / ln 10 points a unit,
with mean 1000. One virtual tie between every two models keeps a model that never lost finite.

Shape suffixes: P prompts, M models, S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgpt.errors import DataError

POINTS, MEAN = 400 / math.log(10), 1000.0
PRIOR_TIES = 1.0


@dataclass(frozen=True)
class Vote:
    """Two answers to one prompt compared: ``outcome`` is 1 if a won, 0 if b won, 0.5 for a tie."""

    prompt: int
    a: str
    b: str
    outcome: float


@dataclass(frozen=True)
class Standing:
    """A line of the leaderboard.

    ``rank`` is 1 + the number of models that are better beyond doubt: whose interval lies wholly
    above. ``low`` and ``high`` bound the middle 95 % of the bootstrap over prompts.
    """

    rank: int
    model: str
    rating: float
    low: float
    high: float
    votes: int
    wins: float
    """Share of its votes that it won, ties counted half."""


def leaderboard(votes: Sequence[Vote], *, samples: int = 1000, seed: int = 0) -> list[Standing]:
    """Rate the models of ``votes``, best first.

    The bootstrap draws whole prompts: votes on the same prompt are not independent.

    Raises:
        DataError: no votes, or a model against itself.
    """
    models = sorted({name for vote in votes for name in (vote.a, vote.b)})
    wins_PMM = _wins_by_prompt(votes, models)
    total_MM = wins_PMM.sum(0)
    ratings_M = bradley_terry(total_MM)
    draws_SP = np.random.default_rng(seed).multinomial(
        len(wins_PMM), np.full(len(wins_PMM), 1 / len(wins_PMM)), size=samples
    )
    resampled_SMM = np.tensordot(draws_SP.astype(np.float64), wins_PMM, axes=1)
    low_M, high_M = np.percentile(bradley_terry(resampled_SMM), [2.5, 97.5], axis=0)
    played_M = total_MM.sum(1) + total_MM.sum(0)
    rows = [
        Standing(
            1 + int((low_M > high_M[m]).sum()),
            models[m],
            float(ratings_M[m]),
            float(low_M[m]),
            float(high_M[m]),
            round(played_M[m]),
            float(total_MM[m].sum() / played_M[m]),
        )
        for m in range(len(models))
    ]
    return sorted(rows, key=lambda row: -row.rating)


def bradley_terry(wins: np.ndarray, *, iterations: int = 100) -> np.ndarray:
    """Ratings (..., M) from win counts (..., M, M); ``wins[i, j]`` counts i over j.

    Newton's method on the log-likelihood, which is concave; the mean is held at zero.
    """
    M = wins.shape[-1]
    others = 1.0 - np.eye(M)
    wins = (wins + PRIOR_TIES / 2) * others
    games = wins + np.swapaxes(wins, -1, -2)
    theta = np.zeros(wins.shape[:-1])
    for _ in range(iterations):
        p = 1 / (1 + np.exp(np.clip(theta[..., None, :] - theta[..., :, None], -500, 500)))
        gradient = wins.sum(-1) - (games * p).sum(-1)
        curvature = games * p * (1 - p)
        hessian = curvature.sum(-1)[..., None] * np.eye(M) - curvature + 1 / M
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        theta += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return MEAN + POINTS * (theta - theta.mean(-1, keepdims=True))


def _wins_by_prompt(votes: Sequence[Vote], models: Sequence[str]) -> np.ndarray:
    if not votes:
        raise DataError("no votes to rate models by")
    index = {name: i for i, name in enumerate(models)}
    prompts = {prompt: i for i, prompt in enumerate(sorted({vote.prompt for vote in votes}))}
    wins_PMM = np.zeros((len(prompts), len(models), len(models)))
    for vote in votes:
        if vote.a == vote.b:
            raise DataError(f"prompt {vote.prompt}: a vote of {vote.a!r} against itself")
        a, b, prompt = index[vote.a], index[vote.b], prompts[vote.prompt]
        wins_PMM[prompt, a, b] += vote.outcome
        wins_PMM[prompt, b, a] += 1 - vote.outcome
    return wins_PMM

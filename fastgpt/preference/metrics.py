"""How well scores tell better answers from worse ones. Arrays over pairs or answers; no torch.

A pair's lead is the score of its better answer minus that of the worse: the pair is right when the
lead is above 0, and half right when it is 0, as a coin would be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

Table = list[dict[str, float | int | str]]
"""Lines of a table, the same keys in each."""

_MOST_LEVELS = 5
_BUCKETS = 4


def accuracy(leads: np.ndarray) -> float:
    """Share of pairs that are right; NaN without pairs."""
    return float(np.mean((leads > 0) + 0.5 * (leads == 0))) if len(leads) else float("nan")


def by_difference(leads: np.ndarray, differences: np.ndarray) -> Table:
    """Accuracy by how far apart the data says that the answers are.

    One line for each difference where there are few, as with ranks; else quarters of the pairs.
    """
    levels = np.unique(differences)
    if len(levels) > _MOST_LEVELS:
        edges = np.unique(np.quantile(differences, np.linspace(0, 1, _BUCKETS + 1)))
        bucket = np.clip(np.searchsorted(edges, differences, side="right") - 1, 0, len(edges) - 2)
        names = [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]
    else:
        bucket = np.searchsorted(levels, differences)
        names = [f"{level:.3g}" for level in levels]
    return [
        {"score difference": name, "pairs": int(here.sum()), "accuracy": accuracy(leads[here])}
        for name, here in ((name, bucket == i) for i, name in enumerate(names))
        if here.any()
    ]


def by_count(leads: np.ndarray, counts: np.ndarray) -> Table:
    """Accuracy by the number of answers of the prompt."""
    return [
        {
            "answers": int(k),
            "pairs": int((counts == k).sum()),
            "accuracy": accuracy(leads[counts == k]),
        }
        for k in np.unique(counts)
    ]


def calibration(leads: np.ndarray, bins: int = 5) -> Table:
    """Accuracy by the probability that the Bradley-Terry model gives its own choice.

    ``leads`` are in nats, as they were trained: the model picks the answer it scores higher, with
    probability sigmoid(|lead|), at least one half. Bins of equal width from there to 1.
    """
    predicted = 1 / (1 + np.exp(-np.abs(leads)))
    place = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    lines: Table = []
    for i in range(bins):
        here = place == i
        if here.any():
            low, high = 0.5 + 0.5 * i / bins, 0.5 + 0.5 * (i + 1) / bins
            lines.append(
                {
                    "probability": f"{low:.2f} to {high:.2f}",
                    "pairs": int(here.sum()),
                    "predicted": float(predicted[here].mean()),
                    "accuracy": accuracy(leads[here]),
                }
            )
    return lines


def calibration_error(lines: Table) -> float:
    """Expected calibration error: mean over pairs of |predicted - accuracy| of their bin."""
    pairs = np.array([line["pairs"] for line in lines], dtype=float)
    gaps = np.array([float(line["predicted"]) - float(line["accuracy"]) for line in lines])
    return float((pairs * np.abs(gaps)).sum() / pairs.sum())


def correlation(x: np.ndarray, y: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Pearson's r, with ``groups`` of what differs inside a group; NaN where nothing does."""
    if groups is not None:
        x, y = (values - _group_means(values, groups) for values in (x, y))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def _group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return (np.bincount(place, weights=values) / counts)[place]


def text_table(lines: Table) -> str:
    """The lines in columns, for a terminal."""
    if not lines:
        return ""
    cells = [list(lines[0]), *([_text(value) for value in line.values()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )


def _text(value: float | int | str) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def leads_of(scores: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Leads of (better, worse) ``pairs`` of indices into ``scores``."""
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return scores[both[:, 0]] - scores[both[:, 1]]

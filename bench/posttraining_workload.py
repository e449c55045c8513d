"""What all contenders of bench_posttraining.py do: sizes, data, and how a rate is computed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

VOCAB, CONTEXT = 8192, 256
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256}
PAD, EOS, FIRST = 0, 1, 16
"""Padding, end of a text, and the least id that stands in one."""
SFT_ROWS, PAIRS, SAMPLES, GROUP = 8, 16, 32, 8
RESPONSE = 48
"""Tokens sampled by ppo and grpo."""
ROWS, READ, NEW = 16, 64, 128
"""Of generate: rows, tokens of a prompt, new tokens."""
RATES = {"sft": 1e-3, "reward": 1e-3, "ppo": 1e-5, "grpo": 1e-5}
"""Learning rates, the same on both sides."""


def text(rng: Any, length: int, power: int = 8) -> list[int]:
    """Ids of which small ones are common, so that there is something to learn."""
    return (FIRST + rng.random(length) ** power * (VOCAB - FIRST)).astype(int).tolist()


def chats(steps: int) -> list[tuple[list[int], int]]:
    """Ids of chats for so many steps, 24 to 120 each, and how many are the question, a third."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = rng.integers(24, 121, 30 * steps).tolist()
    return [([*text(rng, n - 1), EOS], n // 3) for n in lengths]


def pairs(count: int) -> list[tuple[int, list[int], list[int]]]:
    """Length of the prompt, and two texts that begin with it; the better one has common ids."""
    import numpy as np

    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        prompt = text(rng, int(rng.integers(8, 25)))
        better, worse = (
            [*prompt, *text(rng, int(rng.integers(32, 129)) - len(prompt) - 1, power), EOS]
            for power in (8, 4)
        )
        found.append((len(prompt), better, worse))
    return found


def prompts(count: int, shortest: int = 4, longest: int = 16) -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(2)
    return [text(rng, int(n)) for n in rng.integers(shortest, longest + 1, count)]


def common_ids(ids: Sequence[int]) -> float:
    """The reward function of grpo: the part of the ids that are small."""
    return sum(i < VOCAB // 16 for i in ids) / max(1, len(ids))


def enlarge(model: Any) -> None:
    """Larger weights than at the start: what is most probable then depends on the context."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)


def rates(marks: Sequence[float], counts: Sequence[float]) -> dict[str, list[float]]:
    """Per second from each mark to the next; counts beyond are of a step that nothing ended."""
    seconds = [b - a for a, b in itertools.pairwise(marks)]
    done = list(zip(counts, seconds, strict=False))
    return {"counts": [n for n, _ in done], "rates": [n / s for n, s in done]}

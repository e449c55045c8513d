"""Shapes that no model can have are refused; schedules against values by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fastgpt.config import ModelConfig, OptimConfig, TrainConfig
from fastgpt.errors import UsageError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"context": 0}, "context is 0"),
        ({"n_kv_head": -2}, "kv_heads is -2"),
        ({"head_dim": -8}, "attn_dim is -8"),
        ({"n_embd": 100, "n_head": 6}, "n_embd 100 is not a multiple of n_head 6"),
        ({"n_kv_head": 4}, "n_head 6 is not a multiple of n_kv_head 4"),
        ({"head_dim": 9}, "even head_dim, not 9"),
        ({"n_embd": 60_000_000}, "is one of the sizes a typo"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(ModelConfig(), **change).check()


def test_possible_shapes():
    ModelConfig().check()
    ModelConfig(n_head=6, n_kv_head=2).check()
    ModelConfig(n_embd=100, n_head=6, head_dim=16).check()
    ModelConfig(head_dim=9, position="learned").check()


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch_tokens", 0), ("log_every", 0), ("skip_budget", 0), ("keep_last", -1)],
)
def test_impossible_training(name, value):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}: it must be"):
        dataclasses.replace(TrainConfig(), **{name: value}).check()


def multipliers(steps: int, **options) -> list[float]:
    optim = OptimConfig(**options)
    return [optim.multiplier(step, steps) for step in range(steps)]


def test_cosine():
    values = multipliers(12, schedule="cosine", warmup=2, min_lr=0.1)
    # Half a cosine over the 10 steps after the warm-up, at 0, 1/10, ..., 9/10 of the way.
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]
    assert values == pytest.approx([0.5, 1.0, *expected])
    assert values[2] == 1.0
    assert values[7] == pytest.approx(0.55)  # half way


def test_linear():
    values = multipliers(6, schedule="linear", warmup=0)
    assert values == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert multipliers(4, schedule="linear", warmup=0, min_lr=0.2) == pytest.approx(
        [1.0, 0.8, 0.6, 0.4]
    )


def test_warmup_stable_decay():
    values = multipliers(12, schedule="wsd", warmup=2, decay=0.5)
    assert values == pytest.approx([0.5, *[1] * 7, 0.8, 0.6, 0.4, 0.2])
    assert multipliers(5, schedule="wsd", warmup=0, decay=0.0) == [1.0] * 5


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(0.0, 100, 0), (0.02, 100, 2), (0.02, 120, 3), (0.5, 7, 4), (1, 100, 1), (25, 100, 25)],
)
def test_warmup_is_a_fraction_or_a_number_of_steps(warmup, steps, expected):
    assert OptimConfig(warmup=warmup).warmup_steps(steps) == expected


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 17])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 40])
def test_every_step_learns_and_none_exceeds_the_peak(schedule, steps, warmup):
    values = multipliers(steps, schedule=schedule, warmup=warmup)
    assert all(0 < value <= 1 for value in values)

"""The steps that `pytest bench/` times: they reach into the trainer, whose changes break them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgpt import trainer


class Benchmark:
    """What the steps use of pytest-benchmark's fixture; runs what it is given once, untimed."""

    def __init__(self) -> None:
        self.stats = {"median": 1.0}
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, run: Callable[[], Any], rounds: int, iterations: int) -> None:
        run()


@pytest.mark.parametrize(
    ("module", "step"),
    [
        ("bench_posttraining", "test_sft_step"),
        pytest.param("bench_train", "test_training_step", marks=pytest.mark.full),
    ],
)
def test_step(module, step, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    monkeypatch.setattr(
        trainer, "compile_blocks", lambda model, varying: None
    )  # half a minute each
    benchmark = Benchmark()
    getattr(importlib.import_module(module), step)(benchmark)
    assert benchmark.extra_info["tokens_per_s"] > 0

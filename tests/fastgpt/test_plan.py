"""--dry-run against what a run then takes."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from fastgpt import cli, hardware
from fastgpt.config import OptimConfig, PretrainConfig
from fastgpt.distributed import World
from fastgpt.model import GPT
from fastgpt.optim import Optimizers
from fastgpt.plan import batch_shape, checkpoint_bytes, plan
from fastgpt.presets import PRESETS


@pytest.fixture
def one_teraflop(monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: 1e12)


def configuration(name: str, **train) -> PretrainConfig:
    config = cli.from_tree(PretrainConfig, PRESETS[name] | {"preset": name}, name)
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, device="cpu", dtype="float32", **train)
    )


@pytest.mark.usefixtures("one_teraflop")
def test_figures():
    figures = plan(configuration("cpu-tiny", steps=100, batch_tokens=1000, keep_last=3))
    model = configuration("cpu-tiny").model
    assert figures["parameters"] == f"{model.n_params():,}"
    assert figures["batch"] == "3 sequences of 256 tokens, 3 at a time"
    assert figures["tokens"] == f"{100 * 3 * 256:,}"
    flops = 100 * 3 * 256 * model.flops_per_token(256)
    assert float(figures["compute"].split()[0]) == pytest.approx(flops, rel=0.01)
    assert "4 of them at most" in figures["disk"]
    assert re.match(r"\d+ s \(estimate: 30% of 1 TFLOP/s\)", figures["time"])
    assert int(figures["time"].split()[0]) == pytest.approx(flops / 0.3e12, abs=0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["cpu-tiny", "palm-8b", "gpt2-small"])
def test_disk_is_what_a_checkpoint_takes(name, optimizer):
    config = dataclasses.replace(configuration(name), optim=OptimConfig(optimizer=optimizer))
    with torch.device("meta"):
        model = GPT(config.model)
    taken = sum(4 * p.numel() for p in model.parameters())
    for part in Optimizers(model, config.optim)._optimizers:
        moments = 1 if isinstance(part, torch.optim.Muon) else 2
        for group in part.param_groups:
            taken += sum(4 * moments * p.numel() for p in group["params"])
    assert checkpoint_bytes(config) == taken


@pytest.mark.usefixtures("one_teraflop")
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan(name):
    figures = plan(configuration(name))
    assert all(figures.values())
    assert float(figures["memory"].split()[0]) > 0


@pytest.mark.parametrize(
    ("tokens", "micro_batch", "device", "size", "expected"),
    [
        (8192, None, "cpu", 1, (32, 32)),
        (16384, None, "cpu", 1, (64, 32)),  # 8k tokens at a time
        (16384, None, "cuda", 1, (64, 64)),  # 16k
        (16384, None, "cpu", 4, (64, 16)),  # a process has a quarter
        (256 * 35, None, "cpu", 1, (35, 7)),  # 32 would not divide 35
        (256 * 37, None, "cpu", 1, (37, 1)),
        (100, None, "cpu", 1, (1, 1)),
        (8192, 3, "cpu", 1, (32, 3)),
    ],
)
def test_batch_shape(tokens, micro_batch, device, size, expected):
    config = configuration("cpu-tiny", batch_tokens=tokens, micro_batch=micro_batch)
    assert batch_shape(config.model, config.train, World(0, size, torch.device(device))) == expected

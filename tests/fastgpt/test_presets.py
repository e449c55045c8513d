"""Presets against the sizes that their papers publish."""

from __future__ import annotations

import fnmatch

import pytest
import torch

from fastgpt import presets
from fastgpt.config import ModelConfig, OptimConfig
from fastgpt.errors import UsageError
from fastgpt.model import GPT
from fastgpt.presets import PRESETS, overrides

# Parameter counts of the released weights.
RELEASED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
}
# Billions, as the papers' tables round them.
PALM = {"palm-8b": 8.63, "palm-62b": 62.50, "palm-540b": 540.35}
GPT3 = {
    "gpt3-small": 0.125,
    "gpt3-medium": 0.350,
    "gpt3-large": 0.760,
    "gpt3-xl": 1.3,
    "gpt3-2.7b": 2.7,
    "gpt3-6.7b": 6.7,
    "gpt3-13b": 13.0,
    "gpt3-175b": 175.0,
}
# arXiv:2302.13971, table 2; arXiv:2005.14165, table 2.1.
LEARNING_RATES = {
    "llama-7b": 3e-4,
    "llama-13b": 3e-4,
    "llama-33b": 1.5e-4,
    "llama-65b": 1.5e-4,
    "gpt3-small": 6e-4,
    "gpt3-medium": 3e-4,
    "gpt3-large": 2.5e-4,
    "gpt3-xl": 2e-4,
    "gpt3-2.7b": 1.6e-4,
    "gpt3-6.7b": 1.2e-4,
    "gpt3-13b": 1e-4,
    "gpt3-175b": 0.6e-4,
}


def model_config(name: str) -> ModelConfig:
    return ModelConfig(**PRESETS[name]["model"])


@pytest.mark.parametrize("name", PRESETS)
def test_module_has_the_parameters_of_the_arithmetic(name):
    config = model_config(name)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_params()


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_of_released_weights(name):
    assert model_config(name).n_params() == RELEASED[name]


@pytest.mark.parametrize("name", PALM)
def test_palm_sizes(name):
    assert model_config(name).n_params() / 1e9 == pytest.approx(PALM[name], abs=0.01)


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_sizes(name):
    assert model_config(name).n_params() / 1e9 == pytest.approx(GPT3[name], rel=0.02)


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_learning_rates_are_the_papers(name):
    assert OptimConfig(**PRESETS[name]["optim"]).lr == LEARNING_RATES[name]


def test_every_published_preset_is_held_against_its_paper():
    families = [name for name in PRESETS if name.startswith(("gpt2-", "gpt3-", "llama-", "palm-"))]
    assert set(families) == {*RELEASED, *PALM, *GPT3}


def test_gpt3_alternates_dense_and_banded_layers():
    with torch.device("meta"):
        model = GPT(model_config("gpt3-small"))
    assert [block.attn.window for block in model.blocks] == [None, 256] * 6


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        *((f"dev/{name}", presets.CPU) for name in ("null", "nvidiactl", "dxg")),
        *((f"dev/{name}", presets.GPU) for name in ("nvidia0", "nvidia3", "nvidia11", "kfd")),
        ("usr/lib/wsl/lib/libcuda.so.1", presets.GPU),
    ],
)
def test_auto_follows_the_device_files(file, expected, monkeypatch):
    def glob(path, pattern):
        assert str(path) == "/"
        return [path / file] if fnmatch.fnmatch(file, pattern) else []

    monkeypatch.setattr(presets.Path, "glob", glob)
    assert overrides("auto") is PRESETS[expected]
    assert presets.resolve("auto", own_text=False) == presets.CPU  # 5 MB are soon known by heart
    assert presets.resolve("gpt2-xl", own_text=False) == "gpt2-xl"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2-smal", "gpt2-smal: no such preset; did you mean gpt2-small"),
        ("llama", "did you mean llama-7b, llama-13b, llama-33b, llama-65b"),
        ("zzz", "there are cpu-tiny, "),
        ("", "did you mean cpu-tiny, "),
    ],
)
def test_unknown_presets(name, message):
    with pytest.raises(UsageError, match=message):
        overrides(name)

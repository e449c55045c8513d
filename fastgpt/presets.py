"""Named models with their training recipes. Shapes are those of the papers named in each family.

A preset is a tree of overrides in the form of a run's config.toml. `CPU` and `GPU` are what
``--preset auto`` chooses between.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError

Overrides = dict[str, dict[str, Any]]

CPU, GPU = "cpu-tiny", "modern-small"
DEVICE_FILES = ("dev/nvidia[0-9]*", "dev/kfd", "usr/lib/wsl/lib/libcuda.so.1")
"""Of GPUs: NVIDIA's, AMD's, NVIDIA's that Windows lends to Linux."""

_ADAMW = {"optimizer": "adamw", "schedule": "cosine", "min_lr": 0.1, "weight_decay": 0.1}
_GPU_TRAIN = {"batch_tokens": 1 << 19, "steps": 5000, "eval_every": 250, "save_every": 1000}


def _gpt2(n_layer: int, n_head: int, n_embd: int, lr: float, **model: Any) -> Overrides:
    """Radford et al. 2019; Brown et al. 2020 (arXiv:2005.14165), table 2.1, for GPT-3."""
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "context": 1024}
    family = {"norm": "layer_norm", "mlp": "gelu_tanh", "position": "learned", "bias": True}
    return {
        "model": {"vocab_size": 50257, "tied": True, "init": "gpt2", **family, **shape, **model},
        "optim": {**_ADAMW, "lr": lr},
        "data": {"pattern": "gpt2"},
        "train": dict(_GPU_TRAIN),
    }


def _gpt3(n_layer: int, n_head: int, n_embd: int, lr: float, **model: Any) -> Overrides:
    """Every second layer is locally banded; the paper names no width, 256 is ours."""
    return _gpt2(n_layer, n_head, n_embd, lr, context=2048, window=256, **model)


def _llama(n_layer: int, n_head: int, n_embd: int, d_ff: int, lr: float) -> Overrides:
    """Touvron et al. 2023 (arXiv:2302.13971), table 2."""
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "d_ff": d_ff}
    family = {"norm": "rms_norm", "norm_eps": 1e-6, "mlp": "swiglu", "position": "rotary"}
    return {
        "model": {"vocab_size": 32000, "context": 2048, "tied": False, "init": "gpt2"}
        | family
        | shape,
        "optim": {**_ADAMW, "lr": lr},
        "data": {"tokenizer_kind": "sentencepiece"},
        "train": dict(_GPU_TRAIN),
    }


def _palm(n_layer: int, n_head: int, n_embd: int) -> Overrides:
    """Chowdhery et al. 2022 (arXiv:2204.02311), table 1: heads of 256, one key/value head."""
    shape = {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "n_kv_head": 1,
        "head_dim": 256,
    }
    family = {"norm": "layer_norm", "mlp": "swiglu", "position": "rotary", "parallel": True}
    return {
        "model": {"vocab_size": 256000, "context": 2048, "tied": True, "init": "gpt2"}
        | family
        | shape,
        "optim": {**_ADAMW, "lr": 1e-3},
        "data": {"tokenizer_kind": "sentencepiece"},
        "train": dict(_GPU_TRAIN),
    }


def _modern(n_layer: int, n_head: int, n_embd: int, vocab_size: int, context: int) -> Overrides:
    """Our recipe; docs/LOG.md has the measurements behind each choice."""
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "context": context}
    return {
        "model": {
            "vocab_size": vocab_size,
            "norm": "rms_norm",
            "norm_weight": False,
            "norm_eps": 1e-6,
            "mlp": "relu_squared",
            "position": "rotary",
            "qk_norm": True,
            "embed_norm": True,
            "init": "zero_proj",
            "tied": True,
            **shape,
        },
        "optim": {"optimizer": "muon", "lr": 1e-2, "muon_lr": 5e-3},
        "train": dict(_GPU_TRAIN),
    }


def _cpu(preset: Overrides, **train: Any) -> Overrides:
    preset["train"] = {"eval_every": 100, "save_every": 200, "eval_tokens": 65536, **train}
    return preset


PRESETS: dict[str, Overrides] = {
    "cpu-tiny": _cpu(_modern(4, 4, 256, 4096, 256), steps=600, batch_tokens=4096),
    "cpu-small": _cpu(_modern(6, 6, 384, 8192, 256), steps=2000, batch_tokens=8192),
    "cpu-gpt2": _cpu(
        _gpt2(6, 6, 384, 1e-3, vocab_size=8192, context=256), steps=2000, batch_tokens=4096
    ),
    "modern-small": _modern(12, 6, 768, 50304, 1024),
    "modern-medium": _modern(24, 8, 1024, 50304, 1024),
    "modern-large": _modern(36, 10, 1280, 50304, 2048),
    "gpt2-small": _gpt2(12, 12, 768, 6e-4),
    "gpt2-medium": _gpt2(24, 16, 1024, 3e-4),
    "gpt2-large": _gpt2(36, 20, 1280, 2.5e-4),
    "gpt2-xl": _gpt2(48, 25, 1600, 2e-4),
    "gpt3-small": _gpt3(12, 12, 768, 6e-4),
    "gpt3-medium": _gpt3(24, 16, 1024, 3e-4),
    "gpt3-large": _gpt3(24, 16, 1536, 2.5e-4),
    # The paper's table says 24 heads of 128, which would be 1.5 billion; 16 give its 1.3 billion.
    "gpt3-xl": _gpt3(24, 16, 2048, 2e-4),
    "gpt3-2.7b": _gpt3(32, 32, 2560, 1.6e-4),
    "gpt3-6.7b": _gpt3(32, 32, 4096, 1.2e-4),
    "gpt3-13b": _gpt3(40, 40, 5140, 1e-4, head_dim=128),
    "gpt3-175b": _gpt3(96, 96, 12288, 0.6e-4),
    "llama-7b": _llama(32, 32, 4096, 11008, 3e-4),
    "llama-13b": _llama(40, 40, 5120, 13824, 3e-4),
    "llama-33b": _llama(60, 52, 6656, 17920, 1.5e-4),
    "llama-65b": _llama(80, 64, 8192, 22016, 1.5e-4),
    "palm-8b": _palm(32, 16, 4096),
    "palm-62b": _palm(64, 32, 8192),
    "palm-540b": _palm(118, 48, 18432),
}


def resolve(name: str, *, own_text: bool = True) -> str:
    """The preset that ``name`` stands for: "auto" looks for the device file of a GPU.

    The embedded text, without ``own_text``, is one for minutes and not for hours.
    """
    if name != "auto":
        return name
    files = [file for pattern in DEVICE_FILES for file in Path("/").glob(pattern)]
    return GPU if own_text and files else CPU


def overrides(name: str) -> Overrides:
    """The overrides of preset ``name``. Raises UsageError for a name that is none."""
    name = resolve(name)
    if name not in PRESETS:
        close = [known for known in PRESETS if known.startswith(str(name))]
        close = close or difflib.get_close_matches(str(name), PRESETS, 1)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(PRESETS)}"
        raise UsageError(f"--preset {name}: no such preset; {hint}")
    return PRESETS[name]

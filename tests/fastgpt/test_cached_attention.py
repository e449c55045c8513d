"""Attention of one token over a cache, against a loop over rows, heads and places in float64."""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgpt.cached_attention import CPUAttention, KernelAttention, cached_attention
from fastgpt.config import ModelConfig
from fastgpt.decoder import Decoder
from fastgpt.model import GPT

if sys.platform == "win32":
    pytest.skip("the extension is not built on Windows", allow_module_level=True)

from fastgpt import _attend


@dataclasses.dataclass
class Case:
    """Inputs of a step; places that may not be read hold NaN."""

    heads: int = 4
    kv_heads: int = 4
    dim: int = 64
    place: int = 40
    rows: int = 3
    capacity: int = 50
    padded: bool = False
    window: int = 0
    rotary: bool = False
    eps: float = -1.0
    dtype: torch.dtype = torch.float32
    size: float = 1.0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.place + self.dim)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * self.size).to(self.dtype)

        cache = self.rows, self.kv_heads, self.capacity, self.dim
        self.q = normal(self.rows, self.heads * self.dim)
        self.k = normal(self.rows, self.kv_heads * self.dim)
        self.v = normal(self.rows, self.kv_heads * self.dim)
        self.keys, self.values = normal(*cache), normal(*cache)
        self.starts = torch.tensor([0, self.place // 2, self.place][: self.rows])
        angles = torch.rand(self.capacity, self.dim // 2, generator=generator) * 6
        self.cos, self.sin = angles.cos(), angles.sin()
        for row in range(self.rows):
            self.keys[row, :, : self.first(row)] = math.nan
            self.values[row, :, : self.first(row)] = math.nan
        self.keys[:, :, self.place :] = math.nan
        self.values[:, :, self.place :] = math.nan

    def start(self, row: int) -> int:
        return int(self.starts[row]) if self.padded else 0

    def first(self, row: int) -> int:
        inside = self.place + 1 - self.window if self.window else 0
        return max(self.start(row), inside)

    def run(self, version: str = "", threads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Output and the cache behind the step."""
        out = torch.full_like(self.q, math.nan)
        keys, values = self.keys.clone(), self.values.clone()
        _attend.attend(
            array(self.q),
            array(self.k),
            array(self.v),
            array(keys),
            array(values),
            array(out),
            self.place,
            self.starts.numpy() if self.padded else None,
            self.window,
            self.cos.numpy() if self.rotary else None,
            self.sin.numpy() if self.rotary else None,
            self.eps,
            self.dim**-0.5,
            threads,
            version,
        )
        return out, keys, values

    def prepared(self, head: Tensor, row: int) -> np.ndarray:
        """A head after norm and rotation, each rounded to the dtype as the model does."""
        x = head.double()
        if self.eps >= 0:
            x = x / torch.sqrt(x.square().mean() + self.eps)
            x = x.to(self.dtype).double()
        if self.rotary:
            at = self.place - self.start(row)
            cos, sin = self.cos[at].double(), self.sin[at].double()
            low, high = x.chunk(2)
            x = torch.cat((low * cos - high * sin, high * cos + low * sin))
        return x.to(self.dtype).double().numpy()

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and the new keys, float64."""
        D = self.dim
        out = np.empty((self.rows, self.heads * D))
        new_keys = np.empty((self.rows, self.kv_heads, D))
        for row in range(self.rows):
            for kv in range(self.kv_heads):
                new_keys[row, kv] = self.prepared(self.k[row, kv * D : kv * D + D], row)
            for head in range(self.heads):
                kv = head // (self.heads // self.kv_heads)
                q = self.prepared(self.q[row, head * D : head * D + D], row)
                places = range(self.first(row), self.place)
                keys = [self.keys[row, kv, t].double().numpy() for t in places]
                values = [self.values[row, kv, t].double().numpy() for t in places]
                keys.append(new_keys[row, kv])
                values.append(self.v[row, kv * D : kv * D + D].double().numpy())
                scores = np.array([q @ key for key in keys]) * D**-0.5
                weights = np.exp(scores - scores.max())
                out[row, head * D : head * D + D] = weights @ np.array(values) / weights.sum()
        return out, new_keys


def array(x: Tensor) -> np.ndarray:
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


CASES = {
    "plain": Case(),
    "one place": Case(place=0),
    "sixteen places": Case(place=15),
    "last place": Case(place=49),
    "padding": Case(padded=True),
    "window": Case(window=7),
    "window and padding": Case(window=30, padded=True),
    "grouped heads": Case(heads=6, kv_heads=2, dim=32),
    "one key head": Case(heads=4, kv_heads=1, dim=128),
    "odd width": Case(dim=80, rotary=True),
    "wide": Case(dim=512, heads=1, kv_heads=1),
    "narrow": Case(dim=16, rotary=True, padded=True),
    "rotary": Case(rotary=True, padded=True),
    "norm": Case(eps=1e-6),
    "norm and rotary": Case(eps=1e-6, rotary=True, padded=True, window=12),
    "one probability is 1": Case(size=30.0),
}


@pytest.mark.parametrize("version", _attend.versions())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_against_a_loop(name, dtype, version):
    case = dataclasses.replace(CASES[name], dtype=dtype)
    out, keys, values = case.run(version)
    expected, new_keys = case.expected()
    ulp = torch.finfo(dtype).eps
    # float32: rounding of the sums; bfloat16: the results are rounded once, half an ulp.
    scale = np.abs(expected).max()
    tolerance = 6e-6 * scale * case.size if dtype == torch.float32 else 0.55 * ulp * scale
    assert np.abs(out.double().numpy() - expected).max() <= tolerance
    assert np.abs(keys[:, :, case.place].double().numpy() - new_keys).max() <= ulp * 4 * case.size
    assert torch.equal(values[:, :, case.place].flatten(1), case.v)


def test_nothing_else_in_the_cache_is_written():
    case = Case(rotary=True)
    _, keys, values = case.run()
    others = torch.arange(case.capacity) != case.place
    for now, before in ((keys, case.keys), (values, case.values)):
        assert torch.equal(now[:, :, others].nan_to_num(7), before[:, :, others].nan_to_num(7))


@pytest.mark.parametrize("version", _attend.versions())
def test_nan_stays_in_its_row(version):
    case = Case()
    case.q[1] = math.nan
    out, _, _ = case.run(version)
    assert out.isnan().any(1).tolist() == [False, True, False]


def test_a_nan_key_is_not_passed_over():
    case = Case()
    case.keys[1, :, 3] = math.nan
    assert case.run()[0].isnan().any(1).tolist() == [False, True, False]


def test_threads_change_no_bit():
    case = Case(rows=3, capacity=3001, place=3000, padded=True)  # 18 MB: three threads
    assert torch.equal(case.run(threads=3)[0], case.run(threads=1)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 24}, "multiple of 16"),
        ({"heads": 3, "kv_heads": 2}, "do not fit"),
        ({"place": 50}, "beyond the cache"),
        ({"window": -1}, "negative"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Case(), **change).run()


@pytest.mark.parametrize("wrong", ["q", "k", "v", "keys", "values"])
@pytest.mark.parametrize("how", ["type", "shape", "rows"])
def test_wrong_arrays_are_refused(wrong, how):
    case = Case()
    x = getattr(case, wrong)
    setattr(case, wrong, {"type": x.double(), "shape": x[..., :-16], "rows": x[:2]}[how].clone())
    with pytest.raises(ValueError, match=r"not|differ"):
        case.run()


def test_rows_that_start_in_the_future_are_refused():
    case = Case(padded=True)
    case.starts[1] = case.place + 1
    with pytest.raises(ValueError, match="future"):
        case.run()


MODELS = {
    "gpt2": {},
    "ours": {
        "norm": "rms_norm", "norm_weight": False, "position": "rotary", "qk_norm": True,
        "bias": False, "window": 5,
    },
    "grouped": {"norm": "rms_norm", "position": "rotary", "n_kv_head": 1, "mlp": "swiglu"},
    "weighted head norms": {"norm": "rms_norm", "position": "rotary", "qk_norm": True},
}  # fmt: skip


def small_model(**changes: object) -> GPT:
    torch.manual_seed(1)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=50, context=32)
    model = GPT(dataclasses.replace(config, **changes), torch.float32)  # pyright: ignore
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4, 5, 6]], [[1, 2, 3, 4, 5, 6, 7], [8], [9, 3]]])
def test_both_ways_give_the_same_logits(name, prompts, monkeypatch):
    model = small_model(**MODELS[name])

    def decode() -> Tensor:
        decoder = Decoder(model)
        found = [decoder.start(prompts, 8)]
        found += [decoder.step(torch.arange(len(prompts)) + place) for place in range(3)]
        rows = torch.tensor([len(prompts) - 1])
        decoder.keep(rows)
        found += [decoder.step(torch.tensor([7]))]
        return torch.cat(found)

    assert isinstance(chosen(model), CPUAttention)
    ours = decode()
    monkeypatch.setattr("fastgpt.cached_attention._extension", lambda: False)
    assert isinstance(chosen(model), KernelAttention)
    torch.testing.assert_close(ours, decode(), rtol=1e-4, atol=1e-5)


def test_heads_of_another_width_go_to_the_kernel():
    assert isinstance(chosen(small_model(n_head=8)), KernelAttention)


def chosen(model: GPT) -> object:
    decoder = Decoder(model)
    decoder.start([[1]], 1)
    return cached_attention(decoder.model, decoder.cache)

"""Peak memory of the losses behind a linear layer does not grow with tokens x vocabulary."""

from __future__ import annotations

import pytest
import torch

from fastgpt_kernels import _cpu_log_probs, _linear, cpu, linear_cross_entropy, linear_log_probs

WIDTH, VOCABULARY, FEW, MANY = 16, 1000, 256, 2048


def peak_bytes(fn) -> int:
    """Most bytes that were allocated at once while ``fn`` ran, by PyTorch's own allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        fn()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert changes
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def dense(hidden, weight, ids, bias):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(logits, ids)


def log_probs(hidden, weight, ids, bias):
    results = linear_log_probs(hidden, weight, ids, bias)
    return results[0].mean() + results[1].mean()


def by_row(hidden, weight, ids, bias):
    return linear_cross_entropy(hidden, weight, ids, linear_bias=bias, reduction="none").mean()


def summed(hidden, weight, ids, bias):
    return linear_cross_entropy(hidden, weight, ids, linear_bias=bias)


def growth(fn, with_bias: bool, training: bool) -> float:
    """Bytes that each further token adds to the peak."""
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=training)
    bias = torch.randn(VOCABULARY, requires_grad=training) if with_bias else None

    def step(tokens):
        hidden = torch.randn(tokens, WIDTH, requires_grad=training)
        loss = fn(hidden, weight, torch.randint(VOCABULARY, (tokens,)), bias)
        if training:
            torch.autograd.grad(loss, (hidden, weight))

    step(FEW)
    few, many = (peak_bytes(lambda n=n: step(n)) for n in (FEW, MANY))
    return (many - few) / (MANY - FEW)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)
    monkeypatch.setattr(_linear, "CHUNK_ELEMENTS", 128 * VOCABULARY)
    monkeypatch.setattr(cpu, "MAX_LOGITS_BYTES", 128 * VOCABULARY * 4)
    for module in (cpu, _cpu_log_probs):
        monkeypatch.setattr(module, "MAX_PARTS", 3)


# Hidden states, their gradient and what a row keeps: a few hundred bytes, where logits are 4,000.
@pytest.mark.parametrize("fn", [log_probs, by_row, summed])
@pytest.mark.parametrize(("with_bias", "training"), [(False, False), (False, True), (True, True)])
def test_peak_does_not_grow_with_tokens_times_vocabulary(fn, with_bias, training):
    assert growth(fn, with_bias, training) < 8 * WIDTH * 4


def test_dense_logits_would_show():
    assert growth(dense, False, True) > VOCABULARY * 4

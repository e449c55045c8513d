"""Bytes that the loss kernels move, against what must move."""

from __future__ import annotations

import sys

import pytest
import torch
import traffic

from fastgpt_kernels import linear_cross_entropy, linear_log_probs
from fastgpt_kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

MODULE = sys.modules["fastgpt_kernels.linear_cross_entropy"]
OPTIONS = (-100, 0.0, 0.0, 0.0)
ROWS, VOCABULARY = 3, 1001
TARGETS = 64
"""Bytes a row for what is not a logit: its target, loss, statistics."""


def test_loss_and_gradient_read_each_logit_once():
    x, t = torch.randn(ROWS, VOCABULARY).bfloat16(), torch.arange(ROWS)
    with traffic.count() as moved:
        _, *statistics = cross_entropy_fwd(x, t, *OPTIONS)
    assert moved.loads(x).total == traffic.nbytes(x) + ROWS * 2  # the target again
    with traffic.count() as moved:
        d = cross_entropy_bwd(torch.ones(ROWS), x, t, *statistics, *OPTIONS)
    assert moved.loads(x).total == traffic.nbytes(x) + ROWS * 2
    assert moved.stores(d).total == traffic.nbytes(d) + ROWS * 2
    assert (moved.loads().total + moved.stores().total) <= 2 * traffic.nbytes(x) + ROWS * TARGETS


@pytest.mark.parametrize(("whole_row", "ratio"), [(0, 1.5), (16384, 1.0)])
def test_fused_loss_and_gradient(monkeypatch, whole_row, ratio):
    """1.5 times a read and a write of the logits; exactly these where a row is kept whole."""
    monkeypatch.setattr(MODULE, "WHOLE_ROW", whole_row)
    hidden, weight = torch.randn(ROWS, 8, requires_grad=True), torch.randn(VOCABULARY, 8)
    with traffic.count() as moved:
        linear_cross_entropy(hidden, weight, torch.arange(ROWS))
    once = ROWS * VOCABULARY * 4
    assert moved.loads().total + moved.stores().total <= ratio * 2 * once + ROWS * TARGETS
    assert moved.stores().total <= once + ROWS * TARGETS


def test_log_probabilities_read_each_logit_once():
    hidden, weight = torch.randn(ROWS, 8, requires_grad=True), torch.randn(VOCABULARY, 8)
    once = ROWS * VOCABULARY * 4
    with traffic.count() as moved:
        log_probs, _ = linear_log_probs(hidden, weight, torch.arange(ROWS))
    assert moved.loads().total <= once + ROWS * TARGETS
    assert moved.stores().total <= ROWS * TARGETS
    with traffic.count() as moved:
        log_probs.sum().backward()
    assert max(moved.loads().total, moved.stores().total) <= once + ROWS * TARGETS

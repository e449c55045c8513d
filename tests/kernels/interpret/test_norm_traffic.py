"""Bytes that the norms move forward, and with a residual: every tensor once, however many blocks.

The backward without a residual is in ``test_norm_kernels``, where its cache is simulated too.
"""

from __future__ import annotations

import pytest
import torch
import traffic

from fastgpt_kernels.normalization import add_norm_fwd, norm_bwd, norm_fwd

KINDS = pytest.mark.parametrize(
    ("rows", "columns", "dtype", "rms"),
    [(256, 64, torch.bfloat16, False), (6, 8192, torch.float32, True)],
)


def _all(moved: traffic.Traffic) -> int:
    return moved.loads().total + moved.stores().total


@KINDS
def test_forward(rows, columns, dtype, rms):
    """Every program reads the weight too, which a cache answers: not counted here."""
    x, w = torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)
    with traffic.count() as moved:
        y, mean, rstd = norm_fwd(x, w, None, 1, 1e-5, rms)
    assert moved.loads(x) == traffic.once(x)
    assert moved.stores(y) == traffic.once(y)
    statistics = traffic.nbytes(rstd) + (0 if rms else traffic.nbytes(mean))
    assert _all(moved) - moved.loads(w).total == traffic.nbytes(x, y) + statistics


@KINDS
def test_forward_of_a_sum(rows, columns, dtype, rms):
    x, r = (torch.randn(rows, columns).to(dtype) for _ in range(2))
    with traffic.count() as moved:
        y, total, *_ = add_norm_fwd(x, r, None, None, 1, 1e-5, rms)
    for read in (x, r):
        assert moved.loads(read) == traffic.once(read)
    for written in (y, total):
        assert moved.stores(written) == traffic.once(written)
    assert moved.loads(total).total == 0
    assert _all(moved) <= 1.05 * traffic.nbytes(x, r, y, total)


@KINDS
def test_backward_of_a_sum(rows, columns, dtype, rms):
    """The sum, both incoming gradients, and one gradient for both of its terms."""
    x, r, dy, dtotal = (torch.randn(rows, columns).to(dtype) for _ in range(4))
    _, total, mean, rstd = add_norm_fwd(x, r, None, None, 1, 1e-5, rms)
    with traffic.count() as moved:
        dx, *_ = norm_bwd(dy, total, mean, rstd, None, False, False, 1, rms, dtotal)
    for read in (total, dy, dtotal):
        assert moved.loads(read) == traffic.once(read)
    assert moved.stores(dx) == traffic.once(dx)
    assert _all(moved) <= 1.05 * traffic.nbytes(total, dy, dtotal, dx)

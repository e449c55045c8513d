"""The CPU path of ``linear_log_probs``: two passes over each chunk of logits, compiled if possible.

The forward keeps two floats a row, so that the backward turns logits into their gradient in one
pass without a reduction. The gradient of the target's own logit, p - 1, is made in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels.cpu import LOG_TINY, MAX_PARTS, fused, rows_per_chunk, sum_of_parts

SMALL = 1 << 18
"""Logits below which compiling for their shape costs more than it ever saves."""


def _scaled(logits: Tensor, inverse_temperature: float, softcap: float) -> Tensor:
    x = logits.float()
    if softcap:
        x = softcap * torch.tanh(x * (1.0 / softcap))
    return x * inverse_temperature


def _statistics(
    logits: Tensor, inverse_temperature: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = _scaled(logits, inverse_temperature, softcap)
    top = x.amax(-1, keepdim=True)
    # Not below LOG_TINY: e would be denormal, and 0 * -inf NaN.
    y = (x - top).clamp_min(LOG_TINY)
    e = torch.exp(y)
    return top, e.sum(-1, keepdim=True), (e * y).sum(-1, keepdim=True)


def _gradient(
    logits: Tensor, top: Tensor, a: Tensor, b: Tensor, inverse_temperature: float, softcap: float
) -> Tensor:
    y = (_scaled(logits, inverse_temperature, softcap) - top).clamp_min(LOG_TINY)
    d = torch.exp(y) * (a + b * y) * inverse_temperature
    if softcap:
        t = torch.tanh(logits.float() * (1.0 / softcap))
        d = d * (1.0 - t * t)
    return d.to(logits.dtype)


_fused_statistics = fused(_statistics)
_fused_gradient = fused(_gradient)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)


def in_one_chunk(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether all logits are made at once, and there are any."""
    n_rows = len(hidden_ND)
    return 0 < n_rows <= rows_per_chunk(n_rows, len(weight_VD), hidden_ND.element_size())


def forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ids_N: Tensor,
    ignore_index: int,
    inverse_temperature: float,
    softcap: float,
    all_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy, largest logit and sum of exponentials below it, float32 (N,).

    ``all_logits`` (N, V) are made here, a chunk at a time, if they are not given.
    """
    n_rows, n_cols = hidden_ND.shape[0], weight_VD.shape[0]
    log_probs, entropy, top_N, total_N = (
        hidden_ND.new_empty(n_rows, dtype=torch.float32) for _ in range(4)
    )
    kept_N = ids_N != ignore_index
    at_N1 = torch.where(kept_N, ids_N, 0).long()[:, None]
    step = rows_per_chunk(n_rows, n_cols, hidden_ND.element_size())
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        logits = _logits(hidden_ND[rows], weight_VD, bias_V) if all_logits is None else all_logits
        run = _fused_statistics if logits.numel() > SMALL else _statistics
        top, total, weighted = run(logits, inverse_temperature, softcap)
        picked = _scaled(logits.gather(1, at_N1[rows]), inverse_temperature, softcap)
        log_total = total.log()
        # Differences before they can cancel: picked - (top + log_total) would.
        log_probs[rows] = ((picked - top) - log_total)[:, 0]
        entropy[rows] = (log_total - weighted / total)[:, 0]
        top_N[rows], total_N[rows] = top[:, 0], total[:, 0]
    results = (log_probs, 0.0), (entropy, 0.0), (top_N, 0.0), (total_N, 1.0)
    return tuple(torch.where(kept_N, x, ignored) for x, ignored in results)  # pyright: ignore


def backward(
    a_N: Tensor,
    b_N: Tensor,
    own_N: Tensor,
    top_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ids_N: Tensor,
    ignore_index: int,
    inverse_temperature: float,
    softcap: float,
    needs: tuple[bool, bool, bool],
    all_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (the last two float32); what ``needs`` denies is empty.

    An entry of d(logits) is ``exp(y) (a + b y)`` with y the scaled logit below ``top``, the
    target's is ``own``; both times the slope of scaling.
    """
    n_rows, n_cols = hidden_ND.shape[0], weight_VD.shape[0]
    kept_N1 = (ids_N != ignore_index)[:, None]
    at_N1 = torch.where(kept_N1, ids_N[:, None], 0).long()
    dhidden = hidden_ND.new_zeros(hidden_ND.shape) if needs[0] else hidden_ND.new_empty(0)
    dbias = hidden_ND.new_zeros(n_cols if needs[2] else 0, dtype=torch.float32)
    parts: list[Tensor] = []
    step = rows_per_chunk(n_rows, n_cols, hidden_ND.element_size())
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        # An ignored row may hold anything, and 0 * NaN is NaN.
        h = torch.where(kept_N1[rows], hidden_ND[rows], 0.0)
        logits = _logits(h, weight_VD, bias_V) if all_logits is None else all_logits
        top, a, b = (x[rows, None] for x in (top_N, a_N, b_N))
        run = _fused_gradient if logits.numel() > SMALL else _gradient
        d = run(logits, top, a, b, inverse_temperature, softcap)
        own = own_N[rows, None] * inverse_temperature
        if softcap:
            picked = torch.tanh(logits.gather(1, at_N1[rows]).float() / softcap)
            own = own * (1.0 - picked * picked)
        del logits
        d[torch.arange(len(own)), at_N1[rows, 0]] = own[:, 0].to(d.dtype)
        if needs[0]:
            dhidden[rows] = d @ weight_VD
        if needs[1]:  # d.t() @ h would take half as long again: oneDNN and wide transposed operands
            parts.append(h.t().contiguous() @ d)
        if len(parts) == MAX_PARTS:
            parts = [sum_of_parts(parts)]
        if needs[2]:
            dbias += d.sum(0, dtype=torch.float32)
    shape = weight_VD.shape if needs[1] else (0,)
    dweight = sum_of_parts(parts).t().contiguous() if parts else dbias.new_zeros(shape)
    return dhidden, dweight, dbias

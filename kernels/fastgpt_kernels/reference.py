"""The mathematics of every kernel in plain PyTorch: the specification and the float64 oracle.

Nothing here is fast or saves memory. Each function computes in the dtype it is given, so float64
inputs give the exact result (and, through autograd, exact gradients) to compare a kernel with.

Shape suffixes: B batch, T query positions, S key positions, H query heads, G key/value heads (H a
multiple of G), D head dim or hidden size, N rows (tokens), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    doc_start_BT: Tensor | None = None,
) -> Tensor:
    """``softmax(softcap(q k^T * scale) + mask) v`` with grouped keys and values.

    Query t sees key s if all of these hold, where p = t + S - T is its position among the keys
    (bottom-right alignment):

    - ``causal``: s <= p
    - ``window``: s > p - window (with ``causal``: ``window`` keys, the query's own included)
    - ``doc_start_BT`` (int32): s >= doc_start_BT[b, t]

    A query that sees no key gives zeros, and passes no gradient.

    Args:
        q_BHTD: queries.
        k_BGSD: keys; H must be a multiple of G.
        v_BGSD: values; the head dim may differ from that of the keys.
        causal: see above.
        scale: factor on the scores; ``D ** -0.5`` if None.
        window: see above.
        softcap: c > 0 replaces a score x by ``c * tanh(x / c)`` (Gemma 2, arXiv:2408.00118).
        doc_start_BT: first key index visible to each query.

    Returns:
        BHTD tensor in the inputs' dtype.
    """
    v_BHSD = v_BGSD.repeat_interleave(q_BHTD.shape[1] // v_BGSD.shape[1], dim=1)
    scores_BHTS, visible = _attention_scores(
        q_BHTD,
        k_BGSD,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        doc_start_BT=doc_start_BT,
    )
    # A row of -inf makes softmax NaN in both directions; such rows are cut out before and after.
    empty = ~visible.any(dim=-1, keepdim=True)
    weights_BHTS = torch.softmax(scores_BHTS.masked_fill(empty, 0.0), dim=-1)
    return weights_BHTS.masked_fill(empty, 0.0) @ v_BHSD


def _attention_scores(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    doc_start_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores (B, H, T, S), -inf where not visible, and which are; see ``attention``."""
    T, S, D = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[3]
    k_BHSD = k_BGSD.repeat_interleave(q_BHTD.shape[1] // k_BGSD.shape[1], dim=1)
    scores_BHTS = (q_BHTD @ k_BHSD.mT) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    visible = attention_mask(
        T, S, causal=causal, window=window, doc_start_BT=doc_start_BT, device=q_BHTD.device
    )
    return scores_BHTS.masked_fill(~visible, -torch.inf), visible


def attention_with_lse(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """``attention``, and the log-sum-exp (B, H, T) of the visible scores, -inf if there are none.

    ``options`` are those of ``attention``.
    """
    scores_BHTS, visible = _attention_scores(q_BHTD, k_BGSD, **options)
    empty = ~visible.any(dim=-1)
    lse_BHT = scores_BHTS.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(dim=-1)
    out_BHTD = attention(q_BHTD, k_BGSD, v_BGSD, **options)
    return out_BHTD, lse_BHT.masked_fill(empty, -torch.inf)


def attention_varlen(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``attention`` of each sequence by itself; sequence i is rows cu_seqlens[i] to [i + 1].

    Rows behind the last sequence give 0. ``options`` are those of ``attention``.
    """
    cu_q = cu_seqlens_q.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    parts = [0.0 * q_THD[cu_q[-1] :]]
    for (a, b), (c, d) in reversed(list(zip(pairwise(cu_q), pairwise(cu_k), strict=True))):
        heads_first = (x.transpose(0, 1)[None] for x in (q_THD[a:b], k_SGD[c:d], v_SGD[c:d]))
        parts.insert(0, attention(*heads_first, **options)[0].transpose(0, 1))
    return torch.cat(parts)


def attention_decode(
    q_BTHD: Tensor,
    k_cache_BSGD: Tensor,
    v_cache_BSGD: Tensor,
    cache_seqlens_B: Tensor,
    *,
    cache_starts_B: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Causal ``attention`` of T new tokens over the first ``cache_seqlens`` entries of a cache.

    The new tokens' own keys and values are the last T of these entries, and entries before
    ``cache_starts`` are not seen. ``options`` are those of ``attention``.
    """
    starts = torch.zeros_like(cache_seqlens_B) if cache_starts_B is None else cache_starts_B
    outputs = []
    for row, (length, start) in enumerate(
        zip(cache_seqlens_B.tolist(), starts.tolist(), strict=True)
    ):
        q, k, v = (
            x[row].transpose(0, 1)[None]
            for x in (q_BTHD, k_cache_BSGD[:, :length], v_cache_BSGD[:, :length])
        )
        doc_start = torch.full((1, q.shape[2]), start, dtype=torch.int32, device=q.device)
        outputs.append(attention(q, k, v, doc_start_BT=doc_start, **options)[0].transpose(0, 1))
    return torch.stack(outputs) if outputs else torch.zeros_like(q_BTHD)


def attention_mask(
    T: int,
    S: int,
    *,
    causal: bool,
    window: int | None = None,
    doc_start_BT: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Boolean visibility (True: seen) of ``attention``, shape (1 or B, 1, T, S)."""
    p = torch.arange(T, device=device)[:, None] + (S - T)
    s = torch.arange(S, device=device)[None, :]
    visible = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (s <= p)
    if window is not None:
        visible = visible & (s > p - window)
    visible = visible[None, None]
    if doc_start_BT is not None:
        visible = visible & (s >= doc_start_BT[:, None, :, None])
    return visible


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dims (arXiv:1607.06450)."""
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    output = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        output = output * weight
    return output if bias is None else output + bias


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dims (arXiv:1910.07467).

    ``eps=None`` is the float32 machine epsilon, as in PyTorch for every dtype up to float32.
    """
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    output = input * torch.rsqrt(input.square().mean(dims, keepdim=True) + eps)
    return output if weight is None else output * weight


def cross_entropy(
    input_NV: Tensor,
    target_N: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of logits against class indices.

    With x the logits (``softcap * tanh(x / softcap)`` if capped), lse = log sum exp x and
    e = label_smoothing::

        loss = (1 - e) (lse - x[target]) + e (lse - mean(x)) + z_loss lse^2

    Rows whose target is ``ignore_index`` have loss 0 and do not count in the mean; a mean over no
    row is NaN. ``z_loss`` is PaLM's loss on the partition function (arXiv:2204.02311, section 5).
    """
    logits = input_NV if softcap is None else softcap * torch.tanh(input_NV / softcap)
    kept = target_N != ignore_index
    target = torch.where(kept, target_N, 0).long()
    logp = torch.log_softmax(logits, dim=-1)
    loss = -(1 - label_smoothing) * logp.gather(-1, target[:, None])[:, 0]
    if label_smoothing:
        loss = loss - label_smoothing * logp.mean(dim=-1)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(logits, dim=-1).square()
    loss = torch.where(kept, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum()


def linear_cross_entropy(
    input_ND: Tensor,
    linear_weight_VD: Tensor,
    target_N: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """``cross_entropy`` of the logits ``input @ linear_weight^T + linear_bias``."""
    logits_NV = torch.nn.functional.linear(input_ND, linear_weight_VD, linear_bias)
    return cross_entropy(
        logits_NV,
        target_N,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )


def linear_log_probs(
    hidden: Tensor,
    weight_VD: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """``log softmax(x)[id]`` and ``-sum p log p`` with x the capped logits over ``temperature``."""
    logits = torch.nn.functional.linear(hidden, weight_VD, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, dim=-1)
    kept = ids != ignore_index
    picked = logp.gather(-1, torch.where(kept, ids, 0).long()[..., None])[..., 0]
    entropy = -(logp.exp() * logp).nan_to_num().sum(-1)
    return torch.where(kept, picked, 0.0), torch.where(kept, entropy, 0.0)


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by the recurrence, a step at a time; see ``fastgpt_kernels.gae``."""
    advantages, returns = torch.zeros_like(values_BT), torch.zeros_like(values_BT)
    for b in range(values_BT.shape[0]):
        next_value = next_advantage = 0.0
        for t in reversed(mask_BT[b].nonzero()[:, 0].tolist()):
            delta = rewards_BT[b, t] + gamma * next_value - values_BT[b, t]
            next_advantage = delta + gamma * gae_lambda * next_advantage
            next_value = values_BT[b, t]
            advantages[b, t], returns[b, t] = next_advantage, next_advantage + next_value
    return advantages, returns


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Pairs of x as complex numbers times ``cos + i sin`` (arXiv:2104.09864, section 3.2)."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    half = cos.shape[-1]
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = part.unflatten(-1, (half, 2) if interleaved else (2, half))
    axis = -1 if interleaved else -2
    turned = torch.complex(*pairs.unbind(axis)) * torch.complex(cos, sin)
    return torch.cat((torch.stack((turned.real, turned.imag), axis).flatten(-2), rest), -1)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """``x P(x)``, P the normal distribution function, or its tanh form (arXiv:1606.08415)."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * torch.erfc(-x * 0.5**0.5)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gate s(gate) up`` (arXiv:2002.05202)."""
    return gate / (1 + torch.exp(-gate)) * up


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """``gelu(gate) up`` (arXiv:2002.05202)."""
    return gelu(gate, approximate) * up


def relu_squared(x: Tensor) -> Tensor:
    """``max(x, 0)^2`` (arXiv:2109.08668)."""
    return x.clamp_min(0).square()

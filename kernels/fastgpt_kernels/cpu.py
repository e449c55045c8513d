"""The CPU paths: plain PyTorch arranged so that a CPU with fast bfloat16 matrix units is kept busy.

`attention` inside a compiled graph is batched GEMMs with fused elementwise passes between them;
forward and backward together take half the time of PyTorch's, for as many scores as may be kept.
Elsewhere it is PyTorch's.

`linear_cross_entropy_gradients` never normalises the softmax. It stores ``e = exp(logits - max)``,
one exponential and one pass for each logit, and folds ``1 / sum(e)`` into the narrow operands of
the two GEMMs that make the gradients.
"""

from __future__ import annotations

import functools
import shutil
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A layer keeps this many bfloat16 scores at most for its backward (32 MiB); beyond, PyTorch's own
# attention, which stores none.
MAX_STORED_SCORES = 1 << 24

# exp() of less is a denormal number, which costs a CPU about five times a normal one.
LOG_TINY = -80.0

# An eager call of fewer elements is not worth a compiled function.
MIN_FUSED = 1 << 17

# Score of a key that is not seen; finite, so that a row that sees nothing has no NaN.
NEVER = -1e30


@functools.cache
def _can_compile() -> bool:
    if shutil.which("g++") or shutil.which("clang++") or shutil.which("c++"):
        return True
    warnings.warn(
        "no C++ compiler found: the CPU paths of fastgpt_kernels run uncompiled, several times "
        "slower; install g++ or clang",
        stacklevel=3,
    )
    return False


def _kind(argument: Any) -> Any:
    """What of an argument makes a compiled function another one; sizes and values do not."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.dim()
    if isinstance(argument, int | float) and not isinstance(argument, bool):
        return argument != 0
    return type(argument) if isinstance(argument, list) else argument


def fused(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``fn`` with Inductor at its first eager call; a compiled caller inlines it.

    Dynamo counts the versions of a code object and stops compiling at the eighth, which dtypes and
    options alone would reach: each kind of call gets a code object of its own.
    """

    @functools.cache
    def compiled(*_kinds: Any) -> Callable[..., Any]:
        own = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__)
        return torch.compile(own)  # not at import: it loads the whole compiler

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not _can_compile():
            return fn(*args)
        return compiled(*map(_kind, args))(*args)

    return run


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward`` that reads intermediate results, and raises if it shall be differentiated.

    ``torch.autograd.function.once_differentiable`` does not where the incoming gradients depend on
    nothing: a second derivative would silently lack what goes through the saved tensors.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fastgpt_kernels: create_graph=True asks for second derivatives, which there are "
                "none of; compute this part with PyTorch's own functions"
            )
        return backward(ctx, *grads)

    return run


def worth_fusing(x: Tensor, at_least: int = MIN_FUSED) -> bool:
    """Whether an eager call should run fused passes over ``x``.

    Not for few elements, where the call costs more than the passes, and not for float64, which
    accuracy is measured by.
    """
    if torch.compiler.is_compiling():  # first: a size asked for would become part of the code
        return False
    return x.numel() >= at_least and x.dtype != torch.float64 and _can_compile()


def exp_below(below_top: Tensor) -> Tensor:
    """exp of differences to a maximum; 0 where it would be a denormal, and for NaN.

    Cheaper than a clamp. No NaN is lost: the maximum, and with it a factor of the row, has it.
    """
    return torch.where(below_top > LOG_TINY, torch.exp(below_top), 0.0)


def visibility(
    T: int,
    S: int,
    *,
    causal: bool,
    window: int | None,
    doc_start_BT: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which keys a query sees, bool (T, S) or (B, 1, T, S); None when all do."""
    if not causal and window is None and doc_start_BT is None:
        return None
    query_T1 = torch.arange(S - T, S, device=device).unsqueeze(1)
    key_S = torch.arange(S, device=device)
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        seen = key_S <= query_T1
    if window is not None:
        seen = seen & (key_S > query_T1 - window)
    if doc_start_BT is not None:
        seen = seen & (key_S >= doc_start_BT[:, None, :, None])
    return seen


@torch.library.custom_op("fastgpt_kernels::cpu_scores", mutates_args=())
def _scores(q: Tensor, k: Tensor, narrow: bool) -> Tensor:
    """``q @ k^T`` of float32 (N, T, D) and (N, S, D) in float32.

    ``narrow``: the numbers came from bfloat16, so oneDNN may multiply them as such. That is exact,
    and the sums stay float32; a bfloat16 GEMM would round them, and the gradients of peaked
    attention would be ten times less accurate than PyTorch's.
    """
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if narrow else "ieee"
    try:
        return torch.bmm(q, k.transpose(1, 2))
    finally:
        matmul.fp32_precision = before


@_scores.register_fake
def _(q: Tensor, k: Tensor, narrow: bool) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], k.shape[1])


@torch.library.custom_op("fastgpt_kernels::cpu_causal_bias", mutates_args=())
def _causal_bias(q_BHTD: Tensor) -> Tensor:
    """Float32 (T, T): 0 where a key is seen, `NEVER` elsewhere.

    An operator, so that a compiled graph reads it from memory: it would compare 64-bit positions
    for every score instead, at twice the time of the softmax.
    """
    T = q_BHTD.shape[2]
    return torch.full((T, T), NEVER).triu_(1)


@_causal_bias.register_fake
def _(q_BHTD: Tensor) -> Tensor:
    T = q_BHTD.shape[2]
    return q_BHTD.new_empty((T, T), dtype=torch.float32)


class _SelfAttention(torch.autograd.Function):
    """Causal self-attention that stores ``e = exp(scores - max)`` for its backward.

    The softmax is never normalised: ``1 / sum(e)`` is applied to the output, and in the backward to
    the narrow gradient of the output.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, scale):  # pyright: ignore[reportIncompatibleMethodOverride]
        flat = (x.flatten(0, 1).float().contiguous() for x in (q, k))
        scores = _scores(*flat, q.dtype == torch.bfloat16).unflatten(0, q.shape[:2])
        scores = scores * scale + bias
        top = scores.amax(-1, keepdim=True)
        below_top = scores - top
        e = exp_below(below_top).to(q.dtype)
        total = e.float().sum(-1, keepdim=True)
        inverse = torch.where(top < 0.5 * NEVER, 0.0, 1.0 / total)  # a row that sees nothing: 0
        out = ((e @ v).float() * inverse).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, e, inverse)
        ctx.scale = scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, e, inverse = ctx.saved_tensors
        grad = grad.float()
        delta = (out.float() * grad).sum(-1, keepdim=True)
        scaled = (grad * inverse).to(q.dtype)
        dprobs = scaled @ v.transpose(-1, -2)
        dscores = e.float() * (dprobs.float() - delta * inverse) * ctx.scale
        dscores = dscores.to(q.dtype)
        dq = dscores @ k
        dk = dscores.transpose(-1, -2) @ q
        dv = e.transpose(-1, -2) @ scaled
        return dq, dk, dv, None, None


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float
) -> Tensor:
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * (scale / softcap))
    if seen is None:
        return torch.softmax(scores, -1).to(q.dtype) @ v
    probs = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    # A row that sees nothing is 0/0: its output and gradients are defined as 0.
    return torch.where(seen, probs, 0.0).to(q.dtype) @ v


def attention(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    doc_start: Tensor | None = None,
) -> Tensor:
    """The contract of `fastgpt_kernels.attention`, on a CPU. Differentiable, any float dtype."""
    B, H, T, D = q_BHTD.shape
    S, groups = k_BHSD.shape[2], H // k_BHSD.shape[1]
    scale = float(D**-0.5) if scale is None else scale
    training = q_BHTD.requires_grad or k_BHSD.requires_grad or v_BHSD.requires_grad
    storing = causal and T == S and training and B * H * T * T <= MAX_STORED_SCORES and _compiling()
    k, v = k_BHSD, v_BHSD
    if groups > 1 and (softcap is not None or storing):
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    triangle = causal and T == S and window is None and doc_start is None
    seen = None
    if softcap is not None or not triangle:
        seen = visibility(
            T, S, causal=causal, window=window, doc_start_BT=doc_start, device=q_BHTD.device
        )
    if softcap is not None:
        return _plain_attention(q_BHTD, k, v, seen, scale, softcap)
    if storing:
        bias = _causal_bias(q_BHTD.detach()) if seen is None else torch.where(seen, 0.0, NEVER)
        return _SelfAttention.apply(q_BHTD, k, v, bias, scale)
    return F.scaled_dot_product_attention(
        q_BHTD, k, v, attn_mask=seen, is_causal=triangle, scale=scale, enable_gqa=groups > 1
    )


def _compiling() -> bool:
    """Uncompiled, the elementwise passes between the GEMMs cost more than the GEMMs save."""
    return torch.compiler.is_compiling()


def _exp_and_sum(logits_NV: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    x = logits_NV.float()
    if softcap is None:
        top = x.amax(-1, keepdim=True)
        e = exp_below(x - top)
        return e.to(logits_NV.dtype), top, e.sum(-1, keepdim=True)
    t = torch.tanh(x * (1.0 / softcap))
    top = softcap * t.amax(-1, keepdim=True)
    e = exp_below(softcap * t - top)
    return (e * (1.0 - t * t)).to(logits_NV.dtype), top, e.sum(-1, keepdim=True)


_fused_exp_and_sum = fused(_exp_and_sum)


def _gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """By one sigmoid: tanh(u) = 2 sigmoid(2u) - 1."""
    xf = x.float()
    square = xf * xf
    s = torch.sigmoid(xf * (GELU_A + GELU_B * square))
    y = xf * s
    slope = s + y * (1.0 - s) * (GELU_A + 3.0 * GELU_B * square)
    return y.to(x.dtype), slope.to(x.dtype)


_fused_gelu_and_slope = fused(_gelu_and_slope)


@torch.library.custom_op("fastgpt_kernels::cpu_gelu_tanh", mutates_args=())
def _gelu_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its slope; an operator, because a compiler would compute the slope twice."""
    return _fused_gelu_and_slope(x)


@_gelu_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


class _GELUTanh(torch.autograd.Function):
    """GELU, tanh approximation; the backward has no transcendental function."""

    @staticmethod
    def forward(ctx, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, slope = _gelu_op(x)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope,) = ctx.saved_tensors
        return (grad.float() * slope.float()).to(grad.dtype)


GELU_A = 2.0 * (2.0 / 3.141592653589793) ** 0.5
GELU_B = GELU_A * 0.044715


def gelu_tanh(x: Tensor) -> Tensor:
    """``F.gelu(x, approximate="tanh")`` by one sigmoid (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return _GELUTanh.apply(x)


# Rows of logits held at once: a GEMM wants many rows, the cache and the memory bound want few.
MAX_LOGITS_BYTES = 1 << 28


# Products of chunks that wait for one pass that adds them up; each is as large as the weight.
MAX_PARTS = 8


def rows_per_chunk(n_rows: int, vocab_size: int, itemsize: int) -> int:
    """Rows of logits computed at once; equal chunks, so that few shapes are compiled."""
    limit = max(1, MAX_LOGITS_BYTES // (vocab_size * itemsize))
    n_chunks = -(-n_rows // limit)
    return -(-n_rows // max(1, n_chunks))


def _row_terms(
    picked: Tensor, top: Tensor, total: Tensor, grad: Tensor, z_loss: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: loss, coefficient of the target's own gradient, factor of the row of e."""
    slope = 1.0
    if softcap is not None:
        tanh = torch.tanh(picked / softcap)
        picked, slope = softcap * tanh, 1.0 - tanh * tanh
    lse = top + total.log()
    # d(loss)/d(logit) = p * (1 + 2 z lse) - onehot
    growth = 1.0 + 2.0 * z_loss * lse
    log_p = picked - top - total.log()  # not picked - lse, which cancels where logits are large
    coef = (torch.expm1(log_p) * growth + (growth - 1.0)) * slope * grad
    loss = z_loss * lse * lse - log_p
    return torch.where(grad == 0, 0.0, loss).squeeze(1), coef, growth / total * grad


def linear_cross_entropy_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Loss of each row, float32 (N,), 0 where the target is ``ignore_index``."""
    loss_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32)
    counted = (targets_N != ignore_index).float().unsqueeze(1)
    ids = torch.where(targets_N == ignore_index, 0, targets_N).long().unsqueeze(1)
    step = rows_per_chunk(len(loss_N), weight_VD.shape[0], hidden_ND.element_size())
    for start in range(0, len(loss_N), step):
        rows = slice(start, start + step)
        logits = hidden_ND[rows] @ weight_VD.t()
        _, top, total = _fused_exp_and_sum(logits, softcap)
        picked = logits.gather(1, ids[rows]).float()
        loss_N[rows] = _row_terms(picked, top, total, counted[rows], z_loss, softcap)[0]
    return loss_N


def linear_cross_entropy_gradients(
    grad_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and gradients of ``sum(grad * loss)``, in one pass over the logits.

    The part of a row's gradient that belongs to its target is left out of ``e`` and added in
    float32: it is the largest part, and ``p - 1`` keeps float32 accuracy when p approaches 1.

    Args:
        grad_N: float32 weight of each row.
        hidden_ND: float32 or bfloat16.
        weight_VD: output projection, in the same dtype.
        targets_N: int64 ids.
        ignore_index: rows with this target have no loss and no gradient.
        z_loss: coefficient of ``lse**2``.
        softcap: logits are ``softcap * tanh(x / softcap)``.

    Returns:
        loss (N,) float32, dhidden (N, D) in ``hidden``'s dtype, dweight (V, D) float32.
    """
    N = hidden_ND.shape[0]
    loss_N = torch.empty(N, dtype=torch.float32)
    coef_N1 = torch.empty(N, 1, dtype=torch.float32)
    dhidden_ND = hidden_ND.new_empty(hidden_ND.shape)
    grad_N1 = torch.where(targets_N == ignore_index, 0.0, grad_N).unsqueeze(1)
    ids_N = torch.where(targets_N == ignore_index, 0, targets_N).long()
    parts: list[Tensor] = []
    step = rows_per_chunk(N, weight_VD.shape[0], hidden_ND.element_size())
    for start in range(0, N, step):
        rows = slice(start, start + step)
        h, ids, grad = hidden_ND[rows], ids_N[rows], grad_N1[rows]
        logits = h @ weight_VD.t()
        picked = logits.gather(1, ids.unsqueeze(1)).float()
        e, top, total = _fused_exp_and_sum(logits, softcap)
        del logits
        e[torch.arange(len(ids)), ids] = 0  # scatter_ would copy all of e
        loss_N[rows], coef, pull = _row_terms(picked, top, total, grad, z_loss, softcap)
        dhidden_ND[rows] = (e @ weight_VD) * pull + coef * weight_VD[ids]
        coef_N1[rows] = coef
        # e.t() @ h would take half as long again: oneDNN is slow on a wide transposed operand.
        parts.append((h * pull).to(e.dtype).t().contiguous() @ e)
        if len(parts) == MAX_PARTS:
            parts = [sum_of_parts(parts)]
    dweight_VD = _fused_sum(parts)
    dweight_VD.index_add_(0, ids_N, coef_N1 * hidden_ND)
    return loss_N, dhidden_ND, dweight_VD


def sum_of_parts(parts: list[Tensor]) -> Tensor:
    """Their sum in float32."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def _sum_transposed(parts_DV: list[Tensor]) -> Tensor:
    return sum_of_parts(parts_DV).t().contiguous()


_fused_sum = fused(_sum_transposed)

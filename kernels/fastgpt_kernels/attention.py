"""Scaled dot-product attention (FlashAttention): launchers, operators and the public function.

The formulas, the masks and the Triton kernels are in ``_attention_kernels.py``.

Legend: B batch, H query heads, HK key heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import _cpu_attention as cpu_attention
from fastgpt_kernels import cpu
from fastgpt_kernels._attention_kernels import bwd_dkv_kernel, bwd_dq_kernel, fwd_kernel
from fastgpt_kernels._common import (
    NAMESPACE,
    AotCase,
    aot_variants,
    cast_under_autocast,
    cdiv,
    check_devices,
    device_guard,
    launch_config,
    next_power_of_2,
    use_triton,
)
from fastgpt_kernels._units import common_unit


def constants(
    D: int, group: int, *,
    causal: bool, windowed: bool, softcap: bool, docs: bool = False, varlen: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The constexprs the three kernels share; blocks and dot precision come from the table."""
    return {
        "GROUP": group, "HEAD_DIM": D, "BLOCK_D": max(next_power_of_2(D), 16),
        "CAUSAL": causal, "WINDOWED": windowed, "SOFTCAP": softcap,
        "DOCS": docs, "VARLEN": varlen,
    }  # fmt: skip


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """What multiplies a dot product before the tanh, and after it on the way to base 2."""
    log2_e = math.log2(math.e)
    return (scale / softcap, softcap * log2_e) if softcap > 0.0 else (1.0, scale * log2_e)


def steps(x: Tensor) -> list[int]:
    """Strides, 0 for a leading dim of one element, where PyTorch allows any."""
    leading = zip(x.shape[:-1], x.stride(), strict=False)
    return [*(0 if size == 1 else stride for size, stride in leading), x.stride(-1)]


def strides_and_unit(*tensors: list[int]) -> tuple[list[int], int]:
    """The strides of tensors in a row, and the ``common_unit`` of the leading ones."""
    leading = [stride for strides in tensors for stride in strides[:-1]]
    return [stride for strides in tensors for stride in strides], common_unit(*leading)


_NOT_PACKED = None, None, None  # cu_seqlens of queries and of keys, tiles


def launch(kernel: Any, n_programs: int, *args: Any, **options: Any) -> None:
    """Run ``kernel`` on a one-dimensional grid; apart so that tests can see every launch."""
    kernel[(n_programs,)](*args, **options)


def _empty_like_bthd(x_BHTD: Tensor) -> Tensor:
    """Uninitialised, shaped like x, memory (B, T, H, D): ``transpose(1, 2).flatten(2)`` is free."""
    B, H, T, D = x_BHTD.shape
    return x_BHTD.new_empty((B, T, H, D)).transpose(1, 2)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None,
    causal: bool, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, base-2 log-sum-exp (B, H, T)); window 0 and softcap 0 are none."""
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    out = _empty_like_bthd(q)
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    config = launch_config("attention_fwd", q.device, q.dtype, D)
    window = min(window, T + S)  # which hides nothing; more could overflow
    shape = constants(
        D, H // HK, causal=causal, windowed=window > 0, softcap=softcap > 0.0,
        docs=doc_start is not None,
    )  # fmt: skip
    strides, unit = strides_and_unit(*map(steps, (q, k, v)))
    with device_guard(q):
        launch(
            fwd_kernel, cdiv(T, config["BLOCK_M"]) * B * H,
            q, k, v, doc_start, *_NOT_PACKED, out, lse, *strides,
            H, T, S, window, 0, 0, *score_factors(scale, softcap), UNIT=unit, **shape, **config,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, grad_lse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, doc_start: Tensor | None,
    causal: bool, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) from the gradients of out and of the natural log-sum-exp (None: no gradient).

    out and lse must be what the forward returned, in whatever memory.
    """
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    window = min(window, T + S)
    # Hooks on saved tensors (offloading) may give them back with other strides.
    out, lse = out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    dq, dk, dv = _empty_like_bthd(q), _empty_like_bthd(k), _empty_like_bthd(v)
    delta = torch.empty_like(lse)
    doc_end = None
    if doc_start is not None:  # per key, how many queries have their first key at or before it
        keys = torch.arange(S, dtype=torch.int32, device=q.device).expand(B, S).contiguous()
        doc_end = torch.searchsorted(doc_start, keys, right=True, out_int32=True)
    shape = constants(
        D, H // HK, causal=causal, windowed=window > 0, softcap=softcap > 0.0,
        docs=doc_start is not None,
    )  # fmt: skip
    strides, shape["UNIT"] = strides_and_unit(*map(steps, (q, k, v, grad)))
    scalars = (H, T, S, window, 0, 0, scale, *score_factors(scale, softcap))
    with device_guard(q):
        if dq.numel():
            config = launch_config("attention_bwd_dq", q.device, q.dtype, D)
            launch(
                bwd_dq_kernel, cdiv(T, config["BLOCK_M"]) * B * H,
                q, k, v, doc_start, *_NOT_PACKED, out, grad, grad_lse, lse, delta, dq,
                *strides, *scalars, **shape, **config,
            )  # fmt: skip
        if dk.numel():
            config = launch_config("attention_bwd_dkv", q.device, q.dtype, D)
            launch(
                bwd_dkv_kernel, cdiv(S, config["BLOCK_N"]) * B * HK,
                q, k, v, doc_end, *_NOT_PACKED, grad, lse, delta, dk, dv,
                *strides, *scalars, **shape, **config,
            )  # fmt: skip
    return dq, dk, dv


@_attention.register_fake
def _(q, k, v, doc_start, causal, scale, window, softcap):
    return _empty_like_bthd(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attention_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, doc_start, causal, scale, window, softcap):
    return _empty_like_bthd(q), _empty_like_bthd(k), _empty_like_bthd(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, doc_start, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, doc_start)


def output_gradients(
    out: Tensor, grad: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What a backward gets of its two outputs, filled in, and that of lse changed to base e."""
    if grad is None:
        grad = torch.zeros_like(out)
    if grad_lse is not None:
        grad_lse = (grad_lse * math.log2(math.e)).contiguous()
    return grad, grad_lse


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None and grad_lse is None:
        return (None,) * 8
    saved = ctx.saved_tensors  # read once: checkpointing unpacks them once
    grads = output_gradients(saved[3], grad, grad_lse)
    return *_attention_backward(*grads, *saved, *ctx.options), *[None] * 5


_attention.register_autograd(_backward, setup_context=_setup_context)


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
    """Softmax attention, in the layout of ``F.scaled_dot_product_attention``.

    On a GPU this runs the Triton kernels, on a CPU ``fastgpt_kernels.cpu.attention``. Any strides
    are taken as they are: ``x.view(B, T, H, D).transpose(1, 2)`` costs nothing, and neither does
    ``out.transpose(1, 2).flatten(2)``. Under autocast the operands are cast, as PyTorch's are.

    Args:
        q_BHTD: queries; float32, float16 or bfloat16; D from 1 to 256.
        k_BHSD: keys, with as many heads as the queries or a divisor of that (query head h uses key
            head ``h // (H // HK)``).
        v_BHSD: values, shaped like the keys.
        causal: query i sees keys up to ``i + S - T`` (the last query sees the last key).
        scale: positive factor on the dot products; ``D ** -0.5`` if None.
        window: query i sees no key before ``i + S - T - window + 1``: at most ``window`` keys, its
            own included, when causal.
        softcap: c > 0 replaces a score x by ``c * tanh(x / c)``.
        doc_start: (B, T) int32, non-decreasing along T: the first key each query may see, which
            keeps the documents of a packed row apart.

    Returns:
        (B, H, T, D) in the dtype of q, with memory (B, T, H, D). A query that sees no key gives 0
        and passes no gradient.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
    """
    q_BHTD, k_BHSD, v_BHSD = cast_under_autocast(q_BHTD, k_BHSD, v_BHSD)
    _check(q_BHTD, k_BHSD, v_BHSD, scale, window, softcap, doc_start)
    scale = default_scale(q_BHTD, scale)
    if not use_triton(q_BHTD):
        return cpu.attention(
            q_BHTD, k_BHSD, v_BHSD,
            causal=causal, scale=scale, window=window, softcap=softcap, doc_start=doc_start,
        )  # fmt: skip
    out_BHTD, _ = _attention(
        q_BHTD, k_BHSD, v_BHSD, None if doc_start is None else doc_start.contiguous(),
        causal, scale, window or 0, float(softcap or 0.0),
    )  # fmt: skip
    return out_BHTD


def natural_lse(lse: Tensor) -> Tensor:
    """The kernels' log-sum-exp (base 2, +inf where nothing is seen) in base e, -inf there."""
    return torch.where(lse == math.inf, -math.inf, lse * math.log(2.0))


def attention_with_lse(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    doc_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``attention``, and the log-sum-exp of each row of scores; differentiable in both.

    Attention over a set of keys is put together from attention over parts of it: with
    ``(o_1, l_1)`` and ``(o_2, l_2)``, ``l = logaddexp(l_1, l_2)`` and
    ``o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2``. The gradient of lse costs nothing: it is
    subtracted from ``delta`` (see ``_attention_kernels.py``).

    Args:
        q_BHTD: as in ``attention``, like all the others.
        k_BHSD: keys.
        v_BHSD: values.
        causal: see ``attention``.
        scale: see ``attention``.
        window: see ``attention``.
        softcap: see ``attention``.
        doc_start: see ``attention``.

    Returns:
        out (B, H, T, D) as from ``attention``, and lse (B, H, T) float32, base e: -inf where a
        query sees no key. On a CPU all scores (B, H, T, S) are held at once.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
    """
    q_BHTD, k_BHSD, v_BHSD = cast_under_autocast(q_BHTD, k_BHSD, v_BHSD)
    _check(q_BHTD, k_BHSD, v_BHSD, scale, window, softcap, doc_start)
    scale = default_scale(q_BHTD, scale)
    if not use_triton(q_BHTD):
        return cpu_attention.attention_with_lse(
            q_BHTD, k_BHSD, v_BHSD,
            causal=causal, scale=scale, window=window, softcap=softcap, doc_start=doc_start,
        )  # fmt: skip
    out_BHTD, lse_BHT = _attention(
        q_BHTD, k_BHSD, v_BHSD, None if doc_start is None else doc_start.contiguous(),
        causal, scale, window or 0, float(softcap or 0.0),
    )  # fmt: skip
    return out_BHTD, natural_lse(lse_BHT)


def _check(
    q: Tensor, k: Tensor, v: Tensor,
    scale: float | None, window: int | None, softcap: float | None, doc_start: Tensor | None,
) -> None:  # fmt: skip
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} should be "
            "(B, H, T, D) and twice the same (B, HK, S, D)"
        )
    B, H, T, D = q.shape
    if k.shape[0] != B or k.shape[3] != D or H == 0 or k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(
            f"attention: k {tuple(k.shape)} does not fit q {tuple(q.shape)}: B and D must be "
            "equal, and the heads of q a positive multiple of those of k"
        )
    check_types("attention", q, k, v)
    check_positive("attention", scale=scale, window=window, softcap=softcap)
    if doc_start is not None and (
        doc_start.shape != (B, T) or doc_start.dtype != torch.int32 or doc_start.device != q.device
    ):
        raise ValueError(
            f"attention: doc_start is {tuple(doc_start.shape)} {doc_start.dtype} on "
            f"{doc_start.device}; it must be {(B, T)} torch.int32 on {q.device}"
        )


def default_scale(q: Tensor, scale: float | None) -> float:
    """``scale``, or D ** -0.5 if it is None."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def check_types(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless the kernels take these dtypes, devices and this head size."""
    D = q.shape[-1]
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not 1 <= D <= 256:
        raise ValueError(
            f"{name}: {q.dtype} with head size {D}; supported are float32, float16 and bfloat16 "
            "with head sizes 1 to 256"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"{name}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    check_devices(name, q, k, v)


def check_positive(name: str, window: int | None, **options: float | None) -> None:
    """Raise ValueError for an option that is neither None nor positive, or a part of a key."""
    if isinstance(window, float):
        raise ValueError(f"{name}: window is {window}, it must be a whole number (or None)")
    for option, value in {"window": window, **options}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: {option} is {value}, it must be positive (or None)")


def aot_cases() -> list[AotCase]:
    """What the static gate compiles: of each kernel the two usual cases first, then variants."""
    plain = {"causal": True, "windowed": False, "docs": False, "softcap": False}
    banded = {**plain, "windowed": True, "docs": True}
    variants = [
        (64, 1, torch.bfloat16, plain),
        (128, 1, torch.bfloat16, plain),
        (64, 1, torch.bfloat16, {**plain, "causal": False}),
        (64, 4, torch.bfloat16, banded),
        (128, 4, torch.bfloat16, banded),
        (128, 1, torch.bfloat16, {**plain, "softcap": True}),
        (32, 1, torch.float16, plain),
        (40, 4, torch.bfloat16, banded),
        (72, 1, torch.bfloat16, plain),
        (96, 4, torch.bfloat16, banded),
        (256, 8, torch.bfloat16, plain),
        (64, 1, torch.float32, plain),
        (128, 1, torch.float32, plain),
        (80, 1, torch.float16, plain),
        (256, 4, torch.float32, plain),
        (32, 1, torch.float32, plain),
        (40, 1, torch.float32, plain),
        (80, 1, torch.float32, plain),
    ]
    return [case for variant in variants for case in aot_kernels(*variant)]


def aot_kernels(D: int, group: int, dtype: torch.dtype, mask: dict[str, bool]) -> list[AotCase]:
    """The cases of the three kernels for one kind of problem."""
    return [
        case
        for name, kernel in (
            ("attention_fwd", fwd_kernel),
            ("attention_bwd_dq", bwd_dq_kernel),
            ("attention_bwd_dkv", bwd_dkv_kernel),
        )
        for case in _aot_variants(name, kernel, D, group, dtype, mask)
    ]


def _aot_variants(
    name: str, kernel: Any, D: int, group: int, dtype: torch.dtype, mask: dict[str, bool]
) -> list[AotCase]:
    element = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    arguments = kernel.arg_names
    strides = tuple(arg for arg in arguments if arg.startswith("stride_"))
    types = dict.fromkeys(arguments, "i32")
    types.update({arg: f"*{element}" for arg in arguments if arg.endswith("_ptr")})
    types.update(dict.fromkeys(("lse_ptr", "delta_ptr", "dlse_ptr"), "*fp32"))
    types.update(dict.fromkeys(("doc_ptr", "doc_end_ptr", *_PACKING), "*i32"))
    types.update(scale="fp32", score_in="fp32", score_log2="fp32")
    fixed = constants(D, group, **mask) | {arg: 1 for arg in strides if arg.endswith("d")}
    fixed["UNIT"] = unit = common_unit(D)
    absent = ["dlse_ptr"]
    absent += [] if mask.get("docs") else ["doc_ptr", "doc_end_ptr"]
    absent += [] if mask.get("varlen") else _PACKING
    fixed |= dict.fromkeys(absent)
    options = "+".join(switch for switch, on in mask.items() if on) or "full"
    label = f"{name}/d{D}-{element}-g{group}-{options}"
    return aot_variants(label, name, kernel, dtype, D, types, fixed, strides if unit == 1 else ())


_PACKING = ["cu_q_ptr", "cu_k_ptr", "tiles_ptr"]

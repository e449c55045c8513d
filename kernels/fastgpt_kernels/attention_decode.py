"""Attention of one or a few new tokens against a cache of keys: launchers, operator, function.

The formulas and the Triton kernels are in ``_decode_kernels.py``.

Legend: B batch, T new tokens, S capacity of the cache, H query heads, HK key heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import _cpu_attention
from fastgpt_kernels._common import (
    NAMESPACE,
    AotCase,
    aot_case,
    aot_variants,
    cast_under_autocast,
    cdiv,
    device_guard,
    launch_config,
    multiprocessor_count,
    next_power_of_2,
    use_triton,
)
from fastgpt_kernels._decode_kernels import combine_kernel, split_kernel
from fastgpt_kernels.attention import (
    check_positive,
    check_types,
    default_scale,
    launch,
    score_factors,
    steps,
    strides_and_unit,
)

_PROGRAMS_PER_SM = 4  # what the smallest tiles leave room for, so that loads overlap
_MAX_SPLITS = 128
_COMBINE = {"BLOCK_S": 16, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def _block_d(D: int) -> int:
    return max(next_power_of_2(D), 16)


def _n_splits(x: Tensor, n_programs: int, capacity: int, block_n: int) -> int:
    """Runs of keys: enough programs to fill the GPU, of two blocks at least in a full cache."""
    wanted = cdiv(_PROGRAMS_PER_SM * multiprocessor_count(x), n_programs)
    return max(1, min(wanted, cdiv(capacity, 2 * block_n), _MAX_SPLITS))


@torch.library.custom_op(f"{NAMESPACE}::attention_decode", mutates_args=())
def _attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, starts: Tensor | None,
    scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Out (B, T, H, D); window 0 and softcap 0 are none."""
    B, T, H, D = q.shape
    S, HK = k_cache.shape[1:3]
    out = q.new_empty(q.shape)
    if out.numel() == 0 or S == 0:
        return out.zero_()
    config = launch_config("attention_decode", q.device, q.dtype, D)
    window = min(window, T + S)  # which hides nothing; more could overflow
    # A wider tile of full precision products does not fit in registers.
    narrow = T * (H // HK) <= 16 or (q.dtype == torch.float32 and D > 64)
    block_m = 16 if narrow else 32
    n_programs = B * HK * cdiv(T * (H // HK), block_m)
    n_splits = _n_splits(q, n_programs, S, config["BLOCK_N"])
    part, lse = out, None
    if n_splits > 1:
        part = q.new_empty((B, T, H, n_splits, D), dtype=torch.float32)
        lse = q.new_empty((B, T, H, n_splits), dtype=torch.float32)
    strides, unit = strides_and_unit(*map(steps, (q, k_cache, v_cache)))
    with device_guard(q):
        launch(
            split_kernel, n_programs * n_splits,
            q, k_cache, v_cache, lengths, starts, part, lse,
            *strides, H, T, S, window, n_splits, *score_factors(scale, softcap),
            GROUP=H // HK, HEAD_DIM=D, WINDOWED=window > 0, SOFTCAP=softcap > 0.0,
            SPLIT=n_splits > 1, BLOCK_M=block_m, BLOCK_D=_block_d(D), UNIT=unit, **config,
        )  # fmt: skip
        if n_splits > 1:
            launch(
                combine_kernel, B * T * H, part, lse, out, n_splits,
                HEAD_DIM=D, BLOCK_D=_block_d(D), **_COMBINE,
            )  # fmt: skip
    return out


@_attention_decode.register_fake
def _(q, k_cache, v_cache, lengths, starts, scale, window, softcap):
    return q.new_empty(q.shape)


def attention_decode(
    q_BTHD: Tensor,
    k_cache_BSHD: Tensor,
    v_cache_BSHD: Tensor,
    cache_seqlens_B: Tensor,
    *,
    cache_starts_B: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the newest tokens of each row over its cache. Has no gradient.

    Each key is read once for all query heads that share it, and the keys of a row are spread over
    the GPU. Two runs give the same bits.

    Args:
        q_BTHD: queries of the T newest tokens (one, or a few); float32, float16 or bfloat16; D
            from 1 to 256; any strides.
        k_cache_BSHD: cached keys, those of the new tokens included, with as many heads as the
            queries or a divisor of that; any strides, so ``cache_BHSD.transpose(1, 2)`` will do.
            What lies behind a row's length is not read.
        v_cache_BSHD: cached values, shaped like the keys.
        cache_seqlens_B: (B,) int32: cached tokens of each row, the new ones included; 0 to S.
        cache_starts_B: (B,) int32: first token of each row that may be seen (of a prompt padded on
            the left); 0 if None.
        scale: positive factor on the dot products; ``D ** -0.5`` if None.
        window: at most this many tokens seen, the query's own included.
        softcap: c > 0 replaces a score x by ``c * tanh(x / c)``.

    Returns:
        (B, T, H, D) in the dtype of q, contiguous; 0 for a token that sees nothing, as all tokens
        of a row of length 0 do.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together, or inputs that require a
            gradient.
    """
    q_BTHD, k_cache_BSHD, v_cache_BSHD = cast_under_autocast(q_BTHD, k_cache_BSHD, v_cache_BSHD)
    _check(q_BTHD, k_cache_BSHD, v_cache_BSHD, cache_seqlens_B, cache_starts_B)
    check_positive("attention_decode", scale=scale, window=window, softcap=softcap)
    scale = default_scale(q_BTHD, scale)
    starts = None if cache_starts_B is None else cache_starts_B.contiguous()
    run = _attention_decode if use_triton(q_BTHD) else _cpu_attention.attention_decode
    return run(
        q_BTHD, k_cache_BSHD, v_cache_BSHD, cache_seqlens_B.contiguous(), starts,
        scale, window or 0, float(softcap or 0.0),
    )  # fmt: skip


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"attention_decode: q {tuple(q.shape)}, k_cache {tuple(k.shape)}, v_cache "
            f"{tuple(v.shape)} should be (B, T, H, D) and twice the same (B, S, HK, D)"
        )
    if (
        k.shape[0] != q.shape[0]
        or k.shape[3] != q.shape[3]
        or not q.shape[2]
        or not k.shape[2]
        or (q.shape[2] % k.shape[2])
    ):
        raise ValueError(
            f"attention_decode: k_cache {tuple(k.shape)} does not fit q {tuple(q.shape)}: B and D "
            "must be equal, and the heads of q a positive multiple of those of k"
        )
    check_types("attention_decode", q, k, v)
    for name, x in (("cache_seqlens_B", lengths), ("cache_starts_B", starts)):
        if x is not None and (
            x.shape != q.shape[:1] or x.dtype != torch.int32 or x.device != q.device
        ):
            raise ValueError(
                f"attention_decode: {name} is {tuple(x.shape)} {x.dtype} on {x.device}; it must be "
                f"{tuple(q.shape[:1])} torch.int32 on {q.device}"
            )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "attention_decode has no gradient and an input requires one: call it under "
            "torch.no_grad(), or use attention, which has"
        )


def aot_cases() -> list[AotCase]:
    """What the static gate compiles: tiles of one query head and of many, split and whole."""
    variants = [
        (64, 1, 16, torch.bfloat16, True, False),
        (128, 8, 16, torch.bfloat16, True, False),
        (128, 8, 32, torch.bfloat16, False, True),
        (80, 4, 16, torch.float16, True, True),
        (256, 8, 16, torch.bfloat16, True, False),
        (256, 8, 32, torch.bfloat16, False, True),
        (64, 4, 32, torch.float32, True, False),
        (128, 8, 16, torch.float32, False, True),
        (256, 4, 16, torch.float32, True, False),
    ]
    cases = [case for variant in variants for case in _aot_split(*variant)]
    for D, element in ((64, "bf16"), (128, "bf16"), (80, "fp16"), (256, "fp32")):
        types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": f"*{element}"}
        fixed = {"HEAD_DIM": D, "BLOCK_D": _block_d(D)}
        label = f"attention_combine/d{D}-{element}"
        cases.append(aot_case(label, combine_kernel, types | {"n_splits": "i32"}, fixed, _COMBINE))
    return cases


def _aot_split(
    D: int, group: int, block_m: int, dtype: torch.dtype, split: bool, banded: bool
) -> list[AotCase]:
    element = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    arguments = split_kernel.arg_names
    strides = tuple(arg for arg in arguments if arg.startswith("stride_"))
    types = dict.fromkeys(arguments, "i32")
    types.update(dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{element}"))
    types.update(lengths_ptr="*i32", lse_ptr="*fp32", score_in="fp32", score_log2="fp32")
    types.update(starts_ptr="*i32", out_ptr="*fp32" if split else f"*{element}")
    fixed = {
        "GROUP": group, "HEAD_DIM": D, "WINDOWED": banded, "SOFTCAP": banded, "SPLIT": split,
        "BLOCK_M": block_m, "BLOCK_D": _block_d(D), "UNIT": 1,
        **{arg: 1 for arg in strides if arg.endswith("d")},
    }  # fmt: skip
    fixed |= {} if banded else {"starts_ptr": None}
    fixed |= {} if split else {"lse_ptr": None}
    label = f"attention_decode/d{D}-{element}-g{group}-m{block_m}"
    label += ("-split" if split else "") + ("-banded" if banded else "")
    return aot_variants(label, "attention_decode", split_kernel, dtype, D, types, fixed, strides)

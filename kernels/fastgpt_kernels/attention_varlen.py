"""Attention over packed sequences of different lengths: launchers, operators, public function.

Rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` are sequence i; the kernels are those of
``attention``, whose blocks are cut within the sequences. The lengths stay on the GPU: sequences
that are rounded up to whole blocks need at most ``(rows + (n + 1) (block - 1)) // block`` of
them, which bounds the grid, and a small kernel lists whose rows each block has. Rows behind the
last sequence are one more that sees nothing.

Legend: T rows of queries, S rows of keys, H query heads, HK key heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import _cpu_attention
from fastgpt_kernels._attention_blocks import tiles_kernel
from fastgpt_kernels._attention_kernels import bwd_dkv_kernel, bwd_dq_kernel, fwd_kernel
from fastgpt_kernels._common import (
    NAMESPACE,
    AotCase,
    aot_case,
    cast_under_autocast,
    device_guard,
    launch_config,
    use_triton,
)
from fastgpt_kernels.attention import (
    aot_kernels,
    check_positive,
    check_types,
    constants,
    default_scale,
    launch,
    output_gradients,
    score_factors,
    steps,
    strides_and_unit,
)

_TILES = {"CHUNK": 256, "num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


def _tiles(cu_seqlens: Tensor, n_rows: int, block: int) -> Tensor:
    """(2, n_tiles) int32: sequence and first row of each block; see ``tiles_kernel``."""
    n_seqs = cu_seqlens.shape[0] - 1
    n_tiles = (n_rows + (n_seqs + 1) * (block - 1)) // block
    tiles = cu_seqlens.new_empty((2, n_tiles))
    if n_tiles:
        launch(
            tiles_kernel, n_seqs + 1, cu_seqlens, tiles, n_seqs, n_rows, n_tiles,
            BLOCK=block, **_TILES,
        )  # fmt: skip
    return tiles


def _steps(x_THD: Tensor) -> list[int]:
    """Strides as the kernels take them; the leading one, of a batch, is that of the rows."""
    row, head, col = steps(x_THD)
    return [row, head, row, col]


@torch.library.custom_op(f"{NAMESPACE}::attention_varlen", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor,
    causal: bool, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (T, H, D), base-2 log-sum-exp (H, T)); window 0 and softcap 0 are none."""
    T, H, D = q.shape
    S, HK = k.shape[:2]
    out = q.new_empty(q.shape)
    lse = q.new_empty((H, T), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    config = launch_config("attention_fwd", q.device, q.dtype, D)
    window = min(window, T + S)  # which hides nothing; more could overflow
    shape = constants(
        D, H // HK, causal=causal, windowed=window > 0, softcap=softcap > 0.0, varlen=True
    )
    strides, unit = strides_and_unit(*map(_steps, (q, k, v)))
    with device_guard(q):
        tiles = _tiles(cu_q, T, config["BLOCK_M"])
        launch(
            fwd_kernel, tiles.shape[1] * H,
            q, k, v, None, cu_q, cu_k, tiles, out, lse, *strides,
            H, T, S, window, cu_q.shape[0] - 1, tiles.shape[1], *score_factors(scale, softcap),
            UNIT=unit, **shape, **config,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op(f"{NAMESPACE}::attention_varlen_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    causal: bool, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) like the backward of ``attention``."""
    T, H, D = q.shape
    S, HK = k.shape[:2]
    window = min(window, T + S)
    out, lse = out.contiguous(), lse.contiguous()  # hooks on saved tensors may move them
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    shape = constants(
        D, H // HK, causal=causal, windowed=window > 0, softcap=softcap > 0.0, varlen=True
    )
    strides, shape["UNIT"] = strides_and_unit(*map(_steps, (q, k, v, grad)))
    factors = (scale, *score_factors(scale, softcap))
    n_seqs = cu_q.shape[0] - 1
    with device_guard(q):
        if dq.numel():
            config = launch_config("attention_bwd_dq", q.device, q.dtype, D)
            tiles = _tiles(cu_q, T, config["BLOCK_M"])
            launch(
                bwd_dq_kernel, tiles.shape[1] * H,
                q, k, v, None, cu_q, cu_k, tiles, out, grad, grad_lse, lse, delta, dq,
                *strides, H, T, S, window, n_seqs, tiles.shape[1], *factors, **shape, **config,
            )  # fmt: skip
        if dk.numel():
            config = launch_config("attention_bwd_dkv", q.device, q.dtype, D)
            tiles = _tiles(cu_k, S, config["BLOCK_N"])
            launch(
                bwd_dkv_kernel, tiles.shape[1] * HK,
                q, k, v, None, cu_q, cu_k, tiles, grad, lse, delta, dk, dv,
                *strides, H, T, S, window, n_seqs, tiles.shape[1], *factors, **shape, **config,
            )  # fmt: skip
    return dq, dk, dv


@_attention.register_fake
def _(q, k, v, cu_q, cu_k, causal, scale, window, softcap):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_attention_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, causal, scale, window, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None and grad_lse is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # read once: checkpointing unpacks them once
    grads = output_gradients(saved[3], grad, grad_lse)
    return *_attention_backward(*grads, *saved, *ctx.options), *[None] * 6


_attention.register_autograd(_backward, setup_context=_setup_context)


def attention_varlen(
    q_THD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``attention`` within each of several sequences packed one behind the other.

    The result is that of a mask that keeps the sequences apart. No ``max_seqlen`` is needed and
    nothing waits for the GPU.

    Args:
        q_THD: queries of all sequences; float32, float16 or bfloat16; D from 1 to 256; any strides.
        k_SHD: keys, with as many heads as the queries or a divisor of that.
        v_SHD: values, shaped like the keys.
        cu_seqlens_q: (n + 1,) int32, non-decreasing from 0: where sequences begin among the
            queries, and where the last one ends. Sequences may be empty.
        cu_seqlens_k: the same among the keys; ``cu_seqlens_q`` if None.
        causal: the last query of a sequence sees its last key, the one before one key less ...
        scale: positive factor on the dot products; ``D ** -0.5`` if None.
        window: at most this many keys seen when causal, as in ``attention``.
        softcap: c > 0 replaces a score x by ``c * tanh(x / c)``.

    Returns:
        (T, H, D) in the dtype of q, contiguous. Queries that see no key, and rows behind
        ``cu_seqlens[-1]``, give 0 and pass and get no gradient.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together. What ``cu_seqlens`` holds is
            not checked, which would wait for the GPU; the kernels stay within the tensors.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    q_THD, k_SHD, v_SHD = cast_under_autocast(q_THD, k_SHD, v_SHD)
    _check(q_THD, k_SHD, v_SHD, cu_seqlens_q, cu_seqlens_k)
    check_positive("attention_varlen", scale=scale, window=window, softcap=softcap)
    scale = default_scale(q_THD, scale)
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    options = (causal, scale, window or 0, float(softcap or 0.0))
    if not use_triton(q_THD):
        return _cpu_attention.attention_varlen(q_THD, k_SHD, v_SHD, cu_q, cu_k, options)
    return _attention(q_THD, k_SHD, v_SHD, cu_q, cu_k, *options)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"attention_varlen: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} should "
            "be (T, H, D) and twice the same (S, HK, D)"
        )
    H, HK = q.shape[1], k.shape[1]
    if k.shape[2] != q.shape[2] or H == 0 or HK == 0 or H % HK:
        raise ValueError(
            f"attention_varlen: k {tuple(k.shape)} does not fit q {tuple(q.shape)}: D must be "
            "equal, and the heads of q a positive multiple of those of k"
        )
    check_types("attention_varlen", q, k, v)
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu.dim() != 1 or cu.dtype != torch.int32 or cu.device != q.device or not cu.numel():
            raise ValueError(
                f"attention_varlen: {name} is {tuple(cu.shape)} {cu.dtype} on {cu.device}; it must "
                f"be (n + 1,) torch.int32 on {q.device}"
            )
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"attention_varlen: cu_seqlens_q and cu_seqlens_k tell of {cu_q.shape[0] - 1} and "
            f"{cu_k.shape[0] - 1} sequences; each has queries and keys, of which there may be none"
        )


def aot_cases() -> list[AotCase]:
    """What the static gate compiles: kinds of problem that ``attention`` has without packing."""
    plain = {"causal": True, "windowed": False, "softcap": False, "varlen": True}
    variants = [
        (64, 1, torch.bfloat16, plain),
        (128, 4, torch.bfloat16, {**plain, "windowed": True}),
        (128, 1, torch.bfloat16, {**plain, "causal": False, "softcap": True}),
        (80, 1, torch.float16, plain),
        (256, 8, torch.bfloat16, plain),
        (64, 1, torch.float32, plain),
    ]
    types = {"cu_ptr": "*i32", "tiles_ptr": "*i32"}
    types |= dict.fromkeys(("n_seqs", "n_rows", "n_tiles"), "i32")
    tiles = aot_case("attention_tiles/128", tiles_kernel, types, {"BLOCK": 128}, _TILES)
    return [tiles, *(case for variant in variants for case in aot_kernels(*variant))]

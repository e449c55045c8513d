"""Log-probabilities of given ids, and entropies, under a linear layer's logits, none of them kept.

With x = softcap(hidden @ weight^T + bias) / temperature, p = softmax(x) and id the row's id::

    log_prob = x_id - log sum exp x              entropy = -sum_v p_v log p_v
    d log_prob / d x_v = [v = id] - p_v          d entropy / d x_v = -p_v (log p_v + entropy)

Both functions go over the rows a chunk at a time: one GEMM makes a chunk's logits, one kernel turns
them into two results and two statistics a row. The backward makes the logits again (on a CPU those
of a single chunk are kept), overwrites them by their own gradient ``dlogits``, and two GEMMs make
``dhidden = dlogits @ weight`` and ``dweight += dlogits^T @ hidden`` (in float32). Peak memory
beyond inputs and gradients is one chunk, whatever the number of rows. The gradients cannot be made
in the forward, as ``linear_cross_entropy`` does: each row has its own gradient, for both results.

Shapes: hidden (N, D), weight (V, D), bias (V,), ids (N,).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import _cpu_log_probs, cpu
from fastgpt_kernels._common import (
    AOT_DTYPES,
    AotCase,
    aot_variants,
    cast_under_autocast,
    device_guard,
    launch_config,
    next_power_of_2,
    use_triton,
)
from fastgpt_kernels._linear import (
    accumulate,
    check_linear,
    chunk_rows,
    logits_buffer,
    logits_into,
)
from fastgpt_kernels._log_prob_kernels import log_prob_gradient_kernel, log_prob_kernel
from fastgpt_kernels.cross_entropy import (
    as_indices,
    soft_cap_arguments,
    soft_cap_mode,
    vector_width,
)

LOG2E = 1.4426950408889634

# (ignore_index, 1 / temperature, softcap): what is scored, as operators pass it.
_Options = tuple[int, float, float]


def _launch_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ignore_index, inverse_temperature, softcap = options
    n_rows, n_cols = hidden.shape[0], weight.shape[0]
    log_probs, entropy, top, total = (
        hidden.new_empty(n_rows, dtype=torch.float32) for _ in range(4)
    )
    step = chunk_rows(n_rows, n_cols)
    buffer = logits_buffer(hidden, weight, min(step, n_rows))
    config = launch_config("log_prob", hidden.device, hidden.dtype, next_power_of_2(n_cols))
    flags: dict[str, Any] = {
        "SOFTCAP": soft_cap_mode(softcap, hidden.dtype), "VEC": vector_width(buffer)
    }  # fmt: skip
    scale = inverse_temperature * LOG2E
    cap, inverse_cap = soft_cap_arguments(softcap)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        logits = logits_into(buffer, hidden[rows], weight, bias)
        with device_guard(logits):
            log_prob_kernel[(logits.shape[0],)](
                logits, ids[rows], log_probs[rows], entropy[rows], top[rows], total[rows], n_cols,
                logits.stride(0), 1, ids.stride(0), ignore_index, scale, cap, inverse_cap,
                **flags, **config,
            )  # fmt: skip
    return log_probs, entropy, top, total


def _launch_bwd(
    a: Tensor,
    b: Tensor,
    own: Tensor,
    top: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    options: _Options,
    with_entropy: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    ignore_index, inverse_temperature, softcap = options
    n_rows, n_cols = hidden.shape[0], weight.shape[0]
    dhidden = hidden.new_empty(hidden.shape if needs[0] else 0)
    dweight = hidden.new_zeros(weight.shape if needs[1] else 0, dtype=torch.float32)
    dbias = hidden.new_zeros(n_cols if needs[2] else 0, dtype=torch.float32)
    step = chunk_rows(n_rows, n_cols)
    buffer = logits_buffer(hidden, weight, min(step, n_rows))
    bucket = next_power_of_2(n_cols)
    config = launch_config("log_prob_gradient", hidden.device, hidden.dtype, bucket)
    flags: dict[str, Any] = {
        "SOFTCAP": soft_cap_mode(softcap, hidden.dtype),
        "ENTROPY": with_entropy,
        "VEC": vector_width(buffer),
    }  # fmt: skip
    scale = inverse_temperature * LOG2E
    cap, inverse_cap = soft_cap_arguments(softcap)
    a, b, own = (x * inverse_temperature for x in (a, b, own))
    kept = (ids != ignore_index)[:, None]
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        # An ignored row may hold anything, and 0 * NaN is NaN.
        h = torch.where(kept[rows], hidden[rows], 0.0)
        logits = logits_into(buffer, h, weight, bias)
        with device_guard(logits):
            log_prob_gradient_kernel[(logits.shape[0],)](
                logits, ids[rows], top[rows], a[rows], b[rows], own[rows], n_cols,
                logits.stride(0), ids.stride(0), ignore_index, scale, cap, inverse_cap,
                **flags, **config,
            )  # fmt: skip
        if needs[0]:
            torch.mm(logits, weight, out=dhidden[rows])
        if needs[1]:
            accumulate(dweight, logits.t(), h)
        if needs[2]:
            dbias += logits.sum(0, dtype=torch.float32)
    return dhidden, dweight, dbias


@torch.library.custom_op("fastgpt_kernels::linear_log_probs_fwd", mutates_args=())
def linear_log_probs_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    ignore_index: int,
    inverse_temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability and entropy of every row, and two floats (their scale is the device's own)
    that the backward needs.
    """
    weight = weight.to(hidden.dtype)
    options = ignore_index, inverse_temperature, softcap
    if hidden.shape[0] == 0:
        return tuple(hidden.new_empty(0, dtype=torch.float32) for _ in range(4))  # pyright: ignore
    if use_triton(hidden):
        return _launch_fwd(hidden, weight, bias, ids, options)
    return _cpu_log_probs.forward(hidden, weight, bias, ids, *options)


@linear_log_probs_fwd.register_fake
def _(hidden, weight, bias, ids, ignore_index, inverse_temperature, softcap):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("fastgpt_kernels::linear_log_probs_bwd", mutates_args=())
def linear_log_probs_bwd(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    log_probs: Tensor,
    entropy: Tensor,
    top: Tensor,
    total: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    ignore_index: int,
    inverse_temperature: float,
    softcap: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(grad_log_probs * log_probs + grad_entropy * entropy)`` for hidden, weight
    and bias (these two in float32), those not needed empty.

    A gradient that is None is zero, and without ``grad_entropy`` its arithmetic is left out.
    """
    weight = weight.to(hidden.dtype)
    options = ignore_index, inverse_temperature, softcap
    needs = needs_hidden, needs_weight, needs_bias
    if hidden.shape[0] == 0:
        dhidden, *rest = _empty_gradients(hidden, weight, *needs)
        return dhidden, *(x.zero_() for x in rest)  # pyright: ignore[reportReturnType]
    kept = ids != ignore_index
    a, b, own = _coefficients(grad_log_probs, grad_entropy, log_probs, entropy, total, kept)
    if use_triton(hidden):
        # There y = q ln 2, e = 2^q.
        b = b * 0.6931471805599453
        entropic = grad_entropy is not None
        return _launch_bwd(a, b, own, top, hidden, weight, bias, ids, options, entropic, needs)
    return _cpu_log_probs.backward(a, b, own, top, hidden, weight, bias, ids, *options, needs)


def _coefficients(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    log_probs: Tensor,
    entropy: Tensor,
    total: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: a and b of ``d = exp(y) (a + b y)``, and d at the row's own id."""
    zero = torch.zeros_like(log_probs)
    # What arrives at an ignored row may be anything, NaN included.
    g, h = (
        zero if x is None else torch.where(kept, x, zero) for x in (grad_log_probs, grad_entropy)
    )
    # d = p (-g - h (log p + H)) + [v = id] g, with p = e / total, log p = y - log(total)
    own = -(g * torch.expm1(log_probs) + h * torch.exp(log_probs) * (log_probs + entropy))
    a = (-g - h * (entropy - total.log())) / total
    return a, -h / total, own


def _empty_gradients(hidden, weight, needs_hidden, needs_weight, needs_bias):
    dhidden = hidden.new_empty(hidden.shape if needs_hidden else (0,))
    dweight = hidden.new_empty(weight.shape if needs_weight else (0,), dtype=torch.float32)
    dbias = hidden.new_empty(weight.shape[0] if needs_bias else 0, dtype=torch.float32)
    return dhidden, dweight, dbias


@linear_log_probs_bwd.register_fake
def _(
    grad_log_probs, grad_entropy, log_probs, entropy, top, total, hidden, weight, bias, ids,
    ignore_index, inverse_temperature, softcap, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    return _empty_gradients(hidden, weight, needs_hidden, needs_weight, needs_bias)


def _save(ctx, inputs, output):
    hidden, weight, bias, ids, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, hidden, weight, bias, ids)


def _backward(ctx, grad_log_probs, grad_entropy, _grad_top, _grad_total):
    if grad_log_probs is None and grad_entropy is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # read once: checkpointing unpacks them once
    *_, weight, bias, _ids = saved
    needs = ctx.needs_input_grad[:3]
    dhidden, dweight, dbias = linear_log_probs_bwd(
        grad_log_probs, grad_entropy, *saved, *ctx.options, *needs
    )
    return (
        dhidden if needs[0] else None,
        dweight.to(weight.dtype) if needs[1] else None,
        dbias.to(bias.dtype) if needs[2] else None,
        *[None] * 4,
    )


linear_log_probs_fwd.register_autograd(_backward, setup_context=_save)


class _Kept(torch.autograd.Function):
    """The CPU path for rows of a single chunk, whose logits stay until the backward.

    Peak memory is one chunk as with the operators, and a third of the backward's GEMMs are saved.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, *options):
        ctx.options = options
        ctx.set_materialize_grads(False)
        cast = weight.to(hidden.dtype)
        # An ignored row may hold anything, and 0 * NaN is NaN.
        hidden = torch.where((ids != options[0])[:, None], hidden, 0.0)
        logits = torch.nn.functional.linear(hidden, cast, bias)
        results = _cpu_log_probs.forward(hidden, cast, bias, ids, *options, all_logits=logits)
        ctx.save_for_backward(*results, hidden, weight, bias, ids, logits)
        return results[0], results[1]

    @staticmethod
    @cpu.differentiable_once
    def backward(ctx, grad_log_probs, grad_entropy):  # pyright: ignore[reportIncompatibleMethodOverride]
        *results, hidden, weight, bias, ids, logits = ctx.saved_tensors
        log_probs, entropy, top, total = results
        needs = ctx.needs_input_grad[:3]
        kept = ids != ctx.options[0]
        a, b, own = _coefficients(grad_log_probs, grad_entropy, log_probs, entropy, total, kept)
        cast = weight.to(hidden.dtype)
        dhidden, dweight, dbias = _cpu_log_probs.backward(
            a, b, own, top, hidden, cast, bias, ids, *ctx.options, needs=needs, all_logits=logits
        )
        return (
            dhidden if needs[0] else None,
            dweight.to(weight.dtype) if needs[1] else None,
            dbias.to(bias.dtype) if needs[2] else None,
            *[None] * 4,
        )


def _keeps_logits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether an eager call on a CPU needs gradients of no more rows than make one chunk."""
    if hidden.device.type != "cpu" or use_triton(hidden) or torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return False
    return _cpu_log_probs.in_one_chunk(hidden, weight)


_AOT_TYPES = {
    **dict.fromkeys(
        ("log_probs", "entropy", "row_top", "row_total", "row_a", "row_b", "row_own"), "*fp32"
    ),
    **dict.fromkeys(("n_cols", "stride_row", "ignore_index"), "i32"),
    **dict.fromkeys(("scale", "softcap", "inv_softcap"), "fp32"),
    "ids": "*i64",
}


def aot_cases() -> list[AotCase]:
    """Instances for the static gate; rows are padded, so a vocabulary is odd in its length only."""
    cases = []
    kernels = (
        ("log_prob", log_prob_kernel, {}),
        ("log_prob_gradient", log_prob_gradient_kernel, {"ENTROPY": True}),
        ("log_prob_gradient", log_prob_gradient_kernel, {"ENTROPY": False}),
    )
    sizes = itertools.product((256, 50257, 128256), AOT_DTYPES.items(), (False, True))
    for (n_cols, (name, dtype), cap), (kernel, fn, flags) in itertools.product(sizes, kernels):
        constants = {
            **flags,
            "SOFTCAP": soft_cap_mode(float(cap), dtype),
            "VEC": 16 // dtype.itemsize,
            **dict.fromkeys(("stride_col", "stride_ids"), 1),
        }
        suffix = f"{'_entropy' * flags.get('ENTROPY', False)}{'_softcap' * cap}"
        cases += aot_variants(
            f"{kernel}/{n_cols}_{name}{suffix}", kernel, fn, dtype, next_power_of_2(n_cols),
            {**_AOT_TYPES, "logits": f"*{name}"}, constants,
            ("n_cols", "stride_row") if n_cols % 16 == 0 else ("stride_row",),
        )  # fmt: skip
    return cases


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
    """Log-probabilities of ``ids`` and entropies under ``softmax(hidden @ weight^T + bias)``.

    Memory is independent of tokens x vocabulary. Both results are differentiable, with respect to
    hidden, weight and bias. Under autocast the operands are cast as ``torch.nn.functional.linear``
    would.

    Args:
        hidden: hidden states (..., D), float32, float16 or bfloat16.
        weight_VD: weight of the output layer (V, D), same dtype, or float32: a master weight, which
            is cast to the dtype of ``hidden`` and gets a float32 gradient.
        ids: what to score at each position (...), any integer dtype. The caller has shifted them:
            ``ids[..., t]`` is scored under ``hidden[..., t]``. On a GPU an id outside [0, V) other
            than ``ignore_index`` gives NaN; on the CPU it raises IndexError or RuntimeError.
        bias: bias of the output layer (V,), in the dtype of ``hidden``.
        temperature: the capped logits are divided by it, as a sampler does.
        softcap: logits are replaced by ``softcap * tanh(logits / softcap)``.
        ignore_index: positions with this id have log-probability 0, entropy 0 and no gradient,
            whatever ``hidden`` and the incoming gradient hold there.

    Returns:
        log_probs (...) and entropy (...) in nats, float32.

    Raises:
        ValueError: wrong shapes or dtypes, or options out of range.
    """
    hidden, weight, bias = cast_under_autocast(hidden, weight_VD, bias)
    name = "linear_log_probs"
    check_linear(name, hidden, weight, bias, ids, ("hidden", "weight", "bias"))
    if ids.shape != hidden.shape[:-1] or ids.is_floating_point():
        raise ValueError(
            f"{name}: ids must hold one index for each of {tuple(hidden.shape[:-1])} positions, "
            f"got shape {tuple(ids.shape)} and {ids.dtype}"
        )
    if not temperature > 0:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap must be positive (or None), got {softcap}")
    options = ignore_index, 1.0 / temperature, float(softcap or 0.0)
    flat = hidden.reshape(-1, hidden.shape[-1])
    run = _Kept.apply if _keeps_logits(flat, weight) else linear_log_probs_fwd
    log_probs, entropy, *_ = run(flat, weight, bias, as_indices(ids.reshape(-1)), *options)
    return log_probs.view(ids.shape), entropy.view(ids.shape)

"""Activations of feed-forward networks, plain and gated, with one kernel per direction.

With s the logistic function and P the normal distribution function::

    silu(x) = x s(x)                                 relu_squared(x) = max(x, 0)^2
    gelu(x) = x P(x)                                 (arXiv:1606.08415)
    gelu(x, "tanh") = x s(2 sqrt(2 / pi) (x + 0.044715 x^3)), as tanh(u) = 2 s(2u) - 1
    swiglu(gate, up) = silu(gate) up                 geglu(gate, up) = gelu(gate) up

(GLU variants: arXiv:2002.05202; squared ReLU: arXiv:2109.08668.) Everything between load and store
is float32. The backward keeps the inputs only and computes values and slopes again, which costs
nothing beside the memory traffic: x, up and dy are read once, dx and dup written once.

Shapes: any, with any strides; the halves of one fused projection are taken as they lie.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import _cpu_pointwise, cpu
from fastgpt_kernels._activation_kernels import bwd_kernel, fwd_kernel
from fastgpt_kernels._common import (
    AOT_DTYPES,
    AotCase,
    aot_variants,
    cdiv,
    check_devices,
    check_dtype,
    device_guard,
    launch_config,
    next_power_of_2,
    row_layout,
    use_triton,
)
from fastgpt_kernels._units import row_unit


def _halves(x: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    """Input and gate factor; a ``_gate`` kind without ``up`` has both in ``x``."""
    if up is None and kind.endswith("_gate"):
        gate, up = x.chunk(2, dim=-1)
        return gate, up
    return x, up


def _launch_fwd(x: Tensor, up: Tensor | None, kind: str) -> Tensor:
    gate, up = _halves(x, up, kind)
    y = gate.new_empty(gate.shape)
    if y.numel() == 0:
        return y
    layout = row_layout(_at_least_1d(gate))
    other = layout if up is None else row_layout(_at_least_1d(up))
    config = launch_config("activation", x.device, x.dtype, next_power_of_2(layout.n_cols))
    grid = cdiv(layout.n_rows, config["BLOCK_M"]) * cdiv(layout.n_cols, config["BLOCK_N"])
    flags: dict[str, Any] = {"KIND": kind.removesuffix("_gate"), "GATED": up is not None}
    flags["UNIT"] = row_unit(layout, other)
    with device_guard(x):
        fwd_kernel[(grid,)](
            layout.tensor, other.tensor, y, layout.n_rows, layout.n_cols, layout.n_cols,
            *layout.strides, *other.strides, **flags, **config,
        )  # fmt: skip
    return y


def _at_least_1d(x: Tensor) -> Tensor:
    return x[None] if x.dim() == 0 else x


def _launch_bwd(dy: Tensor, x: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    gate, factor = _halves(x, up, kind)
    dx = x.new_empty(x.shape)
    dup = x.new_empty(0 if up is None else up.shape)
    if x.numel() == 0:
        return dx, dup
    layout, dy_layout = row_layout(_at_least_1d(gate)), row_layout(_at_least_1d(dy))
    other = layout if factor is None else row_layout(_at_least_1d(factor))
    packed = factor is not None and up is None
    second = dx.view(-1)[layout.n_cols :] if packed else dup
    config = launch_config("activation", x.device, x.dtype, next_power_of_2(layout.n_cols))
    grid = cdiv(layout.n_rows, config["BLOCK_M"]) * cdiv(layout.n_cols, config["BLOCK_N"])
    flags: dict[str, Any] = {"KIND": kind.removesuffix("_gate"), "GATED": factor is not None}
    flags["UNIT"] = row_unit(layout, other, dy_layout)
    with device_guard(x):
        bwd_kernel[(grid,)](
            dy_layout.tensor, layout.tensor, other.tensor, dx, second, layout.n_rows, layout.n_cols,
            layout.n_cols * (1 + packed), *dy_layout.strides, *layout.strides, *other.strides,
            **flags, **config,
        )  # fmt: skip
    return dx, dup


def _cpu_fwd(x: Tensor, up: Tensor | None, kind: str) -> Tensor:
    gate, up = _halves(x, up, kind)
    return _cpu_pointwise.activation(gate, up, kind.removesuffix("_gate")).contiguous()


def _cpu_bwd(dy: Tensor, x: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    gate, factor = _halves(x, up, kind)
    grads = _cpu_pointwise.activation_gradients(dy, gate, factor, kind.removesuffix("_gate"))
    if up is not None:
        return grads[0].contiguous(), grads[1].contiguous()
    dx = torch.cat(grads, dim=-1) if factor is not None else grads[0].contiguous()
    return dx, x.new_empty(0)


@torch.library.custom_op("fastgpt_kernels::activation_fwd", mutates_args=())
def activation_fwd(x: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """Value, contiguous; gated kinds take both halves from ``x`` if ``up`` is None."""
    return (_launch_fwd if use_triton(x) else _cpu_fwd)(x, up, kind)


@activation_fwd.register_fake
def _(x, up, kind):
    return x.new_empty(_halves(x, up, kind)[0].shape)


@torch.library.custom_op("fastgpt_kernels::activation_bwd", mutates_args=())
def activation_bwd(grad: Tensor, x: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of ``up`` (empty if None), contiguous."""
    return (_launch_bwd if use_triton(x) else _cpu_bwd)(grad, x, up, kind)


@activation_bwd.register_fake
def _(grad, x, up, kind):
    return x.new_empty(x.shape), x.new_empty(0 if up is None else up.shape)


def _save(ctx, inputs, output):
    x, up, ctx.kind = inputs
    ctx.save_for_backward(x, up)


def _backward(ctx, grad):
    x, up = ctx.saved_tensors
    dx, dup = activation_bwd(grad, x, up, ctx.kind)
    return dx, None if up is None else dup, None


activation_fwd.register_autograd(_backward, setup_context=_save)

_AOT_TYPES = {
    **dict.fromkeys(("n_rows", "n_cols", "out_stride"), "i32"),
    **{f"{name}_{part}": "i32" for name in ("x", "up", "dy") for part in ("outer", "step")},
}
_AOT_KINDS = (("silu", True), ("gelu_tanh", False), ("relu_squared", False), ("gelu", True))


def aot_cases() -> list[AotCase]:
    """Instances for the static gate: gates are halves of one projection, the rest is contiguous."""
    cases = []
    kernels = (("activation_fwd", fwd_kernel), ("activation_bwd", bwd_kernel))
    for (label, fn), (kind, gated), width, (name, dtype) in itertools.product(
        kernels, _AOT_KINDS, (4096, 64, 512), AOT_DTYPES.items()
    ):
        tensors = dict.fromkeys(("x", "up", "y", "dy", "dx", "dup"), f"*{name}")
        strides = [f"{x}_{part}" for x in ("x", "up", "dy") for part in ("inner", "col")]
        cases += aot_variants(
            f"{label}/{kind}{'_gated' * gated}_{width}_{name}", "activation", fn, dtype, width,
            {**_AOT_TYPES, **tensors},
            {"KIND": kind, "GATED": gated, **dict.fromkeys((*strides, "UNIT"), 1)},
            ("n_cols", "out_stride", "x_outer", "up_outer", "dy_outer"),
        )  # fmt: skip
    return cases


def _checked_gate(name: str, gate: Tensor, up: Tensor | None) -> None:
    check_dtype(name, gate)
    check_devices(name, gate, up)
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(
                f"{name}: without `up` the last dim must hold both halves, but the shape is "
                f"{tuple(gate.shape)}"
            )
    elif gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"{name}: gate and up must be alike, got {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}"
        )


def _checked_approximation(name: str, approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{name}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _cpu_gated(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return _cpu_pointwise.gated(gate, up, kind)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``F.silu(gate) * up`` in one pass, in float32 throughout (arXiv:2002.05202).

    Args:
        gate: (..., F), any strides, float32, float16 or bfloat16 (on the CPU also float64); or
            (..., 2 F), gate before up, if ``up`` is None: the output of one fused projection,
            whose gradient then comes in one piece.
        up: (..., F) like ``gate``.

    Returns:
        (..., F), contiguous.

    Raises:
        ValueError: shapes or dtypes differ, there are no two halves, or the dtype is not one of
            these.
    """
    _checked_gate("swiglu", gate, up)
    if use_triton(gate):
        return activation_fwd(gate, up, "silu_gate")
    return _cpu_gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    """``F.gelu(gate, approximate=approximate) * up`` in one pass (arXiv:2002.05202).

    Args:
        gate: see ``swiglu``, as ``up``.
        up: see ``swiglu``.
        approximate: "none" (erf) or "tanh", as in PyTorch.

    Returns:
        (..., F), contiguous.

    Raises:
        ValueError: as ``swiglu``, or an unknown approximation.
    """
    _checked_gate("geglu", gate, up)
    kind = _checked_approximation("geglu", approximate)
    if use_triton(gate):
        return activation_fwd(gate, up, f"{kind}_gate")
    return _cpu_gated(gate, up, kind)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Drop-in for ``torch.nn.functional.gelu``.

    Args:
        input: any shape and strides.
        approximate: "none" (erf) or "tanh".

    Returns:
        Tensor of the input's shape and dtype.

    Raises:
        ValueError: an unknown approximation, or not a floating dtype.
    """
    check_dtype("gelu", input)
    kind = _checked_approximation("gelu", approximate)
    if use_triton(input):
        return activation_fwd(input, None, kind)
    if kind == "gelu_tanh" and torch.is_grad_enabled():  # what it saves, it saves in the backward
        return cpu.gelu_tanh(input)
    return F.gelu(input, approximate=approximate)


def relu_squared(input: Tensor) -> Tensor:
    """``F.relu(input).square()`` in one pass (arXiv:2109.08668).

    Args:
        input: any shape and strides.

    Returns:
        Tensor of the input's shape and dtype.

    Raises:
        ValueError: not a floating dtype.
    """
    check_dtype("relu_squared", input)
    if use_triton(input):
        return activation_fwd(input, None, "relu_squared")
    return F.relu(input).square()

"""How kernel numerics are judged, for every kernel and for interpreted and plain runs alike.

The rule: with everything computed in float64 as the truth, our largest error may be at most twice
PyTorch's own largest error in the same dtype (three times for gradients), plus a floor of half a
rounding step of the largest result (two steps in float32). There is no flat tolerance, so a kernel
that loses precision shows even where the loss is small. Typical use::

    compare(ours=lambda x, w: layer_norm(x, (64,), w),
            native=lambda x, w: F.layer_norm(x, (64,), w),
            exact=lambda x, w: reference.layer_norm(x, (64,), w),
            inputs=[x, w], layouts=["transposed", "contiguous"])

``ours`` gets guarded copies: the values sit between bands of NaN (or of an absurd integer), in the
layout asked for, and ``compare`` fails if a single byte of storage around or inside them changed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GUARD = 64
"""Elements of poison before and after guarded values, and between rows of padded layouts."""
INT_POISON = -(2**30) - 7
LAYOUTS = ("contiguous", "padded", "transposed", "offset")


def _poison(dtype: torch.dtype):
    return float("nan") if dtype.is_floating_point else INT_POISON


def guard(x: Tensor, layout: str = "contiguous") -> Tensor:
    """Copy ``x`` into poisoned storage.

    Layouts: ``contiguous``; ``padded`` (last dim followed by poison, so rows are strided);
    ``transposed`` (the last two dims are swapped in memory); ``offset`` (contiguous, its first
    element off any 16-byte boundary).
    """
    if layout == "transposed" and x.dim() >= 2:
        return _register(guard(x.transpose(-1, -2).contiguous(), "contiguous").transpose(-1, -2))
    if layout == "padded" and x.dim() >= 1:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + GUARD + 1), _poison(x.dtype), dtype=x.dtype)
        base = guard(wide, "contiguous")
        view = base[..., : x.shape[-1]]
        view.copy_(x)
        return _register(view)
    shift = 1 if layout == "offset" else 0
    storage = torch.full((x.numel() + 2 * GUARD + shift,), _poison(x.dtype), dtype=x.dtype)
    view = storage[GUARD + shift : GUARD + shift + x.numel()].view(x.shape)
    view.copy_(x)
    return _register(view)


def _register(view: Tensor) -> Tensor:
    view = view.detach()
    view.guard_snapshot = _storage_bytes(view).clone()
    return view


def _storage_bytes(x: Tensor) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(x.untyped_storage())


def assert_unwritten(*tensors: Tensor) -> None:
    """Fail if storage of a ``guard``-ed tensor, poison included, differs from when it was made."""
    for index, x in enumerate(tensors):
        assert torch.equal(_storage_bytes(x), x.guard_snapshot), (
            f"input {index} or memory around it was written"
        )


def huge_stride_rows(x: Tensor) -> Tensor:
    """``x`` (rows, columns) with rows so far apart that element offsets exceed 2**31.

    The gap is reserved address space that nobody touches, so it costs no memory.
    """
    stride = 2**31 // max(1, x.shape[0] - 1) + 1024
    size = (stride * (x.shape[0] - 1) + x.shape[1]) * x.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    storage = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=x.dtype)
    return storage.as_strided(x.shape, (stride, 1)).copy_(x)


def max_error(value: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; NaN and infinities must agree in place."""
    assert value.shape == exact.shape, f"shape {tuple(value.shape)} is not {tuple(exact.shape)}"
    value, exact = value.detach().double(), exact.detach().double()
    assert torch.equal(value.isnan(), exact.isnan()), (
        "NaN where the exact result has none, or the reverse"
    )
    finite = exact.isfinite()
    assert torch.equal(value[~finite].nan_to_num(), exact[~finite].nan_to_num()), (
        "infinities differ"
    )
    return (value[finite] - exact[finite]).abs().max().item() if finite.any() else 0.0


def assert_as_good_as(
    ours: Tensor,
    native: Tensor,
    exact: Tensor,
    factor: float,
    what: str = "result",
    floor_dtype: torch.dtype | None = None,
    least_floor: float = 1e-30,
) -> None:
    """|ours - exact| <= factor * |native - exact| + floor, in the maximum norm.

    The floor is half a step of ``floor_dtype`` (two in float32) at the largest exact value, and at
    least ``least_floor``; the default is the dtype of the result.
    """
    assert ours.dtype == native.dtype, f"{what}: dtype {ours.dtype}, PyTorch gives {native.dtype}"
    magnitude = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    floor_dtype = floor_dtype or ours.dtype
    steps = 2.0 if floor_dtype == torch.float32 else 0.5
    floor = max(steps * torch.finfo(floor_dtype).eps * magnitude, least_floor)
    error, allowed = (
        max_error(ours, exact),
        factor * max_error(native.nan_to_num(), exact.nan_to_num()) + floor,
    )
    assert error <= allowed, (
        f"{what}: error {error:.3e}, allowed {allowed:.3e} (magnitude {magnitude:.3e})"
    )


def run(fn: Callable, inputs: Sequence[Tensor], grad_output: Callable[[Tensor], Tensor] | None):
    """Call ``fn`` on leaves made of ``inputs``; returns output and gradients."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    output = fn(*leaves)
    if grad_output is None:
        return output, []
    output.backward(grad_output(output))
    return output, [x.grad for x in leaves if x.is_floating_point()]


def compare(
    ours: Callable,
    native: Callable,
    exact: Callable,
    inputs: Sequence[Tensor],
    *,
    layouts: Sequence[str] | None = None,
    grad_output: Tensor | str | None = "random",
    factors: tuple[float, float] = (2.0, 3.0),
    output_floor: torch.dtype | None = None,
    gradient_floor: float = 1e-30,
) -> None:
    """Judge ``ours`` (output and all gradients) by the rule of this module.

    Args:
        ours: the function under test, called on guarded copies.
        native: PyTorch's own computation, called on the same values in the same dtype.
        exact: the mathematics, called on the values in float64.
        inputs: tensors; the floating ones get gradients.
        layouts: one of ``LAYOUTS`` per input; contiguous if not given.
        grad_output: "random", "expanded" (one value, all strides 0), a tensor, or None (forward).
        factors: allowed multiple of PyTorch's error for the output and for gradients.
        output_floor: dtype whose rounding step is the floor of the output. A float32 sum over rows
            computed in bfloat16 needs it: PyTorch's own errors cancel in it by luck.
        gradient_floor: least floor of gradients. Where terms cancel, whose rounding then remains,
            neither the result nor PyTorch's own error, which may be lucky, says how large they are.
    """
    guarded = [
        guard(x, lay)
        for x, lay in zip(inputs, layouts or ["contiguous"] * len(inputs), strict=True)
    ]
    fixed: dict[torch.Size, Tensor] = {}

    def make_grad(output: Tensor) -> Tensor:
        if output.shape not in fixed:
            if isinstance(grad_output, Tensor):
                value = grad_output
            elif grad_output == "expanded":
                value = torch.full((), 0.75, dtype=output.dtype).expand(output.shape)
            else:
                value = torch.randn(output.shape)
            fixed[output.shape] = value.to(output.dtype)  # rounded once, the same for all three
        return fixed[output.shape].to(output.dtype)

    make = None if grad_output is None else make_grad
    our_output, our_grads = run(ours, guarded, make)
    native_output, native_grads = run(native, [x.clone() for x in inputs], make)
    doubles = [x.double() if x.is_floating_point() else x for x in inputs]
    exact_output, exact_grads = run(exact, doubles, make)
    assert_unwritten(*guarded)
    assert_as_good_as(our_output, native_output, exact_output, factors[0], "output", output_floor)
    for index, (a, b, c) in enumerate(zip(our_grads, native_grads, exact_grads, strict=True)):
        assert a is not None, f"no gradient for input {index}"
        what = f"gradient of float input {index}"
        assert_as_good_as(a, b, c, factors[1], what, least_floor=gradient_floor)

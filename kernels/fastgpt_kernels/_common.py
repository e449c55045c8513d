"""What every kernel file shares: Triton when it is there, dispatch, layouts, launch configurations.

Importing this package never needs Triton: a CPU-only machine imports the same names, runs the
plain PyTorch paths, and gets a clear error only if a Triton path is asked for. Kernel files
therefore take ``triton`` and ``tl`` from here.

Conventions the kernels keep (the static gate and the interpreter tests rely on them):

- ``row = tl.program_id(0).to(tl.int64)`` before a row index meets a stride: a token count times a
  vocabulary passes 2**31 in ordinary training.
- Row and token counts are runtime arguments listed in ``do_not_specialize``; strides and hidden
  sizes are specialised (alignment decides 128-bit access; ``_units.py`` for those that 16 does not
  divide); block sizes are ``tl.constexpr``.
- bfloat16 is loaded, cast, dotted and stored; never added, multiplied or compared as bfloat16.
- Launches pass ``**launch_config(...)``, which always states ``enable_fp_fusion``.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError:  # PyTorch's CPU wheels bring no Triton
    HAS_TRITON = False

    class _TritonStandIn:
        """Lets kernel files be imported without Triton; a launch explains what is missing."""

        @staticmethod
        def constexpr(value=None):
            return value

        def jit(self, fn=None, **_options):
            if fn is None:
                return lambda kernel: self.jit(kernel)
            return _MissingKernel(fn)

    class _MissingKernel:
        def __init__(self, fn):
            self.fn = fn

        def __getitem__(self, _grid):
            raise ModuleNotFoundError(
                f"{self.fn.__name__} is a Triton kernel and Triton is not installed; "
                "`pip install triton` (Linux with a CUDA or ROCm GPU), or move the tensors to the "
                "CPU"
            )

    triton = tl = _TritonStandIn()  # type: ignore[assignment]

NAMESPACE = "fastgpt_kernels"
"""Library namespace of the custom operators: ``torch.ops.fastgpt_kernels.<op>``."""

_TRUE = ("1", "true", "on", "yes", "y")
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in _TRUE
"""Whether Triton's interpreter runs the kernels, on CPU tensors; decided at import."""


def use_triton(x: Tensor) -> bool:
    """Whether Triton kernels run for ``x``: on a CUDA or ROCm device, or under TRITON_INTERPRET=1.

    This is the only place that chooses. There is no fallback: if it says yes and Triton is missing,
    the launch raises.
    """
    return x.is_cuda or INTERPRETED


def check_devices(name: str, x: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are where ``x`` is.

    A kernel takes addresses, and would read what lies there on its own device.
    """
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(
                f"{name}: got tensors on {x.device} and {other.device}; move them to one device"
            )


def cast_under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Tensors (or None) in autocast's dtype where it is on, as PyTorch casts the operands of its
    matrix products and of its attention: all floating ones but float64.
    """
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and _is_cast(x) else x for x in tensors)


def _is_cast(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float64


def check_dtype(name: str, x: Tensor) -> None:
    """Raise ValueError unless ``x`` is of a type that the function ``name`` computes in.

    Otherwise integers would come back rounded to integers, and a GPU would return float64 with the
    accuracy of float32.
    """
    if x.dtype in _DTYPE_NAMES or (x.dtype == torch.float64 and not use_triton(x)):
        return
    raise ValueError(
        f"{name}: {x.dtype} is not supported; cast to float32, float16 or bfloat16 "
        "(on a CPU float64 too)"
    )


def device_guard(x: Tensor):
    """Context that makes ``x``'s GPU current, so that ``cuda:1`` tensors launch on ``cuda:1``."""
    return torch.cuda.device_of(x)


def cdiv(a: int, b: int) -> int:
    """Ceiling of ``a / b`` for positive integers."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= ``n`` (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class RowLayout:
    """A tensor seen as ``rows x columns`` without copying.

    Element (r, c) is ``(r // inner) * stride_outer + (r % inner) * stride_inner + c * stride_col``
    elements after the first one. ``inner == 1`` whenever one stride describes all rows.
    """

    tensor: Tensor
    n_rows: int
    n_cols: int
    inner: int
    stride_outer: int
    stride_inner: int
    stride_col: int

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """``(inner, stride_outer, stride_inner, stride_col)``, the order kernels take them in."""
        return self.inner, self.stride_outer, self.stride_inner, self.stride_col


def _merge_dims(sizes: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """Fewest (size, stride) groups that describe the dims in order; size-1 dims vanish."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == stride * size:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    return groups


def row_layout(x: Tensor, n_col_dims: int = 1) -> RowLayout:
    """Describe ``x`` as rows (leading dims) times columns (the last ``n_col_dims`` dims).

    Takes transposed, sliced and expanded (stride-0) tensors as they are. Only a tensor whose
    leading dims need more than two strides, or its column dims more than one, is copied.
    """
    split = x.dim() - n_col_dims
    sizes, strides = list(x.shape), list(x.stride())
    rows = _merge_dims(sizes[:split], strides[:split])
    cols = _merge_dims(sizes[split:], strides[split:])
    if len(rows) > 2 or len(cols) > 1:
        return row_layout(x.contiguous(), n_col_dims)
    n_cols = cols[0][0] if cols else 1
    stride_col = cols[0][1] if cols else 1
    if len(rows) == 2:
        (outer, stride_outer), (inner, stride_inner) = rows
        return RowLayout(x, outer * inner, n_cols, inner, stride_outer, stride_inner, stride_col)
    n_rows, stride = rows[0] if rows else (1, n_cols)
    if 0 in sizes:  # merged sizes of an empty tensor mean nothing
        n_rows, n_cols = _product(sizes[:split]), _product(sizes[split:])
    return RowLayout(x, n_rows, n_cols, 1, stride, 0, stride_col)


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


_DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
AOT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Element types the static gate looks at; fp16 compiles to the same code as bf16."""
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


_WITHOUT_TENSOR_CORES = ("sm_70", "sm_72", "sm_75")


@functools.cache
def _config_table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("launch_configs.json").read_text())


@functools.cache
def _device_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` ... of a GPU; ``default`` for the CPU, that is in the interpreter."""
    if device.type != "cuda":
        return "default"
    return _device_architecture(
        torch.cuda.current_device() if device.index is None else device.index
    )


def launch_config(
    kernel: str, device: torch.device, dtype: torch.dtype, bucket: int
) -> dict[str, Any]:
    """Keyword arguments of a launch from ``launch_configs.json``; see ``lookup_config``.

    Raises:
        ValueError: attention on a chip whose tensor cores Triton does not use.
    """
    arch = architecture(device)
    if kernel.startswith("attention") and arch in _WITHOUT_TENSOR_CORES:
        raise ValueError(
            f"attention: {arch} is older than sm_80, and without its tensor cores, which Triton "
            "does not use, takes many times as long; use F.scaled_dot_product_attention there"
        )
    return lookup_config(kernel, arch, dtype, bucket)


@functools.cache
def lookup_config(kernel: str, arch: str, dtype: torch.dtype, bucket: int) -> dict[str, Any]:
    """Block sizes (upper case), ``num_warps``, ``num_stages`` and ``enable_fp_fusion`` of a kernel.

    The table is ``{kernel: {architecture: {bucket: {dtype or "any": {...}}}}}``. Entries of an
    exact architecture go before those of its family (``sm_<major>0``, ``gfx942`` of all AMD), these
    before ``default``, bucket by bucket; the bucket is the smallest one not below ``bucket``, else
    the largest. The result is shared: copy it (``**config``) to change it.

    Raises:
        KeyError: the kernel has no entry for this bucket and dtype.
    """
    table = _config_table()[kernel]
    buckets: dict[int, dict[str, Any]] = {}
    family = "gfx942" if arch.startswith("gfx") else arch[:-1] + "0"
    for candidate in ("default", family, arch):
        for name, entries in table.get(candidate, {}).items():
            buckets[int(name)] = {**buckets.get(int(name), {}), **entries}
    chosen = min((size for size in buckets if size >= bucket), default=max(buckets, default=0))
    entries = buckets.get(chosen, {})
    entry = entries.get(_DTYPE_NAMES.get(dtype, ""), entries.get("any"))
    if entry is not None:
        # Stated always: Triton is about to change the default.
        return {"enable_fp_fusion": True, **entry}
    raise KeyError(f"launch_configs.json has no entry for {kernel}, {arch}, {dtype}, {bucket}")


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessor_count(x: Tensor) -> int:
    """Streaming multiprocessors (compute units) of the device of ``x``; 2 in the interpreter."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 2


@dataclass(frozen=True)
class AotCase:
    """One kernel instance that the static gate compiles ahead of time, without a GPU.

    Attributes:
        name: ``kernel/variant``, unique, the row label of the committed table.
        fn: the ``@triton.jit`` function.
        signature: argument name -> Triton type (``*bf16``, ``i32``, ``fp32``, ``constexpr``).
        constexprs: argument name -> value for every ``constexpr`` of the signature.
        num_warps: warps per block.
        num_stages: software pipelining depth.
        attrs: ``{(argument position,): [["tt.divisibility", 16]]}``, as ``ASTSource`` takes it.
        architectures: where the case applies; launch configurations may differ by chip.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    attrs: dict[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)
    architectures: tuple[str, ...] = ARCHITECTURES


def aot_case(
    name: str,
    fn: Any,
    types: dict[str, str],
    constexprs: dict[str, Any],
    config: dict[str, Any],
    *,
    aligned: tuple[str, ...] = (),
    architectures: tuple[str, ...] = ARCHITECTURES,
) -> AotCase:
    """Build an ``AotCase`` from the kernel's own argument order.

    Args:
        name: see ``AotCase``.
        fn: the kernel.
        types: Triton type of every runtime argument (more may be given).
        constexprs: values of the constexprs that ``config`` does not hold, and of runtime
            arguments that specialisation turns into constants (a stride of 1).
        config: what ``lookup_config`` returned.
        aligned: integer arguments divisible by 16; every pointer is taken as 16-byte aligned.
        architectures: see ``AotCase``.
    """
    blocks = {key: value for key, value in config.items() if key.isupper()}
    defaults = {p.name: p.default for p in fn.params if p.is_constexpr and p.has_default}
    values = {**defaults, **blocks, **constexprs}
    signature = {arg: "constexpr" if arg in values else types[arg] for arg in fn.arg_names}
    attrs = {
        (position,): [["tt.divisibility", 16]]
        for position, (arg, kind) in enumerate(signature.items())
        if kind.startswith("*") or (arg in aligned and kind != "constexpr")
    }
    constants = {arg: values[arg] for arg in fn.arg_names if arg in values}
    options = config["num_warps"], config["num_stages"]
    return AotCase(name, fn, signature, constants, *options, attrs, architectures)


def aot_variants(
    name: str,
    kernel: str,
    fn: Any,
    dtype: torch.dtype,
    bucket: int,
    types: dict[str, str],
    constexprs: dict[str, Any],
    aligned: tuple[str, ...] = (),
) -> list[AotCase]:
    """Cases of one kernel instance: one per distinct launch configuration of ``ARCHITECTURES``.

    Args:
        name: see ``AotCase``.
        kernel: key of the launch table.
        fn: the kernel.
        dtype: what the table is asked for.
        bucket: what the table is asked for.
        types: see ``aot_case``, as the rest.
        constexprs: see ``aot_case``.
        aligned: see ``aot_case``.
    """
    cases: list[AotCase] = []
    configs = [lookup_config(kernel, arch, dtype, bucket) for arch in ARCHITECTURES]
    for index, config in enumerate(configs):
        if config in configs[:index]:
            continue
        architectures = tuple(
            arch for arch, other in zip(ARCHITECTURES, configs, strict=True) if other == config
        )
        case = aot_case(
            name, fn, types, constexprs, config, aligned=aligned, architectures=architectures
        )
        cases.append(case)
    return cases

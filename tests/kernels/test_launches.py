"""Launches of every public function, specialised and compiled as on a GPU, and not run.

The launcher turns integers that are 1 into constants and marks those divisible by 16, which the
interpreter does not: a kernel that computes with a stride may compile for one shape and not for
another. Only its ahead-of-time cases would be seen by the static gate.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="launches are Triton's; pip install triton")

import triton
from triton.runtime.driver import driver

import fastgpt_kernels as ours
from fastgpt_kernels import _common, static

PUBLIC = {name for name in ours.__all__ if callable(getattr(ours, name))}


class Hopper:
    """What the launcher asks a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return static.target_of("sm_90")


@pytest.fixture
def launched(monkeypatch) -> list[tuple[str, Any]]:
    """Names and code of what a test launches; CPU tensors take the path of a GPU."""
    kernels: list[tuple[str, Any]] = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        limits = (2**31 - 1, 65_535, 65_535)
        assert all(0 < size <= limit for size, limit in zip(grid, limits, strict=False)), grid
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append((f"{self.module}.{self.__name__}", kernel))
        return kernel

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(_common, "INTERPRETED", True)
    monkeypatch.setattr(_common, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(driver, "_active", Hopper())
    return kernels


def _calls(n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Function -> (arguments, options); every size is n."""

    def x(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, requires_grad=True)

    cu = torch.tensor([0, n], dtype=torch.int32)
    lengths = torch.full((n,), n, dtype=torch.int32)
    ids = torch.zeros(n, dtype=torch.int64)
    heads = [x(n, n, n, n) for _ in range(3)]
    positions = torch.zeros(n, 1, n, dtype=torch.int64)
    starts = torch.zeros(n, n, dtype=torch.int32)
    losses = {"softcap": 5.0, "z_loss": 1e-4, "label_smoothing": 0.1}
    angles = torch.ones(n, (n + 1) // 2)
    return {
        "add_layer_norm": ((x(n, n), x(n, n), n, x(n), x(n)), {}),
        "add_rms_norm": ((x(n, n), x(n, n), n, x(n)), {}),
        "attention": (heads, {"window": n, "softcap": 3.0, "doc_start": starts}),
        "attention_decode": ([h.detach() for h in heads] + [lengths], {"cache_starts_B": lengths}),
        "attention_varlen": ([x(n, n, n) for _ in range(3)] + [cu], {}),
        "attention_with_lse": (heads, {"causal": False}),
        "cross_entropy": ((x(n, n), ids), losses),
        "gae": ((x(n, n).detach(), x(n, n).detach(), torch.ones(n, n, dtype=torch.bool)), {}),
        "geglu": ((x(n, n), x(n, n)), {}),
        "gelu": ((x(n, n),), {}),
        "layer_norm": ((x(n, n), n, x(n), x(n)), {}),
        "linear_cross_entropy": ((x(n, n), x(n, n), ids), losses),
        "linear_log_probs": ((x(n, n), x(n, n), ids), {"softcap": 5.0}),
        "relu_squared": ((x(n, n),), {}),
        "rms_norm": ((x(n, n), n, x(n)), {}),
        "rotary": ((x(n, n, n, 2 * angles.shape[1]), angles, angles), {"positions": positions}),
        "swiglu": ((x(n, 2 * n),), {}),
    }


def _run(name: str, n: int, dtype: torch.dtype, change: Any = None) -> None:
    args, options = _calls(n, dtype)[name]
    if change is not None:
        args = [change(a) if isinstance(a, Tensor) and a.requires_grad else a for a in args]
    out = getattr(ours, name)(*args, **options)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    if outs:
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])


def transposed(x: Tensor) -> Tensor:
    """The same shape with the first stride 1 and the last one not, if there are two dims."""
    if x.dim() < 2:
        return x
    return x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_everything_of_size_1(launched, name):
    _run(name, 1, torch.bfloat16)
    assert launched


@pytest.mark.full
@pytest.mark.parametrize("change", [None, transposed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_kind_of_size(launched, name, n, dtype, change):
    _run(name, n, dtype, change)
    assert launched


def accesses(kernel: Any) -> tuple[set[int], set[int]]:
    """Bits of global loads and stores: 32 where statistics alone are not moved in vectors."""
    code = static.parse_sass(static.disassemble(kernel.asm["cubin"])[0])
    loads, stores = (
        {static.access_bits(i.mnemonic) for i in code if i.mnemonic.startswith(name)}
        for name in ("LDG", "STG")
    )
    return loads, stores


@pytest.mark.parametrize("D", [40, 72])
def test_heads_that_16_does_not_divide_are_read_in_16_bytes(launched, D):
    """Their strides are multiples of 8 elements, of which the launcher tells the compiler nothing.

    Read 2 bytes at a time, D = 72 takes registers that spill 936 bytes.
    """
    q, k, v = (torch.ones(2, 64, 4, D, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ours.attention(*leaves, window=32).backward(torch.ones_like(q))
    cu = torch.tensor([0, 64], dtype=torch.int32)
    ours.attention_varlen(*(x[0].transpose(0, 1).detach() for x in leaves), cu)
    lengths = torch.full((2,), 64, dtype=torch.int32)
    ours.attention_decode(*(x.transpose(1, 2).detach() for x in leaves), lengths)
    for name, kernel in launched:
        report = static.analyse_kernel(kernel, "sm_90")
        assert not static.problems(report, "sm_90"), name
        if "fwd_kernel" in name or "bwd" in name or "split" in name:
            loads, stores = accesses(kernel)
            assert max(loads) == 128, name
            assert min(loads | stores) >= 32, name
    assert len(launched) == 6


def third(x: Tensor) -> Tensor:
    """The same shape as the middle third of the columns of a wider tensor."""
    shape = (*x.shape[:-1], 3, x.shape[-1])
    return torch.ones(shape, dtype=x.dtype)[..., 1, :].requires_grad_()


NORMS = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]
ACTIVATIONS = ["geglu", "gelu", "relu_squared", "swiglu"]


@pytest.mark.parametrize("change", [None, third])
@pytest.mark.parametrize("name", [*NORMS, *ACTIVATIONS, "rotary"])
def test_rows_that_16_does_not_divide_are_read_in_16_bytes(launched, name, change):
    """The launcher says nothing of 40, and the compiler would read 2 bytes at a time."""
    _run(name, 40, torch.bfloat16, change)
    for kernel_name, kernel in launched:
        loads, stores = accesses(kernel)
        assert max(loads) == 128, kernel_name
        # Half of a rotated head of 40 begins 40 bytes after the first.
        assert max(stores) == (64 if name == "rotary" else 128), kernel_name
        assert min(loads | stores) >= 32, kernel_name


def test_a_dim_of_one_element_narrows_nothing(launched):
    """One new token cut out of fused projections: the stride of its dim of one is any number."""
    q, k, v = (x[:, 1:2] for x in torch.ones(3, 2, 3, 4, 64, dtype=torch.bfloat16))
    odd = [x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:])) for x in (q, k, v)]
    angles = torch.ones(1, 1, 32)
    ours.rotary(odd[0], angles, angles)
    ours.attention_decode(*odd, torch.ones(2, dtype=torch.int32))
    ours.attention(*(x.transpose(1, 2) for x in odd))
    for name, kernel in launched:
        assert min(set.union(*accesses(kernel))) >= 32, name
    assert len(launched) == 3


@pytest.mark.parametrize("columns", [4096, 16384])
def test_norms_of_frozen_parameters(launched, columns):
    """Their sums are left out of the kernel, which takes fewer registers."""
    registers = []
    for frozen in (False, True):
        w, b = (torch.ones(columns, dtype=torch.bfloat16, requires_grad=not frozen) for _ in "wb")
        x = torch.ones(2, columns, dtype=torch.bfloat16, requires_grad=True)
        launched.clear()
        ours.layer_norm(x, columns, w, b).backward(torch.ones_like(x))
        report = static.analyse_kernel(launched[-1][1], "sm_90")
        assert not static.problems(report, "sm_90")
        registers.append(report.registers)
    assert registers[1] < registers[0]


def test_long_rows_that_16_does_not_divide_are_read_in_16_bytes(launched):
    x = torch.ones(2, 8200, dtype=torch.bfloat16, requires_grad=True)
    ours.rms_norm(x, 8200).backward(torch.ones_like(x))
    for name, kernel in launched:
        assert tuple(map(max, accesses(kernel))) == (128, 128), name
    assert [name.rsplit(".")[-1] for name, _ in launched] == ["fwd_kernel", "bwd_wide_kernel"]


def test_attention_without_tensor_cores_is_refused(launched, monkeypatch):
    """On sm_75 Triton makes no HMMA of its dots, and thousands of spills."""
    monkeypatch.setattr(_common, "architecture", lambda device: "sm_75")
    x = torch.ones(1, 2, 5, 64, dtype=torch.float16)
    calls = (
        lambda: ours.attention(x, x, x),
        lambda: ours.attention_varlen(x[0], x[0], x[0], torch.tensor([0, 2], dtype=torch.int32)),
        lambda: ours.attention_decode(x, x, x, torch.ones(1, dtype=torch.int32)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"sm_75 is older than sm_80.*scaled_dot_product"):
            call()
    assert not launched
    ours.layer_norm(x, 64)
    assert launched


@pytest.mark.parametrize("arch", ["gfx950", "gfx90a", "gfx1100", "gfx1201"])
def test_amd_chips_without_rows_of_their_own_get_those_of_gfx942(arch):
    """The default's tf32x3 compiles on no AMD chip."""
    for kernel in _common._config_table():
        for dtype, bucket in itertools.product((torch.float32, torch.bfloat16), (16, 64, 128, 256)):
            found = _common.lookup_config(kernel, arch, dtype, bucket)
            assert found == _common.lookup_config(kernel, "gfx942", dtype, bucket)
            assert "tf32" not in str(found.get("PRECISION"))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", range(8, 257, 8))
def test_no_head_size_spills(launched, D, dtype):
    q, k, v = (torch.ones(2, 64, 4, D, dtype=dtype).transpose(1, 2) for _ in range(3))
    ours.attention(*(x.requires_grad_() for x in (q, k, v))).backward(torch.ones_like(q))
    for name, kernel in launched:
        assert not static.problems(static.analyse_kernel(kernel, "sm_90"), "sm_90"), name


def test_strides_beyond_32_bits(launched):
    """Nothing runs, so nothing of these 4 GiB is touched."""
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((2, 8), (2**31, 1))
    far.requires_grad_()
    loss = ours.cross_entropy(ours.layer_norm(far, 8) + ours.gelu(far), torch.zeros(2).long())
    (loss + ours.cross_entropy(far, torch.zeros(2).long())).backward()
    assert len({name for name, _ in launched}) == 6


@pytest.mark.parametrize("shape", [(2**28,), (2**27, 2), (2, 2**27)])
def test_grids_of_large_tensors(launched, shape):
    """Only the first axis of a grid goes beyond 65,535; nothing runs, so no memory is touched."""
    x, up = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    outs = [ours.gelu(x), ours.swiglu(x, up)]
    if len(shape) == 2 and shape[1] == 2:
        ids = torch.zeros(1, dtype=torch.int64).expand(shape[0])
        outs += [ours.layer_norm(x, 2), ours.rotary(x, *torch.ones(2, 1, 1))]
        outs += [ours.cross_entropy(x, ids, reduction="none")]
    for out in outs:
        grad = torch.ones((), dtype=out.dtype).expand(out.shape)
        torch.autograd.grad(out, (x, up), grad, allow_unused=True)


def test_a_kernel_that_takes_a_constant_for_a_tensor_would_show(launched):
    with pytest.raises(triton.CompilationError):
        _planted[(1,)](torch.ones(4), 1)
    _planted[(1,)](torch.ones(4), 2)


@triton.jit
def _planted(x, stride):
    _common.tl.store(x + stride.to(_common.tl.int64), 0.0)

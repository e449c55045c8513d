"""Numerics of the attention kernels in Triton's interpreter, judged against float64."""

from __future__ import annotations

import importlib
import itertools
import mmap
import sys

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels._common import lookup_config, tl, triton
from fastgpt_kernels._soft_cap import tanh
from fastgpt_kernels.attention import attention, attention_with_lse

# The package exports the function under the module's name.
module = importlib.import_module("fastgpt_kernels.attention")

LENGTHS = (1, 2, 17, 63, 64, 65, 127, 128, 129, 256)
HEAD_DIMS = (32, 40, 64, 80, 96, 128, 256)
HEADS = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def documents(B: int, T: int, mean_length: int = 20) -> Tensor:
    """First key of each query's document, for random cuts that differ from row to row."""
    cuts = torch.rand(B, T) < 1 / mean_length
    return torch.where(cuts, torch.arange(T), 0).cummax(1).values.int()


def judge(
    T: int,
    D: int,
    heads: tuple[int, int] = (2, 1),
    dtype: torch.dtype = torch.float32,
    *,
    S: int | None = None,
    docs: Tensor | None = None,
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous"),
    swap: bool = False,
    grad: str | Tensor = "random",
    amplitude: float = 1.0,
    gradient_floor: float = 4e-6,
    **options,
) -> None:
    """Output and gradients by the harness's rule. ``swap``: memory is (B, T, H, D), viewed.

    The default of ``gradient_floor``: of a row that sees one key, do . v - delta is zero but for
    the rounding of its two sums.
    """
    B = 1 if docs is None else docs.shape[0]
    H, HK = heads
    S = T if S is None else S

    def tensor(heads: int, length: int) -> Tensor:
        shape = (B, length, heads, D) if swap else (B, heads, length, D)
        return (torch.randn(shape) * amplitude).to(dtype)

    def views(tensors):
        return [x.transpose(1, 2) for x in tensors] if swap else tensors

    def exact(*qkv: Tensor) -> Tensor:
        return reference.attention(*views(qkv), doc_start_BT=docs, **options)

    def native(*qkv: Tensor) -> Tensor:
        q, k, v = views(qkv)
        mask_options = {key: options.get(key) for key in ("window",)}
        seen = reference.attention_mask(
            T, S, causal=options.get("causal", True), doc_start_BT=docs, **mask_options
        )
        if options.get("softcap") is not None or not seen.any(-1).all():
            return exact(*qkv)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=options.get("scale"), enable_gqa=True
        )

    harness.compare(
        ours=lambda *qkv: attention(*views(qkv), doc_start=docs, **options),
        native=native,
        exact=exact,
        inputs=[tensor(H, T), tensor(HK, S), tensor(HK, S)],
        layouts=layouts,
        grad_output=grad,
        gradient_floor=gradient_floor,
    )


# Every value of each axis with every dtype nearby; the full product runs with -m full.
PAIRS = [
    (1, 64, (1, 1), torch.bfloat16),
    (2, 32, (2, 1), torch.float16),
    (17, 40, (2, 2), torch.bfloat16),
    (63, 80, (1, 1), torch.float32),
    (64, 64, (4, 2), torch.bfloat16),
    (65, 96, (1, 1), torch.bfloat16),
    (65, 32, (4, 1), torch.float32),
    (127, 40, (1, 1), torch.float16),
    (128, 64, (1, 1), torch.float32),
    (129, 128, (1, 1), torch.bfloat16),
    (129, 64, (2, 1), torch.bfloat16),
    (66, 256, (1, 1), torch.float32),
    (33, 256, (2, 1), torch.bfloat16),
    (70, 16, (1, 1), torch.float16),
    (20, 5, (1, 1), torch.float32),
]


@pytest.mark.parametrize(("T", "D", "heads", "dtype"), PAIRS, ids=str)
def test_causal(T, D, heads, dtype):
    judge(T, D, heads, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("T", LENGTHS)
def test_causal_matrix(T, D, dtype):
    for heads in HEADS:
        judge(T, D, heads, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", LENGTHS)
def test_option_matrix(T, dtype):
    switches = itertools.product((True, False), (None, 1, 16, 70), (None, 2.0), (False, True))
    for causal, window, softcap, docs in switches:
        starts = documents(2, T) if docs else None
        for S in (T, 40, 130):
            if docs and S != T:
                continue
            judge(
                T,
                32,
                (2, 1),
                dtype,
                S=S,
                docs=starts,
                causal=causal,
                window=window,
                softcap=softcap,
            )


@pytest.mark.parametrize(
    "options",
    [
        {"T": 300},
        {"T": 140, "S": 397, "causal": False, "softcap": 2.0},
        {"T": 257, "window": 130},
        {"T": 3, "S": 129, "window": 1},
        {"T": 290, "docs": True, "window": 200},
    ],
    ids=str,
)
def test_the_tile_that_takes_masked_blocks_last(options, monkeypatch):
    """That of sm_90 at D = 128; with and without blocks that need no mask."""
    monkeypatch.setattr(
        module,
        "launch_config",
        lambda kernel, _, dtype, D: lookup_config(kernel, "sm_90", dtype, D),
    )
    assert module.launch_config("attention_fwd", None, torch.bfloat16, 128)["BLOCK_N"] == 128
    T, docs = options["T"], options.get("docs")
    options = {**options, "docs": documents(2, T, 90) if docs else None}
    judge(D=128, heads=(2, 1), dtype=torch.bfloat16, **options)


@pytest.mark.parametrize(("T", "S"), [(65, 130), (1, 129), (70, 17), (129, 64), (3, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_differ(T, S, causal):
    judge(T, 32, (1, 1), torch.float16, S=S, causal=causal)


@pytest.mark.parametrize(
    ("window", "dtype"),
    [
        (1, torch.float32),
        (16, torch.bfloat16),
        (64, torch.float16),
        (65, torch.bfloat16),
        (500, torch.float32),
    ],
    ids=str,
)
def test_window(window, dtype):
    judge(150, 32, (1, 1), dtype, window=window)


def test_window_without_causal_mask_or_with_other_lengths():
    judge(70, 32, (1, 1), causal=False, window=20)
    judge(70, 32, (1, 1), S=150, window=20)
    judge(150, 32, (1, 1), S=70, window=90)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents(dtype):
    judge(150, 32, (2, 1), dtype, docs=documents(2, 150))


def test_documents_at_block_edges_with_window_and_softcap():
    starts = torch.zeros(2, 150, dtype=torch.int32)
    starts[0, 64:128], starts[0, 128:], starts[1, 1:] = 64, 128, 1
    judge(150, 32, (1, 1), torch.bfloat16, docs=starts)
    judge(150, 32, (1, 1), docs=starts, window=70, softcap=3.0)
    judge(150, 32, (2, 1), docs=documents(1, 150), causal=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap, dtype):
    judge(70, 32, (1, 1), dtype, softcap=softcap)


@triton.jit
def tanh_kernel(x_ptr, out_ptr, scale, EXACT: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tanh(tl.load(x_ptr + at), scale, EXACT))


@pytest.mark.parametrize("exact", [True, False])
def test_tanh_of_the_cap(exact):
    """The quick form is for 16-bit scores, whose rounding would hide a thousand times its error."""
    size = torch.logspace(-6, 5, 1023)
    x = torch.cat((size, torch.zeros(2), -size))
    out = torch.empty_like(x)
    tanh_kernel[(1,)](x, out, 0.3, exact, len(x))
    expected = (x.double() * torch.tensor(0.3, dtype=torch.float32).double()).tanh()
    error = (out.double() - expected).abs()
    assert error.max() <= 2.0**-20
    if exact:
        assert (error <= 1e-6 * expected.abs()).all()


def test_softcap_is_exact_where_tanh_cancels():
    """Scores far below the cap: tanh as 1 - 2/(1 + e^2x) alone has an error of 1e-4 here.

    Small scores, for else the rounding of the log-sum-exp that the backward starts from shows, too.
    """
    judge(70, 32, (1, 1), softcap=3000.0)


def test_scale():
    judge(65, 32, (1, 1), scale=0.37)


def test_large_scores_neither_overflow_nor_vanish():
    # The backward finds probabilities again from scores of 4e4, whose last bit is worth 4e-3. Where
    # both passes round alike, as in most builds of BLAS, the difference cancels.
    judge(66, 64, (1, 1), amplitude=100.0, gradient_floor=0.1)
    judge(66, 64, (1, 1), torch.bfloat16, amplitude=30.0)


@pytest.mark.parametrize(
    ("layouts", "swap"),
    [
        (("transposed", "padded", "offset"), False),
        (("padded", "offset", "transposed"), True),
        (("offset", "transposed", "padded"), False),
        (("contiguous", "contiguous", "contiguous"), True),
    ],
    ids=str,
)
def test_layouts(layouts, swap):
    judge(70, 40, (2, 1), torch.bfloat16, layouts=layouts, swap=swap)


def test_expanded_gradient_and_expanded_keys():
    judge(70, 32, (2, 1), torch.bfloat16, grad="expanded")
    q, k = torch.randn(2, 4, 33, 32), torch.randn(2, 1, 33, 32)
    expanded = attention(q, k.expand(2, 4, 33, 32), k.expand(2, 4, 33, 32))
    assert torch.equal(expanded, attention(q, k, k))


def test_output_memory_is_B_T_H_D():
    q, k = torch.randn(2, 4, 17, 32), torch.randn(2, 2, 17, 32)
    out = attention(q, k, k)
    assert out.transpose(1, 2).is_contiguous()
    leaf = q.clone().requires_grad_()
    attention(leaf, k, k).sum().backward()
    assert leaf.grad is not None


def test_rows_without_keys_give_exact_zeros():
    """Bottom-right alignment leaves the first T - S queries without a key; documents can too."""
    q, k, v = (torch.randn(1, 2, n, 32, requires_grad=True) for n in (100, 60, 60))
    starts = torch.zeros(1, 100, dtype=torch.int32)
    starts[:, 50:] = 40  # later than anything queries 50..79 may see
    out = attention(q, k, v, doc_start=starts)
    (grad,) = torch.autograd.grad(out.square().sum(), q, retain_graph=True)
    for rows in (slice(0, 40), slice(50, 80)):
        assert (out[:, :, rows] == 0).all()
        assert (grad[:, :, rows] == 0).all()
    assert (out[:, :, 80:] != 0).all()
    judge(100, 32, (2, 2), S=60, docs=starts)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)], ids=str)
def test_empty(shape):
    B, H, T, S = shape
    q = torch.randn(B, H, T, 32, requires_grad=True)
    k, v = (torch.randn(B, H, S, 32, requires_grad=True) for _ in range(2))
    out = attention(q, k, v)
    out.sum().backward()
    assert out.shape == q.shape
    for x in (out, q.grad, k.grad, v.grad):
        assert (x == 0).all()


def test_results_are_written_inside_their_memory(monkeypatch):
    """Every tensor a kernel writes lies between NaN bands; an odd D leaves columns to mask, too."""
    allocations = []

    def guarded_empty(x_BHTD: Tensor) -> Tensor:
        B, H, T, D = x_BHTD.shape
        values = harness.guard(torch.zeros(B, T, H, D, dtype=x_BHTD.dtype))
        allocations.append(values)
        return values.transpose(1, 2)

    monkeypatch.setattr(module, "_empty_like_bthd", guarded_empty)
    q, k, v = (torch.randn(2, h, 70, 40, requires_grad=True) for h in (2, 1, 1))
    attention(q, k, v).sum().backward()
    assert len(allocations) == 4
    for values in allocations:
        assert values.isfinite().all()
        values.zero_()
        harness.assert_unwritten(values)


def test_two_runs_give_the_same_bits():
    q, k, v = (torch.randn(1, h, 130, 32, requires_grad=True) for h in (2, 1, 1))
    runs = []
    for _ in range(2):
        out = attention(q, k, v, window=70)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_addresses_beyond_32_bits():
    """Rows 2^26 elements apart: row 32 and later start past element 2^31."""
    T, D, stride, below = 40, 16, 1 << 26, 1 << 31
    # Anonymous memory is committed page by page, so 10 GB of it cost nothing. The part below is
    # where products that wrap around would read: zeros, rather than a crash.
    reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0x4000)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    storage = torch.frombuffer(
        mmap.mmap(-1, 2 * (below + T * stride), flags=flags), dtype=torch.float16
    )
    q, k, v, grad = (
        storage.as_strided((1, 1, T, D), (0, 0, stride, 1), below + offset)
        for offset in (0, 64, 128, 192)
    )
    near = [torch.randn(1, 1, T, D).half() for _ in range(4)]
    for far, values in zip((q, k, v, grad), near, strict=True):
        far.copy_(values)

    def results(q, k, v, grad):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad)

    for a, b in zip(results(q, k, v, grad), results(*near), strict=True):
        assert torch.equal(a, b)


def test_operators_pass_opcheck():
    q, k, v = (torch.randn(1, h, 20, 16, requires_grad=True) for h in (2, 1, 1))
    starts = documents(1, 20)
    for arguments in ((None, True, 0.3, 0, 0.0), (starts, True, 0.3, 7, 2.0)):
        torch.library.opcheck(module._attention, (q, k, v, *arguments))
        out, lse = module._attention(q, k, v, *arguments)
        saved = [x.detach() for x in (q.transpose(1, 2).contiguous().transpose(1, 2), q, k, v, out)]
        for grad_lse in (None, torch.randn_like(lse)):
            grads = saved[0], grad_lse
            torch.library.opcheck(
                module._attention_backward, (*grads, *saved[1:], lse.detach(), *arguments)
            )


def test_compiles_without_graph_break_or_recompile():
    torch._dynamo.config.error_on_recompile = True
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    try:
        for T in (5, 17, 33, 64, 65):
            q, k = torch.randn(1, 2, T, 16, requires_grad=True), torch.randn(1, 1, T, 16)
            out = compiled(q, k, k)
            (grad,) = torch.autograd.grad(out.sum(), q)
            expected = attention(q, k, k)
            assert torch.equal(out, expected)
            assert torch.equal(grad, torch.autograd.grad(expected.sum(), q)[0])
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp_and_its_gradient(dtype):
    """One number made of both outputs, so that both gradients meet in one backward."""
    inputs = [torch.randn(1, h, 70, 32).to(dtype) for h in (2, 1, 1)]
    weights = torch.randn(1, 2, 70)

    def joined(function, **options):
        def run(q, k, v):
            out, lse = function(q, k, v, softcap=3.0, **options)
            return torch.cat([out.float().flatten(), (lse.float() * weights).flatten()])

        return run

    harness.compare(
        ours=joined(attention_with_lse),
        native=joined(reference.attention_with_lse),
        exact=lambda *qkv: joined(reference.attention_with_lse)(*qkv),
        inputs=inputs,
        output_floor=dtype,
    )


def test_log_sum_exp_alone_and_of_rows_without_keys():
    q, k, v = (torch.randn(1, 2, n, 32, requires_grad=True) for n in (100, 60, 60))
    out, lse = attention_with_lse(q, k, v)
    expected = reference.attention_with_lse(*(x.detach().double() for x in (q, k, v)))[1]
    assert lse.dtype == torch.float32
    assert (lse[:, :, :40] == -torch.inf).all()
    torch.testing.assert_close(lse, expected.float())
    grads = torch.autograd.grad(lse[:, :, 40:].sum(), (q, k), retain_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, :40] == 0).all()
    both = torch.autograd.grad(out.sum() + lse[:, :, 40:].sum(), q, retain_graph=True)[0]
    torch.testing.assert_close(both, grads[0] + torch.autograd.grad(out.sum(), q)[0])


def test_parts_of_the_keys_put_together():
    q, k, v = (torch.randn(1, 2, 40, 32) for _ in range(3))
    parts = [
        attention_with_lse(q, k[:, :, a:b], v[:, :, a:b], causal=False)
        for a, b in ((0, 9), (9, 40))
    ]
    (o_1, l_1), (o_2, l_2) = parts
    lse = torch.logaddexp(l_1, l_2)
    out = (l_1 - lse).exp()[..., None] * o_1 + (l_2 - lse).exp()[..., None] * o_2
    torch.testing.assert_close(out, attention(q, k, v, causal=False))


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, sys.maxsize])
@pytest.mark.parametrize(("T", "S"), [(100, 100), (100, 40), (40, 100)])
def test_windows_that_hide_nothing(T, S, window):
    """As configurations say that there is none; they must not overflow."""
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (T, S, S))
    grad = torch.randn(1, 2, T, 16)
    found, expected = [], []
    for results, options in ((found, {"window": window}), (expected, {})):
        out = attention(q, k, v, **options)
        results += [out, *torch.autograd.grad(out, (q, k, v), grad)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_saved_tensors_that_come_back_with_other_strides():
    """``torch.autograd.graph.save_on_cpu(pin_memory=True)`` gives them back contiguous."""
    q, k, v = (torch.randn(2, h, 33, 16, requires_grad=True) for h in (4, 2, 2))

    def gradients(pack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, lse = attention_with_lse(q, k, v)
        return torch.autograd.grad((out * lse[..., None]).sum(), (q, k, v))

    moved = gradients(lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x))
    for a, b in zip(moved, gradients(lambda x: x), strict=True):
        assert torch.equal(a, b)

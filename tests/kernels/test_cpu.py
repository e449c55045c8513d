"""The CPU paths against float64, with PyTorch's own error in the same dtype as the measure."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import assert_as_good_as, compare

from fastgpt_kernels import cpu, reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """The same numbers, without a C++ compiler run for each shape."""
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


@pytest.fixture(params=[True, False], ids=["gemms", "sdpa"])
def attention_path(request, monkeypatch):
    """What a compiled graph runs, and what eager code runs; here both eagerly."""
    monkeypatch.setattr(cpu, "_compiling", lambda: request.param)


def heads(dtype, *, B=2, H=2, HK=None, T=19, S=None, D=16):
    shapes = (B, H, T, D), (B, HK or H, S or T, D), (B, HK or H, S or T, D)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def torch_attention(q, k, v, *, causal, window=None, softcap=None, doc_start_BT=None):
    """PyTorch's own: SDPA with a mask, plain operators for a softcap; rows without a key give 0."""
    T, S, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    seen = reference.attention_mask(T, S, causal=causal, window=window, doc_start_BT=doc_start_BT)
    some = seen.any(-1, keepdim=True)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~some).where(some, 0.0)
    scores = softcap * torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / softcap)
    return (scores.masked_fill(~(seen | ~some), -torch.inf).softmax(-1) @ v).where(some, 0.0)


STARTS = torch.tensor([[0] * 7 + [7] * 12, [0] * 3 + [3] * 10 + [13] * 6], dtype=torch.int32)
CASES = {
    "causal": ({}, {}),
    "full": ({}, {"causal": False}),
    "one head of keys": ({"H": 4, "HK": 1}, {}),
    "two heads of keys": ({"H": 4, "HK": 2}, {"window": 5}),
    "window": ({}, {"window": 4}),
    "window, not causal": ({}, {"window": 4, "causal": False}),
    "documents": ({}, {"doc_start": STARTS}),
    "documents, window, groups": ({"H": 4, "HK": 2}, {"doc_start": STARTS, "window": 6}),
    "softcap": ({}, {"softcap": 1.5}),
    "softcap, not causal": ({}, {"softcap": 1.5, "causal": False}),
    "softcap, documents": ({}, {"softcap": 1.5, "doc_start": STARTS}),
    "fewer queries": ({"T": 5, "S": 19}, {}),
    "one query": ({"T": 1, "S": 19}, {}),
    "fewer queries, window": ({"T": 5, "S": 19}, {"window": 3}),
    "fewer queries, not causal": ({"T": 5, "S": 19}, {"causal": False}),
    "odd head width": ({"D": 10}, {}),
}


@pytest.mark.usefixtures("attention_path")
@DTYPES
@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)
def test_attention(sizes, options, dtype):
    """Forward and all gradients."""
    spec = {"causal": True, **options}
    spec["doc_start_BT"] = spec.pop("doc_start", None)
    compare(
        ours=lambda q, k, v: cpu.attention(q, k, v, **options),
        native=lambda q, k, v: torch_attention(q, k, v, **spec),
        exact=lambda q, k, v: reference.attention(q, k, v, **spec),
        inputs=heads(dtype, **sizes),
    )


@DTYPES
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 9}], ids=str)
@pytest.mark.parametrize("T", [19, 1, 6])
def test_a_query_that_sees_no_key_gives_zero_and_no_gradient(options, T, dtype):
    """Left padding: the first queries start behind themselves, of one row all do."""
    first = torch.tensor([11, 30])[:, None]
    starts = first.expand(2, T).to(torch.int32).contiguous()
    q, k, v = heads(dtype, T=T, S=19)
    empty = first > torch.arange(19 - T, 19)
    spec = {"causal": True, **options, "doc_start_BT": starts}
    compare(
        ours=lambda q, k, v: cpu.attention(q, k, v, doc_start=starts, **options),
        native=lambda q, k, v: torch_attention(q, k, v, **spec),
        exact=lambda q, k, v: reference.attention(q, k, v, **spec),
        inputs=[q, k, v],
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = cpu.attention(*leaves, doc_start=starts, **options)
    out.backward(torch.ones_like(out))
    with torch.no_grad():
        inference = cpu.attention(q, k, v, doc_start=starts, **options)
    for result in (out, inference, leaves[0].grad):
        assert not result.transpose(1, 2)[empty].any()
        assert result.isfinite().all()


@pytest.mark.usefixtures("attention_path")
@DTYPES
@pytest.mark.parametrize(("T", "options"), [(1, {}), (19, {"window": 1})], ids=["token", "window"])
def test_a_query_with_one_key_passes_no_gradient_to_its_score(T, options, dtype):
    """Its probability is 1 whatever the score: p (dp - delta) is a difference of equals."""
    q, k, v = (x.requires_grad_() for x in heads(dtype, T=T))
    out = cpu.attention(q, k, v, **options)
    assert torch.equal(out, v)
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    assert_as_good_as(v.grad, grad, grad.double(), 2.0, "dv")
    terms = (grad.double() * v.double()).abs().sum(-1, keepdim=True) * 0.25
    rounding = 2 * torch.finfo(dtype).eps
    assert (q.grad.abs() <= rounding * terms * k.abs()).all()
    assert (k.grad.abs() <= rounding * terms * q.abs()).all()


def test_long_sequences_take_the_path_that_stores_no_scores(monkeypatch):
    monkeypatch.setattr(cpu, "_compiling", lambda: True)
    monkeypatch.setattr(cpu, "MAX_STORED_SCORES", 2 * 2 * 19 * 19 - 1)
    monkeypatch.setattr(cpu._SelfAttention, "apply", None)
    test_attention({}, {}, torch.float32)
    test_attention({}, {"doc_start": STARTS}, torch.float32)


@pytest.mark.usefixtures("attention_path")
@DTYPES
@pytest.mark.parametrize("scale", [3, 10, 40])
def test_peaked_attention(scale, dtype):
    """Scores that bfloat16 cannot hold to better than 0.03, 0.1 and 0.5."""
    q, k, v = heads(dtype, T=64)
    compare(
        ours=lambda q, k, v: cpu.attention(q, k, v),
        native=lambda q, k, v: torch_attention(q, k, v, causal=True),
        exact=reference.attention,
        inputs=[scale * q, k, v],
    )


@pytest.mark.usefixtures("attention_path")
@pytest.mark.parametrize("scale", [1, 10, 100])
def test_bfloat16_probabilities_sum_to_one(scale):
    """If the backward made them of rounded scores, exp() would be off by e^2 at a score of 1000."""
    q, k, v = (x.requires_grad_() for x in heads(torch.bfloat16, B=1, H=1, T=128))
    out = cpu.attention(scale * q, k, v)
    out.backward(torch.ones_like(out))
    sums = v.grad.float().sum((0, 1, 2))
    torch.testing.assert_close(sums, torch.full((16,), 128.0), rtol=5e-3, atol=0)


@pytest.mark.full
def test_compiled_attention_gives_the_same(monkeypatch):
    """The same arithmetic, through Inductor."""
    inputs = heads(torch.float32)
    results = []
    for attention in (torch.compile(cpu.attention), cpu.attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        attention(*leaves).square().sum().backward()
        results.append([x.grad for x in leaves])
        monkeypatch.setattr(cpu, "_compiling", lambda: True)
    for eager, inductor in zip(*results, strict=True):
        torch.testing.assert_close(inductor, eager, atol=1e-5, rtol=1e-5)


@DTYPES
def test_gelu_tanh(dtype):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-20, 300.0, -300.0])])
    compare(
        ours=cpu.gelu_tanh,
        native=lambda x: F.gelu(x, approximate="tanh"),
        exact=lambda x: F.gelu(x, approximate="tanh"),
        inputs=[x.to(dtype)],
    )


IGNORED = -100
LOSSES = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "z_loss": {"z_loss": 1e-2},
    "softcap, z_loss": {"softcap": 3.0, "z_loss": 1e-2},
}


def loss_and_gradients(hidden, weight, target, grad_N, **options):
    """The definition, by autograd in the dtype given; the loss as our function returns it."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    loss = reference.cross_entropy(
        (hidden @ weight.T).to(grad_N.dtype), target, reduction="none", **options
    )
    (loss * grad_N).sum().backward()
    return loss.detach().where(grad_N != 0, 0.0), hidden.grad, weight.grad


def check_gradients(hidden, weight, target, grad_N, **options):
    """`linear_cross_entropy_gradients` by the rule of the harness."""
    exact = loss_and_gradients(hidden.double(), weight.double(), target, grad_N.double(), **options)
    native = loss_and_gradients(hidden, weight, target, grad_N, **options)
    ours = cpu.linear_cross_entropy_gradients(
        grad_N, hidden, weight, target, ignore_index=IGNORED, **options
    )
    assert [x.dtype for x in ours] == [torch.float32, hidden.dtype, torch.float32]
    names = ("loss", "dhidden", "dweight")
    for name, a, b, c in zip(names, ours, native, exact, strict=True):
        factor = 2.0 if name == "loss" else 3.0
        assert_as_good_as(a.to(b.dtype), b, c, factor, name)
    alone = cpu.linear_cross_entropy_losses(hidden, weight, target, ignore_index=IGNORED, **options)
    torch.testing.assert_close(alone.where(grad_N != 0, 0.0), ours[0], atol=1e-6, rtol=1e-6)


def problem(dtype, *, N=23, D=16, V=37, scale=1.0):
    target = torch.randint(V, (N,))
    target[::5] = IGNORED
    return (scale * torch.randn(N, D)).to(dtype), torch.randn(V, D).to(dtype), target


@DTYPES
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("rows", [100, 23, 8, 1])
def test_linear_cross_entropy(options, rows, dtype, monkeypatch):
    """Random row weights, zeros among them, in one chunk and in several."""
    hidden, weight, target = problem(dtype)
    grad_N = torch.randn(23)
    grad_N[3:6] = 0.0
    monkeypatch.setattr(cpu, "MAX_LOGITS_BYTES", rows * 37 * dtype.itemsize)
    assert cpu.rows_per_chunk(23, 37, dtype.itemsize) <= rows
    check_gradients(hidden, weight, target, grad_N, **options)


@DTYPES
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_linear_cross_entropy_with_logits_of_ten_thousand(options, dtype):
    hidden, weight, target = problem(dtype, scale=2500.0)
    assert (hidden.double() @ weight.double().T).abs().max() > 1e4
    check_gradients(hidden, weight, target, torch.ones(23), **options)


@DTYPES
@pytest.mark.parametrize("margin", [4.0, 12.0, 30.0])
def test_linear_cross_entropy_of_a_sure_model(margin, dtype):
    """All logits near 1024 and p -> 1: the loss is a small difference of large numbers."""
    ones = torch.ones(16, 1)
    hidden = torch.cat([margin * torch.eye(16), 1024 * ones], dim=1).to(dtype)
    weight = torch.cat([torch.eye(16), ones], dim=1).to(dtype)
    target = torch.arange(16)
    exact = loss_and_gradients(
        hidden.double(), weight.double(), target, torch.ones(16, dtype=torch.float64)
    )
    loss, dhidden, _ = cpu.linear_cross_entropy_gradients(
        torch.ones(16), hidden, weight, target, ignore_index=IGNORED
    )
    rounding = 4 * torch.finfo(torch.float32).eps  # of a sum of exponentials that is 1 and more
    if dtype == torch.float32:
        torch.testing.assert_close(loss.double(), exact[0], atol=rounding, rtol=0.0)
        torch.testing.assert_close(dhidden.double(), exact[1], atol=rounding, rtol=rounding)
    else:  # bfloat16 logits hold neither 1028 nor 1036: only their own loss can be asked for
        logits = hidden @ weight.T
        own = F.cross_entropy(logits.double(), target, reduction="none")
        torch.testing.assert_close(loss.double(), own, atol=rounding, rtol=0.0)


def test_linear_cross_entropy_of_ignored_rows_only():
    hidden, weight, _ = problem(torch.float32)
    target = torch.full((23,), IGNORED)
    results = cpu.linear_cross_entropy_gradients(
        torch.ones(23), hidden, weight, target, ignore_index=IGNORED, z_loss=0.1
    )
    assert not any(result.any() for result in results)
    assert not cpu.linear_cross_entropy_losses(hidden, weight, target, ignore_index=IGNORED).any()


def test_chunks_are_equal_and_bounded():
    for n_rows, vocab in ((4096, 50304), (4097, 8192), (1, 256000), (8192, 32000)):
        rows = cpu.rows_per_chunk(n_rows, vocab, 2)
        chunks = -(-n_rows // rows)
        assert rows * vocab * 2 <= cpu.MAX_LOGITS_BYTES
        assert 0 <= chunks * rows - n_rows < chunks

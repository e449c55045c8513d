"""The custom operators: registered correctly, traceable, no recompiles, inputs never written."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from harness import assert_unwritten, guard
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt_kernels import (
    _cpu_norm,
    add_layer_norm,
    attention,
    cpu,
    cross_entropy,
    gae,
    layer_norm,
    linear_cross_entropy,
    linear_log_probs,
    rms_norm,
)
from fastgpt_kernels.normalization import add_norm_fwd, norm_fwd

OPS = torch.ops.fastgpt_kernels
ROW_COUNTS = (2, 3, 8, 17, 64)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


def _leaf(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def _cases():
    x, w, b = _leaf(6, 5, 8), _leaf(8), _leaf(8)
    rows = torch.rand(30)
    yield "norm_fwd", (x, w, b, 1, 1e-5, False)
    yield "norm_fwd", (x.detach().transpose(0, 1).requires_grad_(), None, None, 1, 1e-5, False)
    yield "norm_fwd", (_leaf(4, 3, 5, dtype=torch.bfloat16), _leaf(3, 5), None, 2, 1e-5, True)
    yield "norm_bwd", (x.detach(), x.detach(), rows, rows, w.detach(), True, True, 1, False)
    yield "norm_bwd", (x.detach(), x.detach(), rows[:0], rows, None, False, False, 1, True)
    plain = x.detach()
    yield "norm_bwd", (plain, plain, rows, rows, w.detach(), True, True, 1, False, plain)
    yield "norm_bwd", (plain, plain, rows, rows, w.detach(), False, True, 1, False)
    yield "add_norm_fwd", (x, _leaf(6, 5, 8), w, b, 1, 1e-5, False)
    stream = _leaf(5, 6, 8).detach().transpose(0, 1).requires_grad_()
    yield "add_norm_fwd", (_leaf(6, 5, 8, dtype=torch.bfloat16), stream, None, None, 1, 1e-5, True)
    t = torch.tensor([0, 3, -100, 8, 1])
    options = (-100, 0.1, 1e-3, 5.0)
    yield "cross_entropy_fwd", (_leaf(5, 9), t, *options)
    yield "cross_entropy_fwd", (_leaf(5, 9), t, *options, True)
    yield "cross_entropy_fwd", (_leaf(9, 5).detach().t().requires_grad_(), t, -100, 0.0, 0.0, 0.0)
    for logits in (torch.randn(5, 9), torch.randn(9, 5).t(), torch.randn(5, 16)[:, :9]):
        arguments = (rows[:5], logits, t, rows[:5], rows[5:10] + 1, *options)
        yield "cross_entropy_bwd", arguments
        if logits.stride(1) == 1:
            yield "cross_entropy_bwd_inplace", arguments
    x, w, b = _leaf(5, 4), _leaf(9, 4), _leaf(9)
    yield "linear_cross_entropy_fwd", (x, w, b, t, *options)
    yield "linear_cross_entropy_fwd", (x, w, None, t, -100, 0.0, 0.0, 0.0)
    yield "linear_cross_entropy_sum", (x, w, b, t, *options, True, True, True)
    yield "linear_cross_entropy_sum", (x, w, None, t, -100, 0.0, 0.0, 5.0, True, True, False)
    turned = _leaf(4, 5).detach().t().requires_grad_()
    yield "linear_cross_entropy_sum", (turned, w, b, t, *options, True, True, True)
    yield "linear_cross_entropy_sum", (turned, w, None, t, -100, 0.0, 0.0, 5.0, True, True, False)
    yield "linear_log_probs_fwd", (turned, w, b, t, -100, 0.7, 5.0)
    half = [v.detach().half() for v in (x, w)]
    yield "linear_cross_entropy_sum", (*half, None, t, *options, False, True, False)
    yield "linear_cross_entropy_scaled", (half[0], torch.tensor(3.0), torch.float32)
    plain = [v.detach() for v in (x, w, b)]
    yield "linear_cross_entropy_bwd", (rows[:5], *plain, t, *options, True, False, True)
    yield "linear_log_probs_fwd", (x, w, b, t, -100, 0.7, 5.0)
    yield "linear_log_probs_fwd", (*half, None, t, -100, 1.0, 0.0)
    saved = (*[rows[:5]] * 4, *plain, t, -100, 0.7, 5.0)
    yield "linear_log_probs_bwd", (rows[5:10], rows[10:15], *saved, True, True, True)
    yield "linear_log_probs_bwd", (rows[5:10], None, *saved, True, False, False)
    yield "gae", (rows.view(2, 15), rows.view(15, 2).t(), rows.view(2, 15) > 0.3, 0.99, 0.95)
    yield "cpu_scores", (torch.randn(2, 3, 4), torch.randn(2, 5, 4), False)
    yield "cpu_causal_bias", (torch.randn(1, 2, 5, 4),)
    yield "cpu_gelu_tanh", (torch.randn(6, 3, dtype=torch.bfloat16),)
    yield from _pointwise_cases()


def _pointwise_cases():
    x, up, grad = _leaf(6, 10), _leaf(6, 10), torch.randn(6, 10)
    halves = [half.detach().requires_grad_() for half in _leaf(5, 3, 16).chunk(2, dim=-1)]
    for args in (
        (x, up, "silu_gate"),
        (x, None, "silu_gate"),
        (*halves, "gelu_tanh_gate"),
        (x, None, "gelu"),
        (_leaf(4, 7, dtype=torch.bfloat16), None, "relu_squared"),
    ):
        yield "activation_fwd", args
    plain, other = x.detach(), up.detach()
    yield "activation_bwd", (grad, plain, other, "silu_gate")
    yield "activation_bwd", (grad[:, :5], plain, None, "gelu_gate")
    yield "activation_bwd", (grad.t(), plain.t(), None, "gelu_tanh")
    x, table = _leaf(2, 3, 5, 12), torch.rand(9, 4)
    transposed = x.detach().transpose(1, 2).requires_grad_()
    positions = torch.tensor([[[0], [3], [8], [1], [2]]])
    yield "rotary", (x, table[:5], table[4:], None, False, False)
    yield "rotary", (transposed, table, table, positions, True, True)


CASES = list(_cases())


@pytest.mark.parametrize(("name", "args"), CASES, ids=[name for name, _ in CASES])
def test_opcheck(name, args):
    torch.library.opcheck(getattr(OPS, name).default, args)


def test_every_operator_is_checked():
    """A new operator of these modules without an opcheck case fails here."""
    ours = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastgpt_kernels::") and "attention" not in name
    }
    assert ours == {name for name, _ in CASES}


def _losses(x, w, t):
    hidden = rms_norm(layer_norm(x, 8), 8, w[0])
    log_probs, entropy = linear_log_probs(hidden, w, t, temperature=0.8)
    advantages, _ = gae(log_probs[None], entropy[None], t[None] != 3)
    return (
        linear_cross_entropy(hidden, w, t, softcap=5.0)
        + (log_probs * advantages[0]).sum()
        - entropy.sum()
        + linear_cross_entropy(hidden, w, t, reduction="none", z_loss=1e-3).sum()
        + cross_entropy(hidden @ w.T, t, label_smoothing=0.1)
        + cross_entropy(hidden @ w.T, t, softcap=3.0, inplace_backward=True)
    )


def _through_operators(x, w, t):
    """The path of a GPU: the operators themselves, which a CPU's public functions go around."""
    hidden = OPS.norm_fwd(x, w[0], None, 1, 1e-5, True)[0]
    return OPS.cross_entropy_fwd(hidden @ w.T, t, -100, 0.1, 1e-3, 5.0)[0].mean()


def _pointwise_operators(x, w, t):
    h, total = OPS.add_norm_fwd(x, x, w[1], None, 1, 1e-5, True)[:2]
    h = OPS.activation_fwd(h, total, "silu_gate") + OPS.activation_fwd(h, None, "gelu_tanh")
    h = OPS.rotary(h, w[:, :4].detach(), w[:, 4:].detach(), t, False, False)
    return cross_entropy(h @ w.T, t)


@pytest.mark.parametrize("fn", [_losses, _through_operators, _pointwise_operators])
def test_compiles_without_a_break_or_a_recompile(fn):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counter, dynamic=None)
    w = _leaf(11, 8)
    for rows in ROW_COUNTS:
        x, t = _leaf(rows, 8), torch.randint(11, (rows,))
        loss = compiled(x, w, t)
        gradients = torch.autograd.grad(loss, (x, w))
        expected = torch.autograd.grad(fn(x, w, t), (x, w))
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b)
    # One for the first count, one that makes the count symbolic; none after.
    assert counter.frame_count <= 2


def test_inputs_are_never_written():
    x, w, t = guard(torch.randn(6, 8)), guard(torch.randn(11, 8)), guard(torch.arange(6))
    leaves = [x.requires_grad_(), w.requires_grad_()]
    for fn in (_losses, _through_operators):
        fn(*leaves, t).backward()
    assert_unwritten(x.detach_(), w.detach_(), t)


def test_sum_gives_stride_zero_gradients():
    x = _leaf(6, 8)
    for fn in (
        lambda: layer_norm(x, 8).sum(),
        lambda: OPS.norm_fwd(x, None, None, 1, 1e-5, False)[0].sum(),
        lambda: OPS.cross_entropy_fwd(x, torch.arange(6), -100, 0.0, 0.0, 0.0)[0].sum(),
    ):
        (gradient,) = torch.autograd.grad(fn(), x)
        assert gradient.isfinite().all()


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ModuleNotFoundError
import torch
import fastgpt_kernels
from fastgpt_kernels._common import HAS_TRITON
from fastgpt_kernels._loss_kernels import loss_kernel
assert not HAS_TRITON
x = torch.randn(4, 8, requires_grad=True)
fastgpt_kernels.cross_entropy(fastgpt_kernels.layer_norm(x, 8), torch.arange(4)).backward()
try:
    loss_kernel[(1,)]()
except ModuleNotFoundError as error:
    print(error)
"""


def test_works_without_triton_and_says_what_is_missing():
    path = [p for p in sys.path if p]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{WITHOUT_TRITON}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "loss_kernel is a Triton kernel and Triton is not installed" in run.stdout


class Zeros(TorchDispatchMode):
    """Shapes of tensors that are made of zeros."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "zeros" in func.__name__:
            self.made.append(tuple(out.shape))
        return out


UNUSED = {  # the operator's further outputs, which nothing uses
    "linear_cross_entropy": lambda x, w: linear_cross_entropy(x, w, torch.arange(6)),
    "norm": lambda x, w: norm_fwd(x, w[0], w[1], 1, 1e-5, False)[0].sum(),
    "add_norm": lambda x, w: add_norm_fwd(x, x, w[0], w[1], 1, 1e-5, False)[0].sum(),
    "add_norm, sum": lambda x, w: add_norm_fwd(x, x, w[0], w[1], 1, 1e-5, False)[1].sum(),
    "cross_entropy": lambda x, w: cross_entropy(F.linear(x, w), torch.arange(6)),
}


@pytest.mark.parametrize("name", UNUSED)
def test_the_backward_makes_no_zeros_for_outputs_that_nothing_used(name):
    """Of linear_cross_entropy they are as large as the gradients."""
    x, w = _leaf(6, 8), _leaf(11, 8)
    loss = UNUSED[name](x, w)
    with Zeros() as zeros:
        loss.backward()
    assert [shape for shape in zeros.made if shape in ((6,), (6, 8), (11, 8))] == []


class Stop(torch.autograd.Function):
    """Passes no gradient on, which autograd says by None."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


STOPPED = {
    **UNUSED,
    "rms_norm": lambda x, w: _cpu_norm.add_norm(x, None, w[0], None, 1, 1e-5, True)[0],
    "linear_log_probs": lambda x, w: linear_log_probs(x, w, torch.arange(6))[0],
    "log_probs by row": lambda x, w: OPS.linear_log_probs_fwd(
        x, w, None, torch.arange(6), -100, 1.0, 0.0
    )[0],
    "no reduction": lambda x, w: linear_cross_entropy(x, w, torch.arange(6), reduction="none"),
    "attention": lambda x, w: attention(*[x[None, None]] * 3),
}


@pytest.mark.parametrize("name", STOPPED)
def test_no_gradient_arrives(name):
    x, w = _leaf(6, 8), _leaf(11, 8)
    (Stop.apply(STOPPED[name](x, w)).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert w.grad is None or not w.grad.any()


@pytest.mark.parametrize("once", ["add_norm", "add_layer_norm"])
def test_only_the_sum_is_used(once):
    """Then the norm has no gradient, and the sum passes its own on."""
    x, r, w = _leaf(512, 768, dtype=torch.bfloat16), _leaf(512, 768), _leaf(768)
    if once == "add_norm":
        total = add_norm_fwd(x, r, w, None, 1, 1e-5, True)[1]
    else:
        total = add_layer_norm(x, r, 768, w)[1]
    grad = torch.randn_like(total)
    dx, dr, dw = torch.autograd.grad(total, (x, r, w), grad, allow_unused=True)
    assert dw is None
    assert torch.equal(dr, grad)
    assert torch.equal(dx, grad.bfloat16())


SECOND = {
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, x, torch.arange(6)),
    "linear_log_probs": lambda x: linear_log_probs(x, x, torch.arange(6))[0].sum(),
    "norm_fwd": lambda x: norm_fwd(x, None, None, 1, 1e-5, True)[0].square().sum(),
    "rms_norm": lambda x: _cpu_norm.add_norm(x, None, None, None, 1, 1e-5, True)[0].pow(2).sum(),
    "gelu": lambda x: cpu.gelu_tanh(x).square().sum(),
    "attention": lambda x: cpu._SelfAttention.apply(*[x[None, None]] * 3, x[:, :6] * 0, 1.0).sum(),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_are_refused(name):
    """Without a word they would lack a part: x**2 has one too."""
    x = _leaf(6, 8)

    def second():
        first = torch.autograd.grad(SECOND[name](x) + x.square().sum(), x, create_graph=True)[0]
        torch.autograd.grad(first.square().sum(), x)

    with pytest.raises(RuntimeError, match=r"create_graph|no autograd formula"):
        second()

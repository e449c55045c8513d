"""linear_cross_entropy on the CPU: numerics against float64, memory, laziness, errors."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from harness import compare

from fastgpt_kernels import _linear, cpu, linear_cross_entropy, reference

MODULE = sys.modules["fastgpt_kernels.linear_cross_entropy"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = [
    {},
    {"reduction": "sum", "softcap": 15.0, "z_loss": 1e-3},
    {"reduction": "none", "label_smoothing": 0.1},
    {"reduction": "none"},
]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """The same numbers, without a C++ compiler run for each shape."""
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


def native(x, w, target, linear_bias=None, softcap=None, z_loss=0.0, reduction="mean", **options):
    logits = F.linear(x, w, linear_bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits.float(), target, reduction="none", **options)
    kept = target != -100
    loss = loss + z_loss * torch.logsumexp(logits.float(), -1).square() * kept
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept.sum()}[reduction]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(1, 8, 8), (300, 32, 57), (140, 64, 1000)]
)
def test_linear_cross_entropy(monkeypatch, rows, width, vocabulary, dtype, options, with_bias):
    monkeypatch.setattr(_linear, "CHUNK_ELEMENTS", 128 * vocabulary)
    target = torch.randint(vocabulary, (rows,))
    target[1::7] = -100
    tensors = [torch.randn(rows, width), torch.randn(vocabulary, width) * 0.4]
    tensors = [x.to(dtype) for x in [*tensors, *[torch.randn(vocabulary)] * with_bias]]
    layout = "transposed" if rows == 300 else "padded"
    compare(
        lambda x, w, *b: linear_cross_entropy(
            x, w, target, linear_bias=b[0] if b else None, **options
        ),
        lambda x, w, *b: native(x, w, target, *b, **options),
        lambda x, w, *b: reference.linear_cross_entropy(
            x, w, target, linear_bias=b[0] if b else None, **options
        ),
        tensors,
        layouts=[layout, layout, "contiguous"][: len(tensors)],
        output_floor=None if dtype == torch.float32 else dtype,
    )


def test_agrees_with_pytorch_2_13():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy came with PyTorch 2.13")
    x, w, b = torch.randn(20, 16), torch.randn(33, 16), torch.randn(33)
    t = torch.randint(33, (20,))
    t[3] = 7
    options = {"linear_bias": b, "ignore_index": 7, "label_smoothing": 0.1}
    ours, theirs = (
        linear_cross_entropy(x, w, t, **options),
        F.linear_cross_entropy(x, w, t, **options),
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_never_whole(monkeypatch, bias):
    """The largest tensor allocated is one chunk (or the weight), not rows x vocabulary."""
    rows, width, vocabulary = 1024, 16, 400
    monkeypatch.setattr(_linear, "CHUNK_ELEMENTS", 128 * vocabulary)
    monkeypatch.setattr(cpu, "MAX_LOGITS_BYTES", 128 * vocabulary * 4)
    x = torch.randn(rows, width, requires_grad=True)
    w = torch.randn(vocabulary, width, requires_grad=True)
    b = torch.randn(vocabulary) if bias else None
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in torch.utils._pytree.tree_leaves(out):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.untyped_storage().nbytes())
            return out

    with Watch():
        linear_cross_entropy(x, w, torch.randint(vocabulary, (rows,)), linear_bias=b).backward()
    assert 0 < largest <= 128 * vocabulary * 4 < rows * vocabulary


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_the_mean_of_no_rows_is_nan_with_zero_gradient(rows, options):
    """As in PyTorch; the quotient's own gradient, 1 / 0, would make every parameter NaN."""
    x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    b = torch.randn(11, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.full((rows,), -100), linear_bias=b, **options)
    assert loss.isnan()
    for parameter, grad in zip((x, w, b), torch.autograd.grad(loss, (x, w, b)), strict=True):
        assert torch.equal(grad, torch.zeros_like(parameter))


def test_bytes_are_targets():
    """156 is what an ignore_index of -100 becomes in 8 bits."""
    x, w = torch.randn(2, 8), torch.randn(256, 8, requires_grad=True)
    t = torch.tensor([156, 3])
    expected = torch.autograd.grad(F.cross_entropy(x @ w.T, t), w)[0]
    loss = linear_cross_entropy(x, w, t.to(torch.uint8))
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], expected)


def test_backward_twice_and_scaled():
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.arange(6))
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (x, w))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_no_gradient_work_without_gradients(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(MODULE, "_gradients", forbidden)
    x, w = torch.randn(6, 8), torch.randn(11, 8, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, torch.arange(6))
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, torch.arange(6)))


def test_autocast_casts_like_linear():
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, torch.arange(6))
    loss.backward()
    assert loss.dtype == w.grad.dtype == x.grad.dtype == torch.float32
    expected = F.cross_entropy((x.bfloat16() @ w.bfloat16().T).float(), torch.arange(6))
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)


def test_float32_master_weight():
    x, w = torch.randn(6, 8).bfloat16(), torch.randn(11, 8, requires_grad=True)
    linear_cross_entropy(x, w, torch.arange(6)).backward()
    other = w.detach().bfloat16().float().requires_grad_()
    F.cross_entropy(x.float() @ other.T, torch.arange(6)).backward()
    assert w.grad.dtype == torch.float32
    torch.testing.assert_close(w.grad, other.grad, rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ND": torch.randn(2, 3, 8)}, "flatten"),
        ({"linear_weight_VD": torch.randn(5, 7)}, "shapes"),
        ({"linear_weight_VD": torch.randn(0, 8)}, "no class to predict"),
        ({"linear_bias": torch.randn(4)}, "linear_bias"),
        ({"linear_weight_VD": torch.randn(5, 8).half()}, "dtype"),
        ({"target_N": torch.zeros(3, dtype=torch.int64)}, "target"),
        ({"reduction": "avg"}, "reduction"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    arguments = {
        "input_ND": torch.randn(2, 8),
        "linear_weight_VD": torch.randn(5, 8),
        "target_N": torch.zeros(2, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)

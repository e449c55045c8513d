"""linear_log_probs on the CPU: numerics against float64, what is ignored, memory, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import compare, guard

from fastgpt_kernels import _cpu_log_probs, cpu, linear_cross_entropy, linear_log_probs, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.3}]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """The same numbers, without a C++ compiler run for each shape."""
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


@pytest.fixture(params=["one chunk", "several"])
def chunks(request, monkeypatch):
    """One, whose logits are kept; or four rows at a time: several sums of parts, a short end."""
    if request.param == "several":
        monkeypatch.setattr(_cpu_log_probs, "rows_per_chunk", lambda *_: 4)


def native(hidden, weight, ids, bias=None, temperature=1.0, softcap=None):
    """PyTorch's own operations: logits in the operands' dtype, the rest in float32."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits.float() / temperature, -1)
    kept = ids != -100
    picked = logp.gather(-1, ids.clamp_min(0)[..., None])[..., 0]
    return torch.where(kept, picked, 0.0), torch.where(kept, -(logp.exp() * logp).sum(-1), 0.0)


def both(fn, **options):
    """The two results as one tensor, for ``compare``."""
    return lambda *args: torch.stack(fn(*args, **options))


def operands(shape, width, vocabulary, dtype, scale=0.4):
    ids = torch.randint(vocabulary, shape)
    ids.view(-1)[1::7] = -100
    tensors = torch.randn(*shape, width), torch.randn(vocabulary, width) * scale
    return *(x.to(dtype) for x in tensors), ids


def test_bytes_are_ids():
    """156 is what an ignore_index of -100 becomes in 8 bits."""
    x, w, ids = torch.randn(2, 8), torch.randn(256, 8), torch.tensor([156, 3])
    for ours, expected in zip(linear_log_probs(x, w, ids.byte()), native(x, w, ids), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "width", "vocabulary"), [((1,), 8, 8), ((3, 7), 32, 41), ((2, 3, 2), 16, 1000)]
)
def test_linear_log_probs(chunks, shape, width, vocabulary, dtype, options, with_bias):
    hidden, weight, ids = operands(shape, width, vocabulary, dtype)
    bias = [torch.randn(vocabulary).to(dtype)] * with_bias
    layout = "transposed" if len(shape) == 2 else "padded"
    compare(
        both(linear_log_probs, **options),
        both(native, **options),
        both(reference.linear_log_probs, **options),
        [hidden, weight, ids, *bias],
        layouts=[layout, layout, "padded", "contiguous"][: 3 + with_bias],
    )


def gradients(fn, tensors, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:2]]
    log_probs, entropy = fn(*leaves, *tensors[2:], **options)
    return lambda a, b: torch.autograd.grad(
        (a * log_probs).sum() + (b * entropy).sum(), leaves, retain_graph=True
    )


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (-0.5, 2.0)])
def test_each_result_has_its_gradient(chunks, weights):
    tensors = operands((9,), 8, 21, torch.float32)
    exact = [x.double() if x.is_floating_point() else x for x in tensors]
    ours = gradients(linear_log_probs, tensors)(*weights)
    expected = gradients(reference.linear_log_probs, exact)(*weights)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_one_result_alone():
    """Neither result needs the other's gradient to exist."""
    hidden, weight, ids = operands((5,), 8, 21, torch.float32)
    for index in range(2):
        a, b = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        linear_log_probs(a, weight, ids)[index].sum().backward()
        reference.linear_log_probs(b, weight.double(), ids)[index].sum().backward()
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-6)


def test_is_the_cross_entropy_with_its_sign_turned():
    hidden, weight, ids = operands((40,), 16, 33, torch.float32)
    log_probs, entropy = linear_log_probs(hidden, weight, ids, softcap=3.0)
    loss = linear_cross_entropy(hidden, weight, ids, softcap=3.0, reduction="none")
    torch.testing.assert_close(log_probs, -loss)
    logits = 3.0 * torch.tanh(hidden @ weight.T / 3.0)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy, torch.where(ids == -100, 0.0, expected))


@pytest.mark.parametrize("ignored", ["some", "all"])
def test_ignored_positions_give_nothing_whatever_they_hold(chunks, ignored):
    hidden, weight, ids = operands((6,), 8, 11, torch.float32)
    ids[:] = ids.clamp_min(0)
    where = torch.tensor([1, 4]) if ignored == "some" else torch.arange(6)
    ids[where] = -100
    hidden[where] = float("nan")
    grad = torch.randn(2, 6)
    grad[:, where] = float("nan")
    leaves = [guard(x).requires_grad_() for x in (hidden, weight)]
    results = torch.stack(linear_log_probs(*leaves, ids))
    results.backward(grad)
    assert torch.equal(results[:, where], torch.zeros(2, len(where)))
    assert torch.equal(leaves[0].grad[where], torch.zeros(len(where), 8))
    kept = [i for i in range(6) if i not in where]
    expected = [x.detach().clone().requires_grad_() for x in (hidden[kept], weight)]
    if kept:
        torch.stack(linear_log_probs(*expected, ids[kept])).backward(grad[:, kept])
        torch.testing.assert_close(leaves[0].grad[kept], expected[0].grad)
        torch.testing.assert_close(leaves[1].grad, expected[1].grad)
    else:
        assert torch.equal(leaves[1].grad, torch.zeros(11, 8))


@pytest.mark.parametrize("logit", [12.0, 1e4])
def test_all_but_certain(logit):
    """Results and gradients stay as accurate as PyTorch's in float32 when a probability nears 1."""
    hidden = torch.eye(2) * logit
    weight = torch.randn(50, 2) * 1e-3
    weight[3, 0] = weight[7, 1] = 1.0
    compare(
        both(linear_log_probs),
        both(native),
        both(reference.linear_log_probs),
        [hidden, weight, torch.tensor([3, 2])],
        grad_output=torch.ones(2, 2),
    )


def test_masked_vocabulary_entries():
    """A bias of -inf: probability 0, and neither result nor gradient has a NaN."""
    hidden, weight, ids = operands((6,), 8, 11, torch.float32)
    ids = ids.clamp(0, 8)
    bias = torch.zeros(11)
    bias[9:] = -torch.inf
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    log_probs, entropy = linear_log_probs(*leaves, ids, bias)
    expected = linear_log_probs(hidden, weight[:9], ids)
    torch.testing.assert_close((log_probs, entropy), expected)
    ours = torch.autograd.grad((log_probs + entropy).sum(), leaves)
    theirs = torch.autograd.grad((expected[0] + expected[1]).sum(), leaves)
    torch.testing.assert_close(ours, theirs)


def test_float32_master_weight_and_autocast():
    hidden, weight, ids = operands((6,), 8, 11, torch.float32)
    narrow = torch.stack(linear_log_probs(hidden.bfloat16(), weight.bfloat16(), ids))
    master = weight.clone().requires_grad_()
    results = torch.stack(linear_log_probs(hidden.bfloat16(), master, ids))
    results.sum().backward()
    assert torch.equal(results, narrow)
    assert master.grad.dtype == results.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.stack(linear_log_probs(hidden, weight, ids)), narrow)


def test_no_positions():
    weight = torch.randn(11, 8, requires_grad=True)
    log_probs, entropy = linear_log_probs(
        torch.randn(2, 0, 8), weight, torch.zeros(2, 0, dtype=torch.long)
    )
    assert log_probs.shape == entropy.shape == (2, 0)
    (log_probs.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(11, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VD": torch.randn(5, 7)}, "shapes"),
        ({"bias": torch.randn(4)}, "bias"),
        ({"weight_VD": torch.randn(5, 8).half()}, "dtype"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "ids"),
        ({"ids": torch.zeros(2)}, "ids"),
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    arguments = {
        "hidden": torch.randn(2, 8),
        "weight_VD": torch.randn(5, 8),
        "ids": torch.zeros(2, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_log_probs(**arguments)

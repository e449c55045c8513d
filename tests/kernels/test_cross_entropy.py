"""cross_entropy on the CPU: numerics against float64, exactness at the edges, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import LAYOUTS, compare

from fastgpt_kernels import cpu, cross_entropy, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "softcap": 15.0, "z_loss": 1e-3},
    {"reduction": "none", "label_smoothing": 0.2, "ignore_index": 3},
]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """The same numbers, without a C++ compiler run for each shape."""
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


@pytest.fixture(params=["few logits", "many"])
def path(request, monkeypatch):
    """Both paths of an eager call, whatever the number of logits."""
    many = request.param == "many"
    monkeypatch.setattr(cpu, "worth_fusing", lambda x, _=0: many and x.dtype != torch.float64)


def native(x, target, softcap=None, z_loss=0.0, reduction="mean", ignore_index=-100, **options):
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    options["ignore_index"] = ignore_index
    loss = F.cross_entropy(x.float(), target, reduction="none", **options)
    kept = target != ignore_index
    loss = loss + z_loss * torch.logsumexp(x.float(), -1).square() * kept
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept.sum()}[reduction]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 8), (64, 41), (7, 1000), (3, 50257)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.usefixtures("path")
def test_cross_entropy(rows, vocabulary, dtype, options, scale):
    target = torch.randint(vocabulary, (rows,))
    target[:: 3 if rows > 1 else 2**20][1:] = options.get("ignore_index", -100)
    x = (torch.randn(rows, vocabulary) * (scale if "softcap" not in options else 4.0)).to(dtype)
    compare(
        lambda x, t: cross_entropy(x, t, **options),
        lambda x, t: native(x, t, **options),
        lambda x, t: reference.cross_entropy(x, t, **options),
        [x, target],
        layouts=[LAYOUTS[rows % 4], "padded"],
    )


def test_agrees_with_pytorch_on_float32_and_float64():
    x, t = torch.randn(16, 33), torch.randint(33, (16,))
    assert torch.equal(
        cross_entropy(x, t, reduction="sum"), F.cross_entropy(x, t, reduction="none").sum()
    )
    assert cross_entropy(x.double(), t).dtype == torch.float64


def test_compiled_passes_are_those_of_the_tests_above(monkeypatch):
    """A call large enough runs them compiled; one odd size and both kinds of row."""
    x = (torch.randn(65, 4099) * 3).bfloat16().index_fill(0, torch.tensor(1), torch.inf)
    x[2, 7] = torch.nan
    t = torch.randint(4099, (65,))
    t[1] = -100

    def results():
        leaf = x.clone().requires_grad_()
        loss = cross_entropy(leaf, t, reduction="none", label_smoothing=0.1)
        loss.backward(torch.linspace(-1, 1, 65))
        return loss, leaf.grad

    monkeypatch.setattr(cpu, "worth_fusing", lambda x, _=0: True)
    expected = results()
    monkeypatch.setattr(cpu, "_can_compile", lambda: True)
    for a, b in zip(results(), expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
        assert torch.equal(a.isnan().view(65, -1).any(1).nonzero().view(-1), torch.tensor([2]))


@pytest.mark.usefixtures("path")
def test_all_rows_ignored_is_nan_with_zero_gradient():
    x = torch.randn(4, 11, requires_grad=True)
    loss = cross_entropy(x, torch.full((4,), -100))
    loss.backward()
    assert loss.isnan()
    assert torch.equal(x.grad, torch.zeros(4, 11))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_narrow_targets(dtype):
    """156 is what an ignore_index of -100 becomes in 8 bits."""
    x, t = torch.randn(2, 200), torch.tensor([156, 3])
    for reduction in ("none", "mean"):
        ours = cross_entropy(x, t.to(dtype), reduction=reduction)
        torch.testing.assert_close(ours, F.cross_entropy(x, t, reduction=reduction))


@pytest.mark.usefixtures("path")
def test_ignored_rows_give_nothing():
    x = torch.randn(3, 11).index_fill(0, torch.tensor(1), torch.inf).requires_grad_()
    loss = cross_entropy(x, torch.tensor([2, -100, 4]), reduction="none")
    loss.backward(torch.randn(3))
    assert loss[1] == 0
    assert loss.dtype == torch.float32


@pytest.mark.usefixtures("path")
def test_low_precision_logits_give_a_float32_loss():
    x, t = (torch.randn(64, 1000) * 3).bfloat16(), torch.randint(1000, (64,))
    exact = F.cross_entropy(x.double(), t)
    assert abs(cross_entropy(x, t) - exact) < 1e-6 * exact


def _through_a_layer(x, t, view=lambda x: x, **options):
    """Gradient of x, and whether the logits' gradient lay in the logits' memory."""
    leaf, same = x.clone().requires_grad_(), []
    logits = view(leaf * 1.0)
    logits.register_hook(lambda grad: same.append(grad.data_ptr() == logits.data_ptr()))
    cross_entropy(logits, t, **options).backward()
    return leaf.grad, *same


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_over_the_logits_on_request(dtype, options):
    x, t = torch.randn(7, 41).to(dtype), torch.randint(41, (7,))
    t[2] = options.get("ignore_index", -100)
    options = {**options, "reduction": "sum"}
    expected, shared = _through_a_layer(x, t, **options)
    ours, inplace = _through_a_layer(x, t, **options, inplace_backward=True)
    assert (shared, inplace) == (False, True)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[:1].expand(7, 7)])
def test_logits_that_cannot_hold_their_gradient_are_left_alone(view):
    x, t = torch.randn(7, 7), torch.arange(7)
    ours, inplace = _through_a_layer(x, t, view, inplace_backward=True)
    assert not inplace
    torch.testing.assert_close(ours, _through_a_layer(x, t, view)[0])


def test_in_place_twice_or_beside_another_use_raises():
    x = torch.randn(4, 9, requires_grad=True)
    logits = x * 1.0
    loss = cross_entropy(logits, torch.arange(4), inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = x * 1.0
    square = logits.square().sum()
    loss = cross_entropy(logits, torch.arange(4), inplace_backward=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_NV": torch.randn(2, 3, 4)}, "flatten"),
        ({"target_N": torch.zeros(3, dtype=torch.int64)}, "target"),
        ({"target_N": torch.zeros(2)}, "target"),
        ({"reduction": "avg"}, "reduction"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"softcap": 0.0}, "softcap"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    arguments = {
        "input_NV": torch.randn(2, 5),
        "target_N": torch.zeros(2, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        cross_entropy(**arguments)

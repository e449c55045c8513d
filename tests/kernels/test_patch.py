"""``patch`` on modules of ``torch.nn`` and on modules that call PyTorch's attention."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from harness import assert_as_good_as
from torch import nn

from fastgpt_kernels import cpu, modules
from fastgpt_kernels import patch as patching
from fastgpt_kernels.patch import patch, unpatch


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


class SelfAttention(nn.Module):
    """As many models write it; ``options`` go to PyTorch's attention."""

    def __init__(self, **options):
        super().__init__()
        self.qkv, self.options = nn.Linear(16, 48), options

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, **self.options)
        return out.transpose(1, 2).flatten(2)


class LongName(SelfAttention):
    def forward(self, x):
        q, k, v = torch.cat([self.qkv(x)]).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class LocalName(SelfAttention):
    def forward(self, x):
        from torch.nn.functional import scaled_dot_product_attention as attend

        return attend(x, x, x)


class AttributeOfThatName(SelfAttention):
    def forward(self, x):
        self.F = F
        return self.F.scaled_dot_product_attention(x, x, x)


class FromWithin(SelfAttention):
    """Calls in a comprehension, in a lambda and beside an attribute of the same name."""

    def forward(self, x):
        both = [F.scaled_dot_product_attention(y, y, y) for y in (x, 2.0 * x)]
        attend = lambda y: F.scaled_dot_product_attention(y, y, y)  # noqa: E731
        third = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return sum(both) + attend(x) + nn.functional.relu(third)


FACTOR, CALLS = 1.0, 0


class UsesGlobals(SelfAttention):
    def forward(self, x):
        global CALLS
        CALLS += 1
        return super().forward(x) * FACTOR + F.scaled_dot_product_attention(x, x, x)


class Multihead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner, self.call = nn.MultiheadAttention(16, 2, batch_first=True), options

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False, **self.call)[0]


CAUSAL = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True}
CASES = {
    "layer_norm": nn.LayerNorm(16),
    "rms_norm": nn.RMSNorm(16),
    "gelu": nn.GELU(),
    "sdpa": SelfAttention(),
    "sdpa_causal": SelfAttention(is_causal=True, scale=0.5),
    "sdpa_mask": SelfAttention(attn_mask=torch.ones(5, 5).triu().bool()),
    "sdpa_long_name": LongName(),
    "multihead": Multihead(),
    "multihead_causal": Multihead(**CAUSAL),
    "multihead_mask": Multihead(key_padding_mask=torch.arange(15).view(3, 5) % 5 > 2),
    "encoder": nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
}


def results(module, x, grad):
    leaves = [x.detach().requires_grad_(), *module.parameters()]
    out = module(leaves[0])
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("how", ["eager", "compile"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, how):
    native = copy.deepcopy(CASES[case])
    for parameter in native.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, grad = torch.randn(2, 3, 5, 16)
    doubles = [x.double(), grad]
    exact_module = copy.deepcopy(native).double()
    exact = results(exact_module, *doubles) if "mask" not in str(case) else None
    expected = results(native, x, grad)
    patched = patch(native)
    assert patched.replaced
    assert patched.skipped == ()
    run = native
    if how == "compile":
        run = torch.compile(native, fullgraph=True, backend="aot_eager")
    ours = results(run, x, grad)
    for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
        if exact is None:  # what stays with PyTorch
            torch.testing.assert_close(a, b)
        else:
            assert_as_good_as(a, b, exact[index], 3.0 if index else 2.0, f"{case} {index}")
    unpatch(patched)
    assert all(torch.equal(a, b) for a, b in zip(results(native, x, grad), expected, strict=True))


def test_our_attention_runs(monkeypatch):
    """The kernels are reached, and not PyTorch's attention by another way."""
    from fastgpt_kernels import patch as module

    calls = []
    real = module.attention
    monkeypatch.setattr(module, "attention", lambda *a, **k: calls.append(k) or real(*a, **k))
    x = torch.randn(2, 5, 16)
    for name, expected in (
        ("sdpa_causal", [{"causal": True, "scale": 0.5}]),
        ("sdpa_long_name", [{"causal": True, "scale": None}]),
        ("sdpa_mask", []),
        ("multihead", [{"causal": False}]),
        ("multihead_mask", []),
    ):
        case = copy.deepcopy(CASES[name])
        patch(case)
        calls.clear()
        case(x if "mask" not in name else torch.randn(3, 5, 16))
        assert calls == expected, name


@pytest.mark.parametrize(
    ("options", "logits", "targets"),
    [
        ({"ignore_index": 3, "label_smoothing": 0.1}, (6, 9), torch.arange(6)),
        ({"reduction": "none"}, (6, 9), torch.arange(6)),
        ({}, (6, 9), torch.softmax(torch.ones(6, 9), -1)),  # probabilities: PyTorch's
        ({}, (2, 9, 3), torch.arange(6).view(2, 3)),
        ({}, (9,), torch.tensor(4)),
    ],
)
def test_cross_entropy_loss(options, logits, targets):
    loss, x = nn.CrossEntropyLoss(**options), torch.randn(logits)
    expected = loss(x, targets)
    assert len(patch(loss).replaced) == 1
    torch.testing.assert_close(loss(x, targets), expected)


def test_kinds_and_reasons():
    class Norm(nn.LayerNorm):
        def forward(self, input):
            return input

    replaced = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))
    skipped = nn.ModuleList([
        Norm(8), nn.CrossEntropyLoss(torch.ones(3)), nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
        modules.LayerNorm(8), LocalName(),
    ])  # fmt: skip
    wrapped = nn.LayerNorm(8)
    wrapped.forward = lambda x: x
    patched = patch(nn.ModuleDict({"a": replaced, "b": skipped, "c": wrapped}))
    assert [x.name for x in patched.replaced] == ["a.0", "a.2"]
    reasons = {x.name: x.reason for x in patched.skipped}
    assert list(reasons) == ["b.0", "b.1", "b.2", "b.4", "c"]
    assert "is a subclass of torch.nn.modules.normalization.LayerNorm" in reasons["b.0"]
    assert reasons["b.1"] == "class weights"
    text = str(patched)
    assert text.startswith("replaced 2\n  a.0: torch.nn.modules.normalization.LayerNorm\n")
    assert "skipped 5\n  b.0: " in text


def test_state_hooks_and_shared_modules():
    norm = nn.LayerNorm(8)
    model = nn.Sequential(norm, norm)
    called, before = [], dict(model.named_parameters())
    norm.register_forward_pre_hook(lambda *_: called.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    patched = patch(model)
    assert len(patched.replaced) == 1
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    assert len(called) == 2
    assert all(p is before[name] for name, p in model.named_parameters())
    assert not torch.equal(norm.bias, torch.zeros(8))
    assert patch(model).replaced == ()
    norm.__class__ = nn.Identity
    with pytest.raises(ValueError, match="__class__ of 0"):
        unpatch(patched)


def test_a_patched_forward_sees_the_globals_of_its_module(monkeypatch):
    model, x = UsesGlobals(), torch.randn(1, 5, 16)
    monkeypatch.setitem(globals(), "CALLS", 0)
    assert len(patch(model).replaced) == 1
    expected = UsesGlobals.forward(model, x)
    torch.testing.assert_close(model(x), expected)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    torch.testing.assert_close(model(x), UsesGlobals.forward(model, x))
    assert not torch.allclose(model(x), expected)
    assert CALLS == 5


def test_a_name_that_is_an_attribute_too_is_left_alone():
    model = AttributeOfThatName()
    patched = patch(model)
    assert patched.replaced == ()
    assert "other than a global name" in str(patched)


def test_calls_from_functions_within(monkeypatch):
    model, x, calls = FromWithin(), torch.randn(1, 2, 5, 8), []
    expected = model(x)
    assert len(patch(model).replaced) == 1
    ours = patching.attention
    monkeypatch.setattr(patching, "attention", lambda *a, **k: calls.append(1) or ours(*a, **k))
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 4

"""``patch`` on GPT-2 and LLaMA of ``transformers``, built from their configurations."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from patch_models import (
    MODELS,
    assert_equal_models,
    batch,
    gpt2,
    llama,
    reference_results,
    results,
)

from fastgpt_kernels import cpu
from fastgpt_kernels.patch import patch, register_attention, unpatch

pytest.importorskip("transformers", reason="pip install transformers")
by_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)


@by_model
def test_what_is_replaced(name):
    model = MODELS[name]()
    patched = patch(model)
    assert patched.skipped == ()
    kinds = [x.before.__name__ for x in patched.replaced if x.attribute == "__class__"]
    norms = {"gpt2": ["LayerNorm"] * 5, "llama": ["LlamaRMSNorm"] * 5}[name]
    rest = {"gpt2": ["NewGELUActivation"] * 2, "llama": ["LlamaMLP", "LlamaAttention"] * 2}[name]
    assert sorted(kinds) == sorted(norms + rest)
    others = [x.attribute for x in patched.replaced if x.attribute != "__class__"]
    assert others == ["_loss_function", "_attn_implementation"]
    assert patch(model).replaced == ()  # nothing is left to replace
    assert "attn_implementation, was 'sdpa'" in str(patched)


@by_model
def test_nothing_but_classes_changes(name):
    model = MODELS[name]()
    called = []
    norm = next(m for m in model.modules() if "Norm" in type(m).__name__)
    norm.register_forward_hook(lambda *_: called.append(1))
    before = {
        "parameters": {n: id(p) for n, p in model.named_parameters()},
        "modules": {n: id(m) for n, m in model.named_modules()},
        "state": list(model.state_dict()),
        "types": [type(m) for m in model.modules()],
    }
    names = [type(m).__name__ for m in model.modules()]
    expected = results(model, batch())
    patched = patch(model)
    results(model, batch())
    assert {n: id(p) for n, p in model.named_parameters()} == before["parameters"]
    assert {n: id(m) for n, m in model.named_modules()} == before["modules"]
    assert list(model.state_dict()) == before["state"]
    assert [type(m).__name__ for m in model.modules()] == names  # configurations hold them
    assert len(called) == 2
    unpatch(patched)
    assert [type(m) for m in model.modules()] == before["types"]
    assert model.config._attn_implementation == "sdpa"
    assert "_loss_function" not in vars(model)
    for a, b in zip(results(model, batch()), expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="not what patch set"):
        unpatch(patched)


@by_model
@pytest.mark.parametrize("how", ["eager", "compile", "checkpoint", "autocast", "bfloat16"])
def test_outputs_and_gradients(name, how):
    model = MODELS[name]().to(torch.bfloat16 if how == "bfloat16" else torch.float32)
    native, exact = reference_results(model, batch(), autocast=how == "autocast")
    patch(model)
    run = model
    if how == "compile":
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    if how == "checkpoint":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_models(results(run, batch(), autocast=how == "autocast"), native, exact)


def test_a_wrong_kernel_is_seen():
    """The rule of these tests can fail: epsilons half as large again break it."""
    model = llama()
    native, exact = reference_results(model, batch())
    patch(model)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= 1.5
    with pytest.raises(AssertionError, match="error"):
        assert_equal_models(results(model, batch()), native, exact)


@by_model
def test_fused_loss_has_no_logits(name):
    model = MODELS[name]()
    native, exact = reference_results(model, batch())
    patched = patch(model, fuse_loss=True)
    model.zero_grad()
    output = model(**batch())
    assert output.logits is None
    output.loss.backward()
    ours = [output.loss, native[1], *(p.grad for p in model.parameters())]
    assert_equal_models(ours, native, exact)
    assert model(batch()["input_ids"]).logits.shape == native[1].shape  # without labels, as ever
    with pytest.raises(ValueError, match="by keyword"):
        model(**batch(), logits_to_keep=2)
    summed = model(**batch(), num_items_in_batch=4).loss
    unpatch(patched)
    torch.testing.assert_close(summed, model(**batch(), num_items_in_batch=4).loss)


class Adapted(torch.nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2.0 + 1.0


def adapt(model):
    weight, model.lm_head = model.lm_head.weight, Adapted(32, 61, bias=False)
    model.lm_head.weight = weight


def hook(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2.0)


def hook_backward(model):
    model.lm_head.register_full_backward_hook(lambda module, given, out: (given[0] * 0.0,))


def replace_forward(model):
    model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight) * 2.0


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("change", [adapt, hook, hook_backward, replace_forward])
@by_model
def test_fused_loss_of_a_head_that_is_more_than_a_weight(name, change, early):
    """Adapters on the head, put there before ``patch`` or after: the loss is that of its logits."""
    model, native = MODELS[name](), MODELS[name]()
    if not early:
        assert patch(model, fuse_loss=True).skipped == ()
    for each in (model, native):
        change(each)
    if early:
        assert "its lm_head " in str(patch(model, fuse_loss=True))
    found = [results(each, batch()) for each in (model, native, MODELS[name]())]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    with pytest.raises(AssertionError):  # the change does something
        torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-3)


@by_model
def test_fused_loss_of_a_head_with_a_bias(name):
    model = MODELS[name]()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(61))
    native, exact = reference_results(model, batch())
    assert patch(model, fuse_loss=True).skipped == ()
    model.zero_grad()
    output = model(**batch())
    output.loss.backward()
    ours = [output.loss, native[1], *(p.grad for p in model.parameters())]
    assert_equal_models(ours, native, exact)


@by_model
def test_fused_loss_when_the_forward_is_not_the_class_s(name):
    model = MODELS[name]()
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    assert "replaced on the instance" in str(patch(model, fuse_loss=True))


@by_model
def test_fused_loss_keeps_the_arguments_that_others_ask_for(name):
    """``generate`` passes positions, a trainer columns, only to a forward that names them."""
    model, (inputs, _) = MODELS[name](), padded("left")
    model.eval()
    expected, arguments = generate(model, inputs), inspect.signature(model.forward)
    patch(model, fuse_loss=True)
    assert inspect.signature(model.forward) == arguments
    torch.testing.assert_close(generate(model, inputs), expected)


def padded(side: str) -> tuple[dict, torch.Tensor]:
    inputs, mask = batch(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, pads in enumerate((0, 2, 5)):
        hidden = slice(0, pads) if side == "left" else slice(9 - pads, 9)
        mask[row, hidden] = 0
    inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
    if side == "left":  # the first real token is predicted by padding, whose output has no meaning
        for row, pads in enumerate((0, 2, 5)):
            inputs["labels"][row, pads] = -100
    return {**inputs, "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize(
    ("name", "side", "how"),
    [
        *((name, side, "eager") for name in MODELS for side in ("left", "right")),
        ("llama", "left", "compile"),
        pytest.param("llama", "right", "compile", marks=pytest.mark.full),
        pytest.param("gpt2", "left", "compile", marks=pytest.mark.full),
        pytest.param("gpt2", "right", "compile", marks=pytest.mark.full),
    ],
)
def test_padding(name, side, how):
    model, (inputs, keep) = MODELS[name](), padded(side)
    native, exact = reference_results(model, inputs, keep=keep)
    patch(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compile" else model
    assert_equal_models(results(run, inputs, keep=keep), native, exact)


@by_model
def test_packed_sequences(name):
    """Positions that start again are new sequences, blind to the ones before."""
    model, inputs = MODELS[name](), batch(2, 9)
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2], [*range(9)]])
    native, exact = reference_results(model, inputs)
    patch(model)
    assert_equal_models(results(model, inputs), native, exact)


def test_sliding_window():
    from transformers import MistralConfig, MistralForCausalLM

    register_attention()
    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, sliding_window=4, use_cache=False,
    )  # fmt: skip
    model, (inputs, keep) = MistralForCausalLM(config), padded("left")
    native, exact = reference_results(model, inputs, keep=keep)
    model.set_attn_implementation("fastgpt")
    assert_equal_models(results(model, inputs, keep=keep), native, exact)
    ours = generate(model, inputs)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, generate(model, inputs))


def generate(model, inputs, **options):
    """The logits of the new tokens."""
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options |= {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**prompt, **options).logits, 1)


@by_model
def test_generation_with_a_cache(name):
    """Prompts padded on the left, then one token at a time; and several against a cache."""
    model, (inputs, _) = MODELS[name](), padded("left")
    model.eval()
    expected = generate(model, inputs)
    ids = inputs["input_ids"]
    whole = model(ids).logits
    patch(model)
    torch.testing.assert_close(generate(model, inputs), expected)
    static = generate(model, inputs, cache_implementation="static")
    torch.testing.assert_close(static, expected)
    first = model(ids[:, :4], use_cache=True)
    cache = getattr(first, "cache", None) or first.past_key_values
    kept = "cache" if hasattr(first, "cache") else "past_key_values"
    rest = model(ids[:, 4:], **{kept: cache}, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole)


def test_interface_options():
    """Softcap, scale and window by the interface alone, against plain scores."""
    from fastgpt_kernels._transformers import attention_forward

    module = torch.nn.Module()
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    out, weights = attention_forward(module, q, k, v, None, scaling=0.7, softcap=2.0)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.7
    scores = 2.0 * torch.tanh(scores / 2.0)
    scores = scores.masked_fill(torch.ones(5, 7).triu(3).bool(), -torch.inf)
    expected = torch.softmax(scores, -1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None
    scores = scores.masked_fill(torch.ones(5, 7).tril(-1).bool(), -torch.inf)  # of 7 keys, 3
    expected = torch.softmax(scores, -1) @ v.repeat_interleave(2, 1)
    options = {"scaling": 0.7, "softcap": 2.0, "sliding_window": 3}
    out = attention_forward(module, q, k, v, None, **options)[0]
    torch.testing.assert_close(out, expected.transpose(1, 2))
    last = attention_forward(module, q[:, :, -1:], k, v, None, **options)[0]
    torch.testing.assert_close(last, out[:, -1:])
    same = attention_forward(module, q, k, v, None, position_ids=torch.arange(5), **options)[0]
    torch.testing.assert_close(same, out)
    others = ({name: q} for name in ("position_bias", "sinks", "indices", "anything"))
    scalars = {"s_aux": 0.5}, {"head_mask": [1.0, 0.0]}
    for refused in ({"dropout": 0.1}, {"output_attentions": True}, *scalars, *others):
        with pytest.raises(ValueError, match="fastgpt"):
            attention_forward(module, q, k, v, None, **refused)
    with pytest.raises(ValueError, match="four-dimensional"):
        attention_forward(module, q, k, v, torch.ones(2, 1, 5, 7).bool())


@by_model
def test_masks_with_holes_are_refused(name):
    model = MODELS[name]()
    patch(model)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="sdpa"):
        model(**batch(), attention_mask=mask)


def test_what_is_left_alone():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Norm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return hidden_states

    model = llama(hidden_act="gelu")
    model.model.norm = Norm(32)
    model.model.layers[0].input_layernorm.forward = lambda x: x
    skipped = {x.name: x.reason for x in patch(model).skipped}
    assert "is a subclass of transformers.models.llama" in skipped["model.norm"]
    assert "instance" in skipped["model.layers.0.input_layernorm"]
    assert skipped["model.layers.1.mlp"] == "activation GELUActivation"
    with_dropout = gpt2(attn_pdrop=0.1)
    assert "dropout 0.1" in str(patch(with_dropout))
    assert with_dropout.config._attn_implementation == "sdpa"
    flash = copy.deepcopy(llama())
    flash.config._attn_implementation = "flex_attention"
    assert "'flex_attention' was chosen" in str(patch(flash))

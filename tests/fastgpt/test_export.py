"""Exported directories, opened by transformers from disk: the same logits, texts and chats."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import tokenizer_samples as samples
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from fastgpt import chat
from fastgpt.config import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.export import export
from fastgpt.generate import SamplingConfig, generate
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer, train_sentencepiece

GPT2 = {"norm": "layer_norm", "mlp": "gelu_tanh", "position": "learned", "bias": True}
LLAMA = {"norm": "rms_norm", "norm_eps": 1e-6, "mlp": "swiglu", "position": "rotary"}
MODERN = {"qk_norm": True, "embed_norm": True, "norm_weight": False, "norm_eps": 1e-6}
SHAPES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 untied": ("GPT2LMHeadModel", GPT2 | {"tied": False, "mlp": "gelu", "d_ff": 48}),
    "llama": ("LlamaForCausalLM", LLAMA | {"tied": False, "d_ff": 40, "rope_theta": 500.0}),
    "llama grouped": ("LlamaForCausalLM", LLAMA | {"n_kv_head": 2, "head_dim": 12, "bias": True}),
    "modern": ("FastGPTForCausalLM", MODERN),
    "modern capped": ("FastGPTForCausalLM", MODERN | {"logit_softcap": 3.0, "tied": False}),
    "gpt3": ("FastGPTForCausalLM", GPT2 | {"window": 5}),
    "palm": (
        "FastGPTForCausalLM",
        {"norm": "layer_norm", "mlp": "swiglu", "parallel": True, "n_kv_head": 1, "head_dim": 16},
    ),
    "llama of three heads": ("FastGPTForCausalLM", LLAMA | {"n_head": 3, "head_dim": 12}),
    "qk gain": ("FastGPTForCausalLM", LLAMA | {"qk_norm": True}),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path, uncompiled):
    """Code that comes with a model is imported from below ``tmp_path``; nothing is asked for."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([samples.english(30_000)], 400)


def make(shape: dict, vocab_size: int) -> GPT:
    """A model with no weight at a value that could hide its part."""
    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context": 40, "vocab_size": vocab_size}
    model = GPT(ModelConfig(**{**sizes, **shape}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same(name, tokenizer, tmp_path):
    architecture, shape = SHAPES[name]
    model = make(shape, tokenizer.vocab_size)
    out = tmp_path / "out"
    assert export(model, tokenizer, out) == architecture
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    theirs = load(out)
    assert type(theirs).__name__ == architecture
    assert theirs.dtype == torch.float32
    assert theirs.num_parameters() == sum(p.numel() for p in model.parameters())
    assert theirs.config.max_position_embeddings == 40
    ids = torch.randint(0, tokenizer.vocab_size, (3, 37))
    with torch.no_grad():
        ours, found = model.logits(model(ids)), theirs(ids).logits
    assert found.dtype == torch.float32
    assert (found - ours).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "llama grouped", "modern", "gpt3"])
def test_generation_with_padding_is_the_same(name, tokenizer, tmp_path):
    """Through their cache, left padding and positions."""
    model = make(SHAPES[name][1], tokenizer.vocab_size)
    out = tmp_path / "out"
    export(model, tokenizer, out)
    theirs, pad = load(out), 0
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    found = theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
    )
    expected = generate(model, prompts, SamplingConfig(max_new_tokens=12, temperature=0.0))
    assert found[:, width:].tolist() == expected


def test_the_loss_is_that_of_transformers(tokenizer, tmp_path):
    out = tmp_path / "out"
    export(make(MODERN, tokenizer.vocab_size), tokenizer, out)
    theirs = load(out)
    ids = torch.randint(0, tokenizer.vocab_size, (2, 20))
    labels = ids.masked_fill(torch.rand(2, 20) < 0.3, -100)
    result = theirs(ids, labels=labels)
    logits = result.logits[:, :-1].reshape(-1, tokenizer.vocab_size)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))
    torch.testing.assert_close(result.loss, expected)
    # A trainer that accumulates gradients divides by the labels of all micro-batches.
    rows = zip(ids.split(1), labels.split(1), strict=True)
    parts = [theirs(i, labels=t, num_items_in_batch=37) for i, t in rows]
    counted = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(sum(part.loss for part in parts), expected * counted / 37)
    kept = theirs(ids, logits_to_keep=1).logits
    torch.testing.assert_close(kept, result.logits[:, -1:])


TALK = [
    {"role": "user", "content": "Who is there?  It's 1234"},
    {"role": "assistant", "content": "Nobody — as ever.\n\nAsk é漢"},
    {"role": "user", "content": "Still?"},
]


@pytest.fixture(params=["bpe", "sentencepiece"])
def chatting(request, tokenizer, tmp_path) -> Tokenizer:
    if request.param == "bpe":
        return chat.with_chat_tokens(tokenizer)
    lines = samples.english(60_000).split("\n\n")
    return chat.with_chat_tokens(train_sentencepiece(lines, 600, tmp_path / "t.model"))


def test_the_tokenizer_goes_along(chatting, tmp_path):
    out = tmp_path / "out"
    export(make(LLAMA, chatting.vocab_size), chatting, out)
    theirs = AutoTokenizer.from_pretrained(out)
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"] == chat.render_prompt(chatting, TALK)
    text = samples.english(20_000).replace("<|endoftext|>", "")
    assert theirs(text)["input_ids"] == chatting.encode(text)
    assert theirs.decode(chatting.encode(text)) == text
    assert theirs.convert_ids_to_tokens(theirs.eos_token_id) == "<|end|>"
    assert theirs.bos_token_id == theirs.pad_token_id == chatting.eot_id
    config = json.loads((out / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    for settings in (config, generation):
        assert settings["eos_token_id"] == chat.end_id(chatting)
        assert settings["pad_token_id"] == settings["bos_token_id"] == chatting.eot_id


def test_a_base_model_has_no_chat_template(tokenizer, tmp_path):
    out = tmp_path / "out"
    export(make(MODERN, tokenizer.vocab_size), tokenizer, out)
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.chat_template is None
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot_id
    assert theirs.pad_token_id is None


def test_what_is_there_is_not_overwritten(tokenizer, tmp_path):
    (tmp_path / "file").write_text("x")
    model = make(MODERN, tokenizer.vocab_size)
    with pytest.raises(UsageError, match="not empty; choose another"):
        export(model, tokenizer, tmp_path)
    with pytest.raises(UsageError, match="cannot write"):
        export(model, tokenizer, tmp_path / "file")


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_a_module_that_is_called(tied, tokenizer, tmp_path):
    """So hooks on it run, by which weights come from a disk; and it can be resized."""
    out = tmp_path / "out"
    export(make({**MODERN, "tied": tied}, tokenizer.vocab_size), tokenizer, out)
    theirs, called = load(out), []
    head = theirs.get_output_embeddings()
    assert (head.weight is theirs.get_input_embeddings().weight) == tied
    head.register_forward_hook(lambda *_: called.append(1))
    theirs(torch.arange(5)[None])
    assert called
    theirs.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        load(tmp_path / "again")(torch.arange(5)[None]).logits, theirs(torch.arange(5)[None]).logits
    )
    theirs.resize_token_embeddings(tokenizer.vocab_size + 3)
    assert theirs(torch.arange(5)[None]).logits.shape[-1] == tokenizer.vocab_size + 3

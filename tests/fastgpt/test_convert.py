"""Runs made of Hugging Face models: the logits of transformers, and a way back."""

from __future__ import annotations

import json

import pytest
import tokenizer_samples as samples
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fastgpt.convert import convert
from fastgpt.errors import DataError, UsageError
from fastgpt.export import export
from fastgpt.run import load_model
from fastgpt.tokenizer import Tokenizer, train_sentencepiece

VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([samples.english(20_000)], 300)


GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 24, "vocab_size": VOCAB}
LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "vocab_size": VOCAB,
}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2 wide": lambda: GPT2LMHeadModel(
        GPT2Config(**GPT2, n_inner=48, activation_function="gelu", layer_norm_epsilon=1e-3)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    ),
    "llama tied": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
}


def make(name: str):
    torch.manual_seed(2)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def saved(tokenizer, tmp_path, uncompiled):
    def save(name: str = "gpt2", **options):
        model, source = make(name), tmp_path / "source"
        model.save_pretrained(source, **options)
        tokenizer.save(source / "tokenizer.json")
        return model, source

    return save


@pytest.mark.parametrize("name", MODELS)
def test_the_run_computes_what_transformers_does(name, saved, tokenizer, tmp_path):
    theirs, source = saved(name, max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    config = convert(source, tmp_path / "run")
    model, ours = load_model(tmp_path / "run", device="cpu", dtype="float32")
    assert model.config == config
    assert ours.hash == tokenizer.hash
    ids = torch.randint(0, VOCAB, (2, 24))
    with torch.no_grad():
        expected, found = theirs(ids).logits, model.logits(model(ids))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, saved, tmp_path):
    _, source = saved(name)
    convert(source, tmp_path / "run")
    export(*load_model(tmp_path / "run", device="cpu", dtype="float32"), tmp_path / "back")
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_sentencepiece_model_beside_a_tokenizer_json_that_cannot_be_read(saved, tmp_path):
    """As the directories of LLaMA 1 and 2 are, and our own exports."""
    _, source = saved("llama")
    (source / "tokenizer.json").unlink()
    texts = ["abc ab bcd abcd"] * 100
    tokenizer = train_sentencepiece(texts, 270, source / "tokenizer.model")
    for again in range(2):
        run, exported = tmp_path / f"run{again}", tmp_path / f"exported{again}"
        convert(source, run)
        model, read = load_model(run, device="cpu", dtype="float32")
        assert read.hash == tokenizer.hash
        export(model, read, exported)
        assert (exported / "tokenizer.json").is_file()
        assert (exported / "tokenizer.model").is_file()
        source = exported


def test_the_two_files_of_gpt2(saved, tokenizer, tmp_path):
    _, source = saved("gpt2")
    (source / "tokenizer.json").unlink()
    tokenizer.save(source / "vocab.json")
    convert(source, tmp_path / "run")
    text = "What two files say, "
    read = load_model(tmp_path / "run", device="cpu")[1]
    gpt2_split = Tokenizer.from_file(source / "vocab.json")
    assert read.encode(text) == gpt2_split.encode(text)


def test_names_and_buffers_of_the_first_gpt2_files(saved, tmp_path):
    theirs, source = saved("gpt2")
    file = source / "model.safetensors"
    old = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    old["lm_head.weight"] = theirs.lm_head.weight.detach().clone()
    save_file(old, file)
    convert(source, tmp_path / "run")
    model, _ = load_model(tmp_path / "run", device="cpu")
    assert torch.equal(model.wpe.weight, theirs.transformer.wpe.weight)  # pyright: ignore


CONFIGS = {
    "another family": ({"model_type": "bert"}, "model_type 'bert'; it must be gpt2 or llama"),
    "scaled rope": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "type 'yarn'"),
    "old rope": ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "type 'linear'"),
    "one bias": ({"attention_bias": True}, "a bias in attention or MLP alone"),
    "activation": ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    "lacking": ({"hidden_size": ...}, "KeyError.*hidden_size"),
    "of another size": (
        {"intermediate_size": 44},
        r"has shape \(.*40.*\), its config.json says .*44",
    ),
    "fewer layers": ({"num_hidden_layers": 1}, "layers.1.* has no place in the model"),
    "more layers": ({"num_hidden_layers": 3}, "no file has model.layers.2"),
    "fewer ids": ({"vocab_size": 200}, "300 ids in tokenizer.json, 200 in the model"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_no_configuration_describes(case, saved, tmp_path):
    changes, message = CONFIGS[case]
    _, source = saved("llama")
    settings = json.loads((source / "config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not ...}
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises((UsageError, DataError), match=message):
        convert(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_options_of_gpt2_that_are_refused(option, saved, tmp_path):
    _, source = saved("gpt2")
    settings = json.loads((source / "config.json").read_text()) | {option: True}
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=option):
        convert(source, tmp_path / "run")


def test_missing_and_damaged_files(saved, tmp_path):
    _, source = saved("gpt2")
    file, run = source / "model.safetensors", tmp_path / "run"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"model\.safetensors: cannot read"):
        convert(source, run)
    file.rename(source / "pytorch_model.bin")
    with pytest.raises(DataError, match="other formats can run code"):
        convert(source, run)
    (source / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"none of tokenizer\.json, tokenizer\.model, vocab\.json"):
        convert(source, run)
    (source / "config.json").write_text("[]")
    with pytest.raises(DataError, match="an object is expected, not list"):
        convert(source, run)
    (source / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not JSON"):
        convert(source, run)
    with pytest.raises(DataError, match=r"nowhere/config\.json: cannot read"):
        convert(tmp_path / "nowhere", run)

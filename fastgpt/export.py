"""Write a model for Hugging Face: ``python -m fastgpt.export --run runs/sft --out model``.

GPT-2 and LLaMA shapes become GPT2LMHeadModel and LlamaForCausalLM, which every tool knows. Others
come with ``modeling_fastgpt.py``, to be loaded with ``trust_remote_code=True``. The tokenizer and,
for a model finetuned on chats, the chat template go along.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt import cli
from fastgpt.chat import CHAT_TOKENS, END, chat_template
from fastgpt.config import ModelConfig
from fastgpt.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fastgpt.model import GPT
    from fastgpt.tokenizer import Tokenizer

Weights = dict[str, "Tensor"]


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as a Hugging Face directory."""

    run: Path
    """Run directory of a trained model."""
    out: Path
    """Directory to write; it must not exist or be empty."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = cli.from_flags(ExportConfig, argv)
    from fastgpt.run import load_model

    model, tokenizer = load_model(config.run, step=config.step, device="cpu", dtype="float32")
    architecture = export(model, tokenizer, config.out)
    remote = ", trust_remote_code=True" if architecture == REMOTE else ""
    print(f"{config.out}: {architecture}, {model.config.n_params():,} parameters")
    print(f'try: AutoModelForCausalLM.from_pretrained("{config.out}"{remote})')


REMOTE = "FastGPTForCausalLM"


def export(model: GPT, tokenizer: Tokenizer, out: Path) -> str:
    """Write config.json, model.safetensors, tokenizer and template to the directory ``out``.

    Weights are float32. Returns the name of the class that loads them. Raises UsageError for a
    directory that holds something or cannot be written.
    """
    from safetensors.torch import save_file

    config = model.config
    weights = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    if is_gpt2(config):
        settings, weights = gpt2(config, weights)
    elif is_llama(config):
        settings, weights = llama(config, weights)
    else:
        settings = remote(config)
    ids = token_ids(tokenizer)
    settings |= {"vocab_size": config.vocab_size, "torch_dtype": "float32", **ids}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if next(out.iterdir(), None) is not None:
            raise UsageError(f"--out {out}: this directory is not empty; choose another")
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})
        _write_json(out / "config.json", settings)
        _write_json(out / "generation_config.json", ids)
        shutil.copymode(out / "config.json", out / "model.safetensors")  # the library makes it 0600
        if settings["architectures"] == [REMOTE]:
            shutil.copyfile(Path(__file__).with_name(CODE), out / CODE)
        export_tokenizer(tokenizer, config.context, out)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write: {error.strerror}") from error
    return settings["architectures"][0]


CODE = "modeling_fastgpt.py"


def is_gpt2(config: ModelConfig) -> bool:
    """Whether GPT2LMHeadModel computes the same."""
    same_heads = config.kv_heads == config.n_head
    return (
        same_heads
        and config.norm == "layer_norm"
        and config.mlp in ("gelu", "gelu_tanh")
        and config.position == "learned"
        and config.bias
        and config.attn_dim * config.n_head == config.n_embd
        and _is_plain(config)
    )


def is_llama(config: ModelConfig) -> bool:
    """Whether LlamaForCausalLM computes the same."""
    return (
        config.norm == "rms_norm"
        and config.mlp == "swiglu"
        and config.position == "rotary"
        and config.n_embd % config.n_head == 0  # transformers insists, whatever the head_dim
        and _is_plain(config)
    )


def _is_plain(config: ModelConfig) -> bool:
    extras = (config.parallel, config.qk_norm, config.embed_norm)
    uncommon = (config.logit_softcap, config.window)
    return config.norm_weight and not any(extras) and all(value is None for value in uncommon)


def gpt2(config: ModelConfig, weights: Weights) -> tuple[dict[str, Any], Weights]:
    """Configuration and weights of GPT2LMHeadModel, whose matrices are (in, out)."""
    names = {
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attn.qkv": "attn.c_attn",
        "attn.proj": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    renamed: Weights = {}
    for name, tensor in weights.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            owner, _, kind = rest.rpartition(".")
            matrix = tensor.t() if tensor.dim() == 2 else tensor
            renamed[f"transformer.h.{layer}.{names[owner]}.{kind}"] = matrix
        elif name == "head.weight":
            renamed["lm_head.weight"] = tensor
        else:
            renamed["transformer." + name.replace("norm.", "ln_f.")] = tensor
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.ff_dim,
        "n_positions": config.context,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.mlp],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }
    return settings, renamed


def llama(config: ModelConfig, weights: Weights) -> tuple[dict[str, Any], Weights]:
    """Configuration and weights of LlamaForCausalLM, with q, k and v apart."""
    names = {
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attn.proj": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    top = {"wte.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    top["head.weight"] = "lm_head.weight"
    sizes = [heads * config.attn_dim for heads in (config.n_head, *[config.kv_heads] * 2)]
    renamed: Weights = {}
    for name, tensor in weights.items():
        if name in top:
            renamed[top[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        owner, _, kind = rest.rpartition(".")
        prefix = f"model.layers.{layer}."
        if owner == "attn.qkv":
            for letter, part in zip("qkv", tensor.split(sizes), strict=True):
                renamed[f"{prefix}self_attn.{letter}_proj.{kind}"] = part
        else:
            renamed[f"{prefix}{names[owner]}.{kind}"] = tensor
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.n_embd,
        "intermediate_size": config.ff_dim,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.attn_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tied,
    }
    return settings, renamed


def remote(config: ModelConfig) -> dict[str, Any]:
    """Configuration of the class that comes along; its weights have our names."""
    module = CODE.removesuffix(".py")
    shape = dataclasses.asdict(config)
    for name in ("n_kv_head", "head_dim", "d_ff", "init"):
        del shape[name]
    return {
        "architectures": [REMOTE],
        "model_type": "fastgpt",
        "auto_map": {
            "AutoConfig": f"{module}.FastGPTConfig",
            "AutoModelForCausalLM": f"{module}.{REMOTE}",
        },
        **shape,
        "kv_heads": config.kv_heads,
        "attn_dim": config.attn_dim,
        "ff_dim": config.ff_dim,
    }


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """What begins a text, ends it and fills up a batch; an answer's end is never padding."""
    end = tokenizer.special_tokens.get(END, tokenizer.eot_id)
    ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": end}
    return ids | ({"pad_token_id": tokenizer.eot_id} if end != tokenizer.eot_id else {})


def export_tokenizer(tokenizer: Tokenizer, context: int, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the chat template if there are chats."""
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    for key, token_id in token_ids(tokenizer).items():
        settings[key.removesuffix("_id")] = names[token_id]
    if all(name in tokenizer.special_tokens for name in CHAT_TOKENS):
        settings["chat_template"] = chat_template(tokenizer)
    tokenizer.save(out / "tokenizer.json")
    model = out / "tokenizer.model"
    if model.is_file():
        _write_json(out / "tokenizer.json", sentencepiece_json(model))
    _write_json(out / "tokenizer_config.json", settings)


def sentencepiece_json(path: Path) -> dict[str, Any]:
    """The tokenizer.json that gives the ids of a LLaMA-style sentencepiece model.

    A pair merges if its text is a piece, the piece of the highest score first. Raises UsageError
    for a model of another kind.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(path))
    ids = range(model.GetPieceSize())
    pieces = [model.IdToPiece(i) for i in ids]
    ordinary = [i for i in ids if not (model.IsControl(i) or model.IsByte(i) or model.IsUnknown(i))]
    ranks = [-model.GetScore(i) for i in ordinary]
    if ranks != list(range(len(ranks))) or model.Normalize(" ﬁ \uff21  ") != "▁▁ﬁ▁\uff21▁▁":
        raise UsageError(f"{path}: only LLaMA-style models (BPE, text as it is) can be exported")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in (pieces[i] for i in ordinary)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    controls = [i for i in ids if model.IsControl(i)]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": pieces[i], **flags, "special": True} for i in controls
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": pieces[model.unk_id()],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(cli.command(main)())

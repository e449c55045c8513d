"""Start from weights of Hugging Face: ``python -m fastgpt.convert --model dir --out runs/gpt2``.

The directory holds config.json, safetensors and a tokenizer, as ``save_pretrained`` or a download
leaves them; GPT-2 and LLaMA shapes are understood. What comes out is a run at step 0: finetune it
with ``python -m fastgpt.sft --init``. Texts begin with the end-of-text id there, as in all runs,
not with the ``<s>`` that a LLaMA was trained to expect first.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt import cli
from fastgpt.config import ModelConfig, PretrainConfig
from fastgpt.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fastgpt.tokenizer import Tokenizer

# What files hold besides weights.
_BUFFER = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


@dataclass(frozen=True)
class ConvertConfig:
    """Make a run of a Hugging Face model."""

    model: Path
    """Directory with config.json, *.safetensors and tokenizer.json or tokenizer.model."""
    out: Path
    """Run directory to make."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = cli.from_flags(ConvertConfig, argv)
    shape = convert(config.model, config.out)
    print(f"run {config.out}, {shape.n_params():,} parameters")
    print(f"try: python -m fastgpt.sft --init {shlex.quote(str(config.out))}")


def convert(source: Path, out: Path) -> ModelConfig:
    """Make the run ``out`` of the model in ``source``; return its shape.

    Raises UsageError for a model that no `ModelConfig` describes exactly, DataError for files that
    are missing, damaged or do not fit together.
    """
    from fastgpt.checkpoint import save_checkpoint
    from fastgpt.export import gpt2, llama
    from fastgpt.model import GPT
    from fastgpt.rundir import RunDir, write_atomic

    settings = _json(source / "config.json")
    kind = settings.get("model_type")
    readers = {"gpt2": (_gpt2_shape, gpt2), "llama": (_llama_shape, llama)}
    if kind not in readers:
        raise UsageError(f"{source}: model_type {kind!r}; it must be {' or '.join(readers)}")
    read_shape, names = readers[kind]
    try:
        config = read_shape(settings, source)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source / 'config.json'}: {error!r}; is it complete?") from error
    config.check()
    tokenizer, file = _tokenizer(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{source}: {tokenizer.vocab_size} ids in {file}, {config.vocab_size} in the model"
        )
    model = GPT(config)
    state = model.state_dict()
    # The new names of the model's own tensors: writing to these views fills the model.
    _fill(names(config, dict(state))[1], source)
    run = RunDir.create(out)
    with run.emptied_on_error():
        tokenizer.save(run.tokenizer_path)
        write_atomic(run.config_path, cli.to_toml(cli.to_tree(PretrainConfig(model=config))))
        save_checkpoint(run.checkpoints, 0, {"model": state}, {}, keep_last=0)
    return config


def _tokenizer(source: Path) -> tuple[Tokenizer, str]:
    """The tokenizer of a model, and its file: the first one that can be read.

    Beside the tokenizer.model of a LLaMA lies a tokenizer.json of a kind that cannot.
    """
    from fastgpt.tokenizer import Tokenizer, VocabularyError

    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    found = [file for file in files if (source / file).is_file()]
    if not found:
        raise DataError(f"{source}: none of {', '.join(files)}")
    first = None
    for file in found:
        try:
            return Tokenizer.from_file(source / file), file
        except VocabularyError as error:
            first = first or error
    assert first is not None
    raise first


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}; is it a model?") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: an object is expected, not {type(value).__name__}")
    return value


def _gpt2_shape(settings: dict[str, Any], source: Path) -> ModelConfig:
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _GELU:
        raise UsageError(f"{source}: activation_function {activation!r} is not supported")
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if settings.get(option):
            raise UsageError(f"{source}: {option} is not supported")
    return ModelConfig(
        n_layer=settings["n_layer"],
        n_head=settings["n_head"],
        n_embd=settings["n_embd"],
        d_ff=settings.get("n_inner"),
        vocab_size=settings["vocab_size"],
        context=settings["n_positions"],
        norm="layer_norm",
        norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        mlp=_GELU[activation],  # pyright: ignore[reportArgumentType]
        position="learned",
        bias=True,
        tied=settings.get("tie_word_embeddings", True),
    )


def _llama_shape(settings: dict[str, Any], source: Path) -> ModelConfig:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    biases = [settings.get(name, False) for name in ("attention_bias", "mlp_bias")]
    unsupported = {
        f"rope of type {scaling!r}": scaling != "default",
        f"hidden_act {settings.get('hidden_act')!r}": settings.get("hidden_act", "silu") != "silu",
        "a bias in attention or MLP alone": biases[0] != biases[1],
    }
    for what, is_so in unsupported.items():
        if is_so:
            raise UsageError(f"{source}: {what} is not supported")
    return ModelConfig(
        n_layer=settings["num_hidden_layers"],
        n_head=settings["num_attention_heads"],
        n_kv_head=settings.get("num_key_value_heads"),
        n_embd=settings["hidden_size"],
        head_dim=settings.get("head_dim"),
        d_ff=settings["intermediate_size"],
        vocab_size=settings["vocab_size"],
        context=settings["max_position_embeddings"],
        norm="rms_norm",
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        mlp="swiglu",
        position="rotary",
        rope_theta=float(rope.get("rope_theta", settings.get("rope_theta", 10000.0))),
        bias=biases[0],
        tied=settings.get("tie_word_embeddings", False),
    )


def _fill(views: dict[str, Tensor], source: Path) -> None:
    """Copy the weights of ``source`` into the tensors of their names."""
    # GPT-2 as OpenAI's was uploaded has its names without the module in front.
    short = {name.removeprefix("transformer."): name for name in views}
    missing = set(views)
    for file, name, tensor in _tensors(source):
        target = name if name in views else short.get(name)
        if target is None:
            if _BUFFER.search(name) or name == "lm_head.weight":  # tied: the embedding once more
                continue
            raise DataError(f"{file}: {name} has no place in the model of its config.json")
        if views[target].shape != tensor.shape:
            raise DataError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, its config.json says "
                f"{tuple(views[target].shape)}"
            )
        views[target].copy_(tensor)
        missing.discard(target)
    if missing:
        raise DataError(f"{source}: no file has {min(missing)}; is the download complete?")


def _tensors(source: Path) -> Iterator[tuple[Path, str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise DataError(f"{source}: no *.safetensors; other formats can run code and are not read")
    for file in files:
        try:
            with safe_open(file, "pt") as reader:
                for name in reader.keys():  # noqa: SIM118, it is no mapping
                    yield file, name, reader.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file}: cannot read: {error}; load it down again") from error


if __name__ == "__main__":
    raise SystemExit(cli.command(main)())

"""Tiny GPT-2 and LLaMA of ``transformers``, and the numerics rule for whole models."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from harness import assert_as_good_as
from torch import Tensor, nn

VOCAB = 61


def gpt2(**options) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": VOCAB}
    config = GPT2Config(**{**sizes, **dropout, "use_cache": False, **options})
    torch.manual_seed(1)
    return spread(GPT2LMHeadModel(config))


def llama(**options) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"vocab_size": VOCAB, "max_position_embeddings": 32, "use_cache": False}
    torch.manual_seed(1)
    return spread(LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **more, **options})))


MODELS: dict[str, Callable[..., nn.Module]] = {"gpt2": gpt2, "llama": llama}


def spread(model: nn.Module) -> nn.Module:
    """Norm weights away from 1 and projections large enough for attention to be peaked."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0).add_(
                0.1 * torch.randn_like(parameter)
            )
    return model


def batch(rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def results(
    model: nn.Module, inputs: dict[str, Tensor], autocast: bool = False, keep: Tensor | None = None
) -> list[Tensor]:
    """Loss, logits (where ``keep``) and all gradients, those in one row, each scaled to 1."""
    model.zero_grad()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        output = model(**inputs)
    output.loss.backward()
    logits = output.logits if keep is None else output.logits[keep]
    return [output.loss, logits, *(p.grad for p in model.parameters())]


def assert_equal_models(ours: list, native: list, exact: list) -> None:
    """Errors against float64 of loss and logits at most 2x, of gradients 3x those of ``native``.

    The gradients of all parameters are judged together, each in units of its largest entry: of one
    small tensor the rounding errors of two implementations may differ by more, by chance.
    """
    for index, factor in ((0, 2.0), (1, 2.0)):
        floor = native[1].dtype
        a, b = ours[index].to(native[index].dtype), native[index]
        assert_as_good_as(a, b, exact[index], factor, f"result {index}", floor)
    scale = [x.abs().max() for x in exact[2:]]
    rows = [
        torch.cat([(x / s).flatten().double() for x, s in zip(grads[2:], scale, strict=True)])
        for grads in (ours, native, exact)
    ]
    assert_as_good_as(*rows, 3.0, "gradients", native[1].dtype)


def reference_results(model: nn.Module, inputs: dict, **options) -> tuple[list, list]:
    """Results of the unpatched ``model`` in its own precision and in float64."""
    native = results(copy.deepcopy(model), inputs, **options)
    options.pop("autocast", None)
    return native, results(copy.deepcopy(model).double(), inputs, **options)

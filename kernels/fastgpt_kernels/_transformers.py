"""How ``patch`` treats ``transformers``, and ``attn_implementation="fastgpt"``.

Nothing here imports ``transformers``: a model made of its classes has, and its modules are told by
their names. Their bodies stay what they are in whatever version; GPT-2's attention gets ours by the
configuration, LLaMA's besides by the name of the rotation that it calls.

Masks. ``transformers`` describes who sees whom by functions of positions and a mask of padding.
``attention_mask`` turns them into the ``doc_start`` of ``fastgpt_kernels.attention``, once for all
layers: the first key of each query. That covers causal masks with padding on either side, packed
sequences (from ``position_ids``), sliding windows and chunks, and caches of fixed length without
the latter; anything else is refused, never approximated. Queries that are padding get outputs of no
meaning, as they always do.

Legend: B batch, H heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt_kernels.activations import gelu, swiglu
from fastgpt_kernels.attention import attention
from fastgpt_kernels.attention_decode import attention_decode
from fastgpt_kernels.cross_entropy import cross_entropy
from fastgpt_kernels.layers import SILU
from fastgpt_kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt_kernels.normalization import rms_norm
from fastgpt_kernels.rotary import rotary

NAME = "fastgpt"
"""Of the attention implementation."""
_NO_MASK = (
    "attention 'fastgpt' takes masks whose every query sees one run of keys up to its own (causal, "
    "padded at either end, packed by position_ids, windowed); use attn_implementation='sdpa' for "
)
_OTHER_MATHEMATICS = ("position_bias", "s_aux", "head_mask", "output_attentions")
_HARMLESS = (
    *("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"),  # said by the mask
    *("max_length_q", "max_length_k", "seq_idx", "token_type_ids", "mm_token_type_ids"),
    *("num_items_in_batch", "labels", "shift_labels"),
)
"""Tensors that models pass down to their attention and that change nothing there; others (sinks,
biases, indices of what is seen) would."""


def subclass(original: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """``original`` with another ``forward``, under its name, which saved configurations hold."""
    body = {
        "forward": forward, "_fastgpt_original": original, "__module__": original.__module__,
        "__qualname__": original.__qualname__, "__doc__": original.__doc__,
    }  # fmt: skip
    return type(original.__name__, (original,), body)


def rebind(function: Callable[..., Any], names: dict[str, Any]) -> types.FunctionType | None:
    """A copy of ``function`` that means something else by some of its global names.

    The copy, with functions made in it, says ``_fastgpt_<name>``, which its module gets beside its
    own names: it still sees what happens to those. Where a name is one of an attribute too, it
    stays what it is. None if nothing changes.
    """
    plain: Any = function
    code = _renamed(plain.__code__, names)
    if code == plain.__code__:
        return None
    plain.__globals__.update({f"_fastgpt_{name}": value for name, value in names.items()})
    copy = types.FunctionType(
        code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copy.__kwdefaults__ = plain.__kwdefaults__
    return copy


def names_in(code: types.CodeType) -> set[str]:
    """Global names and attributes that a function and those made in it say."""
    inner = (names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _renamed(code: types.CodeType, names: Collection[str]) -> types.CodeType:
    uses: dict[bool, set[str]] = {True: set(), False: set()}
    for instruction in dis.get_instructions(code):
        if instruction.opcode in dis.hasname:
            uses["GLOBAL" in instruction.opname].add(instruction.argval)
    changed = uses[True].intersection(names) - uses[False]
    inner = (_renamed(c, names) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    said = (f"_fastgpt_{name}" if name in changed else name for name in code.co_names)
    return code.replace(co_names=tuple(said), co_consts=tuple(inner))


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
    sliding_window: int | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as ``transformers.AttentionInterface`` calls it.

    Args:
        module: asked for ``is_causal`` if that is None.
        query: (B, H, T, D).
        key: (B, HK, S, D), the cached ones included; S >= T if causal.
        value: like ``key``.
        attention_mask: what ``attention_mask`` made of the masks.
        dropout: must be 0.
        scaling: factor on the dot products; D ** -0.5 if None.
        is_causal: whether the last query sees the last key, the one before one key less ...
        sliding_window: keys a query sees.
        softcap: bound of the scores.
        kwargs: a tensor that may change the result is refused, so are attention weights.

    Returns:
        (B, T, H, D), and None for the weights.

    Raises:
        ValueError: dropout, attention weights, a four-dimensional mask or what an unknown tensor
            stands for (biases, sinks) are asked for.
    """
    if dropout:
        raise ValueError(f"attention 'fastgpt' has no dropout, got {dropout}; set it to 0")
    for name, given in kwargs.items():
        unknown = isinstance(given, Tensor) and name not in _HARMLESS
        asked = name in _OTHER_MATHEMATICS and given is not None and given is not False
        if unknown or asked:
            raise ValueError(f"attention 'fastgpt' has no {name}; use 'eager' or 'sdpa'")
    lengths_too = (torch.int32, (1, 1, 2))
    fixed = (
        attention_mask is not None
        and (attention_mask.dtype, attention_mask.shape[1:]) == lengths_too
    )
    if attention_mask is not None and not fixed and attention_mask.dim() != 2:
        raise ValueError(_NO_MASK + "four-dimensional masks")
    q, k, v = query, key, value
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options = {"scale": scaling, "window": sliding_window, "softcap": softcap or None}
    (B, _, T, _), S = q.shape, k.shape[2]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if fixed or (causal and T == 1 and not gradients):
        starts, lengths = None, torch.full((B,), S, dtype=torch.int32, device=q.device)
        if fixed and attention_mask is not None:
            starts, lengths = attention_mask[:, 0, 0].unbind(-1)
        elif attention_mask is not None:
            starts = attention_mask[:, 0]
        q_BTHD, k_BSHD, v_BSHD = (x.transpose(1, 2) for x in (q, k, v))
        return attention_decode(
            q_BTHD, k_BSHD, v_BSHD, lengths, cache_starts_B=starts, **options
        ), None
    out = attention(q, k, v, causal=causal, doc_start=attention_mask, **options)
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Any = None, attention_mask: Tensor | None = None, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """Masks as ``transformers.AttentionMaskInterface`` has them made, for ``attention_forward``.

    Plain causal and full attention need none. Otherwise the mask (B, T, S) is made once, as for
    PyTorch's attention, read, and dropped.

    Returns:
        (B, T) int32, the first key each query sees, or None. For a cache of fixed length, whose
        later part is empty: (B, 1, 1, 2) int32, the first key of each row and their number.

    Raises:
        ValueError: a mask that no such numbers describe; when compiled, an assertion on the device.
    """
    masking = sys.modules["transformers.masking_utils"]
    causal = "allow_is_bidirectional_skip" not in kwargs  # only the other kind is told
    # A cache of fixed length tells its offset as a tensor once it holds something.
    fixed = isinstance(q_offset, Tensor) or (
        causal and q_offset + q_length != kv_offset + kv_length
    )
    compiling = torch.compiler.is_compiling()
    unpadded = attention_mask is None or (not compiling and bool(attention_mask.all()))
    plain = (masking.causal_mask_function, masking.bidirectional_mask_function)
    if unpadded and mask_function in plain and not fixed:
        return None
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    seen = masking.sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
    if fixed:
        start, fits = _fixed_cache(seen[:, 0], q_offset)
    else:
        start, fits = first_keys(seen[:, 0], causal=causal)
    if compiling:
        torch.ops.aten._assert_async.msg(fits, _NO_MASK + "others")
    elif not fits:
        raise ValueError(_NO_MASK + "others")
    return start


def first_keys(seen_BTS: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(B, T) int32, the first key each query sees, and whether that says all there is to say.

    Queries that do not see themselves are padding and do not count; the first key of one is that of
    the query before, for ``doc_start`` must not decrease.
    """
    T, S = seen_BTS.shape[1:]
    key_S = torch.arange(S, device=seen_BTS.device)
    start_BT = seen_BTS.int().argmax(-1)
    if not causal:
        start_BT = start_BT.cummax(-1).values
        return start_BT.int(), ((key_S >= start_BT[..., None]) == seen_BTS).all()
    counts_BT = seen_BTS.diagonal(S - T, 1, 2)
    start_BT = torch.where(counts_BT, start_BT, 0).cummax(-1).values
    query_T1 = torch.arange(S - T, S, device=seen_BTS.device)[:, None]
    told = (key_S >= start_BT[..., None]) & (key_S <= query_T1)
    return start_BT.int(), ((told == seen_BTS).all(-1) | ~counts_BT).all()


def _fixed_cache(seen_BTS: Tensor, offset: Tensor | int) -> tuple[Tensor, Tensor]:
    """(B, 1, 1, 2), first key and number of keys, and whether that says all; see ``first_keys``."""
    T, S = seen_BTS.shape[1:]
    key_S = torch.arange(S, device=seen_BTS.device)
    start_B = seen_BTS[:, -1].int().argmax(-1)
    query_T1 = (offset + torch.arange(T, device=seen_BTS.device))[:, None]
    told = (key_S >= start_B[:, None, None]) & (key_S <= query_T1)
    counts_BT = (seen_BTS & (key_S == query_T1)).any(-1)
    lengths_B = torch.zeros_like(start_B) + (offset + T)
    numbers = torch.stack([start_B, lengths_B], -1)[:, None, None].int()
    return numbers, ((told == seen_BTS).all(-1) | ~counts_BT).all()


def register_attention() -> None:
    """Make ``attn_implementation="fastgpt"`` known to ``transformers`` (5.24 is what is tested)."""
    modeling = importlib.import_module("transformers.modeling_utils")
    masking = importlib.import_module("transformers.masking_utils")
    modeling.AttentionInterface.register(NAME, attention_forward)
    masking.AttentionMaskInterface.register(NAME, attention_mask)


@functools.cache
def _rms_norm_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self, hidden_states: Tensor) -> Tensor:
        # A weight wider than the input makes the output as wide.
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
        return rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    return subclass(original, forward)


@functools.cache
def _mlp_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return subclass(original, forward)


def _mlp(module: Any) -> type[nn.Module] | str:
    act = type(module.act_fn)
    if act.__name__ not in SILU:
        return f"activation {act.__name__}"
    return _mlp_class(type(module))


@functools.cache
def _gelu_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate="tanh")

    return subclass(original, forward)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
    """``apply_rotary_pos_emb`` of LLaMA, whose angles (B, T, D) are the same in both halves."""
    half = cos.shape[-1] // 2
    cos, sin = (x[..., :half].unsqueeze(unsqueeze_dim) for x in (cos, sin))
    return rotary(q, cos, sin), rotary(k, cos, sin)


@functools.cache
def _llama_attention_class(original: type[nn.Module]) -> type[nn.Module] | str:
    """The method as it is, but for the rotation that its name ``apply_rotary_pos_emb`` means."""
    method = rebind(inspect.unwrap(original.forward), {"apply_rotary_pos_emb": _rotate})
    if method is None:
        return "its forward calls no apply_rotary_pos_emb"
    renamed = "cache" in inspect.signature(method).parameters

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if renamed and "past_key_values" in kwargs:  # what the decorator of the method does
            kwargs["cache"] = kwargs.pop("past_key_values")
        return method(self, *args, **kwargs)

    return subclass(original, forward)


_LLAMA = "transformers.models.llama.modeling_llama."
_GPT2 = "transformers.models.gpt2.modeling_gpt2."

RULES: dict[str, Callable[[Any], type[nn.Module] | str]] = {
    _LLAMA + "LlamaRMSNorm": lambda module: _rms_norm_class(type(module)),
    _LLAMA + "LlamaMLP": _mlp,
    _LLAMA + "LlamaAttention": lambda module: _llama_attention_class(type(module)),
    "transformers.activations.NewGELUActivation": lambda module: _gelu_class(type(module)),
    "transformers.activations.GELUTanh": lambda module: _gelu_class(type(module)),
}
"""By full name of a type: the class that a module of it gets, or why it gets none."""


def causal_lm_loss(
    logits: Tensor, labels: Tensor | None, vocab_size: int,
    num_items_in_batch: Tensor | int | None = None, ignore_index: int = -100,
    shift_labels: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """``ForCausalLMLoss`` of ``transformers`` without its float32 copy of the logits."""
    target = _targets(labels, shift_labels, ignore_index, logits)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = cross_entropy(
        logits.reshape(-1, vocab_size), target, ignore_index=ignore_index, reduction=reduction
    )
    return _per_item(loss, num_items_in_batch)


def _targets(labels: Any, shift_labels: Tensor | None, ignore_index: int, like: Tensor) -> Tensor:
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1).to(like.device)


def _per_item(loss: Tensor, items: Tensor | int | None) -> Tensor:
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


def _own_head(model: Any) -> str | None:
    """Why the loss needs the logits that ``model`` makes: its head is more than a weight."""
    head = model.lm_head
    if type(head) is not nn.Linear:
        return f"its lm_head is a {type(head).__name__}"
    hooks = head._forward_hooks, head._forward_pre_hooks, head._backward_hooks
    if "forward" in vars(head) or any((*hooks, head._backward_pre_hooks)):
        return "its lm_head has hooks"
    return None


@functools.cache
def _fused_loss_class(original: type[nn.Module], output: type) -> type[nn.Module]:
    @functools.wraps(original.forward)  # trainers and generation ask for its arguments
    def forward(
        self, input_ids=None, *args, labels=None, shift_labels=None, logits_to_keep=0,
        num_items_in_batch=None, **kwargs,
    ):  # fmt: skip
        if (labels is None and shift_labels is None) or _own_head(self):
            given = {"labels": labels, "shift_labels": shift_labels}
            given["num_items_in_batch"] = num_items_in_batch
            kwargs |= {name: x for name, x in given.items() if x is not None}
            return original.forward(
                self, input_ids, *args, logits_to_keep=logits_to_keep, **kwargs
            )  # fmt: skip
        if args or logits_to_keep:
            raise ValueError("patch(fuse_loss=True): give labels by keyword, and all of them")
        kwargs["return_dict"] = True
        outputs = self.base_model(input_ids, **kwargs)
        hidden_ND = outputs.last_hidden_state.flatten(0, -2)
        loss = linear_cross_entropy(
            hidden_ND, self.lm_head.weight, _targets(labels, shift_labels, -100, hidden_ND),
            linear_bias=self.lm_head.bias,
            reduction="mean" if num_items_in_batch is None else "sum",
        )  # fmt: skip
        rest = {name: x for name, x in outputs.items() if name != "last_hidden_state"}
        return output(loss=_per_item(loss, num_items_in_batch), **rest)

    return subclass(original, forward)


_HEADS = {
    _GPT2 + "GPT2LMHeadModel": "CausalLMOutputWithCrossAttentions",
    _LLAMA + "LlamaForCausalLM": "CausalLMOutputWithPast",
}


def _attention_dropout(module: Any) -> float:
    return module.attn_dropout.p if hasattr(module, "attn_dropout") else module.attention_dropout


def _why_not(modules: list[Any]) -> str | None:
    """Why attention modules that share a configuration keep their implementation."""
    config = modules[0].config
    current = config._attn_implementation
    if current not in ("sdpa", "eager", None):
        return f"attn_implementation {current!r} was chosen"
    dropout = max(map(_attention_dropout, modules))
    if dropout:
        return f"dropout {dropout} on attention weights; set it to 0"
    if any(getattr(module, "reorder_and_upcast_attn", False) for module in modules):
        return "reorder_and_upcast_attn"
    return None


def settings(model: nn.Module, fuse_loss: bool) -> Iterator[tuple[str, Any, str | None, Any]]:
    """What else to set: (module, owner, attribute, value), or (module, None, None, why not)."""
    kinds = {_GPT2 + "GPT2Attention", _LLAMA + "LlamaAttention"}
    sharing: dict[int, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        original = getattr(type(module), "_fastgpt_original", type(module))
        full_name = f"{original.__module__}.{original.__qualname__}"
        if full_name in kinds:
            sharing.setdefault(id(module.config), []).append((name, module))
        elif full_name in _HEADS:
            yield from _head(name, module, original, full_name, fuse_loss)
    for named in sharing.values():
        name, first = named[0]
        if first.config._attn_implementation == NAME:
            continue
        why_not = _why_not([module for _, module in named])
        if why_not:
            yield name, None, None, why_not
        else:
            register_attention()
            yield name, first.config, "_attn_implementation", NAME


def _head(name: str, module: Any, original: type[nn.Module], full_name: str, fuse_loss: bool):
    loss = module.loss_function
    if loss is not causal_lm_loss:
        if getattr(loss, "__name__", "") != "ForCausalLMLoss":
            yield name, None, None, "its loss is not ForCausalLMLoss"
            return
        yield name, module, "_loss_function", causal_lm_loss
    if not fuse_loss or type(module) is not original:
        return
    if "forward" in vars(module):
        yield name, None, None, "its forward was replaced on the instance"
    elif why_not := _own_head(module):
        yield name, None, None, f"{why_not}, so the loss takes its logits"
    else:
        output = getattr(sys.modules[original.__module__], _HEADS[full_name])
        yield name, module, "__class__", _fused_loss_class(original, output)

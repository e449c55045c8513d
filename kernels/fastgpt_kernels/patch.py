"""Swap the kernels into a model that exists: ``patch(model)``, undone by ``unpatch``.

What is replaced is decided by the *type* of each module, from a table: ``torch.nn.LayerNorm``,
``RMSNorm``, ``GELU``, ``CrossEntropyLoss``, ``MultiheadAttention``; modules whose own ``forward``
calls ``scaled_dot_product_attention``; and the blocks of GPT-2 and LLaMA in ``transformers`` (see
``_transformers.py``). A module changes its class and nothing else: it, its parameters, buffers,
hooks and the names in ``state_dict`` are the same objects as before, so optimizers, checkpoints,
DDP and FSDP2 do not notice. A class made here has the name of the class it stands for, under which
pickle would find that one: save a ``state_dict``, or ``unpatch`` first.

Subclasses have a behaviour of their own and are left alone; ``Patched.skipped`` lists them with
what else could not be replaced, and why.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt_kernels import _transformers, modules
from fastgpt_kernels._common import cast_under_autocast
from fastgpt_kernels._transformers import register_attention
from fastgpt_kernels.attention import attention
from fastgpt_kernels.cross_entropy import cross_entropy

__all__ = ["Patched", "Replacement", "Skipped", "patch", "register_attention", "unpatch"]


@dataclass(frozen=True)
class Replacement:
    """One thing that ``patch`` set: ``setattr(owner, attribute, after)``."""

    name: str
    owner: Any
    attribute: str
    before: Any
    after: Any

    def __str__(self) -> str:
        if self.attribute == "__class__":
            kind = _full_name(self.before)
            return f"{self.name or '(model)'}: {kind}"
        return f"{self.name or '(model)'}: {self.attribute.strip('_')}, was {self.before!r}"


@dataclass(frozen=True)
class Skipped:
    """A module of a known kind that was left alone."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(model)'}: {self.reason}"


@dataclass(frozen=True)
class Patched:
    """What ``patch`` did, in order; ``print`` it, and give it to ``unpatch``."""

    replaced: tuple[Replacement, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}", *(f"  {x}" for x in self.replaced)]
        return "\n".join(
            [*lines, f"skipped {len(self.skipped)}", *(f"  {x}" for x in self.skipped)]
        )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _autocast(x: Tensor) -> Tensor:
    """Under autocast PyTorch's norms take and give float32 on a GPU; on a CPU they do not care."""
    return x.float() if x.is_cuda and torch.is_autocast_enabled("cuda") else x


class _LayerNorm(modules.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_autocast(input))


class _RMSNorm(modules.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_autocast(x))


_LayerNorm.__name__, _RMSNorm.__name__ = "LayerNorm", "RMSNorm"


class _CrossEntropyLoss(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.dim() != 2 or target.is_floating_point():
            return super().forward(input, target)
        return cross_entropy(
            input, target, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


def _loss(module: nn.CrossEntropyLoss) -> type[nn.Module] | str:
    return "class weights" if module.weight is not None else _CrossEntropyLoss


def _supported(q: Tensor) -> bool:
    return q.dtype in (torch.float32, torch.float16, torch.bfloat16) and q.shape[-1] <= 256


class _MultiheadAttention(nn.MultiheadAttention):
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Self-attention without weights, masks (but the causal one) and dropout is ours."""
        masked = key_padding_mask is not None or (attn_mask is not None and not is_causal)
        same = query is key and key is value and query.dim() == 3 and not query.is_nested
        dropout = self.training and self.dropout > 0
        if need_weights or masked or not same or dropout or self.head_dim > 256:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        x_BTC = query if self.batch_first else query.transpose(0, 1)
        projected = F.linear(x_BTC, self.in_proj_weight, self.in_proj_bias)
        if not _supported(projected):
            return super().forward(
                query, key, value, None, False, attn_mask, average_attn_weights, is_causal
            )
        heads = projected.unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        out_BTC = attention(q, k, v, causal=is_causal).transpose(1, 2).flatten(2)
        out_BTC = self.out_proj(out_BTC)
        return (out_BTC if self.batch_first else out_BTC.transpose(0, 1)), None


def _multihead(module: nn.MultiheadAttention) -> type[nn.Module] | str:
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "separate projections, bias_k or add_zero_attn"
    return _MultiheadAttention


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``F.scaled_dot_product_attention``, whose causal mask is that of ``attention`` if T == S."""
    query, key, value = cast_under_autocast(query, key, value)
    square = query.dim() == 4 and query.shape[-2] == key.shape[-2]
    plain = attn_mask is None and dropout_p == 0 and (square or (not is_causal and key.dim() == 4))
    alike = query.shape[:1] == key.shape[:1] and key.shape == value.shape
    if not (plain and alike and _supported(query)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return attention(query, key, value, causal=is_causal, scale=scale)


def _copied(module: types.ModuleType, **replaced: Any) -> types.ModuleType:
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update({**vars(module), **replaced})
    return copy


@functools.cache
def _with_our_attention() -> dict[Any, Any]:
    """PyTorch's attention, and the modules that lead to it, with ours in its place."""
    functional = _copied(F, scaled_dot_product_attention=_sdpa)
    neural = _copied(nn, functional=functional)
    return {
        F.scaled_dot_product_attention: _sdpa, F: functional, nn: neural,
        torch: _copied(torch, nn=neural),
    }  # fmt: skip


@functools.cache
def _sdpa_rule(original: type[nn.Module]) -> type[nn.Module] | str:
    """``original`` whose ``forward`` means ours where it says PyTorch's attention.

    The global names that lead there are rebound, for this copy of the method alone: a mode that
    sees every call would break what ``torch.compile`` traces. Calls with a mask or dropout, or
    causal ones with T != S, stay with PyTorch.
    """
    forward = original.forward
    names = _transformers.names_in(forward.__code__)
    ours = _with_our_attention()
    values = {name: forward.__globals__.get(name) for name in names}
    direct = (F, F.scaled_dot_product_attention, *((nn, torch) if "functional" in names else ()))
    rebound = {name: ours[value] for name, value in values.items() if value in direct}
    ours_alike = _transformers.rebind(forward, rebound)
    if ours_alike is None:
        return "calls PyTorch's attention by other than a global name"
    return _transformers.subclass(original, ours_alike)


def _calls_sdpa(kind: type[nn.Module]) -> bool:
    code = getattr(kind.forward, "__code__", None)
    library = kind.__module__.startswith(("torch.", "transformers.", "fastgpt_kernels."))
    if code is None or library:
        return False
    return "scaled_dot_product_attention" in _transformers.names_in(code)


Rule = Callable[[Any], type[nn.Module] | str]
"""The class that a module of some type gets, or why it gets none."""

_RULES: dict[str, Rule] = {
    _full_name(nn.LayerNorm): lambda module: _LayerNorm,
    _full_name(nn.RMSNorm): lambda module: _RMSNorm,
    _full_name(nn.GELU): lambda module: modules.GELU,
    _full_name(nn.CrossEntropyLoss): _loss,
    _full_name(nn.MultiheadAttention): _multihead,
    **_transformers.RULES,
}


def _replacement(module: nn.Module) -> type[nn.Module] | str | None:
    """What ``module`` becomes, why it does not, or None if it is of no known kind."""
    kind = type(module)
    if hasattr(kind, "_fastgpt_original") or kind.__module__.startswith("fastgpt_kernels."):
        return None
    rule = _RULES.get(_full_name(kind))
    if rule is None and _calls_sdpa(kind):
        rule = lambda module: _sdpa_rule(type(module))  # noqa: E731
    if rule is None:
        base = next((b for b in kind.__mro__[1:] if _full_name(b) in _RULES), None)
        return base and f"{kind.__qualname__} is a subclass of {_full_name(base)}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return rule(module)


def _plan(model: nn.Module, fuse_loss: bool) -> Iterator[Replacement | Skipped]:
    for name, module in model.named_modules():
        found = _replacement(module)
        if isinstance(found, str):
            yield Skipped(name, found)
        elif found is not None:
            yield Replacement(name, module, "__class__", type(module), found)
    for name, owner, attribute, after in _transformers.settings(model, fuse_loss):
        if attribute is None:
            yield Skipped(name, after)
        elif attribute == "__class__":
            yield Replacement(name, owner, attribute, type(owner), after)
        else:
            before = getattr(owner, attribute, None)
            yield Replacement(name, owner, attribute, before, after)


def patch(model: nn.Module, *, fuse_loss: bool = False) -> Patched:
    """Let the modules of ``model``, itself included, compute with the kernels of this package.

    Before DDP, ``fully_shard``, ``torch.compile`` or after, but after ``fully_shard`` has changed
    the class of a module that one counts as a subclass; so patch first. Outputs and gradients are
    those of the model as it was, up to rounding; on a GPU float64, which the kernels do not take,
    raises when it is called. Dropout on attention weights, which the kernels lack, keeps an
    attention module of ``transformers`` as it is.

    Args:
        model: any module; those of GPT-2 and LLaMA in ``transformers`` (tested with 5.24) are
            recognised, and get ``config._attn_implementation = "fastgpt"``, which another model
            that was built from the same configuration object sees as well.
        fuse_loss: let ``GPT2LMHeadModel`` and ``LlamaForCausalLM`` compute the loss by
            ``linear_cross_entropy`` when labels are given: then ``.logits`` is None, since they
            never exist. Without it, or if the head is more than a weight and a bias (an adapter,
            hooks), only the loss is ours and ``.logits`` are as ever.

    Returns:
        What was replaced and what was not, in order. A second call replaces nothing more.
    """
    found = tuple(_plan(model, fuse_loss))
    replaced = tuple(x for x in found if isinstance(x, Replacement))
    for item in replaced:
        setattr(item.owner, item.attribute, item.after)
    return Patched(replaced, tuple(x for x in found if isinstance(x, Skipped)))


def unpatch(patched: Patched) -> None:
    """Put back what ``patch`` replaced.

    Raises:
        ValueError: something changed what was patched (``fully_shard`` changes classes, so does a
            second ``unpatch``); then nothing is put back.
    """
    for item in patched.replaced:
        if getattr(item.owner, item.attribute, None) is not item.after:
            raise ValueError(
                f"unpatch: {item.attribute} of {item.name or 'the model'} is not what patch set; "
                "undo in the reverse order of what was done to the model, and only once"
            )
    for item in reversed(patched.replaced):
        if item.before is None and item.attribute in getattr(item.owner, "__dict__", {}):
            delattr(item.owner, item.attribute)
        else:
            setattr(item.owner, item.attribute, item.before)

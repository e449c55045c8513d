"""Compiled transformer blocks whose code depends neither on the order of calls nor on their number.

The compiler makes one version of a function for the first sizes it meets, another for the next, and
after eight of all kinds it gives up. A resumed run meets other sizes first, so its sums would be
rounded otherwise; and a policy, a reference and a reward model, with gradients and without, need
more than eight. Here each kind of call has a code object, thus a count, of its own, and
where sizes vary the first call of each kind is with zeros of a size that is always the same.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.model import Block, Context

ROWS, WIDTH, PLACES, FEW = 16, 128, 512, 32
"""What code for varying sizes is made with: sequences, their tokens, chosen places, few of them."""


def compile_blocks(model: nn.Module, *, varying: bool) -> None:
    """Have the blocks of ``model`` compiled at their first calls.

    ``varying``: batches differ in their rows and widths. Otherwise code is made for each size.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.run = functools.partial(_run, module, varying)


def _run(block: Block, varying: bool, x_BTC: Tensor, context: Context) -> Tensor:
    if context.cache is not None:  # every length would be compiled anew
        return block.compute(x_BTC, context)
    places_N = context.places_N
    kind = (
        *(block.attn.window, block.training, next(block.parameters()).requires_grad),
        *(torch.is_grad_enabled(), x_BTC.requires_grad, x_BTC.dtype, *x_BTC.shape[2:]),
        *(context.few, context.rotary is None, context.doc_start_BT is None, varying),
        # The compiler makes code of their own for sizes 0 and 1.
        *(min(n, 2) for n in x_BTC.shape[:2]),
        None if places_N is None else min(len(places_N), 2),
    )
    compute, is_new = _compiled(kind)
    if is_new and varying:
        compute(*_example(block, x_BTC, context))
    return compute(block, x_BTC, context)


_made: dict[tuple[Any, ...], Callable[[Block, Tensor, Context], Tensor]] = {}


def _compiled(kind: tuple[Any, ...]) -> tuple[Callable[[Block, Tensor, Context], Tensor], bool]:
    """`Block.compute` of this kind, and whether it is new."""
    is_new = kind not in _made
    if is_new:
        compute = Block.compute
        own = types.FunctionType(compute.__code__.replace(), compute.__globals__, compute.__name__)
        _made[kind] = torch.compile(own)
    return _made[kind], is_new


def _example(block: Block, x_BTC: Tensor, context: Context) -> tuple[Block, Tensor, Context]:
    """Arguments of the same kind, zeros of the fixed size."""
    angles, doc_start_BT, places_N = context.rotary, context.doc_start_BT, context.places_N
    if angles is not None:
        sizes = (ROWS, 1, WIDTH) if angles[0].dim() == 4 else (WIDTH,)
        angles = _zeros(angles[0], sizes), _zeros(angles[1], sizes)
    if doc_start_BT is not None:
        doc_start_BT = _zeros(doc_start_BT, (ROWS, WIDTH))
    if places_N is not None:
        places_N = _zeros(places_N, (FEW if context.few else PLACES,))
    x = _zeros(x_BTC, (ROWS, WIDTH)).requires_grad_(x_BTC.requires_grad)
    return block, x, replace(context, rotary=angles, doc_start_BT=doc_start_BT, places_N=places_N)


def _zeros(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zeros like ``x`` with other first sizes, where those of x are more than 1, as symbols."""
    own = [size if n > 1 else n for n, size in zip(x.shape, sizes, strict=False)]
    zeros = x.new_zeros((*own, *x.shape[len(own) :]))
    varied = [dim for dim, n in enumerate(own) if n > 1]
    torch._dynamo.maybe_mark_dynamic(zeros, varied)
    return zeros

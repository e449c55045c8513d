"""Sampling answers to prompts, and scoring them with the models of a reinforcement run.

Sampling pads prompts on the left, to continue all rows at one place. Everything else runs on rows
``[prompt, response, padding]`` from position 0, where causal attention needs no mask and what
stands in the padding reaches nothing.

Shape suffixes: B responses, T positions of a row, R places of a response, N tokens of responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt.decoder import Decoder, draw
from fastgpt.distributed import World
from fastgpt.errors import UsageError
from fastgpt.model import GPT
from fastgpt.rl import formulas
from fastgpt_kernels import linear_log_probs

SAMPLE_BATCH = 128
"""Responses sampled at once: keys and values of more would outgrow the caches of a CPU."""
ROW_MULTIPLE = 32
"""Rows are padded to a multiple, so that compiled blocks see few lengths."""


@torch.no_grad()
def sample_responses(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    uniforms_BR: Tensor,
    *,
    temperature: float,
    end_id: int,
    pad_id: int,
) -> Tensor:
    """Sample a response to each prompt from the full distribution, at the compute dtype.

    There is no top-k or top-p: scores are of the full softmax, and a ratio of probabilities would
    be off by the mass that was cut away.

    Args:
        model: the policy; its weights are cast once.
        prompts: ids of each.
        uniforms_BR: float64 in [0, 1), a number for each token that may come. A row depends on its
            own alone, up to rounding: not on its neighbours, nor on when they end.
        temperature: logits are divided by it, above 0.
        end_id: ends a response, and is its last token.
        pad_id: stands behind it.

    Returns:
        int64 (B, R) on the CPU.

    Raises:
        UsageError: ``pad_id`` is ``end_id``, so that an end could not be told from padding.
    """
    if pad_id == end_id:
        raise UsageError(f"the padding id {pad_id} is the end-of-sequence id; give another")
    n_new = uniforms_BR.shape[1]
    ids_BR = torch.full(uniforms_BR.shape, pad_id, dtype=torch.int64)
    decoder = Decoder(model)
    # Rows of like length share a batch and its padding.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for first in range(0, len(order), SAMPLE_BATCH):
        rows = torch.tensor(order[first : first + SAMPLE_BATCH])
        logits_BV = decoder.start([prompts[row] for row in rows.tolist()], n_new)
        going_B = torch.ones(len(rows), dtype=torch.bool, device=logits_BV.device)
        for place in range(n_new):
            uniforms_B = uniforms_BR[rows, place].to(logits_BV.device)
            scaled_BV = logits_BV if temperature == 1 else logits_BV / temperature
            tokens_B = draw(scaled_BV.softmax(-1), uniforms_B)
            ids_BR[rows, place] = tokens_B.cpu()
            going_B &= tokens_B != end_id
            going = torch.nonzero(going_B)[:, 0]
            if len(going) == 0 or place + 1 == n_new:
                break
            if 2 * len(going) <= len(rows):  # what has ended costs nothing more
                decoder.keep(going)
                rows, tokens_B, going_B = rows[going.cpu()], tokens_B[going], going_B[going]
            logits_BV = decoder.step(tokens_B)
    ids_BR[~formulas.response_mask(ids_BR, end_id)] = pad_id
    return ids_BR


@dataclass(frozen=True)
class Rows:
    """Prompts with their responses.

    ``mask_BR`` is true for the tokens of a response, its end included; ``tokens_BT`` is padded on
    the right to a multiple of 32, or to the context if that is less.
    """

    tokens_BT: Tensor
    prompt_lengths_B: Tensor
    ids_BR: Tensor
    mask_BR: Tensor

    @classmethod
    def join(
        cls,
        prompts: Sequence[Sequence[int]],
        ids_BR: Tensor,
        *,
        end_id: int,
        pad_id: int,
        context: int,
    ) -> Rows:
        """Rows on the CPU from prompts and what `sample_responses` returned for them."""
        mask_BR = formulas.response_mask(ids_BR, end_id)
        lengths = mask_BR.sum(1).tolist()
        longest = max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
        width = min(-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE, max(context, longest))
        tokens_BT = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
        for row_T, prompt, ids_R, n in zip(tokens_BT, prompts, ids_BR, lengths, strict=True):
            row_T[: len(prompt)] = torch.tensor(prompt)
            row_T[len(prompt) : len(prompt) + n] = ids_R[:n]
        return cls(tokens_BT, torch.tensor([len(p) for p in prompts]), ids_BR, mask_BR)

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        return Rows(
            self.tokens_BT[rows],
            self.prompt_lengths_B[rows],
            self.ids_BR[rows],
            self.mask_BR[rows],
        )

    @property
    def last_B(self) -> Tensor:
        """Index in the row of the last token of each response."""
        return self.prompt_lengths_B + self.mask_BR.sum(1) - 1

    @property
    def places_N(self) -> Tensor:
        """Where, in the flattened (B, T), the model says each response token: one before it."""
        B, R = self.mask_BR.shape
        T = self.tokens_BT.shape[1]
        starts_B = torch.arange(B) * T + self.prompt_lengths_B - 1
        return (starts_B[:, None] + torch.arange(R))[self.mask_BR]

    @property
    def targets_N(self) -> Tensor:
        """The response tokens."""
        return self.ids_BR[self.mask_BR]

    def ended_B(self, end_id: int) -> Tensor:
        """Bool (B): whether the response has an end."""
        last = formulas.last_places(self.mask_BR)
        return self.ids_BR[torch.arange(len(last)), last] == end_id


def token_log_probs(
    model: GPT, tokens_BT: Tensor, places_N: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token and entropy where it is said, float32 (N).

    The head sees the N places alone. Sampling and every scoring divide by one temperature.
    """
    return linear_log_probs(
        model(tokens_BT, places=places_N),
        model.head_weight,
        targets_N,
        temperature=temperature,
        softcap=model.config.logit_softcap,
    )


Score = Callable[[Tensor, Rows], Tensor]
"""(tokens_BT on the device, the same rows) -> a value for each token (N) or each row (B)."""


@torch.no_grad()
def score_rows(
    rows: Rows, score: Score, world: World, micro: int, *, by_token: bool = True
) -> Tensor:
    """``score`` of all rows, computed in parts by the processes, the same on all of them.

    Args:
        rows: the same on all processes, their number a multiple of the processes.
        score: see `Score`.
        world: each process does a contiguous part.
        micro: rows at a time.
        by_token: whether ``score`` gives tokens or rows.

    Returns:
        float32 on the CPU: (B, R) with 0 outside the mask, or (B).
    """
    part = len(rows.mask_BR) // world.size
    shape = rows.mask_BR.shape if by_token else rows.mask_BR.shape[:1]
    mine = torch.zeros(part, *shape[1:])
    for first in range(0, part, micro):
        begin = world.rank * part + first
        some = rows[begin : min(begin + micro, (world.rank + 1) * part)]
        values = score(some.tokens_BT.to(world.device), some).float().cpu()
        if by_token:
            mine[first : first + micro][some.mask_BR] = values
        else:
            mine[first : first + micro] = values
    return gather_rows(mine, world)


def gather_rows(mine: Tensor, world: World) -> Tensor:
    """The rows of all processes, in their order, from equally many of each; CPU tensors."""
    if world.size == 1:
        return mine
    parts = [torch.empty_like(mine, device=world.device) for _ in range(world.size)]
    dist.all_gather(parts, mine.to(world.device))
    return torch.cat(parts).cpu()

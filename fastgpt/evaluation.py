"""Validation loss in nats per token, and in bits per byte, which compares across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from fastgpt.data.batches import IGNORE_INDEX, bytes_of
from fastgpt.distributed import World
from fastgpt.errors import DataError
from fastgpt.model import GPT
from fastgpt.trainer import Batch, LossFn, to_device


@torch.no_grad()
def evaluate_loss(
    model: GPT,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    bytes_per_id: np.ndarray,
    world: World,
) -> dict[str, float]:
    """Loss over all targets of ``batches`` (this process's share).

    Returns:
        ``val_loss`` in nats per token and ``val_bpb`` in bits per byte of UTF-8 text.

    Raises:
        DataError: no process has a target.
    """
    loss, tokens, text_bytes = torch.zeros((), dtype=torch.float64, device=world.device), 0, 0
    for batch in batches:
        targets = batch["targets_BT"]
        count = int((targets != IGNORE_INDEX).sum())
        if count:
            loss += loss_fn(model, to_device(batch, world.device))
        tokens += count
        text_bytes += bytes_of(targets, bytes_per_id)
    total, tokens, text_bytes = world.sum([loss.item(), tokens, text_bytes])
    if tokens == 0:
        raise DataError("the validation data has no target to predict; raise --val-fraction")
    return {"val_loss": total / tokens, "val_bpb": total / math.log(2) / max(1, text_bytes)}

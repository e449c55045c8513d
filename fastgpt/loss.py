"""The loss of a language model."""

from __future__ import annotations

from torch import Tensor

from fastgpt.model import GPT
from fastgpt.trainer import Batch
from fastgpt_kernels import linear_cross_entropy


def next_token_loss(model: GPT, batch: Batch) -> Tensor:
    """Summed cross-entropy of the next token."""
    hidden_BTC = model(batch["inputs_BT"], doc_start=batch.get("doc_start_BT"))
    return linear_cross_entropy(
        hidden_BTC.flatten(0, 1),
        model.head_weight,
        batch["targets_BT"].flatten(),
        reduction="sum",
        softcap=model.config.logit_softcap,
    )

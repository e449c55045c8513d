"""Losses over batches of any split, in nats per token and in bits per byte."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastgpt.distributed import World
from fastgpt.errors import DataError
from fastgpt.evaluation import evaluate_loss

ALONE = World(0, 1, torch.device("cpu"))
BYTES = np.array([1, 3, 2, 0])


def batch(*rows):
    targets = torch.tensor(rows)
    return {"inputs_BT": torch.zeros_like(targets), "targets_BT": targets}


def loss_of_id(_model, micro):
    """Every target i costs i + 1 nats."""
    targets = micro["targets_BT"]
    return (targets[targets >= 0] + 1).sum().float()


def evaluate(batches, loss=loss_of_id):
    return evaluate_loss(None, batches, loss, BYTES, ALONE)


def test_means_over_tokens_and_bytes_not_over_batches():
    values = evaluate([batch([0, 1, 2]), batch([1, -100, -100])])
    assert values["val_loss"] == pytest.approx((1 + 2 + 3 + 2) / 4)
    assert values["val_bpb"] == pytest.approx((1 + 2 + 3 + 2) / math.log(2) / (1 + 3 + 2 + 3))


def test_a_filler_batch_is_not_run():
    def loss(model, micro):
        assert (micro["targets_BT"] >= 0).any()
        return loss_of_id(model, micro)

    assert evaluate([batch([0, 0]), batch([-100, -100])], loss)["val_loss"] == 1.0


def test_many_small_losses_lose_no_digits():
    def loss(_model, _micro):
        return torch.tensor(0.1)

    values = evaluate((batch([0]) for _ in range(20000)), loss)
    assert values["val_loss"] == pytest.approx(torch.tensor(0.1).item(), rel=1e-6)


def test_nothing_to_evaluate_is_said():
    with pytest.raises(DataError, match="validation"):
        evaluate([batch([-100, -100])])


def test_no_gradients():
    def loss(model, micro):
        assert not torch.is_grad_enabled()
        return loss_of_id(model, micro)

    evaluate([batch([0])], loss)

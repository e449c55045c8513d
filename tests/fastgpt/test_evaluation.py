"""Losses over batches of any split, in nats per token and in bits per byte."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgpt import cli
from fastgpt.config import DataConfig, ModelConfig, PretrainConfig
from fastgpt.distributed import World
from fastgpt.errors import DataError
from fastgpt.evaluate import bits_per_byte, masks_documents
from fastgpt.evaluation import evaluate_loss
from fastgpt.model import GPT
from fastgpt.rundir import RunDir
from fastgpt.tokenizer import Tokenizer

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


@pytest.mark.parametrize("masked", [True, False])
def test_texts_are_measured_as_the_run_measured_its_own(masked, tmp_path, uncompiled):
    """Attention of a run that masks documents ends where they do, also of what is made of it."""
    tokenizer = Tokenizer.train(["the cat sat on the mat"], 270)
    base, chats = RunDir.create(tmp_path / "base"), RunDir.create(tmp_path / "chats")
    data = DataConfig(mask_documents=masked)
    base.config_path.write_text(cli.to_toml(cli.to_tree(PretrainConfig(data=data))))
    chats.config_path.write_text(f'init = "{base.path}"\ndata = ["chats.jsonl"]\n')
    assert masks_documents(base.path) == masks_documents(chats.path) == masked
    assert not masks_documents(tmp_path / "nowhere")
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=tokenizer.vocab_size, context=8)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    texts = ["the cat", "sat", "on the mat"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = bits_per_byte(model, tokenizer, [tmp_path / "t.jsonl"], masked=masked)
    ids = [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts]
    stream = list(itertools.chain(*ids))
    rows = ids if masked else [stream[i : i + 9] for i in range(0, len(stream), 8)]
    total = count = 0
    with torch.no_grad():
        for row in (torch.tensor(row) for row in rows if len(row) > 1):
            logits = model.logits(model(row[None, :-1]))[0]
            total += float(F.cross_entropy(logits, row[1:], reduction="sum"))
            count += len(row) - 1
    assert found["val_loss"] == pytest.approx(total / count, rel=1e-4)

"""Answers printed at the end of a stage."""

from __future__ import annotations

import pytest
import torch

from fastgpt.answers import print_answers
from fastgpt.chat import with_chat_tokens
from fastgpt.config import ModelConfig
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.parametrize(("row", "text"), [(ord("x"), "x"), (1000, ""), (None, "")])
def test_answers_are_printed_and_returned(row, text, capsys):
    """A model that says one id for ever: a letter, a row without a token, or the end at once."""
    tokenizer = with_chat_tokens(Tokenizer.train(["x"], 257))
    byte = {ord("x"): tokenizer.encode("x")[0], None: tokenizer.special_tokens["<|end|>"]}
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=1024, context=16, tied=False)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.wte.weight.fill_(1.0)
        model.wte.weight[:, 0] = 2.0  # not constant, whatever the norm
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
        model.head_weight[byte.get(row, row), 0] = 1.0
    assert print_answers(model, tokenizer, [], 3) == []
    found = print_answers(model, tokenizer, [("why?", [5, 6])], 3)
    assert found == [{"prompt": "why?", "text": 3 * text}]
    assert capsys.readouterr().out == f"\n> why?|{3 * text}\n"

"""Compiled blocks: the code of a kind of call is made once, with sizes that no batch decides."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from fastgpt import compiled
from fastgpt.compiled import ROWS, WIDTH, compile_blocks
from fastgpt.config import ModelConfig
from fastgpt.model import GPT

pytestmark = pytest.mark.usefixtures("uncompiled", "seeded")


@pytest.fixture
def made(monkeypatch) -> list[tuple[int, ...]]:
    """The sizes of (B, T, C) that each piece of code was made with; the compiler is replaced."""
    sizes: list[tuple[int, ...]] = []

    def backend(graph, inputs):
        (width,) = [x for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 3][:1]
        sizes.append(tuple(int(n) for n in width.shape))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(compiled, "_made", {})
    yield sizes
    torch._dynamo.reset()


def make(**shape) -> tuple[GPT, GPT]:
    """A model with compiled blocks, and its equal without."""
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 32, "context": 256}
    plain = GPT(ModelConfig(**{**sizes, **shape}))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = copy.deepcopy(plain)
    compile_blocks(model, varying=True)
    return model, plain


def loss_of(model: GPT, tokens_BT, places) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(tokens_BT, places=places).square().sum()
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


SIZES = [(3, 24), (5, 17), (2, 40), (7, 96), (3, 24), (9, 9)]


def test_no_size_needs_new_code(made):
    model, plain = make()
    counts = []
    for B, T in SIZES:
        tokens_BT = torch.randint(32, (B, T))
        for places in (None, torch.arange(2 * T - 1) % (B * T), torch.arange(T // 2) * B):
            expected = loss_of(plain, tokens_BT, places)
            torch.testing.assert_close(loss_of(model, tokens_BT, places), expected)
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()
        counts.append(len(made))
    # All rows, chosen ones, and few of them; the first layer's input has the same kind.
    assert counts == [3] * len(SIZES)
    assert set(made) == {(ROWS, WIDTH, 16)}


def test_single_rows_and_places_have_code_of_their_own(made):
    model, plain = make()
    for B, T, N in [(1, 12, 4), (1, 30, 5), (4, 1, 2), (4, 12, 1), (3, 12, 1)]:
        tokens_BT, places = torch.randint(32, (B, T)), torch.arange(N)
        expected = loss_of(plain, tokens_BT, places)
        torch.testing.assert_close(loss_of(model, tokens_BT, places), expected)
    assert {(1, WIDTH, 16), (ROWS, 1, 16), (ROWS, WIDTH, 16)} == set(made)


def test_models_that_learn_and_models_that_score_do_not_use_up_each_others_count(made):
    """A function is compiled eight times at most; what is left of its calls runs eagerly."""
    learning, plain = make()
    scoring = copy.deepcopy(plain).requires_grad_(False).eval()
    compile_blocks(scoring, varying=True)
    for T in (10, 20, 30):
        tokens_BT = torch.randint(32, (4, T))
        for places in (None, torch.arange(T + 3), torch.arange(3)):
            expected = loss_of(plain, tokens_BT, places)
            torch.testing.assert_close(loss_of(learning, tokens_BT, places), expected)
            for model in (learning, scoring):
                with torch.no_grad():
                    torch.testing.assert_close(loss_of(model, tokens_BT, places), expected)
    assert len(made) == 9


def test_documents_and_windows_vary_too(made):
    model, plain = make(window=7)
    for B, T in SIZES:
        tokens_BT = torch.randint(32, (B, T))
        starts_BT = (torch.arange(T) // 5 * 5).expand(B, T).to(torch.int32).contiguous()
        positions_BT = torch.arange(T) - starts_BT
        ours = model(tokens_BT, positions=positions_BT, doc_start=starts_BT)
        expected = plain(tokens_BT, positions=positions_BT, doc_start=starts_BT)
        torch.testing.assert_close(ours, expected)
    assert len(made) == 2

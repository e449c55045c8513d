"""Which optimizer takes which parameter, AdamW against float64, state that goes on bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastgpt.config import ModelConfig, OptimConfig
from fastgpt.errors import DataError
from fastgpt.model import GPT
from fastgpt.optim import Optimizers, clip_gradients

pytestmark = pytest.mark.usefixtures("seeded")

CONFIG = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, vocab_size=19, context=8, norm="layer_norm",
    mlp="swiglu", position="learned", bias=True, tied=False, qk_norm=True, embed_norm=True,
)  # fmt: skip
HIDDEN = {"attn.qkv.weight", "attn.proj.weight", "mlp.up.weight", "mlp.gate.weight"}
HIDDEN |= {"mlp.down.weight"}


def with_gradients(seed: int = 1) -> GPT:
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    new_gradients(model, seed)
    return model


def new_gradients(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def moved(model: GPT, optimizers: Optimizers, multiplier: float = 1.0) -> dict[str, torch.Tensor]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers.step(multiplier)
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = with_gradients()
    optimizers = Optimizers(model, OptimConfig())
    optimizers.step(1.0)
    moments: dict[str, set[str]] = {}
    for key in optimizers.state_tensors():
        name, _, moment = key.rpartition("/")
        moments.setdefault(name, set()).add(moment)
    assert set(moments) == {name for name, _ in model.named_parameters()}
    for name, found in moments.items():
        hidden = name.removeprefix("blocks.")[2:] in HIDDEN and name.startswith("blocks.")
        assert found == ({"momentum_buffer"} if hidden else {"step", "exp_avg", "exp_avg_sq"}), name
    assert sum("momentum_buffer" in found for found in moments.values()) == 2 * len(HIDDEN)


def test_muon_moves_matrices_by_the_size_of_an_adamw_step():
    """RMS-matched (arXiv:2502.16982): orthogonal updates scaled to an RMS of 0.2 of the rate."""
    model = with_gradients()
    updates = moved(model, Optimizers(model, OptimConfig(muon_lr=0.02, weight_decay=0.0)))
    for i in range(2):
        for name in HIDDEN:
            update = updates[f"blocks.{i}.{name}"]
            rms = update.square().mean().sqrt().item()
            # A matrix with equal singular values has the RMS of 1 / sqrt(longer side).
            assert rms == pytest.approx(0.2 * 0.02, rel=0.25), name
            values = torch.linalg.svdvals(update)
            assert values[0] < 2 * values[-1], name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer):
    model = GPT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    config = OptimConfig(optimizer=optimizer, lr=0.01, muon_lr=0.02, weight_decay=0.5)
    for name, update in moved(model, Optimizers(model, config)).items():
        hidden = name.startswith("blocks.") and update.dim() == 2 and optimizer == "muon"
        expected = 0.0 if update.dim() == 1 else -0.5 * (0.02 if hidden else 0.01)
        torch.testing.assert_close(update, torch.full_like(update, expected), msg=name)


def adamw64(weight, gradients, rates, *, betas, eps, decay):
    """Loshchilov & Hutter (arXiv:1711.05101), algorithm 2."""
    first = second = torch.zeros_like(weight)
    for t, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        step = first / (1 - betas[0] ** t) / ((second / (1 - betas[1] ** t)).sqrt() + eps)
        weight = weight - lr * decay * weight - lr * step
    return weight


def test_adamw_is_the_papers_in_float64():
    model = with_gradients()
    config = OptimConfig(optimizer="adamw", lr=0.02, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    optimizers = Optimizers(model, config)
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in start}
    factors = [0.25, 1.0, 0.5, 0.125]
    for i, factor in enumerate(factors):
        new_gradients(model, seed=10 + i)
        for name, parameter in model.named_parameters():
            gradients[name].append(parameter.grad.double())
        optimizers.step(factor)
    for name, parameter in model.named_parameters():
        expected = adamw64(
            start[name], gradients[name], [0.02 * factor for factor in factors],
            betas=(0.8, 0.9), eps=1e-3, decay=0.3 if parameter.dim() == 2 else 0.0,
        )  # fmt: skip
        torch.testing.assert_close(parameter.double(), expected, atol=1e-6, rtol=1e-5, msg=name)


def test_the_multiplier_scales_both_peaks():
    one, half = with_gradients(), with_gradients()
    config = OptimConfig(weight_decay=0.0)
    optimizers = Optimizers(half, config)
    whole = moved(one, Optimizers(one, config))
    for name, update in moved(half, optimizers, 0.5).items():
        torch.testing.assert_close(update, whole[name] / 2, atol=1e-7, rtol=1e-3, msg=name)
    new_gradients(half, seed=3)
    assert not any(update.any() for update in moved(half, optimizers, 0.0).values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_goes_on_bit_for_bit(optimizer):
    config = OptimConfig(optimizer=optimizer)
    model = with_gradients()
    optimizers = Optimizers(model, config)
    for i in range(3):
        new_gradients(model, seed=20 + i)
        optimizers.step(0.3 * (i + 1))
    saved = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    copy = GPT(CONFIG)
    copy.load_state_dict(model.state_dict())
    resumed = Optimizers(copy, config)
    resumed.load_state_tensors(saved)
    for i in range(3):
        for m, o in ((model, optimizers), (copy, resumed)):
            new_gradients(m, seed=30 + i)
            o.step(0.5)
    for (name, a), b in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b), name
    after = resumed.state_tensors()
    for name, tensor in optimizers.state_tensors().items():
        assert torch.equal(tensor, after[name]), name


def test_a_state_before_the_first_update_is_empty_and_loads():
    optimizers = Optimizers(GPT(CONFIG), OptimConfig())
    assert optimizers.state_tensors() == {}
    optimizers.load_state_tensors({})


def test_the_state_of_another_optimizer_is_refused():
    model = with_gradients()
    adamw = Optimizers(model, OptimConfig(optimizer="adamw"))
    adamw.step(1.0)
    muon = Optimizers(model, OptimConfig(optimizer="muon"))
    with pytest.raises(DataError, match=r"blocks\.0\.attn\.proj\.weight/exp_avg; .*--optimizer"):
        muon.load_state_tensors(adamw.state_tensors())
    partial = adamw.state_tensors()
    del partial["wte.weight/step"]
    with pytest.raises(DataError, match=r"wte\.weight/step"):
        adamw.load_state_tensors(partial)


def test_the_state_of_another_shape_is_refused():
    model = with_gradients()
    optimizers = Optimizers(model, OptimConfig())
    optimizers.step(1.0)
    other = Optimizers(GPT(dataclasses.replace(CONFIG, vocab_size=20)), OptimConfig())
    with pytest.raises(DataError, match=r"head\.weight/exp_avg"):
        other.load_state_tensors(optimizers.state_tensors())


def test_zero_grad():
    model = with_gradients()
    Optimizers(model, OptimConfig()).zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_clipping_multiplies_only_what_is_too_long(monkeypatch):
    """Bit for bit what a product with min(1, limit / norm) gives, also close to the limit."""
    model = with_gradients()

    def shrunken() -> list[torch.Tensor]:
        new_gradients(model, 1)  # so small that the 1e-6 in the quotient shows
        for parameter in model.parameters():
            parameter.grad *= 1e-3
        return [p.grad.clone() for p in model.parameters()]

    shrunken()
    norm = clip_gradients(model, 0.0)
    multiplied = []
    scale = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grads_with_norm_", lambda *a: (multiplied.append(1), scale(*a))
    )
    step = torch.finfo(torch.float32).eps * norm
    for limit in (norm - step, norm, norm + step, norm + 1e-6, norm + 8 * step, 2 * norm):
        expected = shrunken()
        torch._foreach_mul_(expected, torch.clamp(limit.item() / (norm + 1e-6), max=1.0))
        multiplied.clear()
        assert clip_gradients(model, limit.item()) == norm
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)
        assert bool(multiplied) == (limit < norm + 1e-6)


@pytest.mark.parametrize(("limit", "kept"), [(1.0, False), (0.0, True), (1e9, True)])
def test_clipping(limit, kept):
    model = with_gradients()
    before = [p.grad.clone() for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in before]).double().norm().item()
    assert clip_gradients(model, limit).item() == pytest.approx(norm, rel=1e-5)
    for old, parameter in zip(before, model.parameters(), strict=True):
        expected = old if kept else old * (limit / norm)
        torch.testing.assert_close(parameter.grad, expected, atol=0, rtol=0 if kept else 1e-4)

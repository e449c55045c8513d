"""AdamW for embeddings, gains and biases; Muon for the hidden matrices when asked.

Both are PyTorch's own. Here is which parameter goes where, one learning-rate multiplier over both,
and a flat dictionary of tensors as their state, so that a checkpoint needs no pickle.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastgpt.config import OptimConfig
from fastgpt.errors import DataError

_MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


class Optimizers:
    """The optimizers of one model, stepped together."""

    def __init__(self, model: nn.Module, config: OptimConfig):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {n for n, p in named.items() if p.dim() == 2 and ".blocks." in f".{n}"}
        muon = hidden if config.optimizer == "muon" else set[str]()
        rest = {name: p for name, p in named.items() if name not in muon}
        self._names: dict[Tensor, str] = {p: name for name, p in named.items()}
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [
                    {"params": [p for p in rest.values() if p.dim() >= 2]},
                    {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
                ],
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=True,
            )
        ]
        if muon:
            self._optimizers.append(
                torch.optim.Muon(
                    [named[name] for name in sorted(muon)],
                    lr=config.muon_lr,
                    momentum=config.muon_momentum,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self._groups = [(group, group["lr"]) for o in self._optimizers for group in o.param_groups]

    def step(self, lr_multiplier: float) -> None:
        """Update the parameters with the peak learning rates times ``lr_multiplier``."""
        for group, peak in self._groups:
            group["lr"] = peak * lr_multiplier
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as ``"<parameter>/<moment>"`` -> tensor."""
        return {
            f"{self._names[p]}/{key}": torch.as_tensor(value)
            for optimizer in self._optimizers
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` returned. Raises DataError for another's state."""
        parameters = {name: p for p, name in self._names.items()}
        owners = {
            p: o for o in self._optimizers for group in o.param_groups for p in group["params"]
        }
        expected = {
            f"{self._names[p]}/{moment}": torch.Size() if moment == "step" else p.shape
            for p, optimizer in owners.items()
            for moment in _MOMENTS[type(optimizer)]
        }
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found and found != expected:  # empty before the first update
            name = min(name for name, _ in found.items() ^ expected.items())
            raise DataError(
                f"the optimizer state does not fit at {name}; go on with the --optimizer and the "
                "model of that run"
            )
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("/")
            p = parameters[parameter]
            device = tensor.device if key == "step" and not p.is_cuda else p.device
            owners[p].state[p][key] = tensor.to(device)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients to a global norm of at most ``max_norm`` (0: leave them); return the norm."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    # On a CPU a product with 1 is a pass over memory for nothing; on a GPU to know that it is 1
    # would be to wait for it. The 1e-6 is what the division below adds to the norm.
    fits = max_norm <= 0 or (norm.device.type == "cpu" and bool(norm + 1e-6 <= max_norm))
    if not fits:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm

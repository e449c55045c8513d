"""A transformer that scores texts: the trunk of a `GPT` and one linear unit.

The score of an answer is read at its last token. That is ``<|end|>``, which stands behind every
answer in training and in scoring alike; an answer that was cut off has its own last token there.

A checkpoint has the file "reward" in place of "model": a reward model says nothing, and what looks
for a language model does not find one.

Shape suffixes: B texts, T positions, N places to score, C n_embd.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgpt import cli
from fastgpt.checkpoint import load_checkpoint
from fastgpt.config import ModelConfig
from fastgpt.distributed import pick_device
from fastgpt.errors import UsageError
from fastgpt.hardware import compute_dtype as pick_dtype
from fastgpt.model import GPT
from fastgpt.run import load_tokenizer
from fastgpt.rundir import RunDir
from fastgpt.tokenizer import Tokenizer
from fastgpt.trainer import load_weights


class RewardModel(nn.Module):
    """Token ids -> scores, float32.

    ``gain`` and ``bias`` are no parameters: `normalize` sets them, and they belong to the model's
    state. The loss is computed on `raw` scores, whatever they are.
    """

    gain: Tensor
    bias: Tensor

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        # No logits are ever computed, so an output projection of its own would be dead weight.
        self.config = dataclasses.replace(config, tied=True)
        self.compute_dtype = compute_dtype
        self.trunk = GPT(self.config, compute_dtype)
        self.head = nn.Linear(config.n_embd, 1)
        # Stiennon et al. 2020, arXiv:2009.01325.
        nn.init.normal_(self.head.weight, std=(config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    @classmethod
    def from_gpt(cls, model: GPT) -> RewardModel:
        """A reward model with the trunk of ``model`` (copied) and a fresh head.

        The head is drawn from PyTorch's global generator, on the CPU.
        """
        reward = cls(model.config, model.compute_dtype)
        weights = {k: v for k, v in model.state_dict().items() if k != "head.weight"}
        reward.trunk.load_state_dict(weights)
        return reward.to(model.wte.weight.device)

    def checkpoint_parts(self) -> dict[str, nn.Module]:
        """See `fastgpt.trainer.Trainable`."""
        return {"reward": self}

    def raw(
        self,
        tokens_BT: Tensor,
        places_N: Tensor,
        *,
        positions: Tensor | None = None,
        doc_start: Tensor | None = None,
    ) -> Tensor:
        """Scores before normalisation at ``places_N`` of the flattened (B, T) tokens, (N,)."""
        hidden_NC = self.trunk(tokens_BT, positions=positions, doc_start=doc_start, places=places_N)
        return self._project(hidden_NC)

    def scores(self, tokens_BT: Tensor, last_B: Tensor) -> Tensor:
        """Normalised score of each text.

        Args:
            tokens_BT: int64 ids from position 0, anything behind the text.
            last_B: int64, index of the last token of each text.

        Returns:
            (B,) float32.
        """
        B, T = tokens_BT.shape
        places = torch.arange(B, device=tokens_BT.device) * T + last_B
        return self.normalized(self.raw(tokens_BT, places))

    def values(self, tokens_BT: Tensor) -> Tensor:
        """Normalised score of every beginning of each text, (B, T) float32: a value model."""
        return self.normalized(self._project(self.trunk(tokens_BT)))

    def normalized(self, raw: Tensor) -> Tensor:
        """``gain`` x raw + ``bias``."""
        return self.gain * raw + self.bias

    @torch.no_grad()
    def normalize(self, mean: float, std: float) -> None:
        """Make `scores` mean 0 and standard deviation 1 where `raw` ones are ``mean``, ``std``."""
        gain = 1.0 / max(std, 1e-6)  # all alike: nothing to scale
        self.gain.fill_(gain)
        self.bias.fill_(-mean * gain)

    def _project(self, hidden: Tensor) -> Tensor:
        # float32: a score is a sum over the width, and bfloat16 would round it to 8 bits.
        return self.head(hidden.float()).squeeze(-1)


def find_reward_model(path: Path) -> RunDir:
    """The run in ``path``. Raises UsageError unless a reward model was saved there."""
    run = RunDir.open(path)
    if not any(run.checkpoints.glob("step_*/reward.safetensors")):
        raise UsageError(
            f"{run.path}: no reward model was saved there; give a run of python -m fastgpt.reward"
        )
    return run


def load_reward_model(
    path: Path, *, step: int | None = None, device: str = "auto", dtype: str = "auto"
) -> tuple[RewardModel, Tokenizer]:
    """Reward model and tokenizer of the run in ``path``, for inference.

    Raises UsageError for a run of another stage, DataError for a damaged one.
    """
    run = find_reward_model(path)
    tree = cli.read_toml(run.config_path, "--reward")
    config = cli.from_tree(ModelConfig, tree["model"], str(run.config_path))
    config.check()
    checkpoint = load_checkpoint(run.checkpoints, step, only=("reward",))
    where = pick_device(device, 0)
    with torch.device("meta"):
        model = RewardModel(config, pick_dtype(dtype, where))
    model.to_empty(device=where)
    load_weights(model, checkpoint, "reward")
    return model.eval(), load_tokenizer(run)

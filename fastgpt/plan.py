"""``--dry-run``: what a run would take, by arithmetic; nothing is read, written or allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgpt.config import ModelConfig, PretrainConfig, TrainConfig
from fastgpt.data.documents import embedded_text

if TYPE_CHECKING:
    from fastgpt.distributed import World

# Fraction of the hardware's peak that a small model reaches; only used for the time estimate.
_ASSUMED_MFU = 0.3


def print_plan(config: PretrainConfig) -> None:
    """Print parameters, memory, tokens, steps, disk and time of ``config``."""
    for name, value in plan(config).items():
        print(f"{name:<14} {value}")


def plan(config: PretrainConfig) -> dict[str, str]:
    """The figures of the run as text, each with its unit; estimates say so."""
    from fastgpt.distributed import World, pick_device
    from fastgpt.hardware import compute_dtype, peak_flops

    model, settings = config.model, config.train
    device = pick_device(settings.device, 0)
    dtype = compute_dtype(settings.dtype, device)
    seq_len = settings.seq_len or model.context
    batch_size, micro = batch_shape(model, settings, World(0, 1, device))
    tokens = settings.steps * batch_size * seq_len
    flops = tokens * model.flops_per_token(seq_len)
    peak = peak_flops(device, dtype)
    parameters = model.n_params()
    kept = f"{settings.keep_last + 1} of them at most" if settings.keep_last else "all are kept"
    sources = config.data.data or (embedded_text(),)
    return {
        "parameters": f"{parameters:,}",
        "data": ", ".join(str(path) for path in sources),
        "device": f"{device}, {str(dtype).removeprefix('torch.')}",
        "batch": f"{batch_size} sequences of {seq_len} tokens, {micro} at a time",
        "steps": f"{settings.steps:,}",
        "tokens": f"{tokens:,}",
        "memory": f"{_size(training_bytes(config, micro, dtype.itemsize))} (estimate)",
        "disk": f"{_size(checkpoint_bytes(config))} a checkpoint, {kept}; token shards besides",
        "compute": f"{flops:.3g} FLOPs",
        "time": f"{_duration(flops / (peak * _ASSUMED_MFU))} "
        f"(estimate: {_ASSUMED_MFU:.0%} of {peak / 1e12:.3g} TFLOP/s)",
    }


def batch_shape(model: ModelConfig, settings: TrainConfig, world: World) -> tuple[int, int]:
    """Sequences of an optimizer step, and of one forward pass of one process."""
    seq_len = settings.seq_len or model.context
    batch_size = max(1, settings.batch_tokens // seq_len)
    if settings.micro_batch:
        return batch_size, settings.micro_batch
    most = max(1, (16384 if world.device.type == "cuda" else 8192) // seq_len)
    share = max(1, batch_size // world.size)
    return batch_size, max(d for d in range(1, most + 1) if share % d == 0)


def checkpoint_bytes(config: PretrainConfig) -> int:
    """Weights and moments in float32: AdamW has two moments a parameter, Muon one."""
    model = config.model
    hidden = int(model.flops_per_token(0)) // 6 - model.vocab_size * model.n_embd
    return 12 * model.n_params() - (4 * hidden if config.optim.optimizer == "muon" else 0)


def training_bytes(config: PretrainConfig, micro: int, itemsize: int) -> int:
    """Weights, moments and gradients in float32, and the activations of one micro-batch.

    Activations a layer: about 10 widths of C and 2 to 3 of the MLP a token are kept for the
    backward.
    """
    model = config.model
    seq_len = config.train.seq_len or model.context
    rows = micro * seq_len
    widths = 10 * model.n_embd + (3 if model.mlp == "swiglu" else 2) * model.ff_dim
    activations = model.n_layer * rows * widths * itemsize
    logits = min(rows * model.vocab_size * itemsize, 1 << 28)
    return checkpoint_bytes(config) + 4 * model.n_params() + activations + 2 * logits


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"

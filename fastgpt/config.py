"""Every option of every part as a frozen dataclass, without importing torch.

They live in one file, and not in the files that use them, for one reason: ``--help`` must
answer at once, and a file that defines an ``nn.Module`` cannot be read without loading
torch. Doc strings below the fields are what ``--help`` prints.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Suppress

from fastgpt.errors import UsageError

MAX_PARAMS = 10**13


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer; `fastgpt.presets` names the published ones."""

    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int | None = None
    """Key/value heads (grouped-query attention); default n_head."""
    n_embd: int = 384
    head_dim: int | None = None
    """Default n_embd / n_head."""
    d_ff: int | None = None
    """Hidden width of the MLP; default 4 n_embd."""
    vocab_size: int = 50257
    context: int = 1024
    """Longest sequence; learned positions have this many rows."""
    norm: Literal["layer_norm", "rms_norm"] = "rms_norm"
    norm_weight: bool = True
    """Learned gain (and bias, with ``bias``) in the norms."""
    norm_eps: float = 1e-5
    mlp: Literal["gelu", "gelu_tanh", "relu_squared", "swiglu"] = "relu_squared"
    position: Literal["learned", "rotary"] = "rotary"
    rope_theta: float = 10000.0
    bias: bool = False
    tied: bool = True
    """The output projection is the token embedding."""
    parallel: bool = False
    """Attention and MLP read the same normed input and are added together (PaLM)."""
    qk_norm: bool = False
    logit_softcap: float | None = None
    window: int | None = None
    """Sliding window of every second layer (GPT-3's locally banded attention); None: all dense."""
    embed_norm: bool = False
    """Normalise the token embedding before the first block."""
    init: Literal["gpt2", "zero_proj"] = "gpt2"
    """Residual projections: N(0, 0.02 / sqrt(2 n_layer)), or zero."""

    def check(self) -> None:
        """Raise UsageError for a shape that no model can have."""
        sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "context")
        for name in (*sizes, "attn_dim", "kv_heads", "ff_dim"):
            if getattr(self, name) < 1:
                raise UsageError(f"model: {name} is {getattr(self, name)}; it must be at least 1")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UsageError(
                f"model: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; "
                "change one of them or set head_dim"
            )
        if self.context < 2:
            raise UsageError("model: context is 1; a sequence takes a token and the next")
        if self.n_head % self.kv_heads:
            raise UsageError(
                f"model: n_head {self.n_head} is not a multiple of n_kv_head {self.kv_heads}"
            )
        if self.position == "rotary" and self.attn_dim % 2:
            raise UsageError(f"model: rotary positions need an even head_dim, not {self.attn_dim}")
        if self.n_params() > MAX_PARAMS:
            raise UsageError(f"model: {self.n_params():,} parameters; is one of the sizes a typo?")

    @property
    def attn_dim(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_kv_head or self.n_head

    @property
    def ff_dim(self) -> int:
        """Hidden width of the MLP."""
        return self.d_ff or 4 * self.n_embd

    def n_params(self) -> int:
        """Number of trainable parameters, by arithmetic (a test holds it against the module)."""
        C, H, K, D, F = self.n_embd, self.n_head, self.kv_heads, self.attn_dim, self.ff_dim
        attention = C * (H + 2 * K) * D + H * D * C
        mlp = (3 if self.mlp == "swiglu" else 2) * C * F
        up = 2 * F if self.mlp == "swiglu" else F
        bias = (H + 2 * K) * D + C + up + C if self.bias else 0
        norm = C * (1 + (self.bias and self.norm == "layer_norm")) if self.norm_weight else 0
        norms_per_layer = 1 if self.parallel else 2
        qk = 2 * D if self.qk_norm and self.norm_weight else 0
        layer = attention + mlp + bias + norms_per_layer * norm + qk
        total = self.n_layer * layer + norm + self.vocab_size * C * (1 if self.tied else 2)
        if self.embed_norm:
            total += norm
        return total + (self.context * C if self.position == "learned" else 0)

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs a token, forward and backward: 6 N_matmul + 12 L H D T (PaLM, appendix B)."""
        C, D = self.n_embd, self.attn_dim
        per_layer = C * (self.n_head + 2 * self.kv_heads) * D + self.n_head * D * C
        per_layer += (3 if self.mlp == "swiglu" else 2) * C * self.ff_dim
        matmul = self.n_layer * per_layer + self.vocab_size * C
        return 6.0 * matmul + 12.0 * self.n_layer * self.n_head * D * seq_len


FromRun = Annotated[ModelConfig, Suppress]
"""The model of a stage that starts from a run: no flag, but part of its config.toml."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for hidden matrices, AdamW for the rest."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 5e-3
    """Peak learning rate of Muon (RMS-matched: arXiv:2502.16982)."""
    min_lr: float = 0.0
    """Fraction of the peak reached at the end."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; matrices only."""
    muon_momentum: float = 0.95
    schedule: Literal["cosine", "wsd", "linear"] = "wsd"
    warmup: float = 0.02
    """Fraction of the steps, or a number of steps when at least 1."""
    decay: float = 0.4
    """wsd: fraction of the steps after warm-up that go down."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""

    def check(self) -> None:
        """Raise UsageError for values no optimizer can have."""
        below_1 = all(0 <= beta < 1 for beta in self.betas)
        bounds = dict.fromkeys(
            ("lr", "muon_lr", "eps", "weight_decay", "warmup", "grad_clip"), math.inf
        )
        bounds |= dict.fromkeys(("min_lr", "muon_momentum", "decay"), 1.0)
        for name, most in bounds.items():
            value = getattr(self, name)
            if not 0 <= value <= most or math.isinf(value):
                upper = f" and at most {most:g}" if most < math.inf else " and finite"
                raise UsageError(f"{_flag(name, value)}: it must be at least 0{upper}")
        if not below_1:
            raise UsageError(f"{_flag('betas', self.betas)}: both must be at least 0 and below 1")

    def warmup_steps(self, steps: int) -> int:
        """Number of warm-up steps of a run of ``steps``."""
        return int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * steps)

    def multiplier(self, step: int, steps: int) -> float:
        """Learning rate at ``step`` (0-based) of ``steps`` as a fraction of its peak."""
        warm = self.warmup_steps(steps)
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        if self.schedule == "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * done))
        elif self.schedule == "linear":
            shape = 1.0 - done
        else:
            shape = min(1.0, (1.0 - done) / self.decay) if self.decay > 0 else 1.0
        return self.min_lr + (1.0 - self.min_lr) * shape


@dataclass(frozen=True)
class DataConfig:
    """What to train on, and how text becomes ids."""

    data: tuple[Path, ...] = ()
    """Files or directories (.txt, .jsonl, .parquet, .gz, .xz); default: the embedded text."""
    text_key: str = "text"
    """Key of the text in .jsonl and .parquet files."""
    on_bad_data: Literal["error", "skip"] = "error"
    """A record that cannot be read ends the run, or is counted and left out."""
    val_fraction: float = 0.05
    """Part of the tokens held out for validation."""
    mask_documents: bool = False
    """Keep attention and loss inside a document."""
    tokenizer: Path | None = None
    """A tokenizer.json or a sentencepiece .model; default: train one on the data."""
    tokenizer_kind: Literal["bpe", "sentencepiece"] = "bpe"
    """What to train: byte-level BPE (GPT), or sentencepiece with byte fallback (LLaMA)."""
    pattern: Literal["gpt2", "gpt4"] = "gpt4"
    """How byte-level BPE splits text into words."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    out: Path | None = None
    """Run directory; default runs/<stage> (pretrain-<preset>, sft, reward, dpo, the algorithm)."""
    steps: int = 1000
    """Optimizer steps of the whole run; 0 in the later stages: what their epochs or episodes take.
    """
    batch_tokens: int = 65536
    """Tokens of one optimizer step, over all processes."""
    seq_len: int | None = None
    """Tokens of one sequence; default: the model's context."""
    micro_batch: int | None = None
    """Sequences of one forward pass; default: what 16k tokens (GPU) or 8k tokens (CPU; 4k with
    rankings) hold."""
    eval_every: int = 100
    """Steps between evaluations; 0: only at the end."""
    eval_tokens: int = 262144
    """Validation tokens of one evaluation; 0: all."""
    save_every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Checkpoints kept; 0: all."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    seed: int = 1337
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of activations; weights are float32. auto: bfloat16 where the hardware has it."""
    device: str = "auto"
    compile: bool = True
    """Compile the blocks with Inductor."""
    skip_budget: int = 10
    """Steps in a row with a loss or gradient that is not finite, before the run ends."""
    sample_tokens: int = 96
    """Length of the continuations printed at the end."""

    def check(self) -> None:
        """Raise UsageError for values no run can have."""
        positive = ("steps", "batch_tokens", "log_every", "skip_budget", "sample_tokens")
        least = dict.fromkeys((*positive, "seq_len", "micro_batch"), 1)
        least |= dict.fromkeys(("eval_every", "eval_tokens", "save_every", "keep_last", "seed"), 0)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UsageError(f"{_flag(name, value)}: it must be at least {bound}")
        if self.seed >= 2**63:
            raise UsageError(f"{_flag('seed', self.seed)}: it must be below 2**63")


def _flag(name: str, value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"--{name.replace('_', '-')} {text}"


@dataclass(frozen=True)
class PretrainConfig:
    """Train a base model: the next token of a text."""

    preset: str = "auto"
    """A named model with its recipe (see fastgpt.presets); flags override it."""
    config: Path | None = None
    """A TOML file with any of these options, as in a run's config.toml."""
    resume: Path | None = None
    """Go on with this run; everything else comes from it."""
    stop_at: int | None = None
    """Save and end at this step as if preempted; the schedule stays that of --steps."""
    dry_run: bool = False
    """Print parameters, memory, tokens, disk and time, and exit."""
    debug: bool = False
    """Show the traceback of an error."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()

    def check(self) -> None:
        """Raise UsageError for values no run can have."""
        self.train.check()
        self.model.check()
        self.optim.check()
        seq_len, context = self.train.seq_len, self.model.context
        if seq_len is not None and seq_len > context:
            raise UsageError(f"--seq-len {seq_len} is beyond the model's --context {context}")
        if self.stop_at is not None and self.stop_at < 1:
            raise UsageError(f"--stop-at {self.stop_at}: it must be at least 1")
        fraction = self.data.val_fraction
        if not 0 < fraction <= 0.5:
            raise UsageError(f"{_flag('val_fraction', fraction)}: above 0 and at most 0.5")


@dataclass(frozen=True)
class StageConfig:
    """What every stage that starts from a run has."""

    init: Path | None = None
    """The run to start from."""
    config: Path | None = None
    """A TOML file with any of these options, as in a run's config.toml."""
    resume: Path | None = None
    """Go on with this run; everything else comes from it."""
    stop_at: int | None = None
    """Save and end at this step as if preempted; the schedule stays that of the whole run."""
    debug: bool = False
    """Show the traceback of an error."""
    train: TrainConfig = TrainConfig(steps=0)
    optim: OptimConfig = OptimConfig()
    model: FromRun = ModelConfig()

    def check(self) -> None:
        """Raise UsageError for values no run can have."""
        dataclasses.replace(self.train, steps=self.train.steps or 1).check()
        self.optim.check()
        if self.init is None and self.resume is None:
            raise UsageError("--init: the run to start from is missing; give its directory")
        if self.stop_at is not None and self.stop_at < 1:
            raise UsageError(f"--stop-at {self.stop_at}: it must be at least 1")


@dataclass(frozen=True)
class RankingConfig(StageConfig):
    """What every stage that learns from rankings has."""

    data: tuple[Path, ...] = ()
    """Rankings (.jsonl, .gz, .xz): "prompt" and "responses", best first or with "ranks" or
    "scores"; or "chosen" and "rejected", with "margin" or without; default: the embedded ones."""
    epochs: float = 1.0
    """How often each prompt is used, unless --steps says how long to train."""
    batch_prompts: int | None = None
    """Prompts of an optimizer step, with all their answers; default: what --batch-tokens hold."""
    val_fraction: float = 0.1
    """Part of the prompts held out for validation."""
    on_long: Literal["error", "skip"] = "error"
    """A prompt that leaves no place for an answer in --seq-len ends the run, or is left out."""
    train: TrainConfig = TrainConfig(
        steps=0, batch_tokens=8192, eval_every=0, save_every=200, sample_tokens=64
    )

    def check(self) -> None:
        """Raise UsageError for values no run can have."""
        super().check()
        check_passes(self.epochs, self.val_fraction)
        if self.batch_prompts is not None and self.batch_prompts < 1:
            raise UsageError(f"{_flag('batch_prompts', self.batch_prompts)}: it must be at least 1")


def check_passes(epochs: float, val_fraction: float) -> None:
    """Raise UsageError for values with which no data can be used."""
    if not 0 < epochs < math.inf:
        raise UsageError(f"{_flag('epochs', epochs)}: it must be above 0")
    if not 0 <= val_fraction < 1:
        raise UsageError(f"{_flag('val_fraction', val_fraction)}: at least 0 and below 1")

"""Training throughput on this machine's CPU against plain PyTorch and Hugging Face GPT-2.

``python bench/bench_train.py`` prints the comparison and writes it with ``--save``; ``pytest
bench/bench_train.py`` times our step alone, after checking its loss, for regressions.

Every figure is tokens/s of forward + backward + clipping + optimizer, the median over the steps of
a fresh process; the contenders take turns, so that a drift of the machine meets all of them, and
the ratios are taken round by round. Contenders, each as its users start it:

    fastgpt         `fastgpt.trainer.train`, nothing set by hand
    plain-fp32      a GPT-2 in plain PyTorch, float32, eager: what nanoGPT's default does on a CPU
    plain-bf16      the same under bfloat16 autocast and torch.compile
    hf-bf16         transformers.GPT2LMHeadModel under bfloat16 autocast and torch.compile
    *-tuned         the same, given the allocator settings that fastgpt applies by itself

The GELU is GPT-2's own (tanh) in ours and Hugging Face's, and erf in the plain one, as in nanoGPT.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processor import processor

SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384}
T, B = 256, 16
CONTENDERS = ("fastgpt", "plain-fp32", "plain-bf16", "hf-bf16", "plain-bf16-tuned", "hf-bf16-tuned")
WARMUP_STEPS = 3


def tokens(vocab_size: int, step: int):
    """The inputs and targets of a step; the same for every contender."""
    import torch

    generator = torch.Generator().manual_seed(step)
    # The power makes small ids common, so that there is something to learn.
    ids = torch.rand(B, T + 1, generator=generator).pow(8).mul(vocab_size).long()
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def fastgpt_parts(vocab_size: int, steps: int) -> tuple:
    """What the loop takes: model, loss, settings, optimizer settings, the one process."""
    import torch

    from fastgpt.config import ModelConfig, OptimConfig, TrainConfig
    from fastgpt.distributed import World
    from fastgpt.hardware import compute_dtype
    from fastgpt.loss import next_token_loss as loss_fn
    from fastgpt.memory import keep_freed_memory
    from fastgpt.model import GPT

    keep_freed_memory()
    torch.manual_seed(0)
    family: dict[str, Any] = {"norm": "layer_norm", "mlp": "gelu_tanh", "position": "learned"}
    config = ModelConfig(**SHAPE, **family, vocab_size=vocab_size, context=T)
    device = torch.device("cpu")
    return (
        GPT(config, compute_dtype("auto", device)),
        loss_fn,
        TrainConfig(steps=steps, log_every=1, save_every=0, eval_every=0),
        OptimConfig(optimizer="adamw", lr=1e-3, warmup=0.0, schedule="cosine", min_lr=1.0),
        World(0, 1, device),
    )


def fastgpt_batch(vocab_size: int, step: int) -> list[dict]:
    inputs, targets = tokens(vocab_size, step)
    return [{"inputs_BT": inputs, "targets_BT": targets}]


def run_fastgpt(vocab_size: int, steps: int) -> dict:
    from fastgpt.rundir import RunDir, read_metrics
    from fastgpt.trainer import train

    model, loss_fn, config, optim, world = fastgpt_parts(vocab_size, steps)

    def batches(step: int) -> list[dict]:
        return fastgpt_batch(vocab_size, step)

    with tempfile.TemporaryDirectory() as directory:
        run = RunDir(Path(directory))
        train(
            model, batches, loss_fn, config, optim, world=world, run=run, seq_len=T, stage="bench"
        )
        losses = [line["loss"] for line in read_metrics(run.metrics_path)]
        rates = [line["tokens_per_s"] for line in read_metrics(run.timings_path)]
    return {"losses": losses, "rates": rates}


def plain_gpt2(vocab_size: int):
    """GPT-2 without biases or dropout, the way a tutorial would write it."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    C, H = SHAPE["n_embd"], SHAPE["n_head"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
            self.attn, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
            self.fc, self.out = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

        def forward(self, x):
            heads = self.attn(self.ln_1(x)).unflatten(-1, (3, H, C // H)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
            x = x + self.proj(y.transpose(1, 2).flatten(2))
            return x + self.out(F.gelu(self.fc(self.ln_2(x))))

    class GPT2(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(vocab_size, C), nn.Embedding(T, C)
            self.blocks = nn.Sequential(*(Block() for _ in range(SHAPE["n_layer"])))
            self.ln_f = nn.LayerNorm(C, bias=False)
            self.head = nn.Linear(C, vocab_size, bias=False)
            self.head.weight = self.wte.weight
            for p in self.parameters():
                if p.dim() == 2:
                    nn.init.normal_(p, std=0.02)

        def forward(self, inputs, targets):
            x = self.wte(inputs) + self.wpe(torch.arange(T))
            logits = self.head(self.ln_f(self.blocks(x)))
            return F.cross_entropy(logits.view(-1, vocab_size), targets.flatten())

    return GPT2()


def hugging_face_gpt2(vocab_size: int):
    import torch.nn.functional as F
    from torch import nn
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=vocab_size, n_positions=T, use_cache=False, **SHAPE, **dropout)

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = GPT2LMHeadModel(config)

        def forward(self, inputs, targets):
            logits = self.model(input_ids=inputs).logits
            return F.cross_entropy(logits.view(-1, vocab_size), targets.flatten())

    return WithLoss()


def run_peer(name: str, vocab_size: int, steps: int) -> dict:
    import torch

    torch.manual_seed(0)
    model = hugging_face_gpt2(vocab_size) if name.startswith("hf") else plain_gpt2(vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    bf16 = "bf16" in name
    forward = torch.compile(model) if bf16 else model
    losses, rates = [], []
    for step in range(steps):
        inputs, targets = tokens(vocab_size, step)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        rates.append(B * T / (time.perf_counter() - start))
    return {"losses": losses, "rates": rates}


def worker(name: str, vocab_size: int, steps: int) -> None:
    result = (
        run_fastgpt(vocab_size, steps) if name == "fastgpt" else run_peer(name, vocab_size, steps)
    )
    print(json.dumps(result))


def measure(name: str, vocab_size: int, steps: int) -> float:
    """Tokens/s of one contender in a process of its own, after checking that it learns."""
    env = dict(os.environ)
    if name.endswith("-tuned"):
        large = str(32 << 30)
        env |= {"MALLOC_MMAP_THRESHOLD_": large, "MALLOC_TRIM_THRESHOLD_": large}
        env |= {"MALLOC_TOP_PAD_": str(256 << 20), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [sys.executable, __file__, "--worker", name, str(vocab_size), str(steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    losses = result["losses"]
    assert abs(losses[0] - math.log(vocab_size)) < 0.5, (name, losses[0])
    assert losses[-1] < losses[0] - 0.2, (name, losses)
    return statistics.median(result["rates"][WARMUP_STEPS:])


def compare(vocab_size: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens/s of every contender in each round."""
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            rates[name].append(measure(name, vocab_size, steps))
    return rates


def table(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median tokens/s, and the median over the rounds of our rate divided by theirs."""
    ours = rates["fastgpt"]
    return {
        name: {
            "tokens_per_s": round(statistics.median(theirs)),
            "ours_over_theirs": round(
                statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2
            ),
        }
        for name, theirs in rates.items()
    }


def test_training_step(benchmark) -> None:
    """Our own step, for `pytest bench/ --benchmark-compare`; first its loss, then its time."""
    from fastgpt.trainer import StopRequest, _Loop

    parts = fastgpt_parts(vocab_size=1024, steps=100)
    loop = _Loop(*parts, seq_len=T, stage_state=None, varying=False)
    losses = [loop.step(fastgpt_batch(1024, step), StopRequest()).loss for step in range(4)]
    assert abs(losses[0] - math.log(1024)) < 0.5
    assert losses[-1] < losses[0]
    benchmark.pedantic(
        lambda: loop.step(fastgpt_batch(1024, 4), StopRequest()), rounds=10, iterations=1
    )
    benchmark.extra_info["tokens_per_s"] = round(B * T / benchmark.stats["median"])


def main() -> None:
    parser = argparse.ArgumentParser(description="a training step against its peers")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "VOCAB", "STEPS"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--vocab", type=int, nargs="+", default=[8192, 50304])
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], int(args.worker[1]), int(args.worker[2]))
        return
    import torch

    results = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
        },
        "torch": torch.__version__,
        "shape": {**SHAPE, "T": T, "B": B},
        "vocab": {},
    }
    for vocab_size in args.vocab:
        rows = table(compare(vocab_size, args.rounds, args.steps))
        results["vocab"][vocab_size] = rows
        print(f"vocabulary {vocab_size}")
        for name, row in rows.items():
            print(f"  {name:<18} {row['tokens_per_s']:>8} tok/s   {row['ours_over_theirs']:>6.2f}x")
    if args.save:
        args.save.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Post-training throughput on this machine's CPU against TRL and transformers.

``python bench/bench_posttraining.py --peer-python PATH`` prints the comparison and writes it with
``--save``; PATH is an interpreter that has trl 1.12, the last release with PPO. ``pytest
bench/bench_posttraining.py`` times our finetuning step alone, after checking its loss.

One model (GPT-2, 4 layers, 256 wide, vocabulary 8192), the same weights and the same synthetic data
on both sides; every figure is the median over the steps of a fresh process, from the end of a step
to the end of the next, so that collation, sampling and logging count. Contenders take turns, the
ratios are taken round by round, and no figure counts before losses, entropies, lengths or greedy
tokens are what they must be. Rows:

    sft         packed chats, 8 rows of 256, loss on the answers; tokens/s without padding
    reward      16 pairs of texts of 32 to 128 tokens; pairs/s
    ppo         32 prompts of 4 to 16 tokens, 48 sampled, reward and value model, 4 epochs of one
                minibatch; samples/s
    grpo        the same with 8 answers to each of 4 prompts, beta 0.02, a reward function, one
                update; samples/s
    generate    16 prompts of 64 tokens continued greedily by 128 with cached keys; tokens/s

Contenders: ``fastgpt`` with its defaults; ``trl`` with its own but bf16, which its PPO cannot have
by default on a CPU; ``trl-fp32`` and ``trl-bf16`` without gradient checkpointing and in one
micro-batch, in float32 and under bfloat16 autocast; for the last row ``generate`` of transformers
in float32 and with bfloat16 weights. From the second round on only the fastest peer of the first is
run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import posttraining_workload as work
from processor import processor

PEERS = {
    **dict.fromkeys(("sft", "reward", "ppo", "grpo"), ("trl", "trl-fp32", "trl-bf16")),
    "generate": ("transformers", "transformers-bf16"),
}
UNITS = {
    "sft": "tokens",
    "reward": "pairs",
    "ppo": "samples",
    "grpo": "samples",
    "generate": "tokens",
}
TARGETS = {"sft": 2.5, "reward": 3.0, "ppo": 4.0, "grpo": 3.0, "generate": 4.0}
STEPS = {"sft": 12, "reward": 12, "ppo": 5, "grpo": 7, "generate": 5}
WARMUP = 2


def our_config() -> Any:
    from fastgpt.config import ModelConfig

    family: dict[str, Any] = {"norm": "layer_norm", "mlp": "gelu_tanh", "position": "learned"}
    return ModelConfig(
        **work.SHAPE, **family, bias=True, vocab_size=work.VOCAB, context=work.CONTEXT
    )


def our_model(dtype: str = "auto") -> Any:
    import torch

    from fastgpt.hardware import compute_dtype
    from fastgpt.memory import keep_freed_memory
    from fastgpt.model import GPT

    keep_freed_memory()
    torch.manual_seed(0)
    return GPT(our_config(), compute_dtype(dtype, torch.device("cpu")))


def write_weights(directory: Path) -> None:
    """The model with which all contenders start, for transformers."""
    from safetensors.torch import save_file

    from fastgpt.export import gpt2

    settings, weights = gpt2(our_config(), dict(our_model("float32").state_dict()))
    settings |= {
        "vocab_size": work.VOCAB,
        "pad_token_id": work.PAD,
        "eos_token_id": work.EOS,
        "bos_token_id": work.EOS,
    }
    (directory / "config.json").write_text(json.dumps(settings))
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@dataclasses.dataclass
class Run:
    """A run of `fastgpt.trainer.train`: lines of metrics, and when each step began."""

    lines: list[dict[str, Any]]
    began: list[float]


def our_run(model: Any, batches: Any, loss: Any, optim: Any, steps: int, **options: Any) -> Run:
    """Train with nothing set by hand but that no evaluation or checkpoint comes in between."""
    from fastgpt.config import TrainConfig
    from fastgpt.rundir import RunDir, read_metrics
    from fastgpt.trainer import train

    began: list[float] = []

    def timed(step: int) -> Any:
        began.append(time.perf_counter())
        return batches(step)

    config = TrainConfig(steps=steps, log_every=1, save_every=0, eval_every=0)
    with tempfile.TemporaryDirectory() as directory:
        run = RunDir(Path(directory))
        fixed = {"world": world(), "run": run, "seq_len": work.CONTEXT, "stage": "bench"}
        train(model, timed, loss, config, optim, **fixed, **options)
        return Run(list(read_metrics(run.metrics_path)), began)


def world() -> Any:
    import torch

    from fastgpt.distributed import World

    return World(0, 1, torch.device("cpu"))


def our_sft_data(steps: int) -> Any:
    import numpy as np

    from fastgpt.data.packing import PackedExamples

    examples = [(np.array(ids), np.arange(len(ids)) >= prompt) for ids, prompt in work.chats(steps)]
    return PackedExamples(examples, work.CONTEXT)


def our_sft(steps: int) -> dict:
    from fastgpt.data.packing import step_batches
    from fastgpt.sft import SFTConfig, loss_fn

    data = our_sft_data(steps)

    def batches(step: int) -> Any:
        return step_batches(data, step, batch_size=work.SFT_ROWS, micro_batch_size=work.SFT_ROWS)

    optim = dataclasses.replace(SFTConfig().optim, lr=work.RATES["sft"], optimizer="adamw")
    run = our_run(our_model(), batches, loss_fn, optim, steps)
    rows = [range(step * work.SFT_ROWS, (step + 1) * work.SFT_ROWS) for step in range(steps)]
    counts = [sum(int(data.lengths[i]) + 1 for g in r for i in data.examples(g)) for r in rows]
    return {"losses": [line["loss"] for line in run.lines], **work.rates(run.began, counts)}


def our_reward(steps: int) -> dict:
    import numpy as np
    import torch

    from fastgpt.preference.comparisons import Comparison, PackedComparisons, micro_rows
    from fastgpt.preference.reward_model import RewardModel
    from fastgpt.reward import RewardConfig, Stage

    comparisons = [
        Comparison([np.array(better), np.array(worse)], prompt, [(0, 1)], [1.0])
        for prompt, better, worse in work.pairs(work.PAIRS * steps)
    ]
    rows = micro_rows(None, work.CONTEXT, torch.device("cpu"))
    data = PackedComparisons(comparisons, work.CONTEXT, rows)
    model = RewardModel.from_gpt(our_model())
    model.head.bias.requires_grad_(False)
    stage = Stage(model, world(), work.PAIRS, 0.0, data, None, None)
    optim = dataclasses.replace(RewardConfig().optim, lr=work.RATES["reward"])
    options = {"metrics": stage.metrics, "counted": "prompts"}
    run = our_run(model, stage.batches, stage.loss, optim, steps, **options)
    return {
        "losses": [line["loss"] for line in run.lines],
        **work.rates(run.began, [work.PAIRS] * steps),
    }


def our_rl(algorithm: str, steps: int) -> dict:
    import torch

    from fastgpt.ppo import PPOConfig, _frozen, _Scorer
    from fastgpt.preference.reward_model import RewardModel
    from fastgpt.rl.actor_critic import ActorCritic
    from fastgpt.rl.config import RLConfig
    from fastgpt.rl.experience import Experience, Problem

    policy, reference = our_model(), _frozen(our_model(), True)
    ppo = algorithm == "ppo"
    config = RLConfig(
        algorithm="ppo" if ppo else "grpo",
        rollout=work.SAMPLES,
        minibatches=1,
        epochs=4 if ppo else 1,
        group=None if ppo else work.GROUP,
        max_new_tokens=work.RESPONSE,
        kl_controller="fixed",
        kl_coef=0.05 if ppo else 0.02,
        kl_stop=0.0,
        missing_end_penalty=0.0,
    )
    value = RewardModel.from_gpt(policy) if ppo else None
    rows = work.prompts(work.SAMPLES * steps)
    reward = _frozen(RewardModel.from_gpt(policy), True)
    by_model = _Scorer(None, (), reward, None, None, world(), "")  # pyright: ignore

    def by_function(rows: Any, numbers: Sequence[int]) -> Any:
        masked = zip(rows.ids_BR, rows.mask_BR, strict=True)
        return torch.tensor([work.common_ids(ids[mask].tolist()) for ids, mask in masked])

    scorer = by_model if ppo else by_function
    model = ActorCritic(policy, value).train()
    micro = 8192 // (max(map(len, rows)) + work.RESPONSE)  # as the stage chooses it
    problem = Problem(model, reference, rows, [], scorer, work.EOS, work.PAD, 0, micro)
    experience = Experience(config, problem, world())
    optim = dataclasses.replace(PPOConfig().optim, lr=work.RATES[algorithm])
    parts = (model, experience.batches, experience.loss, optim, steps * config.epochs)
    run = our_run(*parts, metrics=experience.metrics)
    ours = run.lines[:: config.epochs]
    assert abs(ours[0]["ratio"] - 1) < 0.02, ours[0]
    return {
        "entropies": [line["entropy"] for line in ours],
        "lengths": [line["length"] for line in ours],
        **work.rates(run.began[:: config.epochs], [work.SAMPLES] * steps),
    }


def our_generate(steps: int) -> dict:
    from fastgpt.generate import SamplingConfig, generate

    sampling = SamplingConfig(max_new_tokens=work.NEW, temperature=0)
    rows = work.prompts(work.ROWS, work.READ, work.READ)
    model = our_model()
    work.enlarge(model)
    exact = our_model("float32")
    work.enlarge(exact)
    began, found = [], []
    for _ in range(steps + 1):
        began.append(time.perf_counter())
        found = generate(model, rows, sampling)
    counts = [work.ROWS * work.NEW] * len(began)
    return {"ids": generate(exact, rows, sampling), "timed_ids": found, **work.rates(began, counts)}


# Comparison


def our_worker(row: str, steps: int) -> None:
    rows = {"sft": our_sft, "reward": our_reward, "generate": our_generate}
    result = rows[row](steps) if row in rows else our_rl(row, steps)
    print(json.dumps(result))


def run_one(row: str, name: str, peer_python: str, weights: Path) -> dict:
    """What one contender reports of a row, from a process of its own."""
    steps = str(STEPS[row])
    if name == "fastgpt":
        command = [sys.executable, __file__, "--worker", row, steps]
    else:
        script = Path(__file__).with_name("posttraining_peers.py")
        command = [peer_python, str(script), row, name, steps, str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row} of {name} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    check(row, name, result)
    return result


def check(row: str, name: str, result: dict) -> None:
    """A figure counts only if the work was done: raise AssertionError if it was not."""
    what = row, name, {key: value for key, value in result.items() if "ids" not in key}
    if row in ("sft", "reward"):
        losses = result["losses"]
        start = math.log(work.VOCAB) if row == "sft" else math.log(2)
        assert abs(losses[0] - start) < 0.5, what
        assert statistics.mean(losses[-3:]) < losses[0] - (0.2 if row == "sft" else 0.05), what
    elif row == "generate":
        exact, timed = result["ids"], result["timed_ids"]
        assert all(len(row) == work.NEW for row in exact + timed), what
        # In bfloat16 the choice between two ids that are all but equal falls otherwise sooner or
        # later, and from there on the texts differ.
        rows = zip(exact, timed, strict=True)
        same = [a == b for ours, its in rows for a, b in zip(ours[:4], its[:4], strict=True)]
        assert statistics.mean(same) > 0.75, (what, same)
    else:
        # A model that knows nothing: all ids are alike to it, and it hardly ever ends.
        assert all(abs(x - math.log(work.VOCAB)) < 0.5 for x in result["entropies"]), what
        assert all(0.9 * work.RESPONSE < x <= work.RESPONSE for x in result["lengths"]), what


def rate(result: dict) -> float:
    return statistics.median(result["rates"][WARMUP:])


def check_same_work(row: str, ours: dict, theirs: dict) -> None:
    """As many tokens a step, and in float32 the same greedy ids."""
    mine, other = (statistics.mean(result["counts"][WARMUP:]) for result in (ours, theirs))
    assert abs(mine / other - 1) < 0.05, (row, mine, other)
    if row == "sft":
        assert abs(ours["losses"][0] - theirs["losses"][0]) < 0.05, (ours, theirs)
    if row == "generate":
        assert ours["ids"] == theirs["ids"]


def compare(
    row: str, peers: Sequence[str], rounds: int, run: Callable[[str, str], dict]
) -> dict[str, list[float]]:
    """Units/s of the contenders in each round; of the peers, from round 2 on, the fastest."""
    found: dict[str, list[float]] = {name: [] for name in ("fastgpt", *peers)}
    for turn in range(rounds):
        ours = run(row, "fastgpt")
        found["fastgpt"].append(rate(ours))
        if turn:
            peers = sorted(peers, key=lambda name: -found[name][0])[:1]
        for name in peers:
            theirs = run(row, name)
            check_same_work(row, ours, theirs)
            found[name].append(rate(theirs))
    return found


def table(row: str, found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median over the rounds of our rate divided by that of the fastest peer."""
    ours, *peers = found
    best = max(peers, key=lambda name: found[name][0], default=None)
    contenders = {
        name: {f"{UNITS[row]}_per_s": round(statistics.median(values), 1), "rounds": len(values)}
        for name, values in found.items()
    }
    if best is None:
        return {"contenders": contenders}
    ratios = [a / b for a, b in zip(found[ours], found[best], strict=True)]
    return {
        "contenders": contenders,
        "fastest_peer": best,
        "ratios": [round(x, 2) for x in ratios],
        "ratio": round(statistics.median(ratios), 2),
        "target": TARGETS[row],
    }


def show(row: str, result: dict[str, Any]) -> None:
    print(row)
    for name, values in result["contenders"].items():
        print(f"  {name:<18} {next(iter(values.values())):>9.1f} {UNITS[row]}/s")
    if "ratio" in result:
        rounds = ", ".join(f"{x:.2f}" for x in result["ratios"])
        print(f"  {result['ratio']:.2f}x {result['fastest_peer']} (rounds: {rounds};", end=" ")
        print(f"goal {result['target']:g}x)", flush=True)


def importable(python: str, row: str) -> str | None:
    """None, or why the peers of a row cannot run."""
    wanted = {
        "sft": "from trl import SFTTrainer",
        "reward": "from trl import RewardTrainer",
        "ppo": "from trl.experimental.ppo import PPOTrainer",
        "grpo": "from trl import GRPOTrainer",
        "generate": "import transformers",
    }
    command = [python, "-c", wanted[row]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python}: {error.strerror}"
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def test_sft_step(benchmark) -> None:
    """Our own finetuning step, for `--benchmark-compare`; first its loss, then its time."""
    from fastgpt.config import TrainConfig
    from fastgpt.data.packing import step_batches
    from fastgpt.sft import SFTConfig, loss_fn
    from fastgpt.trainer import StopRequest, _Loop

    data = our_sft_data(4)
    optim = dataclasses.replace(SFTConfig().optim, lr=work.RATES["sft"])
    parts = our_model(), loss_fn, TrainConfig(steps=100), optim, world()
    loop = _Loop(*parts, seq_len=work.CONTEXT, stage_state=None, varying=False)
    sizes = {"batch_size": work.SFT_ROWS, "micro_batch_size": work.SFT_ROWS}
    batches = [step_batches(data, step, **sizes) for step in range(4)]
    losses = [loop.step(batch, StopRequest()).loss for batch in batches]
    assert abs(losses[0] - math.log(work.VOCAB)) < 0.5
    assert losses[-1] < losses[0]
    benchmark.pedantic(lambda: loop.step(batches[3], StopRequest()), rounds=10, iterations=1)
    tokens = sum(int((micro["doc_start_BT"] >= 0).sum()) for micro in batches[3])
    benchmark.extra_info["tokens_per_s"] = round(tokens / benchmark.stats["median"])


def main() -> None:
    parser = argparse.ArgumentParser(description="post-training against TRL and transformers")
    parser.add_argument("--worker", nargs=2, metavar=("ROW", "STEPS"))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--peers", nargs="+", help="of these alone; default: all")
    parser.add_argument("--save", type=Path, help="rows that are in the file already stay there")
    args = parser.parse_args()
    if args.worker:
        our_worker(args.worker[0], int(args.worker[1]))
        return
    import torch

    results: dict[str, Any] = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "torch": torch.__version__,
        "shape": {**work.SHAPE, "vocab": work.VOCAB},
        "rows": {},
    }
    if args.save and args.save.exists():
        results["rows"] |= json.loads(args.save.read_text())["rows"]
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory)
        write_weights(weights)
        for row in args.rows:
            missing = importable(args.peer_python, row)
            if missing:
                print(f"{row}: no peers: {missing}")
            chosen = args.peers or PEERS[row]
            peers = () if missing else [name for name in PEERS[row] if name in chosen]
            run = partial(run_one, peer_python=args.peer_python, weights=weights)
            found = compare(row, peers, args.rounds, run)
            results["rows"][row] = table(row, found)
            show(row, results["rows"][row])
            if args.save:
                args.save.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

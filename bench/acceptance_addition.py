"""A verifiable task: two-digit addition, where GRPO and PPO must lift the share of exact answers.

``python -m bench.acceptance_addition --folder DIR`` finetunes a small model on sums of which most
are wrong, lets each algorithm see only whether an answer is exact, and counts exact answers to
pairs of numbers that no stage has seen, sampled at temperature 1, before and after. It fails unless
their share goes from at most .55 to at least .8. GRPO compares 8 answers to a prompt; PPO takes one
answer to each of 8 times as many prompts and learns a value model from nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
REWARD = '''"""The reward: 1 for the exact sum."""


def exact(prompts, responses, references):
    return [float(text.strip() == answer) for text, answer in zip(responses, references)]
'''
COMMON = ["--no-compile", "--dtype", "float32"]
BEFORE, AFTER = 0.55, 0.8


def write_data(out: Path, seed: int) -> None:
    """Sums with some and with many wrong answers, prompts, and the reward function."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    known, held = pairs[:7500], pairs[7500:]

    def chat(a: int, b: int, wrong: float) -> dict[str, str]:
        error = rng.choice([-10, -1, 1, 10]) if rng.random() < wrong else 0
        return {"prompt": f"{a}+{b}=", "response": str(a + b + error)}

    def prompt(a: int, b: int) -> dict[str, str]:
        return {"prompt": f"{a}+{b}=", "answer": str(a + b)}

    files = {
        "fair": [chat(a, b, 0.2) for a, b in known],
        "noisy": [chat(a, b, 0.6) for a, b in known],
        "prompts": [prompt(*pair) for pair in known[:6000]],
        "held": [prompt(*pair) for pair in held],
    }
    for name, lines in files.items():
        (out / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = "\n<|endoftext|>\n".join(f"{a}+{b}={a + b}" for a, b in known[:200])
    (out / "text.txt").write_text(text)
    (out / "addition_reward.py").write_text(REWARD)


def preparation() -> dict[str, list[object]]:
    """Run -> module and arguments, in order; a second finetuning brings the errors in."""
    shape = ["--n-layer", 2, "--n-head", 4, "--n-embd", 128, "--context", 32]
    sft = ["sft", *COMMON, "--batch-tokens", 2048, "--eval-every", 500]
    return {
        "base": [
            *("pretrain", "--data", "text.txt", "--steps", 4, "--vocab-size", 257, *shape),
            *("--batch-tokens", 512, "--eval-tokens", 512, "--val-fraction", 0.2, *COMMON),
        ],
        "fair": [*sft, "--init", "base", "--data", "fair.jsonl", "--epochs", 30, "--lr", 3e-3],
        "noisy": [*sft, "--init", "fair", "--data", "noisy.jsonl", "--epochs", 2, "--lr", 1e-3],
    }


def reinforcement(algorithm: str, seed: int) -> dict[str, list[object]]:
    """The same for what an algorithm makes of the finetuned model, and the comparison."""
    groups = ["--group", 8] if algorithm == "grpo" else []
    return {
        algorithm: [
            *("ppo", "--init", "noisy", "--prompts", "prompts.jsonl", *COMMON, "--seed", seed),
            *("--reward-fn", "addition_reward:exact", "--algorithm", algorithm, *groups),
            *("--rollout", 256, "--minibatches", 2, "--epochs", 1, "--episodes", 25600),
            *("--max-new-tokens", 5, "--missing-end-penalty", 0.0, "--lr", 1e-3),
            *("--kl-coef", 0.0, "--kl-controller", "fixed", "--kl-stop", 0.0),
            *("--eval-prompts", 64, "--eval-every", 0, "--save-every", 0),
        ],
        f"{algorithm}-result": [
            *("evaluate", "--run", "noisy", algorithm, "--prompts", "held.jsonl"),
            *("--judge", "addition_reward:exact", "--temperature", 1.0, "--max-new-tokens", 5),
            *("--dtype", "float32"),
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.acceptance_addition")
    parser.add_argument("--folder", type=Path, default=Path("runs/acceptance-addition"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "ppo"])
    parser.add_argument("--out", type=Path, help="write the results here, .json")
    options = parser.parse_args(argv)
    results = []
    for seed in options.seeds:
        results += experiment(options.folder / f"seed-{seed}", seed, options.algorithms)
    for result in results:
        print(json.dumps(result))
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(not all(r["before"] <= BEFORE and r["after"] >= AFTER for r in results))


def experiment(folder: Path, seed: int, algorithms: Sequence[str]) -> list[dict[str, Any]]:
    """Share of exact answers before and after each algorithm, and its seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, seed)
    run(preparation(), folder)
    results = []
    for algorithm in algorithms:
        start = time.monotonic()
        run(reinforcement(algorithm, seed), folder)
        seconds = round(time.monotonic() - start)
        found = json.loads((folder / f"{algorithm}-result" / "evaluate.json").read_text())
        (judged,) = found["judges"].values()
        before, after = (judged["mean_score"][name] for name in ("noisy", algorithm))
        which = {"seed": seed, "algorithm": algorithm}
        results.append(which | {"before": before, "after": after, "seconds": seconds})
    return results


def run(stages: dict[str, list[object]], folder: Path) -> None:
    for name, (module, *words) in stages.items():
        command = [sys.executable, "-m", f"fastgpt.{module}", *map(str, words), "--out", name]
        done = subprocess.run(
            command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stdout[-1000:]}{done.stderr[-1000:]}")


if __name__ == "__main__":
    sys.exit(main())

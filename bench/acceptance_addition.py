"""A verifiable task: two-digit addition, where GRPO must lift the share of exact answers.

``python bench/acceptance_addition.py --out DIR`` finetunes a small model on sums of which most are
wrong, lets GRPO see only whether an answer is exact, and prints that share on pairs of numbers that
neither has seen, sampled at temperature 1, before and after. It fails unless it goes from at most
.55 to at least .8.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

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

    prompts = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in known[:6000] + held]
    files = {
        "fair": [chat(a, b, 0.2) for a, b in known],
        "noisy": [chat(a, b, 0.6) for a, b in known],
        "prompts": prompts,
    }
    for name, lines in files.items():
        (out / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = "\n<|endoftext|>\n".join(f"{a}+{b}={a + b}" for a, b in known[:200])
    (out / "text.txt").write_text(text)
    (out / "addition_reward.py").write_text(REWARD)


def stages(seed: int) -> dict[str, list[object]]:
    """Module -> arguments, in order; a second finetuning brings the errors in."""
    shape = ["--n-layer", 2, "--n-head", 4, "--n-embd", 128, "--context", 32]
    sft = ["sft", *COMMON, "--batch-tokens", 2048, "--eval-every", 500]
    return {
        "base": [
            *("pretrain", "--data", "text.txt", "--steps", 4, "--vocab-size", 257, *shape),
            *("--batch-tokens", 512, "--eval-tokens", 512, "--val-fraction", 0.2, *COMMON),
        ],
        "fair": [*sft, "--init", "base", "--data", "fair.jsonl", "--epochs", 30, "--lr", 3e-3],
        "noisy": [*sft, "--init", "fair", "--data", "noisy.jsonl", "--epochs", 2, "--lr", 1e-3],
        "rl": [
            *("ppo", "--init", "noisy", "--prompts", "prompts.jsonl", *COMMON, "--seed", seed),
            *("--reward-fn", "addition_reward:exact", "--algorithm", "grpo", "--group", 8),
            *("--rollout", 256, "--minibatches", 2, "--epochs", 1, "--episodes", 25600),
            *("--max-new-tokens", 5, "--missing-end-penalty", 0.0, "--lr", 1e-3),
            *("--kl-coef", 0.0, "--kl-controller", "fixed", "--kl-stop", 0.0),
            *("--eval-prompts", 400, "--eval-every", 20, "--save-every", 0),
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty directory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_data(options.out, options.seed)
    start = time.monotonic()
    for name, (module, *words) in stages(options.seed).items():
        command = [sys.executable, "-m", f"fastgpt.{module}", *map(str, words), "--out", name]
        subprocess.run(command, cwd=options.out, env=ENVIRONMENT, check=True)
        print(f"{name}: {time.monotonic() - start:.0f} s since the start")
    lines = (options.out / "rl" / "samples.jsonl").read_text().splitlines()
    scores = [json.loads(line)["val_score"] for line in lines]
    result = {"seed": options.seed, "before": scores[0], "after": scores[-1]}
    print(json.dumps(result))
    return int(not (scores[0] <= BEFORE and scores[-1] >= AFTER))


if __name__ == "__main__":
    sys.exit(main())

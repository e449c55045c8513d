"""What the tests of reward and DPO commands share: a finetuned run, rankings, and their options."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path

from commands import Done, Shell

OPTIONS = (
    *("--batch-prompts", 6, "--micro-batch", 4, "--no-compile", "--dtype", "float32"),
    *("--sample-tokens", 6, "--log-every", 1, "--eval-every", 8, "--seed", 7, "--warmup", 2),
)
PLACES = ("barn", "river", "garden")


def rankings(n: int = 60, seed: int = 5) -> str:
    """The barn is better than the river, the river than the garden; K is 2 or 3, some with ties."""
    rng = random.Random(seed)
    lines = []
    for i in range(n):
        prompt = f"{rng.choice(['cat', 'dog', 'owl'])} {i}?"
        order = list(range(3))
        rng.shuffle(order)
        order = order[: rng.randint(2, 3)]
        scores = [float(2 - p) for p in order]
        if i % 7 == 0:
            scores[-1] = scores[0]
        responses = [PLACES[p] + "." for p in order]
        lines.append(json.dumps({"prompt": prompt, "responses": responses, "scores": scores}))
    return "\n".join(lines)


def finetuned(shell: Shell, base: Path, out: Path) -> Path:
    """A run of a few steps of SFT on answers of all kinds."""
    rng = random.Random(3)
    records = [{"prompt": f"owl {i}?", "response": rng.choice(PLACES) + "."} for i in range(40)]
    data = out.with_suffix(".jsonl")
    data.write_text("\n".join(map(json.dumps, records)))
    done = shell.run(
        *("sft", "--init", base, "--data", data, "--out", out, "--steps", 12),
        *("--batch-tokens", 128, "--no-compile", "--dtype", "float32", "--seed", 7),
    )
    assert done.status == 0, done.out
    return out


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(first: Path, second: Path, step: int) -> None:
    one, two = (run / "checkpoints" / f"step_{step}" for run in (first, second))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()


def on_two(shell: Shell, module: str, *arguments: object) -> list[Done]:
    """The command on two ranks as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        shell.start(module, *arguments, env={**world, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    return [Done(rank.wait(), rank.out) for rank in ranks]

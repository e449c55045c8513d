"""Runs as the tests make, read and compare them, and the data of the stages behind pretraining."""

from __future__ import annotations

import json
import random
import socket
from dataclasses import dataclass
from pathlib import Path

from commands import Command, Done, Shell

QUIET = ("--no-compile", "--dtype", "float32", "--log-every", 1, "--seed", 7)
SFT = (*QUIET, "--batch-tokens", 128, "--sample-tokens", 8, "--eval-every", 8, "--warmup", 2)
RANKED = (
    *(*QUIET, "--batch-prompts", 6, "--micro-batch", 4, "--sample-tokens", 6),
    *("--eval-every", 8, "--warmup", 2),
)
PPO = (
    *(*QUIET, "--rollout", 8, "--minibatches", 2, "--epochs", 2, "--max-new-tokens", 8),
    *("--steps", 11, "--eval-every", 4, "--save-every", 0, "--eval-prompts", 4, "--lr", 1e-2),
    *("--kl-stop", 0),
)
ANIMALS, PLACES = ("cat", "dog", "owl"), ("barn", "river", "garden")


def log(run: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def assert_same_run(first: Path, second: Path, step: int) -> None:
    """The bytes of everything that training decides."""
    one, two = (run / "checkpoints" / f"step_{step}" for run in (first, second))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    samples = first / "samples.jsonl"
    if samples.exists():
        assert samples.read_bytes() == (second / "samples.jsonl").read_bytes()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Stage:
    """The command of a stage that starts from a run, and what a new run of it is given."""

    shell: Shell
    module: str
    init: Path
    flag: str
    """Of the data."""
    data: Path
    options: tuple[object, ...]

    def words(self, *more: object) -> list[object]:
        """Arguments of the command: a resumed run has the options of its beginning."""
        start = ("--init", self.init, self.flag, self.data, *self.options)
        return [*(() if "--resume" in more else start), *more]

    def start(self, *more: object) -> Command:
        return self.shell.start(self.module, *self.words(*more))

    def __call__(self, *more: object, expect: int = 0) -> Done:
        """Run the command; fails unless it exits as expected."""
        command = self.start(*more)
        done = Done(command.wait(), command.out)
        assert done.status == expect, done.out
        return done

    def on_two(self, *more: object, expect: int = 0) -> str:
        """Run on two ranks as torchrun starts them; returns what rank 0 printed."""
        ranks = self.shell.ranks(2, free_port(), self.module, *self.words(*more))
        statuses = [rank.wait() for rank in ranks]
        assert statuses == [expect, expect], "\n".join(rank.out for rank in ranks)
        assert ranks[1].out == "", "rank 1 is to be silent"
        return ranks[0].out


def assert_refused(done: Done, out: Path, status: int, message: str) -> None:
    """One line says what is wrong, and no directory is left behind with something in it."""
    assert done.status == status, done.out
    assert len(done.errors) == 1
    assert message in done.errors[0]
    assert not out.exists() or list(out.iterdir()) == []


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def chats(n: int = 80, seed: int = 5) -> list[dict]:
    """Short chats, some of two turns."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        messages = [
            {"role": "user", "content": f"{rng.choice(ANIMALS)}?"},
            {"role": "assistant", "content": f"{rng.choice(PLACES)}."},
        ]
        found.append({"messages": messages * rng.randint(1, 2)})
    return found


def answers(n: int = 40, seed: int = 3) -> list[dict]:
    """Numbered questions with answers of all kinds."""
    rng = random.Random(seed)
    return [{"prompt": f"owl {i}?", "response": f"{rng.choice(PLACES)}."} for i in range(n)]


def rankings(n: int = 60, seed: int = 5) -> list[dict]:
    """The barn is better than the river, the river than the garden; K is 2 or 3, some with ties."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        prompt = f"{rng.choice(ANIMALS)} {i}?"
        order = list(range(3))
        rng.shuffle(order)
        order = order[: rng.randint(2, 3)]
        scores = [float(2 - p) for p in order]
        if i % 7 == 0:
            scores[-1] = scores[0]
        responses = [PLACES[p] + "." for p in order]
        found.append({"prompt": prompt, "responses": responses, "scores": scores})
    return found


def prompts() -> list[dict]:
    return [{"prompt": f"{animal} {n}?", "answer": n} for animal in ANIMALS for n in range(7)]

"""Shared by the tests of whole commands: texts, a server of processes, runs used by several tests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Command, Server

TINY = (
    *("--n-layer", 2, "--n-head", 2, "--n-embd", 32, "--vocab-size", 300, "--context", 32),
    *("--batch-tokens", 128, "--no-compile", "--dtype", "float32", "--sample-tokens", 8),
    *("--log-every", 1, "--eval-every", 8, "--eval-tokens", 1024, "--seed", 7),
)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    out: str

    @property
    def errors(self) -> list[str]:
        """The lines with which the command said what is wrong."""
        return [line for line in self.out.splitlines() if line.startswith("fastgpt: ")]


@dataclass(frozen=True)
class Shell:
    """Runs commands in one directory."""

    server: Server
    cwd: Path

    def start(self, module: str, *arguments: object, **options) -> Command:
        return self.server.start(f"fastgpt.{module}", *arguments, cwd=self.cwd, **options)

    def run(self, module: str, *arguments: object, **options) -> Done:
        command = self.start(module, *arguments, **options)
        return Done(command.wait(), command.out)

    def pretrain(self, *arguments: object, expect: int = 0, **options) -> Done:
        """A pretraining run of the tiny model on the corpus; fails unless it exits as expected."""
        done = self.run("pretrain", *arguments, **options)
        assert done.status == expect, done.out
        return done

    def ranks(self, size: int, port: int, *arguments: object) -> list[Command]:
        """Start ``pretrain`` as torchrun does, in ``size`` processes."""
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            self.start("pretrain", *arguments, env={**world, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(size)
        ]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with question-and-answer prose: ``my.txt`` and ``other/*.jsonl``, about 60 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(11)
    animals = ["cat", "dog", "owl", "fox", "hen", "cow"]
    places = ["garden", "kitchen", "forest", "river", "barn"]
    colours = ["red", "grey", "white", "black"]

    def text() -> str:
        lines = []
        for _ in range(rng.randint(2, 6)):
            animal, place, colour = rng.choice(animals), rng.choice(places), rng.choice(colours)
            lines.append(f"Q: Where does the {colour} {animal} sleep? A: In the {place}, it says.")
            lines.append(f"The {animal} is {colour} — and it's {rng.randint(2, 99)} years old.")
        return "\n".join(lines)

    texts = "\n<|endoftext|>\n".join(text() for _ in range(80))
    (folder / "my.txt").write_text(texts, encoding="utf-8")
    (folder / "other").mkdir()
    for name in ("a", "b"):
        records = [json.dumps({"text": text(), "id": i}) for i in range(40)]
        (folder / "other" / f"{name}.jsonl").write_text("\n".join(records), encoding="utf-8")
    return folder


@pytest.fixture
def shell(server: Server, corpus: Path) -> Shell:
    return Shell(server, corpus)


@pytest.fixture(scope="session")
def base_run(server: Server, corpus: Path, tmp_path_factory) -> tuple[Path, str]:
    """A finished run of 24 steps on all files of the corpus, never to be changed; its output."""
    out = tmp_path_factory.mktemp("base") / "run"
    files = ["my.txt", *sorted(str(p.relative_to(corpus)) for p in corpus.glob("other/*.jsonl"))]
    arguments = ["--data", *files, "--out", out, "--steps", 24, *TINY]
    return out, Shell(server, corpus).pretrain(*arguments).out


@pytest.fixture
def fresh(base_run: tuple[Path, str], tmp_path: Path) -> Callable[[str], Path]:
    """Copy of the base run under a name, to be damaged."""
    import shutil

    def copy(name: str = "copy") -> Path:
        return Path(shutil.copytree(base_run[0], tmp_path / name))

    return copy

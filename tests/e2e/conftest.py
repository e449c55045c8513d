"""Shared by the tests of whole commands: texts, a server of processes, a run for several tests."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import TINY, Server, Shell
from runs import PPO, RANKED, SFT, Stage, answers, chats, prompts, rankings, write


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

    def copy(name: str = "copy") -> Path:
        return Path(shutil.copytree(base_run[0], tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The data of the later stages, and a directory with a reward function to run PPO in."""
    folder = tmp_path_factory.mktemp("stages")
    data = {"chats": chats(), "answers": answers(), "rankings": rankings(), "prompts": prompts()}
    for name, records in data.items():
        write(folder / f"{name}.jsonl", records)
    (folder / "letters.py").write_text(
        "def vowels(prompts, responses, references):\n"
        "    assert all(p[-1]['role'] == 'user' for p in prompts)\n"
        "    assert len(prompts) == len(references)\n"
        "    return [sum(c in 'aeiou' for c in text) for text in responses]\n"
    )
    return folder


@pytest.fixture(scope="session")
def sft(server, corpus, base_run, folder) -> Stage:
    shell = Shell(server, corpus)
    return Stage(shell, "sft", base_run[0], "--data", folder / "chats.jsonl", SFT)


@pytest.fixture(scope="session")
def sft_run(sft, folder) -> Path:
    """A few steps of finetuning on answers of all kinds."""
    run = folder / "sft"
    sft("--data", folder / "answers.jsonl", "--out", run, "--steps", 12)
    return run


@pytest.fixture(scope="session")
def reward(server, corpus, sft_run, folder) -> Stage:
    shell, options = Shell(server, corpus), (*RANKED, "--norm-samples", 20)
    return Stage(shell, "reward", sft_run, "--data", folder / "rankings.jsonl", options)


@pytest.fixture(scope="session")
def reward_run(reward, folder) -> Path:
    """A reward model of a few steps."""
    run = folder / "reward"
    reward("--out", run, "--norm-samples", 8)
    return run


@pytest.fixture(scope="session")
def dpo(server, corpus, sft_run, folder) -> Stage:
    shell, options = Shell(server, corpus), (*RANKED, "--lr", 1e-3)
    return Stage(shell, "dpo", sft_run, "--data", folder / "rankings.jsonl", options)


@pytest.fixture(scope="session")
def ppo(server, sft_run, reward_run, folder) -> Stage:
    """To be given ``--reward reward``, ``--reward-fn letters:vowels``, or both."""
    return Stage(Shell(server, folder), "ppo", sft_run, "--prompts", folder / "prompts.jsonl", PPO)

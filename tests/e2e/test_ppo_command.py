"""``python -m fastgpt.ppo`` as a command: all algorithms, resume in mid-epoch, two processes."""

from __future__ import annotations

import json
import random
import signal
import socket
import tomllib
from pathlib import Path

import pytest
import torch
from commands import Done, Shell

from fastgpt.run import load_model

QUIET = ("--no-compile", "--dtype", "float32", "--log-every", 1, "--seed", 7)
OPTIONS = (
    *("--rollout", 8, "--minibatches", 2, "--epochs", 2, "--max-new-tokens", 8, "--steps", 11),
    *(
        "--eval-every",
        4,
        "--save-every",
        0,
        "--eval-prompts",
        4,
        "--lr",
        1e-2,
        "--kl-stop",
        0,
        *QUIET,
    ),
)
REWARD = """
def vowels(prompts, responses, references):
    assert all(p[-1]["role"] == "user" for p in prompts) and len(prompts) == len(references)
    return [sum(c in "aeiou" for c in text) for text in responses]
"""


@pytest.fixture(scope="module")
def start(server, corpus, base_run, tmp_path_factory) -> dict[str, Path]:
    """A finetuned run, a reward run, prompts; a directory with a reward function."""
    folder = tmp_path_factory.mktemp("start")
    rng = random.Random(5)
    animals, places = ["cat", "dog", "owl"], ["barn", "river", "garden"]
    chats = [{"prompt": f"{rng.choice(animals)}?", "response": f"{rng.choice(places)}."}] * 40
    rankings = [
        {"prompt": f"{a}?", "responses": [f"{b}.", f"{b}{b}", "no"]}
        for a in animals
        for b in places
    ] * 3
    prompts = [{"prompt": f"{a} {n}?", "answer": n} for a in animals for n in range(7)]
    for name, lines in (("chats", chats), ("rankings", rankings), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "letters.py").write_text(REWARD)
    shell = Shell(server, folder)
    for stage, words in (
        ("sft", ["--init", base_run[0], "--data", "chats.jsonl", "--steps", 12]),
        ("reward", ["--init", "sft", "--data", "rankings.jsonl", "--norm-samples", 8]),
    ):
        options = ["--out", stage, "--batch-tokens", 256, "--sample-tokens", 8, *QUIET]
        done = shell.run(stage, *words, *options)
        assert done.status == 0, done.out
    return {name: folder / name for name in ("sft", "reward", "prompts.jsonl")} | {"": folder}


@pytest.fixture
def ppo(server, start):
    """Runs the command; fails unless it exits as expected."""

    def run(*arguments: object, expect: int = 0, **options) -> Done:
        new = () if "--resume" in arguments else ("--init", "sft", "--prompts", "prompts.jsonl")
        new = (*new, *OPTIONS) if new else ()
        done = Shell(server, start[""]).run("ppo", *new, *arguments, **options)
        assert done.status == expect, done.out
        return done

    return run


MODEL, FUNCTION = ("--reward", "reward"), ("--reward-fn", "letters:vowels")


def log(run: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def assert_same_run(first: Path, second: Path, step: int) -> None:
    one, two = (run / "checkpoints" / f"step_{step}" for run in (first, second))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.fixture(scope="module")
def finished(server, start) -> tuple[Path, str]:
    """A run with a reward model and a function to its end, never to be changed; its output."""
    arguments = ("--init", "sft", "--prompts", "prompts.jsonl", "--out", "whole", *OPTIONS)
    judge = ("--judge", "letters:vowels")
    done = Shell(server, start[""]).run("ppo", *arguments, *MODEL, *FUNCTION, *judge)
    assert done.status == 0, done.out
    return start[""] / "whole", done.out


def test_a_run_says_what_happened(finished):
    run, out = finished
    records = log(run)
    assert [record["step"] for record in records] == list(range(1, 12))
    assert [record["rollouts"] for record in records] == [1] * 4 + [2] * 4 + [3] * 3
    for name in ("kl", "kl_coef", "entropy", "length", "eos_rate", "distinct_2", "score"):
        assert all(isinstance(record[name], float) for record in records), name
    for first in (0, 4, 8):  # of each rollout
        assert records[first]["ratio"] == pytest.approx(1, abs=1e-5)
        assert records[first]["clip_fraction"] == 0
    assert records[0]["kl"] == pytest.approx(0, abs=1e-4)  # the policy is the reference
    assert records[8]["kl"] != 0
    samples = log(run, "samples")
    assert [line["step"] for line in samples] == [0, 4, 8, 11]
    assert all(line["prompt_0"] == samples[0]["prompt_0"] for line in samples)
    assert "17 prompts, 4 held out; 11 steps, a rollout of 8 responses every 4" in out
    assert "held-out score" in out
    page = (run / "report.html").read_text()
    assert "[step 0]" in page
    assert "[step 11]" in page
    for record in (records[3], records[-1]):
        judge = record["val_judge"]
        assert judge == next(s["val_judge"] for s in samples if s["step"] == record["step"])


def test_the_run_is_opened_as_its_policy(finished, start):
    policy, tokenizer = load_model(finished[0], device="cpu", dtype="float32")
    before, its = load_model(start["sft"], device="cpu", dtype="float32")
    assert tokenizer.hash == its.hash
    assert not torch.equal(policy.wte.weight, before.wte.weight)
    parts = {path.stem for path in (finished[0] / "checkpoints/step_11").glob("*.safetensors")}
    assert parts == {"model", "value", "optimizer", "stage"}
    config = tomllib.loads((finished[0] / "config.toml").read_text())
    assert config["train"]["steps"] == 11
    assert config["model"]["vocab_size"] == tokenizer.vocab_size


VARIANTS = {
    "ppo": [*MODEL, "--ptx-coef", 1.0, "--ptx-batch", 2, "--micro-batch", 3],
    "grpo": [*FUNCTION, "--algorithm", "grpo", "--group", 4],
    "rloo": [*FUNCTION, "--algorithm", "rloo", "--group", 4],
    "reinforce": [*MODEL, "--algorithm", "reinforce", "--kl-stop", 1e-3],
    "bfloat16": [*MODEL, "--dtype", "bfloat16"],
}
FULL = pytest.mark.full


@pytest.mark.parametrize(
    "variant",
    ["ppo", "grpo", *(pytest.param(v, marks=FULL) for v in ("rloo", "reinforce", "bfloat16"))],
)
def test_a_resumed_run_equals_an_uninterrupted_one(variant, ppo, tmp_path):
    """Steps 3 and 5 are in the middle of a rollout, 8 is at the end of one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = VARIANTS[variant]
    ppo("--out", whole, *options, "--stop-at", 10, expect=75)
    ppo("--out", parts, *options, "--stop-at", 3, expect=75)
    for step in (5, 8, 10):
        ppo("--resume", parts, "--stop-at", step, expect=75)
    assert_same_run(whole, parts, 10)


def test_the_end_is_the_same_after_a_resume(finished, ppo, tmp_path):
    run = tmp_path / "run"
    judge = ("--judge", "letters:vowels")
    ppo("--out", run, *MODEL, *FUNCTION, *judge, "--stop-at", 6, expect=75)
    out = ppo("--resume", run).out
    assert_same_run(finished[0], run, 11)
    assert out.splitlines()[-2] == finished[1].splitlines()[-2]


def test_a_signal_saves_and_ends_the_run(server, start, ppo, tmp_path):
    run = tmp_path / "run"
    arguments = ("--init", "sft", "--prompts", "prompts.jsonl", *OPTIONS, "--steps", 3000)
    command = Shell(server, start[""]).start("ppo", *arguments, *FUNCTION, "--out", run)
    command.wait_until(lambda: "ppo 1/" in command.out)
    command.send(signal.SIGTERM)
    assert command.wait() == 75, command.out
    stopped = log(run)[-1]["step"]
    assert command.out.splitlines()[-1].startswith(
        f"fastgpt: stopped after step {stopped} of 3000; go on with --resume {run}"
    )
    ppo("--resume", run, "--stop-at", stopped + 1, expect=75)
    assert log(run)[-1]["step"] == stopped + 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_ranks(server, start, *arguments: object) -> list[int]:
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shell = Shell(server, start[""])
    commands = [
        shell.start("ppo", *arguments, env={**world, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    statuses = [command.wait() for command in commands]
    assert commands[1].out == "", commands[1].out
    return statuses


def test_two_processes_are_one_and_resume(server, start, ppo, tmp_path):
    """Each samples, scores and learns from its half of the rows."""
    one, two, parts = tmp_path / "one", tmp_path / "two", tmp_path / "parts"
    ppo("--out", one, *MODEL, "--stop-at", 6, expect=75)
    new = ("--init", "sft", "--prompts", "prompts.jsonl", *OPTIONS, *MODEL)
    assert two_ranks(server, start, *new, "--out", two, "--stop-at", 6) == [75, 75]
    assert two_ranks(server, start, *new, "--out", parts, "--stop-at", 3) == [75, 75]
    assert two_ranks(server, start, "--resume", parts, "--stop-at", 6) == [75, 75]
    assert_same_run(two, parts, 6)
    for a, b in zip(log(one), log(two), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
        assert a["score"] == pytest.approx(b["score"], rel=1e-4)
    assert log(one, "samples")[0]["response_0"] == log(two, "samples")[0]["response_0"]


BAD = {
    "nothing to learn from": ([], 2, "nothing to learn from; give --reward RUN or --reward-fn"),
    "no such function": (["--reward-fn", "letters:none"], 2, "--reward-fn letters:none"),
    "no reward run": (["--reward", "sft"], 2, "no reward model was saved there"),
    "no chat model": ([*FUNCTION, "--init", "BASE"], 2, "the model was not finetuned on chats"),
    "no room": ([*FUNCTION, "--max-new-tokens", "30"], 3, "no prompt leaves room"),
    "too long": ([*FUNCTION, "--max-new-tokens", "25", "--on-long", "error"], 3, ".jsonl:1: "),
    "an odd rollout": ([*FUNCTION, "--rollout", "9"], 2, "--rollout 9 is not a multiple"),
    "no text": ([*FUNCTION, "--ptx-coef", "1", "--ptx-data", "nowhere"], 2, "nowhere: not a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line(case, ppo, base_run, tmp_path):
    arguments, status, message = BAD[case]
    arguments = [base_run[0] if word == "BASE" else word for word in arguments]
    done = ppo(*arguments, "--out", tmp_path / "run", expect=status)
    assert len(done.errors) == 1
    assert message in done.errors[0]
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


def test_other_prompts_cannot_be_resumed(server, start, ppo, tmp_path):
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text(start["prompts.jsonl"].read_text())
    ppo("--out", run, *FUNCTION, "--prompts", prompts, "--stop-at", 2, expect=75)
    prompts.write_text(start["prompts.jsonl"].read_text().replace("cat", "cow"))
    done = ppo("--resume", run, expect=3)
    assert "--prompts are not what this run began with" in done.errors[0]

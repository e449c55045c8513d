"""``python -m fastgpt.ppo`` as a command: all algorithms, resume in mid-epoch, two processes."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from runs import assert_refused, assert_same_run, log

from fastgpt.checkpoint import load_checkpoint
from fastgpt.run import load_model

MODEL, FUNCTION = ("--reward", "reward"), ("--reward-fn", "letters:vowels")
JUDGE = ("--judge", "letters:vowels")


@pytest.fixture(scope="module")
def finished(ppo, tmp_path_factory) -> tuple[Path, str]:
    """A run with a reward model and a function to its end, never to be changed; its output."""
    run = tmp_path_factory.mktemp("ppo") / "run"
    return run, ppo("--out", run, *MODEL, *FUNCTION, *JUDGE).out


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


def test_the_run_is_opened_as_its_policy(finished, sft_run):
    policy, tokenizer = load_model(finished[0], device="cpu", dtype="float32")
    before, its = load_model(sft_run, device="cpu", dtype="float32")
    assert tokenizer.hash == its.hash
    assert not torch.equal(policy.wte.weight, before.wte.weight)
    parts = {path.stem for path in (finished[0] / "checkpoints/step_11").glob("*.safetensors")}
    assert parts == {"model", "value", "optimizer", "stage"}
    config = tomllib.loads((finished[0] / "config.toml").read_text())
    assert config["train"]["steps"] == 11
    assert config["model"]["vocab_size"] == tokenizer.vocab_size


def test_the_value_model_begins_as_the_reward_model(ppo, reward_run, tmp_path):
    """With its normalisation: values are in the units of the scores."""
    run = tmp_path / "run"
    ppo("--out", run, *MODEL, "--steps", 1, "--lr", 1e-12)
    value = load_checkpoint(run / "checkpoints").tensors["value"]
    reward = load_checkpoint(reward_run / "checkpoints").tensors["reward"]
    assert value.keys() == reward.keys()
    assert reward["gain"] != 1
    for name in reward:
        torch.testing.assert_close(value[name], reward[name], atol=1e-6, rtol=1e-6)


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
    [pytest.param(v, marks=() if v == "ppo" else FULL) for v in VARIANTS],
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
    ppo("--out", run, *MODEL, *FUNCTION, *JUDGE, "--stop-at", 6, expect=75)
    out = ppo("--resume", run).out
    assert_same_run(finished[0], run, 11)
    assert out.splitlines()[-2] == finished[1].splitlines()[-2]


def test_nothing_need_be_held_out(ppo, tmp_path):
    out = ppo("--out", tmp_path / "run", *FUNCTION, "--eval-prompts", 0, "--steps", 1).out
    assert "held-out score" not in out
    assert "report" in out.splitlines()[-1]


def test_two_processes_are_one_and_resume(ppo, tmp_path):
    """Each samples, scores and learns from its half of the rows, and of the pretraining text."""
    one, two, parts = tmp_path / "one", tmp_path / "two", tmp_path / "parts"
    options = [*MODEL, "--ptx-coef", 0.5, "--ptx-batch", 4]
    ppo("--out", one, *options, "--stop-at", 6, expect=75)
    ppo.on_two("--out", two, *options, "--stop-at", 6, expect=75)
    ppo.on_two("--out", parts, *options, "--stop-at", 3, expect=75)
    ppo.on_two("--resume", parts, "--stop-at", 6, expect=75)
    assert_same_run(two, parts, 6)
    for a, b in zip(log(one), log(two), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
        assert a["score"] == pytest.approx(b["score"], rel=1e-4)
    assert log(one, "samples")[0]["response_0"] == log(two, "samples")[0]["response_0"]


BAD = {
    "nothing to learn from": ([], 2, "nothing to learn from; give --reward RUN or --reward-fn"),
    "no such function": (["--reward-fn", "letters:none"], 2, "--reward-fn letters:none"),
    "a judge that is not there": (
        [*FUNCTION, "--judge", "none"],
        2,
        "--judge none: no such directory",
    ),
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
    assert_refused(done, tmp_path / "run", status, message)


@pytest.mark.parametrize("what", ["tokenizer", "context"])
def test_a_reward_model_of_another_family_is_refused(what, ppo, reward_run, base_run, tmp_path):
    """Its scores would be of other texts, or end in an index error where its positions do."""
    other = Path(shutil.copytree(reward_run, tmp_path / "other"))
    if what == "tokenizer":
        shutil.copy(base_run[0] / "tokenizer.json", other)
        message = "its tokenizer is not that of --init"
    else:
        config = (other / "config.toml").read_text()
        assert "context = 32" in config
        (other / "config.toml").write_text(config.replace("context = 32", "context = 16"))
        message = "its context of 16 is shorter than that of --init, 32"
    done = ppo("--reward", other, "--out", tmp_path / "run", expect=2)
    assert_refused(done, tmp_path / "run", 2, f"--reward {other}: {message}")


@pytest.mark.parametrize("which", ["--reward", pytest.param("--init", marks=FULL)])
def test_other_weights_cannot_be_resumed(which, ppo, sft_run, reward_run, dpo, reward, tmp_path):
    """Somebody trained again under the same path; one of two processes says so."""
    run, at = tmp_path / "run", tmp_path / "model"
    shutil.copytree(reward_run if which == "--reward" else sft_run, at)
    named = {"--reward": reward_run, "--init": sft_run} | {which: at}
    words = [word for pair in named.items() for word in pair]
    ppo("--out", run, *words, "--stop-at", 3, expect=75)
    before = (run / "metrics.jsonl").read_bytes()
    aside = at.rename(tmp_path / "aside")
    (reward if which == "--reward" else dpo)("--steps", 1, "--out", at)
    last = ppo.on_two("--resume", run, expect=2).splitlines()[-1]
    message = f"fastgpt: {which} {at}: the weights there are not those that this run began with; "
    assert last.startswith(message)
    assert (run / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(at)
    aside.rename(at)
    ppo("--resume", run, "--stop-at", 4, expect=75)

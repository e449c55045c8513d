"""``python -m fastgpt.dpo`` as a command."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import pytest
import torch
from commands import Shell
from runs import RANKED, assert_refused, assert_same_run, log, write

from fastgpt.checkpoint import load_checkpoint
from fastgpt.run import load_model


def hashes(run: Path) -> dict[str, str]:
    files = [path for path in run.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(dpo, sft_run, tmp_path_factory) -> tuple[Path, str]:
    """A run to its end, never to be changed; its output."""
    run = tmp_path_factory.mktemp("dpo") / "run"
    before = hashes(sft_run)
    out = dpo("--out", run, "--epochs", 4, "--save-every", 9, "--keep-last", 0).out
    assert hashes(sft_run) == before, "the reference stays what it was"
    return run, out


def test_a_run_learns_what_is_better(finished):
    run, out = finished
    records = log(run)
    assert records[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    assert records[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert records[0]["accuracy"] == pytest.approx(0.5, abs=0.5)
    assert records[-1]["reward_margin"] > records[1]["reward_margin"]
    assert records[-1]["val_accuracy"] > 0.8
    assert records[-1]["val_loss"] < records[0]["loss"]
    assert records[-1]["log_prob_chosen"] > records[-1]["log_prob_rejected"]
    assert "49 rankings with " in out
    assert out.count("\n> ") == 4
    assert f"val loss {records[-1]['val_loss']:.4f}, accuracy" in out
    assert (run / "report.html").is_file()


def test_the_reference_is_the_same_in_every_checkpoint(finished):
    steps = [load_checkpoint(finished[0] / "checkpoints", step) for step in (9, 18, 33)]
    for checkpoint in steps[1:]:
        for name, tensor in checkpoint.tensors["stage"].items():
            assert torch.equal(tensor, steps[0].tensors["stage"][name])
    moved = [c.tensors["model"]["wte.weight"] for c in steps]
    assert not torch.equal(moved[0], moved[1])


def test_the_run_is_opened_like_any_other(finished, sft_run):
    model, tokenizer = load_model(finished[0], device="cpu", dtype="float32")
    assert tokenizer.hash == load_model(sft_run, device="cpu")[1].hash
    config = tomllib.loads((finished[0] / "config.toml").read_text())
    assert config["model"] == tomllib.loads((sft_run / "config.toml").read_text())["model"]
    assert config["train"]["steps"] == 33
    assert model.config.vocab_size == tokenizer.vocab_size


def test_a_resumed_run_equals_an_uninterrupted_one(dpo, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--epochs", 3, "--label-smoothing", 0.1]
    dpo("--out", whole, *options, "--stop-at", 11, expect=75)
    dpo("--out", parts, *options, "--stop-at", 4, expect=75)
    dpo("--resume", parts, "--stop-at", 11, expect=75)
    assert_same_run(whole, parts, 11)


@pytest.mark.full
def test_nothing_need_be_held_out(dpo, tmp_path):
    out = dpo("--out", tmp_path / "run", "--val-fraction", 0, "--steps", 1).out
    assert "val loss" not in out
    assert "report" in out.splitlines()[-1]


def test_the_end_is_the_same_after_a_resume(finished, dpo, tmp_path):
    run = tmp_path / "run"
    options = ("--epochs", 4, "--save-every", 9, "--keep-last", 0)
    dpo("--out", run, *options, "--stop-at", 29, expect=75)
    out = dpo("--resume", run).out
    assert_same_run(finished[0], run, 33)
    said = [[line for line in text.splitlines() if line[:1] == ">"] for text in (out, finished[1])]
    assert said[0] == said[1]


def test_two_processes_train_as_one_does(dpo, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--steps", 6, "--batch-prompts", 7)
    dpo("--out", one, *options)
    dpo.on_two("--out", two, *options)
    for a, b in zip(log(one), log(two), strict=True):
        assert a.keys() == b.keys()
        for key in set(a) - {"accuracy"}:  # at first every lead is a rounding error
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5), key


BAD = {
    "a base model": (["--init", "BASE"], 2, "the model was not finetuned on chats"),
    "nothing but ties": (["--init", "SFT", "--data", "t.jsonl"], 3, "no ranking has a response"),
    "beta": (["--init", "SFT", "--beta", "0"], 2, "--beta 0: it must be above 0"),
    "smoothing": (["--init", "SFT", "--label-smoothing", "0.5"], 2, "below 0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line(case, server, base_run, sft_run, tmp_path):
    arguments, status, message = BAD[case]
    tied = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}
    write(tmp_path / "t.jsonl", [tied] * 3)
    runs = {"BASE": base_run[0], "SFT": sft_run}
    arguments = [runs.get(word, word) for word in arguments]
    done = Shell(server, tmp_path).run("dpo", *arguments, *RANKED, "--out", "run")
    assert_refused(done, tmp_path / "run", status, message)

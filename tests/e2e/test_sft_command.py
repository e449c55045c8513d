"""``python -m fastgpt.sft`` and ``python -m fastgpt.export`` as commands."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from commands import Shell
from runs import SFT, assert_refused, assert_same_run, log, write

from fastgpt.run import load_model


@pytest.fixture(scope="module")
def finished(sft, tmp_path_factory) -> tuple[Path, str]:
    """A run to its end, never to be changed; its output."""
    run = tmp_path_factory.mktemp("sft") / "run"
    return run, sft("--out", run, "--epochs", 4).out


def test_a_run_learns_to_answer(finished):
    run, out = finished
    losses = [record["loss"] for record in log(run)]
    assert losses[-1] < 0.5 * losses[0]
    assert "76 chats in " in out
    assert "4 chats held out" in out
    assert out.count("\n> ") == 4
    assert f"val loss {log(run)[-1]['val_loss']:.4f} nats/token" in out
    assert (run / "report.html").is_file()


def test_the_configuration_says_what_was_decided(finished, base_run, sft):
    run, _ = finished
    config = tomllib.loads((run / "config.toml").read_text())
    base = tomllib.loads((base_run[0] / "config.toml").read_text())
    assert config["model"] == base["model"] | {"vocab_size": base["model"]["vocab_size"] + 4}
    assert config["train"]["steps"] == len(log(run))
    assert config["init"] == str(base_run[0])
    assert config["data"] == [str(sft.data)]


def test_the_run_is_opened_like_any_other(finished, base_run):
    model, tokenizer = load_model(finished[0], device="cpu", dtype="float32")
    base, plain = load_model(base_run[0], device="cpu", dtype="float32")
    assert tokenizer.vocab_size == model.config.vocab_size == base.config.vocab_size + 4
    assert set(tokenizer.special_tokens) - set(plain.special_tokens) == {
        *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    }


def test_a_finetuned_run_can_be_finetuned(finished, sft, tmp_path):
    """Its vocabulary has what it needs already."""
    sft("--init", finished[0], "--out", tmp_path / "run", "--steps", 2, "--lora-rank", 2)
    first, second = (load_model(p, device="cpu")[1] for p in (finished[0], tmp_path / "run"))
    assert first.hash == second.hash
    assert log(tmp_path / "run")[0]["loss"] < log(finished[0])[2]["loss"]


def test_without_data_it_is_the_embedded_chats(base_run, shell, tmp_path):
    """Rows of the tiny model hold few of them."""
    arguments = ("--init", base_run[0], "--out", tmp_path / "run", "--on-long", "skip", *SFT)
    done = shell.run("sft", *arguments, "--steps", 2)
    assert done.status == 0, done.out
    used, left_out = (
        int(re.search(pattern, done.out)[1])  # pyright: ignore[reportOptionalSubscript]
        for pattern in (r"(\d+) chats in ", r"(\d+) chats are left out")
    )
    assert used + left_out == 5856 - round(0.05 * 5856)
    assert "chats are left out: the assistant speaks beyond --seq-len 32" in done.out


VARIANTS = {
    "all weights": [],
    "adamw": ["--optimizer", "adamw", "--micro-batch", 2, "--dtype", "bfloat16"],
    "lora": ["--lora-rank", 3],
}
FULL = pytest.mark.full


@pytest.mark.parametrize("variant", ["all weights", pytest.param("adamw", marks=FULL), "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one(variant, sft, tmp_path):
    """Also over the end of an epoch: there are 17 rows, 4 a step."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--epochs", 5, *VARIANTS[variant]]
    sft("--out", whole, *options, "--stop-at", 11, expect=75)
    sft("--out", parts, *options, "--stop-at", 6, expect=75)
    sft("--resume", parts, "--stop-at", 11, expect=75)
    assert_same_run(whole, parts, 11)


def test_the_end_is_the_same_after_a_resume(finished, sft, tmp_path):
    run = tmp_path / "run"
    sft("--out", run, "--epochs", 4, "--stop-at", 6, expect=75)
    out = sft("--resume", run).out
    assert_same_run(finished[0], run, len(log(run)))
    said = [[line for line in text.splitlines() if line[:1] == ">"] for text in (out, finished[1])]
    assert said[0] == said[1]


@pytest.mark.parametrize("options", [[], pytest.param(["--lora-rank", 2], marks=FULL)])
def test_two_processes_train_as_one_does(options, sft, tmp_path):
    """What torchrun starts; ranks have rows with unequal numbers of targets."""
    one, two = tmp_path / "one", tmp_path / "two"
    sft("--out", one, "--steps", 6, *options)
    sft.on_two("--out", two, "--steps", 6, *options)
    for a, b in zip(log(one), log(two), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert log(one)[-1]["val_loss"] == pytest.approx(log(two)[-1]["val_loss"], rel=1e-4)


def test_adapters_cannot_be_added_to_a_run(finished, sft):
    done = sft("--resume", finished[0], "--lora-rank", 2, expect=2)
    assert "has no adapters; leave it" in done.errors[0]


def test_other_chats_are_refused_and_the_run_goes_on(sft, tmp_path):
    run, other = (
        tmp_path / "run",
        write(tmp_path / "other.jsonl", [{"prompt": "a", "response": "b"}] * 9),
    )
    sft("--out", run, "--steps", 4, "--stop-at", 2, expect=75)
    done = sft("--resume", run, "--steps", 9, "--data", other, expect=3)
    assert "--data is not what this run began with" in done.errors[0]
    sft("--resume", run)
    assert log(run)[-1]["step"] == 4


BAD = {
    "no such run": (["--init", "nowhere"], 2, "nowhere: not a run directory"),
    "no such data": (["--init", "BASE", "--data", "none.jsonl"], 3, "none.jsonl: no such file"),
    "a bad line": (["--init", "BASE", "--data", "c.jsonl"], 3, "c.jsonl:2: no key 'response'"),
    "a long row": (["--init", "BASE", "--seq-len", "99"], 2, "--seq-len 99 is beyond the context"),
    "an odd batch": (["--init", "BASE", "--data", "d.jsonl", "--micro-batch", "3"], 2, "multiple"),
    "one chat": (["--init", "BASE", "--data", "e.jsonl"], 3, "give more, or --val-fraction 0"),
    "all too long": (
        *(["--init", "BASE", "--data", "f.jsonl", "--on-long", "skip"], 3),
        "no chat is left to learn from; give shorter ones, or raise --seq-len",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line(case, server, base_run, sft, tmp_path):
    arguments, status, message = BAD[case]
    chat = {"prompt": "a", "response": "b"}
    write(tmp_path / "c.jsonl", [chat, {"prompt": "x"}])
    (tmp_path / "d.jsonl").write_text(sft.data.read_text())
    write(tmp_path / "e.jsonl", [chat])
    long = [{"role": "user", "content": "cat " * 40}, {"role": "assistant", "content": "a"}]
    write(tmp_path / "f.jsonl", [{"messages": long}] * 3)
    arguments = [base_run[0] if word == "BASE" else word for word in arguments]
    done = Shell(server, tmp_path).run("sft", *arguments, *SFT, "--out", "run")
    assert_refused(done, tmp_path / "run", status, message)


def test_export(finished, shell, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model"
    done = shell.run("export", "--run", finished[0], "--out", out)
    assert done.status == 0, done.out
    assert f"{out}: FastGPTForCausalLM, " in done.out
    model, _ = load_model(finished[0], device="cpu", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    messages = [{"role": "user", "content": "owl?"}]
    ids = AutoTokenizer.from_pretrained(out).apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits, model.logits(model(ids)), atol=1e-5, rtol=1e-5
        )
    again = shell.run("export", "--run", finished[0], "--out", out)
    assert (again.status, len(again.errors)) == (2, 1)
    assert "not empty" in again.errors[0]


def test_from_hugging_face_and_back(shell, base_run, sft, tmp_path):
    """A GPT-2 of theirs with rows its tokenizer does not use, finetuned, is a GPT-2 of theirs."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    theirs, run, out = tmp_path / "theirs", tmp_path / "sft", tmp_path / "out"
    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=32, vocab_size=320)
    ).save_pretrained(theirs)
    shutil.copy(base_run[0] / "tokenizer.json", theirs)
    arguments = [
        ["convert", "--model", theirs, "--out", tmp_path / "base"],
        ["sft", *sft.words("--init", tmp_path / "base", "--out", run, "--steps", 2)],
        ["export", "--run", run, "--out", out],
    ]
    for words in arguments:
        done = shell.run(*words)
        assert done.status == 0, done.out
    assert f"{out}: GPT2LMHeadModel" in done.out
    model = AutoModelForCausalLM.from_pretrained(out)
    ours, _ = load_model(run, device="cpu", dtype="float32")
    ids = torch.tensor([[1, 2, 303]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours.logits(ours(ids)), atol=1e-5, rtol=1e-5)

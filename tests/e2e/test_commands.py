"""Pretraining and generation as a user starts them."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path

import pytest
from commands import TINY, Shell, real_python

from fastgpt import cli, presets
from fastgpt.checkpoint import load_checkpoint
from fastgpt.config import PretrainConfig
from fastgpt.data.shards import open_shard
from fastgpt.tokenizer import Tokenizer


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_a_user_needs(base_run):
    run, out = base_run
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["model"]["n_embd"] == 32
    assert config["train"]["steps"] == 24
    assert config["train"]["seed"] == 7
    assert len(config["data"]["data"]) == 3
    tokenizer = Tokenizer.from_file(run / "tokenizer.json")
    assert tokenizer.vocab_size == 300 == config["model"]["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("the fox — it's 12")) == "the fox — it's 12"
    checkpoint = load_checkpoint(run / "checkpoints", warn=pytest.fail)
    assert checkpoint.step == 24
    assert checkpoint.tensors["model"]["wte.weight"].shape == (300, 32)
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert re.findall(r'(?:src|href)="(?!#)', report) == []
    assert f"run {run}" in out


def test_each_step_is_logged_once_and_the_loss_goes_down(base_run):
    run, _ = base_run
    log = records(run)
    assert [record["step"] for record in log] == list(range(1, 25))
    assert [record["tokens"] for record in log] == [128 * step for step in range(1, 25)]
    val = [record["val_loss"] for record in log if "val_loss" in record]
    assert len(val) == 3
    assert val[0] > val[1] > val[2]
    assert log[0]["loss"] == pytest.approx(math.log(300), rel=0.05)
    assert val[2] < math.log(300) - 1
    bpb = log[-1]["val_bpb"]
    assert 0 < bpb < 8
    assert all(set(record) == {"step", "tokens_per_s", "mfu", "seconds"} for record in timings(run))


def timings(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]


def test_bits_per_byte_is_the_loss_over_the_bytes_of_the_validation_text(shell, tmp_path):
    """Of all validation tokens, against the bytes of the decoded text."""
    out = tmp_path / "whole"
    arguments = ["--data", "my.txt", "--out", out, "--steps", 1, *TINY, "--eval-tokens", 0]
    shell.pretrain(*arguments)
    tokenizer = Tokenizer.from_file(out / "tokenizer.json")
    shard = open_shard(out / "tokens" / "val.bin", vocab_size=300, tokenizer_hash=tokenizer.hash)
    targets = [i for i in shard.tokens[1:].tolist() if i != tokenizer.eot_id]
    text_bytes = len(tokenizer.decode_bytes(targets))
    last = records(out)[-1]
    nats = last["val_loss"] * (len(shard) - 1)
    assert last["val_bpb"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


def test_three_samples_and_progress_are_printed(base_run):
    _, out = base_run
    assert len(re.findall(r"^> ", out, re.MULTILINE)) == 3
    assert re.search(r"^pretrain 1/24  loss 5\.\d+ .* tok/s  MFU .* ETA", out, re.MULTILINE)
    assert re.search(r"^pretrain 24/24  loss .* val \d", out, re.MULTILINE)
    assert re.search(r"val loss \d\.\d+ nats/token, \d\.\d+ bits/byte", out)
    assert "\x1b" not in out


def test_generation_continues_prompts_and_repeats_by_seed(base_run, shell: Shell):
    run, _ = base_run
    prompts = ["Q: Where? A: In the barn. Q: Where does the fox sleep? A:", "The", "the owl is"]
    options = ["--run", run, "--max-new-tokens", 6, "--device", "cpu"]
    one = shell.run("generate", *options, "--prompt", *prompts, "--seed", 3)
    assert one.status == 0, one.out
    again = shell.run("generate", *options, "--prompt", *prompts, "--seed", 3)
    other = shell.run("generate", *options, "--prompt", *prompts, "--seed", 4)
    assert one.out == again.out
    assert one.out != other.out
    places = [one.out.find(prompt) for prompt in prompts]
    assert -1 not in places
    assert places == sorted(places)
    assert len(one.out) > sum(map(len, prompts)) + 3


def test_greedy_generation_does_not_depend_on_the_seed_or_the_batch(base_run, shell: Shell):
    run, _ = base_run
    options = ["--run", run, "--max-new-tokens", 8, "--temperature", 0]
    alone = [shell.run("generate", *options, "--prompt", text).out for text in ("Q: Wh", "The dog")]
    both = shell.run("generate", *options, "--seed", 9, "--prompt", "Q: Wh", "The dog")
    assert both.out == "".join(alone)


# Every family of presets, small: what its flags select must survive training and loading.
FAMILIES = {
    "gpt2": ["--preset", "gpt2-small"],
    "gpt3": ["--preset", "gpt3-small", "--window", 8],
    "llama": ["--preset", "llama-7b", "--d-ff", 48, "--n-kv-head", 1, "--mask-documents"],
    "palm": ["--preset", "palm-8b", "--head-dim", 16, "--tokenizer-kind", "bpe"],
    "modern": ["--preset", "modern-small", "--logit-softcap", 15, "--mask-documents"],
}
SELECTED = {
    "gpt2": {"position": "learned", "bias": True, "norm": "layer_norm"},
    "gpt3": {"position": "learned", "window": 8},
    "llama": {"mlp": "swiglu", "tied": False, "n_kv_head": 1, "d_ff": 48},
    "palm": {"parallel": True, "n_kv_head": 1, "head_dim": 16},
    "modern": {"qk_norm": True, "logit_softcap": 15.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_generates(family, shell: Shell, tmp_path):
    run = tmp_path / family
    arguments = [*FAMILIES[family], "--data", "my.txt", "other", "--out", run, "--steps", 8, *TINY]
    if family == "llama":
        arguments += ["--vocab-size", 420]  # sentencepiece counts letters and byte pieces
    shell.pretrain(*arguments, "--eval-every", 4)
    model = tomllib.loads((run / "config.toml").read_text())["model"]
    assert {key: model[key] for key in SELECTED[family]} == SELECTED[family]
    assert (run / "tokenizer.model").is_file() == (family == "llama")
    val = [record["val_loss"] for record in records(run) if "val_loss" in record]
    assert val[-1] < val[0]
    done = shell.run("generate", "--run", run, "--prompt", "Q: Where", "--max-new-tokens", 4)
    assert done.status == 0, done.out
    assert "Q: Where" in done.out


def test_a_config_file_gives_what_flags_gave(base_run, shell: Shell, tmp_path):
    """A run's own config.toml starts the same run again, and a flag goes over the file."""
    run, _ = base_run
    again = tmp_path / "again"
    arguments = ["--config", run / "config.toml", "--out", again, "--stop-at", 3]
    shell.pretrain(*arguments, expect=75)
    assert records(again) == records(run)[:3]
    before, after = (tomllib.loads((path / "config.toml").read_text()) for path in (run, again))
    before["train"].pop("out")
    after["train"].pop("out")
    assert before == after


def test_no_argument_is_needed():
    """As ``make train`` does: a preset for this machine, on the text that comes with us."""
    config = cli.parse(PretrainConfig, [])
    assert config.preset in (presets.CPU, presets.GPU)
    assert config.data.data == ()
    assert config.model.n_layer > 0
    config.check()


def test_dry_run_prints_the_plan_and_writes_nothing(shell: Shell, tmp_path):
    run = tmp_path / "none"
    done = shell.pretrain("--data", "my.txt", "--out", run, "--steps", 24, *TINY, "--dry-run")
    lines = dict(line.split(None, 1) for line in done.out.splitlines())
    assert {"parameters", "memory", "tokens", "steps", "disk", "time"} <= set(lines)
    assert lines["tokens"] == f"{24 * 128:,}"
    # Two blocks of 4 C^2 + 8 C^2 weights, and the embedding.
    assert lines["parameters"] == f"{2 * 12 * 32 * 32 + 300 * 32:,}"
    assert not run.exists()


def test_help_lists_every_option_without_loading_torch(tmp_path):
    """``--help`` answers at once: the libraries that take seconds are not touched."""
    script = (
        "import sys, runpy\n"
        "sys.argv = ['pretrain', '--help']\n"
        "try:\n"
        "    runpy.run_module('fastgpt.pretrain', run_name='__main__')\n"
        "finally:\n"
        "    print('loaded', {'torch', 'triton', 'numpy'} & set(sys.modules))\n"
    )
    done = real_python(["-c", script], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "loaded set()" in done.stdout
    for flag in ("--data", "--out", "--preset", "--steps", "--batch-tokens", "--seq-len"):
        assert flag in done.stdout
    for flag in ("--save-every", "--seed", "--resume", "--stop-at", "--config", "--dry-run"):
        assert flag in done.stdout

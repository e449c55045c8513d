"""``python -m fastgpt.reward`` as a command."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from commands import Shell
from runs import RANKED, assert_refused, assert_same_run, log, write

from fastgpt.chat import end_id, render_prompt
from fastgpt.checkpoint import load_checkpoint
from fastgpt.errors import UsageError
from fastgpt.preference.comparisons import answer_ids
from fastgpt.preference.reward_model import load_reward_model
from fastgpt.run import load_tokenizer
from fastgpt.rundir import RunDir


@pytest.fixture(scope="module")
def finished(reward, tmp_path_factory) -> tuple[Path, str]:
    """A run to its end, never to be changed; its output."""
    run = tmp_path_factory.mktemp("reward") / "run"
    return run, reward("--out", run, "--epochs", 5, "--margin", 0.1).out


def test_a_run_learns_the_order(finished):
    run, out = finished
    assert log(run)[-1]["val_accuracy"] > 0.9
    assert log(run)[-1]["val_loss"] < log(run)[0]["loss"]
    assert "49 rankings with " in out
    assert "6 a step; 6 held out; 5 left out, for all their answers are tied" in out
    assert f"accuracy: {log(run)[-1]['val_accuracy']:.3f}" in out
    for line in ("accuracy of the longer answer: ", "score difference  pairs  accuracy"):
        assert line in out
    page = (run / "report.html").read_text()
    for title in ("Accuracy by score difference", "Calibration", "predicted, %"):
        assert title in page


def test_it_says_what_was_decided_and_loads(finished, sft_run):
    run, _ = finished
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["model"] == tomllib.loads((sft_run / "config.toml").read_text())["model"]
    assert config["train"]["steps"] == len(log(run)) == 41
    assert config["batch_prompts"] == 6
    model, tokenizer = load_reward_model(run, device="cpu", dtype="float32")
    scores = []
    for text in ("barn.", "river.", "garden."):
        prompt = render_prompt(tokenizer, [{"role": "user", "content": "owl 77?"}])
        ids = torch.tensor([[*prompt, *answer_ids(tokenizer, text)]])
        scores.append(model.scores(ids, torch.tensor([ids.shape[1] - 1])).item())
    assert scores[0] > scores[1] > scores[2]


def test_the_saved_scores_of_the_samples_are_normalised(finished):
    run, out = finished
    model, _ = load_reward_model(run, device="cpu", dtype="float32")
    samples = load_checkpoint(run / "checkpoints").tensors["stage"]
    rows = samples["sample_ids"].split(samples["sample_lengths"].tolist())
    assert len(rows) == 20
    tokenizer = load_tokenizer(RunDir.open(run))
    end, asked = end_id(tokenizer), tokenizer.special_tokens["<|assistant|>"]
    said = [ids[ids.tolist().index(asked) + 1 :].tolist() for ids in rows]
    ended = [ids[-1] == end for ids in said]
    assert any(ended), "what ended is scored behind its end, as in training"
    assert all(e or len(ids) == 6 for e, ids in zip(ended, said, strict=True))
    with torch.no_grad():
        scores = torch.cat([model.scores(ids[None], torch.tensor([len(ids) - 1])) for ids in rows])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)
    assert model.gain.item() != 1
    assert "20 sampled answers had a mean score of" in out


def test_a_resumed_run_equals_an_uninterrupted_one(reward, tmp_path):
    """Also over the end of an epoch, of 8 steps."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--epochs", 3, "--eval-every", 3]
    reward("--out", whole, *options, "--stop-at", 11, expect=75)
    reward("--out", parts, *options, "--stop-at", 4, expect=75)
    reward("--resume", parts, "--stop-at", 11, expect=75)
    assert_same_run(whole, parts, 11)


def test_the_end_is_the_same_after_a_resume(finished, reward, tmp_path):
    run = tmp_path / "run"
    options = ("--epochs", 5, "--margin", 0.1)
    reward("--out", run, *options, "--stop-at", 37, expect=75)
    out = reward("--resume", run).out
    assert_same_run(finished[0], run, 41)
    tables = [text[text.index("held out\n") : text.index("run ")] for text in (out, finished[1])]
    assert tables[0].splitlines()[1:] == tables[1].splitlines()[1:]


def test_two_processes_train_as_one_does(reward, tmp_path):
    """Ranks have unequal numbers of pairs, and 7 prompts are no multiple of 2."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--steps", 6, "--batch-prompts", 7)
    reward("--out", one, *options)
    reward.on_two("--out", two, *options)
    for a, b in zip(log(one), log(two), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key


BAD = {
    "a base model": (["--init", "BASE"], 2, "the model was not finetuned on chats"),
    "no such data": (["--init", "SFT", "--data", "none.jsonl"], 3, "none.jsonl: no such file"),
    "nothing to rank": (["--init", "SFT", "--data", "c.jsonl"], 3, "c.jsonl:2: 1 response(s)"),
    "a long row": (["--init", "SFT", "--seq-len", "99"], 2, "--seq-len 99 is beyond the context"),
    "one ranking": (
        ["--init", "SFT", "--data", "d.jsonl"],
        3,
        "1 different prompts, 1 held out; give more",
    ),
    "one sample": (["--init", "SFT", "--norm-samples", "1"], 2, "--norm-samples 1: it must be 0"),
    "no scores": (["--init", "SFT", "--data", "d.jsonl", "--margin", "1"], 2, "--margin needs"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line(case, server, base_run, sft_run, tmp_path):
    arguments, status, message = BAD[case]
    ranking, single = ({"prompt": "a", "responses": list(r)} for r in ("bc", "y"))
    write(tmp_path / "c.jsonl", [ranking, single])
    write(tmp_path / "d.jsonl", [ranking])
    runs = {"BASE": base_run[0], "SFT": sft_run}
    arguments = [runs.get(word, word) for word in arguments]
    done = Shell(server, tmp_path).run("reward", *arguments, *RANKED, "--out", "run")
    assert_refused(done, tmp_path / "run", status, message)


def test_a_run_of_another_stage_is_no_reward_model(sft_run):
    with pytest.raises(UsageError, match=r"no reward model was saved there; give a run of"):
        load_reward_model(sft_run, device="cpu")

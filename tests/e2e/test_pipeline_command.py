"""``python -m fastgpt.pipeline`` from a text to the report, on models of a few thousand weights."""

from __future__ import annotations

import json
import shlex
import signal

from commands import TINY

SMALL = ("--no-compile", "--dtype", "float32", "--sample-tokens", 4, "--seed", 7, "--log-every", 1)


def option(stage: str, *words: object) -> str:
    return f"--{stage}={shlex.join(map(str, words))}"


def test_the_whole_way(server, shell, corpus, tmp_path, monkeypatch):
    from fastgpt import pipeline

    prompts = tmp_path / "prompts.jsonl"
    records = [{"prompt": f"Where is cat {i}?", "answer": "barn"} for i in range(12)]
    prompts.write_text("\n".join(map(json.dumps, records)))
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "\n".join(json.dumps({"prompt": r["prompt"], "response": "In the barn."}) for r in records)
    )
    rankings = tmp_path / "rankings.jsonl"
    rankings.write_text(
        "\n".join(
            json.dumps({"prompt": r["prompt"], "responses": ["In the barn.", "In it.", "x"]})
            for r in records
        )
    )
    out = tmp_path / "demo"
    arguments = [
        "--out", out, "--prompts", prompts, "--held-out", 3, "--price-per-hour", 2,
        option("pretrain", "--data", "my.txt", "--steps", 8, *TINY),
        option("sft", "--data", chats, "--batch-tokens", 64, "--steps", 3, *SMALL),
        option("reward", "--data", rankings, "--norm-samples", 4, "--steps", 2, *SMALL),
        option("ppo", "--rollout", 4, "--minibatches", 2, "--epochs", 1, "--steps", 4,
                       "--max-new-tokens", 4, "--eval-prompts", 2, *SMALL),
    ]  # fmt: skip
    stopped = {"sft"}

    def child(command):
        """The stage as a process; the first time it comes to finetuning, it is asked to end."""
        stage = command[2].removeprefix("fastgpt.")
        started = shell.start(stage, *command[3:])
        if stage in stopped:
            stopped.remove(stage)
            started.wait_until(lambda: started.handles(signal.SIGTERM))
            started.send(signal.SIGTERM)
        return started.wait()

    monkeypatch.setattr(pipeline, "_child", child)
    monkeypatch.chdir(corpus)
    try:
        pipeline.main([str(word) for word in arguments])
    except pipeline.Preempted:
        pipeline.main([str(word) for word in arguments])
    state = json.loads((out / "pipeline.json").read_text())
    assert state["done"] == ["pretrain", "sft", "reward", "ppo", "evaluate"]
    page = (out / "report.html").read_text()
    for text in (
        "Four stages",
        "my.txt",
        "chats.jsonl",
        "rankings.jsonl",
        "prompts-train.jsonl",
        "cost",
        "Leaderboard by reward",
        "fastgpt.assess.judges:chrf",
        "Where is",
    ):
        assert text in page
    assert page.count("<svg") >= 5
    assert "<script" not in page

"""``python -m fastgpt.evaluate`` on a tiny run, and the files it leaves."""

from __future__ import annotations

import json
import shutil

import pytest


@pytest.fixture
def runs(base_run, tmp_path):
    """The base run under two names."""
    for name in ("one", "two"):
        shutil.copytree(base_run[0], tmp_path / name)
    return tmp_path / "one", tmp_path / "two"


def write(path, *records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_a_comparison_of_runs(shell, runs, tmp_path):
    tasks = write(
        tmp_path / "where.jsonl",
        *[
            {
                "question": f"Where does the {c} cat sleep?",
                "choices": ["barn", "x"],
                "answer": i % 2,
            }
            for i, c in enumerate(["red", "grey", "black"])
        ],
    )
    prompts = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "Q: Where does the red cat sleep?", "reference": "In the barn, it says."},
        {"prompt": "Q: Where does the grey owl sleep?", "reference": "In the river, it says."},
    )
    votes = write(
        tmp_path / "votes.jsonl",
        *[{"prompt": i, "a": "one", "b": "two", "winner": "a"} for i in range(3)],
    )
    out = tmp_path / "result"
    done = shell.run(
        "evaluate", "--run", *runs, "--data", "my.txt", "--tasks", tasks, "--few-shot", 1,
        "--prompts", prompts, "--judge", "fastgpt.assess.judges:chrf", "--votes", votes,
        "--max-new-tokens", 8, "--out", out,
    )  # fmt: skip
    assert done.status == 0, done.out
    result = json.loads((out / "evaluate.json").read_text())
    for values in result["runs"].values():
        assert 0.5 < values["val_bpb"] < 8
        assert values["where"]["n"] == 2
        assert values["answers"]["characters"] > 0
    assert result["runs"]["one"] == result["runs"]["two"]
    judged = result["judges"]["fastgpt.assess.judges:chrf"]
    assert judged["win_rate"]["one over two"] == 0.5
    assert [row["model"] for row in result["votes"]["votes.jsonl"]["leaderboard"]] == ["one", "two"]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [a["reference"] for a in answers] == ["In the barn, it says.", "In the river, it says."]
    assert answers[0]["answers"]["one"] == answers[0]["answers"]["two"]
    assert "judge fastgpt.assess.judges:chrf" in done.out
    assert "votes votes.jsonl" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--run", "x"], "--run needs something to measure"),
        (["--run", "x", "--data", "my.txt", "--judge", "a:b"], "give --prompts"),
        (["--run", "a/x", "b/x", "--data", "my.txt"], "same name: x, x"),
        (["--run", "x", "--data", "my.txt", "--out", "my.txt"], "--out my.txt: not a directory"),
        (["--run", "nowhere", "--data", "my.txt"], "nowhere: not a run directory"),
        (["--votes", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--run", "x", "--tasks", "a/t.jsonl", "b/t.jsonl"], "--tasks: two files are called t,"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(shell, arguments, message):
    for folder in ("a", "b"):
        path = shell.cwd / folder / "t.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"question": "Q", "answer": "A"}')
    done = shell.run("evaluate", *arguments)
    assert done.status in (2, 3)
    (line,) = [line for line in done.out.splitlines() if line.startswith("fastgpt: ")]
    assert message in line
    assert "Traceback" not in done.out

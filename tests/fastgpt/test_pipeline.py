"""The pipeline's own part: what it runs, what it goes on with, and the page it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastgpt import pipeline
from fastgpt.data.examples import read_prompts
from fastgpt.errors import DataError, PeerError, Preempted, UsageError
from fastgpt.pipeline import PipelineConfig, commands, split_prompts, stage_table


@pytest.fixture
def config(tmp_path) -> PipelineConfig:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "answer": i}) for i in range(20)))
    out = tmp_path / "demo"
    out.mkdir()
    return PipelineConfig(out=out, prompts=(path,), held_out=5, ppo="--steps 3 --seed 9")


def test_prompts_held_out_are_no_prompts_of_ppo(config):
    train, held_out = (
        {p.messages[0]["content"]: p.reference for p in read_prompts([path])}
        for path in split_prompts(config)
    )
    assert len(train) == 15
    assert len(held_out) == 5
    assert train | held_out == {f"p{i}": i for i in range(20)}
    assert set(held_out) != {f"p{i}" for i in range(5)}


def test_a_prompt_that_is_asked_often_stands_on_one_side(config):
    lines = [json.dumps({"prompt": f"p{i % 10}"}) for i in range(30)]
    config.prompts[0].write_text("\n".join(lines))
    train, held_out = (
        [p.messages[0]["content"] for p in read_prompts([path])] for path in split_prompts(config)
    )
    assert len(held_out) == 5
    assert train
    assert not set(train) & set(held_out)
    config.prompts[0].write_text("\n".join(lines[:1] * 9))
    for path in config.out.glob("prompts-*.jsonl"):
        path.unlink()
    with pytest.raises(DataError, match="all are the same as one of those held out"):
        split_prompts(config)


def test_the_split_stays_when_the_command_is_given_again(config):
    paths = split_prompts(config)
    before = [path.read_bytes() for path in paths]
    config.prompts[0].write_text('{"prompt": "other"}')
    assert [path.read_bytes() for path in split_prompts(config)] == before


def test_too_few_prompts_to_hold_some_out(config):
    config.prompts[0].write_text('{"prompt": "only"}')
    with pytest.raises(DataError, match="1 prompts, 5 of them to be held out"):
        split_prompts(config)


def words(config, stage) -> list[str]:
    return [str(w) for w in commands(config, config.out / "t", config.out / "h")[stage]]


def test_each_stage_starts_from_the_one_before(config):
    out = str(config.out)
    assert words(config, "sft") == ["--init", f"{out}/base", "--out", f"{out}/sft"]
    assert words(config, "reward")[1] == f"{out}/sft"
    ppo = words(config, "ppo")
    assert ppo[: ppo.index("--prompts")] == ["--init", f"{out}/sft", "--reward", f"{out}/reward"]
    assert ppo[-6:] == ["--steps", "3", "--seed", "9", "--out", f"{out}/rl"]
    evaluate = words(config, "evaluate")
    assert evaluate[1:4] == [f"{out}/base", f"{out}/sft", f"{out}/rl"]


def test_what_cannot_be_a_command_is_said_before_anything_runs(config, child):
    started = child()
    with pytest.raises(UsageError, match='--sft=--steps "3: No closing quotation; quote it'):
        pipeline.main(["--out", str(config.out), '--sft=--steps "3', "--held-out", "1"])
    with pytest.raises(UsageError, match=r"--out .*prompts.jsonl: not a directory: "):
        pipeline.main(["--out", str(config.prompts[0])])
    assert started == []


@pytest.fixture
def child(monkeypatch):
    """Stages that end with these codes; what was started."""
    started: list[list[str]] = []

    def let(*codes):
        left = list(codes)

        def run(arguments):
            started.append(list(arguments[2:]))
            return left.pop(0)

        monkeypatch.setattr(pipeline, "_child", run)
        return started

    return let


def run_all(config):
    state = pipeline._State.open(config.out / "pipeline.json")
    for stage, arguments in commands(config, config.out / "t", config.out / "h").items():
        pipeline._run(stage, arguments, state, config.out)
    return state


def test_a_stopped_pipeline_goes_on_within_the_stage(config, child):
    started = child(0, 75)
    with pytest.raises(Preempted, match="sft was stopped"):
        run_all(config)
    (config.out / "sft").mkdir()
    (config.out / "sft" / "config.toml").touch()
    started.clear()
    child(0, 0, 0, 0)
    state = run_all(config)
    assert started[0] == ["fastgpt.sft", "--resume", str(config.out / "sft")]
    assert [line[0] for line in started[1:]] == [
        "fastgpt.reward",
        "fastgpt.ppo",
        "fastgpt.evaluate",
    ]
    assert state.done == ["pretrain", "sft", "reward", "ppo", "evaluate"]
    started.clear()
    run_all(config)
    assert started == []


def test_a_failed_stage_ends_the_pipeline_with_its_code(config, child):
    child(3)
    with pytest.raises(PeerError) as error:
        run_all(config)
    assert error.value.exit_code == 3


def test_a_damaged_state_is_named(config):
    (config.out / "pipeline.json").write_text("{")
    with pytest.raises(DataError, match=r"pipeline\.json: unreadable"):
        run_all(config)


def test_other_options_for_what_was_made_are_refused(config):
    """They would be passed over in silence, for the run goes on with its own."""
    state = pipeline._State.open(config.out / "pipeline.json")
    pipeline.check_options(config, state)
    changed = replace(config, ppo="--steps 4", held_out=4)
    pipeline.check_options(changed, state)  # nothing was made yet
    (config.out / "rl").mkdir()
    (config.out / "rl" / "config.toml").touch()
    state.save()
    state = pipeline._State.open(config.out / "pipeline.json")
    with pytest.raises(
        UsageError, match=r"--ppo=--steps 3 --seed 9: .*rl was made with --ppo=--st"
    ):
        pipeline.check_options(config, state)
    pipeline.check_options(changed, state)
    split_prompts(changed)
    with pytest.raises(UsageError, match=r"--held-out=5: .* was made with --held-out=4"):
        pipeline.check_options(replace(changed, held_out=5), state)


def test_another_judge_only_repeats_the_evaluation(config, child):
    state = pipeline._State.open(config.out / "pipeline.json")
    pipeline.check_options(config, state)
    state.done, state.seconds = ["ppo", "evaluate"], {"ppo": 2.0, "evaluate": 1.0}
    pipeline.check_options(config, state)
    assert state.done == ["ppo", "evaluate"]
    pipeline.check_options(replace(config, judge=("math:sqrt",)), state)
    assert (state.done, state.seconds) == (["ppo"], {"ppo": 2.0})


def test_a_judge_that_cannot_judge_is_named_before_anything_runs(config, child):
    started = child()
    config.prompts[0].write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    prompts = ["--out", str(config.out), "--prompts", str(config.prompts[0]), "--held-out", "1"]
    with pytest.raises(DataError, match=r"held-out\.jsonl:1: no 'reference'"):
        pipeline.main(prompts)
    with pytest.raises(UsageError, match="--judge json:nothing"):
        pipeline.main([*prompts, "--judge", "json:nothing"])
    assert started == []


def test_shares_and_costs_add_up():
    metrics = {"pretrain": [{"step": 1, "tokens": 5}, {"step": 9, "tokens": 45}], "sft": []}
    data = {"pretrain": "a.txt"}
    rows = stage_table(metrics, {"pretrain": 90.0, "sft": 30.0}, 3.0, data)
    assert [row.get("data") for row in rows] == ["a.txt", None, None]
    assert rows[0]["steps"] == 9
    assert rows[0]["trained on"] == "45 tokens"
    read = {"reward": [{"step": 2, "prompts": 1200, "tokens_read": 34567}]}
    (row, _) = stage_table(read, {"reward": 1.0}, 0.0, {})
    assert row["trained on"] == "1,200 prompts, 34,567 tokens"
    assert [row["share"] for row in rows] == ["75 %", "25 %", "100 %"]
    assert [row["cost"] for row in rows] == ["0.075", "0.025", "0.100"]
    assert "cost" not in stage_table(metrics, {"sft": 30.0}, 0.0, {})[0]

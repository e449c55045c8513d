"""All four stages with one command: ``python -m fastgpt.pipeline`` (or ``make demo``).

pretrain -> sft -> reward -> ppo, then an evaluation of the base, SFT and RL models on prompts that
PPO has not seen, and one report. Each stage is the command a user would give, a process of its
own; the pipeline knows what is done and goes on from there, also within a stage. Without any option
it runs on the data that comes with the package.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt import page
from fastgpt.chart import Series
from fastgpt.cli import command, from_flags, read_toml
from fastgpt.data.examples import embedded, read_prompts
from fastgpt.errors import DataError, PeerError, Preempted, UsageError
from fastgpt.rundir import RunDir, make_directory, read_metrics, write_atomic

STAGES = {"pretrain": "base", "sft": "sft", "reward": "reward", "ppo": "rl"}
"""Stage -> directory of its run."""
MODELS = ("base", "sft", "rl")
SHOWN = 8


@dataclass(frozen=True)
class PipelineConfig:
    """Pretraining, supervised finetuning, reward model, PPO, and what they made of each other."""

    out: Path = Path("runs/demo")
    """Directory of the four runs and the report; an unfinished one is gone on with."""
    prompts: tuple[Path, ...] = ()
    """Prompts (.jsonl) for PPO and for the comparison at the end; default: the embedded ones."""
    held_out: int = 96
    """Prompts kept from PPO, on which the models are compared."""
    judge: tuple[str, ...] = ("fastgpt.assess.judges:chrf",)
    """Judges besides the reward model, see fastgpt.evaluate."""
    price_per_hour: float = 0.0
    """Of this machine, for the cost of each stage."""
    pretrain: str = ""
    """More options of the stage, as one text behind an equals sign: --pretrain="--steps 100"."""
    sft: str = ""
    """The same for supervised finetuning,"""
    reward: str = ""
    """for the reward model,"""
    ppo: str = "--episodes 2048 --rollout 128 --kl-coef 0.1 --temperature 0.7"
    """and for PPO."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = from_flags(PipelineConfig, argv)
    if config.held_out < 1:
        raise UsageError(f"--held-out {config.held_out}: it must be at least 1")
    make_directory(config.out)
    state = _State.open(config.out / "pipeline.json")
    check_options(config, state)
    train_prompts, held_out = split_prompts(config)
    _check_judges(config, held_out)
    state.save()
    for stage, words in commands(config, train_prompts, held_out).items():
        _run(stage, words, state, config.out)
    report = write_report(config, state)
    print(f"\nreport {report}")
    run = shlex.quote(str(config.out / MODELS[-1]))
    print(f"talk to it: python -m fastgpt.generate --run {run}")


def _words(stage: str, options: str) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as error:
        raise UsageError(f"--{stage}={options}: {error}; quote it as for a shell") from error


def commands(
    config: PipelineConfig, train_prompts: Path, held_out: Path
) -> dict[str, list[str | Path]]:
    """What is run, in order: arguments behind ``python -m fastgpt.<stage>``."""
    runs = {stage: config.out / name for stage, name in STAGES.items()}
    inputs: dict[str, list[str | Path]] = {
        "pretrain": [],
        "sft": ["--init", runs["pretrain"]],
        "reward": ["--init", runs["sft"]],
        "ppo": ["--init", runs["sft"], "--reward", runs["reward"], "--prompts", train_prompts],
    }
    result: dict[str, list[str | Path]] = {}
    for stage, words in inputs.items():
        result[stage] = [*words, *_words(stage, getattr(config, stage)), "--out", runs[stage]]
    models = [config.out / name for name in MODELS]
    judges = [runs["reward"], *config.judge]
    result["evaluate"] = [
        *("--run", *models, "--prompts", held_out, "--judge", *judges),
        *("--max-new-tokens", "128", "--out", config.out / "evaluation"),
    ]
    return result


def check_options(config: PipelineConfig, state: _State) -> None:
    """Note the options of each stage. Raises UsageError for others than those it began with.

    A stage that left no run may have other options the next time. Other judges only mean that the
    evaluation is done again.
    """
    prompts = [str(path.resolve()) for path in config.prompts]
    given: dict[str, Any] = {stage: getattr(config, stage) for stage in STAGES}
    given |= {"prompts": prompts, "held-out": config.held_out}
    for name, value in given.items():
        began = state.options.get(name, value)
        made = config.out / STAGES.get(name, "prompts-train.jsonl")
        if began != value and (made.is_file() or RunDir(made).config_path.is_file()):
            raise UsageError(
                f"--{name}={value}: {made} was made with --{name}={began}; give that again, or "
                "another --out"
            )
        state.options[name] = value
    judges = list(config.judge)
    if state.options.get("judge", judges) != judges and "evaluate" in state.done:
        state.done.remove("evaluate")
        del state.seconds["evaluate"]
    state.options["judge"] = judges


def _check_judges(config: PipelineConfig, held_out: Path) -> None:
    from fastgpt.assess.judges import check_judge

    prompts = read_prompts([held_out])
    for spec in config.judge:  # now, not after hours
        check_judge(spec, prompts)


def split_prompts(config: PipelineConfig) -> tuple[Path, Path]:
    """Files with the prompts of PPO and with those held out, written once."""
    paths = (config.out / "prompts-train.jsonl", config.out / "prompts-held-out.jsonl")
    if all(path.is_file() for path in paths):
        return paths
    import numpy as np

    from fastgpt.data.order import permute

    prompts = read_prompts(config.prompts or (embedded("prompts"),))
    if len(prompts) <= config.held_out:
        raise DataError(
            f"--prompts: {len(prompts)} prompts, {config.held_out} of them to be held out; give "
            "more, or lower --held-out"
        )
    order = permute(np.arange(len(prompts)), len(prompts), 0).tolist()
    # What is asked twice stands on one side: nothing held out is learned from.
    asked = [json.dumps(prompt.messages) for prompt in prompts]
    held = {asked[i] for i in order[: config.held_out]}
    parts = ([i for i in order if asked[i] not in held], order[: config.held_out])
    if not parts[0]:
        raise DataError("--prompts: all are the same as one of those held out; give others")
    for path, part in zip(paths, parts, strict=True):
        lines = [
            json.dumps(
                {"messages": prompts[i].messages, "reference": prompts[i].reference},
                ensure_ascii=False,
            )
            for i in part
        ]
        write_atomic(path, "\n".join(lines) + "\n")
    return paths


@dataclass
class _State:
    """Seconds spent in each stage, also over several attempts, and the stages that are done.

    ``options`` are those that each stage began with.
    """

    path: Path
    seconds: dict[str, float]
    done: list[str]
    options: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> _State:
        if not path.is_file():
            return cls(path, {}, [], {})
        try:
            values = json.loads(path.read_bytes())
            options = dict(values.get("options", {}))
            return cls(path, dict(values["seconds"]), list(values["done"]), options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: unreadable ({error}); remove it to begin anew") from error

    def save(self) -> None:
        values = {"seconds": self.seconds, "done": self.done, "options": self.options}
        write_atomic(self.path, json.dumps(values) + "\n")


def _run(stage: str, words: Sequence[str | Path], state: _State, out: Path) -> None:
    """Run a stage unless it is done; raises what ended it."""
    if stage in state.done:
        print(f"{stage}: done before, {state.seconds[stage]:.0f} s")
        return
    run = out / STAGES.get(stage, "evaluation")
    if stage in STAGES and RunDir(run).config_path.is_file():
        words = ["--resume", run]
    arguments = [sys.executable, "-m", f"fastgpt.{stage}", *map(str, words)]
    print(f"\n$ python {shlex.join(arguments[1:])}", flush=True)
    start = time.monotonic()
    code = _child(arguments)
    state.seconds[stage] = state.seconds.get(stage, 0.0) + time.monotonic() - start
    if code == 0:
        state.done.append(stage)
    state.save()
    if code == Preempted.exit_code or code < 0:
        raise Preempted(f"{stage} was stopped; give the same command to go on")
    if code:
        raise PeerError(code)  # it has said why


def _child(arguments: Sequence[str]) -> int:
    """Exit status of a process that gets the signals which ask this one to end."""
    with subprocess.Popen(arguments) as process:
        before = {
            s: signal.signal(s, lambda signum, _frame: process.send_signal(signum))
            for s in (signal.SIGTERM,)
        }
        # Ctrl-C reaches the child from the terminal; here it must only not end the wait.
        before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda _signum, _frame: None)
        try:
            return process.wait()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def write_report(config: PipelineConfig, state: _State) -> Path:
    """``report.html`` of the whole way; returns its path."""
    metrics = {
        stage: read_metrics(RunDir(config.out / run).metrics_path) for stage, run in STAGES.items()
    }
    evaluation = json.loads((config.out / "evaluation" / "evaluate.json").read_bytes())
    with open(config.out / "evaluation" / "answers.jsonl", encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    data = {stage: _data(RunDir(config.out / run)) for stage, run in STAGES.items()}
    data["evaluate"] = "prompts-held-out.jsonl"
    table = stage_table(metrics, state.seconds, config.price_per_hour, data)
    print_table(table)
    sections = [
        "<h2>Four stages</h2>",
        page.columns(list(table[0]), table),
        "<h2>What happened on the way</h2>",
        page.charts(_curves(metrics)),
        *_leaderboards(evaluation),
        "<h2>The same prompts, three models</h2>",
        page.columns(
            ["prompt", *MODELS, "reference"], [_shown(a) for a in answers[:SHOWN]], css="texts"
        ),
    ]
    path = config.out / "report.html"
    write_atomic(path, page.page(config.out.resolve().name, "fastgpt pipeline", sections).encode())
    return path


def _data(run: RunDir) -> str:
    """Names of the files that a stage learned from."""
    tree = read_toml(run.config_path, "--out")
    found = tree.get("prompts") or tree.get("data") or ()
    if isinstance(found, Mapping):  # of pretraining, a table
        found = found.get("data", ())
    return ", ".join(Path(file).name for file in found) or "embedded"


def stage_table(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    seconds: Mapping[str, float],
    price_per_hour: float,
    data: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A row for each stage and one for the evaluation: data, steps, targets, time, share, cost."""
    total = sum(seconds.values())
    rows = []
    units = (("tokens", "tokens"), ("prompts", "prompts"), ("tokens_read", "tokens"))
    for stage, spent in seconds.items():
        last = metrics[stage][-1] if metrics.get(stage) else {}
        row: dict[str, Any] = {
            "stage": stage,
            "data": data.get(stage),
            "steps": last.get("step"),
            "trained on": ", ".join(f"{last[key]:,} {unit}" for key, unit in units if key in last)
            or None,
            "time": f"{spent:.0f} s",
            "share": f"{100 * spent / total:.0f} %",
        }
        if price_per_hour:
            row["cost"] = f"{spent / 3600 * price_per_hour:.3f}"
        rows.append(row)
    rows.append({"stage": "all", "time": f"{total:.0f} s", "share": "100 %"})
    if price_per_hour:
        rows[-1]["cost"] = f"{total / 3600 * price_per_hour:.3f}"
    return rows


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as aligned text."""
    keys = list(rows[0])
    cells = [keys, *[[page.value_text(row.get(key)) for key in keys] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    wanted = [
        ("Pretraining: loss", "pretrain", ("loss", "val_loss")),
        ("Supervised finetuning: loss", "sft", ("loss", "val_loss")),
        ("Reward model: loss", "reward", ("loss", "val_loss")),
        ("Reward model: accuracy", "reward", ("accuracy", "val_accuracy")),
        ("PPO: score of the reward model", "ppo", ("score", "val_score")),
        ("PPO: KL to the SFT model, nats a response", "ppo", ("kl", "val_kl")),
    ]
    return [
        page.figure(
            title,
            [
                Series(key, page.points(metrics[stage], key), i, "dots" if i else "line")
                for i, key in enumerate(keys)
            ],
        )
        for title, stage, keys in wanted
    ]


def _leaderboards(evaluation: Mapping[str, Any]) -> list[str]:
    sections = []
    for spec, judged in evaluation.get("judges", {}).items():
        rows = [
            {
                "rank": row["rank"],
                "model": row["model"],
                "rating": f"{row['rating']:.0f}",
                "95 % interval": f"{row['low']:.0f} to {row['high']:.0f}",
                "wins": f"{100 * row['wins']:.0f} %",
                "mean score": f"{judged['mean_score'][row['model']]:.3f}",
            }
            for row in judged["leaderboard"]
        ]
        title = page.html_text(f"Leaderboard by {Path(spec).name}")
        sections += [f"<h2>{title}</h2>", page.columns(list(rows[0]), rows)]
    return sections


def _shown(answer: Mapping[str, Any]) -> dict[str, Any]:
    prompt = "\n\n".join(message["content"] for message in answer["messages"])
    return {"prompt": prompt, **answer["answers"], "reference": answer["reference"]}


if __name__ == "__main__":
    raise SystemExit(command(main)())

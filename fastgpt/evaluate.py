"""Compare runs: ``python -m fastgpt.evaluate --run runs/base runs/sft --tasks arc.jsonl``.

Bits per byte of a text, benchmarks (see fastgpt.assess.tasks), and answers to the same prompts:
every judge compares every two runs on every prompt, and the votes become a leaderboard (see
fastgpt.assess.ratings). Answers are kept in answers.jsonl; people's votes on them come back with
``--votes``.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastgpt.cli import command, from_flags
from fastgpt.errors import UsageError
from fastgpt.generate import SamplingConfig

if TYPE_CHECKING:
    from fastgpt.assess.ratings import Vote
    from fastgpt.data.examples import Prompt
    from fastgpt.model import GPT
    from fastgpt.tokenizer import Tokenizer

ANSWER_BATCH = 32


@dataclass(frozen=True)
class EvaluateConfig:
    """Bits per byte, benchmarks, win rates and a leaderboard of runs."""

    run: tuple[Path, ...] = ()
    """Run directories of the models."""
    data: tuple[Path, ...] = ()
    """Texts to measure bits per byte on."""
    tasks: tuple[Path, ...] = ()
    """Benchmarks, .jsonl: HellaSwag, ARC, MMLU, LAMBADA, GSM8K as published, or your own."""
    few_shot: int = 0
    """Demonstrations in front of each question: the first of the file."""
    prompts: tuple[Path, ...] = ()
    """Prompts, .jsonl, that all runs answer."""
    judge: tuple[str, ...] = ()
    """Who compares answers: a reward run, or module:function, as fastgpt.assess.judges:chrf."""
    votes: tuple[Path, ...] = ()
    """People's votes, .jsonl: prompt, a, b, winner (a, b or tie)."""
    limit: int = 0
    """Questions of a benchmark, and prompts, at most; 0: all."""
    chat: Literal["auto", "yes", "no"] = "auto"
    """Ask as the user of a conversation; auto: when the model was finetuned on chats."""
    out: Path | None = None
    """Directory for evaluate.json and answers.jsonl."""
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    debug: bool = False
    """Show the traceback of an error."""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(max_new_tokens=256, temperature=0.7)
    )
    """Of answers to ``prompts``; those to questions of a benchmark are greedy, as long at most."""

    def check(self) -> None:
        """Raise UsageError for a combination that evaluates nothing."""
        if not self.run and not self.votes:
            raise UsageError("nothing to evaluate: name models with --run, or --votes")
        if self.run and not (self.data or self.tasks or self.prompts):
            raise UsageError("--run needs something to measure: --data, --tasks or --prompts")
        if self.judge and not self.prompts:
            raise UsageError("--judge compares answers: give --prompts to answer")
        if self.prompts and not self.judge and self.out is None:
            raise UsageError("--prompts needs a --judge, or --out to keep the answers in")
        names = [path.resolve().name for path in self.run]
        if len(set(names)) < len(names):
            raise UsageError(f"--run: two runs have the same name: {', '.join(sorted(names))}")
        if self.few_shot < 0 or self.limit < 0:
            raise UsageError("--few-shot and --limit: they must be at least 0")
        self.sampling.check()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = from_flags(EvaluateConfig, argv)
    config.check()
    results = evaluate(config)
    print_results(results)
    if config.out is not None:
        print(f"\n{config.out / 'evaluate.json'}")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All that is asked for: ``runs`` (values by run), ``judges`` and ``votes`` (leaderboards)."""
    from fastgpt.assess.judges import check_judge, read_votes
    from fastgpt.assess.tasks import read_task
    from fastgpt.data.examples import read_prompts
    from fastgpt.rundir import make_directory

    if config.out is not None:
        make_directory(config.out)
    prompts = read_prompts(config.prompts) if config.prompts else []
    prompts = prompts[: config.limit or None]
    tasks = [read_task(path) for path in config.tasks]
    _named_once("--tasks", [task.name for task in tasks])
    _named_once("--votes", [path.name for path in config.votes])
    votes = {path.name: read_votes(path) for path in config.votes}
    for spec in config.judge:  # before the answers, which take long
        check_judge(spec, prompts)
    runs: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[str]] = {}
    for path in config.run:
        name = path.resolve().name
        runs[name] = _measure(config, path, tasks)
        if prompts:
            answers[name] = _answers(config, path, prompts)
    results: dict[str, Any] = {"runs": runs}
    if answers:
        results["judges"] = _judged(config, prompts, answers)
        for name, texts in answers.items():
            runs[name]["answers"] = _shape(texts)
    if votes:
        results["votes"] = {name: standings(cast) for name, cast in votes.items()}
    if config.out is not None:
        _write(config.out, results, prompts, answers)
    return results


def _named_once(flag: str, names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{flag}: two files are called {twice}, as their results would be; rename")


def _measure(config: EvaluateConfig, path: Path, tasks: Sequence[Any]) -> dict[str, Any]:
    from fastgpt.assess.tasks import evaluate_task

    if not config.data and not tasks:
        return {}
    model, tokenizer = _load(config, path)
    values: dict[str, Any] = {}
    if config.data:
        values |= bits_per_byte(model, tokenizer, config.data, masked=masks_documents(path))
    chat = _is_chat(config, tokenizer)
    for task in tasks:
        values[task.name] = evaluate_task(
            model, tokenizer, task, few_shot=config.few_shot, limit=config.limit, chat=chat,
            max_new_tokens=config.sampling.max_new_tokens,
        )  # fmt: skip
    return values


def _load(config: EvaluateConfig, path: Path) -> tuple[GPT, Tokenizer]:
    from fastgpt.run import load_model

    return load_model(path, device=config.device, dtype=config.dtype)


def _is_chat(config: EvaluateConfig, tokenizer: Tokenizer) -> bool:
    from fastgpt.chat import END

    return END in tokenizer.special_tokens if config.chat == "auto" else config.chat == "yes"


def masks_documents(run: Path) -> bool:
    """Whether the pretraining that a run goes back to kept attention inside a document."""
    from fastgpt.cli import read_toml
    from fastgpt.rundir import RunDir

    seen: set[Path] = set()
    while run.absolute() not in seen and RunDir(run).config_path.is_file():
        seen.add(run.absolute())
        tree = read_toml(RunDir(run).config_path, "--run")
        if isinstance(data := tree.get("data"), Mapping):
            return bool(data.get("mask_documents", False))
        run = Path(tree.get("init", run))
    return False


def bits_per_byte(
    model: GPT, tokenizer: Tokenizer, paths: Sequence[Path], *, masked: bool = False
) -> dict[str, float]:
    """``val_loss`` (nats per token) and ``val_bpb`` of the texts in ``paths``.

    ``masked``: attention and loss stay inside a document, see `masks_documents`.
    """
    import numpy as np
    import torch

    from fastgpt.data.batches import (
        PackedDataset,
        ShardWriter,
        open_shard,
        read_documents,
        validation_batches,
    )
    from fastgpt.distributed import World
    from fastgpt.evaluation import evaluate_loss
    from fastgpt.loss import next_token_loss

    identity = {"vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash}
    end = np.array([tokenizer.eot_id])
    context = model.config.context
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "tokens.bin"
        with ShardWriter(shard, **identity) as writer:
            for document in read_documents(paths):
                if writer.tokens and not document.continued:
                    writer.append(end, [1])
                writer.append(tokenizer.encode_to_numpy(document.text))
            writer.append(end, [1])
        dataset = PackedDataset([open_shard(shard, **identity)], context)
        batches = validation_batches(
            dataset, max(1, 8192 // context), mask_documents=masked, eot_id=tokenizer.eot_id
        )
        world = World(0, 1, model.wte.weight.device)
        with torch.compiler.set_stance(
            "force_eager"
        ):  # compiling would take longer than most texts
            return evaluate_loss(model, batches, next_token_loss, tokenizer.bytes_per_id(), world)


def _answers(config: EvaluateConfig, path: Path, prompts: Sequence[Prompt]) -> list[str]:
    model, tokenizer = _load(config, path)
    return answer(model, tokenizer, prompts, config.sampling, chat=_is_chat(config, tokenizer))


def answer(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    chat: bool,
) -> list[str]:
    """The model's answer to each prompt; one not finetuned on chats goes on behind the text."""
    from dataclasses import replace

    from fastgpt.chat import end_id, render_prompt
    from fastgpt.generate import continuation, generate

    stop = [tokenizer.eot_id, *([end_id(tokenizer)] if chat else [])]
    room = model.config.context - min(sampling.max_new_tokens, model.config.context // 2)
    texts = []
    for first in range(0, len(prompts), ANSWER_BATCH):
        rows = []
        for prompt in prompts[first : first + ANSWER_BATCH]:
            if chat:
                ids = render_prompt(tokenizer, prompt.messages)
            else:
                said = "\n\n".join(message["content"] for message in prompt.messages)
                ids = [tokenizer.eot_id, *tokenizer.encode(f"{said}\n\n")]
            rows.append(ids[-room:])
        drawn = replace(sampling, seed=sampling.seed + first)
        new = generate(model, rows, drawn, stop_ids=stop)
        pairs = zip(rows, new, strict=True)
        texts += [continuation(tokenizer, *pair, chat=chat) for pair in pairs]
    return texts


def _judged(
    config: EvaluateConfig, prompts: Sequence[Prompt], answers: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    from fastgpt.assess.judges import load_judge, scores_of, votes_from_scores

    judged = {}
    for spec in config.judge:
        judge = load_judge(spec, device=config.device, dtype=config.dtype)
        scores = {name: scores_of(judge, spec, prompts, texts) for name, texts in answers.items()}
        means = {name: sum(values) / len(values) for name, values in scores.items()}
        votes = votes_from_scores(scores, answers)
        judged[spec] = {"mean_score": means, **standings(votes)}
    return judged


def standings(votes: Sequence[Vote]) -> dict[str, Any]:
    """The leaderboard of ``votes``, and for every two models how often the first won."""
    from fastgpt.assess.ratings import leaderboard

    table = leaderboard(votes) if votes else []
    pairs: dict[str, list[float]] = {}
    for vote in votes:
        pairs.setdefault(f"{vote.a} over {vote.b}", []).append(vote.outcome)
        pairs.setdefault(f"{vote.b} over {vote.a}", []).append(1 - vote.outcome)
    rates = {pair: sum(outcomes) / len(outcomes) for pair, outcomes in sorted(pairs.items())}
    return {"leaderboard": [asdict(row) for row in table], "win_rate": rates}


def _shape(texts: Sequence[str]) -> dict[str, float]:
    """What a judge may be blind to: length, emptiness, repetition."""
    words = [text.split() for text in texts]
    pairs = [pair for text in words for pair in itertools.pairwise(text)]
    return {
        "characters": sum(map(len, texts)) / len(texts),
        "empty": sum(not text.strip() for text in texts) / len(texts),
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
    }


def _write(
    out: Path,
    results: Mapping[str, Any],
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[str]],
) -> None:
    from fastgpt.rundir import write_atomic

    write_atomic(out / "evaluate.json", json.dumps(results, indent=1) + "\n")
    if answers:
        lines = [
            json.dumps(
                {
                    "prompt": i,
                    "messages": prompt.messages,
                    "reference": prompt.reference,
                    "answers": {name: texts[i] for name, texts in answers.items()},
                },
                ensure_ascii=False,
            )
            for i, prompt in enumerate(prompts)
        ]
        write_atomic(out / "answers.jsonl", "\n".join(lines) + "\n")


def print_results(results: Mapping[str, Any]) -> None:
    """The results as text."""
    for name, values in results["runs"].items():
        for key, value in values.items():
            nested = value.items() if isinstance(value, Mapping) else [("", value)]
            shown = "  ".join(f"{k} {v:.4g}".strip() for k, v in nested)
            print(f"{name:<16} {key:<16} {shown}")
    for title, tables in (("judge", "judges"), ("votes", "votes")):
        for spec, judged in results.get(tables, {}).items():
            print(f"\n{title} {spec}")
            if not judged["leaderboard"]:
                for model, mean in judged.get("mean_score", {}).items():
                    print(f"{model:<16} mean score {mean:.3f}")
            for row in judged["leaderboard"]:
                bounds = f"[{row['low']:.0f}, {row['high']:.0f}]"
                mean = judged.get("mean_score", {}).get(row["model"])
                score = "" if mean is None else f"  mean score {mean:.3f}"
                print(
                    f"{row['rank']}. {row['model']:<14} {row['rating']:6.0f} {bounds:<14}"
                    f" wins {row['wins']:.3f} of {row['votes']}{score}"
                )


if __name__ == "__main__":
    raise SystemExit(command(main)())

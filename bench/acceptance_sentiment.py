"""Does the whole way work? Reviews, a scorer that is never seen, a judge from human ratings.

    python -m bench.acceptance_sentiment --seeds 0 1 2 --controls

A small model is pretrained on reviews, editorials and tweets; finetuned to go on with the first
words of a review; four continuations of each training prompt are ranked by VADER; the reward model
learns from the rankings, and PPO sees nothing but the reward model. Then base, SFT and RL model
continue 768 held-out prompts, and two judges that PPO never met compare them: VADER itself, and a
ridge regression to what people said of other reviews. Success cannot come from the reward model's
mistakes, and it is not allowed to come from repetition or silence: KL, distinct bigrams and ends
are bounded as well. Three controls have to fail: shuffled rankings, the reward model with its sign
turned, and a KL coefficient so large that nothing may change.

The text comes from a package on PyPI, see bench/sentiment.py; it is downloaded, never embedded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import sentiment
from bench.sentiment import HumanJudge, Reviews

PROMPT_WORDS = 4
RANKED_PROMPTS, HELD_OUT_RANKINGS, ANSWERS = 3000, 400, 4
HELD_OUT_PROMPTS = 768
NEW_TOKENS = 40
KL_TARGET = 8.0

PRETRAIN = (
    "--preset cpu-tiny --n-layer 4 --n-embd 128 --n-head 4 --vocab-size 2048 --context 64 "
    "--steps 500 --batch-tokens 4096 --val-fraction 0.02 --mask-documents "
    "--eval-every 0 --save-every 0 --sample-tokens 1"
)
SFT = "--epochs 2 --batch-tokens 2048 --eval-every 0 --save-every 0 --sample-tokens 1"
REWARD = "--epochs 2 --batch-prompts 16 --val-fraction 0.02 --eval-every 0 --sample-tokens 40"
PPO = "--rollout 128 --steps 480 --eval-every 0 --save-every 0 --kl-coef 0.1"

GATES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "reward model accuracy >= .70": lambda r: r["reward"]["accuracy"] >= 0.70,
    "reward model accuracy rises with margin": lambda r: r["reward"]["rises"],
    "VADER, RL - SFT >= .35": lambda r: r["paired"]["vader"][0] >= 0.35,
    "human judge, RL - SFT >= .4": lambda r: r["paired"]["human"][0] >= 0.4,
    "win rate by VADER >= .75": lambda r: r["win_rate"]["vader"] >= 0.75,
    "win rate by the human judge >= .75": lambda r: r["win_rate"]["human"] >= 0.75,
    "KL <= 1.5 x target": lambda r: r["models"]["rl"]["kl"] <= 1.5 * KL_TARGET,
    "distinct-2 >= .6 x SFT": lambda r: (
        r["models"]["rl"]["distinct_2"] >= 0.6 * r["models"]["sft"]["distinct_2"]
    ),
    "EOS >= .8 x SFT": lambda r: r["models"]["rl"]["eos"] >= 0.8 * r["models"]["sft"]["eos"],
    "leaderboard: RL above SFT": lambda r: all(
        board.index("rl") < board.index("sft") for board in r["leaderboard"].values()
    ),
}

CONTROLS = ("shuffled", "flipped", "huge_beta")


@dataclass(frozen=True)
class Judges:
    """The two who never taught."""

    vader: Callable[[str], float]
    human: HumanJudge

    def scores(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Scores by judge, a higher one is a kinder text."""
        return {"vader": np.array([self.vader(t) for t in texts]), "human": self.human(texts)}


def stage(name: str, *words: object) -> float:
    """Run a stage as a user would, unless its run is complete; seconds."""
    arguments = [sys.executable, "-m", f"fastgpt.{name}", *map(str, words)]
    out = Path(str(words[words.index("--out") + 1]))
    if (out / "report.html").is_file():
        return 0.0
    start = time.monotonic()
    path = os.pathsep.join([str(out.parent), *sys.path])
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[1:])}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.monotonic() - start


def split_prompt(text: str) -> tuple[str, str] | None:
    """The first words of a review, and the rest; None for one too short."""
    words = text.split()
    if len(words) < PROMPT_WORDS + 3:
        return None
    return " ".join(words[:PROMPT_WORDS]), " ".join(words[PROMPT_WORDS:])


def write_data(reviews: Reviews, folder: Path) -> None:
    """Files for the stages: text, chats, prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [s.text for s in reviews.train] + reviews.other_texts
    random.Random(0).shuffle(texts)
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    pairs = [pair for s in reviews.train if (pair := split_prompt(s.text))]
    held = [pair for s in reviews.held_out if (pair := split_prompt(s.text))][:HELD_OUT_PROMPTS]
    write_jsonl(folder / "chats.jsonl", [{"prompt": p, "response": r} for p, r in pairs])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p, _ in pairs])
    write_jsonl(folder / "held_out.jsonl", [{"prompt": p} for p, _ in held])


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """What `write_jsonl` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass
class Said:
    """Answers of a model: ids with the end of turn where there is one."""

    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    ended: list[bool]


def sample(run: Path, prompts: Sequence[str], seed: int) -> Said:
    """Answers at temperature 1, from the model's own distribution."""
    from fastgpt.chat import end_id, render_prompt, with_chat_tokens
    from fastgpt.generate import SamplingConfig, generate
    from fastgpt.run import load_model

    model, tokenizer = load_model(run)
    chat = with_chat_tokens(tokenizer)
    is_chat = chat.vocab_size == tokenizer.vocab_size
    end = end_id(chat) if is_chat else tokenizer.eot_id
    said = Said([], [], [], [])
    for first in range(0, len(prompts), 256):
        part = prompts[first : first + 256]
        if is_chat:
            rows = [render_prompt(chat, [{"role": "user", "content": p}]) for p in part]
        else:
            rows = [[tokenizer.eot_id, *tokenizer.encode(p)] for p in part]
        drawn = SamplingConfig(NEW_TOKENS, temperature=1.0, seed=seed + first)
        for row, ids in zip(rows, generate(model, rows, drawn, stop_ids=[end]), strict=True):
            ended = len(ids) < NEW_TOKENS
            said.prompts.append(row)
            said.answers.append([*ids, end] if ended else ids)
            said.texts.append(tokenizer.decode(ids).strip())
            said.ended.append(ended)
    return said


def rank(run: Path, folder: Path, vader: Callable[[str], float], seed: int, shuffle: bool) -> Path:
    """Four answers to each of some training prompts, ranked by VADER, as a file of rankings.

    Some rankings are kept apart from it, in rankings-held-out.jsonl.
    """
    path = folder / ("rankings-shuffled.jsonl" if shuffle else "rankings.jsonl")
    if path.is_file():
        return path
    if shuffle:
        return shuffled(rank(run, folder, vader, seed, shuffle=False), path, seed)
    prompts = [record["prompt"] for record in read_jsonl(folder / "prompts.jsonl")]
    prompts = random.Random(seed).sample(prompts, RANKED_PROMPTS)
    said = sample(run, [p for p in prompts for _ in range(ANSWERS)], seed + 10_000)
    records = []
    for i, prompt in enumerate(prompts):
        texts = [t or "." for t in said.texts[i * ANSWERS : (i + 1) * ANSWERS]]
        scores = [vader(text) for text in texts]
        order = sorted(range(ANSWERS), key=lambda j: -scores[j])
        records.append(
            {
                "prompt": prompt,
                "responses": [texts[j] for j in order],
                "scores": [scores[j] for j in order],
            }
        )
    write_jsonl(folder / "rankings-held-out.jsonl", records[:HELD_OUT_RANKINGS])
    write_jsonl(path, records[HELD_OUT_RANKINGS:])
    return path


def shuffled(rankings: Path, path: Path, seed: int) -> Path:
    """The same rankings with the scores of each prompt dealt out at random."""
    luck, records = random.Random(seed), []
    for record in read_jsonl(rankings):
        pairs = list(zip(luck.sample(record["scores"], ANSWERS), record["responses"], strict=True))
        pairs.sort(key=lambda pair: -pair[0])
        scores, responses = zip(*pairs, strict=True)
        records.append({**record, "scores": scores, "responses": responses})
    write_jsonl(path, records)
    return path


def log_probs(run: Path, said: Said) -> np.ndarray:
    """Log-probability of each answer under the model of ``run``, nats."""
    from fastgpt.assess.tasks import score
    from fastgpt.run import load_model

    model, _ = load_model(run)
    pairs = list(zip(said.prompts, said.answers, strict=True))
    return np.array([total for total, _ in score(model, pairs)])


def measure(runs: dict[str, Path], folder: Path, judges: Judges, seed: int) -> dict[str, Any]:
    """What the models say on held-out prompts, and what the judges say of it."""
    from fastgpt.assess.judges import votes_from_scores
    from fastgpt.assess.ratings import leaderboard
    from fastgpt.rl.formulas import distinct_n

    prompts = [record["prompt"] for record in read_jsonl(folder / "held_out.jsonl")]
    said = {name: sample(run, prompts, seed + 20_000) for name, run in runs.items()}
    scores = {name: judges.scores(s.texts) for name, s in said.items()}
    models: dict[str, dict[str, float]] = {}
    for name, s in said.items():
        models[name] = {
            "vader": float(scores[name]["vader"].mean()),
            "human": float(scores[name]["human"].mean()),
            "positive": float((scores[name]["vader"] > 0.05).mean()),
            "eos": float(np.mean(s.ended)),
            "length": float(np.mean([len(a) for a in s.answers])),
            "distinct_2": distinct_n(s.answers),
        }
    own, sft = log_probs(runs["rl"], said["rl"]), log_probs(runs["sft"], said["rl"])
    models["rl"]["kl"] = float((own - sft).mean())
    models["rl"]["nll_under_sft"] = float(-sft.sum() / sum(map(len, said["rl"].answers)))
    result: dict[str, Any] = {"models": models, "paired": {}, "win_rate": {}, "leaderboard": {}}
    for judge in ("vader", "human"):
        difference = scores["rl"][judge] - scores["sft"][judge]
        se = difference.std(ddof=1) / math.sqrt(len(difference))
        result["paired"][judge] = [float(difference.mean()), float(se)]
        wins = (difference > 0) + 0.5 * (difference == 0)
        result["win_rate"][judge] = float(wins.mean())
        answers = {name: said[name].texts for name in runs}
        judged = {name: scores[name][judge].tolist() for name in runs}
        votes = votes_from_scores(judged, answers)
        result["leaderboard"][judge] = [row.model for row in leaderboard(votes)]
    result["samples"] = [
        {"prompt": prompts[i], **{name: s.texts[i] for name, s in said.items()}} for i in range(6)
    ]
    return result


def experiment(
    folder: Path, root: Path, judges: Judges, seed: int, control: str | None = None
) -> dict[str, Any]:
    """The whole way with one seed; a control shares the stages that it does not change."""
    data = folder / "data"
    runs = {name: folder / name for name in ("base", "sft")}
    suffix = f"-{control}" if control else ""
    reward_suffix = suffix if control == "shuffled" else ""
    reward, rl = folder / f"reward{reward_suffix}", folder / f"rl{suffix}"
    if not data.is_dir():
        write_data(sentiment.read_reviews(root), data)
    common = ("--seed", seed)
    start = time.monotonic()
    seconds = {
        "pretrain": stage(
            "pretrain", *PRETRAIN.split(), *common,
            "--data", data / "text.txt", "--out", runs["base"],
        ),
        "sft": stage(
            "sft", *SFT.split(), *common, "--init", runs["base"],
            "--data", data / "chats.jsonl", "--out", runs["sft"],
        ),
    }  # fmt: skip
    rankings = rank(runs["sft"], data, judges.vader, seed, control == "shuffled")
    seconds["reward"] = stage(
        "reward",
        *REWARD.split(),
        *common,
        "--init",
        runs["sft"],
        "--data",
        rankings,
        "--out",
        reward,
    )
    extra: tuple[object, ...] = ("--reward", reward)
    if control == "flipped":
        (folder / "flipped.py").write_text(FLIPPED.format(reward=str(reward.resolve())))
        extra = ("--reward-fn", "flipped:score")
    elif control == "huge_beta":
        extra = (*extra, "--kl-coef", 100.0, "--kl-controller", "fixed")
    seconds["ppo"] = stage(
        "ppo", *PPO.split(), *common, "--init", runs["sft"],
        "--prompts", data / "prompts.jsonl", "--max-new-tokens", NEW_TOKENS,
        "--kl-target", KL_TARGET, *extra, "--out", rl,
    )  # fmt: skip
    quality = reward_quality(reward, data / "rankings-held-out.jsonl")
    result = measure({**runs, "rl": rl}, data, judges, seed)
    result |= {"seed": seed, "control": control, "reward": quality}
    result |= {"seconds": seconds, "seconds_in_all": time.monotonic() - start}
    result["gates"] = {name: bool(gate(result)) for name, gate in GATES.items()}
    return result


def reward_quality(run: Path, held_out: Path) -> dict[str, Any]:
    """Accuracy of the reward model on held-out rankings, in all and in quarters by margin."""
    from fastgpt.assess.judges import load_judge

    records = read_jsonl(held_out)
    prompts = [[{"role": "user", "content": r["prompt"]}] for r in records for _ in range(ANSWERS)]
    answers = [text for record in records for text in record["responses"]]
    found = np.array(load_judge(str(run))(prompts, answers, [])).reshape(-1, ANSWERS)  # pyright: ignore
    truth = np.array([record["scores"] for record in records])
    a, b = np.triu_indices(ANSWERS, 1)
    margins, leads = (truth[:, a] - truth[:, b]).ravel(), (found[:, a] - found[:, b]).ravel()
    margins, leads = margins[margins > 0], leads[margins > 0]
    right = (leads > 0) + 0.5 * (leads == 0)
    quarters = np.array_split(np.argsort(margins, kind="stable"), 4)
    accuracies = [float(right[quarter].mean()) for quarter in quarters]
    return {
        "pairs": len(margins),
        "accuracy": float(right.mean()),
        "accuracy_by_margin": accuracies,
        "rises": accuracies == sorted(accuracies),
    }


FLIPPED = """
from fastgpt.assess.judges import load_judge

judge = load_judge({reward!r})


def score(prompts, responses, references):
    return [-value for value in judge(prompts, responses, references)]
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run seeds and controls; 1 when a gate says otherwise than it must."""
    parser = argparse.ArgumentParser(prog="python -m bench.acceptance_sentiment")
    parser.add_argument("--folder", type=Path, default=Path("runs/acceptance-sentiment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--controls", action="store_true", help="also those that must fail")
    parser.add_argument("--out", type=Path, help="write the results here, .json")
    options = parser.parse_args(argv)
    root = sentiment.download(options.folder)
    reviews = sentiment.read_reviews(root)
    judges = Judges(sentiment.load_vader(root), HumanJudge(reviews.train))
    results, good = [], True
    for seed in options.seeds:
        for control in (None, *(CONTROLS if options.controls else ())):
            folder = options.folder / f"seed-{seed}"
            result = experiment(folder, root, judges, seed, control)
            results.append(result)
            passed = all(result["gates"].values())
            good &= passed == (control is None)
            print(f"\nseed {seed}, {control or 'the real thing'}: {result['seconds_in_all']:.0f} s")
            for name, values in result["models"].items():
                shown = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
                print(f"  {name:<5} {shown}")
            for name, held in result["gates"].items():
                print(f"  {'holds' if held else 'FAILS'}  {name}")
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

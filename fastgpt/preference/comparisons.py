"""Rankings as token ids in packed rows: what the reward model and DPO learn from.

A comparison is one prompt with all its answers, each as ``[prompt, answer, <|end|>]``. All of them
go into one forward pass and one optimizer step: pairs of a prompt spread over an epoch would show
each answer K - 1 times, and a model overfits on that (InstructGPT, arXiv:2203.02155, section 3.5).

Rows of a fixed length hold answers back to back, each seeing only itself; a micro-batch has as many
rows as its answers fill, for a compiled block takes any number of them. Comparison g of a run is
number ``permute(g % n, n, (seed, g // n))``, as in `fastgpt.data.batches`.

Shape suffixes: B rows, T positions, R answers, P pairs, N tokens to predict.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.chat import end_id, render_prompt
from fastgpt.config import RankingConfig
from fastgpt.data.batches import IGNORE_INDEX
from fastgpt.data.examples import embedded
from fastgpt.data.order import mix64, permute
from fastgpt.data.packing import TARGET_GROUP, pack
from fastgpt.data.rankings import Ranking, read_rankings, untied
from fastgpt.distributed import World
from fastgpt.errors import DataError, UsageError
from fastgpt.tokenizer import Tokenizer

C = TypeVar("C", bound=RankingConfig)

_CHUNK = 256  # comparisons that are packed together when all are gone through


@dataclass(frozen=True, slots=True)
class Comparison:
    """A ranking as ids.

    Attributes:
        answers: int64 ids of each answer behind its prompt.
        prompt: ids of the prompt.
        pairs: (better, worse), indices of ``answers``.
        differences: of the scores of each pair, above 0.
        ranking: where it is from, None for answers that nobody ranked.
    """

    answers: list[np.ndarray]
    prompt: int
    pairs: list[tuple[int, int]]
    differences: list[float]
    ranking: Ranking | None = None


def split(
    rankings: Sequence[Ranking], fraction: float, seed: int
) -> tuple[list[Ranking], list[Ranking]]:
    """Held-out rankings and the others; all of one prompt are on one side, chosen by the seed.

    At least one prompt is held out unless ``fraction`` is 0. Raises DataError when none would be
    left to learn from.
    """
    by_prompt: dict[str, list[Ranking]] = {}
    for ranking in rankings:
        by_prompt.setdefault(json.dumps(ranking.prompt), []).append(ranking)
    groups = list(by_prompt.values())
    held = max(1, round(fraction * len(groups))) if fraction else 0
    if held >= len(groups):
        where = rankings[0].source if rankings else "no data"
        raise DataError(
            f"{where}: {len(groups)} different prompts, {held} held out; give more, or "
            "--val-fraction 0"
        )
    order = permute(np.arange(len(groups)), len(groups), seed).tolist()
    held_out = [ranking for i in order[:held] for ranking in groups[i]]
    return held_out, [ranking for i in order[held:] for ranking in groups[i]]


def answer_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an answer, its ``<|end|>`` included."""
    return [*tokenizer.encode(text), end_id(tokenizer)]


def encode(
    rankings: Sequence[Ranking],
    tokenizer: Tokenizer,
    seq_len: int,
    on_long: Literal["error", "skip"],
    say: Callable[[str], Any],
) -> list[Comparison]:
    """The rankings as ids, answers cut behind ``seq_len`` ids in all; ``say`` gets how many were.

    An answer that is cut ends in its own last token, without ``<|end|>``. Raises DataError for a
    prompt that leaves no place for an answer, unless ``on_long`` is "skip".
    """
    comparisons: list[Comparison] = []
    cut = skipped = 0
    for ranking in rankings:
        prompt = render_prompt(tokenizer, ranking.prompt)
        if len(prompt) >= seq_len:
            if on_long == "error":
                raise DataError(
                    f"{ranking.source}:{ranking.line}: the prompt has {len(prompt)} tokens, a row "
                    f"has {seq_len}; shorten it, raise --seq-len, or --on-long skip"
                )
            skipped += 1
            continue
        answers = [[*prompt, *answer_ids(tokenizer, text)] for text in ranking.responses]
        cut += sum(len(ids) > seq_len for ids in answers)
        pairs = ranking.pairs()
        differences = [ranking.scores[i] - ranking.scores[j] for i, j in pairs]
        rows = [np.array(ids[:seq_len], dtype=np.int64) for ids in answers]
        comparisons.append(Comparison(rows, len(prompt), pairs, differences, ranking))
    if cut:
        say(f"{cut} answers are longer than {seq_len} tokens with their prompt: their ends are cut")
    if skipped:
        say(f"{skipped} rankings are left out: their prompt fills --seq-len {seq_len}")
    return comparisons


def row_length(seq_len: int | None, context: int) -> int:
    """Tokens of a packed row. Raises UsageError beyond the model's context."""
    if seq_len is not None and seq_len > context:
        raise UsageError(f"--seq-len {seq_len} is beyond the context of {context} of the model")
    return seq_len or context


def micro_rows(micro_batch: int | None, seq_len: int, device: torch.device) -> int:
    """Most rows of a forward pass: ``micro_batch``, or what 16k tokens (GPU) or 4k (CPU) hold."""
    return micro_batch or max(1, (16384 if device.type == "cuda" else 4096) // seq_len)


class PackedComparisons:
    """Comparisons packed into micro-batches of up to ``rows`` x ``seq_len``; ``len()`` counts them.

    Answers are numbered through all comparisons, ``n_answers`` in all. Raises ValueError for an
    answer that fits no row.
    """

    def __init__(
        self, comparisons: Sequence[Comparison], seq_len: int, rows: int, *, seed: int = 0
    ):
        self.comparisons, self.seq_len, self.rows, self.seed = comparisons, seq_len, rows, seed
        counts = [len(c.answers) for c in comparisons]
        self.first = np.cumsum([0, *counts])[:-1]
        self.n_answers = sum(counts)
        self.lengths = [[len(ids) for ids in c.answers] for c in comparisons]
        if any(not 1 <= n <= seq_len for lengths in self.lengths for n in lengths):
            raise ValueError(f"answers must have 1 to {seq_len} ids")

    def __len__(self) -> int:
        return len(self.comparisons)

    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides a step; ``rows`` may be others on another device."""
        digest = hashlib.sha256(f"{self.seq_len} {self.seed}\n".encode())
        for c in self.comparisons:
            digest.update(f"{c.prompt} {c.pairs} {c.differences}\n".encode())
            for ids in c.answers:
                digest.update(b"%d:" % len(ids) + ids.astype("<i8").tobytes())
        return digest.hexdigest()

    def step(
        self, step: int, prompts: int, *, rank: int = 0, world_size: int = 1, predict: bool = False
    ) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of optimizer step ``step``, ``prompts`` over all ranks."""
        members = self._members(step * prompts + rank, (step + 1) * prompts, world_size)
        return [self.batch(group, predict=predict) for group in self.groups(members)]

    def _members(self, begin: int, end: int, every: int = 1) -> list[int]:
        g, n = np.arange(begin, end, every), len(self)
        seeds = mix64(mix64(self.seed) + (g // n).astype(np.uint64))
        return permute(g % n, n, seeds).tolist()

    def tokens_before(self, g: int) -> int:
        """Ids of prompts and answers, each answer with its prompt, of comparisons [0, g) of a run.

        A function of ``g`` alone, so that a resumed run counts on.
        """
        n = len(self)
        sizes = [sum(lengths) for lengths in self.lengths]
        begun = self._members(g - g % n, g)
        return g // n * sum(sizes) + sum(sizes[i] for i in begun)

    def all(
        self, *, rank: int = 0, world_size: int = 1, predict: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's part of all comparisons, each once."""
        members = list(range(rank, len(self), world_size))
        for start in range(0, len(members), _CHUNK):
            for group in self.groups(members[start : start + _CHUNK]):
                yield self.batch(group, predict=predict)

    def groups(self, members: Sequence[int]) -> list[list[int]]:
        """Whole comparisons in as few micro-batches as first-fit by falling size finds."""
        groups: list[list[int]] = []
        for i in sorted(members, key=lambda i: -sum(self.lengths[i])):
            fitting = next((group for group in groups if self._fits([*group, i])), None)
            if fitting is None:
                groups.append([i])
            else:
                fitting.append(i)
        return groups

    def _fits(self, members: Sequence[int]) -> bool:
        if sum(sum(self.lengths[i]) for i in members) > self.rows * self.seq_len:
            return False
        lengths = np.array([n for i in members for n in self.lengths[i]], dtype=np.int64)
        return len(pack(lengths, self.seq_len)) <= self.rows

    def batch(self, members: Sequence[int], *, predict: bool = False) -> dict[str, Tensor]:
        """These comparisons as one micro-batch, on the CPU.

        A comparison too large for ``rows`` gets more of them.

        Returns:
            ``inputs_BT`` int64 ids, 0 where nothing is; ``positions_BT`` int64, from 0 in each
            answer; ``doc_start_BT`` int32, where in the row the answer begins; ``last_R`` int64,
            place of each answer's last token in the flattened rows; ``numbers_R`` int64, the
            answers; ``better_P``, ``worse_P`` int64, indices into them; ``weights_P`` float32, 1 /
            pairs of the prompt; ``differences_P`` float32, of scores; ``targets_BT`` int64, a 0 for
            each comparison with a pair: what the training loop counts.

            With ``predict`` also what the answers' log-probabilities need, filled up with -100 to a
            multiple of `TARGET_GROUP`: ``places_N`` int64, the place in front of each token of an
            answer, ``ids_N`` int64, that token, and ``counts_R1`` int64, how many each answer has,
            and behind them how many fill up.
        """
        texts = [ids for i in members for ids in self.comparisons[i].answers]
        packed = pack(np.array([len(ids) for ids in texts], dtype=np.int64), self.seq_len)
        # A single row among batches of several would be compiled on its own.
        B, T = max(min(2, self.rows), len(packed)), self.seq_len
        inputs = np.zeros((B, T), dtype=np.int64)
        positions = np.zeros((B, T), dtype=np.int64)
        # A place without an answer sees itself alone.
        starts = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        begins = np.zeros(len(texts), dtype=np.int64)
        for b, held in enumerate(packed):
            begin = 0
            for r in held:
                end = begin + len(texts[r])
                inputs[b, begin:end] = texts[r]
                positions[b, begin:end] = np.arange(end - begin)
                starts[b, begin:end] = begin
                begins[r] = b * T + begin
                begin = end
        arrays = {
            "inputs_BT": inputs,
            "positions_BT": positions,
            "doc_start_BT": starts,
            "last_R": begins + [len(ids) - 1 for ids in texts],
            **self._pairs(members),
        }
        if predict:
            arrays |= self._predicted(members, texts, begins)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _pairs(self, members: Sequence[int]) -> dict[str, np.ndarray]:
        found = [self.comparisons[i] for i in members]
        pairs, weights, differences = all_pairs(found)
        both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        numbers = [self.first[i] + np.arange(len(self.lengths[i])) for i in members]
        return {
            "numbers_R": np.concatenate(numbers),
            "better_P": both[:, 0].copy(),
            "worse_P": both[:, 1].copy(),
            "weights_P": weights.astype(np.float32),
            "differences_P": differences.astype(np.float32),
            "targets_BT": np.zeros(sum(bool(c.pairs) for c in found), dtype=np.int64),
        }

    def _predicted(
        self, members: Sequence[int], texts: Sequence[np.ndarray], begins: np.ndarray
    ) -> dict[str, np.ndarray]:
        prompts = [self.comparisons[i].prompt for i in members for _ in self.comparisons[i].answers]
        counts = [len(ids) - p for ids, p in zip(texts, prompts, strict=True)]
        ids = np.concatenate([ids[p:] for ids, p in zip(texts, prompts, strict=True)])
        places = np.concatenate(
            [
                begin + np.arange(p - 1, p - 1 + n)
                for begin, p, n in zip(begins, prompts, counts, strict=True)
            ]
        )
        fill = -len(ids) % TARGET_GROUP
        return {
            "places_N": np.pad(places, (0, fill)),
            "ids_N": np.pad(ids, (0, fill), constant_values=IGNORE_INDEX),
            "counts_R1": np.array([*counts, fill], dtype=np.int64),
        }


def prompts_per_step(
    data: PackedComparisons, given: int | None, batch_tokens: int, world_size: int
) -> int:
    """Prompts of an optimizer step: ``given``, or about ``batch_tokens`` of prompts and answers.

    Raises DataError without data, UsageError for fewer prompts than processes.
    """
    if not len(data):
        raise DataError("no ranking is left to learn from; give more, or raise --seq-len")
    mean = sum(map(sum, data.lengths)) / len(data)
    prompts = given or max(world_size, round(batch_tokens / mean))
    if prompts < world_size:
        raise UsageError(f"--batch-prompts {prompts}: {world_size} processes need one each")
    return min(prompts, max(len(data), world_size))


def all_pairs(
    comparisons: Sequence[Comparison],
) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Pairs of all comparisons, answers numbered through; their weights and score differences.

    A weight is 1 / pairs of the prompt, so that weights sum to the number of prompts with a pair.
    """
    pairs: list[tuple[int, int]] = []
    first = 0
    for c in comparisons:
        pairs += [(first + i, first + j) for i, j in c.pairs]
        first += len(c.answers)
    weights = np.array([1 / len(c.pairs) for c in comparisons for _ in c.pairs])
    return pairs, weights, np.array([d for c in comparisons for d in c.differences])


@dataclass(frozen=True)
class Prepared:
    """Training and validation set, and the prompts of an optimizer step."""

    train: PackedComparisons
    val: PackedComparisons | None
    prompts: int


def prepare(
    config: C, tokenizer: Tokenizer, world: World, *, needs_scores: str = ""
) -> tuple[C, Prepared]:
    """Read, split, encode and pack rankings; rank 0 says how many there are.

    Held-out prompts that are too long are left out, whatever ``--on-long`` says.

    Args:
        config: of the stage, with the model's shape.
        tokenizer: with the chat's tokens.
        world: its size divides a step.
        needs_scores: the flag that has no meaning for rankings without scores.

    Returns:
        The configuration with the steps and the prompts of a step, and the data.
    """
    settings = config.train
    seq_len = row_length(settings.seq_len, config.model.context)
    rankings = read_rankings(config.data or (embedded("rankings"),))
    bad = next((r for r in rankings if needs_scores and not r.scored), None)
    if bad is not None:
        where = f"{bad.source}:{bad.line}"
        raise UsageError(
            f"{needs_scores} needs 'scores' or 'margin', and {where} has none; leave it out"
        )
    say = print if world.rank == 0 else _nothing
    kept = untied(rankings)
    held_out, learned = split(kept, config.val_fraction, settings.seed)
    rows = micro_rows(settings.micro_batch, seq_len, world.device)
    comparisons = encode(learned, tokenizer, seq_len, config.on_long, say)
    train = PackedComparisons(comparisons, seq_len, rows, seed=settings.seed)
    held = encode(held_out, tokenizer, seq_len, "skip", _nothing)
    val = PackedComparisons(held, seq_len, rows) if held else None
    prompts = prompts_per_step(train, config.batch_prompts, settings.batch_tokens, world.size)
    steps = settings.steps or max(1, round(config.epochs * len(train) / prompts))
    tied = len(rankings) - len(kept)
    say(
        f"{len(train)} rankings with {train.n_answers} answers and "
        f"{sum(len(c.pairs) for c in comparisons)} pairs, {prompts} a step; {len(held)} held out"
        + (f"; {tied} left out, for all their answers are tied" if tied else "")
    )
    config = replace(config, batch_prompts=prompts, train=replace(settings, steps=steps))
    return config, Prepared(train, val, prompts)


def _nothing(message: str) -> None:
    """For processes that print nothing."""


def pair_loss(advantages_P: Tensor, weights_P: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Sum over prompts of the mean over their pairs of -log sigmoid(advantage), float32, 0-d.

    Bradley-Terry: ``advantages_P`` is by how much the better answer leads, and its sigmoid the
    probability that it wins. ``smoothing`` is the probability that a label is wrong. Written as a
    softplus, which neither overflows nor loses the small losses.
    """
    losses = F.softplus(-advantages_P)
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * F.softplus(advantages_P)
    return (weights_P * losses).sum()

"""Continue prompts: ``python -m fastgpt.generate --run runs/x --prompt "..."``."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt.cli import command, from_flags
from fastgpt.errors import UsageError

if TYPE_CHECKING:
    import torch

    from fastgpt.model import GPT, KVCache
    from fastgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    """0 takes the most probable token."""
    top_k: int | None = None
    """Choose among this many most probable tokens."""
    top_p: float | None = None
    """Choose among the fewest tokens that hold this probability."""
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError for values outside their range."""
        bounds = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k is None or self.top_k >= 1,
            "top_p": self.top_p is None or 0 < self.top_p <= 1,
        }
        for name, good in bounds.items():
            if not good:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} {getattr(self, name)} is out of range")


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a trained model."""

    run: Path
    """Run directory of a trained model."""
    prompt: tuple[str, ...] = ()
    """Texts to continue; several are done as one batch. Default: standard input."""
    stop: tuple[str, ...] = ()
    """End a continuation before the first of these texts."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    device: str = "auto"
    debug: bool = False
    """Show the traceback of an error."""
    sampling: SamplingConfig = SamplingConfig()


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    stop_ids: Collection[int] = (),
) -> list[list[int]]:
    """Continue each prompt; see `stream`. Returns the new ids, without the stop id."""
    rows: list[list[int]] = [[] for _ in prompts]
    for ids in stream(model, prompts, sampling, stop_ids=stop_ids):
        for row, token in zip(rows, ids, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    stop_ids: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Yield the next id of every prompt, None for rows that are done, until all are.

    Prompts of different length share a batch: shorter ones are padded on the left and the padding
    is never attended to, so a row does not depend on its neighbours (up to rounding). Each row
    draws from a generator of its own, seeded by (seed, row).

    Raises:
        UsageError: an empty prompt, or one that leaves no room in the model's context.
    """
    import torch

    from fastgpt.model import KVCache

    sampling.check()
    room = model.config.context - max(map(len, prompts), default=0)
    if not prompts or min(map(len, prompts)) == 0:
        raise UsageError("nothing to continue: the prompt is empty")
    if room < 1:
        longest = max(map(len, prompts))
        raise UsageError(
            f"the prompt has {longest} tokens, the model's context is {model.config.context}; "
            "shorten the prompt"
        )
    device = model.wte.weight.device
    length = max(map(len, prompts))
    pads = torch.tensor([length - len(p) for p in prompts], device=device)
    padded = [[0] * (length - len(p)) + list(p) for p in prompts]
    tokens_BT = torch.tensor(padded, dtype=torch.int64, device=device)
    n_new = min(sampling.max_new_tokens, room)
    generators = [
        torch.Generator().manual_seed(sampling.seed + 7919 * i) for i in range(len(prompts))
    ]
    done = [False] * len(prompts)
    cache = KVCache(model, len(prompts), length + n_new, pads)
    for _ in range(n_new):
        tokens_BT = sample(_next_logits(model, tokens_BT, cache), sampling, generators)[:, None]
        ids = tokens_BT[:, 0].tolist()
        done = [d or token in stop_ids for d, token in zip(done, ids, strict=True)]
        if all(done):
            return
        yield [None if d else token for d, token in zip(done, ids, strict=True)]


def _next_logits(model: GPT, tokens_BT: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Logits (B, V) behind ``tokens_BT``, which join the cache."""
    import torch

    # Not around the loop of `stream`, whose caller would run under them between two tokens.
    eager = torch.compiler.set_stance("force_eager")  # every length would be compiled anew
    with torch.no_grad(), eager:
        return model.logits(model(tokens_BT, cache=cache)[:, -1])


def sample(
    logits_BV: torch.Tensor,
    sampling: SamplingConfig,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Choose an id for each row: int64 (B,), on the device of ``logits_BV`` (float32)."""
    import torch

    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = (logits_BV / sampling.temperature).cpu()
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    probs_BV = logits_BV.softmax(-1)
    if sampling.top_p is not None:
        descending, order = probs_BV.sort(dim=-1, descending=True, stable=True)
        before = descending.cumsum(-1) - descending
        descending = descending.masked_fill(before >= sampling.top_p, 0.0)
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order, descending)
    rows = [
        torch.multinomial(row, 1, generator=g) for row, g in zip(probs_BV, generators, strict=True)
    ]
    return torch.cat(rows)


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    *,
    stop: Sequence[str] = (),
) -> list[str]:
    """Continue texts, each to its end-of-text id or to just before the first of ``stop``."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    rows: list[list[int]] = [[] for _ in ids]
    texts = [""] * len(ids)
    for new in stream(model, ids, sampling, stop_ids=(tokenizer.eot_id,)):
        for row, token in zip(rows, new, strict=True):
            if token is not None:
                row.append(token)
        texts = [continuation(tokenizer, *pair) for pair in zip(ids, rows, strict=True)]
        ended = [
            token is None or _cut(text, stop) != text
            for token, text in zip(new, texts, strict=True)
        ]
        if all(ended):
            break
    return [_cut(text, stop) for text in texts]


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that ``new`` adds behind ``prompt``.

    Decoded together: alone, a sentencepiece model would drop the space in front of the first word.
    """
    prefix = tokenizer.decode(prompt)
    return tokenizer.decode([*prompt, *new])[len(prefix) :]


def _cut(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.partition(mark)[0]
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = from_flags(GenerateConfig, argv)
    config.sampling.check()
    if "" in config.stop:
        raise UsageError("--stop: an empty text would end every continuation at once")
    from fastgpt.run import load_model

    model, tokenizer = load_model(config.run, step=config.step, device=config.device)
    prompts = config.prompt or (sys.stdin.read(),)
    texts = complete(model, tokenizer, prompts, config.sampling, stop=config.stop)
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)


if __name__ == "__main__":
    raise SystemExit(command(main)())

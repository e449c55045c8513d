"""Continue prompts: ``python -m fastgpt.generate --run runs/x --prompt "..."``."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastgpt.cli import command, from_flags
from fastgpt.errors import UsageError

if TYPE_CHECKING:
    import torch

    from fastgpt.model import GPT
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
    chat: Literal["auto", "yes", "no"] = "auto"
    """Answer the prompt as the user's turn; auto: when the model was finetuned on chats."""
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

    from fastgpt.decoder import Decoder

    sampling.check()
    longest = max(map(len, prompts), default=0)
    n_new = min(sampling.max_new_tokens, model.config.context - longest)
    decoder = Decoder(model)
    logits_BV = decoder.start(prompts, n_new)
    generators = [
        torch.Generator().manual_seed(sampling.seed + 7919 * i) for i in range(len(prompts))
    ]
    uniforms_BN = torch.stack(
        [torch.rand(n_new, generator=g, dtype=torch.float64) for g in generators]
    ).to(logits_BV.device)
    done = [False] * len(prompts)
    for i in range(n_new):
        tokens_B = sample(logits_BV, sampling, uniforms_BN[:, i])
        ids = tokens_B.tolist()
        done = [d or token in stop_ids for d, token in zip(done, ids, strict=True)]
        if all(done):
            return
        yield [None if d else token for d, token in zip(done, ids, strict=True)]
        if i + 1 < n_new:
            logits_BV = decoder.step(tokens_B)


def sample(
    logits_BV: torch.Tensor, sampling: SamplingConfig, uniforms_B: torch.Tensor
) -> torch.Tensor:
    """Choose an id for each row: where its cumulative distribution passes the row's uniform number.

    Args:
        logits_BV: float32.
        sampling: temperature, top_k, top_p.
        uniforms_B: float64 in [0, 1), one a row; one draw of a generator costs less than one for
            each id of the vocabulary.

    Returns:
        int64 (B,).
    """
    from fastgpt.decoder import draw, most_probable

    if sampling.temperature < 1e-6:  # logits divided by less may be infinite
        return most_probable(logits_BV)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    probs_BV = logits_BV.softmax(-1)
    if sampling.top_p is not None:
        descending, order = probs_BV.sort(dim=-1, descending=True, stable=True)
        before = descending.cumsum(-1) - descending
        descending = descending.masked_fill(before >= sampling.top_p, 0.0)
        probs_BV = probs_BV.new_zeros(probs_BV.shape).scatter(-1, order, descending)
    return draw(probs_BV, uniforms_B)


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    *,
    stop: Sequence[str] = (),
    chat: bool = False,
) -> list[str]:
    """Continue texts, each to its end-of-text id or to just before the first of ``stop``.

    With ``chat`` they are what a user says, and the assistant's answers come back.
    """
    if chat:
        from fastgpt.chat import end_id, render_prompt

        ids = [render_prompt(tokenizer, [_turn("user", prompt)]) for prompt in prompts]
        stop_ids = (tokenizer.eot_id, end_id(tokenizer))
    else:
        ids, stop_ids = [tokenizer.encode(prompt) for prompt in prompts], (tokenizer.eot_id,)
    rows: list[list[int]] = [[] for _ in ids]
    texts = [""] * len(ids)
    for new in stream(model, ids, sampling, stop_ids=stop_ids):
        for row, token in zip(rows, new, strict=True):
            if token is not None:
                row.append(token)
        texts = [continuation(tokenizer, *pair, chat=chat) for pair in zip(ids, rows, strict=True)]
        ended = [
            token is None or _cut(text, stop) != text
            for token, text in zip(new, texts, strict=True)
        ]
        if all(ended):
            break
    return [_cut(text, stop) for text in texts]


def converse(model: GPT, tokenizer: Tokenizer, sampling: SamplingConfig) -> None:
    """Talk at a terminal until the input ends; what does not fit into the context is forgotten."""
    from fastgpt.chat import end_id, render_prompt

    messages: list[dict[str, str]] = []
    stop_ids = (tokenizer.eot_id, end_id(tokenizer))
    while True:
        try:
            messages.append(_turn("user", input("> ")))
        except EOFError:
            print()
            return
        context = model.config.context
        room = context - min(sampling.max_new_tokens, context // 2)  # for what was said
        kept = messages
        while len(ids := render_prompt(tokenizer, kept)) > room and len(kept) > 1:
            kept = kept[2:]
        if len(ids) >= context - 1:
            print(f"that is {len(ids)} of the model's {context} tokens; say less at once")
            messages.pop()
            continue
        messages = kept
        new: list[int] = []
        shown = ""
        for (token,) in stream(model, [ids], sampling, stop_ids=stop_ids):
            if token is not None:
                new.append(token)
            text = continuation(tokenizer, ids, new, chat=True)
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print()
        messages.append(_turn("assistant", continuation(tokenizer, ids, new, chat=True)))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def continuation(
    tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], *, chat: bool = False
) -> str:
    """The text that ``new`` adds behind ``prompt``.

    A text is decoded with its prompt: alone, a sentencepiece model would drop the space in front of
    the first word. An answer in a chat is a text of its own, and was encoded as one.
    """
    new = tokenizer.known(new)
    if chat:
        return tokenizer.decode(new)
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
    from fastgpt.chat import END
    from fastgpt.run import load_model

    model, tokenizer = load_model(config.run, step=config.step, device=config.device)
    chat = END in tokenizer.special_tokens if config.chat == "auto" else config.chat == "yes"
    if chat and not config.prompt and sys.stdin.isatty():
        converse(model, tokenizer, config.sampling)
        return
    prompts = config.prompt
    if not prompts:
        said = sys.stdin.read()
        prompts = (said.removesuffix("\n") if chat else said,)  # echo adds the end of the line
    texts = complete(model, tokenizer, prompts, config.sampling, stop=config.stop, chat=chat)
    for prompt, text in zip(prompts, texts, strict=True):
        print(text if chat else prompt + text)


if __name__ == "__main__":
    raise SystemExit(command(main)())

"""Text, vocabularies and oracles shared by the tokenizer tests."""

from __future__ import annotations

import lzma
import random
import subprocess
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import tiktoken
from hypothesis import strategies as st

from fastgpt.tokenizer import Tokenizer

# The regular expressions of tiktoken 0.14 (openai_public.py), the reference for the scanners.
REGEX = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
PATTERNS = tuple(REGEX)

# What broke other tokenizers: contractions behind white space, long s, digits of other scripts,
# newline mixtures, combining marks, joiners, private use, unassigned and 4-byte characters.
NASTY = [
    *"aZsStTlLeErRvVdDmM09 '\"-_.,!?\t\n\r\v\f\0\x1c\x85\xa0\xad",
    *"éß\u017f\u212aÀµªº²½٣一中あ한אبहक़กİıǅʰ\u0301\u0300\u200d\u200b\u2028\u2029\u3000\u1680\u180e\u202f",
    *"\ufeff\ufffd\ufffe\ue000\u0378\U0001f600\U0001f1e9\U0001f3fd\U000e0041\U0010ffff\U00010140",
    *"\U0001d7d9\U00020000\U000323af\U00016d70\U00010d4a\u1c89",
    *[
        "'s",
        "'S",
        "'ll",
        "'LL",
        "'Ve",
        "'rE",
        "'\u017f",
        "\t't",
        "\n'd",
        " 're",
        "''m",
        "  ",
        "\r\n",
    ],
    *[" \n ", "\n\n\n", "   \t", "1234567", "١٢٣٤", "  \n\n  x", " the", "The", "<|endoftext|>"],
    *[
        "hello",
        "Wörter",
        "здравствуй",
        "日本語のテキスト",
        "e\u0301",
        "👩‍👩‍👧",
        "https://",
        "{\n    ",
    ],
]
nasty_text = st.lists(
    st.one_of(st.sampled_from(NASTY), st.characters(exclude_categories=["Cs"])), max_size=24
).map("".join)


def random_text(rng: random.Random) -> str:
    """A short string of nasty parts, runs of one of them, and arbitrary characters."""
    parts = []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.random()
        if kind < 0.8:
            parts.append(rng.choice(NASTY))
        elif kind < 0.9:
            parts.append(rng.choice(NASTY) * rng.randrange(2, 40))
        else:
            code = rng.randrange(0x110000)
            parts.append(chr(code if not 0xD800 <= code < 0xE000 else code - 0x800))
    return "".join(parts)


@cache
def english(characters: int = 1_000_000) -> str:
    """The beginning of the embedded text, special tokens and all."""
    packed = files("fastgpt").joinpath("assets/pretrain.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")[:characters]


@cache
def documents() -> tuple[str, ...]:
    """About half a megabyte of real paragraphs, and text in many scripts."""
    rng = random.Random(7)
    return (*english(500_000).split("\n\n"), *(random_text(rng) for _ in range(3000)))


@cache
def trained(pattern: str) -> Tokenizer:
    """A vocabulary of 3,000 ids trained on ``documents()``."""
    return Tokenizer.train(documents(), 3000, pattern=pattern)


@cache
def trained_reference(pattern: str) -> tiktoken.Encoding:
    """tiktoken with the vocabulary of ``trained``."""
    vocabulary = trained(pattern).vocabulary
    ranks = {token: i for i, token in enumerate(vocabulary.tokens) if token is not None}
    return tiktoken.Encoding(
        pattern, pat_str=REGEX[pattern], mergeable_ranks=ranks, special_tokens=vocabulary.specials
    )


def _pair_ranks() -> dict[bytes, int]:
    # All single bytes and all pairs: where a piece begins shows in the ids of every text.
    ranks = {bytes([i]): i for i in range(256)}
    return ranks | {bytes([i >> 8, i & 255]): 256 + i for i in range(65536)}


@cache
def pairs(pattern: str) -> Tokenizer:
    """The vocabulary of all bytes and all pairs of bytes."""
    return Tokenizer.from_tiktoken_ranks(_pair_ranks(), pattern, {})


@cache
def pairs_reference(pattern: str) -> tiktoken.Encoding:
    """tiktoken with the vocabulary of ``pairs``."""
    return tiktoken.Encoding(
        pattern, pat_str=REGEX[pattern], mergeable_ranks=_pair_ranks(), special_tokens={}
    )


_PEAK = """
def peak():
    lines = open("/proc/self/status", encoding="ascii").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
"""


def assert_memory(prepare: str, before: str, work: str, *, megabytes: float) -> None:
    """In a fresh process, ``work`` takes at most so much more memory than ``before`` did."""
    # getrusage would begin with the peak of the process that started this one.
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell the peak of a process")
    code = f"{_PEAK}\n{prepare}\n{before}\nfirst = peak()\n{work}\n"
    code += f"assert peak() - first < {megabytes}, (first, peak())\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

"""Same ids as tiktoken and Hugging Face tokenizers, same merges as the latter's trainer."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
import tokenizer_samples as samples
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import PATTERNS, nasty_text
from tokenizers import Regex, models, trainers
from tokenizers import pre_tokenizers as pre

from fastgpt import _bpe
from fastgpt.bpe import hf_json
from fastgpt.tokenizer import Tokenizer

by_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def assert_as_tiktoken(pattern: str, text: str) -> None:
    expected = samples.pairs_reference(pattern).encode_ordinary(text)
    assert samples.pairs(pattern).encode(text) == expected, (pattern, text)
    expected = samples.trained_reference(pattern).encode_ordinary(text)
    ours = samples.trained(pattern)
    assert ours.encode(text) == expected, (pattern, text)
    assert ours.decode(expected) == text


@by_pattern
def test_every_character_falls_into_the_class_of_the_reference(pattern):
    # Letters, digits, blanks and symbols around each code point make its class visible. The
    # patterns share one table of classes, so all code points are checked with one of them.
    step = 1 if pattern == "gpt2" else 13
    codes = (c for c in range(0, 0x110000, step) if not 0xD800 <= c < 0xE000)
    text = "".join([f"a{(char := chr(c))}b1{char} {char}\n" for c in codes])
    ours = samples.pairs(pattern).encode_to_numpy(text)
    reference = samples.pairs_reference(pattern).encode_to_numpy(text)
    assert np.array_equal(ours, reference)


@by_pattern
@settings(max_examples=250, deadline=None)
@given(text=nasty_text)
def test_nasty_text_as_tiktoken(pattern, text):
    assert_as_tiktoken(pattern, text)


@by_pattern
def test_random_text_as_tiktoken(pattern):
    rng = random.Random(1)
    for _ in range(2000):
        assert_as_tiktoken(pattern, samples.random_text(rng))


@pytest.mark.full
@by_pattern
def test_a_million_random_strings_as_tiktoken(pattern):
    rng = random.Random(2)
    for _ in range(1_000_000):
        assert_as_tiktoken(pattern, samples.random_text(rng))


@by_pattern
@settings(max_examples=100, deadline=None)
@given(text=st.lists(nasty_text, min_size=1, max_size=12).map(" word".join))
def test_every_simd_level_finds_the_same_pieces(pattern, text):
    before = _bpe.simd_level()
    try:
        found = []
        for level in _bpe.simd_levels():
            _bpe.set_simd_level(level)
            found.append(_bpe.split(pattern, text))
    finally:
        _bpe.set_simd_level(before)
    assert b"".join(found[0]) == text.encode()
    assert all(pieces == found[0] for pieces in found[1:])


# Mostly ASCII and longer than the 64 bytes that are looked at together; what stands at the edges
# of the windows and around contractions, blanks, newlines and slashes is what can go wrong there.
ASCII = [
    *["a", "B", "word", "Word", "WORD", "wordWord", " ", "  ", "\t", "\n", "\r\n", "!", "/", "//"],
    *[
        "'",
        "'s",
        "'LL",
        "'re",
        "it's",
        "!\n",
        "\n/",
        "!\n/!",
        "\n  \n",
        "\n    x",
        "1",
        "12",
        "1234",
    ],
    *["x" * 61, "7" * 65, " " * 63, "\n" * 30, "é", "\u0301", "'\u017f"],
]


@by_pattern
def test_long_ascii_as_tiktoken(pattern):
    rng = random.Random(5)
    for _ in range(60):
        text = "".join(rng.choices(ASCII, k=rng.randrange(20, 400)))
        expected = samples.pairs_reference(pattern).encode_ordinary(text)
        before = _bpe.simd_level()
        try:
            for level in _bpe.simd_levels():
                _bpe.set_simd_level(level)
                assert samples.pairs(pattern).encode(text) == expected, (level, text)
        finally:
            _bpe.set_simd_level(before)


def test_an_unknown_simd_level_is_named():
    with pytest.raises(ValueError, match="scalar"):
        _bpe.set_simd_level("mmx")


def encoding_seconds(ours: Tokenizer, text: str) -> float:
    """Least processor time of two runs: a busy machine does not add to it."""
    times = []
    for _ in range(2):
        start = time.process_time()
        ours.encode_to_numpy(text)
        times.append(time.process_time() - start)
    return min(times)


# What is slow elsewhere. A quadratic step would take 4 times as long for twice the text.
@pytest.mark.parametrize(
    "text", ["a", "^", " ", "\n", "7", "中", "\u0301", "aA", "'s", "\t ", "\n/", "e\u0301"]
)
@by_pattern
def test_a_megabyte_of_one_thing_grows_linearly(pattern, text):
    long = text * (1_000_000 // len(text.encode())) + "x"
    ours = samples.trained(pattern)
    assert ours.decode(ours.encode_to_numpy(long)) == long
    seconds = encoding_seconds(ours, long)
    assert encoding_seconds(ours, long[:-1] * 2 + "x") < 3 * seconds + 0.02
    assert seconds < 1


@by_pattern
def test_real_text_as_tiktoken(pattern):
    text = samples.english()
    expected = samples.trained_reference(pattern).encode_ordinary(text)
    assert samples.trained(pattern).encode_to_numpy(text).tolist() == expected


@pytest.mark.parametrize("threads", [1, 2, 5])
@by_pattern
def test_threads_for_one_text_change_no_id(pattern, threads):
    text = samples.english(700_000) + "7\u4e2d  \n'" * 40_000 + samples.english(700_000)
    ours = samples.trained(pattern)
    found = ours._engine._core.encode_parallel(text, threads)
    assert found.dtype == ours.dtype
    assert np.array_equal(found, ours.encode_to_numpy(text))


# From reports against other tokenizers; all were split wrongly by at least one of them.
@pytest.mark.parametrize(
    "text",
    [
        "\t'two'", '\t"What', "\n'tis", "a\n\n 'll", "x" * 700 + "1" * 700, "12345678901234567890",
        "\n" * 1001, " " * 1000 + "x", "\r\n\r\n  \r\n", "  \n  ", "end \n  ", "end\u3000\u3000",
        "I'\u017f I'S i'\u017ft", "\U0001fae8 x", "a\u0301b", "\x1c\x1d x", "don''t", "'", "''",
        " '", "", "中文" * 200, "zufällig" * 60, "ab" * 300, "aaa" * 33, "\0a\0", "\ufeffBOM",
        "x\xa0y\x85z",
    ],
)  # fmt: skip
@by_pattern
def test_reported_cases_as_tiktoken(pattern, text):
    assert_as_tiktoken(pattern, text)


def test_random_letters_follow_the_merge_order():
    # A long piece goes through the heap; riptoken got 3 of 119,370 ids wrong here.
    text = "".join(random.Random(3).choices("abcdefghij", k=50_000))
    expected = samples.trained_reference("gpt2").encode_ordinary(text)
    assert samples.trained("gpt2").encode(text) == expected


def test_tokens_that_merging_never_reaches():
    # 'abcd' has no two parts in the vocabulary: tiktoken gives it to a whole piece only.
    ranks = {bytes([i]): i for i in range(256)} | {b"bc": 256, b"abcd": 257, b"cd": 258}
    ours = Tokenizer.from_tiktoken_ranks(ranks, "gpt2", {"<|endoftext|>": 300})
    reference = samples.tiktoken.Encoding(
        "x", pat_str=samples.REGEX["gpt2"], mergeable_ranks=ranks, special_tokens={}
    )
    for text in ["abcd", "abcde", "xabcd", "bcd", "abcd abcd", "abcd1abcd"]:
        assert ours.encode(text) == reference.encode_ordinary(text)
    assert ours.encode("abcd") == [257]


@pytest.mark.parametrize("seed", range(20))
def test_arbitrary_ranks_as_tiktoken(seed):
    # Vocabularies no trainer would make, over an alphabet so small that all pairs collide.
    rng = random.Random(seed)
    ranks = {bytes([i]): i for i in range(256)}
    tokens = sorted(ranks)
    letters = [b"a", b"b", b"c"]
    while len(ranks) < 290:
        candidates = [t for t in tokens if set(t) <= set(b"abc")]
        token = rng.choice(candidates or letters) + rng.choice(candidates or letters)
        if token not in ranks and len(token) < 12:
            ranks[token] = len(ranks)
            tokens.append(token)
    ours = Tokenizer.from_tiktoken_ranks(ranks, "gpt4", {})
    reference = samples.tiktoken.Encoding(
        "x", pat_str=samples.REGEX["gpt4"], mergeable_ranks=ranks, special_tokens={}
    )
    for length in [*range(1, 40), 100, 300]:
        text = "".join(rng.choices("abc", k=length))
        assert ours.encode(text) == reference.encode_ordinary(text), text


# --- Hugging Face


@by_pattern
def test_hugging_face_reads_the_file_and_gives_the_same_ids(pattern, tmp_path):
    ours = samples.trained(pattern)
    ours.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == ours.vocab_size
    rng = random.Random(4)
    texts = [samples.random_text(rng) for _ in range(1500)] + [samples.english(200_000)]
    for text, encoding in zip(texts, theirs.encode_batch(texts), strict=True):
        assert ours.encode(text, allowed_special="all") == encoding.ids, text
        assert theirs.decode(encoding.ids, skip_special_tokens=False) == ours.decode(encoding.ids)


def hugging_face_merges(texts, pattern: str, vocab_size: int) -> list[str]:
    theirs = tokenizers.Tokenizer(models.BPE())
    split = pre.Split(Regex(hf_json.SPLIT_REGEX[pattern]), "isolated")
    theirs.pre_tokenizer = pre.Sequence(
        [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre.ByteLevel.alphabet()
    theirs.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
    )
    merges = json.loads(theirs.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def our_merges(texts, pattern: str, vocab_size: int) -> list[str]:
    ours = Tokenizer.train(texts, vocab_size, pattern=pattern, special_tokens=())
    return json.loads(hf_json.dumps(ours.vocabulary))["model"]["merges"]


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_training_makes_the_merges_of_hugging_face(pattern):
    texts = samples.documents()
    assert our_merges(texts, pattern, 6000) == hugging_face_merges(texts, pattern, 6000)


@pytest.mark.parametrize("seed", range(40))
def test_training_breaks_ties_as_hugging_face_until_nothing_is_left(seed):
    rng = random.Random(seed)
    letters = rng.choice(["a", "ab", "abc", "ab é中", "a1 \n'", "aA!?"])
    texts = ["".join(rng.choices(letters, k=rng.randrange(1, 40))) for _ in range(60)]
    pattern = rng.choice(["gpt2", "gpt4"])
    assert our_merges(texts, pattern, 5000) == hugging_face_merges(texts, pattern, 5000)

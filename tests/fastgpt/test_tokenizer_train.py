"""Training: options, sources, threads; Hugging Face's trainer is the oracle."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import tokenizer_samples as samples
import tokenizers
from tokenizers import Regex, models, trainers
from tokenizers import pre_tokenizers as pre

from fastgpt.bpe import hf_json
from fastgpt.bpe.byte_pair import core
from fastgpt.bpe.text import last_cut, read_blocks
from fastgpt.errors import DataError
from fastgpt.tokenizer import Tokenizer, read_texts


def hugging_face(texts, vocab_size: int, pattern: str, **options) -> list[bytes]:
    """The tokens that Hugging Face's trainer makes, in order, bytes apart."""
    theirs = tokenizers.Tokenizer(models.BPE())
    split = pre.Split(Regex(hf_json.SPLIT_REGEX.get(pattern, pattern)), "isolated")
    theirs.pre_tokenizer = pre.Sequence(
        [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
        **options,
    )
    theirs.train_from_iterator(texts, trainer)
    by_id = sorted(theirs.get_vocab().items(), key=lambda item: item[1])
    return [name for name, _ in by_id if len(name) > 1]


def ours(texts, vocab_size: int, pattern: str, **options) -> list[str]:
    tokenizer = Tokenizer.train(texts, vocab_size, pattern=pattern, special_tokens=(), **options)
    return [hf_json.token_name(token) for token in tokenizer.vocabulary.tokens[256:]]


@pytest.mark.parametrize("length", [2, 3, 5, 8])
def test_no_token_is_longer_than_asked(length):
    texts = samples.documents()[::3]
    tokens = ours(texts, 1500, "gpt2", max_token_length=length)
    assert max(map(len, tokens)) == length
    if length > 2:  # their first pairs are not measured
        assert tokens == hugging_face(texts, 1500, "gpt2", max_token_length=length + 1)


@pytest.mark.parametrize("frequency", [2, 7, 50])
def test_rare_pairs_are_left_alone(frequency):
    texts = samples.documents()[:40]
    tokens = ours(texts, 60_000, "gpt4", min_frequency=frequency)
    assert tokens == hugging_face(texts, 60_000, "gpt4", min_frequency=frequency)
    assert len(tokens) < len(ours(texts, 60_000, "gpt4"))


def test_the_initial_alphabet_comes_first():
    texts = ["日本語のテキスト 日本 " * 20, "ordinary words " * 30]
    alphabet = "é日本é\U0001f600"
    tokenizer = Tokenizer.train(texts, 300, initial_alphabet=alphabet)
    tokens = tokenizer.vocabulary.tokens
    assert tokens[256:263] == (
        "é".encode(), "日".encode()[:2], "日".encode(), "本".encode()[:2], "本".encode(),
        "\U0001f600".encode()[:2], "\U0001f600".encode()[:3],
    )  # fmt: skip
    assert tokens[263] == "\U0001f600".encode()
    for char in alphabet:
        assert len(tokenizer.encode(char)) == 1
    # Behind it as if these characters had been single bytes from the beginning: the oracle counts
    # pairs over the lists of symbols.
    words = [core().split("gpt4", text) for text in texts]
    symbols = [symbols_of(word, tokens[256:264]) for split in words for word in split]
    for token in tokens[264:]:
        left, right = best_pair(symbols)
        assert token == left + right
        symbols = [merged(word, left, right) for word in symbols]
    with pytest.raises(ValueError, match="'ab' is not one character"):
        Tokenizer.train(texts, 300, initial_alphabet=["ab"])
    with pytest.raises(ValueError, match=r"not between 265 \(bytes, alphabet and special tokens\)"):
        Tokenizer.train(texts, 264, initial_alphabet=alphabet)


def symbols_of(word: bytes, alphabet) -> tuple[bytes, ...]:
    symbols = tuple(word[i : i + 1] for i in range(len(word)))
    for token in alphabet:
        symbols = merged(symbols, token[:-1], token[-1:])
    return symbols


def merged(word: tuple[bytes, ...], left: bytes, right: bytes) -> tuple[bytes, ...]:
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == (left, right):
            out.append(left + right)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


_SEEN: dict[bytes, int] = {}


def best_pair(words) -> tuple[bytes, bytes]:
    counts: dict[tuple[bytes, bytes], int] = {}
    for word in words:
        for pair in pairwise(word):
            counts[pair] = counts.get(pair, 0) + 1
    order = {bytes([b]): i for b, i in enumerate(core().byte_ids())}
    # Ties go to smaller ids; longer symbols come after bytes in the order in which they were made.
    made = {symbol for word in words for symbol in word if len(symbol) > 1}
    for symbol in made:
        _SEEN.setdefault(symbol, len(_SEEN) + 256)
    rank = order | _SEEN
    return min(counts, key=lambda pair: (-counts[pair], rank[pair[0]], rank[pair[1]]))


def test_reserved_specials_have_ids_behind_the_others():
    tokenizer = Tokenizer.train(
        ["some text"], 280, special_tokens=("<a>",), reserved_special_tokens=3
    )
    names = ["<a>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"]
    first = tokenizer.vocab_size - 4
    assert tokenizer.special_tokens == {name: first + i for i, name in enumerate(names)}


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="min_frequency 0 is below 1"):
        Tokenizer.train(["a"], 300, min_frequency=0)
    with pytest.raises(ValueError, match="max_token_length 0 is below 1"):
        Tokenizer.train(["a"], 300, max_token_length=0)
    with pytest.raises(ValueError, match="unknown pattern 'gpt5'; use gpt2"):
        Tokenizer.train(["a"], 300, pattern="gpt5")
    with pytest.raises(ValueError, match=r"split pattern '\(': missing \)"):
        Tokenizer.train(["a"], 300, pattern="(")


def test_a_pattern_of_ones_own():
    texts = samples.documents()[:60]
    pattern = r"\p{Lu}?\p{Ll}+|\p{N}|[^\S\n]+|\n+|[^\s\p{L}\p{N}]+|\p{L}+"
    assert ours(texts, 900, pattern) == hugging_face(texts, 900, pattern)
    # The scanner and the regular expression of the same split see the same words.
    same = hf_json.SPLIT_REGEX["gpt2"]
    assert ours(texts, 900, f"(?:{same})") == ours(texts, 900, "gpt2")


@pytest.mark.parametrize("pattern", samples.PATTERNS)
def test_files_text_in_memory_and_iterators_give_the_same(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgpt.bpe.byte_pair._SHARE_CHARACTERS", 5000)
    monkeypatch.setattr("fastgpt.bpe.text.BLOCK_BYTES", 7777)
    text = samples.english(200_000) + "\n\n  end \n" + "日本語 " * 500 + samples.english(30_000)
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    blocks = [block for block, _ in read_blocks(path, 7777)]
    assert "".join(blocks) == text
    assert len(blocks) > 25
    split = core().split
    assert [p for block in blocks for p in split(pattern, block)] == split(pattern, text)
    sources = [[text], iter(blocks), read_texts([path])]
    hashes = {
        Tokenizer.train(texts, 1200, pattern=pattern, num_threads=threads).hash
        for threads, texts in enumerate(sources, 1)
    }
    assert len(hashes) == 1


def test_reading_reports_bytes_and_names_damage(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("some words\n" * 50)
    seen = []
    assert "".join(read_texts([good, good], lambda *at: seen.append(at))) == "some words\n" * 100
    assert seen[-1] == (1100, 1100)
    bad.write_bytes(b"word \xff")
    with pytest.raises(DataError, match=r"bad\.txt: byte 5: not UTF-8"):
        list(read_texts([bad]))
    bad.write_bytes(b"ein W" + "ö".encode()[:1])
    with pytest.raises(DataError, match=r"bad\.txt: byte 5: the file ends inside a character"):
        list(read_texts([bad]))
    for block in (1, 2, 3, 4, 7):
        bad.write_bytes("aé日".encode() * 5 + b"\x80b")
        with pytest.raises(DataError, match=r"bad\.txt: byte 30: not UTF-8"):
            list(read_blocks(bad, block))
    with pytest.raises(DataError, match=r"missing\.txt: cannot read"):
        list(read_texts([tmp_path / "missing.txt"]))


def test_training_takes_the_memory_of_the_words_not_of_the_file(tmp_path):
    # 50 MB of a few words, and emojis: a str with one of them has four bytes a character.
    path = tmp_path / "long.txt"
    path.write_bytes(("so many words, so few of them \U0001f600\n" * 1500).encode() * 1000)
    samples.assert_memory(
        "from fastgpt.tokenizer import Tokenizer, read_texts",
        "Tokenizer.train(['a few words'], 270)",
        f"Tokenizer.train(read_texts([{str(path)!r}]), 300, num_threads=2)",
        megabytes=60,
    )


def test_a_text_without_a_place_to_cut_is_cut_anyhow(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("1" * 1000)
    assert [len(block) for block, _ in read_blocks(path, 100)] == [400, 400, 200]
    assert last_cut("12 34\n56") == 0
    assert last_cut("ab 34\ncd\n") == 8


def test_memory_follows_the_distinct_words(tmp_path):
    # 60 MB of the same 10,000 words: read in blocks and counted, never held.
    import tracemalloc

    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefghij", k=8)) for _ in range(10_000)]
    block = " ".join(words)
    tracemalloc.start()
    Tokenizer.train((block for _ in range(600)), 400, num_threads=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6  # one batch of 16 M characters and little else


@pytest.mark.full
def test_counts_beyond_32_bits():
    # ' a' is seen 4.4e9 times, in 32 bits 105e6 times or less than never, and ' b' 0.2e9 times.
    trainer = core().Trainer("gpt2", 0)
    a, b = " a" * 10_000_000, " b" * 10_000_000
    for _ in range(44):
        trainer.feed([a] * 10)
    trainer.feed([b] * 20)
    ids = core().byte_ids()
    assert trainer.train(2, 1, None) == [(ids[32], ids[byte]) for byte in b"ab"]


def test_dropped_pieces_of_the_core_are_refused():
    encoder = samples.trained("gpt2")._engine._core
    for ends in ([5, 3, 9], [-1, 9], [4], [10], []):
        with pytest.raises(ValueError, match="pieces"):
            encoder.encode_spans("some text", np.array(ends, dtype=np.int64), 0.0, 0)
    with pytest.raises(ValueError, match="ends of the pieces"):
        core().Trainer("gpt2", 1).feed_spans("text", np.array([9], dtype=np.int64))

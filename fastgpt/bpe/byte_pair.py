"""Byte-level BPE of one vocabulary over the C++ core, and its training."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fastgpt.bpe.hf_json import MAX_ID, SPLIT_REGEX, Vocabulary, token_of_name
from fastgpt.bpe.text import (
    character_ends,
    last_cut,
    map_threads,
    split_specials,
    surrogate_error,
)

_BATCH_CHARACTERS = 1 << 22  # texts handed to the counting threads at a time
_SHARE_CHARACTERS = 1 << 20  # of a longer text for one thread at a time


def core() -> Any:
    """The extension; raises ImportError saying how to build it."""
    try:
        from fastgpt import _bpe
    except ImportError as error:
        raise ImportError(
            f"the C++ extension fastgpt._bpe is not built ({error}); "
            "run `pip install -e .` in the source tree (needs a C++17 compiler)"
        ) from error
    return _bpe


class Splitter:
    """Cuts text by a regular expression of the ``regex`` package.

    What the expression does not match stays in the text, as pieces between the matches.
    """

    def __init__(self, pattern: str) -> None:
        if re.fullmatch(r"\w+", pattern):
            raise ValueError(
                f"unknown pattern {pattern!r}; use {', '.join(SPLIT_REGEX)} or a regular expression"
            )
        try:
            import regex
        except ImportError:
            raise ImportError(
                "split patterns other than " + ", ".join(SPLIT_REGEX) + " need the package regex: "
                "pip install fastgpt-trainer[regex]"
            ) from None
        try:
            self._regex = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"split pattern {pattern!r}: {error}") from None

    def ends(self, text: str) -> np.ndarray:
        """int64 (pieces,): the places in the UTF-8 of ``text`` where pieces end, rising."""
        ends: list[int] = []
        for found in self._regex.finditer(text):
            ends += found.span()
        ends.append(len(text))
        places = np.array(ends, dtype=np.int64)
        return places if text.isascii() else character_ends(text)[places]


class BytePair:
    """Encodes and decodes; every byte string has ids and comes back from them.

    ``allowed`` are places in ``special_tokens``. Methods raise UnicodeEncodeError for text with a
    lone surrogate.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.source = vocabulary
        self.special_tokens = dict(vocabulary.specials)
        tokens = {token for token in vocabulary.tokens if token}
        for special in self.special_tokens:
            if token_of_name(special) in tokens:
                raise ValueError(f"special token {special!r} has the name of an ordinary token")
        try:
            specials = [(text.encode(), token_id) for text, token_id in self.special_tokens.items()]
        except UnicodeEncodeError as error:
            raise surrogate_error(error, "a special token") from None
        scanned = vocabulary.pattern in SPLIT_REGEX
        self._splitter = None if scanned else Splitter(vocabulary.pattern)
        self._core = core().Encoder(
            vocabulary.pattern if scanned else "gpt2",  # of the latter only spans are asked
            vocabulary.tokens,
            vocabulary.merges,
            specials,
            vocabulary.whole_pieces,
        )
        self.vocab_size: int = self._core.vocab_size
        self.decode_bytes: Callable[[Any], bytes] = self._core.decode
        self.decode: Callable[[Any, str], str] = self._core.decode_text
        # Several threads for one text: where it may be cut is what a scanner knows.
        self.encode_parallel: Callable[[str, int], np.ndarray] | None = (
            self._core.encode_parallel if scanned else None
        )
        if scanned:
            self.encode: Callable[..., list[int]] = self._core.encode
            self.encode_to_numpy: Callable[..., np.ndarray] = self._core.encode_to_numpy
            self.encode_batch: Callable[..., list[np.ndarray]] = self._core.encode_batch
        else:
            self.encode = self._encode_split
            self.encode_to_numpy = self._split_to_numpy
            self.encode_batch = self._split_batch

    def _split_to_numpy(self, text: str | bytes, allowed: Sequence[int] = ()) -> np.ndarray:
        return self.encode_with_dropout(text, allowed, 0.0, 0)

    def _encode_split(self, text: str | bytes, allowed: Sequence[int] = ()) -> list[int]:
        return self._split_to_numpy(text, allowed).tolist()

    def _split_batch(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        return map_threads(self._split_to_numpy, texts, num_threads)

    def encode_with_dropout(
        self, text: str | bytes, allowed: Sequence[int], p: float, seed: int
    ) -> np.ndarray:
        """Ids of the text, each candidate of a merge left out with probability ``p``."""
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if not isinstance(text, str):
            raise TypeError(f"text must be str, not {type(text).__name__}")
        names = list(self.special_tokens)
        specials = {names[i]: self.special_tokens[names[i]] for i in allowed}
        arrays = []
        for i, (part, special) in enumerate(split_specials(text, specials)):
            ends = self.piece_ends(part)
            arrays.append(self._core.encode_spans(part, ends, p, (seed + i) % 2**64))
            if special is not None:
                arrays.append(np.array([special], dtype=arrays[0].dtype))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def piece_ends(self, text: str) -> np.ndarray:
        """int64 (pieces,): the places in the UTF-8 of ``text`` where its pieces end, rising."""
        if self._splitter is not None:
            return self._splitter.ends(text)
        return core().piece_ends(self.source.pattern, text)

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """Bytes by id, those of special tokens too; None for an id without a token."""
        tokens: list[bytes | None] = [token or None for token in self.source.tokens]
        tokens += [None] * (self.vocab_size - len(tokens))
        for name, token_id in self.special_tokens.items():
            tokens[token_id] = name.encode()
        return tokens

    def with_specials(self, names: Sequence[str]) -> Vocabulary:
        """The vocabulary with more special tokens behind its ids."""
        added = {name: self.vocab_size + i for i, name in enumerate(names)}
        return dataclasses.replace(self.source, specials=self.source.specials | added)

    @cached_property
    def hash(self) -> str:
        """sha256 of the vocabulary."""
        vocabulary = self.source
        digest = hashlib.sha256(f"bpe {vocabulary.pattern} {vocabulary.whole_pieces}\n".encode())
        for token in vocabulary.tokens:
            digest.update(b"-" if token is None else b"%d:%b" % (len(token), token))
        digest.update(np.array(vocabulary.merges, dtype="<u4").tobytes())
        for text, token_id in sorted(vocabulary.specials.items(), key=lambda item: item[1]):
            digest.update(f"{token_id}:{len(text)}:{text}".encode())
        return digest.hexdigest()


def train(
    texts: Iterable[str],
    vocab_size: int,
    *,
    pattern: str,
    special_tokens: Sequence[str],
    min_frequency: int,
    max_token_length: int | None,
    initial_alphabet: Iterable[str],
    num_threads: int,
    progress: Callable[[int, int], None] | None,
) -> Vocabulary:
    """The vocabulary; see `fastgpt.tokenizer.Tokenizer.train`."""
    byte_ids = core().byte_ids()
    first = _alphabet_merges(initial_alphabet, byte_ids)
    fixed = 256 + len(first) + len(special_tokens)
    if not fixed <= vocab_size <= MAX_ID:
        what = "bytes, alphabet and special tokens" if first else "bytes and special tokens"
        raise ValueError(f"vocab_size {vocab_size} is not between {fixed} ({what}) and {MAX_ID}")
    if min_frequency < 1:
        raise ValueError(f"min_frequency {min_frequency} is below 1")
    if max_token_length is not None and max_token_length < 1:
        raise ValueError(f"max_token_length {max_token_length} is below 1")
    if len(set(special_tokens)) != len(special_tokens):
        raise ValueError("special_tokens has a token twice")
    if "" in special_tokens:
        raise ValueError("special_tokens has an empty string")
    wanted = vocab_size - 256 - len(special_tokens)
    trainer = _counted(texts, pattern, num_threads)
    pairs = trainer.train(wanted, min_frequency, progress, max_token_length or 0, first)
    tokens: list[bytes] = [b""] * 256
    for byte, token_id in enumerate(byte_ids):
        tokens[token_id] = bytes([byte])
    merges = []
    for left, right in pairs:
        merges.append((left, right, len(tokens)))
        tokens.append(tokens[left] + tokens[right])
    specials = {text: len(tokens) + i for i, text in enumerate(special_tokens)}
    return Vocabulary(pattern, tuple(tokens), tuple(merges), specials)


def _counted(texts: Iterable[str], pattern: str, num_threads: int) -> Any:
    # A trainer that has seen the texts.
    splitter = None if pattern in SPLIT_REGEX else Splitter(pattern)
    trainer = core().Trainer("gpt2" if splitter else pattern, num_threads)
    for batch in _batches(texts if splitter else _shared_out(texts)):
        try:
            if splitter is None:
                trainer.feed(batch)
            else:
                for text in batch:
                    trainer.feed_spans(text, splitter.ends(text))
        except UnicodeEncodeError as error:
            raise surrogate_error(error, f"a text of {len(error.object)} characters") from None
    return trainer


def _alphabet_merges(alphabet: Iterable[str], byte_ids: Sequence[int]) -> list[tuple[int, int]]:
    # The bytes of each character from left to right. As no character of UTF-8 begins inside
    # another, these merges can only ever make characters and their beginnings.
    made: dict[bytes, int] = {}
    merges: list[tuple[int, int]] = []
    for character in alphabet:
        if len(character) != 1:
            raise ValueError(f"initial_alphabet: {character!r} is not one character")
        try:
            data = character.encode()
        except UnicodeEncodeError as error:
            raise surrogate_error(error, "initial_alphabet") from None
        left = byte_ids[data[0]]
        for length in range(2, len(data) + 1):
            if data[:length] not in made:
                made[data[:length]] = 256 + len(merges)
                merges.append((left, byte_ids[data[length - 1]]))
            left = made[data[:length]]
    return merges


def _shared_out(texts: Iterable[str]) -> Iterator[str]:
    # Long texts in parts for several threads, cut where every scanner cuts.
    for text in texts:
        begin = 0
        while len(text) - begin > 2 * _SHARE_CHARACTERS:
            end = last_cut(text, begin + _SHARE_CHARACTERS)
            if end <= begin:
                break
            yield text[begin:end]
            begin = end
        yield text[begin:] if begin else text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

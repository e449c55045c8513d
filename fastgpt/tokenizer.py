"""Text <-> token ids: byte-level BPE in C++, and LLaMA-style sentencepiece models.

Text is never searched for special tokens unless the caller allows it, so nothing a user writes can
become one. Text with a lone surrogate (a str that has no UTF-8 form) raises ValueError with its
position: replacing it silently would break ``decode(encode(text)) == text``.

``python -m fastgpt.tokenizer`` trains, encodes, decodes, inspects and compares; the commands are in
`fastgpt.bpe.commands`.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np

from fastgpt.bpe import byte_pair, files, sentencepiece_model
from fastgpt.bpe.byte_pair import BytePair
from fastgpt.bpe.hf_json import Vocabulary, VocabularyError
from fastgpt.bpe.sentencepiece_model import SentencePiece
from fastgpt.bpe.text import map_threads, read_blocks, specials_regex, surrogate_error
from fastgpt.errors import DataError

Pattern = Literal["gpt2", "gpt4", "llama3", "o200k"] | str
AllowedSpecial = Set[str] | Literal["all"]
DisallowedSpecial = Collection[str] | Literal["all"]
Ids = Sequence[int] | np.ndarray
PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]

END_OF_TEXT = "<|endoftext|>"
_NONE: frozenset[str] = frozenset()


class Tokenizer:
    """One vocabulary. Immutable, picklable, safe to share between threads and across a fork.

    ``num_threads=0`` is one per core everywhere. Long work releases the GIL; a free-threaded Python
    gets it back when it loads the extension. The word cache grows with the distinct words of what
    was encoded, up to 56 MB a thread.

    Attributes:
        vocab_size: number of ids, special tokens included; ids are below it.
        special_tokens: string -> id of the special (control) tokens.
        dtype: smallest numpy type that holds every id (uint16 or uint32).
        hash: sha256 (hex) of everything that decides the ids, not of the file's formatting.
    """

    vocab_size: int
    special_tokens: dict[str, int]

    def __init__(self, source: Vocabulary | bytes, file: str = "sentencepiece model") -> None:
        """A vocabulary, or a serialised sentencepiece model (that came from ``file``)."""
        if isinstance(source, bytes):
            self._engine: BytePair | SentencePiece = SentencePiece(source, file)
        else:
            self._engine = BytePair(source)
        self._encode = self._engine.encode
        self._encode_to_numpy = self._engine.encode_to_numpy
        self._decode = self._engine.decode_bytes
        self._decode_text = self._engine.decode
        self.vocab_size = self._engine.vocab_size
        self.special_tokens = self._engine.special_tokens
        self._special_places = {text: i for i, text in enumerate(self.special_tokens)}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        pattern: Pattern = "gpt4",
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        reserved_special_tokens: int = 0,
        min_frequency: int = 1,
        max_token_length: int | None = None,
        initial_alphabet: Iterable[str] = (),
        num_threads: int = 0,
        progress: Progress | None = None,
    ) -> Tokenizer:
        """Trains byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2).

        Ids are 256 bytes, then merges, then special tokens; ``vocab_size`` counts all of them. It
        comes out smaller if the texts have too few distinct pairs. Memory follows the number of
        distinct words. The result does not depend on ``num_threads``, and counts have 64 bits.

        Args:
            texts: read once, a part at a time; ``read_texts`` reads files.
            vocab_size: at most so many ids.
            pattern: how text is split into words that no merge crosses: gpt2, gpt4 (cl100k),
                llama3, o200k, or a regular expression of the package ``regex``. Never take one from
                somebody you do not trust: it can be made to run for years.
            special_tokens: strings that get ids of their own, behind all others.
            reserved_special_tokens: so many more, ``<|reserved_0|>`` and on, for later use.
            min_frequency: pairs seen less often are not merged.
            max_token_length: bytes; longer tokens are not made. (Hugging Face's trainer stops one
                byte earlier at the same number.)
            initial_alphabet: characters that get tokens before any merge is counted, and their
                beginnings with them. All 256 bytes are tokens anyhow.
            num_threads: that count words; 0 is one per core.
            progress: called now and then with (merges done, merges wanted).

        Raises ValueError for a vocabulary without room for bytes and special tokens.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of str, not one str; pass [text]")
        reserved = [f"<|reserved_{i}|>" for i in range(reserved_special_tokens)]
        vocabulary = byte_pair.train(
            texts,
            vocab_size,
            pattern=pattern,
            special_tokens=[*special_tokens, *reserved],
            min_frequency=min_frequency,
            max_token_length=max_token_length,
            initial_alphabet=initial_alphabet,
            num_threads=num_threads,
            progress=progress,
        )
        return cls(vocabulary)

    @classmethod
    def from_file(
        cls,
        path: PathLike,
        *,
        pattern: Pattern | None = None,
        special_tokens: Mapping[str, int] | None = None,
    ) -> Tokenizer:
        """Reads a vocabulary; the format is seen from the content.

        ``tokenizer.json`` (byte-level BPE), ``*.tiktoken``, ``vocab.json`` with ``merges.txt``
        beside it, sentencepiece ``*.model``, or a directory with one of them. ``pattern`` and
        ``special_tokens`` are for files that do not say them: ``.tiktoken`` (those of OpenAI are
        known) and ``vocab.json`` (GPT-2's pattern; special is what no merge makes). A
        tokenizer.json with a regular expression of its own is read only if ``pattern`` repeats it.

        Raises VocabularyError, a ValueError that names the file and the place, for a file that is
        damaged or whose ids could not be reproduced exactly.
        """
        source, file = files.load(Path(path), pattern, special_tokens)
        try:
            return cls(source, str(file))
        except VocabularyError:
            raise
        except ValueError as error:
            raise VocabularyError(f"{file}: {error}") from None

    @classmethod
    def from_tiktoken_ranks(
        cls, ranks: Mapping[bytes, int], pattern: Pattern, special_tokens: Mapping[str, int]
    ) -> Tokenizer:
        """A tokenizer with the ids of ``tiktoken.Encoding`` for the same ranks and pattern."""
        return cls(files.vocabulary_of_ranks(ranks, pattern, special_tokens))

    @property
    def vocabulary(self) -> Vocabulary:
        """Tokens, merges and pattern; raises AttributeError for a sentencepiece model."""
        if isinstance(self._engine, BytePair):
            return self._engine.source
        raise AttributeError("a sentencepiece model has no byte-level vocabulary")

    def save(self, path: PathLike) -> None:
        """Writes a file that ``from_file`` reads, in the format that the name asks for.

        ``*.tiktoken``; ``vocab.json`` or ``merges.txt`` (both are written); anything else is a
        tokenizer.json, which ``tokenizers.Tokenizer.from_file`` reads as well. A sentencepiece
        model goes beside ``path`` as ``*.model``. Raises ValueError for a vocabulary that the
        format cannot express, UsageError where nothing can be written.
        """
        path = Path(path)
        if isinstance(self._engine, BytePair):
            return files.save(self._engine.source, path)
        model = path.with_suffix(".model")
        files.write(model, self._engine.source)
        if path.suffix != ".model":
            pointer = f'{{"type": "sentencepiece", "model_file": "{model.name}"}}\n'
            files.write(path, pointer.encode())

    def with_special_tokens(self, names: Iterable[str]) -> Tokenizer:
        """This tokenizer with those of ``names`` that it lacks as special tokens behind all ids.

        Ids of ordinary text stay as they are. Raises ValueError for a name that an ordinary token
        has, or an empty one.
        """
        missing = [name for name in dict.fromkeys(names) if name not in self.special_tokens]
        if "" in missing:
            raise ValueError("a special token needs a name")
        return Tokenizer(self._engine.with_specials(missing)) if missing else self

    def encode(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = _NONE,
        disallowed_special: DisallowedSpecial = _NONE,
    ) -> list[int]:
        """Ids of the text; the strings of ``allowed_special`` in it become special tokens.

        A string of ``disallowed_special`` in it is a ValueError; "all" are those not allowed.
        """
        try:
            if allowed_special or disallowed_special:
                return self._encode(text, self._policy(text, allowed_special, disallowed_special))
            return self._encode(text, ())
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from None

    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = _NONE,
        disallowed_special: DisallowedSpecial = _NONE,
        num_threads: int = 1,
    ) -> np.ndarray:
        """As ``encode``, as an array (n,) of ``dtype``.

        ``num_threads`` share one long text where it has no special tokens to look for and its
        pattern a scanner; the ids are the same for any number.
        """
        try:
            parallel = getattr(self._engine, "encode_parallel", None)
            if num_threads != 1 and parallel is not None and not allowed_special:
                if disallowed_special:
                    self._policy(text, allowed_special, disallowed_special)
                return parallel(text, num_threads)
            if allowed_special or disallowed_special:
                allowed = self._policy(text, allowed_special, disallowed_special)
                return self._encode_to_numpy(text, allowed)
            return self._encode_to_numpy(text, ())
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from None

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any byte string; bytes that are not UTF-8 count as symbols.

        sentencepiece and patterns without a scanner split characters: UnicodeDecodeError (a
        ValueError) for anything else there.
        """
        if isinstance(self._engine, BytePair):
            return self._engine.encode(data, ())
        return self.encode(data.decode("utf-8"))

    def last_piece(self, text: str) -> int:
        """The byte of the text's UTF-8 at which its last word begins, of those no merge crosses.

        Special tokens are ordinary text here; raises AttributeError for a sentencepiece model.
        """
        if not isinstance(self._engine, BytePair):
            raise AttributeError("a sentencepiece model does not split text before it merges")
        ends = self._engine.piece_ends(text)
        return int(max(ends[ends < ends[-1]], default=0)) if len(ends) else 0

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        num_threads: int = 0,
        allowed_special: AllowedSpecial = _NONE,
        disallowed_special: DisallowedSpecial = _NONE,
    ) -> list[np.ndarray]:
        """Ids of each text as arrays of ``dtype``."""
        if allowed_special or disallowed_special:
            encode = partial(
                self.encode_to_numpy,
                allowed_special=allowed_special,
                disallowed_special=disallowed_special,
            )
            return map_threads(encode, texts, num_threads)
        try:
            return self._engine.encode_batch(texts, num_threads)
        except UnicodeEncodeError as error:
            # Of texts that are made on the way (a numpy array's), none is that object.
            found = (i for i, text in enumerate(texts) if text == error.object)
            raise surrogate_error(error, f"text {next(found, '?')}") from None

    def encode_with_dropout(
        self,
        text: str,
        p: float,
        *,
        seed: int,
        allowed_special: AllowedSpecial = _NONE,
    ) -> np.ndarray:
        """Ids by BPE dropout (Provilkov et al. 2020, arXiv:1910.13267), to augment training data.

        Each candidate of a merge is left out with probability ``p``; 0 gives the ids of ``encode``,
        1 single bytes. The same seed gives the same ids everywhere. Array (n,) of ``dtype``. Raises
        ValueError for a sentencepiece model, whose library gives other ids in every process.
        """
        try:
            allowed = self._policy(text, allowed_special, _NONE) if allowed_special else ()
            return self._engine.encode_with_dropout(text, allowed, p, seed % 2**64)
        except UnicodeEncodeError as error:
            raise surrogate_error(error) from None

    def _policy(
        self, text: str, allowed: AllowedSpecial, disallowed: DisallowedSpecial
    ) -> list[int]:
        # Checks the text and returns the places of the allowed special tokens.
        allowed = self.special_tokens.keys() if allowed == "all" else allowed
        if disallowed == "all":
            disallowed = self.special_tokens.keys() - set(allowed)
        if disallowed:
            check_disallowed(text, disallowed)
        try:
            return sorted(self._special_places[name] for name in allowed)
        except KeyError as error:
            raise ValueError(
                f"{error.args[0]!r} is not a special token of this vocabulary"
            ) from None

    def decode(self, ids: Ids, errors: str = "replace") -> str:
        """Text of the ids; ``errors`` as in ``bytes.decode`` for ids that cut a character."""
        return self._decode_text(ids, errors)

    def decode_bytes(self, ids: Ids) -> bytes:
        """Bytes of the ids; raises ValueError for one that is not in the vocabulary."""
        return self._decode(ids)

    def decode_batch(
        self, batch: Sequence[Ids], *, errors: str = "replace", num_threads: int = 0
    ) -> list[str]:
        """Text of each sequence of ids."""
        return map_threads(partial(self.decode, errors=errors), batch, num_threads)

    def decode_with_offsets(self, ids: Ids) -> tuple[str, list[int]]:
        """Text of the ids, and for each the character of the text that its first byte belongs to.

        As tiktoken. Raises UnicodeDecodeError, a ValueError, for ids that cut a character.
        """
        data = self._decode(ids)
        text = data.decode("utf-8")
        begins = np.zeros(len(data) + 1, dtype=np.int64)
        np.cumsum((np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80, out=begins[1:])
        # Of the characters that begin up to a byte, the last one holds it.
        places = np.minimum(self.token_offsets(ids)[:-1] + 1, len(data))
        return text, np.maximum(begins[places] - 1, 0).tolist()

    def token_offsets(self, ids: Ids) -> np.ndarray:
        """int64 (n + 1,): id i stands for bytes [i] to [i + 1] of ``decode_bytes(ids)``."""
        size = len(self._decode(ids))
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(self._lengths[np.asarray(ids, dtype=np.int64)], out=offsets[1:])
        surplus = int(offsets[-1]) - size  # blanks that sentencepiece takes away
        return np.maximum(offsets - surplus, 0) if surplus else offsets

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, of the name for a special one (b"" in a sentencepiece model).

        Raises ValueError for an id without a token.
        """
        token = None
        if 0 <= token_id < self.vocab_size:
            token = self._engine.token_bytes[token_id]
        if token is None:
            raise ValueError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        return token

    def known(self, ids: Iterable[int]) -> list[int]:
        """Those of the ids that stand for a token.

        A model may say others: it has more rows than there are ids, or ids are left out.
        """
        tokens = self._engine.token_bytes
        return [i for i in ids if 0 <= i < self.vocab_size and tokens[i] is not None]

    def bytes_per_id(self) -> np.ndarray:
        """int64 (vocab_size,): bytes of text each id stands for, 0 for special tokens."""
        lengths = self._lengths.copy()
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        # Of the tokens, special ones too.
        lengths = [len(token or b"") for token in self._engine.token_bytes]
        return np.array(lengths, dtype=np.int64)

    def stream_decoder(self, errors: str = "replace") -> StreamDecoder:
        """A decoder for ids that come one after the other."""
        return StreamDecoder(self, errors)

    @property
    def hash(self) -> str:
        """Identity of the vocabulary, see the class."""
        return self._engine.hash

    @property
    def dtype(self) -> np.dtype:
        """Type of the arrays, see the class."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def eot_id(self) -> int:
        """Id that ends a document; raises ValueError if there is none."""
        for name in (END_OF_TEXT, "<|end_of_text|>", "</s>"):
            if name in self.special_tokens:
                return self.special_tokens[name]
        raise ValueError(f"the vocabulary has no {END_OF_TEXT} or </s>; train it with one")

    @property
    def bos_id(self) -> int | None:
        """Id that begins a document, None where the vocabulary has no such token."""
        for name in ("<|bos|>", "<|begin_of_text|>", "<s>"):
            if name in self.special_tokens:
                return self.special_tokens[name]
        return None

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Vocabulary | bytes]]:
        return (Tokenizer, (self._engine.source,))

    def __copy__(self) -> Tokenizer:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Tokenizer:
        return self

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, hash={self.hash[:12]})"


class StreamDecoder:
    """Text of ids as they come; never half a character, and all of it in the end.

    ``"".join`` of what ``push`` and ``finish`` return is ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, errors: str = "replace") -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")(errors)
        # sentencepiece takes blanks from the front of a text; where the front ends, a decoder that
        # sees the ids so far knows.
        self._front: list[int] | None = []

    def push(self, *ids: int) -> str:
        """The text that is whole with these ids; raises ValueError for one without a token."""
        if self._front is not None:
            self._front += ids
            data = self._tokenizer.decode_bytes(self._front)
            self._front = None if data else self._front
        else:
            data = b"".join(map(self._tokenizer.token_bytes, ids))
        return self._characters.decode(data)

    def finish(self) -> str:
        """What is left: the replacement of a character that was never completed, or nothing."""
        return self._characters.decode(b"", True)


def check_disallowed(text: str, disallowed: Collection[str]) -> None:
    """Raise ValueError if ``text`` holds one of the strings."""
    if isinstance(disallowed, str):
        raise TypeError('disallowed_special must be a collection of strings or "all"')
    found = specials_regex(disallowed).search(text)
    if found is not None:
        name = found.group()
        raise ValueError(
            f"Encountered text corresponding to disallowed special token {name!r} at character "
            f"{found.start()}; name it in allowed_special to make it that token, or leave it out "
            "of disallowed_special (which may be empty) to encode it as ordinary text"
        )


def read_texts(paths: Iterable[PathLike], progress: Progress | None = None) -> Iterator[str]:
    """The texts of UTF-8 files for ``Tokenizer.train``, a block of about 1 MB at a time.

    ``progress(done, total)`` counts bytes. Raises DataError naming the file and the byte.
    """
    files = [Path(path) for path in paths]
    try:
        sizes = [file.stat().st_size for file in files]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read the text ({error.strerror})") from None
    before = 0
    for file, size in zip(files, sizes, strict=True):
        for text, done in read_blocks(file):
            yield text
            if progress is not None:
                progress(before + done, sum(sizes))
        before += size


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, path: PathLike, *, num_threads: int = 0
) -> Tokenizer:
    """Trains a LLaMA-style sentencepiece model, writes it to ``path`` (``*.model``) and loads it.

    BPE over characters with byte fallback, digits split, no normalisation (LLaMA 1 and 2 with
    ``vocab_size=32000``). The library holds all the text in memory. Raises ValueError where it
    refuses, for instance if the text is too small for the vocabulary.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of str, not one str; pass [text]")
    model = sentencepiece_model.train(texts, vocab_size, num_threads)
    files.write(Path(path), model)
    return Tokenizer(model, str(path))


if __name__ == "__main__":
    # The commands know the reading of data and this module; this module knows neither.
    from importlib import import_module

    raise SystemExit(import_module("fastgpt.bpe.commands").run())

"""Text <-> token ids: byte-level BPE in C++, and LLaMA-style sentencepiece models.

Text is never searched for special tokens unless the caller allows it, so nothing a user writes can
become one. Text with a lone surrogate (a str that has no UTF-8 form) raises ValueError with its
position: replacing it silently would break ``decode(encode(text)) == text``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from fastgpt import tokenizer_json
from fastgpt.errors import DataError
from fastgpt.tokenizer_json import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable

Pattern = Literal["gpt2", "gpt4", "llama3"]
AllowedSpecial = Set[str] | Literal["all"]
PathLike = str | os.PathLike[str]

END_OF_TEXT = "<|endoftext|>"
_BATCH_CHARACTERS = 1 << 24  # texts handed to the counting threads at a time


def _core() -> Any:
    try:
        from fastgpt import _bpe
    except ImportError as error:
        raise ImportError(
            f"the C++ extension fastgpt._bpe is not built ({error}); "
            "run `pip install -e .` in the source tree (needs a C++17 compiler)"
        ) from error
    return _bpe


def _surrogate_error(error: UnicodeEncodeError, where: str = "the text") -> ValueError:
    code = ord(error.object[error.start])
    return ValueError(
        f"lone surrogate U+{code:04X} at character {error.start} of {where}; "
        'clean it with text.encode("utf-8", "replace").decode()'
    )


class Tokenizer:
    """One vocabulary. Immutable, picklable, safe to share between threads and across a fork.

    Attributes:
        vocab_size: number of ids, special tokens included; ids are below it.
        special_tokens: string -> id of the special (control) tokens.
        dtype: smallest numpy type that holds every id (uint16 or uint32).
        hash: sha256 (hex) of everything that decides the ids, not of the file's formatting.
    """

    vocab_size: int
    special_tokens: dict[str, int]

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        pattern: Pattern = "gpt4",
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        num_threads: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tokenizer:
        """Trains byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2).

        Ids are 256 bytes, then merges, then special tokens; ``vocab_size`` counts all of them. It
        comes out smaller if the texts have too few distinct pairs. Memory follows the number of
        distinct words. The result does not depend on ``num_threads`` (0: one per core).
        ``progress(done, total)`` is called now and then with numbers of merges.

        Raises ValueError for a vocabulary without room for bytes and special tokens.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of str, not one str; pass [text]")
        core = _core()
        wanted = vocab_size - 256 - len(special_tokens)
        if wanted < 0 or vocab_size > tokenizer_json.MAX_ID:
            raise ValueError(
                f"vocab_size {vocab_size} is not between {256 + len(special_tokens)} (bytes and "
                f"special tokens) and {tokenizer_json.MAX_ID}"
            )
        trainer = core.Trainer(pattern, num_threads)
        for batch in _batches(texts):
            try:
                trainer.feed(batch)
            except UnicodeEncodeError as error:
                raise _surrogate_error(error, f"a text of {len(error.object)} characters") from None
        tokens: list[bytes | None] = [b""] * 256
        for byte, token_id in enumerate(core.byte_ids()):
            tokens[token_id] = bytes([byte])
        merges = []
        for left, right in trainer.train(wanted, 1, progress):
            merges.append((left, right, len(tokens)))
            tokens.append(cast(bytes, tokens[left]) + cast(bytes, tokens[right]))
        specials = {text: len(tokens) + i for i, text in enumerate(special_tokens)}
        if len(specials) != len(special_tokens):
            raise ValueError("special_tokens has a token twice")
        return _BPETokenizer(Vocabulary(pattern, tuple(tokens), tuple(merges), specials))

    @classmethod
    def from_file(cls, path: PathLike) -> Tokenizer:
        """Reads a ``tokenizer.json`` (byte-level BPE) or a sentencepiece ``*.model``.

        Raises DataError, naming the file and the place, for a file that is damaged or whose ids
        could not be reproduced exactly.
        """
        path = Path(path)
        data = _read(path)
        if path.suffix == ".model":
            return _SentencePieceTokenizer(data, str(path))
        document = tokenizer_json.parse(data, str(path))
        if isinstance(document, dict) and document.get("type") == "sentencepiece":
            name = document.get("model_file")
            if not isinstance(name, str) or Path(name).name != name:
                raise DataError(f"{path}: model_file: not the name of a file beside this one")
            return _SentencePieceTokenizer(_read(path.with_name(name)), str(path.with_name(name)))
        vocabulary = tokenizer_json.loads(document, str(path))
        try:
            return _BPETokenizer(vocabulary)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None

    @classmethod
    def from_tiktoken_ranks(
        cls, ranks: dict[bytes, int], pattern: Pattern, special_tokens: dict[str, int]
    ) -> Tokenizer:
        """A tokenizer with the ids of ``tiktoken.Encoding`` for the same ranks and pattern."""
        tokens: list[bytes | None] = [None] * (max(ranks.values(), default=-1) + 1)
        merges = []
        whole_pieces = False
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            tokens[rank] = token
            if len(token) < 2:
                continue
            parts = _last_parts(token, ranks)
            if len(parts) == 2:
                merges.append((ranks[parts[0]], ranks[parts[1]], rank))
            else:
                # Merging never leads to this token; tiktoken gives it to whole pieces only.
                whole_pieces = True
        return _BPETokenizer(
            Vocabulary(pattern, tuple(tokens), tuple(merges), dict(special_tokens), whole_pieces)
        )

    def save(self, path: PathLike) -> None:
        """Writes a file that ``from_file`` (and for BPE ``tokenizers.Tokenizer.from_file``) reads.

        A sentencepiece model goes beside ``path`` as ``*.model``.
        """
        raise NotImplementedError

    def with_special_tokens(self, names: Iterable[str]) -> Tokenizer:
        """This tokenizer with those of ``names`` that it lacks as special tokens behind all ids.

        Ids of ordinary text stay as they are. Raises ValueError for a name that an ordinary token
        has, or an empty one.
        """
        missing = [name for name in dict.fromkeys(names) if name not in self.special_tokens]
        if "" in missing:
            raise ValueError("a special token needs a name")
        return self._with_specials(missing) if missing else self

    def _with_specials(self, names: list[str]) -> Tokenizer:
        raise NotImplementedError

    def encode(self, text: str, *, allowed_special: AllowedSpecial = frozenset()) -> list[int]:
        """Ids of the text; the strings of ``allowed_special`` in it become special tokens."""
        raise NotImplementedError

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any byte string; bytes that are not UTF-8 count as symbols."""
        raise NotImplementedError

    def encode_to_numpy(
        self, text: str, *, allowed_special: AllowedSpecial = frozenset()
    ) -> np.ndarray:
        """As ``encode``, as an array (n,) of ``dtype``."""
        return np.array(self.encode(text, allowed_special=allowed_special), dtype=self.dtype)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 0) -> list[np.ndarray]:
        """Ids of each text as arrays of ``dtype``, without special tokens (0 threads: per core)."""
        return [self.encode_to_numpy(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray, errors: str = "replace") -> str:
        """Text of the ids; ``errors`` as in ``bytes.decode`` for ids that cut a character."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Bytes of the ids; raises ValueError for one that is not in the vocabulary."""
        raise NotImplementedError

    def bytes_per_id(self) -> np.ndarray:
        """int64 (vocab_size,): bytes of text each id stands for, 0 for special tokens."""
        raise NotImplementedError

    @property
    def hash(self) -> str:
        """Identity of the vocabulary, see the class."""
        raise NotImplementedError

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

    def __copy__(self) -> Tokenizer:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Tokenizer:
        return self

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, hash={self.hash[:12]})"


class _BPETokenizer(Tokenizer):
    """Byte-level BPE over the C++ core: every byte string has ids and comes back from them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.special_tokens = dict(vocabulary.specials)
        names = {tokenizer_json.token_name(token) for token in vocabulary.tokens if token}
        for special in self.special_tokens:
            if special in names:
                raise ValueError(f"special token {special!r} has the name of an ordinary token")
        try:
            specials = [(text.encode(), token_id) for text, token_id in self.special_tokens.items()]
        except UnicodeEncodeError as error:
            raise _surrogate_error(error, "a special token") from None
        self._encoder = _core().Encoder(
            vocabulary.pattern,
            vocabulary.tokens,
            vocabulary.merges,
            specials,
            vocabulary.whole_pieces,
        )
        self._special_index = {text: i for i, text in enumerate(self.special_tokens)}
        self.vocab_size = self._encoder.vocab_size

    def _allowed(self, allowed: AllowedSpecial) -> list[int]:
        if allowed == "all":
            return list(self._special_index.values())
        try:
            return sorted(self._special_index[text] for text in allowed)
        except KeyError as error:
            raise ValueError(
                f"{error.args[0]!r} is not a special token of this vocabulary"
            ) from None

    def save(self, path: PathLike) -> None:
        _write(Path(path), tokenizer_json.dumps(self.vocabulary).encode())

    def encode(self, text: str, *, allowed_special: AllowedSpecial = frozenset()) -> list[int]:
        try:
            return self._encoder.encode(
                text, self._allowed(allowed_special) if allowed_special else ()
            )
        except UnicodeEncodeError as error:
            raise _surrogate_error(error) from None

    def _with_specials(self, names: list[str]) -> Tokenizer:
        added = {name: self.vocab_size + i for i, name in enumerate(names)}
        specials = self.vocabulary.specials | added
        return _BPETokenizer(dataclasses.replace(self.vocabulary, specials=specials))

    def encode_bytes(self, data: bytes) -> list[int]:
        return self._encoder.encode(data, ())

    def encode_to_numpy(
        self, text: str, *, allowed_special: AllowedSpecial = frozenset()
    ) -> np.ndarray:
        allowed = self._allowed(allowed_special) if allowed_special else ()
        try:
            return self._encoder.encode_to_numpy(text, allowed)
        except UnicodeEncodeError as error:
            raise _surrogate_error(error) from None

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 0) -> list[np.ndarray]:
        try:
            return self._encoder.encode_batch(texts, num_threads)
        except UnicodeEncodeError as error:
            which = next(i for i, text in enumerate(texts) if text is error.object)
            raise _surrogate_error(error, f"text {which}") from None

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self._encoder.decode(ids)

    def bytes_per_id(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        tokens = self.vocabulary.tokens
        lengths[: len(tokens)] = [len(token or b"") for token in tokens]
        return lengths

    @cached_property
    def _hash(self) -> str:
        vocabulary = self.vocabulary
        digest = hashlib.sha256(f"bpe {vocabulary.pattern} {vocabulary.whole_pieces}\n".encode())
        for token in vocabulary.tokens:
            digest.update(b"-" if token is None else b"%d:%b" % (len(token), token))
        digest.update(np.array(vocabulary.merges, dtype="<u4").tobytes())
        for text, token_id in sorted(vocabulary.specials.items(), key=lambda item: item[1]):
            digest.update(f"{token_id}:{len(text)}:{text}".encode())
        return digest.hexdigest()

    @property
    def hash(self) -> str:
        return self._hash

    def __reduce__(self) -> tuple[type[_BPETokenizer], tuple[Vocabulary]]:
        return (_BPETokenizer, (self.vocabulary,))


class _SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model behind the same interface; the ids are the library's.

    As there, a text gets one space in front (``add_dummy_prefix``) which decoding takes away. Text
    between special tokens is encoded piece by piece.
    """

    def __init__(self, model: bytes, file: str = "sentencepiece model") -> None:
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{file}: not a sentencepiece model ({_one_line(error)})") from None
        processor = self._processor
        self.vocab_size = processor.GetPieceSize()
        ids = range(self.vocab_size)
        self.special_tokens = {processor.IdToPiece(i): i for i in ids if processor.IsControl(i)}
        self._bytes = [self._piece_bytes(i) for i in ids]

    def _piece_bytes(self, token_id: int) -> bytes:
        processor = self._processor
        if processor.IsControl(token_id):
            return b""
        piece = processor.IdToPiece(token_id)
        if processor.IsByte(token_id):
            return bytes([int(piece[3:5], 16)])
        if processor.IsUnknown(token_id):
            return processor.DecodeIds([token_id]).encode()
        return piece.replace("▁", " ").encode()

    def save(self, path: PathLike) -> None:
        path = Path(path)
        model = path.with_suffix(".model")
        _write(model, self._model)
        if path.suffix != ".model":
            pointer = f'{{"type": "sentencepiece", "model_file": "{model.name}"}}\n'
            _write(path, pointer.encode())

    def encode(self, text: str, *, allowed_special: AllowedSpecial = frozenset()) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _surrogate_error(error) from None
        ids: list[int] = []
        for part, special in self._split(text, allowed_special):
            ids += self._processor.EncodeAsIds(part)
            if special is not None:
                ids.append(special)
        return ids

    def _split(self, text: str, allowed: AllowedSpecial) -> Iterator[tuple[str, int | None]]:
        # Ordinary text and the special token behind it, None at the end.
        import re

        names = self.special_tokens if allowed == "all" else cast(Set[str], allowed)
        for name in names:
            if name not in self.special_tokens:
                raise ValueError(f"{name!r} is not a special token of this vocabulary")
        begin = 0
        if names:
            longest_first = sorted(names, key=len, reverse=True)
            for found in re.finditer("|".join(map(re.escape, longest_first)), text):
                yield text[begin : found.start()], self.special_tokens[found.group()]
                begin = found.end()
        yield text[begin:], None

    def _with_specials(self, names: list[str]) -> Tokenizer:
        for name in names:
            if self._processor.IdToPiece(self._processor.PieceToId(name)) == name:
                raise ValueError(f"special token {name!r} has the name of an ordinary token")
        return _SentencePieceTokenizer(self._model + b"".join(map(_control_piece, names)))

    def encode_bytes(self, data: bytes) -> list[int]:
        # sentencepiece encodes characters: UnicodeDecodeError, a ValueError, for anything else.
        return self.encode(data.decode("utf-8"))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        pieces = []
        for position, token_id in enumerate(np.asarray(ids).tolist()):
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"token id {token_id} at position {position} is not in the vocabulary of "
                    f"{self.vocab_size}"
                )
            pieces.append(self._bytes[token_id])
        return b"".join(pieces).removeprefix(b" ")

    def bytes_per_id(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._bytes], dtype=np.int64)

    @property
    def hash(self) -> str:
        return hashlib.sha256(b"sentencepiece\n" + self._model).hexdigest()

    def __reduce__(self) -> tuple[type[_SentencePieceTokenizer], tuple[bytes]]:
        return (_SentencePieceTokenizer, (self._model,))


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, path: PathLike, *, num_threads: int = 0
) -> Tokenizer:
    """Trains a LLaMA-style sentencepiece model, writes it to ``path`` (``*.model``) and loads it.

    BPE over characters with byte fallback, digits split, no normalisation (LLaMA 1 and 2 with
    ``vocab_size=32000``). The library holds all the text in memory. Raises ValueError where it
    refuses, for instance if the text is too small for the vocabulary.
    """
    import sentencepiece

    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of str, not one str; pass [text]")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            max_sentence_length=1 << 16,
            num_threads=num_threads or os.cpu_count() or 1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"sentencepiece cannot train: {_one_line(error)}") from None
    _write(Path(path), model.getvalue())
    return _SentencePieceTokenizer(model.getvalue(), str(path))


def _control_piece(name: str) -> bytes:
    """One more control piece for the end of a serialised sentencepiece model.

    Protocol buffers: field 1 of the model, a message with the name as field 1 and type 3 (CONTROL)
    as field 3. Two messages behind each other are one, their repeated fields joined.
    """
    data = name.encode()
    if len(data) > 120:
        raise ValueError(f"special token {name!r} is longer than 120 bytes")
    piece = bytes([0x0A, len(data)]) + data + bytes([0x18, 3])
    return bytes([0x0A, len(piece)]) + piece


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


def _last_parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    # What the token's own bytes merge to before the last step. As merges inside a token do not
    # depend on what surrounds it, these are the only two parts it is ever made of; if more than
    # two are left, merging never leads to it.
    parts = [token[i : i + 1] for i in range(len(token))]
    never = tokenizer_json.MAX_ID + 1
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], never), i) for i in range(len(parts) - 1))
        if rank == never:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer ({error.strerror})") from None


def _write(path: Path, data: bytes) -> None:
    # Whole or not at all.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

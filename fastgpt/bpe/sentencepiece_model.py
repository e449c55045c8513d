"""sentencepiece models behind the interface of `fastgpt.bpe.byte_pair.BytePair`, and training.

The ids are the library's. As there, a text usually gets one space in front (``add_dummy_prefix``)
which decoding takes away. Text between special tokens is encoded piece by piece.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fastgpt.bpe.hf_json import VocabularyError
from fastgpt.bpe.text import split_specials

_SPACE = "▁"


class SentencePiece:
    """Encodes and decodes as the library does; see `fastgpt.bpe.byte_pair.BytePair`."""

    def __init__(self, model: bytes, file: str = "sentencepiece model") -> None:
        import sentencepiece

        self.source = model
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise VocabularyError(
                f"{file}: not a sentencepiece model ({_one_line(error)})"
            ) from None
        processor = self._processor
        self.vocab_size: int = processor.GetPieceSize()
        ids = range(self.vocab_size)
        self.special_tokens = {processor.IdToPiece(i): i for i in ids if processor.IsControl(i)}
        self.token_bytes: list[bytes | None] = [self._piece_bytes(i) for i in ids]
        self._spaced = [self._begins_with_space(i) for i in ids]
        self._strips, self._strips_all = self._probe()

    def _piece_bytes(self, token_id: int) -> bytes:
        processor = self._processor
        if processor.IsControl(token_id):
            return b""
        piece = processor.IdToPiece(token_id)
        if processor.IsByte(token_id):
            return bytes([int(piece[3:5], 16)])
        if processor.IsUnknown(token_id):
            return processor.DecodeIds([token_id]).encode()
        return piece.replace(_SPACE, " ").encode()

    def _begins_with_space(self, token_id: int) -> bool:
        processor = self._processor
        other = processor.IsByte(token_id) or processor.IsUnknown(token_id)
        return processor.IdToPiece(token_id).startswith(_SPACE) and not other

    def _probe(self) -> tuple[bool, bool]:
        # Whether decoding takes away the space that begins a text, and whether more of them; two
        # fields of the model that the library does not show.
        if True not in self._spaced:
            return False, False
        spaced = self._spaced.index(True)
        strips = len(self._processor.DecodeIds([spaced])) < len(self._processor.IdToPiece(spaced))
        blank = self._processor.PieceToId(_SPACE)
        alone = self._processor.IdToPiece(blank) == _SPACE
        return strips, strips and alone and self._processor.DecodeIds([blank, blank]) == ""

    def encode(self, text: str, allowed: Sequence[int] = ()) -> list[int]:
        """Ids of the text; ``allowed`` are places in ``special_tokens``."""
        text.encode()  # the library would take a lone surrogate for something else
        names = list(self.special_tokens)
        specials = {names[i]: self.special_tokens[names[i]] for i in allowed}
        ids: list[int] = []
        for part, special in split_specials(text, specials):
            ids += self._processor.EncodeAsIds(part)
            if special is not None:
                ids.append(special)
        return ids

    def encode_to_numpy(self, text: str, allowed: Sequence[int] = ()) -> np.ndarray:
        """As ``encode``, as an array."""
        return np.array(self.encode(text, allowed), dtype=self._dtype)

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        """Ids of each text."""
        for text in texts:
            text.encode()
        threads = num_threads or os.cpu_count() or 1
        lists = self._processor.EncodeAsIds(list(texts), num_threads=threads) if texts else []
        return [np.array(ids, dtype=self._dtype) for ids in lists]

    @property
    def _dtype(self) -> type:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode_with_dropout(
        self, text: str, allowed: Sequence[int], p: float, seed: int
    ) -> np.ndarray:
        """Raises ValueError: with the same seed the library draws anew in every process."""
        raise ValueError(
            "BPE dropout works with byte-level vocabularies: the sentencepiece library cannot "
            "repeat what it drew in another process"
        )

    def decode(self, ids: Sequence[int] | np.ndarray, errors: str) -> str:
        """Text of the ids; ``errors`` as in ``bytes.decode``."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Bytes of the ids; raises ValueError for one that is not in the vocabulary."""
        pieces: list[bytes] = []
        at_begin = self._strips
        for position, token_id in enumerate(np.asarray(ids).tolist()):
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"token id {token_id} at position {position} is not in the vocabulary of "
                    f"{self.vocab_size}"
                )
            piece = self.token_bytes[token_id] or b""
            if at_begin and piece:
                if self._spaced[token_id]:
                    piece = piece[1:]
                    at_begin = self._strips_all and not piece
                else:
                    at_begin = False
            pieces.append(piece)
        return b"".join(pieces)

    def with_specials(self, names: Sequence[str]) -> bytes:
        """The model with more control pieces behind its ids."""
        for name in names:
            if self._processor.IdToPiece(self._processor.PieceToId(name)) == name:
                raise ValueError(f"special token {name!r} has the name of an ordinary token")
        return self.source + b"".join(map(_control_piece, names))

    @cached_property
    def hash(self) -> str:
        """sha256 of the model."""
        return hashlib.sha256(b"sentencepiece\n" + self.source).hexdigest()


def train(texts: Iterable[str], vocab_size: int, num_threads: int) -> bytes:
    """The model; see `fastgpt.tokenizer.train_sentencepiece`."""
    import sentencepiece

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
    return model.getvalue()


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Token shards: a ``.bin`` file of token ids with a header that says what they are.

    offset   bytes              content (all numbers little-endian)
    0        8                  magic ``FGPTBIN1``
    8        4                  version of the layout, 1
    12       4                  bytes per token: 2 (uint16) or 4 (uint32)
    16       4                  vocabulary size V; every id is below it
    20       4                  CRC-32 of the trailer
    24       8                  tokens N
    32       8                  documents D
    40       32                 SHA-256 of the tokenizer
    72       52                 zero
    124      4                  CRC-32 of bytes 0 to 123
    128      N * 2 or N * 4     payload: the ids, then zeros up to a multiple of 8
    ...      8 * D              trailer: where each document ends, in tokens, rising to N
    ...      4 * blocks         trailer: CRC-32 of each 4 MiB block of the payload

The header is checked at every opening. Reading the whole payload (checksums, largest id) happens at
the first opening only: the result is remembered in ``<name>.verified``, which holds size, time of
last change and header checksum of the file it speaks for. The writer leaves that note as well,
having checked every id. So a shard of 10^9 tokens opens at once, and no id outside the vocabulary
ever reaches an embedding table.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np

from fastgpt.errors import DataError, UsageError

MAGIC = b"FGPTBIN1"
VERSION = 1
HEADER_BYTES = 128
BLOCK_BYTES = 4 << 20

_FIELDS = struct.Struct("<8sIIIIQQ32s")
_CRC = struct.Struct("<I")
_MEND = "delete it and tokenize the text again"


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a shard's header; sizes in bytes, counts in tokens and documents."""

    version: int
    item_bytes: int
    vocab_size: int
    trailer_crc: int
    tokens: int
    documents: int
    tokenizer_hash: str

    @property
    def dtype(self) -> np.dtype:
        """The type of a stored id."""
        return np.dtype(f"<u{self.item_bytes}")

    @property
    def payload_bytes(self) -> int:
        """Size of the payload, padding included."""
        return -(-self.tokens * self.item_bytes // 8) * 8

    @property
    def blocks(self) -> int:
        """Number of checksummed blocks of the payload."""
        return -(-self.payload_bytes // BLOCK_BYTES)

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return HEADER_BYTES + self.payload_bytes + 8 * self.documents + 4 * self.blocks

    def pack(self) -> bytes:
        """Return the header as it stands in the file."""
        fields = (self.version, self.item_bytes, self.vocab_size, self.trailer_crc)
        digest = bytes.fromhex(self.tokenizer_hash)
        data = _FIELDS.pack(MAGIC, *fields, self.tokens, self.documents, digest)
        data = data.ljust(HEADER_BYTES - _CRC.size, b"\0")
        return data + _CRC.pack(zlib.crc32(data))


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """An open shard; ``tokens`` (uint16 or uint32), ``document_ends`` (uint64) are mapped files."""

    path: Path
    tokens: np.ndarray
    document_ends: np.ndarray
    vocab_size: int
    tokenizer_hash: str

    def __len__(self) -> int:
        return len(self.tokens)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type in which ids of this vocabulary are stored: uint16 if it holds them."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def narrow(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return ids in their stored type; raises ValueError when one is outside the vocabulary."""
    ids = np.asarray(ids)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"token ids {ids.min()} to {ids.max()} outside [0, {vocab_size})")
    return np.ascontiguousarray(ids, dtype=token_dtype(vocab_size))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, no permission) into a UsageError about ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"{path}: cannot write: {reason}; make room or choose another --out"
        ) from error


class ShardWriter:
    """Writes one shard as a stream; the file appears under its name complete or not at all.

    A context manager: leaving it in peace writes trailer and header, syncs and renames; leaving it
    by an exception removes what was written. One writer per path at a time.
    """

    def __init__(self, path: Path, *, vocab_size: int, tokenizer_hash: str):
        if len(bytes.fromhex(tokenizer_hash)) != 32:
            raise ValueError("tokenizer_hash: 64 hexadecimal digits expected")
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.tokenizer_hash = tokenizer_hash
        self.tokens = 0
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._ends: list[np.ndarray] = []
        self._last_end = 0
        self._block_crcs: list[int] = []
        self._crc = self._in_block = 0
        with writing(self.path):
            self._file = open(self._temporary, "wb")  # noqa: SIM115
            self._file.write(bytes(HEADER_BYTES))

    def append(self, ids: np.ndarray, ends: Sequence[int] | np.ndarray = ()) -> None:
        """Append token ids; ``ends`` are the places in ``ids`` behind which a document ends.

        Raises ValueError for an id outside the vocabulary or places that do not rise, UsageError
        when the file cannot be written.
        """
        ids = narrow(ids, self.vocab_size)
        places = np.asarray(ends, dtype=np.int64) + self.tokens
        self.tokens += len(ids)
        if len(places):
            if (
                places[0] <= self._last_end
                or places[-1] > self.tokens
                or (np.diff(places) <= 0).any()
            ):
                raise ValueError("document ends must rise and lie inside the tokens")
            self._ends.append(places.astype("<u8"))
            self._last_end = int(places[-1])
        self._write(ids.view(np.uint8).data)

    def _write(self, data: memoryview) -> None:
        with writing(self.path):
            while len(data):
                part = data[: BLOCK_BYTES - self._in_block]
                self._file.write(part)
                self._crc = zlib.crc32(part, self._crc)
                self._in_block += len(part)
                if self._in_block == BLOCK_BYTES:
                    self._end_block()
                data = data[len(part) :]

    def _end_block(self) -> None:
        self._block_crcs.append(self._crc)
        self._crc = self._in_block = 0

    def close(self) -> None:
        """Complete the file and give it its name. Raises DataError if no token was written."""
        if not self.tokens:
            self.abort()
            raise DataError(f"{self.path}: no tokens to write; give more text")
        if self._last_end != self.tokens:
            self._ends.append(np.array([self.tokens], dtype="<u8"))
        item = token_dtype(self.vocab_size).itemsize
        self._write(memoryview(bytes(-self.tokens * item % 8)))
        if self._in_block:
            self._end_block()
        ends = np.concatenate(self._ends)
        trailer = ends.tobytes() + np.array(self._block_crcs, dtype="<u4").tobytes()
        header = Header(
            VERSION,
            item,
            self.vocab_size,
            zlib.crc32(trailer),
            self.tokens,
            len(ends),
            self.tokenizer_hash,
        ).pack()
        with writing(self.path):
            self._file.write(trailer)
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            _sync_directory(self.path.parent)
        _remember(self.path, self.path.stat(), header)

    def abort(self) -> None:
        """Remove what was written."""
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise


def open_shard(path: Path | str, *, vocab_size: int, tokenizer_hash: str) -> Shard:
    """Map the shard at ``path`` after checking that it is whole and made by this tokenizer.

    The first opening of a file the writer did not leave here reads all of it (see the module's
    text). Raises DataError naming the file and the byte: not a shard, damaged, cut short, of
    another tokenizer or vocabulary, an id outside the vocabulary.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            raw = file.read(HEADER_BYTES)
            header = _parse_header(path, raw, stat.st_size)
            _check_origin(path, header, vocab_size, tokenizer_hash)
            if not _is_remembered(path, stat, raw):
                _verify(path, file, header)
                _remember(path, stat, raw)
            shape = (header.tokens,)
            tokens = np.memmap(file, header.dtype, "r", HEADER_BYTES, shape)
            place = HEADER_BYTES + header.payload_bytes
            ends = np.memmap(file, np.dtype("<u8"), "r", place, (header.documents,))
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}; check the path") from error
    # Plain views: np.memmap's own indexing costs several microseconds a call.
    return Shard(path, np.asarray(tokens), np.asarray(ends), header.vocab_size, tokenizer_hash)


def _parse_header(path: Path, raw: bytes, file_bytes: int) -> Header:
    if file_bytes == 0:
        raise DataError(f"{path}: byte 0: the file is empty; {_MEND}")
    if raw[: len(MAGIC)] != MAGIC:
        raise DataError(f"{path}: byte 0: not a token shard (wrong magic); {_MEND}")
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: byte {len(raw)}: the file ends inside its header; {_MEND}")
    _, version, item, vocab, crc, tokens, documents, digest = _FIELDS.unpack_from(raw)
    header = Header(version, item, vocab, crc, tokens, documents, digest.hex())
    if header.version != VERSION:
        raise DataError(
            f"{path}: byte 8: version {header.version}, this program reads {VERSION}; {_MEND}"
        )
    (header_crc,) = _CRC.unpack_from(raw, HEADER_BYTES - _CRC.size)
    if zlib.crc32(raw[: -_CRC.size]) != header_crc:
        raise DataError(
            f"{path}: byte {HEADER_BYTES - _CRC.size}: the header is damaged (checksum); {_MEND}"
        )
    if header.item_bytes not in (2, 4):
        raise DataError(
            f"{path}: byte 12: {header.item_bytes} bytes per token, not 2 or 4; {_MEND}"
        )
    if not header.tokens or not 0 < header.documents <= header.tokens:
        counts = f"{header.tokens} tokens in {header.documents} documents"
        raise DataError(f"{path}: byte 24: {counts}; {_MEND}")
    if header.file_bytes != file_bytes:
        end = min(header.file_bytes, file_bytes)
        raise DataError(
            f"{path}: byte {end}: {file_bytes} bytes, the header promises {header.file_bytes} "
            f"({header.tokens} tokens); copy it again, or {_MEND}"
        )
    return header


def _check_origin(path: Path, header: Header, vocab_size: int, tokenizer_hash: str) -> None:
    if header.tokenizer_hash != tokenizer_hash:
        raise DataError(
            f"{path}: byte 40: written with tokenizer {header.tokenizer_hash[:12]}, this run has "
            f"{tokenizer_hash[:12]}; use that tokenizer, or {_MEND}"
        )
    if header.vocab_size != vocab_size:
        raise DataError(
            f"{path}: byte 16: vocabulary of {header.vocab_size}, the tokenizer has {vocab_size}; "
            f"use that tokenizer, or {_MEND}"
        )


def _verify(path: Path, file: BufferedReader, header: Header) -> None:
    """Read everything behind the header and check checksums, ids and document ends.

    Reads into one buffer, not through the map: memory stays at one block.
    """
    start = HEADER_BYTES + header.payload_bytes
    file.seek(start)
    trailer = file.read(header.file_bytes - start)
    if zlib.crc32(trailer) != header.trailer_crc:
        raise DataError(f"{path}: byte {start}: the trailer is damaged (checksum); {_MEND}")
    ends = np.frombuffer(trailer, "<u8", header.documents)
    if ends[-1] != header.tokens or (ends[1:] <= ends[:-1]).any() or ends[0] == 0:
        raise DataError(f"{path}: byte {start}: document ends that do not rise; {_MEND}")
    crcs = np.frombuffer(trailer, "<u4", offset=8 * header.documents)
    file.seek(HEADER_BYTES)
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for i, crc in enumerate(crcs.tolist()):
        place = HEADER_BYTES + i * BLOCK_BYTES
        size = min(BLOCK_BYTES, start - place)
        block = buffer[:size]
        if file.readinto(block) != size or zlib.crc32(block) != crc:
            raise DataError(
                f"{path}: byte {place}: the {size} bytes from here are damaged (checksum); "
                f"copy the file again, or {_MEND}"
            )
        ids = np.frombuffer(block, header.dtype)
        if ids.max() >= header.vocab_size:
            where = int(np.argmax(ids >= header.vocab_size))
            raise DataError(
                f"{path}: byte {place + where * header.item_bytes}: token id {ids[where]} outside "
                f"the vocabulary of {header.vocab_size}; {_MEND}"
            )


def _note_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _note(stat: os.stat_result, header: bytes) -> dict:
    (crc,) = _CRC.unpack(header[-_CRC.size :])
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "header_crc": crc}


def _is_remembered(path: Path, stat: os.stat_result, header: bytes) -> bool:
    try:
        return json.loads(_note_path(path).read_bytes()) == _note(stat, header)
    except (OSError, ValueError, RecursionError):
        return False


def _remember(path: Path, stat: os.stat_result, header: bytes) -> None:
    """Note that the file is verified; if that cannot be written, the next opening checks again."""
    note = _note_path(path)
    temporary = note.with_name(f"{note.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        temporary.write_text(json.dumps(_note(stat, header)))
        os.replace(temporary, note)


def _sync_directory(path: Path) -> None:
    """Make a rename durable; where directories cannot be opened (Windows) there is no need to."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

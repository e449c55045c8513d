"""Reading text: files and directories become one stream of documents, damage is named by place.

    .txt            a line ``<|endoftext|>`` ends a document; without one the file is one document
    .jsonl          one JSON object a line, the text under a key
    .parquet        one row a document, the text in a column (needs pyarrow)

``.txt`` and ``.jsonl`` may carry ``.gz`` or ``.xz`` behind. Text is UTF-8, with or without a byte
order mark; CRLF line ends become LF, and the line end that closes a text is not part of it. Files
are streamed: memory is bounded by the longest line and by four ``PIECE_BYTES``, not by the file.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from fastgpt.errors import DataError, UsageError

SEPARATOR = b"<|endoftext|>"
MAX_LINE_BYTES = 256 << 20
PIECE_BYTES = 4 << 20  # a longer document comes in pieces of about this size
SUFFIXES = (".txt", ".txt.gz", ".txt.xz", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")

_BLOCK_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it began: ``line`` counts from 1 (rows in a Parquet file).

    ``continued`` marks a further piece of the document before it: a document far longer than
    ``PIECE_BYTES`` is handed out in several, cut where a tokenizer would split words anyway.
    """

    text: str
    source: str
    line: int
    continued: bool = False


@dataclass
class ReadStats:
    """What a pass left out: blank documents, and bad ones with ``on_error="skip"``."""

    empty: int = 0
    bad: int = 0


def embedded_text() -> Path:
    """Return the path of the English text that comes with the package (fastgpt/assets/SOURCES.md).

    Raises DataError if the installation lacks it.
    """
    path = Path(__file__).parents[1] / "assets" / "pretrain.txt.xz"
    if not path.is_file():
        raise DataError(f"{path}: the packaged text is missing; reinstall fastgpt-trainer")
    return path


def read_documents(
    paths: Sequence[Path | str],
    *,
    text_key: str = "text",
    on_error: Literal["error", "skip"] = "error",
) -> Documents:
    """Return the documents of ``paths`` (files, or directories walked in sorted order) as a stream.

    A file that is named twice, or also lies below a directory that is, is read once.
    The stream can be iterated again. Paths are checked here; contents are read, and complained
    about with a DataError naming file and line, as the iteration gets there. With
    ``on_error="skip"`` a document or a file without usable content is left out and counted in
    ``Documents.stats`` instead; a file that cannot be read through is an error all the same.

    Raises DataError (missing or unreadable path, directory without texts) or UsageError (unknown
    kind of file, no path at all, Parquet without pyarrow).
    """
    if not paths:
        raise UsageError("no data given; name files or directories")
    named = [file for path in paths for file in _files_of(Path(path))]
    files = list({file.resolve(): file for file in named}.values())
    if any(file.name.lower().endswith(".parquet") for file in files):
        _pyarrow(files)
    return Documents(files, text_key, on_error)


class Documents:
    """A stream of documents over ``files``; see `read_documents`, which makes it.

    ``stats`` belongs to the latest pass. ``bytes_done`` of ``bytes_total`` are file bytes,
    compressed ones where a file is compressed: the measure of progress.
    """

    def __init__(self, files: list[Path], text_key: str, on_error: Literal["error", "skip"]):
        self.files = files
        self.text_key = text_key
        self.on_error = on_error
        self.stats = ReadStats()
        self._sizes = [_stat(file).st_size for file in files]
        self.bytes_total = sum(self._sizes)
        self._bytes_before = 0
        self._raw: BinaryIO | None = None

    @property
    def bytes_done(self) -> int:
        """File bytes read so far in the latest pass."""
        within = self._raw.tell() if self._raw is not None and not self._raw.closed else 0
        return self._bytes_before + within

    def fingerprint(self) -> dict:
        """Return what decides the documents, as JSON: the files with size and time, the options."""
        stats = [(str(file.absolute()), _stat(file)) for file in self.files]
        sources = [
            {"path": path, "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for path, s in stats
        ]
        return {"sources": sources, "text_key": self.text_key, "on_error": self.on_error}

    def __iter__(self) -> Iterator[Document]:
        self.stats = ReadStats()
        self._bytes_before = 0
        found = False
        for file, size in zip(self.files, self._sizes, strict=True):
            for document in self._read(file):
                found = True
                yield document
            self._bytes_before += size
        if not found:
            names = ", ".join(str(file) for file in self.files[:3])
            left_out = f"{self.stats.empty} empty and {self.stats.bad} bad ones left out"
            raise DataError(f"{names}: no documents ({left_out}); give files with text")

    def _read(self, path: Path) -> Iterator[Document]:
        try:
            with open(path, "rb") as raw:
                self._raw = raw
                try:
                    yield from self._read_open(path, raw)
                except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                    raise DataError(
                        f"{path}: near byte {raw.tell()}: cannot read on: {error}; replace the file"
                    ) from error
        except OSError as error:
            raise DataError(f"{path}: cannot open: {error.strerror}; check the path") from error

    def _read_open(self, path: Path, raw: BinaryIO) -> Iterator[Document]:
        kind = path.name.lower()
        if os.fstat(raw.fileno()).st_size == 0:
            self._bad(f"{path}: the file is empty; remove it from the data")
        elif kind.endswith(".parquet"):
            yield from self._read_parquet(path, raw)
        elif kind.removesuffix(".gz").removesuffix(".xz").endswith(".jsonl"):
            yield from self._read_jsonl(path, _decompressed(raw, kind))
        else:
            yield from self._read_text(path, _decompressed(raw, kind))

    def _bad(self, message: str) -> None:
        if self.on_error == "error":
            raise DataError(message)
        self.stats.bad += 1

    def _read_text(self, path: Path, stream: BinaryIO) -> Iterator[Document]:
        piece = None
        for line, offset, block in _blocks(path, stream):
            piece = piece or _Piece(line)
            if piece.can_end_before(block):
                document = self._from_piece(path, piece, last=False)
                piece = _Piece(line, continued=piece.continued or document is not None)
                if document:
                    yield document
            begin = 0
            for at, end in _separators(block):
                piece.add(block[begin:at], offset + begin)
                if document := self._from_piece(path, piece, last=True):
                    yield document
                line += block.count(b"\n", begin, end)
                piece, begin = _Piece(line), end
            piece.add(block[begin:], offset + begin)
        if piece is None:
            self._bad(f"{path}: the file is empty; remove it from the data")
        elif piece.size and (document := self._from_piece(path, piece, last=True)):
            yield document

    def _from_piece(self, path: Path, piece: _Piece, *, last: bool) -> Document | None:
        data = b"".join(piece.parts)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line = piece.line + data.count(b"\n", 0, error.start)
            hint = "iconv -f LATIN1 -t UTF-8"
            if piece.offset + error.start == 0 and data.startswith(_UTF16_BOMS):
                hint = "iconv -f UTF-16 -t UTF-8"
            self._bad(
                f"{path}:{line}: byte {piece.offset + error.start} is not valid UTF-8; "
                f"convert the file ({hint}) or skip bad documents"
            )
            return None
        if "\r" in text:
            text = text.replace("\r\n", "\n")
        if last:
            text = text.removesuffix("\n")
        return self._document(text, path, piece.line, piece.continued)

    def _read_jsonl(self, path: Path, stream: BinaryIO) -> Iterator[Document]:
        empty = True
        for line, offset, block in _blocks(path, stream):
            empty = False
            for raw in io.BytesIO(block):
                if raw.strip() and (document := self._from_json(raw, path, line, offset)):
                    yield document
                line += 1
                offset += len(raw)
        if empty:
            self._bad(f"{path}: the file is empty; remove it from the data")

    def _from_json(self, raw: bytes, path: Path, line: int, offset: int) -> Document | None:
        try:
            text = _json_text(raw, offset, self.text_key)
        except ValueError as error:
            self._bad(f"{path}:{line}: {error}, or skip bad documents")
            return None
        return self._document(text, path, line)

    def _read_parquet(self, path: Path, raw: BinaryIO) -> Iterator[Document]:
        pyarrow = _pyarrow([path])
        try:
            table = pyarrow.parquet.ParquetFile(raw)
            if self.text_key not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names[:8])
                self._bad(f"{path}: no column {self.text_key!r} (it has {columns}); set text_key")
                return
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[self.text_key]):
                for value in batch.column(0):
                    row += 1
                    if document := self._from_cell(value, path, row):
                        yield document
            if row == 0:
                self._bad(f"{path}: the file has no rows; remove it from the data")
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: not a sound Parquet file: {reason}; replace it") from error

    def _from_cell(self, cell: Any, path: Path, row: int) -> Document | None:
        try:
            text = cell.as_py()
        except UnicodeDecodeError as error:
            self._bad(f"{path}: row {row}: byte {error.start} of the text is not valid UTF-8")
            return None
        if not isinstance(text, str):
            kind = type(text).__name__
            self._bad(f"{path}: row {row}: {self.text_key!r} is {kind}, not text; set text_key")
            return None
        return self._document(text, path, row)

    def _document(
        self, text: str, path: Path, line: int, continued: bool = False
    ) -> Document | None:
        if not text or (text.isspace() and not continued):
            self.stats.empty += not continued
            return None
        return Document(text, str(path), line, continued)


class _Piece:
    """The lines of a document, or of a part of it, from ``line`` and byte ``offset`` on."""

    def __init__(self, line: int, continued: bool = False):
        self.line = line
        self.offset = 0
        self.continued = continued
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, raw: bytes, offset: int) -> None:
        if not self.parts:
            self.offset = offset
        self.parts.append(raw)
        self.size += len(raw)

    def can_end_before(self, raw: bytes) -> bool:
        """Whether to cut here: the piece is long, and no run of white space is torn apart.

        A cut inside such a run changes how its tokens come out, so a piece waits for a better one,
        in ordinary text the next line. Four times the size is too much to go on waiting.
        """
        if self.size < PIECE_BYTES or raw.startswith(SEPARATOR):
            return False
        last_line = self.parts[-1][:-1].rpartition(b"\n")[2]
        clean = not raw[:1].isspace() and last_line.strip() != b""
        return clean or self.size >= 4 * PIECE_BYTES


def _files_of(path: Path) -> list[Path]:
    """Return the text files at ``path``: itself, or those below it, sorted, none hidden."""
    if path.is_dir():
        found = []
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            visible = [name for name in names if not name.startswith(".")]
            found += [Path(folder, name) for name in visible if name.lower().endswith(SUFFIXES)]
        if not found:
            raise DataError(f"{path}: no text files below it; known are {', '.join(SUFFIXES)}")
        return sorted(found)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory; check the path")
    if not path.is_file():
        raise DataError(f"{path}: not a regular file; write the text to a file first")
    if not path.name.lower().endswith(SUFFIXES):
        raise UsageError(
            f"{path}: unknown kind of file; rename or convert to {', '.join(SUFFIXES)}"
        )
    return [path]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot open: {error.strerror}; check the path") from error


def _pyarrow(files: Sequence[Path]) -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        file = next(file for file in files if file.name.lower().endswith(".parquet"))
        hint = "pip install 'fastgpt-trainer[data]'"
        raise UsageError(f"{file}: reading Parquet needs pyarrow; {hint}") from error


def _decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK_BYTES))
    if name.endswith(".xz"):
        return cast(BinaryIO, io.BufferedReader(lzma.LZMAFile(raw), _BLOCK_BYTES))
    return raw


def _blocks(path: Path, stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number from 1, byte offset, some whole lines), without byte order mark."""
    line, offset = 1, 0
    while block := stream.read(_BLOCK_BYTES):
        if not block.endswith(b"\n"):
            block += stream.readline(MAX_LINE_BYTES + 1)
        last = block.rfind(b"\n", 0, len(block) - 1) + 1
        if len(block) - last > MAX_LINE_BYTES:
            number = line + block.count(b"\n", 0, last)
            limit = f"{MAX_LINE_BYTES >> 20} MiB"
            raise DataError(
                f"{path}:{number}: byte {offset + last}: a line of more than {limit}; break it up"
            )
        if offset == 0 and block.startswith(_BOM):
            offset, block = len(_BOM), block[len(_BOM) :]
        yield line, offset, block
        line += block.count(b"\n")
        offset += len(block)


def _separators(block: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the separator lines of ``block`` begin and end."""
    at = block.find(SEPARATOR)
    while at >= 0:
        end = block.find(b"\n", at) + 1 or len(block)
        starts_line = at == 0 or block[at - 1 : at] == b"\n"
        if starts_line and block[at:end].rstrip(b"\r\n") == SEPARATOR:
            yield at, end
        at = block.find(SEPARATOR, end)


def _json_text(raw: bytes, offset: int, key: str) -> str:
    """Return the text under ``key`` of one line; raises ValueError with the reason."""
    try:
        record = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {offset + error.start} is not valid UTF-8; mend the line"
        ) from error
    except RecursionError as error:
        raise ValueError("invalid JSON (nested too deeply); mend the line") from error
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise ValueError(f"invalid JSON ({reason}); mend the line") from error
    except ValueError as error:  # a number with thousands of digits
        raise ValueError("invalid JSON (a number is too long); mend the line") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"a JSON object is expected, not {kind}; mend the line")
    if key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "no keys"
        raise ValueError(f"no key {key!r} (the line has {keys}); set text_key")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"the value of {key!r} is {type(text).__name__}, not a string; mend it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ValueError(
            f"{code}, half of a surrogate pair, at character {error.start} of the text; mend it"
        ) from error
    return text

"""From documents to token shards: encode, split off a validation part, note what it was made of.

Every document is followed by the end-of-text id. The ids go to one temporary file first, because
the validation part is chosen with the size of every document known, and are then dealt into two
shards:

    out_dir/train.bin  out_dir/val.bin      see fastgpt.data.shards
    out_dir/meta.json                       counts, bytes of text, tokenizer, options, sources

The same inputs and options find finished shards again instead of encoding anew. A lock on the
directory makes several processes (ranks on one machine, two runs) take turns: the first encodes,
the others find its result.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastgpt.data.documents import Document, Documents
from fastgpt.data.order import mix64
from fastgpt.data.shards import ShardWriter, narrow, token_dtype, writing
from fastgpt.errors import DataError, UsageError

try:
    import fcntl
except ImportError:  # Windows: one process at a time is up to the user
    fcntl = None

_META_VERSION = 1
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4 << 20
_COPY_TOKENS = 8 << 20


class Encoder(Protocol):
    """What is needed of a tokenizer; fastgpt.tokenizer.Tokenizer has it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def eot_id(self) -> int:
        """The end-of-text id."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of the tokenizer, hexadecimal."""
        ...

    def encode_batch(self, texts: list[str], *, num_threads: int = 0) -> list[np.ndarray]:
        """Return the ids of each text, special tokens off."""
        ...

    def bytes_per_id(self) -> np.ndarray:
        """Return the bytes of text each id stands for, 0 for special ones, shape (vocab_size,)."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One side of the split. ``text_bytes`` is UTF-8, what bits per byte are counted over."""

    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """The shards in ``directory`` and what went into them; ``empty`` and ``bad`` were left out."""

    directory: Path
    train: Part
    val: Part
    empty: int
    bad: int
    reused: bool

    @property
    def train_path(self) -> Path:
        """The shard to train on."""
        return self.directory / "train.bin"

    @property
    def val_path(self) -> Path:
        """The shard to evaluate on."""
        return self.directory / "val.bin"


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: Encoder,
    out_dir: Path | str,
    *,
    val_fraction: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizedData:
    """Encode ``documents`` into train and validation shards in ``out_dir``.

    Validation takes whole documents, chosen by a hash of seed and document index, up to
    ``val_fraction`` of all tokens. Where that leaves less than half of the wanted size (few
    documents, or long ones) the rest is cut from the end of the longest document. Both sides are
    never empty.

    ``progress(done, total)`` is called after each batch with bytes of the input files; when
    ``documents`` is not a `Documents` stream, with bytes of text and 0. Only such a stream knows
    its files, so only then finished shards are used again.

    Raises UsageError (val_fraction outside (0, 0.5], out_dir not writable) or DataError (no
    documents, too little text to split, or what reading raises).
    """
    if not 0 < val_fraction <= 0.5:
        raise UsageError(f"val_fraction {val_fraction} is outside (0, 0.5]; 0.01 is usual")
    out_dir = Path(out_dir)
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    inputs = _inputs(documents, tokenizer, val_fraction, seed)
    with _locked(out_dir):
        finished = find_tokenized(out_dir, inputs) if inputs is not None else None
        if finished is not None:
            return finished
        with writing(out_dir):
            (out_dir / "meta.json").unlink(missing_ok=True)
        spool = _Spool(out_dir / "tokens.tmp", tokenizer)
        try:
            _encode(documents, tokenizer, spool, progress)
            train, val = _deal(spool, tokenizer, out_dir, val_fraction, seed)
        finally:
            spool.remove()
        stats = documents.stats if isinstance(documents, Documents) else None
        empty, bad = (stats.empty, stats.bad) if stats else (0, 0)
        data = TokenizedData(out_dir, train, val, empty, bad, reused=False)
        _write_meta(data, inputs)
    return data


def _inputs(documents: object, tokenizer: Encoder, val_fraction: float, seed: int) -> dict | None:
    """Return all that decides the shards, as JSON, or None when it cannot be known."""
    if not isinstance(documents, Documents):
        return None
    return {
        "meta_version": _META_VERSION,
        **documents.fingerprint(),
        "tokenizer_hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "val_fraction": val_fraction,
        "seed": seed,
    }


class _Spool:
    """All ids in one temporary file, with the sizes of the documents in memory (16 bytes each)."""

    def __init__(self, path: Path, tokenizer: Encoder):
        self.path = path
        self.vocab_size = tokenizer.vocab_size
        self.eot = narrow(np.array([tokenizer.eot_id]), tokenizer.vocab_size)
        self.lengths = array("q")  # tokens of each document, end-of-text id included
        self.text_bytes = array("q")
        with writing(path):
            self._file = open(path, "wb")  # noqa: SIM115

    def add(self, document: Document, ids: np.ndarray) -> None:
        if not document.continued or not self.lengths:
            self.end_document()
            self.lengths.append(0)
            self.text_bytes.append(0)
        self.lengths[-1] += len(ids)
        self.text_bytes[-1] += len(document.text.encode())
        with writing(self.path):
            self._file.write(narrow(ids, self.vocab_size).data)

    def end_document(self) -> None:
        if self.lengths:
            self.lengths[-1] += 1
            with writing(self.path):
                self._file.write(self.eot.data)

    def close(self) -> np.ndarray:
        self.end_document()
        with writing(self.path):
            self._file.close()
        if not self.lengths:
            raise DataError("no documents to tokenize; give files with text")
        return np.memmap(self.path, token_dtype(self.vocab_size), "r")

    def remove(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def _encode(
    documents: Iterable[Document],
    tokenizer: Encoder,
    spool: _Spool,
    progress: Callable[[int, int], None] | None,
) -> None:
    text_bytes = 0
    for batch in _batches(documents):
        for document, ids in zip(
            batch, tokenizer.encode_batch([document.text for document in batch]), strict=True
        ):
            spool.add(document, ids)
        if progress and isinstance(documents, Documents):
            progress(documents.bytes_done, documents.bytes_total)
        elif progress:
            text_bytes += sum(len(document.text.encode()) for document in batch)
            progress(text_bytes, 0)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def choose_validation(
    lengths: np.ndarray, val_fraction: float, seed: int
) -> tuple[np.ndarray, int, int]:
    """Choose the validation documents from their ``lengths`` in tokens.

    Returns (sorted indices of whole documents, index of the document to cut, tokens to cut from its
    end); nothing is cut when the last number is 0. A pure function of its arguments. Raises
    DataError when there is too little to split.
    """
    budget = max(2, round(val_fraction * int(lengths.sum())))  # two tokens make a prediction
    order = np.argsort(mix64(mix64(seed) + np.arange(len(lengths), dtype=np.uint64)))
    fitting = order[lengths[order] <= budget]
    chosen = np.sort(fitting[np.cumsum(lengths[fitting]) <= budget])
    missing = budget - int(lengths[chosen].sum())
    rest = lengths.copy()
    rest[chosen] = 0
    longest = int(np.argmax(rest))
    cut = min(missing, int(rest[longest]) - 1) if missing > budget // 2 else 0
    if len(chosen) == len(lengths):
        raise DataError(f"{lengths.sum()} tokens are too few to split; give more text")
    return chosen, longest, cut


def _deal(
    spool: _Spool, tokenizer: Encoder, out_dir: Path, val_fraction: float, seed: int
) -> tuple[Part, Part]:
    tokens = spool.close()
    lengths = np.array(spool.lengths)
    text_bytes = np.array(spool.text_bytes)
    ends = np.cumsum(lengths)
    chosen, cut, cut_tokens = choose_validation(lengths, val_fraction, seed)
    identity = {"vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash}
    with (
        ShardWriter(out_dir / "train.bin", **identity) as train,
        ShardWriter(out_dir / "val.bin", **identity) as val,
    ):
        # Runs of documents between two special ones are copied whole: [begin, special), special.
        special = np.union1d(chosen, [cut]) if cut_tokens else chosen
        begin = 0
        for document in special.tolist():
            _copy(tokens, ends, begin, document, train)
            if cut_tokens and document == cut:
                border = int(ends[document]) - cut_tokens
                head = tokens[border + cut_tokens - lengths[document] : border]
                train.append(np.append(head, spool.eot), [len(head) + 1])
                val.append(tokens[border : ends[document]], [cut_tokens])
            else:
                _copy(tokens, ends, document, document + 1, val)
            begin = document + 1
        _copy(tokens, ends, begin, len(ends), train)
    val_bytes = int(text_bytes[chosen].sum())
    if cut_tokens:
        tail = tokens[ends[cut] - cut_tokens : ends[cut]]
        val_bytes += int(tokenizer.bytes_per_id()[tail].sum())
    whole = len(lengths) - len(chosen)
    return (
        Part(whole, train.tokens, int(text_bytes.sum()) - val_bytes),
        Part(len(chosen) + bool(cut_tokens), val.tokens, val_bytes),
    )


def _copy(tokens: np.ndarray, ends: np.ndarray, begin: int, end: int, to: ShardWriter) -> None:
    """Append the documents [begin, end) to a shard, a bounded number of tokens at a time."""
    start = int(ends[begin - 1]) if begin else 0
    stop = int(ends[end - 1]) if end else 0
    inside = ends[begin:end]
    for place in range(start, stop, _COPY_TOKENS):
        upto = min(place + _COPY_TOKENS, stop)
        first, last = np.searchsorted(inside, [place, upto], side="right")
        to.append(tokens[place:upto], inside[first:last] - place)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with writing(directory):
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def find_tokenized(out_dir: Path, inputs: dict | None = None) -> TokenizedData | None:
    """Return the shards in ``out_dir`` if they are complete, else None.

    ``inputs``: only if they were made from exactly these. A resumed run takes what it finds: its
    order of samples must not depend on what became of the text since.
    """
    try:
        meta: dict[str, Any] = json.loads((out_dir / "meta.json").read_bytes())
        if inputs is not None and meta["inputs"] != inputs:
            return None
        train, val = Part(**meta["train"]), Part(**meta["val"])
        data = TokenizedData(out_dir, train, val, meta["empty"], meta["bad"], reused=True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return data if data.train_path.is_file() and data.val_path.is_file() else None


def _write_meta(data: TokenizedData, inputs: dict | None) -> None:
    meta = {
        "inputs": inputs,
        "train": asdict(data.train),
        "val": asdict(data.val),
        "empty": data.empty,
        "bad": data.bad,
    }
    path = data.directory / "meta.json"
    temporary = path.with_name("meta.json.tmp")
    with writing(path):
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

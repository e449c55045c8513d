"""Files of text -> one shard of token ids, in constant memory.

For training use `fastgpt.data.corpus`, which splits off a validation part and finds finished shards
again; this is the plain conversion, with as many threads as the tokenizer is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgpt.data.corpus import Encoder
from fastgpt.data.documents import Document, read_documents
from fastgpt.data.shards import ShardWriter
from fastgpt.errors import UsageError

_BATCH_DOCUMENTS = 4096
_BATCH_CHARACTERS = 8 << 20


@dataclass(frozen=True, slots=True)
class Encoded:
    """What went into a shard; ``tokens`` counts the end-of-text ids, ``text_bytes`` UTF-8."""

    path: Path
    documents: int
    tokens: int
    text_bytes: int


def encode_file(
    paths: Path | str | Sequence[Path | str],
    tokenizer: Encoder,
    out: Path | str,
    *,
    num_threads: int = 0,
    text_key: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Encode the texts of `fastgpt.data.documents` into the shard ``out`` (`fastgpt.data.shards`).

    Every document is followed by the end-of-text id. Memory is bounded by a batch of some MB of
    text, the longest line, and 8 bytes a document; ``num_threads`` 0 is one per core.
    ``progress(done, total)`` counts bytes of the files. The shard appears whole or not at all.

    Raises UsageError (``out`` not writable, no paths, no end-of-text id) or DataError (what reading
    raises).
    """
    paths = [paths] if isinstance(paths, Path | str) else paths
    documents = read_documents(paths, text_key=text_key)
    try:
        eot = np.array([tokenizer.eot_id])
    except ValueError as error:
        raise UsageError(str(error)) from None
    out = Path(out)
    count = text_bytes = 0
    identity = {"vocab_size": tokenizer.vocab_size, "tokenizer_hash": tokenizer.hash}
    with ShardWriter(out, **identity) as writer:
        for batch in _batches(documents):
            texts = [document.text for document in batch]
            arrays = tokenizer.encode_batch(texts, num_threads=num_threads)
            for document, ids in zip(batch, arrays, strict=True):
                if count and not document.continued:
                    writer.append(eot, [1])
                count += not document.continued
                writer.append(ids)
            text_bytes += sum(len(text.encode()) for text in texts)
            if progress is not None:
                progress(documents.bytes_done, documents.bytes_total)
        writer.append(eot, [1])
    return Encoded(out, count, writer.tokens, text_bytes)


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

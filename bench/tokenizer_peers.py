"""One tokenizer measured in a process of its own, for the table of ``bench_tokenizer.py``.

Needs numpy and the package measured, nothing else. Prints one line of JSON; MB are 10^6 bytes of
UTF-8. ``crc`` is over the ids as uint32: figures of two peers count only if theirs are equal.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CHARACTERS = 4096  # of a document
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERN = {"r50k": "gpt2", "cl100k": "gpt4"}
TRAIN_VOCAB = 32_000
SLOW = 3  # seconds; what takes longer is not repeated as often


class Peer(NamedTuple):
    """``batch`` gives what ``flat`` makes one array of, outside the time measured."""

    batch: Callable[[list[str]], Any]
    flat: Callable[[Any], np.ndarray]
    to_list: Callable[[str], list[int]]
    decode: Callable[[list[int]], Any]


def read_ranks(path: Path) -> dict[bytes, int]:
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def fastgpt(path: Path, vocab: str) -> Peer:
    from fastgpt.tokenizer import Tokenizer

    ours = Tokenizer.from_tiktoken_ranks(read_ranks(path), PATTERN[vocab], {})
    return Peer(
        lambda docs: ours.encode_batch(docs, num_threads=1),
        np.concatenate,
        ours.encode,
        ours.decode,
    )


def tiktoken(path: Path, vocab: str) -> Peer:
    public = import_module("tiktoken_ext.openai_public")
    regex = public.r50k_pat_str if vocab == "r50k" else CL100K
    peer = import_module("tiktoken").Encoding(
        vocab, pat_str=regex, mergeable_ranks=read_ranks(path), special_tokens={}
    )
    return Peer(
        lambda docs: [peer.encode_to_numpy(doc, disallowed_special=()) for doc in docs],
        np.concatenate,
        peer.encode_ordinary,
        peer.decode,
    )


CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


def fastokens(path: Path, vocab: str) -> Peer:
    cls = import_module("fastokens").Tokenizer
    if path.suffix == ".json":  # its fast way for GPT-2: a pattern of its own is a slow regex
        peer = cls.from_file(str(path))
    else:
        peer = cls.from_tiktoken(str(path), encoding="cl100k_base")
    return Peer(
        lambda docs: peer.encode_batch_flat(docs, False),
        lambda found: np.frombuffer(found[0], dtype=np.uint32),
        lambda doc: peer.encode(doc).ids,  # encode() alone gives an object without a list in it
        peer.decode,
    )


def gigatoken(path: Path, vocab: str) -> Peer:
    peer = import_module("gigatoken").Tokenizer.from_tiktoken(str(path))
    return Peer(
        lambda docs: peer.encode_batch(docs, parallel=False),
        lambda found: import_module("awkward").to_numpy(import_module("awkward").flatten(found)),
        lambda doc: peer.encode(doc).tolist(),
        peer.decode,
    )


ENCODERS = {f.__name__: f for f in (fastgpt, tiktoken, fastokens, gigatoken)}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, which other work on the machine does not add to; one thread."""
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def cut(text: str, begin: int) -> list[str]:
    """Documents of the text from a character on."""
    return [text[i : i + CHARACTERS] for i in range(begin, len(text), CHARACTERS)]


def rate(docs: list[str], seconds: float) -> float:
    return round(sum(len(doc.encode()) for doc in docs) / seconds / 1e6, 1)


def encode(peer: Peer, text: str) -> dict[str, Any]:
    """Cold, then warm twice: the same documents, and others made of the same words.

    Some peers remember whole documents. Nobody encodes a document twice, so the figure that counts
    is the one for the text cut into documents elsewhere.
    """
    docs = cut(text, 0)
    cold, ids = timed(lambda: peer.batch(docs))
    flat = np.asarray(peer.flat(ids)).astype(np.uint32)
    del ids
    same = min(timed(lambda: peer.batch(docs))[0] for _ in range(2 if cold < SLOW else 1))
    cuts = (1021, 1999, 3001) if cold < SLOW else (1021,)
    others = [cut(text, begin) for begin in cuts]
    warm = max(rate(other, timed(lambda o=other: peer.batch(o))[0]) for other in others)
    check = peer.to_list(docs[0])
    assert type(check) is list, f"a list loop of {type(check)}"
    assert check == flat[: len(check)].tolist(), "lists and arrays differ"
    lists = max(rate(other, timed(lambda o=other: lists_of(peer, o))[0]) for other in others)
    return {
        "crc": zlib.crc32(flat.tobytes()),
        "cold": rate(docs, cold),
        "warm": warm,
        "warm_same_documents": rate(docs, same),
        "list_loop": lists,
        **small(peer, text, flat[:1_000_000].tolist()),
    }


def lists_of(peer: Peer, docs: list[str]) -> None:
    """A list of ids for each document, one after the other: kept ones would time the collector."""
    for doc in docs:
        peer.to_list(doc)


def small(peer: Peer, text: str, ids: list[int]) -> dict[str, Any]:
    """Decoding, and the time of short texts in microseconds."""
    size = len(peer.decode(ids)) if isinstance(peer.decode(ids), bytes) else 0
    size = size or len(peer.decode(ids).encode())
    decode = min(timed(lambda: peer.decode(ids))[0] for _ in range(3))
    found: dict[str, Any] = {"decode": round(size / decode / 1e6, 1)}
    for length in (12, 100):
        part = text[5000 : 5000 + length]
        runs = [timed(lambda p=part: [peer.to_list(p) for _ in range(500)])[0] for _ in range(20)]
        found[f"us_{length}"] = round(min(runs) / 500 * 1e6, 3)
    return found


def worst(peer: Peer) -> dict[str, float]:
    """Seconds for a megabyte of one thing."""
    found = {}
    for name, part in {
        "letter": "a", "caret": "^", "spaces": " ", "newlines": "\n", "digits": "7",
        "CJK": "\u4e2d", "marks": "\u0301",
    }.items():  # fmt: skip
        text = part * (1_000_000 // len(part.encode())) + ("x" if part == " " else "")
        found[name] = round(timed(lambda t=text: peer.to_list(t))[0], 4)
    return found


def train(name: str, path: Path, megabytes: float) -> dict[str, Any]:
    """Seconds and the most memory while training on the file; one thread."""

    def blocks() -> Iterator[str]:
        left = int(megabytes * 1e6)
        with path.open(encoding="utf-8", errors="ignore") as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                left -= len(block)
                yield block

    seconds, _ = timed(lambda: TRAINERS[name](blocks()))
    return {"seconds": round(seconds, 2), "peak_mb": peak_mb()}


def train_fastgpt(blocks: Iterator[str]) -> None:
    module = import_module("fastgpt.tokenizer")
    module.Tokenizer.train(blocks, TRAIN_VOCAB, pattern="gpt2", num_threads=1)


def train_rustbpe(blocks: Iterator[str]) -> None:
    import_module("rustbpe").Tokenizer().train_from_iterator(blocks, TRAIN_VOCAB, pattern=GPT2)


def train_gigabpe(blocks: Iterator[str]) -> None:
    part = Path(os.environ["TMPDIR"]) / "text"  # it reads files; the copy costs it 0.1 s
    with part.open("w", encoding="utf-8") as file:
        file.writelines(blocks)
    import_module("gigabpe").train_bpe([str(part)], TRAIN_VOCAB, threads=1)


TRAINERS = {"fastgpt": train_fastgpt, "rustbpe": train_rustbpe, "gigabpe": train_gigabpe}


def peak_mb() -> int:
    """Of this program; getrusage would count what its parent had before."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    return round(int(kilobytes) * 1024 / 1e6)


def main(name: str, task: str, vocab: str, ranks: str, text: str, megabytes: str) -> None:
    if task == "train":
        found = train(name, Path(text), float(megabytes))
    else:
        peer = ENCODERS[name](Path(ranks), vocab)
        if task == "worst":
            found: dict[str, Any] = worst(peer)
        else:
            data = Path(text).read_bytes()[: int(float(megabytes) * 1e6)]
            found = encode(peer, data.decode("utf-8", "ignore"))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Files of vocabularies: which format one has, reading and writing.

    tokenizer.json              Hugging Face; a sentencepiece model leaves a pointer to itself there
    *.tiktoken                  lines of base64(token) rank; Llama 3 calls it tokenizer.model
    vocab.json + merges.txt     GPT-2's own files, side by side
    *.model                     sentencepiece (protocol buffers)

The format is seen from the content, not from the name. Every complaint is a VocabularyError, which
is a ValueError, and names the file and the place. Memory is bounded by the size of the file:
numbers in it are checked before anything is allocated for them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt.bpe import hf_json
from fastgpt.bpe.byte_pair import core
from fastgpt.bpe.hf_json import MAX_ID, Vocabulary, VocabularyError
from fastgpt.errors import UsageError

# The published files by their sha256: the pattern and the special tokens, which are not in them.
_OPENAI: dict[str, tuple[str, dict[str, int]]] = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": (
        "gpt2",  # r50k_base
        {"<|endoftext|>": 50256},
    ),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": (
        "gpt2",  # p50k_base
        {"<|endoftext|>": 50256},
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": (
        "gpt4",  # cl100k_base
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": (
        "o200k",  # o200k_base
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}
# Ranks become merges in time with the square of this; the longest of o200k_base has 128 bytes.
_MAX_TOKEN_BYTES = 1024
_IN_A_DIRECTORY = ("tokenizer.json", "vocab.json", "tokenizer.model")


def load(
    path: Path, pattern: str | None = None, special_tokens: Mapping[str, int] | None = None
) -> tuple[Vocabulary | bytes, Path]:
    """The vocabulary, or the serialised sentencepiece model, and the file it was in.

    ``pattern`` and ``special_tokens`` are for formats that do not say them.
    """
    if path.is_dir():
        path = _in_directory(path)
    data = read(path)
    head = data.lstrip(b" \t\r\n")[:1]
    if head in (b"{", b"[") or path.suffix == ".json":
        document = hf_json.parse(data, str(path))
        if isinstance(document, dict) and document.get("type") == "sentencepiece":
            name = document.get("model_file")
            if not isinstance(name, str) or Path(name).name != name:
                raise VocabularyError(f"{path}: model_file: not the name of a file beside this one")
            return read(path.with_name(name)), path.with_name(name)
        if isinstance(document, dict) and _is_vocab(document):
            return _load_gpt2(path, document, pattern, special_tokens), path
        return hf_json.loads(document, str(path), pattern), path
    if data.startswith(b"#version") or path.name == "merges.txt":
        vocab = path.with_name("vocab.json")
        document = hf_json.parse(read(vocab), str(vocab))
        return _load_gpt2(vocab, document, pattern, special_tokens, path), vocab
    if _is_tiktoken(data) or path.suffix == ".tiktoken":
        return _load_tiktoken(path, data, pattern, special_tokens), path
    return data, path


def save(vocabulary: Vocabulary, path: Path) -> None:
    """Write the format that the name of ``path`` asks for, see `Tokenizer.save`."""
    if path.suffix == ".tiktoken":
        write(path, tiktoken_lines(vocabulary))
    elif path.name in ("vocab.json", "merges.txt"):
        vocab, merges = _gpt2_files(vocabulary)
        write(path.with_name("vocab.json"), vocab)
        write(path.with_name("merges.txt"), merges)
    else:
        write(path, hf_json.dumps(vocabulary).encode())


def _in_directory(path: Path) -> Path:
    candidates = [path / name for name in _IN_A_DIRECTORY]
    candidates += sorted([*path.glob("*.tiktoken"), *path.glob("*.model")])
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise VocabularyError(f"{path}: no tokenizer in this directory; name the file")
    return found


def _is_vocab(document: Mapping[str, Any]) -> bool:
    # A token may well be called "model", as the part of a tokenizer.json is.
    first = next(iter(document.values()), None)
    return isinstance(first, int) and not isinstance(document.get("model"), dict)


def _is_tiktoken(data: bytes) -> bool:
    words = data[: 1 << 16].split(b"\n", 1)[0].split()
    return len(words) == 2 and words[1].isdigit()


def _specials_of(
    path: Path, special_tokens: Mapping[str, int], tokens: Mapping[int, Any]
) -> dict[str, int]:
    for name, number in special_tokens.items():
        if not 0 <= number <= MAX_ID or number in tokens:
            raise VocabularyError(
                f"{path}: special token {name!r}: its id {number} is taken or too large"
            )
    return dict(special_tokens)


def vocabulary_of_ranks(
    ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]
) -> Vocabulary:
    """The vocabulary with the ids of tiktoken for the same ranks and pattern.

    Raises ValueError for a rank that cannot be an id, and for a token over 1,024 bytes.
    """
    for token, rank in ranks.items():
        if not 0 <= rank <= MAX_ID or not token:
            raise ValueError(f"token {token!r}: rank {rank} is not between 0 and {MAX_ID}")
        if len(token) > _MAX_TOKEN_BYTES:
            raise ValueError(f"the token of rank {rank} is longer than {_MAX_TOKEN_BYTES} bytes")
    tokens: list[bytes | None] = [None] * (max(ranks.values(), default=-1) + 1)
    for token, rank in ranks.items():
        if tokens[rank] is not None:
            raise ValueError(f"tokens {tokens[rank]!r} and {token!r} have the same rank {rank}")
        tokens[rank] = token
    merges, has_unreachable = core().rank_merges(tokens)
    return Vocabulary(pattern, tuple(tokens), tuple(merges), dict(special_tokens), has_unreachable)


def _load_tiktoken(
    path: Path, data: bytes, pattern: str | None, special_tokens: Mapping[str, int] | None
) -> Vocabulary:
    known = _OPENAI.get(hashlib.sha256(data).hexdigest())
    if pattern is None:
        if known is None:
            raise VocabularyError(
                f"{path}: a .tiktoken file does not say how text is split; give the pattern"
            )
        pattern = known[0]
    if special_tokens is None:
        special_tokens = known[1] if known else {}
    ranks: dict[bytes, int] = {}
    taken: dict[int, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        words = line.split()
        place = f"{path}: line {number}"
        if len(words) != 2 or not words[1].isdigit() or len(words[1]) > 7:
            raise VocabularyError(f"{place}: expected base64 of a token and its rank")
        try:
            token = base64.b64decode(words[0], validate=True)
        except binascii.Error as error:
            raise VocabularyError(f"{place}: not base64 ({error})") from None
        rank = int(words[1])
        if rank > MAX_ID:
            raise VocabularyError(f"{place}: rank {rank} is not between 0 and {MAX_ID}")
        if rank in taken:
            raise VocabularyError(f"{place}: rank {rank} also stands in line {taken[rank]}")
        if not token or token in ranks:
            raise VocabularyError(f"{place}: an empty token, or one that is listed twice")
        if len(token) > _MAX_TOKEN_BYTES:
            raise VocabularyError(f"{place}: a token longer than {_MAX_TOKEN_BYTES} bytes")
        ranks[token] = rank
        taken[rank] = number
    return vocabulary_of_ranks(ranks, pattern, _specials_of(path, special_tokens, taken))


def tiktoken_lines(vocabulary: Vocabulary) -> bytes:
    """The ``.tiktoken`` file; special tokens and pattern have no place in it.

    Raises ValueError where ids by rank would be others than the vocabulary's.
    """
    ranks = {token: i for i, token in enumerate(vocabulary.tokens) if token}
    again = vocabulary_of_ranks(ranks, vocabulary.pattern, {})
    if again.merges != vocabulary.merges or again.whole_pieces > vocabulary.whole_pieces:
        raise ValueError(
            "this vocabulary merges in another order than that of its ids, which a .tiktoken file "
            "cannot say; save it as tokenizer.json"
        )
    return b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())


def _load_gpt2(
    path: Path,
    vocab: Any,
    pattern: str | None,
    special_tokens: Mapping[str, int] | None,
    merges: Path | None = None,
) -> Vocabulary:
    merges = merges or path.with_name("merges.txt")
    try:
        lines = read(merges).decode("utf-8").replace("\r\n", "\n").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{merges}: byte {error.start}: not UTF-8") from None
    if not lines[0].startswith("#version"):
        raise VocabularyError(f"{merges}: line 1: expected #version and then the merges")
    specials = None if special_tokens is None else dict(special_tokens)
    return hf_json.loads_gpt2(vocab, str(path), lines[1:], str(merges), pattern or "gpt2", specials)


def _gpt2_files(vocabulary: Vocabulary) -> tuple[bytes, bytes]:
    names = [None if token is None else hf_json.token_name(token) for token in vocabulary.tokens]
    made = {i for _, _, i in vocabulary.merges}
    if any(token and len(token) > 1 and i not in made for i, token in enumerate(vocabulary.tokens)):
        raise ValueError(
            "this vocabulary has tokens that no merge makes, which vocab.json and merges.txt "
            "cannot say; save it as tokenizer.json"
        )
    ids = {name: i for i, name in enumerate(names) if name is not None} | vocabulary.specials
    vocab = json.dumps(dict(sorted(ids.items(), key=lambda item: item[1])), ensure_ascii=False)
    lines = [f"{names[left]} {names[right]}\n" for left, right, _ in vocabulary.merges]
    return vocab.encode(), "".join(["#version: 0.2\n", *lines]).encode()


def read(path: Path) -> bytes:
    """The file's bytes; raises VocabularyError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise VocabularyError(f"{path}: cannot read the tokenizer ({error.strerror})") from None


def write(path: Path, data: bytes) -> None:
    """Write the file whole or not at all; raises UsageError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot write the tokenizer ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)

"""``python -m fastgpt.tokenizer train | encode | decode | inspect | bench``."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastgpt.cli import command
from fastgpt.errors import DataError, FastGPTError, UsageError

if TYPE_CHECKING:
    from fastgpt.tokenizer import Tokenizer

Files = tyro.conf.Positional[tuple[Path, ...]]
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Train:
    """Train a byte-level BPE vocabulary on text files and write it."""

    files: Files
    """.txt, .jsonl (also .gz and .xz), .parquet, or directories of them."""
    out: Path = Path("tokenizer.json")
    """Where to; a name that ends in .tiktoken, or is vocab.json, chooses that format."""
    vocab_size: int = 32_000
    """Ids in all: 256 bytes, merges and special tokens."""
    pattern: str = "gpt4"
    """gpt2, gpt4, llama3, o200k, or a regular expression (needs the package regex)."""
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    reserved_special_tokens: int = 0
    """So many more ids for later use."""
    min_frequency: int = 1
    """Pairs seen less often are not merged."""
    max_token_length: int | None = None
    """Bytes; longer tokens are not made."""
    initial_alphabet: str = ""
    """Characters that get tokens before anything is counted."""
    text_key: str = "text"
    """Key or column of the text in .jsonl and .parquet."""
    threads: int = 0
    """0 is one per core. The result does not depend on it."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        """Train, save and say what came out."""
        from fastgpt.data.documents import read_documents
        from fastgpt.progress import ReadThenWork
        from fastgpt.tokenizer import Tokenizer

        if not self.out.parent.is_dir():
            raise UsageError(f"--out {self.out}: the directory {self.out.parent} does not exist")
        documents = read_documents(self.files, text_key=self.text_key)
        texts = (document.text for document in documents)
        with ReadThenWork("read", documents.bytes_total, "merge") as bars:
            tokenizer = Tokenizer.train(
                bars.reading(texts, lambda: documents.bytes_done),
                self.vocab_size,
                pattern=self.pattern,
                special_tokens=self.special_tokens,
                reserved_special_tokens=self.reserved_special_tokens,
                min_frequency=self.min_frequency,
                max_token_length=self.max_token_length,
                initial_alphabet=self.initial_alphabet,
                num_threads=self.threads,
                progress=bars.update,
            )
        tokenizer.save(self.out)
        print(f"{self.out}: {tokenizer.vocab_size} ids, hash {tokenizer.hash[:12]}")


@dataclass(frozen=True)
class Encode:
    """Encode text files into a token shard, or standard input into ids on standard output."""

    tokenizer: Path
    """tokenizer.json, .tiktoken, vocab.json, .model, or a directory with one."""
    files: Files = ()
    out: Path | None = None
    """The shard to write (.bin)."""
    allow_special: bool = False
    """Standard input only: names of special tokens in the text become these tokens."""
    pattern: str | None = None
    """For a .tiktoken file or a vocab.json."""
    text_key: str = "text"
    """Key or column of the text in .jsonl and .parquet."""
    threads: int = 0
    """0 is one per core."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        """Encode and write."""
        tokenizer = _load(self.tokenizer, self.pattern)
        if not self.files:
            if self.out is not None:
                raise UsageError("--out: name the files to encode; standard input gives ids")
            allowed = "all" if self.allow_special else frozenset()
            ids = tokenizer.encode(_standard_input(), allowed_special=allowed)
            for begin in range(0, len(ids), 32):
                print(*ids[begin : begin + 32])
            return
        if self.out is None:
            raise UsageError("--out is missing: the shard to write, for instance --out train.bin")
        from fastgpt.data.encode_files import encode_file
        from fastgpt.progress import task

        with task("encode", 1) as bar:
            done = encode_file(
                self.files,
                tokenizer,
                self.out,
                num_threads=self.threads,
                text_key=self.text_key,
                progress=lambda done, total: bar.update(done / max(total, 1)),
            )
        ratio = done.text_bytes / max(done.tokens, 1)
        print(
            f"{done.path}: {done.tokens} tokens in {done.documents} documents, {ratio:.2f} B/token"
        )


@dataclass(frozen=True)
class Decode:
    """Decode a token shard, or ids on standard input, to standard output."""

    tokenizer: Path
    """tokenizer.json, .tiktoken, vocab.json, .model, or a directory with one."""
    shard: Path | None = None
    """A .bin file; default: ids between blanks on standard input."""
    pattern: str | None = None
    """For a .tiktoken file or a vocab.json."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        """Decode a part at a time; a character across two parts stays whole."""
        tokenizer = _load(self.tokenizer, self.pattern)
        stream = tokenizer.stream_decoder()
        for ids in _ids_of(self.shard, tokenizer):
            sys.stdout.write(stream.push(*ids))
        sys.stdout.write(stream.finish())


@dataclass(frozen=True)
class Inspect:
    """Show a vocabulary: sizes, special tokens, longest tokens, bytes per token of text files."""

    tokenizer: Path
    """tokenizer.json, .tiktoken, vocab.json, .model, or a directory with one."""
    files: Files = ()
    """Texts to measure the compression on, one line each; a directory is one."""
    longest: int = 10
    """How many of the longest tokens to show."""
    pattern: str | None = None
    """For a .tiktoken file or a vocab.json."""
    text_key: str = "text"
    """Key or column of the text in .jsonl and .parquet."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        """Print the tables."""
        import numpy as np

        tokenizer = _load(self.tokenizer, self.pattern)
        lengths = tokenizer.bytes_per_id()
        pattern = getattr(tokenizer, "vocabulary", None)
        print(f"{self.tokenizer}: {tokenizer.vocab_size} ids, hash {tokenizer.hash[:12]}")
        print(f"split pattern: {pattern.pattern if pattern else 'sentencepiece'}")
        print(f"bytes of a token: mean {lengths[lengths > 0].mean():.2f}, longest {lengths.max()}")
        specials = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
        shown = ", ".join(f"{name} {number}" for name, number in specials[:16])
        print(f"special tokens: {len(specials)}{': ' if shown else ''}{shown}")
        print(f"\n{'id':>8}  {'bytes':>5}  longest tokens")
        for token_id in np.argsort(-lengths, kind="stable")[: self.longest].tolist():
            text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
            print(f"{token_id:>8}  {lengths[token_id]:>5}  {text!r}")
        if self.files:
            print(f"\n{'bytes':>12}  {'tokens':>12}  {'B/token':>7}  {'used ids':>8}  text")
        for path in self.files:
            self._compression(tokenizer, path)

    def _compression(self, tokenizer: Tokenizer, path: Path) -> None:
        import numpy as np

        size = tokens = 0
        used = np.zeros(tokenizer.vocab_size, dtype=bool)
        for texts in _text_batches([path], self.text_key):
            size += sum(len(text.encode()) for text in texts)
            for ids in tokenizer.encode_batch(texts):
                tokens += len(ids)
                used[ids] = True
        share = used.mean()
        print(f"{size:>12}  {tokens:>12}  {size / max(tokens, 1):>7.3f}  {share:>8.1%}  {path}")


@dataclass(frozen=True)
class Bench:
    """Time this tokenizer against tiktoken and tokenizers, where installed, on text files.

    One thread each; a peer must give the same ids before it is timed.
    """

    tokenizer: Path
    """A byte-level vocabulary: tokenizer.json, .tiktoken or vocab.json."""
    files: Files
    megabytes: float = 4.0
    """How much of the text to use."""
    pattern: str | None = None
    """For a .tiktoken file or a vocab.json."""
    text_key: str = "text"
    """Key or column of the text in .jsonl and .parquet."""
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        """Print MB/s of text, best of three passes over pieces of 4 KB."""
        tokenizer = _load(self.tokenizer, self.pattern)
        if not hasattr(tokenizer, "vocabulary"):
            raise UsageError(f"{self.tokenizer}: a sentencepiece model has no peers to compare")
        texts: list[str] = []
        left = self.megabytes * 1e6
        for batch in _text_batches(self.files, self.text_key):
            pieces = [text[i : i + 4096] for text in batch for i in range(0, len(text), 4096)]
            for piece in pieces:
                if left > 0:
                    texts.append(piece)
                    left -= len(piece.encode())
            if left <= 0:
                break
        size = sum(len(text.encode()) for text in texts)
        expected = [tokenizer.encode(text) for text in texts]
        print(f"{size / 1e6:.2f} MB in {len(texts)} texts   encode MB/s   decode MB/s")
        for name, make in _PEERS.items():
            try:
                encode, decode = make(tokenizer)
            except ImportError:
                print(f"{name:>12}  not installed")
                continue
            if [encode(text) for text in texts] != expected:
                print(f"{name:>12}  gives other ids")
                continue
            fast = [_seconds(encode, texts), _seconds(decode, expected)]
            print(f"{name:>12}  " + "  ".join(f"{size / 1e6 / s:>12.1f}" for s in fast))


Coder = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


def _ours(tokenizer: Tokenizer) -> Coder:
    return tokenizer.encode, tokenizer.decode


def _tiktoken(tokenizer: Tokenizer) -> Coder:
    from fastgpt.bpe.hf_json import SPLIT_REGEX

    tiktoken = importlib.import_module("tiktoken")
    vocabulary = tokenizer.vocabulary
    ranks = {token: i for i, token in enumerate(vocabulary.tokens) if token}
    encoding = tiktoken.Encoding(
        "peer",
        pat_str=SPLIT_REGEX.get(vocabulary.pattern, vocabulary.pattern),
        mergeable_ranks=ranks,
        special_tokens=vocabulary.specials,
    )
    return encoding.encode_ordinary, encoding.decode


def _tokenizers(tokenizer: Tokenizer) -> Coder:
    from fastgpt.bpe.hf_json import dumps

    peer: Any = importlib.import_module("tokenizers").Tokenizer.from_str(
        dumps(tokenizer.vocabulary)
    )
    peer.encode_special_tokens = True  # text stays text, as with us
    return lambda text: peer.encode(text).ids, peer.decode


_PEERS: dict[str, Callable[[Tokenizer], Coder]] = {
    "fastgpt": _ours,
    "tiktoken": _tiktoken,
    "tokenizers": _tokenizers,
}


def _seconds(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        for item in items:
            work(item)
        best = min(best, time.perf_counter() - begin)
    return best


def _load(path: Path, pattern: str | None) -> Tokenizer:
    from fastgpt.tokenizer import Tokenizer

    return Tokenizer.from_file(path, pattern=pattern)


def _text_batches(files: Sequence[Path], text_key: str) -> Iterator[list[str]]:
    from fastgpt.data.documents import read_documents

    texts = (document.text for document in read_documents(files, text_key=text_key))
    while batch := list(islice(texts, 1024)):
        yield batch


def _ids_of(shard: Path | None, tokenizer: Tokenizer) -> Iterator[list[int]]:
    if shard is not None:
        from fastgpt.data.shards import open_shard

        tokens = open_shard(
            shard, vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash
        ).tokens
        for begin in range(0, len(tokens), 1 << 16):
            yield tokens[begin : begin + (1 << 16)].tolist()
        return
    for number, line in enumerate(sys.stdin, 1):
        try:
            yield [int(word) for word in line.split()]
        except ValueError as error:
            raise DataError(f"standard input: line {number}: {error}") from None


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: byte {error.start}: not UTF-8") from None


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Encode, tyro.conf.subcommand("encode")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    chosen = tyro.cli(
        Command,
        args=argv,
        prog="python -m fastgpt.tokenizer",
        description="Train, use and examine tokenizers.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    try:
        chosen.run()
    except FastGPTError:  # some are ValueErrors too
        raise
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error


run = command(main)

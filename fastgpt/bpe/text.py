"""What tokenizers do to text around the core: special tokens, files in blocks, offsets, threads."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastgpt.errors import DataError

A = TypeVar("A")
B = TypeVar("B")

BLOCK_BYTES = 1 << 20  # read at a time; as a str with one emoji they take four times as much
_MAX_BLOCKS_UNCUT = 4  # a text without a place to cut is cut anyhow once it is so many blocks long


def surrogate_error(error: UnicodeEncodeError, where: str = "the text") -> ValueError:
    """The error for a str that has no UTF-8 form, with the place of the character."""
    code = ord(error.object[error.start])
    return ValueError(
        f"lone surrogate U+{code:04X} at character {error.start} of {where}; "
        'clean it with text.encode("utf-8", "replace").decode()'
    )


def specials_regex(names: Collection[str]) -> re.Pattern[str]:
    """Finds the leftmost of ``names`` (at least one), of those that start together the longest."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)))


def split_specials(text: str, specials: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """Ordinary text and the id of the special token behind it, None at the end."""
    begin = 0
    if specials:
        for found in specials_regex(specials).finditer(text):
            yield text[begin : found.start()], specials[found.group()]
            begin = found.end()
    yield text[begin:], None


def character_ends(text: str) -> np.ndarray:
    """int64 (len(text) + 1,): how many bytes of UTF-8 the first i characters have."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    ends = np.zeros(len(codes) + 1, dtype=np.int64)
    sizes = 1 + (codes > 0x7F).astype(np.int8) + (codes > 0x7FF) + (codes > 0xFFFF)
    np.cumsum(sizes, out=ends[1:])
    return ends


def map_threads(work: Callable[[A], B], items: Sequence[A], num_threads: int) -> list[B]:
    """``[work(item) for item in items]`` on threads that live no longer (0: one per core)."""
    threads = min(num_threads or os.cpu_count() or 1, len(items))
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def read_blocks(
    path: str | os.PathLike[str], block_bytes: int | None = None
) -> Iterator[tuple[str, int]]:
    """A UTF-8 file as texts of about ``block_bytes``, each with the number of bytes read so far.

    A block ends between a letter and a blank or newline: every split pattern with a scanner cuts
    there, so the words of the blocks are those of the whole file. Raises DataError naming the file
    and the byte.
    """
    path = Path(path)
    block_bytes = block_bytes or BLOCK_BYTES
    decode = codecs.getincrementaldecoder("utf-8")().decode
    rest, done = "", 0
    try:
        with open(path, "rb") as file:
            while data := file.read(block_bytes):
                try:
                    rest += decode(data)
                except UnicodeDecodeError as error:
                    # Bytes kept back from the block before stand at the front of error.object.
                    place = done + len(data) - len(error.object) + error.start
                    raise DataError(f"{path}: byte {place}: not UTF-8") from None
                done += len(data)
                cut = last_cut(rest)
                if cut == 0 and len(rest) >= _MAX_BLOCKS_UNCUT * block_bytes:
                    cut = len(rest)
                if cut:
                    yield rest[:cut], done
                    rest = rest[cut:]
        try:
            rest += decode(b"", True)
        except UnicodeDecodeError as error:
            place = done - len(error.object) + error.start
            raise DataError(f"{path}: byte {place}: the file ends inside a character") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read the text ({error.strerror})") from None
    if rest:
        yield rest, done


def last_cut(text: str, end: int | None = None) -> int:
    """The last place before ``end`` between a letter and a blank or newline, 0 if there is none."""
    at = len(text) if end is None else end
    while (at := max(text.rfind("\n", 0, at), text.rfind(" ", 0, at))) > 0:
        if text[at - 1].isalpha():
            return at
    return 0

"""How the end of a text may come out once more text follows: tiktoken's ``encode_with_unstable``.

The ids of a text are not always a beginning of the ids of a longer one: its last word may merge
with what follows. The ids in front of that word are stable; here are the ways in which the rest can
go on, found by tiktoken's method with its approximations, so that the sets are the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence

_CONTROLS = "\x1c\x1d\x1e\x1f"  # white space to Python, not to Unicode


class Unstable:
    """Completions for one vocabulary."""

    def __init__(self, ranks: Mapping[bytes, int], encode: Callable[[str], Sequence[int]]) -> None:
        """Token -> id, which is its rank among merges; ids of a text without special tokens."""
        self._ranks, self._encode = ranks, encode
        self._tokens = sorted(ranks)
        self._sizes = {token_id: len(token) for token, token_id in ranks.items()}
        self._blank = {i for token, i in ranks.items() if not token.strip(b" \n\t")}

    def rest(self, ids: Sequence[int], last: int) -> int:
        """How many of ``ids`` are unstable when the last piece of the text has ``last`` of them.

        Blanks behind one another may all be split anew.
        """
        if last and ids[-last] in self._blank:
            while last < len(ids) and ids[-last - 1] in self._blank:
                last += 1
        return last

    def completions(self, rest: bytes) -> set[tuple[int, ...]]:
        """Ids that cover the unstable bytes and may begin what becomes of them."""
        found: set[tuple[int, ...]] = {
            (self._ranks[token],) for token in self._beginning_with(rest)
        }
        for begin in range(1, len(rest)):
            # A token that reaches from inside of the rest to beyond its end.
            for token in self._beginning_with(rest[begin:]):
                found.add(self._covering(len(rest), rest[:begin] + token))
        before, last = _split_last_character(rest)
        if before and last.isspace() and last not in _CONTROLS:
            # White space in front of a word is split from the white space before it.
            found.add((*self._merged(before), *self._merged(last.encode())))
        return found

    def _beginning_with(self, data: bytes) -> Iterator[bytes]:
        for i in range(bisect_left(self._tokens, data), len(self._tokens)):
            if not self._tokens[i].startswith(data):
                return
            yield self._tokens[i]

    def _covering(self, size: int, data: bytes) -> tuple[int, ...]:
        # As many ids of the data as it takes for ``size`` bytes.
        try:
            ids = self._encode(data.decode())
        except UnicodeDecodeError:
            ids = self._merged(data)
        count = 0
        while size > 0:
            size -= self._sizes[ids[count]]
            count += 1
        return tuple(ids[:count])

    def _merged(self, data: bytes) -> list[int]:
        # Ids of the bytes as one piece, wherever a pattern would split them.
        parts = [data[i : i + 1] for i in range(len(data))]
        while True:
            pairs = [
                (rank, i)
                for i in range(len(parts) - 1)
                if (rank := self._ranks.get(parts[i] + parts[i + 1])) is not None
            ]
            if not pairs:
                return [self._ranks[part] for part in parts]
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _split_last_character(data: bytes) -> tuple[bytes, str]:
    """The bytes in front of the last character, and it; "" where they end in none."""
    for size in range(1, min(4, len(data)) + 1):
        try:
            return data[:-size], data[-size:].decode()
        except UnicodeDecodeError:
            continue
    return data, ""

"""``tiktoken.Encoding`` over our core: the same methods, arguments, ids and errors.

    from fastgpt.tiktoken_encoding import Encoding
    enc = Encoding.of(Tokenizer.from_file("cl100k_base.tiktoken"), "cl100k_base")

Written after the interface of tiktoken 0.14. Faster, and no text makes it panic or overflow a
stack.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from functools import cached_property, partial
from typing import Literal

import numpy as np

from fastgpt.bpe.hf_json import SPLIT_REGEX
from fastgpt.bpe.text import map_threads, split_specials
from fastgpt.bpe.unstable import Unstable
from fastgpt.tokenizer import END_OF_TEXT, Tokenizer, check_disallowed

_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
# How tiktoken's openai_public spells the patterns that we have scanners for.
_KNOWN_PATTERNS = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s": "gpt4",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama3",
    f"{_WORD}*{_SMALL}+{_ENDING}{_WORD}+{_SMALL}*{_ENDING}"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "o200k",
}

AllowedSpecial = Set[str] | Literal["all"]
DisallowedSpecial = Collection[str] | Literal["all"]


class Encoding:
    """Immutable, picklable, safe to share between threads.

    ``encode`` raises ValueError for text that spells a special token, unless ``allowed_special``
    or ``disallowed_special`` say otherwise. A lone surrogate becomes U+FFFD.
    """

    def __init__(
        self,
        name: str,
        *,
        pat_str: str,
        mergeable_ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        explicit_n_vocab: int | None = None,
    ) -> None:
        """As tiktoken's; ``pat_str`` may also be the name of a scanner.

        Raises ValueError for an inconsistent vocabulary. What a regular expression does not match
        stays in the text here; tiktoken drops it.
        """
        pattern = _KNOWN_PATTERNS.get(pat_str, pat_str)
        tokenizer = Tokenizer.from_tiktoken_ranks(mergeable_ranks, pattern, special_tokens)
        self._set(tokenizer, name)
        if explicit_n_vocab is not None:
            ids = len(mergeable_ranks) + len(special_tokens)
            if (ids, self.max_token_value) != (explicit_n_vocab, explicit_n_vocab - 1):
                raise ValueError(
                    f"explicit_n_vocab {explicit_n_vocab}, but {ids} tokens up to id "
                    f"{self.max_token_value}"
                )

    @classmethod
    def of(cls, tokenizer: Tokenizer, name: str = "fastgpt") -> Encoding:
        """The encoding of a byte-level tokenizer."""
        encoding = cls.__new__(cls)
        encoding._set(tokenizer, name)
        return encoding

    def _set(self, tokenizer: Tokenizer, name: str) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._pat_str = SPLIT_REGEX.get(tokenizer.vocabulary.pattern, tokenizer.vocabulary.pattern)
        self._special_tokens = tokenizer.special_tokens
        self.max_token_value = tokenizer.vocab_size - 1
        self._ids = {
            token: i for i, token in enumerate(tokenizer.vocabulary.tokens) if token is not None
        }
        self._ids.update((text.encode(), i) for text, i in self._special_tokens.items())

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of the text, in which special tokens are ordinary text."""
        return self._tokenizer.encode(_clean(text))

    def encode(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> list[int]:
        """Ids of the text; raises ValueError for a disallowed special token in it."""
        allowed = self._policy(text, allowed_special, disallowed_special)
        return self._tokenizer.encode(_clean(text), allowed_special=allowed)

    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> np.ndarray:
        """As ``encode``, as a uint32 array."""
        allowed = self._policy(text, allowed_special, disallowed_special)
        ids = self._tokenizer.encode_to_numpy(_clean(text), allowed_special=allowed)
        return ids.astype(np.uint32, copy=False)

    def _policy(
        self, text: str, allowed: AllowedSpecial, disallowed: DisallowedSpecial
    ) -> frozenset[str]:
        names = self._special_tokens.keys()
        allowed = names if allowed == "all" else allowed
        if disallowed == "all":
            disallowed = names - set(allowed)
        if disallowed:
            check_disallowed(text, disallowed)
        return frozenset(names & set(allowed))

    def encode_ordinary_batch(
        self, text: Sequence[str], *, num_threads: int = 8
    ) -> list[list[int]]:
        """``encode_ordinary`` of each text."""
        arrays = self._tokenizer.encode_batch([*map(_clean, text)], num_threads=num_threads)
        return [array.tolist() for array in arrays]

    def encode_batch(
        self,
        text: Sequence[str],
        *,
        num_threads: int = 8,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> list[list[int]]:
        """``encode`` of each text."""
        encode = partial(
            self.encode, allowed_special=allowed_special, disallowed_special=disallowed_special
        )
        return map_threads(encode, text, num_threads)

    def encode_with_unstable(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> tuple[list[int], list[list[int]]]:
        """Ids that stay as they are whatever follows the text, and ways in which the rest goes on.

        Each way covers the bytes behind the stable ids, perhaps with more behind them; they are
        sorted. Useful to complete a prompt that ends within a word. Raises as ``encode``.
        """
        allowed = self._policy(text, allowed_special, disallowed_special)
        text = _clean(text)
        ids = self._tokenizer.encode(text, allowed_special=allowed)
        specials = {name: self._special_tokens[name] for name in allowed}
        *_, (tail, _) = split_specials(text, specials)
        if not tail:
            return ids, []
        begin = self._tokenizer.last_piece(tail)
        size, last = len(tail.encode()) - begin, 0
        while size > 0:
            last += 1
            size -= len(self._tokenizer.token_bytes(ids[-last]))
        stable = len(ids) - self._unstable.rest(ids, last)
        rest = self.decode_bytes(ids[stable:])
        return ids[:stable], sorted(map(list, self._unstable.completions(rest)))

    @cached_property
    def _unstable(self) -> Unstable:
        tokens = self._tokenizer.vocabulary.tokens
        ranks = {token: i for i, token in enumerate(tokens) if token}
        return Unstable(ranks, self._tokenizer.encode)

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """The id of one token, special ones too; raises KeyError if it is none."""
        if isinstance(text_or_bytes, str):
            text_or_bytes = text_or_bytes.encode()
        return self._ids[text_or_bytes]

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """Text of the ids; raises KeyError for one without a token."""
        return self.decode_bytes(tokens).decode("utf-8", errors=errors)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Bytes of the ids; raises KeyError for one without a token."""
        try:
            return self._tokenizer.decode_bytes(tokens)
        except ValueError as error:
            raise KeyError(str(error)) from None

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Bytes of one id; raises KeyError if it has no token."""
        try:
            return self._tokenizer.token_bytes(token)
        except ValueError as error:
            raise KeyError(token) from error

    def decode_tokens_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        """Bytes of each id."""
        return [self.decode_single_token_bytes(token) for token in tokens]

    def decode_with_offsets(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """Text of the ids and the character in which each begins."""
        try:
            return self._tokenizer.decode_with_offsets(tokens)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise KeyError(str(error)) from None

    def decode_batch(
        self, batch: Sequence[Sequence[int]], *, errors: str = "replace", num_threads: int = 8
    ) -> list[str]:
        """``decode`` of each sequence."""
        return map_threads(partial(self.decode, errors=errors), batch, num_threads)

    def decode_bytes_batch(
        self, batch: Sequence[Sequence[int]], *, num_threads: int = 8
    ) -> list[bytes]:
        """``decode_bytes`` of each sequence."""
        return map_threads(self.decode_bytes, batch, num_threads)

    def token_byte_values(self) -> list[bytes]:
        """The bytes of all ordinary tokens, sorted."""
        return sorted(token for token in self._tokenizer.vocabulary.tokens if token)

    def is_special_token(self, token: int) -> bool:
        """Whether the id is that of a special token."""
        return token in self._special_tokens.values()

    @property
    def eot_token(self) -> int:
        """The id of ``<|endoftext|>``; raises KeyError if there is none."""
        return self._special_tokens[END_OF_TEXT]

    @property
    def special_tokens_set(self) -> set[str]:
        """The names of the special tokens."""
        return set(self._special_tokens)

    @property
    def n_vocab(self) -> int:
        """One more than the largest id."""
        return self.max_token_value + 1

    def __reduce__(self) -> tuple[object, tuple[Tokenizer, str]]:
        return (Encoding.of, (self._tokenizer, self.name))

    def __repr__(self) -> str:
        return f"<Encoding {self.name!r}>"


def _clean(text: str) -> str:
    # Only a str that is not UTF-8 takes the long way.
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

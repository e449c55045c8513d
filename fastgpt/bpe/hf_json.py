"""Reads and writes byte-level BPE vocabularies in the ``tokenizer.json`` format of Hugging Face.

GPT-2's older ``vocab.json`` and ``merges.txt`` hold two parts of the same and are read here, too.

Only what :mod:`fastgpt.tokenizer` can reproduce id for id is accepted; anything else in a file
(a normaliser, an unknown split pattern ...) is an error rather than slightly different ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastgpt.errors import DataError

MAX_ID = 2**20 - 2  # what one slot of the merge table holds

# For Oniguruma, the engine of Hugging Face tokenizers. The tails behind the possessive quantifiers
# of tiktoken's patterns are spelt out; \z because $ would also match before a newline; the letters
# of the contractions because case folding differs between engines.
_GPT4_BODY = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = "'(?:[sS\u017fdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"  # U+017F folds to s
_O200K_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s(?:%s)?|"
)
_O200K_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _o200k(contraction: str) -> str:
    words = (_O200K_WORD % (*counts, contraction) for counts in ("*+", "+*"))
    return "".join(words) + _O200K_REST


SPLIT_REGEX = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": _CONTRACTION + "|" + _GPT4_BODY.replace(r"\s*[\r\n]+", r"\s++\z|\s*[\r\n]+"),
    "llama3": _CONTRACTION + "|" + _GPT4_BODY,
    "o200k": _o200k(_CONTRACTION),
}
# Other spellings of the same splits.
_KNOWN_REGEX = {regex: name for name, regex in SPLIT_REGEX.items()} | {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _GPT4_BODY: "llama3",
    _o200k("").replace("(?:)?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"): "o200k",
}


class VocabularyError(DataError, ValueError):
    """A file that is no vocabulary, or a damaged one; the message names the file and the place."""


@dataclass(frozen=True)
class Vocabulary:
    """Everything that decides which ids a text becomes.

    tokens[i] are the bytes of id i, None where no ordinary token has the id. A merge (left, right,
    id) has its place in the tuple as rank. whole_pieces: a piece that is a token as it stands
    becomes that token, whatever the merges say. pattern: a key of ``SPLIT_REGEX`` or any other
    regular expression for the package ``regex``.
    """

    pattern: str
    tokens: tuple[bytes | None, ...]
    merges: tuple[tuple[int, int, int], ...]
    specials: dict[str, int]
    whole_pieces: bool = False


def _byte_letters() -> list[str]:
    # GPT-2's disguise of bytes as visible characters: printable Latin-1 stands for itself, the
    # others follow from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte if byte in printable else next(rest)) for byte in range(256)]


_LETTER = _byte_letters()
_BYTE = {letter: byte for byte, letter in enumerate(_LETTER)}


def token_name(token: bytes) -> str:
    """The string a token has in the file."""
    return "".join([_LETTER[byte] for byte in token])


def token_of_name(name: str) -> bytes | None:
    """The token that has this string in the file, None if it is the name of none."""
    if not all(letter in _BYTE for letter in name):
        return None
    return bytes([_BYTE[letter] for letter in name])


def dumps(vocabulary: Vocabulary) -> str:
    """The file as a string; equal vocabularies give equal strings."""
    names = [None if token is None else token_name(token) for token in vocabulary.tokens]
    ids = {name: i for i, name in enumerate(names) if name is not None} | vocabulary.specials
    added = [
        {
            "id": i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for content, i in sorted(vocabulary.specials.items(), key=lambda item: item[1])
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": SPLIT_REGEX.get(vocabulary.pattern, vocabulary.pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, byte_level | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.whole_pieces,
            "vocab": dict(sorted(ids.items(), key=lambda item: item[1])),
            "merges": [f"{names[left]} {names[right]}" for left, right, _ in vocabulary.merges],
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=1)


class _Reader:
    # Walks the parsed document; every complaint names the file and the place in it.
    def __init__(self, document: Any, file: str, known: str | None = None) -> None:
        self.document = document
        self.file = file
        self.known = known  # a regular expression that the caller vouches for

    def fail(self, place: str, problem: str) -> VocabularyError:
        return VocabularyError(f"{self.file}: {place}: {problem}")

    def typed(self, value: Any, kind: type, place: str) -> Any:
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(place, f"expected {kind.__name__}, found {type(value).__name__}")
        return value

    def token_id(self, value: Any, place: str) -> int:
        number = self.typed(value, int, place)
        if not 0 <= number <= MAX_ID:
            raise self.fail(place, f"id {number} is not between 0 and {MAX_ID}")
        return number

    def pattern(self, node: Any) -> str:
        place = "pre_tokenizer"
        steps = node.get("pretokenizers") if isinstance(node, dict) else None
        if not isinstance(steps, list):
            steps = [node]
        steps = [self.typed(step, dict, place) for step in steps]
        kinds = [step.get("type") for step in steps]
        regex = None
        if kinds == ["Split", "ByteLevel"] and steps[1].get("use_regex") is False:
            split = steps[0].get("pattern")
            regex = split.get("Regex") if isinstance(split, dict) else None
            regex = regex if isinstance(regex, str) else None
            if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
                regex = None
        elif kinds == ["ByteLevel"] and steps[0].get("use_regex", True) is True:
            regex = SPLIT_REGEX["gpt2"]
        if regex is None or (regex not in _KNOWN_REGEX and regex != self.known):
            raise self.fail(
                place,
                "not the byte-level split of GPT-2, GPT-4, GPT-4o or LLaMA-3; "
                "for a split by another regular expression pass it as pattern",
            )
        if steps[-1].get("add_prefix_space"):
            raise self.fail(place, "add_prefix_space is not supported")
        return _KNOWN_REGEX.get(regex, regex)

    def specials(self, nodes: Any) -> dict[str, int]:
        specials: dict[str, int] = {}
        for i, node in enumerate(self.typed(nodes, list, "added_tokens")):
            place = f"added_tokens[{i}]"
            content = self.typed(self.typed(node, dict, place).get("content"), str, place)
            if any(node.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
                raise self.fail(place, "single_word, lstrip and rstrip are not supported")
            if not content or content in specials:
                raise self.fail(place, f"token {content!r} is empty or listed twice")
            if node.get("special") is False:
                problem = f"{content!r} is found in ordinary text, which is not supported"
                raise self.fail(place, problem)
            specials[content] = self.token_id(node.get("id"), place)
        return specials

    def tokens(
        self, vocab: Any, specials: dict[str, int], where: str = "model.vocab"
    ) -> dict[str, int]:
        # Name -> id of the ordinary tokens.
        ids: dict[str, int] = {}
        taken = {number: content for content, number in specials.items()}
        for name, value in self.typed(vocab, dict, where).items():
            place = f"{where}[{name!r}]"
            number = self.token_id(value, place)
            if name in specials:
                if specials[name] != number:
                    raise self.fail(place, f"id {number}, but {specials[name]} in added_tokens")
                continue
            if number in taken:
                raise self.fail(place, f"id {number} also belongs to {taken[number]!r}")
            if not name or not all(letter in _BYTE for letter in name):
                raise self.fail(place, "not the name of a byte-level token")
            taken[number] = name
            ids[name] = number
        return ids

    def merges(
        self, nodes: Any, ids: dict[str, int], where: str = "model.merges[{}]", first: int = 0
    ) -> list[tuple[int, int, int]]:
        merges = []
        for i, node in enumerate(self.typed(nodes, list, "model.merges"), first):
            parts = node.split(" ") if isinstance(node, str) else node
            place = where.format(i)
            if (
                not isinstance(parts, list)
                or len(parts) != 2
                or not all(isinstance(part, str) for part in parts)
            ):
                raise self.fail(place, "expected two tokens")
            left, right = parts
            for name in (left, right, left + right):
                if name not in ids:
                    raise self.fail(place, f"token {name!r} is not in the vocabulary")
            merges.append((ids[left], ids[right], ids[left + right]))
        return merges

    def read(self) -> Vocabulary:
        document = self.typed(self.document, dict, "document")
        model = self.typed(document.get("model"), dict, "model")
        if model.get("type", "BPE") != "BPE":
            raise self.fail("model.type", f"{model.get('type')!r} is not BPE")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(key):
                raise self.fail(f"model.{key}", "not supported")
        if document.get("normalizer") is not None:
            raise self.fail("normalizer", "not supported; it would change the text")
        pattern = self.pattern(document.get("pre_tokenizer"))
        specials = self.specials(document.get("added_tokens", []))
        ids = self.tokens(model.get("vocab"), specials)
        merges = self.merges(model.get("merges"), ids)
        whole = bool(model.get("ignore_merges"))
        return Vocabulary(pattern, _by_id(ids), tuple(merges), specials, whole)

    def read_gpt2(
        self, lines: list[str], merges_file: str, pattern: str, specials: dict[str, int] | None
    ) -> Vocabulary:
        vocab = self.typed(self.document, dict, "document")
        if specials is None:
            # What is no byte and what no merge makes cannot come out of text.
            made = {line.replace(" ", "") for line in lines} | _BYTE.keys()
            specials = {
                name: self.token_id(number, f"token {name!r}")
                for name, number in vocab.items()
                if name not in made
            }
        ids = self.tokens(vocab, specials, "token")
        # The first line of the file says its version.
        merges = _Reader(None, merges_file).merges(lines, ids, "line {}", 2)
        return Vocabulary(pattern, _by_id(ids), tuple(merges), specials)


def _by_id(ids: dict[str, int]) -> tuple[bytes | None, ...]:
    tokens: list[bytes | None] = [None] * (max(ids.values(), default=-1) + 1)
    for name, number in ids.items():
        tokens[number] = bytes([_BYTE[letter] for letter in name])
    return tuple(tokens)


def parse(data: bytes, file: str) -> Any:
    """The JSON document in ``data``; raises VocabularyError naming the line or byte."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise VocabularyError(
            f"{file}: byte {error.start}: not UTF-8; is it a tokenizer?"
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise VocabularyError(f"{file}: {where}: not JSON ({error.msg}); is it complete?") from None
    except (RecursionError, ValueError) as error:
        raise VocabularyError(f"{file}: not a sensible JSON document ({error})") from None


def loads(document: Any, file: str, pattern: str | None = None) -> Vocabulary:
    """The vocabulary in a parsed tokenizer.json; raises VocabularyError naming the place.

    pattern: a regular expression to accept besides the known ones. Nothing that a file says is
    run as one unless the caller knows it.
    """
    return _Reader(document, file, pattern).read()


def loads_gpt2(
    vocab: Any,
    vocab_file: str,
    merges: list[str],
    merges_file: str,
    pattern: str,
    specials: dict[str, int] | None,
) -> Vocabulary:
    """The vocabulary in a parsed vocab.json and the lines of merges.txt below the first.

    specials: by name; None takes the names that are no byte and that no merge makes.
    """
    return _Reader(vocab, vocab_file).read_gpt2(merges, merges_file, pattern, specials)

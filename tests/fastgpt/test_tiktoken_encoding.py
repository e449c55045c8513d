"""Our ``Encoding`` beside tiktoken's: every method, every error."""

from __future__ import annotations

import copy
import inspect
import pickle
import random

import numpy as np
import pytest
import tiktoken
import tokenizer_samples as samples
from hypothesis import given, settings

from fastgpt.tiktoken_encoding import Encoding

EOT = "<|endoftext|>"
CUSTOM = r"\p{Lu}?\p{Ll}+|\p{N}{1,2}|[^\S\n]+|\n+|[^\s\p{L}\p{N}]+|\p{L}+"


def both(pat_str: str) -> tuple[Encoding, tiktoken.Encoding]:
    vocabulary = samples.trained("gpt2").vocabulary
    arguments = {
        "pat_str": pat_str,
        "mergeable_ranks": {token: i for i, token in enumerate(vocabulary.tokens) if token},
        "special_tokens": {EOT: 3005, "<|a|>": 3001, "<|ab|>": 3010},
    }
    return Encoding("x", **arguments), tiktoken.Encoding("x", **arguments)


@pytest.fixture(scope="module", params=[samples.REGEX["gpt2"], samples.REGEX["gpt4"], CUSTOM])
def pair(request) -> tuple[Encoding, tiktoken.Encoding]:
    return both(request.param)


def outcome(call):
    """What a call returns, or the class of what it raises."""
    try:
        value = call()
    except Exception as error:
        return type(error)
    return value.tolist() if isinstance(value, np.ndarray) else value


TEXTS = [
    "", "Hello, it's me", EOT, f"a{EOT}b", "<|a|>", "<|ab|><|a|>x", "é日本 \t't\n\n x", "a\ud800b",
    "\ud83d\ude00", samples.english(5000),
]  # fmt: skip
POLICIES = [
    {},
    {"allowed_special": "all"},
    {"allowed_special": {EOT}},
    {"allowed_special": {EOT}, "disallowed_special": ()},
    {"disallowed_special": ()},
    {"disallowed_special": {"<|a|>"}},
    {"disallowed_special": {"me"}},
    {"allowed_special": {"<|unknown|>"}, "disallowed_special": ()},
    {"allowed_special": "all", "disallowed_special": {EOT}},
]


def test_every_way_to_encode(pair):
    ours, theirs = pair
    for text in TEXTS:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
        for policy in POLICIES:
            expected = outcome(lambda p=policy, t=text: theirs.encode(t, **p))
            assert outcome(lambda p=policy, t=text: ours.encode(t, **p)) == expected, (text, policy)
            array = outcome(lambda p=policy, t=text: ours.encode_to_numpy(t, **p))
            assert array == expected
    assert ours.encode_to_numpy("abc").dtype == theirs.encode_to_numpy("abc").dtype
    assert ours.encode_ordinary_batch(TEXTS) == theirs.encode_ordinary_batch(TEXTS)
    for policy in POLICIES:
        assert outcome(lambda p=policy: ours.encode_batch(TEXTS, num_threads=2, **p)) == outcome(
            lambda p=policy: theirs.encode_batch(TEXTS, num_threads=2, **p)
        )


def test_a_disallowed_token_is_named(pair):
    for encoding in pair:
        with pytest.raises(ValueError, match=r"disallowed special token '<\|endoftext\|>'"):
            encoding.encode(f"a{EOT}")


def test_every_way_to_decode(pair):
    ours, theirs = pair
    rng = random.Random(0)
    known = [*range(2999), 3001, 3005, 3010]
    lists = [[], [3005], [3000], [2999], [10**6], [5, 3001, 7], *(
        rng.choices(known, k=rng.randrange(1, 12)) for _ in range(200)
    ), *(theirs.encode_ordinary(text) for text in TEXTS)]  # fmt: skip
    for ids in lists:
        for name in ("decode", "decode_bytes", "decode_tokens_bytes", "decode_with_offsets"):
            expected = outcome(lambda n=name, i=ids: getattr(theirs, n)(i))
            assert outcome(lambda n=name, i=ids: getattr(ours, n)(i)) == expected, (name, ids)
        strict = outcome(lambda i=ids: theirs.decode(i, errors="strict"))
        assert outcome(lambda i=ids: ours.decode(i, errors="strict")) == strict
    good = [ids for ids in lists if all(i in known for i in ids)]
    assert ours.decode_batch(good, num_threads=2) == theirs.decode_batch(good)
    assert ours.decode_bytes_batch(good, num_threads=2) == theirs.decode_bytes_batch(good)


def test_single_tokens_and_properties(pair):
    ours, theirs = pair
    for token in ["a", b"\xff", " the", EOT, "<|ab|>", "no such token", b"", b"zz\xff"]:
        expected = outcome(lambda t=token: theirs.encode_single_token(t))
        assert outcome(lambda t=token: ours.encode_single_token(t)) == expected
    for token in [0, 255, 256, 2998, 3001, 3005, 3000, 5000, -1]:
        expected = outcome(lambda t=token: theirs.decode_single_token_bytes(t))
        found = outcome(lambda t=token: ours.decode_single_token_bytes(t))
        assert found == expected or (token == -1 and found is KeyError)
        if token >= 0:
            assert ours.is_special_token(token) == theirs.is_special_token(token)
    assert ours.token_byte_values() == theirs.token_byte_values()
    for name in ("eot_token", "special_tokens_set", "n_vocab", "max_token_value", "name"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert repr(ours) == repr(theirs)


def test_no_method_and_no_argument_is_missing():
    for name, theirs in inspect.getmembers(tiktoken.Encoding):
        if name.startswith("_"):
            continue
        ours = getattr(Encoding, name)
        if callable(theirs):
            assert list(inspect.signature(ours).parameters) == list(
                inspect.signature(theirs).parameters
            ), name
    ours, theirs = (inspect.signature(kind.__init__) for kind in (Encoding, tiktoken.Encoding))
    assert list(ours.parameters) == list(theirs.parameters)


def test_no_end_of_text_is_an_error_as_there():
    ranks = {bytes([i]): i for i in range(256)}
    arguments = {"pat_str": CUSTOM, "mergeable_ranks": ranks, "special_tokens": {}}
    for kind in (Encoding, tiktoken.Encoding):
        assert outcome(lambda kind=kind: kind("x", **arguments).eot_token) is KeyError
        assert kind("x", explicit_n_vocab=256, **arguments).n_vocab == 256
    with pytest.raises(ValueError, match="explicit_n_vocab 300, but 256 tokens up to id 255"):
        Encoding("x", explicit_n_vocab=300, **arguments)


def test_copies_and_pickles(pair):
    ours, _ = pair
    for other in (pickle.loads(pickle.dumps(ours)), copy.copy(ours), copy.deepcopy(ours)):
        assert other.encode(f"it's{EOT}", allowed_special="all") == ours.encode(
            f"it's{EOT}", allowed_special="all"
        )
        assert other.name == ours.name


def test_over_a_tokenizer():
    tokenizer = samples.trained("gpt4")
    encoding = Encoding.of(tokenizer, "mine")
    assert encoding.encode("it's me") == tokenizer.encode("it's me")
    assert (encoding.name, encoding.n_vocab) == ("mine", tokenizer.vocab_size)


@pytest.fixture(scope="module")
def gpt4o() -> tuple[Encoding, tiktoken.Encoding]:
    return both(samples.REGEX["o200k"])


@settings(max_examples=300, deadline=None)
@given(text=samples.nasty_text)
def test_the_pattern_of_gpt4o_is_known(gpt4o, text):
    ours, theirs = gpt4o
    assert ours._tokenizer.vocabulary.pattern == "o200k"
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def unstable(encoding, text: str, **policy):
    def call():
        stable, ways = encoding.encode_with_unstable(text, **policy)
        return stable, sorted(map(list, ways))

    return outcome(call)


ENDS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n",
    "\t",
    "'",
    "'l",
    "12",
    "1234",
    "\u3000",
    "\x1c ",
    "\x85",
]
ENDS += ["é", "日", "wor", " th", " th ", "!!", "a" + EOT, EOT + "th"]


def test_the_end_of_a_text_that_goes_on(pair):
    ours, theirs = pair
    for text in [begin + end for begin in ("", "Hello th", "x  \n", "naïve 日") for end in ENDS]:
        for policy in ({"disallowed_special": ()}, {"allowed_special": "all"}, {}):
            expected = unstable(theirs, text, **policy)
            assert unstable(ours, text, **policy) == expected, (text, policy)
    # There a lone surrogate is an error in this method alone.
    assert unstable(ours, "a\ud800") == unstable(theirs, "a\ufffd")


def test_a_control_character_that_python_calls_white_space_is_none():
    ranks = {bytes([i]): i for i in range(256)} | {b"!\x1c": 256, b"! ": 257}
    arguments = {"mergeable_ranks": ranks, "special_tokens": {}, "pat_str": samples.REGEX["gpt4"]}
    ours, theirs = (kind("x", **arguments) for kind in (Encoding, tiktoken.Encoding))
    for text in ("!\x1c", "! ", "a! "):
        assert unstable(ours, text) == unstable(theirs, text)
    assert unstable(ours, "!\x1c") == ([], [[256]])


@pytest.fixture(scope="module", params=["gpt2", "gpt4", "o200k"])
def scanned(request) -> tuple[Encoding, tiktoken.Encoding]:
    return both(samples.REGEX[request.param])


@settings(deadline=None, max_examples=200)
@given(text=samples.nasty_text)
def test_the_end_of_any_text(scanned, text):
    ours, theirs = scanned
    policy = {"disallowed_special": ()}
    assert unstable(ours, text, **policy) == unstable(theirs, text, **policy)

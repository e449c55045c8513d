"""Special tokens, offsets, streams, dropout, patterns by regular expression, batches, threads."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import tiktoken
import tokenizer_samples as samples
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.bpe.byte_pair import Splitter
from fastgpt.tokenizer import Tokenizer

EOT = "<|endoftext|>"
PATTERN = r"\p{Lu}?\p{Ll}+|\p{N}{1,2}|[^\S\n]+|\n+|[^\s\p{L}\p{N}]+|\p{L}+"


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return samples.trained("gpt2")


@pytest.fixture(scope="module")
def custom() -> Tokenizer:
    return Tokenizer.train(samples.documents()[::3], 1500, pattern=PATTERN)


@pytest.fixture(scope="module")
def custom_reference(custom) -> tiktoken.Encoding:
    ranks = {token: i for i, token in enumerate(custom.vocabulary.tokens)}
    return tiktoken.Encoding(
        "x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=custom.special_tokens
    )


# --- special tokens


def test_disallowed_special_tokens_raise(gpt2):
    for call in (gpt2.encode, gpt2.encode_to_numpy):
        with pytest.raises(ValueError, match=r"disallowed special token '<\|endoftext\|>' at char"):
            call(f"ab{EOT}", disallowed_special="all")
        assert list(call("ab", disallowed_special="all")) == gpt2.encode("ab")
        allowed = call(f"ab{EOT}", allowed_special="all", disallowed_special="all")
        assert list(allowed) == [*gpt2.encode("ab"), gpt2.eot_id]
        with pytest.raises(ValueError, match="special token 'b' at character 1"):
            call("ab", disallowed_special=("x", "b"))
        assert gpt2.eot_id not in call(f"ab{EOT}", disallowed_special=())
    with pytest.raises(ValueError, match="disallowed special token"):
        gpt2.encode_batch(["a", EOT], disallowed_special="all")
    with pytest.raises(TypeError, match="collection of strings"):
        gpt2.encode("ab", disallowed_special=EOT)


def test_batches_take_special_tokens(gpt2):
    texts = ["a", EOT, f"{EOT}b{EOT}"]
    batch = gpt2.encode_batch(texts, allowed_special={EOT}, num_threads=2)
    assert [ids.tolist() for ids in batch] == [
        gpt2.encode(text, allowed_special={EOT}) for text in texts
    ]
    assert gpt2.decode_batch(batch, num_threads=2) == texts


# --- offsets


@settings(max_examples=200, deadline=None)
@given(text=samples.nasty_text)
def test_offsets_as_tiktoken(text):
    ours, theirs = samples.pairs("gpt4"), samples.pairs_reference("gpt4")
    ids = ours.encode(text)
    assert ours.decode_with_offsets(ids) == theirs.decode_with_offsets(ids)
    offsets = ours.token_offsets(np.array(ids, dtype=np.int32))
    data = text.encode()
    assert [data[a:b] for a, b in pairwise(offsets)] == [
        theirs.decode_single_token_bytes(i) for i in ids
    ]


def test_offsets_count_special_tokens_and_refuse_halves(gpt2):
    ids = [gpt2.eot_id, *gpt2.encode("héé"), gpt2.eot_id]
    text, offsets = gpt2.decode_with_offsets(ids)
    assert text == f"{EOT}héé{EOT}"
    assert (offsets[0], offsets[1], offsets[-1]) == (0, len(EOT), len(EOT) + 3)
    assert gpt2.decode_with_offsets([]) == ("", [])
    assert gpt2.token_offsets([]).tolist() == [0]
    with pytest.raises(UnicodeDecodeError):
        gpt2.decode_with_offsets(gpt2.encode_bytes(b"\xc3"))
    with pytest.raises(ValueError, match="not in the vocabulary"):
        gpt2.token_offsets([3000])


# --- streams


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(samples.nasty_text.map(str.encode), st.binary(max_size=60)))
def test_a_stream_gives_whole_characters_and_all_of_them(data):
    tokenizer = samples.pairs("gpt2")  # pairs of bytes cut most characters
    ids = tokenizer.encode_bytes(data)
    stream = tokenizer.stream_decoder()
    seen = b""
    parts = []
    for token_id in ids:
        parts.append(stream.push(token_id))
        seen += tokenizer.token_bytes(token_id)
        if "\ufffd" not in parts[-1]:
            assert seen.decode("utf-8", "replace").startswith("".join(parts))
    assert "".join([*parts, stream.finish()]) == data.decode("utf-8", "replace")


def test_a_stream_waits_for_the_rest_of_a_character(gpt2):
    half, rest = gpt2.encode_bytes("é".encode()[:1]), gpt2.encode_bytes("é".encode()[1:])
    stream = gpt2.stream_decoder()
    assert [stream.push(*half), stream.push(*rest), stream.finish()] == ["", "é", ""]
    assert stream.push() == ""
    stream.push(*half)
    assert stream.finish() == "\ufffd"
    with pytest.raises(ValueError, match="token id 3000 is not in the vocabulary"):
        stream.push(3000)
    strict = gpt2.stream_decoder("strict")
    strict.push(*half)
    with pytest.raises(UnicodeDecodeError):
        strict.finish()


# --- BPE dropout


def test_dropout_of_nothing_and_of_everything(gpt2):
    for text in ["", "a", EOT, samples.english(20_000), "日本語 " * 50]:
        assert gpt2.encode_with_dropout(text, 0, seed=1).tolist() == gpt2.encode(text)
        everything = gpt2.encode_with_dropout(text, 1, seed=1)
        assert gpt2.decode(everything) == text
        assert len(everything) == len(text.encode())
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="probability is outside"):
            gpt2.encode_with_dropout("a", p, seed=0)


def test_dropout_is_seeded_and_lossless(gpt2):
    text = samples.english(30_000)
    first = gpt2.encode_with_dropout(text, 0.1, seed=5)
    assert first.dtype == gpt2.dtype
    assert np.array_equal(first, gpt2.encode_with_dropout(text, 0.1, seed=5))
    other = gpt2.encode_with_dropout(text, 0.1, seed=6)
    assert not np.array_equal(first, other)
    for ids in (first, other):
        assert gpt2.decode(ids) == text
        assert len(gpt2.encode(text)) < len(ids) < len(text)
    ids = gpt2.encode_with_dropout(f"a{EOT}b", 0.5, seed=-1, allowed_special="all")
    assert ids.tolist()[1] == gpt2.eot_id
    assert gpt2.eot_id not in gpt2.encode_with_dropout(EOT, 0.5, seed=0)


@pytest.mark.parametrize("word", [" there", "understanding", "é日本"])
def test_dropout_is_the_algorithm_of_the_paper(gpt2, word):
    # The same on every machine: SplitMix64 from the seed, one draw a candidate.
    results = set()
    for seed in range(60):
        for p in (0.1, 0.5, 0.9):
            expected = split_mix_dropout(gpt2, word.encode(), p, seed)
            assert gpt2.encode_with_dropout(word, p, seed=seed).tolist() == expected
            results.add(tuple(expected))
    assert len(results) > 5


def split_mix_dropout(tokenizer: Tokenizer, piece: bytes, p: float, seed: int) -> list[int]:
    """Algorithm 1 of the paper on one piece, the candidates drawn in the order of their ranks."""
    mask = 2**64 - 1
    state = seed

    def draw() -> bool:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return ((z ^ z >> 31) >> 11) / 2**53 < p

    rank = {pair[:2]: (i, pair[2]) for i, pair in enumerate(tokenizer.vocabulary.merges)}
    ids = [tokenizer.vocabulary.tokens.index(bytes([byte])) for byte in piece]
    while True:
        places = [i for i in range(len(ids) - 1) if (ids[i], ids[i + 1]) in rank]
        places.sort(key=lambda i: (rank[ids[i], ids[i + 1]][0], i))
        kept = next((i for i in places if not draw()), None)
        if kept is None:
            return ids
        ids[kept : kept + 2] = [rank[ids[kept], ids[kept + 1]][1]]


# --- patterns by regular expression


@settings(max_examples=150, deadline=None)
@given(text=samples.nasty_text)
def test_a_pattern_of_ones_own_as_tiktoken(custom, custom_reference, text):
    theirs = custom_reference
    assert custom.encode(text) == theirs.encode_ordinary(text)
    ids = custom.encode(text, allowed_special="all")
    assert ids == theirs.encode(text, allowed_special="all")
    assert custom.decode(custom.encode(text)) == text


def test_a_pattern_of_ones_own_in_every_form(custom, custom_reference):
    texts = [samples.english(30_000), "", "日本語 12345 x", EOT]
    expected = [custom_reference.encode_ordinary(text) for text in texts]
    assert [custom.encode(text) for text in texts] == expected
    assert [custom.encode_to_numpy(text).tolist() for text in texts] == expected
    for threads in (1, 3):
        batch = custom.encode_batch(texts, num_threads=threads)
        assert [ids.tolist() for ids in batch] == expected
    assert [custom.encode_bytes(text.encode()) for text in texts] == expected
    assert pickle.loads(pickle.dumps(custom)).encode(texts[0]) == expected[0]
    assert custom.decode(custom.encode_with_dropout(texts[0], 0.2, seed=1)) == texts[0]
    with pytest.raises(UnicodeDecodeError):
        custom.encode_bytes(b"\xff")
    for bad in (None, 3, ["a"]):
        with pytest.raises(TypeError):
            custom.encode(bad)
    for call in (custom.encode, custom.encode_to_numpy, lambda text: custom.encode_batch([text])):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at character 2"):
            call("ab\ud800")


def test_what_a_pattern_leaves_out_stays_in_the_text():
    tokenizer = Tokenizer.train(["words and words"], 270, pattern="[a-z]+")
    for text in ["a word, and 12 more!", "  ", "日本"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert Splitter("[a-z]+").ends("12ab é3c").tolist() == [2, 4, 8, 9, 9]


def test_a_missing_package_is_named():
    code = (
        "import sys; sys.modules['regex'] = None\n"
        "from fastgpt.tokenizer import Tokenizer\n"
        "Tokenizer.train(['a'], 300)\n"
        "Tokenizer.train(['a'], 300, pattern='[a-z]+')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: split patterns other than gpt2, gpt4" in result.stderr
    assert "pip install fastgpt-trainer[regex]" in result.stderr


# --- processes and threads


def test_long_work_lets_other_threads_run(gpt2):
    text = samples.english(1_000_000) * 3
    ids = np.tile(gpt2.encode_to_numpy(text), 30)
    for work in (
        lambda: gpt2.encode_to_numpy(text * 4),
        lambda: gpt2.decode_bytes(ids),
        lambda: gpt2.encode_batch([text], num_threads=1),
        lambda: gpt2.encode_with_dropout(text[:500_000], 0.1, seed=0),
        lambda: Tokenizer.train([text[:1_000_000]], 1500, num_threads=1),
    ):
        done = threading.Event()
        ticks = 0
        thread = threading.Thread(target=lambda work=work, done=done: (work(), done.set()))
        begin = time.perf_counter()
        thread.start()
        while not done.is_set():
            ticks += 1
            time.sleep(0)
        assert ticks > 3, time.perf_counter() - begin
        thread.join()


@pytest.mark.parametrize("num_threads", [0, 1, 2, 5])
def test_threads_on_one_text_change_no_id(gpt2, custom, num_threads):
    text = samples.english(1_000_000) + " <|endoftext|> ünïcode\n" * 1000
    for tokenizer in (gpt2, custom):
        expected = tokenizer.encode(text)
        assert tokenizer.encode_to_numpy(text, num_threads=num_threads).tolist() == expected
    with pytest.raises(ValueError, match="endoftext"):
        gpt2.encode_to_numpy(text, disallowed_special="all", num_threads=num_threads)


def test_every_kind_is_copied_and_pickled(custom, gpt2):
    for tokenizer in (custom, gpt2):
        for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
            assert other.hash == tokenizer.hash
            assert other.vocabulary == tokenizer.vocabulary


def test_the_cache_is_bounded():
    # Two million words, most of them distinct: four times as many as there is room for.
    samples.assert_memory(
        "import random\n"
        "from fastgpt.tokenizer import Tokenizer\n"
        "t = Tokenizer.train(['some text to train on ' * 10], 300)\n"
        "rng = random.Random(0)\n"
        "letters = bytes(b'abcdefgh '[i % 9] for i in range(256))\n"
        "def words(n): return rng.randbytes(9 * n).translate(letters).decode()",
        "t.encode_to_numpy(words(20_000))",
        "[t.encode_to_numpy(words(20_000)) for _ in range(100)]",
        megabytes=56 + 16 + 18,  # the table grows from 16 MB to 32
    )


def test_random_strings_agree_across_forms(gpt2):
    rng = random.Random(8)
    texts = [samples.random_text(rng) for _ in range(300)]
    for text, ids in zip(texts, gpt2.encode_batch(texts), strict=True):
        assert gpt2.encode_with_dropout(text, 0, seed=0).tolist() == ids.tolist()

"""The typed interface: round trips, special tokens, errors, copies, threads, hostile input."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tokenizer_samples as samples
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer import Tokenizer

EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return samples.trained("gpt2")


@pytest.mark.parametrize("pattern", samples.PATTERNS)
@settings(max_examples=150, deadline=None)
@given(data=st.one_of(st.binary(max_size=200), samples.nasty_text.map(str.encode)))
def test_every_byte_string_round_trips(pattern, data):
    tokenizer = samples.trained(pattern)
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.bytes_per_id()[ids].sum() == len(data)


def test_truncated_and_overlong_utf8_round_trips(gpt2):
    for data in [b"\xc3", b"a\xe4\xb8", b"\xf0\x9f\x98", b"\xc0\xaf", b"\xed\xa0\x80", b"\xff\xfe",
                 b"\xf4\x90\x80\x80", b"\x80 \x80", b"\xe0\x80\x80 x", b"x\xf0"]:  # fmt: skip
        for tail in (b"", b"z", b" zz" * 20):
            assert gpt2.decode_bytes(gpt2.encode_bytes(data + tail)) == data + tail


def test_text_forms_agree(gpt2):
    texts = ["", "a", "Hello world, it's me.", samples.english(5000)]
    batch = gpt2.encode_batch(texts, num_threads=3)
    for text, array in zip(texts, batch, strict=True):
        ids = gpt2.encode(text)
        assert array.dtype == gpt2.dtype == np.uint16
        assert array.tolist() == ids == gpt2.encode_to_numpy(text).tolist()
        assert gpt2.encode_bytes(text.encode()) == ids
        for form in (ids, tuple(ids), array, array.astype(np.int64), array.astype(np.uint8) * 0):
            assert isinstance(gpt2.decode(form), str)
        assert gpt2.decode(ids) == gpt2.decode(array) == text
    assert gpt2.encode_batch([]) == []


@pytest.mark.parametrize("other", ["\xe9", "\u0416", "\u4e2d", "\ud7ff", "\ue000", "\U0001f600"])
def test_text_of_every_width_is_read_as_its_utf8(gpt2, other):
    """Python holds characters in 1, 2 or 4 bytes; the core reads them without keeping a copy."""
    texts = [" " * (n // 2) + other * k + "a" * n for n in range(20) for k in (1, 2, 7)]
    texts += [(other + "b" * 4095) * 3, "c" * 4096 + other, (other * 30 + " word") * 9000]
    for text in texts:
        wanted = gpt2.encode_bytes(text.encode())
        fresh = text[:-1] + text[-1]  # a str that nobody has asked for its UTF-8
        size = sys.getsizeof(fresh)
        assert gpt2.encode(fresh) == wanted
        assert gpt2.encode_to_numpy(fresh).tolist() == wanted
        assert sys.getsizeof(fresh) == size
    for text, ids in zip(texts, gpt2.encode_batch(texts, num_threads=2), strict=True):
        assert gpt2.decode(ids) == text
    with pytest.raises(ValueError, match=r"surrogate U\+DC80 at character 1 of text 1"):
        gpt2.encode_batch(["fine", other + "\udc80", "fine"], num_threads=2)


def test_lists_do_not_depend_on_what_their_integers_went_through(gpt2):
    """Lists share one object for each id; nothing that is done to a list may reach another."""
    text = samples.english(3000)
    ids = gpt2.encode(text)
    expected = gpt2.encode_to_numpy(text).tolist()
    for _ in range(50):
        again = gpt2.encode(text)
        again[:] = [value + 1 for value in again]
        del again
    assert ids == gpt2.encode(text) == expected
    assert all(type(value) is int for value in ids)


def test_wide_vocabularies_give_uint32():
    tokenizer = samples.pairs("gpt2")
    assert tokenizer.vocab_size == 65792
    assert tokenizer.encode_to_numpy("ab cd").dtype == np.uint32
    assert tokenizer.decode(tokenizer.encode_to_numpy("ab cd")) == "ab cd"


def test_ids_are_bytes_then_merges_then_specials():
    tokenizer = Tokenizer.train(
        samples.documents(), 600, pattern="gpt2", special_tokens=(EOT, "<|user|>")
    )
    assert tokenizer.vocab_size == 600
    assert tokenizer.special_tokens == {EOT: 598, "<|user|>": 599}
    assert tokenizer.eot_id == 598
    assert tokenizer.bos_id is None
    assert sorted(tokenizer.decode_bytes([i]) for i in range(256)) == [
        bytes([i]) for i in range(256)
    ]
    assert tokenizer.bytes_per_id().dtype == np.int64
    assert tokenizer.bytes_per_id()[598:].tolist() == [0, 0]


def test_no_user_text_becomes_a_special_token(gpt2):
    for text in [EOT, f"a{EOT}b", EOT * 3, f" {EOT}\n"]:
        ids = gpt2.encode(text)
        assert gpt2.eot_id not in ids
        assert gpt2.eot_id not in gpt2.encode_to_numpy(text)
        assert gpt2.eot_id not in gpt2.encode_batch([text])[0]
        assert gpt2.decode(ids) == text


def test_allowed_special_tokens():
    tokenizer = Tokenizer.train(
        samples.documents(), 500, special_tokens=("<|a|>", "<|a|><|b|>", "<|b|>")
    )
    a, both, b = tokenizer.special_tokens.values()
    assert tokenizer.encode("<|a|><|b|>", allowed_special="all") == [both]  # the longest
    assert tokenizer.encode("<|a|><|b|>", allowed_special={"<|a|>", "<|b|>"}) == [a, b]
    assert tokenizer.encode("x<|b|><|a|>x", allowed_special="all") == [
        *tokenizer.encode("x"), b, a, *tokenizer.encode("x")
    ]  # fmt: skip
    assert a not in tokenizer.encode("<|a|>", allowed_special={"<|b|>"})
    assert tokenizer.encode("y <|a|>", allowed_special={"<|b|>"}) == tokenizer.encode("y <|a|>")
    with pytest.raises(ValueError, match="'<x>' is not a special token"):
        tokenizer.encode("text", allowed_special={"<x>"})


@pytest.mark.parametrize("bad", [-1, 3000, 2**31, 2**40, 2**63, -(2**70)])
def test_decoding_an_unknown_id_raises(gpt2, bad):
    with pytest.raises(ValueError, match=r"at position 1 is not in the vocabulary of 3000"):
        gpt2.decode([5, bad])
    if -(2**63) <= bad < 2**63:
        with pytest.raises(ValueError, match=rf"token id {bad} at position 1"):
            gpt2.decode(np.array([5, bad], dtype=np.int64))


def test_decoding_what_is_not_ids_raises(gpt2):
    for bad in ([1.5], ["a"], [None], 7, np.array([1.0]), np.zeros((2, 2), dtype=np.int64)):
        with pytest.raises(TypeError):
            gpt2.decode(bad)
    holes = Tokenizer.from_tiktoken_ranks({bytes([i]): i for i in range(256)}, "gpt2", {EOT: 300})
    assert holes.vocab_size == 301
    with pytest.raises(ValueError, match="token id 299 at position 0"):
        holes.decode([299])


def test_decode_replaces_or_refuses_half_characters(gpt2):
    half = gpt2.encode_bytes("é".encode()[:1])
    assert gpt2.decode(half) == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        gpt2.decode(half, errors="strict")


def test_lone_surrogates_raise_with_their_position(gpt2):
    where = r"lone surrogate U\+D800 at character 2"
    for call in (gpt2.encode, gpt2.encode_to_numpy):
        with pytest.raises(ValueError, match=where):
            call("ab\ud800")
    with pytest.raises(ValueError, match=where + " of text 1"):
        gpt2.encode_batch(["fine", "ab\ud800"])
    with pytest.raises(ValueError, match=where + " of text 1"):
        gpt2.encode_batch(np.array(["fine", "ab\ud800"]))
    with pytest.raises(ValueError, match=where):
        Tokenizer.train(["ab\ud800"], 300)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="vocab_size 256 is not between 257"):
        Tokenizer.train(["text"], 256)
    with pytest.raises(ValueError, match="unknown pattern"):
        Tokenizer.train(["text"], 300, pattern="gpt5")  # pyright: ignore
    for names, message in ((("<a>", "<a>"), "twice"), (("",), "empty string")):
        texts = iter(["text"])
        with pytest.raises(ValueError, match=message):
            Tokenizer.train(texts, 300, special_tokens=names)
        assert next(texts) == "text"  # said before anything is read
    with pytest.raises(ValueError, match="has the name of an ordinary token"):
        Tokenizer.train(["text text"], 300, special_tokens=("a",))
    with pytest.raises(TypeError, match="iterable of str"):
        Tokenizer.train("text", 300)
    for bad in (None, 3, ["a"]):
        with pytest.raises(TypeError):
            samples.trained("gpt2").encode(bad)  # pyright: ignore
    with pytest.raises(ValueError, match="no token for the byte"):
        Tokenizer.from_tiktoken_ranks({b"a": 0}, "gpt2", {})


def test_training_stops_when_nothing_is_left():
    tokenizer = Tokenizer.train(["ab ab"], 5000, pattern="gpt2")
    assert [tokenizer.decode_bytes([i]) for i in range(256, 258)] == [b"ab", b" ab"]
    assert tokenizer.vocab_size == 259
    assert tokenizer.eot_id == 258
    assert Tokenizer.train([], 5000).vocab_size == 257
    assert Tokenizer.train(["", "a"], 5000).vocab_size == 257


def test_training_is_the_same_for_any_number_of_threads():
    hashes = {
        Tokenizer.train(iter(samples.documents()), 2000, num_threads=threads).hash
        for threads in (1, 2, 3, 7, 0)
    }
    assert len(hashes) == 1
    backwards = Tokenizer.train(samples.documents()[::-1], 2000)
    assert {backwards.hash} == hashes


def test_training_reports_progress_and_can_be_stopped():
    seen = []
    Tokenizer.train(samples.documents(), 2257, progress=lambda *at: seen.append(at))
    assert seen[-1] == (2000, 2000)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    with pytest.raises(ZeroDivisionError):
        Tokenizer.train(samples.documents(), 2257, progress=lambda done, total: 1 // 0)


def test_copies_and_pickles(gpt2):
    for other in (pickle.loads(pickle.dumps(gpt2)), copy.copy(gpt2), copy.deepcopy(gpt2)):
        assert other.hash == gpt2.hash
        assert other.encode("Hello, it's me") == gpt2.encode("Hello, it's me")
        assert other.special_tokens == gpt2.special_tokens


def test_hash_follows_the_content(gpt2, tmp_path):
    gpt2.save(tmp_path / "t.json")
    reread = Tokenizer.from_file(tmp_path / "t.json")
    assert reread.hash == gpt2.hash
    reread.save(tmp_path / "u.json")
    assert (tmp_path / "u.json").read_bytes() == (tmp_path / "t.json").read_bytes()
    others = [samples.trained("gpt4"), Tokenizer.train(samples.documents(), 2999, pattern="gpt2")]
    first, second, *rest = gpt2.vocabulary.merges
    changes = [
        {"merges": (second, first, *rest)},
        {"specials": {"<|end|>": 2999}},
        {"whole_pieces": True},
        {"pattern": "llama3"},
    ]
    others += [type(gpt2)(dataclasses.replace(gpt2.vocabulary, **change)) for change in changes]
    assert len({gpt2.hash, *(other.hash for other in others)}) == 7


def test_threads_share_one_tokenizer(gpt2):
    texts = [samples.english(200_000)[i : i + 5000] for i in range(0, 200_000, 5000)]
    expected = [gpt2.encode(text) for text in texts]
    failures = []

    def work(seed: int) -> None:
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        failures.extend(i for i in order if gpt2.encode(texts[i]) != expected[i])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_survives_a_fork():
    # In a fresh interpreter: forking pytest with torch's threads loaded is not what is tested.
    code = (
        "import os\n"
        "from fastgpt.tokenizer import Tokenizer\n"
        "t = Tokenizer.train(['some text to train on ' * 10], 300)\n"
        "before = [a.tolist() for a in t.encode_batch(['some text'] * 50, num_threads=4)]\n"
        "pid = os.fork()\n"
        "after = [a.tolist() for a in t.encode_batch(['some text'] * 50, num_threads=4)]\n"
        "if pid == 0: os._exit(0 if after == before else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or after != before)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("pattern", samples.PATTERNS)
@pytest.mark.parametrize("unit", ["a", "^", " ", "\n", "1", "中", "\u0301", " \n", "'", "\t", "ab"])
def test_hostile_runs_take_linear_time(pattern, unit):
    # Processor time of one thread, so that a loaded machine does not matter. 512 KB take some
    # 0.1 s; anything quadratic would take minutes.
    tokenizer = samples.trained(pattern)
    for text in (unit * (512_000 // len(unit.encode())), unit * 100_000 + "x"):
        begin = time.thread_time()
        ids = tokenizer.encode_to_numpy(text)
        assert time.thread_time() - begin < 3
        assert tokenizer.decode(ids) == text


def test_training_on_one_huge_word_takes_linear_time():
    letters = "".join(random.Random(0).choices("abcdefgh", k=300_000))
    begin = time.thread_time()
    tokenizer = Tokenizer.train([letters], 4000, num_threads=1)
    assert time.thread_time() - begin < 5
    assert tokenizer.decode(tokenizer.encode(letters)) == letters


def test_a_missing_extension_says_how_to_build_it():
    code = (
        "import sys; sys.modules['fastgpt._bpe'] = None\n"
        "from fastgpt.tokenizer import Tokenizer\n"
        "Tokenizer.train(['a'], 300)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError: the C++ extension fastgpt._bpe is not built" in result.stderr
    assert "pip install -e ." in result.stderr

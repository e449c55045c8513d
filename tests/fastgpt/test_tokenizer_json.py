"""tokenizer.json files: what is read, and that a damaged one is named with the place."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizer_samples as samples
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.bpe import hf_json
from fastgpt.errors import DataError, UsageError
from fastgpt.tokenizer import Tokenizer


def small() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat " * 3], 270, pattern="gpt4")


def document() -> dict[str, Any]:
    return json.loads(hf_json.dumps(small().vocabulary))


def load(tmp_path, data: Any) -> Tokenizer:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return Tokenizer.from_file(path)


def set_path(node: Any, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        node = node[int(key) if isinstance(node, list) else key]
    if value is ...:
        del node[int(last) if isinstance(node, list) else last]
    else:
        node[int(last) if isinstance(node, list) else last] = value


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("model", None, "model: expected dict, found NoneType"),
        ("model/type", "WordPiece", "model.type: 'WordPiece' is not BPE"),
        ("model/vocab", [], "model.vocab: expected dict, found list"),
        ("model/vocab/the", "7", r"model.vocab\['the'\]: expected int, found str"),
        ("model/vocab/the", -1, r"model.vocab\['the'\]: id -1 is not between 0 and 1048574"),
        ("model/vocab/the", 2**40, r"model.vocab\['the'\]: id 1099511627776 is not between"),
        ("model/vocab/the", 0, r"id 0 also belongs to '!'"),
        ("model/vocab/the", True, "expected int, found bool"),
        ("model/vocab/a b", 900, r"model.vocab\['a b'\]: not the name of a byte-level token"),
        ("model/vocab/!", ..., "no token for the byte 33"),
        ("model/vocab/<|endoftext|>", 3, "id 3, but 2.. in added_tokens"),
        ("model/merges", ..., "model.merges: expected list, found NoneType"),
        ("model/merges/0", "a", r"model.merges\[0\]: expected two tokens"),
        ("model/merges/2", ["q", "z"], r"model.merges\[2\]: token 'qz' is not in the vocabulary"),
        ("model/merges/1", [1, 2], r"model.merges\[1\]: expected two tokens"),
        ("model/dropout", 0.1, "model.dropout: not supported"),
        ("model/byte_fallback", True, "model.byte_fallback: not supported"),
        ("normalizer", {"type": "NFC"}, "normalizer: not supported"),
        ("pre_tokenizer", None, "pre_tokenizer: expected dict, found NoneType"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer: not the byte-level split"),
        ("pre_tokenizer/pretokenizers/0/pattern/Regex", "x+", "pre_tokenizer: not the byte-level"),
        ("pre_tokenizer/pretokenizers/0/behavior", "Removed", "pre_tokenizer: not the byte-level"),
        ("pre_tokenizer/pretokenizers/1/add_prefix_space", True, "add_prefix_space"),
        ("added_tokens/0/content", 5, r"added_tokens\[0\]: expected str, found int"),
        ("added_tokens/0/content", "", r"added_tokens\[0\]: token '' is empty or listed twice"),
        ("added_tokens/0/id", 3, r"id 3 also belongs to '<\|endoftext\|>'"),
        ("added_tokens/0/special", False, r"added_tokens\[0\]: '.*' is found in ordinary text"),
        ("added_tokens/0/lstrip", True, "lstrip and rstrip are not supported"),
    ],
)
def test_a_wrong_part_is_named(tmp_path, path, value, complaint):
    data = document()
    set_path(data, path, value)
    with pytest.raises(DataError, match=complaint) as error:
        load(tmp_path, data)
    assert str(error.value).startswith(str(tmp_path / "tokenizer.json") + ": ")
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path):
    whole = json.dumps(document(), indent=1).encode()
    with pytest.raises(DataError, match=r"tokenizer.json: line \d+ column \d+: not JSON"):
        load(tmp_path, whole[:5000])
    with pytest.raises(DataError, match=r"tokenizer.json: byte 100: not UTF-8"):
        load(tmp_path, whole[:100] + b"\xff" + whole[100:])
    with pytest.raises(DataError, match=r"line 1 column 1: not JSON"):
        load(tmp_path, b"")
    with pytest.raises(DataError, match="not a sensible JSON document"):
        load(tmp_path, b"[" * 1_000_000)
    with pytest.raises(DataError, match="document: expected dict, found list"):
        load(tmp_path, [])
    with pytest.raises(DataError, match=r"missing\.json: cannot read the tokenizer"):
        Tokenizer.from_file(tmp_path / "missing.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no tokenizer in this directory"):
        Tokenizer.from_file(tmp_path / "empty")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_but_never_worse(tmp_path_factory, data):
    whole = bytearray(json.dumps(document(), ensure_ascii=False).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    folder = tmp_path_factory.mktemp("mutated")
    try:
        tokenizer = load(folder, bytes(whole))
    except DataError:
        return
    assert tokenizer.decode(tokenizer.encode("the cat\n")) == "the cat\n"


def test_files_of_other_writers_are_read(tmp_path):
    # As published for GPT-2: split by ByteLevel itself, and merges as Hugging Face writes them.
    ours = samples.trained("gpt2")
    data = json.loads(hf_json.dumps(ours.vocabulary))
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    data["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
    }
    path = tmp_path / "hf.json"
    tokenizers.Tokenizer.from_str(json.dumps(data)).save(str(path))
    assert Tokenizer.from_file(path).hash == ours.hash


def test_ids_may_have_holes(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 300, b"the": 305}
    ours = Tokenizer.from_tiktoken_ranks(ranks, "gpt4", {"<|endoftext|>": 310})
    ours.save(tmp_path / "t.json")
    again = Tokenizer.from_file(tmp_path / "t.json")
    assert again.hash == ours.hash
    assert again.encode("the thy", allowed_special="all") == ours.encode("the thy")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    text = "the thy<|endoftext|>"
    assert theirs.encode(text).ids == ours.encode(text, allowed_special="all")


def test_ignore_merges_survives_the_file(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b"bc": 256, b"abcd": 257}
    ours = Tokenizer.from_tiktoken_ranks(ranks, "gpt2", {})
    ours.save(tmp_path / "t.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    for text in ("abcd", "abcde", "abcd abcd"):
        assert ours.encode(text) == Tokenizer.from_file(tmp_path / "t.json").encode(text)
        assert ours.encode(text) == theirs.encode(text).ids


def test_saving_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")
    broken = small()
    broken._engine.source = None  # pyright: ignore
    with pytest.raises(AttributeError):
        broken.save(path)
    assert path.read_text() == "old"
    small().save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]
    with pytest.raises(UsageError, match=r"no/t\.json: cannot write the tokenizer"):
        small().save(tmp_path / "no" / "t.json")

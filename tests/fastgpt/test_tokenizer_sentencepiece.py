"""LLaMA-style sentencepiece models behind the same interface; the library is the oracle."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import sentencepiece
import tokenizer_samples as samples
from hypothesis import given, settings

from fastgpt.errors import DataError
from fastgpt.tokenizer import Tokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    tokenizer = train_sentencepiece(samples.english(300_000).split("\n\n"), 1000, path)
    return tokenizer, sentencepiece.SentencePieceProcessor(model_file=str(path)), path


def test_it_is_llama_style(model):
    tokenizer, library, _ = model
    assert tokenizer.vocab_size == library.GetPieceSize() == 1000
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2}
    assert (tokenizer.bos_id, tokenizer.eot_id) == (1, 2)
    assert [tokenizer.decode_bytes([i]) for i in range(3, 259)] == [bytes([i]) for i in range(256)]
    pieces = [library.IdToPiece(i) for i in range(259, 1000)]
    assert any(len(piece) > 5 for piece in pieces)
    assert not any(char.isdigit() for piece in pieces for char in piece if len(piece) > 1)


@settings(max_examples=150, deadline=None)
@given(text=samples.nasty_text)
def test_ids_and_text_as_the_library(model, text):
    tokenizer, library, _ = model
    ids = tokenizer.encode(text)
    assert ids == library.EncodeAsIds(text)
    assert tokenizer.decode(ids) == library.DecodeIds(ids)


def test_real_text_round_trips(model):
    tokenizer, library, _ = model
    text = samples.english(300_000)
    ids = tokenizer.encode_to_numpy(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == library.EncodeAsIds(text)
    assert tokenizer.decode(ids) == text
    # One byte more than the text: the space that the model puts in front.
    assert tokenizer.bytes_per_id()[ids].sum() == len(text.encode()) + 1
    rng = random.Random(0)
    texts = [samples.random_text(rng) for _ in range(200)]
    assert [a.tolist() for a in tokenizer.encode_batch(texts)] == library.EncodeAsIds(texts)


def test_special_tokens_only_where_allowed(model):
    tokenizer, _, _ = model
    assert {1, 2}.isdisjoint(tokenizer.encode("<s>a</s>"))
    ids = tokenizer.encode("<s>a</s>b", allowed_special="all")
    assert [i for i in ids if i in (1, 2)] == [1, 2]
    assert ids[0] == 1
    with pytest.raises(ValueError, match="not a special token"):
        tokenizer.encode("a", allowed_special={"<x>"})


def test_files_copies_and_hash(model, tmp_path):
    tokenizer, _, path = model
    tokenizer.save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()
    others = [
        Tokenizer.from_file(tmp_path / "tokenizer.json"),
        Tokenizer.from_file(tmp_path / "tokenizer.model"),
        pickle.loads(pickle.dumps(tokenizer)),
        copy.deepcopy(tokenizer),
    ]
    for other in others:
        assert other.hash == tokenizer.hash
        assert other.encode("Hello") == tokenizer.encode("Hello")
    assert samples.trained("gpt2").hash != tokenizer.hash


def test_errors_name_the_file(model, tmp_path):
    tokenizer, _, path = model
    bad = tmp_path / "bad.model"
    for data in (b"", b"no protobuf", path.read_bytes()[:5000], b"\xff" * 100):
        bad.write_bytes(data)
        with pytest.raises(DataError, match=r"bad\.model: "):
            Tokenizer.from_file(bad)
    pointer = tmp_path / "tokenizer.json"
    pointer.write_text('{"type": "sentencepiece", "model_file": "../bad.model"}')
    with pytest.raises(DataError, match="model_file: not the name of a file beside"):
        Tokenizer.from_file(pointer)
    for ids in ([-1], [1000]):
        with pytest.raises(ValueError, match="at position 0 is not in the vocabulary of 1000"):
            tokenizer.decode(ids)
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match="sentencepiece cannot train"):
        train_sentencepiece(["too little text"], 30_000, tmp_path / "x.model")

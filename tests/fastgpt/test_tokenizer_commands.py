"""``python -m fastgpt.tokenizer``: what the commands write, print and refuse."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
from itertools import chain

import numpy as np
import pytest
import tokenizer_samples as samples

from fastgpt.bpe import commands
from fastgpt.data.documents import read_documents
from fastgpt.data.encode_files import encode_file
from fastgpt.data.shards import open_shard
from fastgpt.errors import DataError, UsageError
from fastgpt.tokenizer import Tokenizer

EOT = "<|endoftext|>"


def run(*argv) -> None:
    commands.main([str(word) for word in argv])


def feed(monkeypatch, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    (path / "a.txt").write_text(samples.english(60_000).replace("\r", ""))
    lines = [json.dumps({"text": f"Document {i}: naïve 日本."}) for i in range(50)]
    (path / "b.jsonl").write_text("\n".join(lines))
    run("train", path / "a.txt", path / "b.jsonl", "--vocab-size", 600, "--out", path / "t.json")
    return path


def test_train_writes_what_the_library_trains(folder, tmp_path, capsys):
    run("train", folder / "a.txt", folder / "b.jsonl", "--vocab-size", 600, "--threads", 3,
        "--out", tmp_path / "t.json")  # fmt: skip
    assert "600 ids" in capsys.readouterr().out
    assert (tmp_path / "t.json").read_bytes() == (folder / "t.json").read_bytes()
    run("train", folder / "a.txt", "--vocab-size", 400, "--pattern", "gpt2", "--special-tokens",
        "<a>", "<b>", "--reserved-special-tokens", 2, "--min-frequency", 3, "--max-token-length", 4,
        "--initial-alphabet", "é", "--out", tmp_path / "vocab.json")  # fmt: skip
    tokenizer = Tokenizer.from_file(tmp_path / "vocab.json")
    names = ["<a>", "<b>", "<|reserved_0|>", "<|reserved_1|>"]
    assert tokenizer.special_tokens == {name: 396 + i for i, name in enumerate(names)}
    assert tokenizer.bytes_per_id().max() == 4
    assert tokenizer.token_bytes(256) == "é".encode()


def test_encode_and_decode_a_shard(folder, tmp_path, capsys):
    run("encode", folder / "b.jsonl", "--tokenizer", folder / "t.json", "--out", tmp_path / "x.bin")
    assert "in 50 documents" in capsys.readouterr().out
    run("decode", "--tokenizer", folder / "t.json", "--shard", tmp_path / "x.bin")
    out = capsys.readouterr().out
    assert out == "".join(f"Document {i}: naïve 日本.{EOT}" for i in range(50))


def test_encode_and_decode_standard_streams(folder, monkeypatch, capsys):
    tokenizer = Tokenizer.from_file(folder / "t.json")
    text = f"naïve 日本 words {EOT}\n" * 9
    for flags, allowed in [((), frozenset()), (("--allow-special",), "all")]:
        feed(monkeypatch, text)
        run("encode", "--tokenizer", folder / "t.json", *flags)
        ids = capsys.readouterr().out
        assert [int(word) for word in ids.split()] == tokenizer.encode(
            text, allowed_special=allowed
        )
        feed(monkeypatch, ids)
        run("decode", "--tokenizer", folder / "t.json")
        assert capsys.readouterr().out == text


def test_inspect_measures_each_text(folder, capsys):
    run("inspect", "--tokenizer", folder / "t.json", folder / "a.txt", folder / "b.jsonl",
        "--longest", 3)  # fmt: skip
    out = capsys.readouterr().out
    tokenizer = Tokenizer.from_file(folder / "t.json")
    assert f"600 ids, hash {tokenizer.hash[:12]}" in out
    assert "split pattern: gpt4" in out
    assert f"special tokens: 1: {EOT} 599" in out
    longest = int(np.argmax(tokenizer.bytes_per_id()))
    assert repr(tokenizer.token_bytes(longest).decode()) in out
    texts = [f"Document {i}: naïve 日本." for i in range(50)]
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    (line,) = (line for line in out.splitlines() if line.endswith("b.jsonl"))
    assert line.split()[:3] == [str(size), str(tokens), f"{size / tokens:.3f}"]


def test_bench_checks_before_it_times(folder, capsys, monkeypatch):
    run("bench", folder / "a.txt", "--tokenizer", folder / "t.json", "--megabytes", 0.02)
    out = capsys.readouterr().out
    for name in ("fastgpt", "tiktoken", "tokenizers"):
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [name])
        assert all(float(word) > 0 for word in line.split()[1:])
    monkeypatch.setitem(commands._PEERS, "tiktoken", lambda t: (lambda text: [1], t.decode))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    run("bench", folder / "a.txt", "--tokenizer", folder / "t.json", "--megabytes", 0.02)
    out = capsys.readouterr().out
    assert "tiktoken  gives other ids" in out
    assert "tokenizers  not installed" in out


def test_what_cannot_be_done_is_one_line(folder, tmp_path, monkeypatch):
    tokenizer = ("--tokenizer", folder / "t.json")
    for argv, kind, complaint in [
        (("train", "--vocab-size", 300), UsageError, "no data given"),
        (("train", folder / "a.txt", "--vocab-size", 3), UsageError, "vocab_size 3 is not between"),
        (("train", folder / "a.txt", "--pattern", "gpt9"), UsageError, "unknown pattern 'gpt9'"),
        (("train", tmp_path / "no.txt"), DataError, r"no\.txt"),
        (("train", tmp_path / "no.txt", "--out", tmp_path / "no" / "t"), UsageError, "--out.*no/t"),
        (("encode", folder / "a.txt", *tokenizer), UsageError, "--out is missing"),
        (("encode", "--out", "x.bin", *tokenizer), UsageError, "--out: name the files"),
        (("inspect", "--tokenizer", tmp_path / "no.json"), DataError, r"no\.json: cannot read"),
        (("decode", *tokenizer, "--shard", folder / "a.txt"), DataError, "not a token shard"),
    ]:
        with pytest.raises(kind, match=complaint) as error:
            run(*argv)
        assert "\n" not in str(error.value)
    feed(monkeypatch, "1 2\n3 x")
    with pytest.raises(DataError, match="standard input: line 2: invalid literal"):
        run("decode", *tokenizer)
    feed(monkeypatch, "1 99999")
    with pytest.raises(UsageError, match="token id 99999 at position 1 is not in"):
        run("decode", *tokenizer)
    feed(monkeypatch, b"ab\xff")
    with pytest.raises(DataError, match="standard input: byte 2: not UTF-8"):
        run("encode", *tokenizer)


def test_the_module_runs_and_loads_no_torch(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-X", "importtime", "-m", "fastgpt.tokenizer"]
    result = subprocess.run([*command, "--help"], env=env, capture_output=True, text=True)
    assert result.returncode == 0
    assert "{train,encode,decode,inspect,bench}" in result.stdout
    assert not any(line.split("|")[-1].strip() == "torch" for line in result.stderr.splitlines())
    missing = [sys.executable, "-m", "fastgpt.tokenizer", "inspect", "--tokenizer", "no.json"]
    result = subprocess.run(missing, env=env, capture_output=True, text=True)
    assert result.returncode == 3
    assert (
        result.stderr == "fastgpt: no.json: cannot read the tokenizer (No such file or directory)\n"
    )


# --- files into shards


def test_a_file_becomes_the_ids_of_its_documents(folder, tmp_path):
    tokenizer = Tokenizer.from_file(folder / "t.json")
    (tmp_path / "c.txt").write_text(f"one\n{EOT}\ntwo words\n{EOT}\nthree")
    shards = []
    for threads in (1, 2, 3):
        seen = []
        done = encode_file(
            [folder / "b.jsonl", tmp_path / "c.txt"], tokenizer, tmp_path / f"{threads}.bin",
            num_threads=threads, progress=lambda *at, seen=seen: seen.append(at),
        )  # fmt: skip
        assert seen[-1][0] == seen[-1][1] > 0
        shards.append((tmp_path / f"{threads}.bin").read_bytes())
    assert len(set(shards)) == 1
    texts = [f"Document {i}: naïve 日本." for i in range(50)] + ["one", "two words", "three"]
    expected = [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts]
    shard = open_shard(
        tmp_path / "1.bin", vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash
    )
    assert shard.tokens.tolist() == list(chain(*expected))
    assert shard.document_ends.tolist() == np.cumsum([len(ids) for ids in expected]).tolist()
    assert (done.documents, done.tokens) == (53, len(shard.tokens))
    assert done.text_bytes == sum(len(text.encode()) for text in texts)


def test_a_long_document_in_pieces_ends_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgpt.data.documents.PIECE_BYTES", 5000)
    tokenizer = Tokenizer.from_file(folder / "t.json")
    path = tmp_path / "long.txt"
    text = "\n".join(f"line {i} of a long document" for i in range(30_000))
    path.write_text(f"{text}\n{EOT}\nshort")
    assert len(list(read_documents([path]))) > 3
    done = encode_file(path, tokenizer, tmp_path / "x.bin")
    expected = [[*tokenizer.encode(part), tokenizer.eot_id] for part in (text, "short")]
    shard = open_shard(
        tmp_path / "x.bin", vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash
    )
    assert shard.tokens.tolist() == list(chain(*expected))
    assert done.documents == 2


def test_memory_does_not_follow_the_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgpt.data.documents.PIECE_BYTES", 1 << 20)
    monkeypatch.setattr("fastgpt.data.encode_files._BATCH_CHARACTERS", 1 << 20)
    tokenizer = Tokenizer.from_file(folder / "t.json")
    path = tmp_path / "long.txt"
    line = "some words that make one line of a document without an end\n"
    peaks = []
    for lines in (200_000, 600_000):  # 12 MB and 36 MB
        path.write_text(line * lines)
        tracemalloc.start()
        encode_file(path, tokenizer, tmp_path / "x.bin", num_threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2e6


def test_a_tokenizer_without_an_end_is_refused(folder, tmp_path):
    tokenizer = Tokenizer.train(["text"], 300, special_tokens=())
    with pytest.raises(UsageError, match=r"has no <\|endoftext\|>"):
        encode_file(folder / "a.txt", tokenizer, tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())

"""Documents to shards: nothing lost, split by documents, finished work found again."""

import hashlib
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import corpus, documents
from fastgpt.data.corpus import choose_validation, tokenize_documents
from fastgpt.data.documents import Document, read_documents
from fastgpt.data.shards import open_shard
from fastgpt.errors import DataError, UsageError

EOT = 256


class ByteTokenizer:
    """One id a byte, and an end of text."""

    vocab_size = 257
    eot_id = EOT

    def __init__(self, name="bytes"):
        self.hash = hashlib.sha256(name.encode()).hexdigest()
        self.encoded = 0

    def encode_batch(self, texts):
        self.encoded += len(texts)
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def bytes_per_id(self):
        return np.array([1] * 256 + [0])


def tokens_of(path, tokenizer):
    return open_shard(path, vocab_size=257, tokenizer_hash=tokenizer.hash)


def texts_of(path, tokenizer):
    shard = tokens_of(path, tokenizer)
    pieces = np.split(shard.tokens, shard.document_ends[:-1].astype(int))
    assert all(piece[-1] == EOT for piece in pieces)
    assert all((piece[:-1] < EOT).all() for piece in pieces)
    return [bytes(piece[:-1].astype(np.uint8)).decode() for piece in pieces]


def as_documents(texts):
    return [Document(text, "memory", i + 1) for i, text in enumerate(texts)]


def tokenize(texts, out_dir, *, val_fraction=0.1, seed=0, tokenizer=None, **options):
    tokenizer = tokenizer or ByteTokenizer()
    stream = as_documents(texts) if isinstance(texts, list) else texts
    data = tokenize_documents(
        stream, tokenizer, out_dir, val_fraction=val_fraction, seed=seed, **options
    )
    return data, texts_of(data.train_path, tokenizer), texts_of(data.val_path, tokenizer)


def check_counts(data, train, val):
    for part, texts in ((data.train, train), (data.val, val)):
        assert part.documents == len(texts)
        assert part.text_bytes == sum(len(text.encode()) for text in texts)
        assert part.tokens == part.text_bytes + len(texts)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(60, 120), st.sampled_from([0.1, 0.3, 0.5]))
def test_documents_are_dealt_whole_and_in_order(tmp_path_factory, seed, n, val_fraction):
    texts = [f"{i:03d} é".ljust(8 + (i * 7 + seed) % 5) for i in range(n)]
    folder = tmp_path_factory.getbasetemp() / "dealt"
    data, train, val = tokenize(texts, folder, val_fraction=val_fraction, seed=seed)
    assert train == [text for text in texts if text not in val]
    assert val == [text for text in texts if text in val]
    assert len(train) + len(val) == n
    check_counts(data, train, val)
    wanted = val_fraction * (data.train.tokens + data.val.tokens)
    assert wanted / 2 - 1 <= data.val.tokens <= wanted + 1


def test_seed_decides_the_split(tmp_path):
    texts = [f"document {i}" for i in range(50)]
    first, again, other = (tokenize(texts, tmp_path, seed=seed)[2] for seed in (0, 0, 1))
    assert first == again != other


def test_a_single_document_is_cut_near_its_end(tmp_path):
    text = "0123456789" * 20
    data, train, val = tokenize([text], tmp_path)
    assert train + val == [text[:181], text[181:]]  # 201 tokens, 20 of them with the last EOT
    check_counts(data, train, val)


def test_few_long_documents_do_not_lose_one_to_validation(tmp_path):
    texts = ["a" * 1000, "b" * 5000, "c" * 2000]
    data, train, val = tokenize(texts, tmp_path, val_fraction=0.05)
    assert train == ["a" * 1000, "b" * 4601, "c" * 2000]
    assert val == ["b" * 399]
    check_counts(data, train, val)


def test_short_documents_and_a_cut_are_put_in_order(tmp_path):
    texts = ["x" * 4000, "short", "y" * 900, "brief", "z" * 900]
    data, train, val = tokenize(texts, tmp_path, val_fraction=0.05)
    assert set(val) >= {"short", "brief"}
    assert val[0].strip("x") == ""
    assert "".join(train + val).count("x") == 4000
    check_counts(data, train, val)


@settings(deadline=None)
@given(
    st.lists(st.integers(2, 400), min_size=2, max_size=40),
    st.floats(1e-4, 0.5),
    st.integers(0, 2**63),
)
def test_choice_leaves_both_sides_something(lengths, val_fraction, seed):
    lengths = np.array(lengths)
    chosen, cut, cut_tokens = choose_validation(lengths, val_fraction, seed)
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    size = lengths[chosen].sum() + cut_tokens
    assert 2 <= size < lengths.sum()
    assert len(chosen) < len(lengths)
    if cut_tokens:
        assert cut not in chosen
        assert 2 <= cut_tokens < lengths[cut]
    wanted = max(2, round(val_fraction * int(lengths.sum())))
    assert size <= wanted or lengths.max() < 4  # more only where nothing can be cut


@pytest.mark.parametrize("texts", [["a"], [""]])
def test_too_little_to_split(tmp_path, texts):
    with pytest.raises(DataError, match="too few to split"):
        tokenize(texts, tmp_path)
    assert os.listdir(tmp_path) == [".lock"]


def test_one_letter_documents(tmp_path):
    data, train, val = tokenize(["a", "b", "c"], tmp_path, val_fraction=0.01)
    assert sorted(train + val) == ["a", "b", "c"]
    assert len(val) == 1
    check_counts(data, train, val)


def test_pieces_become_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 30)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(corpus, "_BATCH_DOCUMENTS", 2)
    texts = ["\n".join(f"line {i} of {k}" for i in range(10 * k)) for k in range(1, 9)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    stream = read_documents([tmp_path / "a.txt"])
    assert sum(1 for _ in stream) > 20
    data, train, val = tokenize(stream, tmp_path / "out", val_fraction=0.2)
    assert sorted(train + val) == sorted(texts)
    check_counts(data, train, val)


def test_copying_in_portions_keeps_the_ends(tmp_path, monkeypatch):
    texts = [f"{i}" * (1 + i % 30) for i in range(200)]
    whole = tokenize(texts, tmp_path / "a")
    monkeypatch.setattr(corpus, "_COPY_TOKENS", 7)
    assert tokenize(texts, tmp_path / "b")[1:] == whole[1:]


def test_special_text_stays_text(tmp_path):
    texts = [f"say <|endoftext|> {i}" for i in range(20)]
    _, train, val = tokenize(texts, tmp_path)
    assert sorted(train + val) == sorted(texts)


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        lines = [json.dumps({"text": f"{name} {i}", "other": "o" * i}) for i in range(1, 40)]
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, '{"text": "", "other": "x"}', ""]))
    return folder


def test_finished_shards_are_used_again(tmp_path, files):
    out = tmp_path / "out"
    tokenizer = ByteTokenizer()
    first = tokenize(read_documents([files]), out, tokenizer=tokenizer)
    encoded = tokenizer.encoded
    again = tokenize(read_documents([files]), out, tokenizer=tokenizer)
    assert tokenizer.encoded == encoded
    assert (first[0].reused, again[0].reused) == (False, True)
    assert again[1:] == first[1:]
    for field in ("directory", "train", "val", "empty", "bad"):
        assert getattr(again[0], field) == getattr(first[0], field)
    assert first[0].empty == 2
    names = {"train.bin", "val.bin", "train.bin.verified", "val.bin.verified", "meta.json", ".lock"}
    assert set(os.listdir(out)) == names


CHANGES = {
    "a file": lambda folder, out: (folder / "a.jsonl").write_text('{"text": "new"}\n' * 50),
    "a time": lambda folder, out: os.utime(folder / "a.jsonl", ns=(1, 1)),
    "one more file": lambda folder, out: (folder / "c.txt").write_text("more"),
    "a shard gone": lambda folder, out: (out / "val.bin").unlink(),
    "meta gone": lambda folder, out: (out / "meta.json").unlink(),
    "meta damaged": lambda folder, out: (out / "meta.json").write_text('{"inputs": '),
    "meta of another kind": lambda folder, out: (out / "meta.json").write_text("[]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_inputs_are_encoded_anew(tmp_path, files, change):
    tokenize(read_documents([files]), tmp_path / "out")
    CHANGES[change](files, tmp_path / "out")
    assert not tokenize(read_documents([files]), tmp_path / "out")[0].reused


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"val_fraction": 0.2}, {"tokenizer": ByteTokenizer("other")}]
)
def test_changed_options_are_encoded_anew(tmp_path, files, options):
    tokenize(read_documents([files]), tmp_path / "out")
    assert not tokenize(read_documents([files]), tmp_path / "out", **options)[0].reused
    stream = read_documents([files], text_key="other")
    assert not tokenize(stream, tmp_path / "out")[0].reused


def test_bad_input_leaves_nothing_behind(tmp_path, files):
    out = tmp_path / "out"
    tokenize(read_documents([files]), out)
    with open(files / "b.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match=r"b\.jsonl:41: invalid JSON"):
        tokenize(read_documents([files]), out)
    assert not (out / "meta.json").exists()  # so the shards of the old text are not taken for new
    assert not (out / "tokens.tmp").exists()
    data, _, _ = tokenize(read_documents([files], on_error="skip"), out)
    assert (data.bad, data.empty) == (1, 2)


def test_killed_while_encoding(tmp_path, files):
    out = tmp_path / "out"
    code = (
        "import os, sys; sys.path[:0] = sys.argv[3:]\n"
        "from test_data_corpus import ByteTokenizer, tokenize, read_documents\n"
        "stop = lambda *_: os.kill(os.getpid(), 9)\n"
        "tokenize(read_documents([sys.argv[1]]), sys.argv[2], progress=stop)"
    )
    paths = [os.path.dirname(__file__), *sys.path]
    run = subprocess.run([sys.executable, "-c", code, files, out, *paths], check=False)
    assert run.returncode == -9
    assert (out / "tokens.tmp").exists()
    assert not tokenize(read_documents([files]), out)[0].reused
    assert not list(out.glob("*.tmp"))


def test_processes_take_turns(tmp_path, files):
    tokenizers = [ByteTokenizer() for _ in range(4)]
    results = []

    def run(tokenizer):
        results.append(tokenize(read_documents([files]), tmp_path / "out", tokenizer=tokenizer))

    threads = [threading.Thread(target=run, args=(tokenizer,)) for tokenizer in tokenizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert sum(tokenizer.encoded > 0 for tokenizer in tokenizers) == 1
    assert sorted(data.reused for data, _, _ in results) == [False, True, True, True]


def test_progress(tmp_path, files, monkeypatch):
    monkeypatch.setattr(corpus, "_BATCH_DOCUMENTS", 10)
    calls = []
    tokenize(read_documents([files]), tmp_path / "a", progress=lambda *call: calls.append(call))
    total = sum(path.stat().st_size for path in files.iterdir())
    assert len(calls) == 8
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (total, total)
    calls.clear()
    texts = ["é" * 10] * 25
    tokenize(texts, tmp_path / "b", progress=lambda *call: calls.append(call))
    assert calls == [(200, 0), (400, 0), (500, 0)]


def test_refusals(tmp_path):
    for val_fraction in (0, -0.1, 0.6, float("nan")):
        with pytest.raises(UsageError, match="outside"):
            tokenize(["text"], tmp_path, val_fraction=val_fraction)
    with pytest.raises(DataError, match="no documents"):
        tokenize([], tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write"):
        tokenize(["text"], tmp_path / "file" / "out")


def test_foreign_ids_are_refused(tmp_path):
    class Wrong(ByteTokenizer):
        vocab_size = 300

        def encode_batch(self, texts):
            return [np.array([300])] * len(texts)

    with pytest.raises(ValueError, match=r"300 outside \[0, 300\)"):
        tokenize(["text"], tmp_path, tokenizer=Wrong())

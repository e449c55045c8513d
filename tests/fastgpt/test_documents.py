"""Reading documents: formats, places named by errors, memory bounds."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import documents
from fastgpt.data.documents import Document, Documents, embedded_text, read_documents
from fastgpt.errors import DataError, UsageError

SEPARATOR = "<|endoftext|>\n"


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def texts(*paths, **options):
    return [document.text for document in read_documents(paths, **options)]


def test_text_with_separators(tmp_path):
    path = write(tmp_path / "a.txt", f"one\ntwo\n{SEPARATOR}three<|endoftext|>\n{SEPARATOR}last")
    assert list(read_documents([path])) == [
        Document("one\ntwo", str(path), 1),
        Document("three<|endoftext|>", str(path), 4),
        Document("last", str(path), 6),
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\n\nb\n", ["a\n\nb"]),
        (b"a\n\n", ["a\n"]),  # only the line end that closes the text goes
        (b"\xef\xbb\xbfa\r\nb\r\n<|endoftext|>\r\nc\r\n", ["a\nb", "c"]),
        (b"a\rb", ["a\rb"]),
        (b"nul \0 inside", ["nul \0 inside"]),
        (b"<|endoftext|>\na\n<|endoftext|>\n \n<|endoftext|>\n", ["a"]),
        (b"\xef\xbb\xbf\n<|endoftext|>\nx", ["x"]),
        (b" <|endoftext|>\nx", [" <|endoftext|>\nx"]),  # not a separator line
    ],
)
def test_text_details(tmp_path, data, expected):
    assert texts(write(tmp_path / "a.txt", data)) == expected


def test_jsonl_details(tmp_path):
    lines = b'\xef\xbb\xbf{"text": "a\\r\\nb", "x": 1}\r\n\n  \n'
    lines += b'{"x": [{}], "text": "\\u0000\\ud83d\\ude00"}'
    found = list(read_documents([write(tmp_path / "a.jsonl", lines)]))
    assert [(d.text, d.line) for d in found] == [("a\r\nb", 1), ("\0\U0001f600", 4)]


def test_directories_are_read_in_sorted_order(tmp_path):
    names = [f"{first}/{i}.txt" for first in "cab" for i in (3, 1, 2, 10)]
    for name in names:
        write(tmp_path / name, name)
    assert texts(tmp_path) == sorted(names)


def test_other_key(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "b", "text": "t"}\n')
    assert texts(path, text_key="body") == ["b"]


def test_empty_documents_are_counted(tmp_path):
    stream = read_documents(
        [write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": " \\n"}\n{"text":"x"}')]
    )
    for _ in range(2):  # each pass counts anew
        assert [d.text for d in stream] == ["x"]
        assert (stream.stats.empty, stream.stats.bad) == (2, 0)


def test_compression_directories_and_order(tmp_path):
    write(tmp_path / "d" / "b.txt.xz", lzma.compress(b"b"))
    write(tmp_path / "d" / "a" / "z.jsonl.gz", gzip.compress(b'{"text": "az"}'))
    write(tmp_path / "d" / "c.TXT.gz", gzip.compress(b"c"))
    write(tmp_path / "d" / "q.jsonl.xz", lzma.compress(b'{"text": "q"}'))
    write(tmp_path / "d" / "notes.md", b"not a text file")
    write(tmp_path / "d" / ".git" / "x.txt", b"hidden")
    write(tmp_path / "d" / ".x.txt", b"hidden")
    first = write(tmp_path / "z.jsonl.txt", b'{"text": "this is plain text"}')
    assert texts(first, tmp_path / "d") == ['{"text": "this is plain text"}', "az", "b", "c", "q"]


def test_a_file_named_twice_is_read_once(tmp_path):
    """Twice, its documents would be learned and held out."""
    one = write(tmp_path / "d" / "one.txt", b"1")
    write(tmp_path / "d" / "two.txt", b"2")
    assert texts(tmp_path / "d", one, tmp_path / "d" / ".." / "d") == ["1", "2"]
    assert texts(tmp_path / "d" / "two.txt", tmp_path / "d") == ["2", "1"]


LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=8)
LINES = st.lists(LINE.filter(lambda line: line != "<|endoftext|>"), min_size=1, max_size=4)
TEXT = LINES.map("\n".join).filter(lambda text: text.strip() != "")


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=6), st.sampled_from([1, 5, 20, 1000]))
def test_both_formats_return_what_was_written(tmp_path_factory, written, block_bytes):
    folder = tmp_path_factory.getbasetemp() / "roundtrip"
    plain = write(folder / "a.txt", "".join(f"{text}\n{SEPARATOR}" for text in written))
    json_lines = write(folder / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in written))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BLOCK_BYTES", block_bytes)
        assert texts(plain) == written
        assert texts(json_lines) == written


BAD_LINES = [
    (b'{"text": "a"', "invalid JSON"),
    (b"[" * 10_000, "invalid JSON"),
    (b"[" * 100_000 + b"]" * 100_000, ""),
    (b'{"text": ' + b'{"a":' * 100_000, "nested too deeply"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a number is too long"),
    (b'{"txet": "a"}', "no key 'text' (the line has 'txet')"),
    (b'{"text": null}', "NoneType, not a string"),
    (b'{"text": ["a"]}', "list, not a string"),
    (b'["text"]', "a JSON object is expected, not list"),
    (b'{"text": "a\\ud800b"}', "U+D800, half of a surrogate pair, at character 1"),
    (b'{"text": "\xff"}', "byte 24 is not valid UTF-8"),
    (b'{"text": "\xed\xa0\x80"}', "byte 24 is not valid UTF-8"),
    (b"\0", "invalid JSON"),
]


@pytest.mark.parametrize("block_bytes", [1, 1 << 18])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_json_line(tmp_path, monkeypatch, block_bytes, line, reason):
    monkeypatch.setattr(documents, "_BLOCK_BYTES", block_bytes)
    good = b'{"text": "a"}\n'
    path = write(tmp_path / "a.jsonl", good + line + b"\n" + good)
    with pytest.raises(DataError) as caught:
        texts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 400
    stream = read_documents([path], on_error="skip")
    assert [d.line for d in stream] == [1, 3]
    assert stream.stats.bad == 1


@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 18])
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"ok\n<|endoftext|>\ntwo\n\nx\xffy\n", ":5: byte 23 is not valid UTF-8"),
        ("a.txt", b"\xef\xbb\xbfa\n\xff", ":2: byte 5 is not valid UTF-8"),
        (
            "a.txt",
            "wide".encode("utf-16"),
            ":1: byte 0 is not valid UTF-8; convert the file (iconv -f UTF-16",
        ),
        ("a.txt", b"", ": the file is empty"),
        ("a.jsonl", b"", ": the file is empty"),
        ("a.txt.gz", gzip.compress(b""), ": the file is empty"),
        ("a.txt.xz", lzma.compress(b""), ": the file is empty"),
        ("a.txt", b" \n\n", ": no documents (1 empty and 0 bad ones left out)"),
        ("a.jsonl", b"\n\n", ": no documents"),
        ("a.jsonl", b"\xef\xbb\xbf", ": no documents"),
        ("a.txt", b"\xef\xbb\xbf", ": no documents"),
        ("a.txt.gz", b"no gzip at all", ": near byte "),
        ("a.txt.gz", gzip.compress(bytes(range(256)) * 99)[:-9], ": near byte "),
        ("a.txt.xz", lzma.compress(b"abc" * 999)[:-9], ": near byte "),
        ("a.jsonl.xz", b"no xz at all", ": near byte "),
    ],
)
def test_bad_file(tmp_path, monkeypatch, block_bytes, name, data, message):
    monkeypatch.setattr(documents, "_BLOCK_BYTES", block_bytes)
    path = write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        texts(path)
    assert f"{path}{message}" in str(caught.value)


def test_damaged_gzip_content(tmp_path):
    data = bytearray(gzip.compress(json.dumps({"text": "some text " * 50}).encode()))
    data[len(data) // 2] ^= 0xFF
    path = write(tmp_path / "a.jsonl.gz", bytes(data))
    with pytest.raises(DataError, match="near byte"):
        texts(path, on_error="skip")  # a file that cannot be read through is an error either way


def test_skip_leaves_out_the_bad_document_only(tmp_path):
    path = write(tmp_path / "a.txt", b"one\n<|endoftext|>\n\xff\n<|endoftext|>\nthree")
    empty = write(tmp_path / "b.txt", b"")
    stream = read_documents([path, empty], on_error="skip")
    assert [d.text for d in stream] == ["one", "three"]
    assert stream.stats.bad == 2


def test_bad_paths(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"gone\.txt: no such file"):
        read_documents([tmp_path / "gone.txt"])
    with pytest.raises(DataError, match="no text files below it"):
        read_documents([tmp_path / "empty"])
    with pytest.raises(UsageError, match="unknown kind of file"):
        read_documents([write(tmp_path / "a.pdf", b"%PDF")])
    with pytest.raises(DataError, match="not a regular file"):
        read_documents(["/dev/null"])
    with pytest.raises(UsageError, match="no data given"):
        read_documents([])


def test_a_file_that_vanishes(tmp_path):
    path = write(tmp_path / "a.txt", b"x")
    stream = read_documents([path])
    path.unlink()
    for use in (list, Documents.fingerprint):
        with pytest.raises(DataError, match="cannot open: No such file"):
            use(stream)


def test_line_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 10)
    assert texts(write(tmp_path / "a.txt", b"a" * 99 + b"\n" + b"b" * 100)) != []
    path = write(tmp_path / "b.txt", b"ok\n" + b"a" * 100 + b"\n")
    with pytest.raises(DataError, match=r"b\.txt:2: byte 3: a line of more than"):
        texts(path, on_error="skip")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from(["word\n", " indented\n", "\n", "é\r\n"]), min_size=30, max_size=90)
)
def test_long_documents_come_in_pieces(tmp_path_factory, lines):
    text = "x\n" + "".join(lines)
    path = write(tmp_path_factory.getbasetemp() / "long" / "a.txt", f"{text}{SEPARATOR}second")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", 40)
        patch.setattr(documents, "_BLOCK_BYTES", 1)
        *pieces, second = read_documents([path])
    assert "".join(p.text for p in pieces) == text.replace("\r\n", "\n").removesuffix("\n")
    assert [p.continued for p in pieces] == [False] + [True] * (len(pieces) - 1)
    assert all(len(p.text.encode()) <= 4 * 40 + 10 for p in pieces)
    assert (second.text, second.continued) == ("second", False)
    for before, piece in pairwise(pieces):
        assert piece.line == before.line + before.text.count("\n")


def test_white_space_is_not_torn_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 10)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 1)
    path = write(tmp_path / "a.txt", "a long line\n  \nx\ny\n")
    assert texts(path) == ["a long line\n  \nx\n", "y"]


def test_a_document_without_a_good_place_to_cut_is_cut_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 10)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 1)
    path = write(tmp_path / "a.txt", " word\n" * 100)
    assert [len(document.text) for document in read_documents([path])] == [42] * 14 + [11]


def test_a_bad_first_piece_does_not_join_its_rest_to_the_document_before(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 4)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 1)
    path = write(tmp_path / "a.txt", b"one\n<|endoftext|>\n\xffbad\nrest\nmore\n")
    found = list(read_documents([path], on_error="skip"))
    assert [(d.text, d.continued) for d in found] == [
        ("one", False),
        ("rest\n", False),
        ("more", True),
    ]


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 1 << 16)
    path = write(
        tmp_path / "a.txt.gz", gzip.compress((b"some words in a line " * 9 + b"\n") * 40_000, 1)
    )
    tracemalloc.start()
    total = sum(len(document.text) for document in read_documents([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 7_599_999
    assert peak < 3 << 20


def test_progress_and_fingerprint(tmp_path):
    a, b = write(tmp_path / "a.txt", b"a"), write(tmp_path / "b.txt", b"bcd")
    stream = read_documents([a, b])
    assert stream.bytes_total == 4
    assert [stream.bytes_done for _ in stream] == [1, 4]
    assert stream.bytes_done == 4
    before = stream.fingerprint()
    assert before == json.loads(json.dumps(before))
    assert before == read_documents([a, b]).fingerprint()
    assert before != read_documents([b, a]).fingerprint()
    assert before != read_documents([a, b], text_key="x").fingerprint()
    os.utime(b, ns=(1, 1))
    assert before != stream.fingerprint()


def test_embedded_text():
    found = list(read_documents([embedded_text()]))
    assert len(found) == 999
    assert sum(len(d.text.encode()) for d in found) > 4_700_000


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = write(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(UsageError, match=r"pip install 'fastgpt-trainer\[data\]'"):
        read_documents([path])


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": ["a", None, "", "é" * 1000], "n": [1, 2, 3, 4]}), path)
    with pytest.raises(DataError, match="row 2: 'text' is NoneType"):
        texts(path)
    stream = read_documents([path], on_error="skip")
    assert [(d.text, d.line) for d in stream] == [("a", 1), ("é" * 1000, 4)]
    assert (stream.stats.empty, stream.stats.bad) == (1, 1)
    with pytest.raises(DataError, match=r"no column 'body' \(it has text, n\)"):
        texts(path, text_key="body")
    with pytest.raises(DataError, match="row 1: 'n' is int"):
        texts(path, text_key="n")
    pq.write_table(pa.table({"text": pa.array(["x"], pa.large_string())}), other)
    assert texts(other) == ["x"]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), other)
    with pytest.raises(DataError, match="no rows"):
        texts(other)
    blob = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": blob}), other)
    with pytest.raises(DataError, match="row 2: byte 0 of the text is not valid UTF-8"):
        texts(other)
    write(path, path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a sound Parquet file"):
        texts(path)


def test_importing_the_data_modules_does_not_import_torch():
    code = "import sys, fastgpt.data.batches; sys.exit(bool({'torch', 'pyarrow'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.full
def test_a_line_of_100_megabytes(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "' + b"long " * 20_000_000 + b'"}\n')
    assert [len(text) for text in texts(path)] == [100_000_000]

"""Token shards: the layout as documented, damage of every byte, the note of a verified file."""

import json
import os
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import shards
from fastgpt.data.shards import ShardWriter, open_shard
from fastgpt.errors import DataError, UsageError

HASH = "ab" * 32
IDENTITY = {"vocab_size": 1000, "tokenizer_hash": HASH}


def layout(tokens, ends, *, vocab_size=1000, item=2, digest=HASH, version=1, count=None):
    """Build a shard's bytes from the table in the docstring, independently of the writer."""
    payload = b"".join(struct.pack({2: "<H", 4: "<I"}[item], token) for token in tokens)
    payload += bytes(-len(payload) % 8)
    blocks = [payload[i : i + (4 << 20)] for i in range(0, len(payload), 4 << 20)]
    trailer = b"".join(struct.pack("<Q", end) for end in ends)
    trailer += b"".join(struct.pack("<I", zlib.crc32(block)) for block in blocks)
    header = b"FGPTBIN1" + struct.pack("<IIII", version, item, vocab_size, zlib.crc32(trailer))
    count = len(tokens) if count is None else count
    header += struct.pack("<QQ", count, len(ends)) + bytes.fromhex(digest)
    header = header.ljust(124, b"\0")
    return header + struct.pack("<I", zlib.crc32(header)) + payload + trailer


def write(path, tokens, ends=(), **identity):
    with ShardWriter(path, **(IDENTITY | identity)) as writer:
        writer.append(np.array(tokens), ends)
    return path


def put(tmp_path, data):
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    return path


def error(path, **identity):
    with pytest.raises(DataError) as caught:
        open_shard(path, **(IDENTITY | identity))
    message = str(caught.value)
    assert message.startswith(f"{path}: byte ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=9), min_size=1), st.booleans()
)
def test_written_file_is_the_documented_layout(tmp_path_factory, documents, wide):
    if not wide:
        documents = [[token % 65_536 for token in document] for document in documents]
    vocab_size = 70_001 if wide else 65_536
    path = tmp_path_factory.getbasetemp() / "layout.bin"
    with ShardWriter(path, vocab_size=vocab_size, tokenizer_hash=HASH) as writer:
        for document in documents:
            half = len(document) // 2
            writer.append(np.array(document[:half], dtype=np.int32))
            writer.append(np.array(document[half:], dtype=np.uint64), [len(document) - half])
    tokens = [token for document in documents for token in document]
    ends = np.cumsum([len(document) for document in documents]).tolist()
    expected = layout(tokens, ends, vocab_size=vocab_size, item=4 if wide else 2)
    assert path.read_bytes() == expected
    path.with_name("layout.bin.verified").unlink()
    shard = open_shard(path, vocab_size=vocab_size, tokenizer_hash=HASH)
    assert shard.tokens.tolist() == tokens
    assert shard.tokens.dtype == (np.uint32 if wide else np.uint16)
    assert shard.document_ends.tolist() == ends
    assert len(shard) == len(tokens)


def test_several_blocks(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1000, 5_000_001)
    path = tmp_path / "a.bin"
    with ShardWriter(path, **IDENTITY) as writer:
        for part in np.array_split(tokens, 3):
            writer.append(part, [7, len(part)])
    os.remove(f"{path}.verified")
    shard = open_shard(path, **IDENTITY)
    assert np.array_equal(shard.tokens, tokens)
    assert len(shard.document_ends) == 6
    data = bytearray(path.read_bytes())
    data[128 + (8 << 20) + 5] ^= 1
    put(tmp_path, data)
    assert error(path).startswith(
        f"byte {128 + (8 << 20)}: the 1611400 bytes from here are damaged"
    )


def test_an_open_document_ends_with_the_shard(tmp_path):
    shard = open_shard(write(tmp_path / "a.bin", [1, 2, 3], [2]), **IDENTITY)
    assert shard.document_ends.tolist() == [2, 3]


def test_every_flipped_byte_is_noticed(tmp_path):
    data = layout([5, 6, 7, 999, 1], [2, 5])
    path = put(tmp_path, data)
    open_shard(path, **IDENTITY)
    for place in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= flip
            put(tmp_path, damaged)
            if place >= 128:  # same size, perhaps the same tick of the clock: let the time differ
                os.utime(path, ns=(place, place * 1000 + flip))
            error(path)


def test_every_truncation_is_noticed(tmp_path):
    data = layout([5, 6, 7, 999, 1], [2, 5])
    for size in range(len(data)):
        error(put(tmp_path, data[:size]))
    error(put(tmp_path, data + b"\0"))


WHOLE = layout([5, 6, 7, 999], [2, 4])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "byte 0: the file is empty"),
        (b"F", "byte 0: not a token shard (wrong magic)"),
        (b"text, an odd number of bytes", "byte 0: not a token shard (wrong magic)"),
        (np.array([20240520, 1, 9], dtype="<i4").tobytes() * 99, "byte 0: not a token shard"),
        (np.frombuffer(WHOLE, "<u2").astype(">u2").tobytes(), "byte 0: not a token shard"),
        (WHOLE[:127], "byte 127: the file ends inside its header"),
        (WHOLE[:-9], f"byte {len(WHOLE) - 9}: {len(WHOLE) - 9} bytes, the header promises"),
        (layout([5], [1], version=2), "byte 8: version 2, this program reads 1"),
        (layout([5], [1])[:12] + b"\3" + layout([5], [1])[13:], "byte 124: the header is damaged"),
        (layout([], []), "byte 24: 0 tokens in 0 documents"),
        (layout([5, 6], []), "byte 24: 2 tokens in 0 documents"),
        (layout([5, 6, 7], [1, 1, 3]), "byte 136: document ends that do not rise"),
        (layout([5, 6], [0, 2]), "byte 136: document ends that do not rise"),
        (layout([5, 6, 7], [2, 1, 3]), "byte 136: document ends that do not rise"),
        (layout([5, 6, 7], [1, 2]), "byte 136: document ends that do not rise"),
        (layout([5, 6], [2], count=1 << 60), "byte 148: 148 bytes, the header promises"),
        (
            layout([5, 1000, 7, 999], [2, 4]),
            "byte 130: token id 1000 outside the vocabulary of 1000",
        ),
        (
            layout([5, 70_000], [2], item=4),
            "byte 132: token id 70000 outside the vocabulary of 1000",
        ),
        (
            layout([1], [1], digest="00" * 32),
            "byte 40: written with tokenizer 000000000000, this run",
        ),
        (layout([1], [1], vocab_size=999), "byte 16: vocabulary of 999, the tokenizer has 1000"),
    ],
)
def test_bad_shards(tmp_path, data, message):
    path = put(tmp_path, data)
    assert error(path).startswith(message)


def test_other_item_size_with_a_sound_checksum(tmp_path):
    header = bytearray(layout([1], [1])[:124])
    header[12] = 3
    data = bytes(header) + struct.pack("<I", zlib.crc32(header)) + layout([1], [1])[128:]
    assert error(put(tmp_path, data)).startswith("byte 12: 3 bytes per token, not 2 or 4")


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match=r"gone\.bin: cannot read: No such file"):
        open_shard(tmp_path / "gone.bin", **IDENTITY)
    with pytest.raises(DataError, match="Is a directory"):
        open_shard(tmp_path, **IDENTITY)


@pytest.fixture
def passes(monkeypatch):
    """Count the passes over payloads."""
    done = []
    verify = shards._verify
    monkeypatch.setattr(shards, "_verify", lambda *args: (done.append(args[0]), verify(*args)))
    return done


def test_payload_is_read_once(tmp_path, passes):
    path = put(tmp_path, WHOLE)
    for _ in range(3):
        open_shard(path, **IDENTITY)
    assert len(passes) == 1
    os.utime(path, ns=(1, 1))  # a changed file is read again
    for _ in range(2):
        open_shard(path, **IDENTITY)
    assert len(passes) == 2
    put(tmp_path, layout([5, 6, 8, 999], [2, 4]))  # the same size and time, another header
    os.utime(path, ns=(1, 1))
    open_shard(path, **IDENTITY)
    assert len(passes) == 3


def test_the_writer_leaves_the_note(tmp_path, passes):
    open_shard(write(tmp_path / "a.bin", [1, 2]), **IDENTITY)
    assert passes == []


@pytest.mark.parametrize("note", [b"", b"null", b"[" * 100_000, b"\xff", b'{"bytes": 1}', None])
def test_a_useless_note_is_no_note(tmp_path, passes, note):
    path = put(tmp_path, WHOLE)
    if note is None:
        (tmp_path / "a.bin.verified").mkdir()
    else:
        (tmp_path / "a.bin.verified").write_bytes(note)
    open_shard(path, **IDENTITY)
    assert len(passes) == 1


def test_a_bad_file_leaves_no_note(tmp_path):
    path = put(tmp_path, layout([5, 1000], [2]))
    error(path)
    error(path)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_mapped_arrays_are_read_only(tmp_path):
    shard = open_shard(write(tmp_path / "a.bin", [1, 2]), **IDENTITY)
    with pytest.raises(ValueError, match="read-only"):
        shard.tokens[0] = 1


@pytest.mark.parametrize(
    ("ids", "ends"),
    [([1000], []), ([-1], []), ([1, 2], [0]), ([1, 2], [3]), ([1, 2], [2, 1]), ([1, 2], [1, 1])],
)
def test_writer_refuses(tmp_path, ids, ends):
    before = write(tmp_path / "a.bin", [1]).read_bytes()
    with pytest.raises(ValueError, match=r"outside|must rise"):
        write(tmp_path / "a.bin", ids, ends)
    assert (tmp_path / "a.bin").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.bin.verified"]


def test_writer_refuses_to_write_nothing(tmp_path):
    with pytest.raises(DataError, match="no tokens"):
        write(tmp_path / "a.bin", [])
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        write(tmp_path / "a.bin", [1], tokenizer_hash="ab")


def test_unwritable_places(tmp_path):
    with pytest.raises(UsageError, match=r"cannot write: No such file"):
        write(tmp_path / "gone" / "a.bin", [1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # stands for a full disk
    try:
        with pytest.raises(UsageError, match=r"a\.bin: cannot write: File too large; make room"):
            write(tmp_path / "a.bin", np.ones(1 << 20, dtype=int))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_the_old_shard(tmp_path):
    path = write(tmp_path / "a.bin", [1, 2, 3])
    code = (
        "import os, sys, numpy as np; from fastgpt.data.shards import ShardWriter\n"
        f"w = ShardWriter(sys.argv[1], vocab_size=1000, tokenizer_hash={HASH!r})\n"
        "w.append(np.ones(10**6, int)); w._file.flush(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert open_shard(path, **IDENTITY).tokens.tolist() == [1, 2, 3]
    write(path, [4])  # and what it left does not disturb the next
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.bin.verified"]


@pytest.mark.full
def test_a_billion_tokens_open_at_once(tmp_path):
    path, tokens = tmp_path / "a.bin", 10**9
    payload = tokens * 2
    zeros = bytes(4 << 20)
    crcs = [zlib.crc32(zeros)] * (payload // len(zeros))
    crcs += [zlib.crc32(zeros[: payload % len(zeros)])]
    trailer = struct.pack("<Q", tokens) + struct.pack(f"<{len(crcs)}I", *crcs)
    header = b"FGPTBIN1" + struct.pack("<IIIIQQ", 1, 2, 1000, zlib.crc32(trailer), tokens, 1)
    header = (header + bytes.fromhex(HASH)).ljust(124, b"\0")
    with open(path, "wb") as file:
        file.write(header + struct.pack("<I", zlib.crc32(header)))
        file.seek(128 + payload)
        file.write(trailer)
    if path.stat().st_blocks * 512 > payload // 2:
        pytest.skip("the file system has no sparse files")
    code = (
        "import json, sys, time; from fastgpt.data.batches import open_shard, PackedDataset\n"
        "def go():\n"
        "    t = time.perf_counter()\n"
        f"    s = open_shard(sys.argv[1], vocab_size=1000, tokenizer_hash={HASH!r})\n"
        "    rows = PackedDataset([s], 1024).rows(range(64))\n"
        "    return time.perf_counter() - t\n"
        "first, again = go(), go()\n"
        "status = open('/proc/self/status').read()\n"
        "peak = int(status.split('VmHWM:')[1].split()[0]) << 10\n"
        "print(json.dumps([first, again, peak]))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
    first, again, peak = json.loads(run.stdout)
    print(f"first {first:.2f} s, again {again:.4f} s, {peak >> 20} MiB")
    assert again < 1
    assert peak < 200 << 20

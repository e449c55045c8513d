"""Reading chats and prompts: what is accepted, and the place and the cure in every complaint."""

from __future__ import annotations

import gzip
import json
import lzma
import re

import pytest

from fastgpt.data.examples import embedded, read_chats, read_prompts
from fastgpt.errors import DataError

USER = {"role": "user", "content": "Hi — there"}
ASSISTANT = {"role": "assistant", "content": "Hello\n"}
SYSTEM = {"role": "system", "content": "Be kind."}
LINE = json.dumps({"prompt": "a", "response": "b"}).encode() + b"\n"


@pytest.fixture
def write(tmp_path):
    def to(name: str, *lines) -> str:
        raw = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines).encode()
        pack = {"gz": gzip.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)
        path = tmp_path / name
        path.write_bytes(pack(raw))
        return str(path)

    return to


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_both_forms_are_chats(name, write):
    path = write(
        name,
        {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], "src": "x"},
        "",
        {"prompt": "Hi — there", "response": "Hello\n", "other": 3},
    )
    first, second = read_chats([path])
    assert first.messages == [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    assert second.messages == [USER, ASSISTANT]
    assert (str(second.source), first.line, second.line) == (path, 1, 3)


def test_byte_order_mark_and_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"messages": [USER, ASSISTANT]}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\r\n")
    assert [chat.line for chat in read_chats([path])] == [1, 2]


def test_several_paths_and_directories_in_order(write, tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "notes.txt"):
        write(name, {"prompt": name, "response": "x"})
    extra = write("c.jsonl", {"prompt": "c", "response": "x"})
    (tmp_path / "c.jsonl").rename(tmp_path.parent / "c.jsonl")
    chats = read_chats([str(tmp_path), extra.replace(str(tmp_path), str(tmp_path.parent))])
    assert [chat.messages[0]["content"] for chat in chats] == ["a.jsonl.gz", "b.jsonl", "c"]


def message(**values) -> dict:
    return {"messages": [USER, ASSISTANT | values]}


BAD_CHATS = {
    "{": r"invalid JSON (.*at column 2.*); mend",
    "[1]": "a JSON object is expected, not list",
    '{"a": ' + "1" * 5000 + "}": "too long a number",
    "{}": "neither 'messages' nor 'prompt' and 'response' .*no keys",
    json.dumps({"text": "x"}): "it has 'text'",
    json.dumps({"prompt": "x"}): "no key 'response' .*'prompt'",
    json.dumps({"response": "x"}): "no key 'prompt'",
    json.dumps({"prompt": "x", "response": 3}): "'response' is int, not a string",
    json.dumps({"prompt": " \n", "response": "y"}): "'prompt' is empty",
    json.dumps({"messages": []}): "'messages' is not a list with messages",
    json.dumps({"messages": "hello"}): "'messages' is not a list with messages",
    json.dumps({"messages": [USER, "x"]}): r"messages\[1\] is not an object with 'role'",
    json.dumps({"messages": [USER, {"role": "assistant"}]}): r"messages\[1\] is not an object",
    json.dumps(message(role="bot")): r"messages\[1\] has role 'bot'; use user",
    json.dumps(message(role=None)): r"messages\[1\] has role None",
    json.dumps(message(role=["user"])): r"messages\[1\] has role \['user'\]",
    json.dumps(message(content="")): r"messages\[1\] 'content' is empty",
    json.dumps(message(content=[{"type": "text"}])): r"messages\[1\] 'content' is list, not a",
    json.dumps(message(content="a\ud800")): "U[+]D800, half of a surrogate pair, at character 1",
    json.dumps({"messages": [USER, SYSTEM, ASSISTANT]}): "'system', which can only come first",
    json.dumps({"messages": [USER]}): "no message of the assistant, nothing to learn",
}


@pytest.mark.parametrize(("line", "reason"), BAD_CHATS.items(), ids=range(len(BAD_CHATS)))
def test_a_bad_chat_is_named_by_line(line, reason, write):
    path = write("a.jsonl", {"messages": [USER, ASSISTANT]}, line)
    with pytest.raises(DataError, match=f"^{re.escape(path)}:2: .*{reason}"):
        read_chats([path])


def test_deep_json(write):
    path = write("a.jsonl", '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(DataError, match=r":1: invalid JSON \(nested too deeply"):
        read_chats([path])


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + b'{"\xe9": 1}')
    with pytest.raises(DataError, match=r"a.jsonl:2: byte 2 of the line is not valid UTF-8"):
        read_chats([path])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "no records; remove it"),
        ("a.jsonl", b"\n \n", "no records; remove it"),
        ("a.csv", b"x", "unknown kind of file; convert it to .jsonl"),
        ("a.jsonl.gz", b"plain", "cannot read: .*; check or replace"),
        ("a.jsonl.gz", gzip.compress(LINE * 2000)[:-12], "cannot read: .*; check or replace"),
        ("a.jsonl.xz", b"plain", "cannot read: .*; check or replace"),
    ],
)
def test_a_bad_file_is_named(name, content, reason, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*{reason}"):
        read_chats([path])


def test_missing_paths(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file or directory"):
        read_chats([tmp_path / "missing.jsonl"])
    with pytest.raises(DataError, match=r"no \.jsonl, \.jsonl\.gz, \.jsonl\.xz files in it"):
        read_chats([tmp_path])


def test_prompts(write):
    path = write(
        "p.jsonl",
        {"prompt": "2+2", "answer": 4},
        {"prompt": "Hi — there", "reference": "Hello", "answer": "no"},
        {"messages": [SYSTEM, USER]},
        {"messages": [USER, ASSISTANT, USER], "response": "ignored"},
    )
    prompts = read_prompts([path])
    assert [p.reference for p in prompts] == [4, "Hello", None, None]
    assert prompts[1].messages == [USER]
    assert prompts[2].messages == [SYSTEM, USER]
    assert [p.line for p in prompts] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [USER, ASSISTANT]}, "a prompt ends with the user, not with 'assistant'"),
        ({"text": "x"}, "no key 'prompt' .*'text'"),
        ({"prompt": ""}, "'prompt' is empty"),
    ],
)
def test_a_bad_prompt_is_named_by_line(record, reason, write):
    path = write("p.jsonl", record)
    with pytest.raises(DataError, match=f"^{re.escape(path)}:1: .*{reason}"):
        read_prompts([path])


def test_the_embedded_chats_are_sound():
    chats = read_chats([embedded("sft")])
    assert len(chats) == 5856
    assert sum(len(chat.messages) > 2 for chat in chats) == 64


def test_missing_embedded_data():
    with pytest.raises(DataError, match="reinstall"):
        embedded("nothing")

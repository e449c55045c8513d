"""A directory's manifest: size and SHA-256 of every file in it, and a hash of itself.

It guards against damage (flipped bits, truncation, files lost or exchanged), not against somebody
who may write the directory: whoever reads the files must still treat their content as data.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST_FILE = "manifest.json"

_VERSION = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_MANIFEST_BYTES = 16 << 20


class Damaged(Exception):
    """A directory that must not be used; the text says which file and why."""


class FileEntry(NamedTuple):
    """What the manifest knows about one file."""

    size: int
    sha256: str


def is_safe_name(name: str) -> bool:
    """Whether ``name`` is a plain file name: no separators, no leading dot."""
    return _FILE_NAME.fullmatch(name) is not None


def json_bytes(value: Any) -> bytes:
    """One canonical line of JSON."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()


def manifest_bytes(step: int, files: Mapping[str, FileEntry]) -> bytes:
    """The canonical bytes of a manifest; a reader rebuilds them and accepts no other spelling."""
    body = {
        "format": "fastgpt checkpoint",
        "version": _VERSION,
        "step": step,
        "files": {name: entry._asdict() for name, entry in files.items()},
    }
    return json_bytes({**body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()})


def write_file(path: Path, chunks: Iterable[Any]) -> FileEntry:
    """Write and sync a new file; the hash is of what was meant, not of what the disk returns."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def read_manifest(directory: Path, step: int) -> dict[str, FileEntry]:
    """The files of ``directory`` as its manifest lists them; the files are not looked at.

    Raises:
        Damaged: the manifest is missing, altered, of another step or another version.
    """
    if regular_size(directory, MANIFEST_FILE) > _MAX_MANIFEST_BYTES:
        raise Damaged(f"{MANIFEST_FILE} is too large")
    raw = (directory / MANIFEST_FILE).read_bytes()
    try:
        parsed = json.loads(raw)
        version, found = parsed["version"], parsed["step"]
        files = {name: FileEntry(**entry) for name, entry in parsed["files"].items()}
        canonical = manifest_bytes(found, files)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Damaged(f"{MANIFEST_FILE} is not a manifest") from None
    if version != _VERSION:
        raise Damaged(f"{MANIFEST_FILE} has version {version}, this program reads {_VERSION}")
    if raw != canonical:
        raise Damaged(f"{MANIFEST_FILE} does not match its hash")
    if found != step:
        raise Damaged(f"{MANIFEST_FILE} is that of step {found}")
    if not all(map(is_safe_name, files)):
        raise Damaged(f"{MANIFEST_FILE} names an unsafe path")
    return files


def verify(
    directory: Path, step: int, names: Collection[str] | None = None
) -> dict[str, FileEntry]:
    """Check size and hash of all files in the manifest, or only of ``names``; return them.

    Raises:
        Damaged: at the first file that is missing, altered, or a link out of the parent directory.
    """
    files = read_manifest(directory, step)
    if names is not None:
        if missing := set(names) - files.keys():
            raise Damaged(f"it holds no {', '.join(sorted(missing))}")
        files = {name: files[name] for name in names}
    for name, entry in files.items():
        size = regular_size(directory, name)
        if size != entry.size:
            raise Damaged(f"{name} has {size} bytes instead of {entry.size}")
        with open(directory / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise Damaged(f"{name} does not match its hash")
    return files


def sizes_match(directory: Path, step: int) -> bool:
    """The quick half of ``verify``: every file is there with its size, none is read."""
    try:
        files = read_manifest(directory, step)
        return all(regular_size(directory, name) == entry.size for name, entry in files.items())
    except (Damaged, OSError):
        return False


def regular_size(directory: Path, name: str) -> int:
    """Size of a regular file that lies in the parent of ``directory``, however it is linked."""
    path = directory / name
    if not path.exists():
        raise Damaged(f"{name} is missing")
    if not path.resolve().is_relative_to(directory.parent.resolve()):
        raise Damaged(f"{name} is a link to outside of {directory.parent}")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would block the reader for ever
        raise Damaged(f"{name} is not a regular file")
    return status.st_size

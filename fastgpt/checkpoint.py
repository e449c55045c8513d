"""Checkpoints that are whole or absent: safetensors + JSON, hashed, moved into place last.

::

    checkpoints/
      step_200/
        model.safetensors      one file per group of tensors
        optimizer.safetensors
        state.json             step, counters, random state, configuration hash ...
        manifest.json          size and SHA-256 of each file above, and of itself
      latest                   "step_200 <check>": written after step_200 is durable

None of the formats in use carries a checksum: a flipped bit in a safetensors file, a ``torch.save``
archive or a DCP shard loads as a wrong weight without a word. So every file is hashed when it is
written, read back before the directory gets its name, and verified again before anything is parsed.
No pickle is read or written anywhere.

``save_checkpoint`` and ``load_checkpoint`` are functions of one process. Under ``torchrun`` rank 0
saves full (unsharded) tensors and the others wait.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastgpt.errors import DataError, UsageError
from fastgpt.manifest import (
    MANIFEST_FILE,
    Damaged,
    FileEntry,
    is_safe_name,
    json_bytes,
    manifest_bytes,
    sizes_match,
    verify,
    write_file,
)
from fastgpt.tensorfile import file_bytes, file_chunks, header_bytes

STATE_FILE = "state.json"

_STEP = re.compile(r"step_(0|[1-9][0-9]{0,17})")

Tensors = Mapping[str, Mapping[str, Tensor]]  # file stem -> tensor name -> tensor
Warn = Callable[[str], None]
T = TypeVar("T")


class SaveError(OSError):
    """A checkpoint could not be written; every earlier one is untouched, so training can go on."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; ``tensors`` live on the CPU in memory of their own."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# Writing


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Tensors,
    state: Mapping[str, Any],
    *,
    keep_last: int,
    warn: Warn = _warn,
) -> Path:
    """Write ``root/step_<step>``, make ``latest`` name it, delete what ``keep_last`` leaves over.

    Nothing that exists is touched until the new directory is complete, synced and read back, so a
    crash or a full disk at any moment leaves the old state or the new one. Saving a step that
    exists replaces it. Tensors may live on any device, in any layout and share storage; each is
    written in full. ``state`` is JSON: tuples come back as lists, keys as strings, floats exactly.

    Args:
        root: the ``checkpoints`` directory of a run; created if missing.
        step: optimizer steps done, >= 0.
        tensors: file stem ("model", "optimizer" ...) -> tensor name -> dense tensor.
        state: becomes ``state.json``.
        keep_last: how many intact checkpoints stay, counting the new one; 0 keeps all.
        warn: told when an old checkpoint could not be deleted.

    Returns:
        The path of the new checkpoint.

    Raises:
        SaveError: the disk is full, or any other failure of the file system; nothing was lost.
        ValueError: arguments that no checkpoint can hold.
    """
    if step < 0 or keep_last < 0:
        raise ValueError(f"step and keep_last must be >= 0, got {step} and {keep_last}")
    for stem, named in tensors.items():
        if not is_safe_name(stem):
            raise ValueError(f"{stem!r} is not a file stem: letters, digits, '.', '_', '-' only")
        header_bytes(named)  # refuses bad tensors before the disk is touched
    state_bytes = json_bytes(state)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _writer_lock(root, wait=True):
            _clean(root)
            try:
                temporary = root / f".tmp-step_{step}-{os.getpid()}"
                os.mkdir(temporary)
                _write_files(temporary, step, tensors, state_bytes)
                _publish(root, temporary, step)
            except OSError:
                _clean(root)
                raise
            _purge(root, step, keep_last, warn)
    except OSError as error:
        raise _save_error(root, step, error) from error
    return root / f"step_{step}"


def required_bytes(tensors: Tensors, state: Mapping[str, Any]) -> int:
    """Bytes on disk of one checkpoint, up to a few and the file system's own overhead."""
    names = [f"{stem}.safetensors" for stem in tensors] + [STATE_FILE]
    manifest = manifest_bytes(0, {name: FileEntry(10**12, "0" * 64) for name in names})
    return len(json_bytes(state)) + len(manifest) + sum(map(file_bytes, tensors.values()))


def check_space(root: Path, checkpoint_bytes: int, *, copies: int = 2) -> None:
    """Refuse, before training starts, a disk that cannot hold ``copies`` checkpoints.

    Two are the least: the old one stays until the new one is verified. Those already in ``root``
    count, but room for one more is always asked for.

    Raises:
        UsageError: with the bytes needed and free.
    """
    existing = root.absolute()
    while not existing.exists():
        existing = existing.parent
    more = max(1, copies - len(list_steps(root)))
    free = shutil.disk_usage(existing).free
    if free < more * checkpoint_bytes:
        raise UsageError(
            f"{root}: room for {more} more checkpoint{'s' * (more > 1)} of "
            f"{_human(checkpoint_bytes)} is needed, {_human(more * checkpoint_bytes)} in all, but "
            f"the disk has {_human(free)} free: free some space or choose another --out"
        )


def _write_files(directory: Path, step: int, tensors: Tensors, state: bytes) -> None:
    files = {}
    for stem, named in tensors.items():
        name = f"{stem}.safetensors"
        files[name] = write_file(directory / name, file_chunks(named))
    files[STATE_FILE] = write_file(directory / STATE_FILE, [state])
    write_file(directory / MANIFEST_FILE, [manifest_bytes(step, files)])
    _sync_directory(directory)
    try:
        verify(directory, step)
    except Damaged as error:
        raise OSError(errno.EIO, f"reads back wrong: {error}") from error


def _latest_bytes(step: int) -> bytes:
    # The check keeps a flipped bit from naming another step that happens to exist.
    name = f"step_{step}"
    return f"{name} {sha256(name.encode()).hexdigest()[:16]}\n".encode()


def _publish(root: Path, temporary: Path, step: int) -> None:
    """Give a complete directory its name, and move ``latest`` once that is durable."""
    final, old = root / f"step_{step}", root / f".old-step_{step}"
    if os.path.lexists(final):
        # A directory cannot be replaced in one move: _clean puts it back after a crash in between.
        os.rename(final, old)
    os.rename(temporary, final)
    _sync_directory(root)
    pointer = root / ".tmp-latest"
    write_file(pointer, [_latest_bytes(step)])
    os.replace(pointer, root / "latest")
    _sync_directory(root)
    shutil.rmtree(old, ignore_errors=True)


def _purge(root: Path, newest: int, keep_last: int, warn: Warn) -> None:
    """Delete all but the last ``keep_last`` intact checkpoints.

    Steps beyond ``newest`` were left behind by a resume from an earlier step: they go first. A
    truncated or incomplete checkpoint does not count as kept, or it would displace a good one.
    """
    if keep_last == 0:
        return
    kept = 0
    for step in _newest_first(list_steps(root), newest):
        path = root / f"step_{step}"
        try:
            if kept < keep_last and (step == newest or sizes_match(path, step)):
                kept += 1
                continue
            doomed = root / f".tmp-purge-{step}"  # half deleted, it must not pass for a checkpoint
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warn(f"{path}: cannot delete this old checkpoint: {error}")


def _save_error(root: Path, step: int, error: OSError) -> SaveError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            reason += f" ({_human(shutil.disk_usage(root).free)} free)"
    result = SaveError(
        f"{root}: checkpoint of step {step} not saved: {reason}; earlier checkpoints are intact"
    )
    result.errno = error.errno
    return result


# Reading


def list_steps(root: Path) -> list[int]:
    """Steps that have a checkpoint directory, ascending; none of them verified."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for entry in os.listdir(root) if (m := _STEP.fullmatch(entry)))


def load_checkpoint(
    root: Path,
    step: int | None = None,
    *,
    only: Collection[str] | None = None,
    warn: Warn = _warn,
) -> Checkpoint:
    """Read the newest good checkpoint of ``root``, or exactly ``step``.

    Every hash is verified before a file is parsed. Without ``step``, a damaged checkpoint is
    reported through ``warn`` and the one before it is used.

    Args:
        root: the ``checkpoints`` directory of a run.
        step: the step to load; the one ``latest`` names when ``None``.
        only: stems to verify and read ("model"); all when ``None``. ``state`` is always read.
        warn: called with one line for each checkpoint that is passed over.

    Raises:
        UsageError: there is no checkpoint, or none of that step.
        DataError: no undamaged one is left; the message names each with its damage.
    """

    def read(path: Path, found: int) -> Checkpoint:
        tensors = {}
        for stem in _verified_stems(path, found, only):
            # load_file maps the file: clone, or a later change on disk would change weights.
            mapped = load_file(path / f"{stem}.safetensors")
            tensors[stem] = {name: tensor.clone() for name, tensor in mapped.items()}
        return Checkpoint(found, tensors, json.loads((path / STATE_FILE).read_bytes()), path)

    return _first_good(root, step, read, warn)


def find_checkpoint(
    root: Path,
    step: int | None = None,
    *,
    only: Collection[str] | None = None,
    warn: Warn = _warn,
) -> Path:
    """The directory ``load_checkpoint`` would read, verified, without reading any tensor.

    With ``tensorfile.read_header`` a caller can compare shapes before it allocates anything.
    """

    def verified(path: Path, found: int) -> Path:
        _verified_stems(path, found, only)
        return path

    return _first_good(root, step, verified, warn)


def _verified_stems(path: Path, step: int, only: Collection[str] | None) -> list[str]:
    names = None if only is None else [STATE_FILE, *(f"{stem}.safetensors" for stem in only)]
    files = verify(path, step, names)
    if STATE_FILE not in files:
        raise Damaged(f"it holds no {STATE_FILE}")
    stems = [name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")]
    return sorted(stems)


def _first_good(root: Path, step: int | None, use: Callable[[Path, int], T], warn: Warn) -> T:
    _clean_after_crash(root)
    steps = list_steps(root)
    if step is not None and step not in steps:
        have = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise UsageError(f"{root}: no checkpoint of step {step}; {have}")
    if not steps:
        raise UsageError(f"{root}: no checkpoint was saved here yet")
    failures = []
    for candidate in _by_preference(root, steps, warn) if step is None else [step]:
        path = root / f"step_{candidate}"
        try:
            return use(path, candidate)
        except (Damaged, OSError, ValueError, RecursionError, SafetensorError) as error:
            failures.append(f"{path}: damaged: {error}")
            if step is None:
                warn(f"{failures[-1]}; trying the one before it")
    raise DataError("; ".join([*failures, "no good checkpoint is left"]))


def _by_preference(root: Path, steps: list[int], warn: Warn) -> list[int]:
    """What ``latest`` names, then older steps, then newer (their save died before ``latest``)."""
    try:
        with open(root / "latest", "rb") as file:
            line = file.read(256)
        match = _STEP.match(line.decode("ascii"))
        if match is None or line != _latest_bytes(int(match[1])):
            raise ValueError("damaged")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "damaged"
        warn(f"{root / 'latest'}: {reason}; using the newest good checkpoint")
        return steps[::-1]
    if (named := int(match[1])) not in steps:
        warn(f"{root}: step_{named}, which `latest` names, is missing; using the one before it")
    return _newest_first(steps, named)


def _newest_first(steps: list[int], newest: int) -> list[int]:
    """``newest`` and what came before it, descending, then the steps beyond it."""
    return sorted(steps, key=lambda step: (step <= newest, step), reverse=True)


# What crashes leave behind


@contextmanager
def _writer_lock(root: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the directory's lock; yields whether it is held. The kernel drops it when we die."""
    descriptor = os.open(root, os.O_RDONLY)
    held = False
    try:
        # It fails where another process writes, and on network file systems that have no locks.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held
    finally:
        if held:  # said aloud, because a child may have inherited the descriptor
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _clean_after_crash(root: Path) -> None:
    """Clean up for a reader: only when no writer is alive, and never an error."""
    with suppress(OSError):
        if any(name.startswith((".tmp-", ".old-step_")) for name in os.listdir(root)):
            with _writer_lock(root, wait=False) as held:
                if held:
                    _clean(root)


def _clean(root: Path) -> None:
    """Delete what a dead or failed writer left, and put back a checkpoint it had moved aside."""
    for name in os.listdir(root):
        path = root / name
        with suppress(OSError):
            if name.startswith(".old-step_"):
                original = root / name.removeprefix(".old-")
                if not os.path.lexists(original):
                    os.rename(path, original)
                    continue
            elif not name.startswith(".tmp-"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


# Random state


def rng_state() -> dict[str, Any]:
    """State of Python's and torch's generators (CPU and each CUDA device) as JSON."""
    version, words, gauss = random.getstate()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(words), gauss],
        "torch_cpu": _to_base64(torch.get_rng_state()),
        "torch_cuda": [_to_base64(state) for state in devices],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` returned; CUDA devices that are not here are ignored."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(_from_base64(state["torch_cpu"]))
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, text in enumerate(state["torch_cuda"][:devices]):
        torch.cuda.set_rng_state(_from_base64(text), device)


def _to_base64(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _from_base64(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

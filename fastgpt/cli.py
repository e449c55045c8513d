"""Command line and TOML from the configuration dataclasses; errors as one line and an exit code.

Precedence: default < preset < ``--config`` file (or the run that is resumed) < flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import itertools
import json
import math
import os
import sys
import tomllib
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastgpt import presets
from fastgpt.errors import FastGPTError, OutOfMemoryError, UsageError

C = TypeVar("C")

# Options of one invocation, not of the run: they are not written to config.toml.
NOT_SAVED = ("config", "resume", "stop_at", "dry_run", "debug")


def parse(kind: type[C], argv: Sequence[str] | None = None) -> C:
    """The configuration of class ``kind`` from flags, file and preset. Raises UsageError.

    ``kind`` has the fields ``config`` and ``resume``, and ``preset`` or ``init`` (the run that a
    later stage starts from).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    tree: dict[str, Any] = {}
    config_file, resume = _peek(argv, "--config"), _peek(argv, "--resume")
    preset, init = _peek(argv, "--preset"), _peek(argv, "--init")
    if resume:
        for flag, given in (("--config", config_file), ("--preset", preset), ("--init", init)):
            if given:
                raise UsageError(f"{flag} {given}: a resumed run keeps its own; leave {flag} out")
        tree = read_toml(Path(resume) / "config.toml", "--resume")
    elif config_file:
        tree = read_toml(Path(config_file), "--config")
    if "preset" not in {field.name for field in dataclasses.fields(kind)}:  # pyright: ignore
        return from_flags(kind, argv, default=from_tree(kind, tree, config_file or resume or ""))
    data = tree.get("data")
    given = isinstance(data, Mapping) and bool(data.get("data"))
    own_text = given or _peek(argv, "--data") is not None
    preset = presets.resolve(preset or tree.get("preset", "auto"), own_text=own_text)
    if not resume:
        tree = _merge(presets.overrides(preset), tree)
    default = from_tree(kind, tree | {"preset": preset}, config_file or resume or "preset")
    families = itertools.groupby(presets.PRESETS, key=lambda name: name.partition("-")[0])
    notes = [f"Presets; auto is {presets.CPU}, or {presets.GPU} for --data on a GPU:"]
    notes += [f"- {', '.join(names)}" for _, names in families]
    return from_flags(kind, argv, default=default, notes="\n".join(notes))


def from_flags(
    kind: type[C], argv: Sequence[str] | None = None, *, default: C | None = None, notes: str = ""
) -> C:
    """Flags alone; ``XConfig`` is the configuration of the module ``fastgpt.x``."""
    import tyro

    return tyro.cli(
        kind,
        args=argv,
        default=tyro.MISSING_NONPROP if default is None else default,
        prog=f"python -m fastgpt.{kind.__name__.removesuffix('Config').lower()}",
        description="\n\n".join([kind.__doc__ or "", notes]).strip(),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _peek(argv: Sequence[str], flag: str) -> str | None:
    """The value of ``flag``, the last one as in the full parse."""
    found = None
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        if word == flag:
            found = following
        elif word.startswith(flag + "="):
            found = word[len(flag) + 1 :]
    return found


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def read_toml(path: Path, flag: str) -> dict[str, Any]:
    """Read a TOML file. Raises UsageError naming ``flag``, the file and the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: not valid TOML: {error}") from error


def from_tree(kind: type[C], tree: Mapping[str, Any], where: str) -> C:
    """Build dataclass ``kind`` from nested mappings. Raises UsageError, with a hint for typos."""
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(fields)}"
            raise UsageError(f"{where}: unknown key {key!r}{hint}")
        hint_type = hints[key]
        if dataclasses.is_dataclass(hint_type):
            if not isinstance(value, Mapping):
                raise UsageError(f"{where}: {key!r} must be a table, not {value!r}")
            values[key] = from_tree(hint_type, value, f"{where}: [{key}]")  # pyright: ignore
        else:
            values[key] = _convert(value, hint_type, f"{where}: {key}")
    return kind(**values)


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path in quotes",
}


def _convert(value: Any, kind: Any, where: str) -> Any:
    """A value out of a TOML file as the type ``kind`` of a field. Raises UsageError."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (option for option in get_args(kind) if option is not NoneType)
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in parts:
            raise UsageError(f"{where} is {value!r}; one of {', '.join(map(repr, parts))}")
        return value
    if get_origin(kind) is tuple:
        any_length = parts[-1] is Ellipsis
        if not isinstance(value, list) or not (any_length or len(value) == len(parts)):
            length = "" if any_length else f" of {len(parts)}"
            raise UsageError(f"{where} is {value!r}; it must be a list{length}")
        kinds = parts[:1] * len(value) if any_length else parts
        return tuple(_convert(item, k, where) for item, k in zip(value, kinds, strict=True))
    if type(value) is not ({Path: str}.get(kind, kind)) and not (
        kind is float and type(value) is int
    ):
        raise UsageError(f"{where} is {value!r}; it must be {_KINDS[kind]}")
    return kind(value)


def to_tree(config: Any, *, skip: Sequence[str] = NOT_SAVED) -> dict[str, Any]:
    """Nested plain values of a configuration, without those that are None or in ``skip``."""
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in skip or value is None:
            continue
        if dataclasses.is_dataclass(value):
            value = to_tree(value, skip=())
        elif isinstance(value, tuple):
            value = [str(item) if isinstance(item, Path) else item for item in value]
        elif isinstance(value, Path):
            value = str(value)
        tree[field.name] = value
    return tree


def to_toml(tree: Mapping[str, Any]) -> str:
    """TOML text of a tree with one level of tables."""
    flat = [f"{k} = {_toml(v)}" for k, v in tree.items() if not isinstance(v, Mapping)]
    lines = ["\n".join(flat)] if flat else []
    for key, table in tree.items():
        if isinstance(table, Mapping):
            lines.append("\n".join([f"[{key}]", *(f"{k} = {_toml(v)}" for k, v in table.items())]))
    return "\n\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return f"{value:.1f}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):  # of the letters that TOML wants escaped, JSON leaves out one
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[], int]:
    """Turn ``main`` into an entry point: a `FastGPTError` becomes one line and its exit code.

    A terminal that lacks a character shows another in its place.
    """

    @functools.wraps(main)
    def run() -> int:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty():
            sys.stdout.reconfigure(errors="replace")
        try:
            main(None)
        except FastGPTError as error:
            return _report(str(error), error.exit_code)
        except KeyboardInterrupt:
            return _report("interrupted", 130)
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            message = "out of memory: lower --micro-batch, --seq-len or the model"
            return _report(message, OutOfMemoryError.exit_code)
        return 0

    return run


def _is_out_of_memory(error: Exception) -> bool:
    # By name, for torch may not be loaded; its CPU allocator has no class of its own.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def _report(message: str, code: int) -> int:
    if "--debug" in sys.argv:
        traceback.print_exc()
    if message and (os.environ.get("RANK", "0") == "0" or code not in (4, 75)):
        print(f"fastgpt: {message}", file=sys.stderr, flush=True)
    return code

"""Command line and TOML from the configuration dataclasses; errors as one line and an exit code.

Precedence: default < preset < ``--config`` file (or the run that is resumed) < flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import sys
import tomllib
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from fastgpt import presets
from fastgpt.errors import DataError, FastGPTError, UsageError

C = TypeVar("C")

# Options of one invocation, not of the run: they are not written to config.toml.
NOT_SAVED = ("config", "resume", "stop_at", "dry_run", "debug")


def parse(kind: type[C], argv: Sequence[str] | None = None) -> C:
    """The configuration of class ``kind`` from flags, file and preset. Raises UsageError.

    ``kind`` has the fields ``preset``, ``config`` and ``resume``.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    tree: dict[str, Any] = {}
    config_file, resume = _peek(argv, "--config"), _peek(argv, "--resume")
    if resume:
        tree = read_toml(Path(resume) / "config.toml", "--resume")
    elif config_file:
        tree = read_toml(Path(config_file), "--config")
    preset = _peek(argv, "--preset") or tree.get("preset", "auto")
    if not resume:
        tree = _merge(presets.overrides(preset), tree)
    default = from_tree(kind, tree | {"preset": preset}, config_file or resume or "preset")
    return tyro.cli(kind, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,))


def _peek(argv: Sequence[str], flag: str) -> str | None:
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word[len(flag) + 1 :]
    return None


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


def _convert(value: Any, kind: Any, where: str) -> Any:
    text = str(kind)
    if isinstance(value, str) and "Path" in text:
        return Path(value)
    if isinstance(value, list):
        inner = Path if "Path" in text else lambda item: item
        return tuple(inner(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool) and kind is float:
        return float(value)
    allowed = getattr(kind, "__args__", ())
    if "Literal" in text and value not in allowed:
        raise UsageError(f"{where} is {value!r}; one of {', '.join(map(repr, allowed))}")
    if kind in (int, float, bool, str) and type(value) is not kind:
        raise UsageError(f"{where} is {value!r}; it must be a {kind.__name__}")
    return value


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
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        return f"{value:.1f}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[], int]:
    """Turn ``main`` into an entry point: a `FastGPTError` becomes one line and its exit code."""

    @functools.wraps(main)
    def run() -> int:
        try:
            main(None)
        except FastGPTError as error:
            return _report(str(error), error.exit_code)
        except KeyboardInterrupt:
            return _report("interrupted", 130)
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError" or "--debug" in sys.argv:
                raise
            return _report("out of device memory: lower --micro-batch, --seq-len or the model", 5)
        return 0

    return run


def _report(message: str, code: int) -> int:
    if "--debug" in sys.argv:
        traceback.print_exc()
    if int(os.environ.get("RANK", "0")) == 0 or code != 75:
        print(f"fastgpt: {message}", file=sys.stderr, flush=True)
    return code


__all__ = ["DataError", "command", "from_tree", "parse", "read_toml", "to_toml", "to_tree"]

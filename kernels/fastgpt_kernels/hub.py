"""A Hugging Face hub repository made of this package::

    python -m fastgpt_kernels.hub OUT [--repo-id NAME/fastgpt-kernels]

writes ``build.toml`` and ``torch-ext/fastgpt_kernels/`` for kernel-builder, and ``build/torch-*/``,
what it would build: the package is plain Python. ``LocalLayerRepository(OUT, layer_name=...)`` of
``kernels`` loads it from there. The hub loads packages under names of its own, several versions at
once, so imports become relative and operators get a namespace that holds the hash of the sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

NAME = "fastgpt_kernels"
BACKENDS = ("cpu", "cuda", "rocm")
LEFT_OUT = ("hub", "patch", "_transformers", "static")
"""Modules for those who install the package; the hub has its own way to replace layers."""

_BUILD = """\
[general]
name = "{name}"
version = 1
edition = 6
license = "Apache-2.0"
backends = [{backends}]
{hub}
[torch-noarch]
pyext = ["json", "py"]
"""


def sources() -> dict[str, str]:
    """File name -> text of the package as the hub gets it."""
    package = Path(__file__).parent
    paths = [p for p in sorted(package.iterdir()) if p.suffix in (".py", ".json")]
    texts = {p.name: p.read_text(encoding="utf-8") for p in paths if p.stem not in LEFT_OUT}
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]
    files = {name: _moved(text, f"{NAME}_{digest}") for name, text in texts.items()}
    files["__init__.py"] += "\nfrom . import layers  # noqa: E402, F401\n"
    files["_ops.py"] = f'"""Name under which the operators are."""\n\nID = "{NAME}_{digest}"\n'
    return files


def _moved(text: str, namespace: str) -> str:
    text = re.sub(rf"^(\s*)from {NAME}\.(\w+) import", r"\1from .\2 import", text, flags=re.M)
    text = re.sub(rf"^(\s*)from {NAME} import", r"\1from . import", text, flags=re.M)
    text = text.replace(f'"{NAME}::', f'"{namespace}::')
    return text.replace(f'NAMESPACE = "{NAME}"', f'NAMESPACE = "{namespace}"')


def write(out: Path, repo_id: str | None = None) -> None:
    """Write the repository.

    Args:
        out: folder, new or empty.
        repo_id: where on the hub it will be, for kernel-builder's upload.

    Raises:
        ValueError: ``out`` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"hub: {out} is not an empty folder; name a new one")
    files = sources()
    quoted = ", ".join(f'"{backend}"' for backend in BACKENDS)
    name = NAME.replace("_", "-")
    hub = f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id else ""
    _write(out / "torch-ext" / NAME, files)
    _write(out, {"build.toml": _BUILD.format(name=name, backends=quoted, hub=hub)})
    identity = re.findall(r'ID = "(\w+)"', files["_ops.py"])[0]
    for backend in BACKENDS:
        metadata = {
            "name": name, "id": f"{identity}_{backend}", "version": 1, "license": "Apache-2.0",
            "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        text = json.dumps(metadata, indent=2) + "\n"
        _write(out / "build" / f"torch-{backend}", {**files, "metadata.json": text})


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def main() -> int:
    """The command; exit code 2 for a folder in use."""
    parser = argparse.ArgumentParser("fastgpt_kernels.hub", description="A hub repository.")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--repo-id", help="where on the hub it will be")
    options = parser.parse_args()
    try:
        write(options.out, options.repo_id)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

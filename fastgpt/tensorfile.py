"""Writing safetensors files piece by piece, and reading their headers without their tensors.

The library's writer cannot hash on the way, refuses tensors that share storage or have strides, and
reports a full disk as something else than an ``OSError``. The format is small enough to write here
(8-byte length, JSON header, raw bytes); the library reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgpt.errors import DataError

_CHUNK_BYTES = 16 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorInfo(NamedTuple):
    """One entry of a header."""

    dtype: str  # the format's own name: "F32", "BF16", "I64" ...
    shape: tuple[int, ...]


def header_bytes(named: Mapping[str, Tensor]) -> bytes:
    """The length-prefixed JSON header.

    Raises:
        ValueError: a tensor the format cannot hold (sparse, complex, meta), or a reserved name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in _ordered(named):
        if name == "__metadata__":
            raise ValueError("a tensor cannot be called __metadata__")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
            kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device}"
            raise ValueError(f"cannot save tensor {name!r} ({kind}): only dense, real ones")
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_chunks(named: Mapping[str, Tensor]) -> Iterator[Any]:
    """The bytes of the whole file as buffers; holds a copy of one tensor at a time, if any."""
    yield header_bytes(named)
    for _, tensor in _ordered(named):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(raw), _CHUNK_BYTES):
            yield raw[start : start + _CHUNK_BYTES]


def file_bytes(named: Mapping[str, Tensor]) -> int:
    """Size of the file that ``file_chunks`` describes."""
    return len(header_bytes(named)) + sum(tensor.nbytes for tensor in named.values())


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Types and shapes in a safetensors file; no tensor is allocated or read.

    Lets a caller compare a file with the configuration it came with before it believes either.

    Raises:
        DataError: the file is missing, truncated, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable safetensors file: {error}") from error


def _ordered(named: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    # The library's order: widest type first, which keeps every tensor aligned, then by name.
    return sorted(named.items(), key=lambda item: (-item[1].element_size(), item[0]))

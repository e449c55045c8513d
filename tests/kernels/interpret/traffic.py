"""Count the bytes kernels move, by watching the loads and stores of Triton's interpreter.

    with traffic.count() as moved:
        y = layer_norm(x, (64,))
    assert moved.loads(x).total <= 1.05 * traffic.nbytes(x)
    assert moved.stores(y) == traffic.once(y)

What a mask switches off is not counted, and an address that appears several times in one access (a
broadcast) counts once, as in hardware. Atomics count as a load and a store. The figures are what
the program asks for: what of it a cache answers is not known here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

SECTOR = 32
"""Bytes that a GPU's memory moves at least."""


class Moved(NamedTuple):
    """Bytes moved in one direction.

    Attributes:
        total: every access.
        per_program: what a program touches again counts once; ``total == per_program`` says that
            no program repeats itself.
        unique: what any program of any kernel touches again counts once: the compulsory traffic.
    """

    total: int
    per_program: int
    unique: int


@dataclass(frozen=True)
class _Access:
    """``addresses`` are those of the first bytes, ascending and distinct, of equal items."""

    program: int
    itemsize: int
    addresses: np.ndarray


class Traffic:
    """What ``count`` has seen; ask it about a tensor, or about all memory (None)."""

    def __init__(self) -> None:
        self.programs = 0
        self._loads: list[_Access] = []
        self._stores: list[_Access] = []

    def loads(self, x: Tensor | None = None) -> Moved:
        """Bytes loaded from between the first and the last element of ``x``."""
        return self._sum(self._loads, x)

    def stores(self, x: Tensor | None = None) -> Moved:
        """Bytes stored between the first and the last element of ``x``."""
        return self._sum(self._stores, x)

    def sectors(self, x: Tensor | None = None) -> int:
        """Bytes of the 32-byte sectors that the accesses to ``x`` touch, each access by itself."""
        found = _within([*self._loads, *self._stores], x)
        return SECTOR * sum(len(np.unique(a.addresses // SECTOR)) for a in found)

    def _sum(self, accesses: list[_Access], x: Tensor | None) -> Moved:
        found = _within(accesses, x)
        groups: dict[tuple[int, int], list[np.ndarray]] = {}
        for access in found:
            groups.setdefault((access.program, access.itemsize), []).append(access.addresses)
        total, per_program, unique = 0, 0, 0
        distinct: dict[int, list[np.ndarray]] = {}
        for (_, itemsize), parts in groups.items():
            total += itemsize * sum(len(part) for part in parts)
            mine = np.unique(np.concatenate(parts))
            per_program += itemsize * len(mine)
            distinct.setdefault(itemsize, []).append(mine)
        for itemsize, parts in distinct.items():
            unique += itemsize * len(np.unique(np.concatenate(parts)))
        return Moved(total, per_program, unique)

    def _record(self, kind: str, pointers, mask) -> None:
        itemsize = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        seen = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)
        addresses = np.unique(pointers.data[seen])
        accesses = self._loads if kind == "load" else self._stores
        accesses.append(_Access(self.programs, itemsize, addresses.astype(np.int64)))


def _within(accesses: list[_Access], x: Tensor | None) -> list[_Access]:
    if x is None:
        return accesses
    span = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    first, end = x.data_ptr(), x.data_ptr() + (span * x.element_size() if x.numel() else 0)
    cut = ((a, np.searchsorted(a.addresses, (first, end))) for a in accesses)
    return [_Access(a.program, a.itemsize, a.addresses[lo:hi]) for a, (lo, hi) in cut if hi > lo]


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements, whatever the strides: what must move at least."""
    return sum(x.numel() * x.element_size() for x in tensors)


def once(x: Tensor) -> Moved:
    """What moving every element of ``x`` exactly once looks like."""
    return Moved(nbytes(x), nbytes(x), nbytes(x))


@contextlib.contextmanager
def count() -> Iterator[Traffic]:
    """Watch every kernel that runs inside the ``with``. Must not be nested."""
    seen, builder = Traffic(), interpreter.InterpreterBuilder
    names = (
        "set_grid_idx",
        "create_masked_load",
        "create_masked_store",
        "create_atomic_cas",
        "create_atomic_rmw",
    )
    plain = {name: getattr(builder, name) for name in names}

    def next_program(self, *index):
        seen.programs += 1
        return plain["set_grid_idx"](self, *index)

    def load(self, pointers, mask, *rest):
        seen._record("load", pointers, mask)
        return plain["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        seen._record("store", pointers, mask)
        return plain["create_masked_store"](self, pointers, value, mask, *rest)

    def exchange(self, pointers, *rest):
        everywhere = interpreter.TensorHandle(np.ones_like(pointers.data, dtype=bool), tl.int1)
        seen._record("load", pointers, everywhere)
        seen._record("store", pointers, everywhere)
        return plain["create_atomic_cas"](self, pointers, *rest)

    def update(self, operation, pointers, value, mask, *rest):
        seen._record("load", pointers, mask)
        seen._record("store", pointers, mask)
        return plain["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    try:
        for name, watched in zip(names, (next_program, load, store, exchange, update), strict=True):
            setattr(builder, name, watched)
        yield seen
    finally:
        for name, original in plain.items():
            setattr(builder, name, original)

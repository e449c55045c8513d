"""Examples of any length in rows of one length, none of them reaching into another.

Best-fit decreasing puts whole examples into rows of ``seq_len`` (Ding et al. 2024,
arXiv:2404.10830, pack pretraining documents this way). Each epoch shuffles the examples anew, packs
them and shuffles the rows. How many rows there are depends on the lengths alone, so row g of a run
is row g mod n of epoch g div n: a pure function of (seed, g) as in `fastgpt.data.batches`, and
every example is used exactly once an epoch.

Shape suffixes: B rows, T positions, N targets.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastgpt.data.batches import IGNORE_INDEX
from fastgpt.data.order import mix64, permute

if TYPE_CHECKING:
    import torch

TARGET_GROUP = 256  # targets of a micro-batch are filled up to a multiple: few shapes to compile

Example = tuple[np.ndarray, np.ndarray]
"""int64 ids (L,), and for each whether it is to be predicted, bool (L,); L at least 2."""


class PackedExamples:
    """Examples packed into rows of ``seq_len`` inputs; ``len()`` is rows an epoch.

    An example of L ids takes L - 1 places: ids [0, L - 1) are inputs, ids [1, L) their targets.
    Raises ValueError for an example that fits no row or has nothing to predict.
    """

    def __init__(self, examples: Sequence[Example], seq_len: int, *, seed: int = 0):
        self.seq_len, self.seed = seq_len, seed
        for ids, learned in examples:
            if not 2 <= len(ids) <= seq_len + 1 or not learned[1:].any():
                raise ValueError(f"an example of {len(ids)} ids, {learned[1:].sum()} to predict")
        self.lengths = np.array([len(ids) - 1 for ids, _ in examples], dtype=np.int64)
        self._inputs = [ids[:-1] for ids, _ in examples]
        self._targets = [np.where(on[1:], ids[1:], IGNORE_INDEX) for ids, on in examples]
        self._rows = len(pack(self.lengths, seq_len))
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def __len__(self) -> int:
        return self._rows

    @property
    def targets(self) -> int:
        """Targets of an epoch."""
        return sum(int((targets != IGNORE_INDEX).sum()) for targets in self._targets)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides the rows."""
        digest = hashlib.sha256(f"{self.seq_len} {self.seed}\n".encode())
        for arrays in zip(self._inputs, self._targets, strict=True):
            digest.update(b"%d:" % len(arrays[0]))
            for array in arrays:
                digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    def _epoch(self, epoch: int) -> list[list[int]]:
        """The examples in each row of an epoch."""
        seeds = mix64(mix64(self.seed) + np.uint64(epoch))
        shuffled = permute(np.arange(len(self.lengths)), len(self.lengths), seeds)
        rows = pack(self.lengths[shuffled], self.seq_len)
        order = permute(np.arange(len(rows)), len(rows), mix64(seeds))
        return [shuffled[rows[i]].tolist() for i in order]

    def examples(self, g: int) -> list[int]:
        """The examples in row g >= 0 of a run."""
        return self.epoch(g // len(self))[g % len(self)]

    def batch(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """The rows with these examples as one micro-batch, on the CPU.

        Returns:
            ``inputs_BT`` int64 ids, 0 behind the last example; ``positions_BT`` int64, from 0 in
            each example; ``doc_start_BT`` int32, the place of the row where the example begins;
            ``places_N`` int64, the places in the flattened rows that have a target, and
            ``targets_BT`` int64 (N), these targets, filled up with places 0 and targets -100 to a
            multiple of `TARGET_GROUP`.
        """
        import torch

        B, T = len(rows), self.seq_len
        inputs = np.zeros((B, T), dtype=np.int64)
        positions = np.zeros((B, T), dtype=np.int64)
        targets = np.full((B, T), IGNORE_INDEX, dtype=np.int64)
        # A place without an example sees itself alone.
        starts = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        for b, members in enumerate(rows):
            begin = 0
            for i in members:
                end = begin + self.lengths[i]
                inputs[b, begin:end] = self._inputs[i]
                targets[b, begin:end] = self._targets[i]
                positions[b, begin:end] = np.arange(end - begin)
                starts[b, begin:end] = begin
                begin = end
        places = np.flatnonzero(targets != IGNORE_INDEX)
        fill = -len(places) % TARGET_GROUP
        arrays = {
            "inputs_BT": inputs,
            "positions_BT": positions,
            "doc_start_BT": starts,
            "places_N": np.pad(places, (0, fill)),
            "targets_BT": np.pad(targets.ravel()[places], (0, fill), constant_values=IGNORE_INDEX),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Put items into as few rows as best-fit decreasing finds; items of a length in given order.

    Every item, the longest first, goes where it leaves the least room. Returns the items of each
    row. Raises ValueError for an item that is empty or longer than a row.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths must be 1 to {capacity}")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: some row has room r
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(item)
        else:
            room, row = capacity, len(rows)
            rows.append([item])
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows


def step_batches(
    packed: PackedExamples,
    step: int,
    *,
    batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of optimizer step ``step``: rows [step * batch_size, ...) in all.

    ``batch_size`` counts rows over all ranks and is a multiple of micro-batch times ranks.
    """
    part = batch_size // world_size
    first = step * batch_size + rank * part
    return [
        packed.batch([packed.examples(g) for g in range(start, start + micro_batch_size)])
        for start in range(first, first + part, micro_batch_size)
    ]


def all_batches(
    packed: PackedExamples,
    micro_batch_size: int,
    max_batches: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """Every example once, in batches of one shape; rank r takes every world_size-th of them.

    ``max_batches`` bounds the batches over all ranks; which examples they hold is always the same.
    """
    rows = packed.epoch(0)
    rows = rows + [[]] * (-len(rows) % micro_batch_size)
    end = len(rows) if max_batches is None else min(len(rows), max_batches * micro_batch_size)
    for start in range(rank * micro_batch_size, end, world_size * micro_batch_size):
        yield packed.batch(rows[start : start + micro_batch_size])

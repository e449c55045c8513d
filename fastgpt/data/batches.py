"""Training batches as a pure function of (seed, global sample index).

The token stream of the shards is cut into windows of T + 1 tokens, T apart: T inputs and, one
further, T targets; every target is predicted once an epoch. Sample g of a run is window ``permute(g
% n, n, (seed, g // n))``, and optimizer step s takes the samples [s * B, (s + 1) * B). So nothing
has to be saved to resume, and the number of processes changes who computes a sample, never which
sample or when.

Shape suffixes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from fastgpt.data.corpus import TokenizedData, find_tokenized, tokenize_documents
from fastgpt.data.documents import Document, Documents, embedded_text, read_documents
from fastgpt.data.order import mix64, permute
from fastgpt.data.shards import Shard, ShardWriter, open_shard
from fastgpt.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

__all__ = [
    "IGNORE_INDEX",
    "Document",
    "Documents",
    "MicroBatch",
    "PackedDataset",
    "Shard",
    "ShardWriter",
    "TokenizedData",
    "bytes_of",
    "check_batches",
    "check_sizes",
    "embedded_text",
    "find_tokenized",
    "open_shard",
    "permute",
    "read_documents",
    "step_batches",
    "tokenize_documents",
    "validation_batches",
]

IGNORE_INDEX = -100  # cross_entropy's default


class _MicroBatch(TypedDict):
    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor


class MicroBatch(_MicroBatch, total=False):
    """What one forward pass takes, on the CPU.

    ``inputs_BT`` and ``targets_BT`` are int64, a target of -100 is not predicted. ``doc_start_BT``
    (int32, only with document masks): the first position of the row that belongs to the same
    document as position t; attention of t reaches back to there. A document begins behind an
    end-of-text id.
    """

    doc_start_BT: torch.Tensor


class PackedDataset:
    """The shards' token stream in windows of ``seq_len`` + 1 tokens; ``len()`` is windows an epoch.

    A window may span documents and shards; the last tokens that fill no window are left to
    validation or unused. Raises ValueError for seq_len < 1 and DataError without two tokens to make
    a pair.
    """

    def __init__(self, shards: Sequence[Shard], seq_len: int, *, seed: int = 0):
        if seq_len < 1:
            raise ValueError(f"seq_len {seq_len}: at least 1")
        self.shards = list(shards)
        self.seq_len = seq_len
        self.seed = seed
        self._ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)
        self.tokens = int(self._ends[-1]) if self.shards else 0
        if self.tokens < 2:
            names = ", ".join(str(shard.path) for shard in self.shards) or "no shards"
            raise DataError(f"{names}: {self.tokens} tokens, nothing to predict; give more text")

    def __len__(self) -> int:
        return (self.tokens - 1) // self.seq_len

    def rows(self, samples: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the windows of global ``samples`` g >= 0, int64, shape (len(samples), T + 1)."""
        g = np.asarray(samples, dtype=np.int64)
        n = len(self)
        epoch_seeds = mix64(mix64(self.seed) + (g // n).astype(np.uint64))
        return self.windows(permute(g % n, n, epoch_seeds))

    def sample(self, g: int) -> np.ndarray:
        """Return the window of global sample g, int64, shape (T + 1,)."""
        return self.rows([g])[0]

    def windows(self, places: np.ndarray) -> np.ndarray:
        """Return the windows at stream places in [0, len), int64, shape (len(places), T + 1)."""
        starts = places.astype(np.int64)[:, None] * self.seq_len
        return self.gather(starts + np.arange(self.seq_len + 1))

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """Return the tokens at ``positions`` of the stream, int64, of the same shape."""
        if len(self.shards) == 1:
            return self.shards[0].tokens[positions].astype(np.int64)
        out = np.empty(positions.shape, dtype=np.int64)
        owner = np.searchsorted(self._ends, positions, side="right")
        for i in np.unique(owner).tolist():
            shard = self.shards[i]
            mine = owner == i
            out[mine] = shard.tokens[positions[mine] - (self._ends[i] - len(shard))]
        return out


def check_batches(
    dataset: PackedDataset, *, batch_size: int, micro_batch_size: int, world_size: int = 1
) -> None:
    """Check once, before training, that `step_batches` can serve these sizes.

    Raises UsageError as `check_sizes`, DataError when the data holds no window.
    """
    check_sizes(dataset.seq_len, batch_size, micro_batch_size, world_size)
    if len(dataset) == 0:
        raise DataError(
            f"{dataset.shards[0].path}: {dataset.tokens} tokens, one sample takes seq_len + 1 = "
            f"{dataset.seq_len + 1}; give more text or lower --seq-len"
        )


def check_sizes(seq_len: int, batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Raise UsageError when a step does not come out even in micro-batches and processes."""
    share = micro_batch_size * world_size
    if min(batch_size, micro_batch_size, world_size) < 1:
        sizes = f"batch {batch_size}, micro-batch {micro_batch_size}, {world_size} processes"
        raise UsageError(f"{sizes}: each must be at least 1")
    if batch_size % share:
        near = max(1, round(batch_size / share)) * share
        raise UsageError(
            f"a step of {batch_size} sequences does not split into micro-batches of "
            f"{micro_batch_size} on {world_size} processes; make it a multiple of {share}, "
            f"e.g. {near} ({near * seq_len} tokens), or change the micro-batch"
        )


def step_batches(
    dataset: PackedDataset,
    step: int,
    *,
    batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    mask_documents: bool = False,
    eot_id: int | None = None,
) -> list[MicroBatch]:
    """Return this rank's micro-batches of optimizer step ``step`` (from 0).

    The step takes the global samples [step * batch_size, (step + 1) * batch_size); ``batch_size``
    counts sequences over all ranks, and each rank takes a contiguous part. With ``mask_documents``
    the token behind an end-of-text id is no target and ``doc_start_BT`` is given. Raises as
    `check_batches`, and ValueError without the eot_id that masks need.
    """
    check_batches(
        dataset, batch_size=batch_size, micro_batch_size=micro_batch_size, world_size=world_size
    )
    part = batch_size // world_size
    first = step * batch_size + rank * part
    mask_id = _mask_id(mask_documents, eot_id)
    return [
        _micro_batch(dataset.rows(np.arange(g, g + micro_batch_size)), mask_id)
        for g in range(first, first + part, micro_batch_size)
    ]


def validation_batches(
    dataset: PackedDataset,
    micro_batch_size: int,
    max_batches: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    mask_documents: bool = False,
    eot_id: int | None = None,
) -> Iterator[MicroBatch]:
    """Yield the stream's windows in order, so that each token but the first is a target once.

    ``max_batches`` bounds the batches over all ranks; rank r takes every world_size-th, and all
    ranks get equally many. All batches have the same shape (the model is compiled once): the last
    window and the last batches are filled up with targets of -100.
    """
    T = dataset.seq_len
    targets = dataset.tokens - 1
    batches = -(-targets // (T * micro_batch_size))
    batches = batches if max_batches is None else min(batches, max_batches)
    mask_id = _mask_id(mask_documents, eot_id)
    rows = np.arange(micro_batch_size, dtype=np.int64)[:, None]
    for k in range(rank, -(-batches // world_size) * world_size, world_size):
        positions = (k * micro_batch_size + rows) * T + np.arange(T + 1)
        beyond = (positions > targets) | (k >= batches)
        windows = dataset.gather(np.minimum(positions, targets))
        yield _micro_batch(windows, mask_id, beyond[:, 1:])


def bytes_of(targets: np.ndarray | torch.Tensor, bytes_per_id: np.ndarray) -> int:
    """Return the bytes of text behind ``targets`` (on the CPU); ignored ones count 0."""
    ids = np.asarray(targets)
    return int(bytes_per_id[ids[ids >= 0]].sum())


def _mask_id(mask_documents: bool, eot_id: int | None) -> int | None:
    if mask_documents and eot_id is None:
        raise ValueError("mask_documents needs eot_id")
    return eot_id if mask_documents else None


def _micro_batch(
    windows: np.ndarray, mask_id: int | None, beyond: np.ndarray | None = None
) -> MicroBatch:
    """Split windows (B, T + 1) into inputs and targets, those in ``beyond`` (B, T) ignored."""
    import torch

    inputs, targets = windows[:, :-1], windows[:, 1:].copy()
    if beyond is not None:
        targets[beyond] = IGNORE_INDEX
    if mask_id is not None:
        targets[inputs == mask_id] = IGNORE_INDEX
    batch: MicroBatch = {
        "inputs_BT": torch.from_numpy(np.ascontiguousarray(inputs)),
        "targets_BT": torch.from_numpy(targets),
    }
    if mask_id is not None:
        batch["doc_start_BT"] = torch.from_numpy(document_starts(inputs, mask_id))
    return batch


def document_starts(inputs: np.ndarray, eot_id: int) -> np.ndarray:
    """Return for each position of ``inputs`` (B, T) where its document starts in the row, int32."""
    starts = np.zeros(inputs.shape, dtype=np.int32)
    places = np.arange(1, inputs.shape[1], dtype=np.int32)
    starts[:, 1:] = np.where(inputs[:, :-1] == eot_id, places, 0)
    return np.maximum.accumulate(starts, axis=1)

"""The processes of one run: torchrun's environment, a process group, and a clean end."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fastgpt.errors import FastGPTError, PeerError, UsageError

WAIT = timedelta(hours=2)
"""Processes wait this long for one that tokenizes or writes; ten minutes, NCCL's own limit, may not
do.
"""
OLDEST = (8, 0)
"""Compute capability of the oldest GPUs on which Triton's kernels use tensor cores (Ampere)."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the processes (float64)."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all processes at the end; what fails in one fails in all, and one says why.

        Raises the FastGPTError of the first process that has one, in the others PeerError.
        """
        error = None
        try:
            yield
        except FastGPTError as raised:
            error = raised
        code = error.exit_code if error else 0
        codes = self.sum([code if rank == self.rank else 0 for rank in range(self.size)])
        first = next((rank for rank, found in enumerate(codes) if found), None)
        if error is not None and first == self.rank:
            raise error
        if first is not None:
            raise PeerError(int(codes[first]))


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device called ``name``; "auto" takes a GPU if there is one. Raises UsageError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda (ROCm included) are supported")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: this PyTorch sees no GPU; use --device cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UsageError(f"--device {device}: GPUs here are numbered below {count}")
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
            raise UsageError(
                f"--device {name}: {torch.cuda.get_device_name(device)} is older than Ampere "
                "(sm_80), which the kernels need; use --device cpu"
            )
        torch.cuda.set_device(device)
    return device


@contextmanager
def world(device_name: str) -> Iterator[World]:
    """Join the process group that torchrun describes, or be alone; leave it in a safe order.

    Gloo aborts the process now and then when objects that hold communicators outlive the group, so
    the end waits for everybody and collects garbage first. NCCL's end waits for everybody by
    itself: a process that fails alone leaves the group to its exit, and says why at once.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(device_name, local_rank)
    if size == 1:
        yield World(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=WAIT)
    alone = False
    try:
        yield World(dist.get_rank(), size, device)
        dist.barrier()
    except BaseException as error:
        alone = not isinstance(error, FastGPTError)  # those are raised in all processes
        raise
    finally:
        gc.collect()
        if not (alone and backend == "nccl"):
            dist.destroy_process_group()

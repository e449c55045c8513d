"""Devices and process groups as on machines that are not here."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fastgpt import distributed
from fastgpt.distributed import pick_device, world
from fastgpt.errors import DataError, UsageError


@pytest.fixture
def two_gpus(monkeypatch):
    """Two H100, or what a test says."""
    facts = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_capability": lambda device: (9, 0),
        "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
        "set_device": lambda device: None,
    }
    for name, fact in facts.items():
        monkeypatch.setattr(torch.cuda, name, fact)


def test_each_process_has_a_gpu(two_gpus):
    assert pick_device("auto", 1) == pick_device("cuda", 1) == torch.device("cuda", 1)
    assert pick_device("cuda:0", 1) == torch.device("cuda", 0)
    assert pick_device("cpu", 1) == torch.device("cpu")


def test_a_gpu_that_is_not_there(two_gpus):
    for name, rank in (("auto", 2), ("cuda:2", 0)):
        with pytest.raises(UsageError, match="--device cuda:2: GPUs here are numbered below 2"):
            pick_device(name, rank)


def test_a_gpu_older_than_the_kernels(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UsageError, match=r"Tesla T4 is older than Ampere .*; use --device cpu"):
        pick_device("auto", 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD's numbers mean something else
    assert pick_device("auto", 0).type == "cuda"


@pytest.mark.parametrize("name", ["mps", "xpu", "meta"])
def test_other_devices(name):
    with pytest.raises(UsageError, match=f"--device {name}: only cpu and cuda"):
        pick_device(name, 0)


@pytest.fixture
def group(monkeypatch) -> list[str]:
    """What happens to the process group of rank 0 of two, which is not made."""
    happened: list[str] = []

    def init(backend, *, timeout):
        assert timeout.total_seconds() > 3600  # a rank may tokenize or write for long
        happened.append(f"init {backend}")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "barrier", lambda: happened.append("barrier"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: happened.append("destroy"))
    return happened


def run(error: BaseException | None) -> None:
    with world("auto"):
        if error is not None:
            raise error


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_a_process_that_fails_alone_does_not_wait_for_the_others(backend, group, monkeypatch):
    """NCCL's end would: they are in a sum, and the reason would never be seen."""
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    monkeypatch.setattr(distributed, "pick_device", lambda name, rank: device)
    run(None)
    assert group == [f"init {backend}", "barrier", "destroy"]
    for error in (DataError("in all processes"), RuntimeError("no memory"), KeyboardInterrupt()):
        group.clear()
        with pytest.raises(type(error)):
            run(error)
        shared = isinstance(error, DataError) or backend == "gloo"
        assert group == [f"init {backend}", *(["destroy"] if shared else [])]

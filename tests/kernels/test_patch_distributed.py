"""``patch`` under DDP and FSDP2 (gloo): one process here, two under ``-m full``."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from patch_models import MODELS, assert_equal_models, batch, reference_results, results
from torch import multiprocessing, nn

from fastgpt_kernels import cpu
from fastgpt_kernels.patch import patch, unpatch

pytest.importorskip("transformers", reason="pip install transformers")


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = getattr(model, "transformer", None)
    for block in layers.h if layers is not None else model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": ddp, "fsdp": fsdp}


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def check(name: str, wrapper: str, rank: int, world: int) -> None:
    """Each rank has some rows with as many targets, so that mean gradients are global ones."""
    model, inputs = MODELS[name](), batch(2 * world, 9)
    inputs["labels"] = inputs["input_ids"]
    native, exact = reference_results(model, inputs)
    keys = list(model.state_dict())
    patched = patch(model)
    wrapped = WRAPPERS[wrapper](model)
    rows = slice(2 * rank, 2 * rank + 2)
    ours = [whole(x) for x in results(wrapped, {key: x[rows] for key, x in inputs.items()})]
    assert list(model.state_dict()) == keys
    # Loss and logits are those of this rank's rows.
    parts = native[1][: rows.start], ours[1], native[1][rows.stop :]
    ours[0], ours[1] = native[0], torch.cat(parts)
    assert_equal_models(ours, native, exact)
    unpatch(patched)


def run(rank: int, world: int, path: str, name: str, wrapper: str) -> None:
    cpu._can_compile = lambda: False
    store = dist.FileStore(path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        check(name, wrapper, rank, world)
        dist.barrier()
        gc.collect()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", MODELS)
def test_one_process(name, wrapper, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_can_compile", lambda: False)
    run(0, 1, str(tmp_path / "store"), name, wrapper)


@pytest.mark.full
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", MODELS)
def test_two_processes(name, wrapper, tmp_path):
    multiprocessing.spawn(run, (2, str(tmp_path / "store"), name, wrapper), nprocs=2)

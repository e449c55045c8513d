"""The byte counter sees what a kernel moves, and a second read that was planted."""

from __future__ import annotations

import torch
import traffic
import triton
import triton.language as tl


@triton.jit
def _copy_kernel(x, y, n, READ_TWICE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    if READ_TWICE:
        value = 0.5 * (value + tl.load(x + i, mask=i < n, other=0.0))
    tl.store(y + i, value, mask=i < n)


@triton.jit
def _sum_kernel(x, total, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(total + i * 0, tl.load(x + i))
    tl.atomic_add(total, tl.load(x))


def copy(read_twice: bool) -> tuple[traffic.Traffic, torch.Tensor, torch.Tensor]:
    x, y = torch.randn(100), torch.empty(100)
    with traffic.count() as moved:
        _copy_kernel[(7,)](x, y, 100, READ_TWICE=read_twice, BLOCK=16)
    assert torch.equal(x, y)
    return moved, x, y


def test_masked_lanes_are_not_counted():
    moved, x, y = copy(read_twice=False)
    assert moved.programs == 7
    assert moved.loads() == moved.loads(x) == traffic.once(x)
    assert moved.stores() == moved.stores(y) == traffic.once(y)
    assert moved.stores(x).total == moved.loads(y).total == 0


def test_a_planted_second_read_shows():
    moved, x, _ = copy(read_twice=True)
    assert moved.loads(x) == traffic.Moved(800, 400, 400)


def test_reads_of_another_program_are_told_apart():
    x, y = torch.randn(16), torch.empty(16)
    with traffic.count() as moved:
        for _ in range(3):
            _copy_kernel[(1,)](x, y, 16, READ_TWICE=False, BLOCK=16)
    assert moved.loads(x) == traffic.Moved(192, 192, 64)


def test_part_of_a_tensor():
    moved, x, _ = copy(read_twice=False)
    assert moved.loads(x[10:20]) == traffic.once(x[10:20])
    assert moved.loads(x[:0]).total == 0


def test_broadcasts_and_atomics_count_once_an_access():
    x, total = torch.randn(16), torch.zeros(1)
    with traffic.count() as moved:
        _sum_kernel[(1,)](x, total, BLOCK=16)
    assert moved.loads(total) == moved.stores(total) == traffic.Moved(8, 4, 4)
    assert moved.loads(x) == traffic.Moved(68, 64, 64)


def test_sectors_of_scattered_elements():
    x = torch.zeros(64, 16)
    column, y = x[:, 0], torch.empty(64)
    with traffic.count() as moved:
        _copy_kernel[(1,)](column.contiguous(), y, 64, READ_TWICE=False, BLOCK=64)
        _gather_kernel[(1,)](column, y, column.stride(0), BLOCK=64)
    assert moved.loads(column).total == 256
    assert moved.sectors(column) == 64 * 32
    assert moved.sectors(y) == 2 * 256


@triton.jit
def _gather_kernel(x, y, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * stride))


def test_counting_ends():
    moved, x, y = copy(read_twice=False)
    before = moved.loads()
    _copy_kernel[(7,)](x, y, 100, READ_TWICE=False, BLOCK=16)
    assert moved.loads() == before

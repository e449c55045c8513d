"""Windows, steps, document masks and validation, each against loops over plain lists."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data.batches import (
    PackedDataset,
    Shard,
    bytes_of,
    check_batches,
    document_starts,
    step_batches,
    validation_batches,
)
from fastgpt.errors import DataError, UsageError

torch = pytest.importorskip("torch")
EOT = 9


def shard(tokens, name="a.bin"):
    tokens = np.array(tokens, dtype=np.uint16)
    return Shard(name, tokens, np.array([len(tokens)], dtype=np.uint64), 1 << 16, "00" * 32)


def counting(n, seq_len, *, seed=0, parts=1):
    """A dataset whose tokens are their own positions: a sample shows which one it is."""
    pieces = np.array_split(np.arange(n), parts)
    return PackedDataset([shard(piece) for piece in pieces], seq_len, seed=seed)


def windows_of(tokens, seq_len):
    windows = [tokens[i : i + seq_len + 1] for i in range(0, len(tokens), seq_len)]
    return [window for window in windows if len(window) == seq_len + 1]


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**64 - 1))
def test_every_window_once_an_epoch(n, seq_len, parts, seed):
    dataset = counting(n, seq_len, seed=seed, parts=min(parts, n))
    expected = windows_of(list(range(n)), seq_len)
    assert len(dataset) == len(expected)
    if not expected:
        return
    for epoch in range(3):
        first = epoch * len(expected)
        rows = dataset.rows(np.arange(first, first + len(expected)))
        assert rows.dtype == np.int64
        assert sorted(rows.tolist()) == expected
    straddling = np.arange(len(expected) // 2, len(expected) * 2)  # epochs mixed in one call
    assert dataset.rows(straddling).tolist() == [
        dataset.sample(int(g)).tolist() for g in straddling
    ]


def test_every_target_once_an_epoch():
    rows = counting(1001, 10, seed=4, parts=7).rows(range(100))
    assert sorted(rows[:, 1:].ravel().tolist()) == list(range(1, 1001))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        return counting(1001, 10, seed=seed).rows(np.arange(100) + 100 * epoch)[:, 0].tolist()

    orders = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for one, other in itertools.combinations(orders, 2):
        assert one != other  # in particular not seed + 1 at epoch 0 = seed at epoch 1
    assert order(1, 1) == order(1, 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 60), st.integers(0, 2**40), st.data())
def test_steps_do_not_depend_on_the_number_of_processes(micro, repeats, n, seed, data):
    batch_size = 4 * micro * repeats
    dataset = counting(n * 3 + 1, 3, seed=seed)
    step = data.draw(st.integers(0, 50))
    expected = dataset.rows(np.arange(step * batch_size, (step + 1) * batch_size))
    for world_size in (1, 2, 4):
        ranks = [
            step_batches(
                dataset,
                step,
                batch_size=batch_size,
                micro_batch_size=micro,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in ranks} == {4 * repeats // world_size}
        batches = [batch for rank in ranks for batch in rank]
        assert {batch["inputs_BT"].shape for batch in batches} == {(micro, 3)}
        assert torch.cat([b["inputs_BT"] for b in batches]).tolist() == expected[:, :-1].tolist()
        assert torch.cat([b["targets_BT"] for b in batches]).tolist() == expected[:, 1:].tolist()


def test_steps_use_every_sample_once_an_epoch():
    dataset = counting(641, 5, seed=2)
    starts = []
    for step in range(16):  # 128 samples an epoch, 8 a step
        for batch in step_batches(dataset, step, batch_size=8, micro_batch_size=2):
            starts += batch["inputs_BT"][:, 0].tolist()
    assert sorted(starts) == list(range(0, 640, 5))


def test_a_batch_larger_than_the_data_goes_through_several_epochs():
    dataset = counting(11, 5)
    (batch,) = step_batches(dataset, 3, batch_size=6, micro_batch_size=6)
    assert sorted(batch["inputs_BT"][:, 0].tolist()) == [0, 0, 0, 5, 5, 5]


def starts_by_loop(row):
    starts, start = [], 0
    for t in range(len(row)):
        if t > 0 and row[t - 1] == EOT:
            start = t
        starts.append(start)
    return starts


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(7, 9), min_size=1, max_size=12), min_size=1, max_size=5))
def test_document_starts(rows):
    rows = [(row * 12)[:12] for row in rows]
    starts = document_starts(np.array(rows), EOT)
    assert starts.dtype == np.int32
    assert starts.tolist() == [starts_by_loop(row) for row in rows]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
def test_document_masks_in_steps_and_validation(seq_len):
    tokens = np.random.default_rng(seq_len).integers(0, 10, 500)
    dataset = PackedDataset([shard(tokens[:200]), shard(tokens[200:])], seq_len)
    masked = {"mask_documents": True, "eot_id": EOT}
    plain = step_batches(dataset, 1, batch_size=4, micro_batch_size=2)
    batches = step_batches(dataset, 1, batch_size=4, micro_batch_size=2, **masked)
    pairs = list(zip(plain, batches, strict=True))
    pairs += zip(
        validation_batches(dataset, 3), validation_batches(dataset, 3, **masked), strict=True
    )
    for before, batch in pairs:
        assert set(before) == {"inputs_BT", "targets_BT"}
        inputs, targets = batch["inputs_BT"], batch["targets_BT"]
        assert batch["doc_start_BT"].dtype == torch.int32
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
        assert torch.equal(inputs, before["inputs_BT"])
        assert batch["doc_start_BT"].tolist() == [starts_by_loop(row) for row in inputs.tolist()]
        for b, t in np.ndindex(*inputs.shape):
            behind_eot = inputs[b, t] == EOT
            assert targets[b, t] == (-100 if behind_eot else before["targets_BT"][b, t])


def test_masks_need_the_id():
    with pytest.raises(ValueError, match="eot_id"):
        step_batches(counting(50, 5), 0, batch_size=1, micro_batch_size=1, mask_documents=True)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 5), st.integers(1, 4))
def test_validation_predicts_every_token_once(n, seq_len, micro, world_size):
    dataset = counting(n, seq_len, parts=min(3, n))
    ranks = [
        list(validation_batches(dataset, micro, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # so collectives in the model match up
    batches = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    assert {batch["inputs_BT"].shape for batch in batches} == {(micro, seq_len)}
    inputs = torch.cat([batch["inputs_BT"] for batch in batches]).ravel()
    targets = torch.cat([batch["targets_BT"] for batch in batches]).ravel()
    used = targets >= 0
    assert targets[used].tolist() == list(range(1, n))  # in stream order
    assert inputs[used].tolist() == list(range(n - 1))
    assert (targets[~used] == -100).all()
    assert int(inputs.max()) < n
    assert len(batches) - world_size < -(-(n - 1) // (seq_len * micro))


def test_max_batches_counts_over_all_ranks():
    dataset = counting(101, 5)
    alone = list(validation_batches(dataset, 2, 3))
    assert len(alone) == 3
    ranks = [list(validation_batches(dataset, 2, 3, rank=r, world_size=2)) for r in (0, 1)]
    assert [len(batches) for batches in ranks] == [2, 2]
    assert torch.equal(ranks[1][0]["inputs_BT"], alone[1]["inputs_BT"])
    assert (ranks[1][1]["targets_BT"] == -100).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (10, 4, 1),
            r"10 sequences .* micro-batches of 4 on 1 processes; .* multiple of 4, e.g. 8 ",
        ),
        ((8, 4, 4), r"multiple of 16, e.g. 16 \(80 tokens\)"),
        ((0, 1, 1), "at least 1"),
        ((4, 0, 1), "at least 1"),
        ((4, -1, 1), "at least 1"),
    ],
)
def test_uneven_steps_are_refused(sizes, message):
    batch_size, micro, world_size = sizes
    options = {"batch_size": batch_size, "micro_batch_size": micro, "world_size": world_size}
    for call in (check_batches, lambda dataset, **kw: step_batches(dataset, 0, **kw)):
        with pytest.raises(UsageError, match=message):
            call(counting(50, 5), **options)


def test_too_little_data():
    dataset = counting(5, 5)
    assert len(dataset) == 0
    with pytest.raises(
        DataError, match=r"a\.bin: 5 tokens, one sample takes seq_len \+ 1 = 6; .*--seq-len"
    ):
        check_batches(dataset, batch_size=1, micro_batch_size=1)
    check_batches(counting(6, 5), batch_size=1, micro_batch_size=1)
    with pytest.raises(DataError, match="1 tokens, nothing to predict"):
        counting(1, 5)
    with pytest.raises(DataError, match="no shards"):
        PackedDataset([], 5)
    with pytest.raises(ValueError, match="seq_len 0"):
        counting(5, 0)


def test_bytes_of():
    sizes = np.array([2, 1, 3, 5])
    targets = torch.tensor([[1, -100, 2], [0, 3, 3]])
    assert bytes_of(targets, sizes) == 16
    assert bytes_of(targets.numpy(), sizes) == 16
    assert bytes_of(torch.full((2, 2), -100), sizes) == 0


def test_a_step_is_assembled_within_two_milliseconds():
    tokens = np.random.default_rng(0).integers(0, 50_000, 2_000_000)
    dataset = PackedDataset([shard(tokens)], 256)
    times = []
    for step in range(100):
        begin = time.perf_counter()
        step_batches(
            dataset, step, batch_size=16, micro_batch_size=16, mask_documents=True, eot_id=EOT
        )
        times.append(time.perf_counter() - begin)
    assert min(times) < 2e-3  # the least, because the machine may be busy

"""Packing: every example once an epoch, whole, and blind to its neighbours."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.compiled import compile_blocks
from fastgpt.config import ModelConfig
from fastgpt.data.packing import PackedExamples, all_batches, pack, step_batches
from fastgpt.model import GPT

T = 24


def make(lengths, seed: int = 0):
    """Examples of that many ids; about half of them to be predicted, the last one always."""
    rng = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        learned = rng.random(length) < 0.5
        learned[-1] = True
        examples.append((rng.integers(1, 90, length), learned))
    return examples


def lengths(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(2, T + 1) for _ in range(n)]


def best_fit(sizes: list[int], capacity: int) -> list[int]:
    """Rooms left by best-fit decreasing, as it is defined."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), max_size=60), spare=st.integers(0, 30))
def test_pack_is_best_fit_decreasing(sizes, spare):
    capacity = max(sizes, default=1) + spare
    rows = pack(np.array(sizes, dtype=np.int64), capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert sorted(capacity - sum(sizes[i] for i in row) for row in rows) == best_fit(
        sizes, capacity
    )


@pytest.mark.parametrize("sizes", [[0], [5, 11], [-1]])
def test_what_fits_no_row(sizes):
    with pytest.raises(ValueError, match="1 to 10"):
        pack(np.array(sizes), 10)


def test_an_example_without_a_target_is_refused():
    ids = np.arange(5)
    for learned in (np.zeros(5, dtype=bool), np.arange(5) == 0):  # the first id has no target
        with pytest.raises(ValueError, match="5 ids, 0 to predict"):
            PackedExamples([(ids, learned)], T)
    with pytest.raises(ValueError, match="26 ids"):
        PackedExamples(make([T + 2]), T)


def unpacked(batch) -> list[tuple[list[int], list[int], list[int]]]:
    """(inputs, targets with -100, positions) of the examples in a batch, by a plain loop."""
    found = []
    pairs = zip(batch["places_N"].tolist(), batch["targets_BT"].tolist(), strict=True)
    targets = {place: target for place, target in pairs if target != -100}
    for b in range(len(batch["inputs_BT"])):
        starts = batch["doc_start_BT"][b].tolist()
        for begin in sorted(set(starts)):
            places = [t for t in range(T) if starts[t] == begin]
            assert places == list(range(begin, begin + len(places)))
            wanted = [targets.get(b * T + t, -100) for t in places]
            if wanted != [-100]:  # not a place behind the last example
                inputs = batch["inputs_BT"][b, places].tolist()
                found.append((inputs, wanted, batch["positions_BT"][b, places].tolist()))
    return found


def expected(examples) -> list[tuple[list[int], list[int], list[int]]]:
    return [
        (
            [int(ids[i]) for i in range(len(ids) - 1)],
            [int(ids[i + 1]) if learned[i + 1] else -100 for i in range(len(ids) - 1)],
            list(range(len(ids) - 1)),
        )
        for ids, learned in examples
    ]


def count(found) -> Counter:
    return Counter(str(example) for example in found)


def test_every_example_once_an_epoch_whole():
    examples = make(lengths(57))
    packed = PackedExamples(examples, T, seed=3)
    rows, batches = len(packed), []
    for step in range(2 * rows):
        batches += step_batches(packed, step, batch_size=1, micro_batch_size=1)
    orders = []
    for epoch in range(2):
        found = [e for batch in batches[epoch * rows : (epoch + 1) * rows] for e in unpacked(batch)]
        assert count(found) == count(expected(examples))
        orders.append(found)
    assert orders[0] != orders[1]
    assert packed.targets == sum(int(learned[1:].sum()) for _, learned in examples)


def test_neighbours_change_from_epoch_to_epoch():
    packed = PackedExamples(make(lengths(60)), T, seed=1)
    pairs = [
        {(a, b) for row in packed.epoch(e) for a in row for b in row if a < b} for e in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 0.5 * len(pairs[0])


def test_rows_are_a_function_of_seed_and_place():
    examples = make(lengths(40))
    first, again = (PackedExamples(examples, T, seed=5) for _ in range(2))
    n = len(first)
    straight = [first.examples(g) for g in range(3 * n)]
    assert [again.examples(g) for g in reversed(range(3 * n))] == straight[::-1]
    assert straight != [PackedExamples(examples, T, seed=6).examples(g) for g in range(3 * n)]
    assert first.fingerprint == again.fingerprint
    changed = [(ids.copy(), learned) for ids, learned in examples]
    changed[7][0][0] += 1
    assert first.fingerprint != PackedExamples(changed, T, seed=5).fingerprint


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_ranks_and_micro_batches_share_a_step():
    packed = PackedExamples(make(lengths(80)), T, seed=2)
    whole = step_batches(packed, 3, batch_size=8, micro_batch_size=2)
    parts = [
        batch
        for rank in range(2)
        for batch in step_batches(
            packed, 3, batch_size=8, micro_batch_size=2, rank=rank, world_size=2
        )
    ]
    assert len(whole) == 4
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_batches_has_each_example_once(world_size):
    examples = make(lengths(31))
    packed = PackedExamples(examples, T, seed=2)
    batches = [
        batch
        for rank in range(world_size)
        for batch in all_batches(packed, 4, rank=rank, world_size=world_size)
    ]
    assert {batch["inputs_BT"].shape for batch in batches} == {(4, T)}
    first = [
        b
        for r in range(world_size)
        for b in all_batches(packed, 4, 2, rank=r, world_size=world_size)
    ]
    assert count([e for b in first for e in unpacked(b)]) == count(
        [e for b in list(all_batches(packed, 4))[:2] for e in unpacked(b)]
    )
    assert count([e for batch in batches for e in unpacked(batch)]) == count(expected(examples))


def test_targets_are_filled_up_to_few_shapes():
    packed = PackedExamples(make(lengths(50)), T)
    (batch,) = step_batches(packed, 0, batch_size=5, micro_batch_size=5)
    assert len(batch["targets_BT"]) == len(batch["places_N"]) == 256
    real = batch["targets_BT"] != -100
    assert 0 < real.sum() < 5 * T
    assert not batch["places_N"][~real].any()


SHAPES = {
    "modern": {"qk_norm": True, "embed_norm": True, "norm_weight": False},
    "gpt2": {"norm": "layer_norm", "mlp": "gelu_tanh", "position": "learned", "bias": True},
    "banded": {"window": 5, "mlp": "swiglu", "n_kv_head": 1},
}


def hidden(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(
            batch["inputs_BT"], positions=batch["positions_BT"], doc_start=batch["doc_start_BT"]
        )


@pytest.fixture(params=SHAPES)
def model(request, seeded, uncompiled) -> GPT:
    shape = SHAPES[request.param]
    return GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=96, context=T, **shape))


def assert_blind(model: GPT, run) -> None:
    """Changing the ids of one example changes no bit of what ``run`` gives for another."""
    packed = PackedExamples(make([8, 7, 9, 12, 13]), T)
    rows = packed.epoch(0)
    before = packed.batch(rows)
    owner = np.full((len(rows), T), -1)
    for b, members in enumerate(rows):
        places = [i for i in members for _ in range(packed.lengths[i])]
        owner[b, : len(places)] = places
    for changed in range(5):
        after = {name: tensor.clone() for name, tensor in before.items()}
        mine = torch.from_numpy(owner == changed)
        after["inputs_BT"][mine] = (after["inputs_BT"][mine] + 41) % 96
        a, b = run(model, before), run(model, after)
        others = torch.from_numpy((owner != changed) & (owner >= 0))
        assert torch.equal(a[others], b[others])
        assert not torch.equal(a[mine], b[mine])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_an_example_depends_on_another(model, dtype):
    model.compute_dtype = dtype
    assert_blind(model, hidden)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nor_in_training_compiled(dtype, seeded):
    """Which goes other ways through attention than inference does."""
    shape = SHAPES["modern"]
    model = GPT(
        ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=96, context=T, **shape), dtype
    )
    compile_blocks(model, varying=False)
    assert_blind(
        model,
        lambda model, batch: model(
            batch["inputs_BT"], positions=batch["positions_BT"], doc_start=batch["doc_start_BT"]
        ).detach(),
    )


def test_packed_is_as_alone(model):
    """So positions begin at 0 in each example, too."""
    examples = make([8, 7, 9, 12, 13])
    packed = PackedExamples(examples, T)
    rows = packed.epoch(0)
    together = hidden(model, packed.batch(rows))
    for b, members in enumerate(rows):
        begin = 0
        for i in members:
            end = begin + int(packed.lengths[i])
            alone = model(torch.from_numpy(examples[i][0][None, :-1]))[0]
            torch.testing.assert_close(together[b, begin:end], alone, atol=2e-5, rtol=1e-4)
            begin = end

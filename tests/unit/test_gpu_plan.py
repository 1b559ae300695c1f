"""What a step needs on the device: the items of its work, the slots of its tokens, its buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runners.text.gpu.plan import StepPlan, partial_slots, plan_work, rows_per_tile, token_slots


def segments(seed: int) -> tuple[list[int], list[int]]:
    random = np.random.default_rng(seed)
    counts = np.where(random.random(12) < 0.6, 1, random.integers(1, 90, 12))
    return counts.tolist(), (counts + random.integers(0, 900, 12)).tolist()


@pytest.mark.parametrize("capacity", [0, 10, 100, 10_000])
@pytest.mark.parametrize("few_tiles", [0, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_the_items_of_a_plan_are_its_work(capacity: int, few_tiles: int, seed: int) -> None:
    counts, lengths = segments(seed)
    work = plan_work(
        counts, lengths, tile_rows=16, capacity=capacity, split=64, few_tiles=few_tiles
    )
    starts = np.cumsum([0, *counts])
    direct: dict[int, int] = {}  # per row of the step, the splits that its item goes through
    partial: dict[int, tuple[int, int]] = {}  # per slot, its row and its split
    for number, (segment, first_row, split, splits, slot) in enumerate(work.items.tolist()):
        count, length = counts[segment], lengths[segment]
        assert (number < work.decode_items) == (count == 1)
        assert first_row % 16 == 0
        for row in range(first_row, min(first_row + 16, count)):
            step_row = int(starts[segment]) + row
            if slot < 0:
                assert split == 0
                assert step_row not in direct
                direct[step_row] = splits
                position = length - count + row
                assert splits * 64 > position
            else:
                assert splits == 1
                own = slot + row - first_row
                assert own not in partial
                partial[own] = step_row, split
    reduced: dict[int, list[int]] = {}
    for step_row, position, slot, stride, splits in work.reductions.tolist():
        assert step_row not in reduced
        reduced[step_row] = [slot + i * stride for i in range(splits)]
        for split, each in enumerate(reduced[step_row]):
            assert partial[each] == (step_row, split)
        segment = int(np.searchsorted(starts, step_row, side="right")) - 1
        assert position == lengths[segment] - int(starts[segment + 1]) + step_row
        assert (splits - 1) * 64 <= position < splits * 64
    assert sorted([*direct, *reduced]) == list(range(sum(counts)))
    assert work.slots == len(partial) <= capacity
    if few_tiles == 0:
        assert all(work.items[work.decode_items :, 4] == -1)
    elif capacity == 10_000:
        assert all(splits == 1 for splits in direct.values())


def test_a_pool_has_slots_for_all_decoding_rows() -> None:
    lengths = [1, 255, 256, 257, 5000, 31]
    pages = sum(-(-n // 32) for n in lengths)
    work = plan_work([1] * 6, lengths, tile_rows=16, capacity=partial_slots(pages, 6))
    splits = [-(-n // 256) for n in lengths]
    assert len(work.items) == sum(splits)
    assert len(work.reductions) == sum(n > 1 for n in splits)


def test_token_slots() -> None:
    tables = np.array([[7, 3, 9], [5, 0, 0]])
    slots = token_slots([3, 1], [65, 32], tables)
    assert slots.tolist() == [3 * 32 + 30, 3 * 32 + 31, 9 * 32, 5 * 32 + 31]


def step_plan(**sizes: int) -> StepPlan:
    limits = {"max_rows": 8, "max_sequences": 3, "max_table": 4, "capacity": 4} | sizes
    return StepPlan(torch.device("cpu"), group=2, record_size=10, **limits)


def test_a_plan_is_filled_in_place() -> None:
    plan = step_plan()
    addresses = [t.data_ptr() for t in (plan.slots, plan.lengths, plan.items, plan.block_tables)]
    for counts, lengths, tables in (
        ([1, 1, 5], [32, 40, 64], [[1, 0], [2, 3], [4, 5]]),
        ([2], [3], [[6]]),
        ([1, 1], [1, 128], [[7, 0, 0, 0], [1, 2, 3, 4]]),
    ):
        plan.fill(counts, lengths, np.array(tables))
        n, rows = len(counts), sum(counts)
        assert (plan.sequences, plan.rows, plan.max_count) == (n, rows, max(counts))
        assert plan.has_chunks == (max(counts) > 1)
        assert plan.query_starts[: n + 1].tolist() == np.cumsum([0, *counts]).tolist()
        assert plan.lengths[:n].tolist() == lengths
        assert plan.block_tables[:n, : len(tables[0])].tolist() == tables
        assert torch.equal(
            plan.slots[:rows], torch.as_tensor(token_slots(counts, lengths, np.array(tables)))
        )
        assert plan.bounds[2] == n
    assert addresses == [
        t.data_ptr() for t in (plan.slots, plan.lengths, plan.items, plan.block_tables)
    ]


@pytest.mark.parametrize(
    ("counts", "width"), [([9], 1), ([1, 1, 1, 1], 1), ([1], 5)], ids=["rows", "sequences", "pages"]
)
def test_a_step_that_is_too_large_is_refused(counts: list[int], width: int) -> None:
    with pytest.raises(ValueError, match="exceeds"):
        step_plan().fill(counts, [9] * len(counts), np.zeros((len(counts), width), int))


@pytest.mark.parametrize(("block", "group", "rows"), [(64, 3, 21), (16, 71, 1), (8, 16, 1)])
def test_rows_per_tile(block: int, group: int, rows: int) -> None:
    assert rows_per_tile(block, group) == rows

"""Block allocation: references, sharing, eviction, and a long random life."""

from __future__ import annotations

import random

from runners.text.paging.blocks import BLOCK_SIZE, BlockAllocator, SequenceBlocks


def fill(allocator: BlockAllocator, tokens: list[int]) -> SequenceBlocks | None:
    sequence = allocator.begin(tokens)
    rest = tokens[sequence.length :]
    if not allocator.extend(sequence, len(rest)):
        allocator.release(sequence)
        return None
    allocator.commit(sequence, rest)
    return sequence


def test_only_whole_blocks_are_shared_and_one_token_is_always_computed() -> None:
    allocator = BlockAllocator(8)
    tokens = list(range(2 * BLOCK_SIZE))
    first = fill(allocator, tokens)
    assert first is not None
    assert len(first.blocks) == 2
    assert allocator.begin(tokens).length == BLOCK_SIZE
    assert allocator.begin([*tokens, 1]).length == 2 * BLOCK_SIZE
    assert allocator.begin(tokens[:BLOCK_SIZE]).length == 0
    assert allocator.begin([*tokens[: BLOCK_SIZE - 1], 999, *tokens]).length == 0


def test_equal_blocks_after_different_beginnings_are_not_shared() -> None:
    allocator = BlockAllocator(8)
    same = [7] * BLOCK_SIZE
    fill(allocator, [1] * BLOCK_SIZE + same)
    other = allocator.begin([2] * BLOCK_SIZE + same + [0])
    assert other.length == 0


def test_a_shared_block_outlives_its_first_owner() -> None:
    allocator = BlockAllocator(4)
    tokens = [5] * (BLOCK_SIZE + 1)
    first = fill(allocator, tokens)
    second = fill(allocator, tokens)
    assert first is not None
    assert second is not None
    assert first.blocks[0] == second.blocks[0]
    allocator.release(first)
    assert allocator.free == 2
    allocator.release(second)
    assert allocator.free == 4


def test_the_least_recently_used_is_forgotten_first() -> None:
    allocator = BlockAllocator(2)
    old, new = [[n] * (BLOCK_SIZE + 1) for n in (1, 2)]
    for tokens in (old[:BLOCK_SIZE], new[:BLOCK_SIZE]):
        held = fill(allocator, tokens)
        assert held is not None
        allocator.release(held)
    third = fill(allocator, [3] * BLOCK_SIZE)
    assert third is not None
    assert allocator.begin(new).length == BLOCK_SIZE
    assert allocator.begin(old).length == 0


def test_nothing_is_taken_where_not_everything_fits() -> None:
    allocator = BlockAllocator(2)
    sequence = allocator.begin([0])
    assert not allocator.extend(sequence, 3 * BLOCK_SIZE)
    assert allocator.free == 2
    assert list(sequence.blocks) == []


def test_without_caching_nothing_is_remembered() -> None:
    allocator = BlockAllocator(4, prefix_caching=False)
    tokens = [5] * (BLOCK_SIZE + 1)
    fill(allocator, tokens)
    assert allocator.begin(tokens).length == 0


def test_a_long_random_life_loses_and_doubles_no_block() -> None:
    draw = random.Random(1)
    allocator = BlockAllocator(20)
    alive: list[tuple[SequenceBlocks, list[int]]] = []
    held: dict[int, tuple[int, ...]] = {}
    for _ in range(3000):
        if alive and draw.random() < 0.5:
            allocator.release(alive.pop(draw.randrange(len(alive)))[0])
        else:
            tokens = [draw.randrange(2)] * BLOCK_SIZE * draw.randrange(3)
            tokens += [draw.randrange(3) for _ in range(draw.randrange(1, 40))]
            shared = allocator.begin(tokens)
            for i, block in enumerate(shared.blocks):
                # What a shared block holds is what this sequence would have computed there.
                assert held[block] == tuple(tokens[: (i + 1) * BLOCK_SIZE])
            rest = tokens[shared.length :]
            if not allocator.extend(shared, len(rest)):
                allocator.release(shared)
                continue
            allocator.commit(shared, rest)
            for i, block in enumerate(shared.blocks):
                held[block] = tuple(tokens[: (i + 1) * BLOCK_SIZE])
            alive.append((shared, tokens))
        used = {block for sequence, _ in alive for block in sequence.blocks}
        assert len(used) + allocator.free == 20
    for sequence, tokens in alive:
        assert sequence.tokens == tokens
        for i, block in enumerate(sequence.blocks):
            assert held[block] == tuple(tokens[: (i + 1) * BLOCK_SIZE])

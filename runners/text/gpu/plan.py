"""What one step of packed rows needs on the device, filled in place from host arrays.

A decoding row is cut into one item for each split of its keys, so that a few long sequences occupy
the whole device. So are the tiles of a few chunks. Other tiles go through all their splits in one
item. The kernel gives the same bits either way, so the plan may choose by speed and by the space
for partial results.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from runners.text.paging.blocks import BLOCK_SIZE

Ints = npt.NDArray[np.int64]

ITEM = 5
"""Numbers of an item: segment, first row of the tile, first split, splits, first slot or -1."""
REDUCTION = 5
"""Numbers of a reduction: row of the step, position, first slot, slots between splits, splits."""
MAX_GROUP = 16
"""Query heads of a KV head in one tile; more of them are shared out among programs."""
SPLIT = 256
"""Tokens of a split. Another number changes the bits of long sequences."""
FEW_TILES = 32
"""Up to so many tiles of chunks in a step are cut into splits."""
ALIGNMENT = 4
"""int32 numbers that each part of a packed buffer is a multiple of: 16 bytes."""


def heads_per_tile(block_m: int, group: int) -> int:
    """Query heads in a tile, for each row, where `group` heads share their keys."""
    return min(group, MAX_GROUP, block_m)


def rows_per_tile(block_m: int, group: int) -> int:
    """Query rows in a tile of `block_m` rows of the matrix product."""
    return block_m // heads_per_tile(block_m, group)


def default_programs(device: torch.device, kv_heads: int) -> int:
    """Programs for each KV head such that all heads together fill the device several times."""
    if device.type != "cuda":
        return 2
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return -(-4 * processors // kv_heads)


def partial_slots(pages: int, max_sequences: int, split: int = SPLIT) -> int:
    """Slots that decoding rows need at most, if the pool has `pages` that no sequences share.

    Sequences that share pages may need more. The rows for which there is no space go through their
    splits in one item, which takes longer and gives the same bits.
    """
    return pages * BLOCK_SIZE // split + max_sequences


@dataclass(frozen=True, slots=True)
class Work:
    """The items and reductions of a step, int32, and the slots that the items use."""

    items: npt.NDArray[np.int32]
    """`[n, ITEM]`, those of segments of one row first."""
    reductions: npt.NDArray[np.int32]
    """`[m, REDUCTION]`"""
    decode_items: int
    slots: int


def plan_work(
    counts: npt.ArrayLike,
    lengths: npt.ArrayLike,
    *,
    tile_rows: int,
    capacity: int,
    split: int = SPLIT,
    few_tiles: int = FEW_TILES,
) -> Work:
    """The work of segments with `counts[i]` rows that are the last ones of `lengths[i]` tokens.

    `tile_rows` is the number of rows of a tile, `capacity` the number of slots for partial results.
    """
    count, length = np.asarray(counts, np.int64), np.asarray(lengths, np.int64)
    starts = np.cumsum(count) - count
    # Tiles: a decoding row, or up to `tile_rows` rows of a chunk.
    tiles = -(-count // tile_rows)
    segment = np.repeat(np.arange(len(count)), tiles)
    row = (np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile_rows
    rows = np.minimum(count[segment] - row, tile_rows)
    end = length[segment] - count[segment] + row + rows
    splits = -(-end // split)
    is_single = count[segment] == 1
    may_split = (splits > 1) & (is_single | ((~is_single).sum() <= few_tiles))
    # The longest get the slots first.
    needed = np.where(may_split, splits * rows, 0)
    order = np.argsort(-splits, kind="stable")
    fits = np.empty(len(order), bool)
    fits[order] = np.cumsum(needed[order]) <= capacity
    is_split = may_split & fits
    taken = np.where(is_split, needed, 0)
    first_slot = np.cumsum(taken) - taken
    # Items: decoding rows first, and the longest first, so that none of them ends last.
    pieces = np.where(is_split, splits, 1)
    order = np.lexsort((-splits, ~is_single))
    tile = np.repeat(order, pieces[order])
    piece = _counting(pieces[order])
    item_slot = np.where(is_split[tile], first_slot[tile] + piece * rows[tile], -1)
    item_splits = np.where(is_split[tile], 1, splits[tile])
    items = np.stack([segment[tile], row[tile], piece, item_splits, item_slot], 1)
    # Reductions: one for each row of a tile that was split.
    tile = np.repeat(np.flatnonzero(is_split), rows[is_split])
    offset = _counting(rows[is_split])
    step_row = starts[segment[tile]] + row[tile] + offset
    position = end[tile] - rows[tile] + offset
    fields = [step_row, position, first_slot[tile] + offset, rows[tile], position // split + 1]
    return Work(
        items.astype(np.int32),
        np.stack(fields, 1).astype(np.int32),
        int(pieces[is_single].sum()),
        int(taken.sum()),
    )


def _counting(repeats: Ints) -> Ints:
    """0, 1, ... n - 1 for each n of `repeats`, concatenated."""
    counting: Ints = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return counting


def token_slots(counts: npt.ArrayLike, lengths: npt.ArrayLike, tables: npt.ArrayLike) -> Ints:
    """int64 `[rows]`: where the KV of each row goes, as page * BLOCK_SIZE + offset."""
    count, length = np.asarray(counts, np.int64), np.asarray(lengths, np.int64)
    position = np.repeat(length - count, count) + _counting(count)
    segment = np.repeat(np.arange(len(count)), count)
    pages = np.asarray(tables, np.int64)[segment, position // BLOCK_SIZE]
    slots: Ints = pages * BLOCK_SIZE + position % BLOCK_SIZE
    return slots


class StepPlan:
    """The device tensors of a step. Their addresses stay the same, so CUDA graphs may keep them.

    `max_table` is the number of pages of the longest sequence, `group` the number of query heads
    of a KV head, `programs` the number of programs of a kernel for each KV head. There is space for
    `capacity` partial results (see `partial_slots`) of `record_size` numbers each, which is
    `heads * (value_size + 2)` of the layer where that is largest.
    """

    slots: torch.Tensor
    """int64 `[max_rows]`, see `token_slots`."""
    query_starts: torch.Tensor
    """int32 `[max_sequences + 1]`"""
    lengths: torch.Tensor
    """int32 `[max_sequences]`"""
    bounds: torch.Tensor
    """int32 `[4]`: 0, the end of the items of decoding rows, the end of all, and the number of
    reductions."""
    block_tables: torch.Tensor
    """int32 `[max_sequences, max_table]`"""
    items: torch.Tensor
    reductions: torch.Tensor
    scratch: torch.Tensor
    """float32, partial results"""

    def __init__(
        self,
        device: torch.device,
        *,
        max_rows: int,
        max_sequences: int,
        max_table: int,
        group: int,
        record_size: int,
        capacity: int,
        prefill_tile: int = 64,
        programs: int = 1,
        split: int = SPLIT,
    ) -> None:
        self.device, self.split, self.programs = device, split, programs
        self.capacity = capacity
        self._tile_rows = rows_per_tile(prefill_tile, group)
        self.rows = self.sequences = 0
        self.has_chunks = False
        """Whether a segment of the step has more than one row."""
        self.max_count = 0
        """Rows of its largest segment."""
        max_items = 2 * max_sequences + -(-max_rows // self._tile_rows) + capacity
        sizes = {
            "slots": 2 * max_rows,
            "query_starts": max_sequences + 1,
            "lengths": max_sequences,
            "bounds": 4,
            "block_tables": max_sequences * max_table,
            "items": max_items * ITEM,
            "reductions": min(max_rows, capacity) * REDUCTION,
        }
        self._packed = _Packed(sizes, device)
        view = self._packed.view
        self.slots = view("slots").view(torch.int64)
        self.query_starts, self.lengths = view("query_starts"), view("lengths")
        self.bounds = view("bounds")
        self.block_tables = view("block_tables").view(max_sequences, max_table)
        self.items = view("items").view(-1, ITEM)
        self.reductions = view("reductions").view(-1, REDUCTION)
        self.scratch = torch.zeros(capacity * record_size, dtype=torch.float32, device=device)

    def fill(
        self,
        counts: Sequence[int] | npt.NDArray[np.integer],
        lengths: Sequence[int] | npt.NDArray[np.integer],
        tables: npt.NDArray[np.integer],
        *,
        rows: int = 0,
        padding_slot: int = 0,
        has_chunks: bool = False,
    ) -> None:
        """Describe a step of segments with `counts[i]` rows, the last ones of `lengths[i]` tokens.

        `tables` is `[n, width]`: the pages of each segment, anything beyond its end. Segments may
        have no row. If the step is padded to `rows`, the KV of further rows goes to `padding_slot`.
        A graph of a step that has chunks at times is captured with `has_chunks`. It does not
        wait for the device, except for the copies of the step before last. Work that was submitted
        to the current stream still sees the step before.
        Raises: ValueError if the step is larger than this plan.
        """
        count, length = np.asarray(counts, np.int64), np.asarray(lengths, np.int64)
        slots = token_slots(count, length, tables)
        padding = np.full(max(0, rows - len(slots)), padding_slot, np.int64)
        slots = np.concatenate([slots, padding])
        rows, sequences, width = len(slots), len(count), tables.shape[1]
        maximum = len(self.slots), *self.block_tables.shape
        if any(n > m for n, m in zip((rows, sequences, width), maximum, strict=True)):
            raise ValueError(
                f"step of {rows} rows, {sequences} sequences and {width} pages exceeds {maximum}"
            )
        work = plan_work(
            count,
            length,
            tile_rows=self._tile_rows,
            capacity=self.capacity,
            split=self.split,
        )
        table_rows = np.zeros((sequences, self.block_tables.shape[1]), np.int32)
        table_rows[:, :width] = tables
        ends = [0, work.decode_items, len(work.items), len(work.reductions)]
        self._packed.copy(
            {
                "slots": slots.view(np.int32),
                "query_starts": np.concatenate([[0], np.cumsum(count)]),
                "lengths": length,
                "bounds": np.array(ends),
            },
            {"block_tables": table_rows},
            {"items": work.items},
            {"reductions": work.reductions},
        )
        self.rows, self.sequences = rows, sequences
        self.has_chunks = has_chunks or work.decode_items < len(work.items)
        self.max_count = rows if has_chunks else int(count.max(initial=1))


class _Packed:
    """int32 arrays in one buffer on the device, filled through two buffers of the host in turn."""

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        self._device = device
        is_cuda = device.type == "cuda"
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()]
        starts = itertools.accumulate(padded, initial=0)
        self._parts = {n: slice(a, a + sizes[n]) for n, a in zip(sizes, starts, strict=False)}
        self._buffer = torch.zeros(sum(padded), dtype=torch.int32, device=device)
        self._staging = [
            torch.zeros(sum(padded), dtype=torch.int32, pin_memory=is_cuda) for _ in range(2)
        ]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def view(self, name: str) -> torch.Tensor:
        """A part on the device."""
        return self._buffer[self._parts[name]]

    def copy(self, *groups: dict[str, npt.NDArray[np.integer]]) -> None:
        """Copy arrays to the beginning of the parts with their names, each group in one copy.

        The parts of a group are neighbours, and what is between its arrays is copied with them.
        """
        turn = self._turn
        self._turn = 1 - turn
        if (event := self._copied[turn]) is not None:
            event.synchronize()
        staging = self._staging[turn]
        for arrays in groups:
            for name, array in arrays.items():
                start = end = self._parts[name].start
                end += array.size
                staging[start:end].numpy()[:] = array.ravel()
            first = self._parts[next(iter(arrays))].start
            self._buffer[first:end].copy_(staging[first:end], non_blocking=True)
        if self._device.type == "cuda":
            self._copied[turn] = event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))

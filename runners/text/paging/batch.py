"""The batch of a step, and the context of its forward over the paged KV cache."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.paging.kv import KVPool, LayerKV


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything that the forward of a step depends on, so that all ranks compute the same."""

    tokens: list[list[int]]
    """Per sequence, its next tokens. `-1 - i` is the token that was sampled as number i after the
    batch before."""
    past: list[int]
    """Per sequence, the number of tokens before these."""
    block_tables: list[array[int]]
    """Per sequence, the ids of the blocks of all these tokens."""
    wanted: list[bool]
    """Per sequence, whether the logits of its last token are wanted."""
    shared: bool = False
    """Whether all ranks are to know the tokens that are sampled for those."""

    def select(self, indices: Sequence[int]) -> Batch:
        """The batch of some of the sequences."""
        return Batch(
            [self.tokens[i] for i in indices],
            [self.past[i] for i in indices],
            [self.block_tables[i] for i in indices],
            [self.wanted[i] for i in indices],
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start : start + count` of a packed forward: the next tokens of one sequence."""

    start: int
    count: int
    past: int
    """Number of tokens before these rows."""
    block_table: array[int]
    """Ids of the blocks of the tokens up to `end`."""

    @property
    def end(self) -> int:
        """Number of tokens including these rows."""
        return self.past + self.count


class ForwardContext:
    """A batch in one forward. Each tensor is created once and serves every layer."""

    def __init__(self, pool: KVPool, batch: Batch) -> None:
        self.pool = pool
        counts = [len(tokens) for tokens in batch.tokens]
        starts = itertools.accumulate(counts, initial=0)
        rows = zip(starts, counts, batch.past, batch.block_tables, strict=False)
        self.segments = [Segment(*each) for each in rows]
        self._tensors: dict[tuple[object, ...], torch.Tensor] = {}

    @cached_property
    def layout(self) -> torch.Tensor:
        """int32 `[n, 4]`, per segment: start, count, past, index of its first block id in
        `block_tables`."""
        rows, first = [], 0
        for segment in self.segments:
            rows.append((segment.start, segment.count, segment.past, first))
            first += len(segment.block_table)
        return torch.tensor(rows, dtype=torch.int32)

    @cached_property
    def block_tables(self) -> torch.Tensor:
        """int32, the block ids of all segments, concatenated."""
        return torch.tensor([b for s in self.segments for b in s.block_table], dtype=torch.int32)

    @cached_property
    def singles(self) -> list[Segment]:
        """The segments of one row: sequences that decode."""
        return [s for s in self.segments if s.count == 1]

    @cached_property
    def chunks(self) -> list[Segment]:
        """The segments of several rows: chunks of prompts."""
        return [s for s in self.segments if s.count > 1]

    def write(self, layer: LayerKV, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write keys and values `[kv_heads, rows, size]` of all rows into their blocks."""
        blocks, offsets = self._slots(key.device)
        layer.keys[blocks, :, :, offsets] = key.transpose(0, 1)
        layer.values[blocks, :, offsets, : value.shape[-1]] = value.transpose(0, 1)

    def read(
        self, layer: LayerKV, segments: Sequence[Segment], value_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[n, kv_heads, columns, size]` of segments, one column per token."""
        device = layer.keys.device
        keys, values = gather(layer, self._padded_tables(segments, device), value_size)
        # A sequence's last block has leftovers beyond its end. They may be NaN, which no mask
        # hides: zero times NaN is NaN.
        beyond = self._beyond_end(segments, keys.shape[2], device)
        return keys.masked_fill(beyond, 0), values.masked_fill(beyond, 0)

    def single_rows(self, device: torch.device) -> torch.Tensor:
        """The rows of `singles`, int64."""
        return self._tensor("rows", device, lambda: [s.start for s in self.singles])

    def single_mask(self, columns: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Additive `[n, 1, 1, columns]`: what the one row of each of `singles` attends to."""

        def create() -> torch.Tensor:
            ends = torch.tensor([s.end for s in self.singles], device=like.device)[:, None]
            column = torch.arange(columns, device=like.device)[None]
            visible = column < ends
            if window:
                visible &= column >= ends - window
            return _additive(visible, like)[:, None, None]

        return self._once(("single_mask", columns, window, like.device, like.dtype), create)

    def chunk_mask(
        self, segment: Segment, columns: int, window: int | None, like: torch.Tensor
    ) -> torch.Tensor:
        """Additive `[count, columns]`: each row attends to itself and to the tokens before it."""

        def create() -> torch.Tensor:
            row = torch.arange(segment.past, segment.end, device=like.device)[:, None]
            column = torch.arange(columns, device=like.device)[None]
            visible = column <= row
            if window:
                visible &= column > row - window
            return _additive(visible, like)

        return self._once(("mask", segment.start, columns, window, like.device, like.dtype), create)

    def _slots(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset of every row."""

        def column(index: int) -> list[int]:
            return [
                (s.block_table[t // BLOCK_SIZE], t % BLOCK_SIZE)[index]
                for s in self.segments
                for t in range(s.past, s.end)
            ]

        return (
            self._tensor("blocks", device, lambda: column(0)),
            self._tensor("offsets", device, lambda: column(1)),
        )

    def _beyond_end(
        self, segments: Sequence[Segment], columns: int, device: torch.device
    ) -> torch.Tensor:
        """Boolean `[n, 1, columns, 1]`: columns beyond the end of each segment."""

        def create() -> torch.Tensor:
            ends = torch.tensor([s.end for s in segments], device=device)[:, None]
            beyond = torch.arange(columns, device=device)[None] >= ends
            return beyond[:, None, :, None]

        return self._once(("beyond", *(s.start for s in segments), columns, device), create)

    def _padded_tables(self, segments: Sequence[Segment], device: torch.device) -> torch.Tensor:
        def rows() -> list[list[int]]:
            width = max(len(s.block_table) for s in segments)
            return [[*s.block_table, *[0] * (width - len(s.block_table))] for s in segments]

        return self._tensor(("tables", *(s.start for s in segments)), device, rows)

    def _tensor(self, name: object, device: torch.device, data: Callable[[], Any]) -> torch.Tensor:
        return self._once((name, device), lambda: torch.tensor(data(), device=device))

    def _once(self, key: tuple[object, ...], create: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self._tensors:
            self._tensors[key] = create()
        return self._tensors[key]


def gather(
    layer: LayerKV, tables: torch.Tensor, value_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of blocks `[n, width]`, each `[n, kv_heads, width * BLOCK_SIZE, size]`."""
    keys = layer.keys[tables].permute(0, 2, 1, 4, 3).flatten(2, 3)
    values = layer.values[tables].permute(0, 2, 1, 3, 4).flatten(2, 3)[..., :value_size]
    return keys, values


def _additive(visible: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~visible, float("-inf"))


forward_context: ContextVar[Any] = ContextVar("forward_context")
"""The context of the forward that is running: a `ForwardContext`, or on the GPU path a
`StepContext`. The attention function reads it."""

"""What one packed forward works on: the rows of each sequence, and where their KV lies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.paging.kv import KVPool, LayerKV


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start : start + count` of a packed forward: the next tokens of one sequence."""

    start: int
    count: int
    past: int
    """Tokens before these rows."""
    table: list[int]
    """The blocks that hold tokens up to `end`."""

    @property
    def end(self) -> int:
        """Tokens with these rows."""
        return self.past + self.count


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that a step's forward depends on: whoever has it computes the same."""

    tokens: list[list[int]]
    """Per sequence, the tokens it is fed."""
    past: list[int]
    """Per sequence, the tokens before them."""
    tables: list[list[int]]
    """Per sequence, the blocks that hold what comes before and what is fed."""

    def segments(self) -> list[Segment]:
        """The sequences' rows, packed one behind the other."""
        starts = itertools.accumulate(map(len, self.tokens), initial=0)
        rows = zip(starts, map(len, self.tokens), self.past, self.tables, strict=False)
        return [Segment(*each) for each in rows]


class Step:
    """The segments of one packed forward. Tensors are made once and serve every layer."""

    def __init__(self, pool: KVPool, segments: Sequence[Segment]) -> None:
        self.pool = pool
        self.segments = segments
        self._made: dict[tuple[object, ...], torch.Tensor] = {}

    @cached_property
    def layout(self) -> torch.Tensor:
        """int32 `[n, 4]`: start, count, past, and where the segment's blocks begin in `tables`."""
        rows, at = [], 0
        for segment in self.segments:
            rows.append((segment.start, segment.count, segment.past, at))
            at += len(segment.table)
        return torch.tensor(rows, dtype=torch.int32)

    @cached_property
    def tables(self) -> torch.Tensor:
        """int32, the segments' block ids one after the other."""
        return torch.tensor([b for s in self.segments for b in s.table], dtype=torch.int32)

    @cached_property
    def singles(self) -> list[Segment]:
        """Segments of one row: sequences that decode."""
        return [s for s in self.segments if s.count == 1]

    @cached_property
    def chunks(self) -> list[Segment]:
        """Segments of several rows: pieces of prompts."""
        return [s for s in self.segments if s.count > 1]

    def write(self, layer: LayerKV, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put keys and values `[kv_heads, rows, size]` of the packed rows into their blocks."""
        blocks, offsets = self._slots(key.device)
        layer.keys[blocks, :, :, offsets] = key.transpose(0, 1)
        layer.values[blocks, :, offsets, : value.shape[-1]] = value.transpose(0, 1)

    def read(
        self, layer: LayerKV, segments: Sequence[Segment], value_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[n, kv_heads, columns, size]` of segments, a column per token."""
        device = layer.keys.device
        keys, values = gather(layer, self._padded_tables(segments, device), value_size)
        # Beyond its end a sequence's last block holds what was there before, NaN for all we know,
        # which no mask hides: nothing times NaN is NaN.
        beyond = self._beyond(segments, keys.shape[2], device)
        return keys.masked_fill(beyond, 0), values.masked_fill(beyond, 0)

    def single_rows(self, device: torch.device) -> torch.Tensor:
        """The rows of `singles`, int64."""
        return self._once("rows", device, lambda: [s.start for s in self.singles])

    def single_mask(self, columns: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Additive `[n, 1, 1, columns]`: what the one row of each of `singles` sees."""

        def make() -> torch.Tensor:
            ends = torch.tensor([s.end for s in self.singles], device=like.device)[:, None]
            column = torch.arange(columns, device=like.device)[None]
            seen = column < ends
            if window:
                seen &= column >= ends - window
            return _additive(seen, like)[:, None, None]

        return self._kept(("single_mask", columns, window, like.device, like.dtype), make)

    def chunk_mask(
        self, segment: Segment, columns: int, window: int | None, like: torch.Tensor
    ) -> torch.Tensor:
        """Additive `[count, columns]`: each row sees itself and what came before it."""

        def make() -> torch.Tensor:
            row = torch.arange(segment.past, segment.end, device=like.device)[:, None]
            column = torch.arange(columns, device=like.device)[None]
            seen = column <= row
            if window:
                seen &= column > row - window
            return _additive(seen, like)

        return self._kept(("mask", segment.start, columns, window, like.device, like.dtype), make)

    def _slots(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset of every packed row."""

        def place(part: int) -> list[int]:
            return [
                (s.table[t // BLOCK_SIZE], t % BLOCK_SIZE)[part]
                for s in self.segments
                for t in range(s.past, s.end)
            ]

        return (
            self._once("blocks", device, lambda: place(0)),
            self._once("offsets", device, lambda: place(1)),
        )

    def _beyond(
        self, segments: Sequence[Segment], columns: int, device: torch.device
    ) -> torch.Tensor:
        """`[n, 1, columns, 1]`: columns behind each segment's end."""

        def make() -> torch.Tensor:
            ends = torch.tensor([s.end for s in segments], device=device)[:, None]
            beyond = torch.arange(columns, device=device)[None] >= ends
            return beyond[:, None, :, None]

        key = ("beyond", *(s.start for s in segments), columns, device)
        return self._kept(key, make)

    def _padded_tables(self, segments: Sequence[Segment], device: torch.device) -> torch.Tensor:
        def padded() -> list[list[int]]:
            width = max(len(s.table) for s in segments)
            return [s.table + [0] * (width - len(s.table)) for s in segments]

        return self._once(("tables", *(s.start for s in segments)), device, padded)

    def _once(self, name: object, device: torch.device, make: Callable[[], Any]) -> torch.Tensor:
        return self._kept((name, device), lambda: torch.tensor(make(), device=device))

    def _kept(self, key: tuple[object, ...], make: Callable[[], Any]) -> torch.Tensor:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def gather(
    layer: LayerKV, tables: torch.Tensor, value_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks `[n, width]` side by side: `[n, kv_heads, width * BLOCK_SIZE, size]`, twice."""
    keys = layer.keys[tables].permute(0, 2, 1, 4, 3).flatten(2, 3)
    values = layer.values[tables].permute(0, 2, 1, 3, 4).flatten(2, 3)[..., :value_size]
    return keys, values


def _additive(seen: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~seen, float("-inf"))


current: ContextVar[Step] = ContextVar("step")
"""The step whose forward is running."""

"""The path for architectures without transformers' attention interface (BLOOM, for one).

A `Cache` over the same per-sequence KV: decode tokens of many sequences run as one left-padded
batch, each prompt chunk as a batch of its own, with the plain 2-D mask every architecture knows.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from runners.ragged.kv import SequenceKV


class PaddedCache(Cache):
    """Shows the KV of several sequences as one right-aligned batch of `length` columns."""

    is_compileable = False

    def __init__(self, sequences: list[SequenceKV], count: int) -> None:
        super().__init__(layers=[])
        self._sequences = sequences
        self._count = count
        self._past = max(kv.length for kv in sequences)

    @property
    def length(self) -> int:
        """Columns of the batch, the new tokens included."""
        return self._past + self._count

    def mask(self) -> torch.Tensor:
        """`[B, length]`, 1 where a row has a token."""
        ends = torch.tensor([kv.length + self._count for kv in self._sequences])
        return (torch.arange(self.length)[None] >= self.length - ends[:, None]).long()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, kv_heads, count, D]`; return `[B, kv_heads, length, D]`, left-padded."""
        rows = [
            kv.append(layer_idx, key_states[i], value_states[i])
            for i, kv in enumerate(self._sequences)
        ]
        if len(rows) == 1:
            return rows[0][0][None], rows[0][1][None]
        return self._align([keys for keys, _ in rows]), self._align([values for _, values in rows])

    def _align(self, rows: list[torch.Tensor]) -> torch.Tensor:
        heads, _, size = rows[0].shape
        batch = rows[0].new_zeros(len(rows), heads, self.length, size)
        for i, row in enumerate(rows):
            batch[i, :, self.length - row.shape[1] :] = row
        return batch

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the new tokens."""
        return self._past

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Columns of the attention mask, and its offset."""
        return self.length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Unbounded here; the scheduler keeps sequences within the context."""
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        """All layers keep the whole sequence; windows are the mask's business."""
        return [False]

    def __len__(self) -> int:
        return 0

"""The path for architectures without transformers' attention interface (BLOOM, for one).

A `Cache` over the same blocks: decode tokens of many sequences run as one left-padded batch, each
prompt chunk as a batch of its own, with the plain 2-D mask every architecture knows.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.paging.step import Step


class PaddedCache(Cache):
    """Shows the KV of a step's sequences as one right-aligned batch of `length` columns.

    Every segment of the step has the same count of rows.
    """

    is_compileable = False

    def __init__(self, step: Step) -> None:
        super().__init__(layers=[])
        self._step = step
        self._count = step.segments[0].count
        self._past = max(s.past for s in step.segments)
        self._places: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Columns of the batch, the new tokens included."""
        return self._past + self._count

    def mask(self) -> torch.Tensor:
        """`[B, length]`, 1 where a row has a token."""
        ends = torch.tensor([s.end for s in self._step.segments])
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
        layer = self._step.pool.layer(layer_idx, key_states, value_states)
        key = key_states.transpose(0, 1).flatten(1, 2)
        self._step.write(layer, key, value_states.transpose(0, 1).flatten(1, 2))
        blocks, offsets, padding = self._columns(key.device)
        keys = layer.keys[blocks, :, :, offsets].transpose(1, 2)
        values = layer.values[blocks, :, offsets].transpose(1, 2)[..., : value_states.shape[-1]]
        # The mask alone would not do: another sequence's NaN times nothing is NaN.
        return keys.masked_fill(padding, 0), values.masked_fill(padding, 0)

    def _columns(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block and offset of every column `[B, length]`, and where there is but padding, which
        shows some block's first token: `[B, 1, length, 1]`."""
        if device not in self._places:
            blocks, offsets = [], []
            for s in self._step.segments:
                pad = [0] * (self.length - s.end)
                blocks.append(pad + [s.table[t // BLOCK_SIZE] for t in range(s.end)])
                offsets.append(pad + [t % BLOCK_SIZE for t in range(s.end)])
            self._places[device] = (
                torch.tensor(blocks, device=device),
                torch.tensor(offsets, device=device),
                (self.mask() == 0).to(device)[:, None, :, None],
            )
        return self._places[device]

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

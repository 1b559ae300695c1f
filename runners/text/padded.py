"""The padded layout, for architectures without transformers' attention interface (such as BLOOM).

A `Cache` over the KV blocks. The decoding sequences run as one left-padded batch and each chunk of
a prompt as a batch of one, with the plain 2-D attention mask that every architecture takes.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from typing_extensions import override

from runners.text.paging.batch import ForwardContext
from runners.text.paging.blocks import BLOCK_SIZE


class PaddedCache(Cache):
    """The KV of a batch as one right-aligned tensor of `length` columns per layer.

    All segments of the batch have the same number of rows.
    """

    is_compileable = False

    def __init__(self, context: ForwardContext) -> None:
        super().__init__(layers=[])
        self._context = context
        self._count = context.segments[0].count
        self._past = max(s.past for s in context.segments)
        self._gather: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Columns of the batch, including the new tokens."""
        return self._past + self._count

    def mask(self) -> torch.Tensor:
        """int64 `[B, length]`, 1 for a token and 0 for padding."""
        ends = torch.tensor([s.end for s in self._context.segments])
        return (torch.arange(self.length)[None] >= self.length - ends[:, None]).long()

    @override
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._context.pool.layer(layer_idx, key_states, value_states)
        key = key_states.transpose(0, 1).flatten(1, 2)
        self._context.write(layer, key, value_states.transpose(0, 1).flatten(1, 2))
        blocks, offsets, padding = self._columns(key.device)
        keys = layer.keys[blocks, :, :, offsets].transpose(1, 2)
        values = layer.values[blocks, :, offsets].transpose(1, 2)[..., : value_states.shape[-1]]
        # The mask does not suffice: zero times the NaN of another sequence is NaN.
        return keys.masked_fill(padding, 0), values.masked_fill(padding, 0)

    def _columns(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block and offset of every column, `[B, length]`, and a mask of the padding,
        `[B, 1, length, 1]`. Padding refers to the first token of some block."""
        if device not in self._gather:
            blocks, offsets = [], []
            for s in self._context.segments:
                pad = [0] * (self.length - s.end)
                blocks.append(pad + [s.block_table[t // BLOCK_SIZE] for t in range(s.end)])
                offsets.append(pad + [t % BLOCK_SIZE for t in range(s.end)])
            self._gather[device] = (
                torch.tensor(blocks, device=device),
                torch.tensor(offsets, device=device),
                (self.mask() == 0).to(device)[:, None, :, None],
            )
        return self._gather[device]

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._past

    @override
    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, unlimited: the scheduler keeps sequences within the context."""
        return -1

    @property
    @override
    def is_sliding(self) -> list[bool]:
        # Every layer keeps the whole sequence; the mask applies a window.
        return [False]

    def __len__(self) -> int:
        return 0

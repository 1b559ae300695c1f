"""The KV cache of the GPU path: pages of every layer, on the device of that layer."""

from __future__ import annotations

import torch

from runners.text.gpu.attention import KVPages
from runners.text.paging.blocks import BLOCK_SIZE, fewer
from runners.text.paging.kv import bytes_per_block


class PagePool:
    """Pages for `blocks` KV blocks in every layer, and one more for the rows of padding.

    Keys and values are `[blocks + 1, BLOCK_SIZE, kv_heads, size]`, as the attention kernels of
    FlashAttention and FlashInfer read them, of type `dtype` or else of that of the model. A layer
    is allocated when it is first used.
    """

    def __init__(self, blocks: int, dtype: torch.dtype | None = None) -> None:
        self.blocks = blocks
        self._dtype = dtype
        self._layers: dict[int, KVPages] = {}

    @property
    def scratch_page(self) -> int:
        """The page of what nothing reads."""
        return self.blocks

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> KVPages:
        """The pages of a layer, allocated for keys and values `[..., kv_heads, n, size]`."""
        if (layer := self._layers.get(index)) is None:
            layer = KVPages(self._pages(key), self._pages(value))
            self._layers[index] = layer
        return layer

    def smaller(self) -> PagePool | None:
        """An empty pool with fewer blocks; None if that is none."""
        blocks = fewer(self.blocks)
        return None if blocks is None else PagePool(blocks, self._dtype)

    def bytes_per_block(self) -> dict[torch.device, int]:
        """Bytes of one block in all layers, per device."""
        return bytes_per_block(t for x in self._layers.values() for t in (x.keys, x.values))

    def _pages(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self.blocks + 1, BLOCK_SIZE, like.shape[-3], like.shape[-1])
        return torch.zeros(shape, dtype=self._dtype or like.dtype, device=like.device)

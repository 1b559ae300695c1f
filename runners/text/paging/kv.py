"""The KV cache: blocks of every layer, on whatever device the layer lives."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch

from runners.text.paging.blocks import BLOCK_SIZE

PAD = 32
"""Values are padded to a multiple of this many numbers, which suits every kernel's width."""


def padded(value_size: int) -> int:
    """The numbers a value takes."""
    return -(-value_size // PAD) * PAD


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's blocks.

    Keys `[blocks, kv_heads, key_size, BLOCK_SIZE]`, so that one query meets a block's keys side by
    side; values `[blocks, kv_heads, BLOCK_SIZE, value_size]`, `value_size` padded.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def native(self) -> bool:
        """Whether the CPU kernels can work on it."""
        return self.keys.dtype == torch.float32 and self.keys.device.type == "cpu"


class KVPool:
    """KV of `blocks` blocks per layer. A layer's tensors are made when it first writes."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._layers: dict[int, LayerKV] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> LayerKV:
        """A layer's blocks, fit for keys and values `[..., kv_heads, n, size]` like these."""
        if (found := self._layers.get(index)) is None:
            heads, size = key.shape[-3], padded(value.shape[-1])
            found = LayerKV(
                _zeros(key, self.blocks, heads, key.shape[-1], BLOCK_SIZE),
                _zeros(value, self.blocks, heads, BLOCK_SIZE, size),
            )
            self._layers[index] = found
        return found

    def bytes_per_block(self) -> dict[torch.device, int]:
        """Bytes that one block takes on each device."""
        total: dict[torch.device, int] = {}
        for layer in self._layers.values():
            for tensor in (layer.keys, layer.values):
                size = tensor[0].numel() * tensor.element_size()
                total[tensor.device] = total.get(tensor.device, 0) + size
        return total


def _zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Zeros, on a CPU without touching the memory: pages become resident as they are written.

    Mapped here, in small pages: an allocator that asks for huge ones (NumPy's) makes all layers
    clear two megabytes each in the same step, which every stream feels.
    """
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    count = torch.Size(shape).numel() * like.element_size()
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)
